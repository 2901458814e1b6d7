"""Where the engine's own programs are, for tests and benchmarks."""

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
    """vendor/llama.cpp.toml, the one place that says which engine it is."""
    return tomllib.loads((ROOT / "vendor" / "llama.cpp.toml").read_text(encoding="utf-8"))


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


def environment() -> dict[str, str]:
    """For these programs: one in which they write their log to its end before they exit, as far as
    there is a way to have that (tests/native/wait_for_log.cpp).

    Raises:
        LookupError: what does it is not built.
    """
    if sys.platform != "linux":
        return dict(os.environ)
    name = "libimatrix-wait-for-log.so"
    found = list(ROOT.glob(f"build/*/tests/native/{name}"))
    if not found:
        raise LookupError(f"{name} is not built: run `make tools`")
    library = max(found, key=lambda path: path.stat().st_mtime)
    return {**os.environ, "LD_PRELOAD": str(library)}
