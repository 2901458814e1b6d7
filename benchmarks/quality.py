"""What importance data for an MTP head are worth, by type, kind of data and calibration.

    python benchmarks/quality.py             # or: make quality

It writes benchmarks/results/quality.{md,json,png}. The model that comes with the package is quantized
in every way below and compared with its F16 file, on text that neither training nor calibration saw.
The full cross product would take half a day, so it measures these parts:

- every type and every kind of head data, with one calibration (the largest of the first text) and
  the trunk at Q8_0, in-domain; collected and flat data also out-of-domain;
- the same with the trunk at the head's type, in-domain, without the borrowed data;
- every calibration text and size for a few low types, with collected head data, the trunk at Q8_0,
  and both texts.

Everything is cached under build/quality/ by a digest of what it was made from, so the same command
goes on where it was stopped. Processes with one thread each do the work.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import quality_report
from quality_cells import Study, Text, cells, run

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results"


def study_of(model: Path, chunks: int | None, sizes: Sequence[int]) -> Study:
    """The study of a model on the texts of corpus.py."""
    import corpus

    return Study(
        model=model,
        calibration=tuple(Text(name, corpus.text(name)) for name in corpus.CALIBRATION),
        sizes=tuple(sizes),
        held_out=(
            Text("in-domain", corpus.text("held-out"), chunks),
            Text("out-of-domain", corpus.text("held-out-prose"), chunks),
        ),
    )


def main(argv: Sequence[str] | None = None) -> int:
    from imatrix.demo import MODEL

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--model", type=Path, default=MODEL, help="the model to quantize (default: the package's)")
    add("--folder", type=Path, default=ROOT / "build" / "quality", help="for what is cached")
    add("--out", type=Path, default=RESULTS, help="for the results")
    add("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes")
    add("--chunks", type=int, default=48, help="chunks of each held-out text (default: 48)")
    add(
        "--calibration-chunks",
        type=int,
        nargs="+",
        default=[20, 98, 391],  # 10k, 50k and 200k tokens
        metavar="N",
        help="calibration sizes, ascending",
    )
    args = parser.parse_args(argv)

    study = study_of(args.model, args.chunks, args.calibration_chunks)
    made, references = run(study, cells(study), args.folder, args.workers)
    args.out.mkdir(parents=True, exist_ok=True)
    quality_report.write(study, made, references, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
