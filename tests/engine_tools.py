"""Where the engine's own programs are, for tests and benchmarks."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def find(name: str) -> Path:
    """The path of llama-imatrix, llama-quantize, llama-perplexity or llama-speculative-simple: in
    $IMATRIX_TOOLS, else where the build puts them.

    Raises:
        LookupError: it is not there; the message says what to run.
    """
    folder = os.environ.get("IMATRIX_TOOLS")
    found = [Path(folder) / name] if folder else list(ROOT.glob(f"build/*/bin/{name}"))
    found = [path for path in found if path.is_file() and os.access(path, os.X_OK)]
    if not found:
        raise LookupError(
            f"{name} is not built: run `make tools` (`make test` does), or set IMATRIX_TOOLS "
            "to the folder with the engine's programs"
        )
    # of several builds, the one made last
    return max(found, key=lambda path: path.stat().st_mtime)
