"""The small trained model that comes with the package, with texts for it."""

from __future__ import annotations

from pathlib import Path

__all__ = ["CALIBRATION", "HELD_OUT", "MODEL"]

_DATA = Path(__file__).parent / "data"

MODEL = _DATA / "tiny-glm4moe-mtp.gguf"
"""A glm4moe model with an MTP head."""

CALIBRATION = _DATA / "calibration.txt"
"""Text to collect over."""

HELD_OUT = _DATA / "held-out.txt"
"""Other text, to measure on."""
