"""The version: this is the one place where it is written. pyproject.toml reads it from here for the
wheel and the sdist, and CHANGELOG.md has an entry for it (tests/wheel/check_dist.py)."""

from __future__ import annotations

__version__ = "0.2.0"
