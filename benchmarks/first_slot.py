"""What slot 0 of a chunk does to the head's data, on the shipped model.

    python benchmarks/first_slot.py    # writes benchmarks/results/first-slot.md; seconds

Slot 0 holds a chunk's first token together with a state of zeros. The engine's driver puts it into
the head's cache and begins no draft there, and collecting does the same. This is compared with the
two other things that a collector could do: count its rows too, or leave slot 0 out of the cache, as
llama-imatrix --nextn does.
"""

from __future__ import annotations

from datetime import date
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from imatrix import demo
from imatrix.native import engine
from imatrix.text import chunks

RESULTS = Path(__file__).parent / "results"
N_CTX, N_CHUNKS = 256, 10
MADE = {
    "counted": "in the cache, its rows counted too",
    "absent": "absent from the cache (llama-imatrix --nextn)",
}

Means = dict[str, NDArray[np.float64]]


def means(first_slot: str) -> Means:
    """The mean squared activations of each head weight: [n_mat, n_in], NaN if there were no rows."""
    model = engine.Model(
        str(demo.MODEL), mtp=True, n_gpu_layers=0, use_mmap=True, check_tensors=False
    )
    session = engine.Session(model, model)
    session.open(
        n_ctx=N_CTX, n_batch=N_CTX, n_ubatch=N_CTX, n_seq=1, n_threads=2, mtp=True,
        process_output=False, perplexity=False, first_slot=first_slot,
    )  # fmt: skip
    for chunk in chunks.chunks(demo.CALIBRATION, model, N_CTX, max_chunks=N_CHUNKS):
        session.step(chunk, np.array([len(chunk)], dtype=np.int32))
    found = {}
    for name, (sums, counts, _) in session.snapshot().items():
        if name.startswith(f"blk.{model.n_trunk}."):
            with np.errstate(invalid="ignore"):
                found[name] = sums / counts[:, None]
    return found


def difference(other: Means, base: Means) -> dict[str, tuple[float, float]]:
    """By weight: the relative difference of a channel's mean, the largest and the median one.

    Channels whose mean is under a hundredth of their matrix's largest are left out: a quantizer
    hardly looks at them, and one row of an unusual size is many times what the others have there.
    """
    found = {}
    for name in base:
        kept = base[name] > 0.01 * np.max(base[name], axis=1, keepdims=True)  # False for NaN
        gap = np.abs(other[name][kept] / base[name][kept] - 1.0)
        found[name] = float(gap.max()), float(np.median(gap))
    return found


def main() -> None:
    base = means("cached")
    columns = {way: difference(means(way), base) for way in MADE}
    lines = [
        "# What slot 0 of a chunk does to the head's data",
        "",
        f"{date.today()}. The shipped model, {N_CHUNKS} chunks of {N_CTX} tokens of the shipped "
        "calibration text. Relative difference of a channel's mean squared activation from what "
        "collecting gives (slot 0 in the cache, its rows not counted): the largest of a weight's "
        "channels, and the median. Channels whose mean is under a hundredth of their matrix's "
        "largest are left out. Made by benchmarks/first_slot.py.",
        "",
        "| weight of the head | " + " | ".join(MADE.values()) + " |",
        "|---|" + "---|" * len(MADE),
    ]
    for name in base:
        cells = " | ".join(
            f"{100 * most:.1f} %, {100 * usual:.1f} %"
            for most, usual in (columns[way][name] for way in MADE)
        )
        lines.append(f"| {name.split('.', 2)[2].removesuffix('.weight')} | {cells} |")
    (RESULTS / "first-slot.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
