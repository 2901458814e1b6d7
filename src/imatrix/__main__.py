"""`python -m imatrix` is the `imatrix` command."""

from imatrix.cli import entry

entry()
