"""Finds the engine's own programs, for tests and benchmarks."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:  # as vendor/fetch.py does
    from pip._vendor import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]


def pin() -> dict[str, Any]:
    """vendor/llama.cpp.toml, the one file that says which engine is used."""
    return tomllib.loads((ROOT / "vendor" / "llama.cpp.toml").read_text(encoding="utf-8"))


def find(name: str) -> Path:
    """The path of llama-imatrix, llama-quantize, llama-perplexity or llama-speculative-simple: in
    $IMATRIX_TOOLS if it is set, else in the build folder.

    Raises:
        LookupError: it is not there; the message says which command builds it.
    """
    folder = os.environ.get("IMATRIX_TOOLS")
    found = [Path(folder) / name] if folder else list(ROOT.glob(f"build/*/bin/{name}"))
    found = [path for path in found if path.is_file() and os.access(path, os.X_OK)]
    if not found:
        raise LookupError(
            f"{name} is not built: run `make tools` (`make test` does), or set IMATRIX_TOOLS "
            "to the folder with the engine's programs"
        )
    # of several builds, the last one
    return max(found, key=lambda path: path.stat().st_mtime)


def environment() -> dict[str, str]:
    """An environment in which these programs write their whole log before they exit, as far as that
    is possible (tests/native/wait_for_log.cpp).

    Raises:
        LookupError: the library that does this is not built.
    """
    if sys.platform != "linux":
        return dict(os.environ)
    name = "libimatrix-wait-for-log.so"
    found = list(ROOT.glob(f"build/*/tests/native/{name}"))
    if not found:
        raise LookupError(f"{name} is not built: run `make tools`")
    library = max(found, key=lambda path: path.stat().st_mtime)
    return {**os.environ, "LD_PRELOAD": str(library)}
