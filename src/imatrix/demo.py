"""`imatrix demo`: the whole job on a small trained model, and what the head's data are worth."""

from __future__ import annotations

from pathlib import Path

__all__ = ["CALIBRATION", "FILES", "HELD_OUT", "MODEL"]

_DATA = Path(__file__).parent / "data"
MODEL = _DATA / "tiny-glm4moe-mtp.gguf"
CALIBRATION = _DATA / "calibration.txt"
HELD_OUT = _DATA / "held-out.txt"
TYPE = "IQ2_XXS"


WITH_HEAD, TRUNK_ONLY = "with-head.gguf", "trunk-only.gguf"


FILES = (
    *(WITH_HEAD, TRUNK_ONLY),
    *(f"head-{TYPE}-{data}.gguf" for data in ("flat", "collected", "none")),
)
"""What it writes into its folder."""
