"""The command line: `imatrix COMMAND`.

program has the table of the commands, commands/ a module for each, flags/ what several share.
"""

from __future__ import annotations

from imatrix.cli.program import entry, main

__all__ = ["entry", "main"]
