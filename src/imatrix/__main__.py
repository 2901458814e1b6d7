"""`python -m imatrix` is the `imatrix` command."""

from __future__ import annotations

from imatrix.cli.program import entry

entry()
