"""The command line."""

from __future__ import annotations

from imatrix.cli.main import entry, main

__all__ = ["entry", "main"]
