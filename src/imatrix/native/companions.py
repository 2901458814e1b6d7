"""Distributions that bring a backend of the engine as a module, for this package to load."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from dataclasses import dataclass
from pathlib import Path

from imatrix._version import __version__

__all__ = ["Companion", "companions"]

# vendor/cuda makes it
_DISTRIBUTIONS = ("imatrix-cuda",)


@dataclass(frozen=True)
class Companion:
    """One that is installed.

    Attributes:
        folder: where its modules are.
        problem: why they cannot be loaded, "" if they can.
    """

    folder: Path
    problem: str


def companions() -> list[Companion]:
    """Those that are installed; none of them is imported.

    A module shares structures with the engine that it is loaded into, which change from version to
    version. The engine compares a number that seldom changes (GGML_BACKEND_API_VERSION), so the
    versions of the distributions have to be equal.
    """
    found = []
    for distribution in _DISTRIBUTIONS:
        spec = importlib.util.find_spec(distribution.replace("-", "_"))
        for place in (spec.submodule_search_locations or ()) if spec is not None else ():
            found.append(Companion(Path(place) / "lib", _problem(distribution)))
    return found


def _problem(distribution: str) -> str:
    cure = f"pip install {distribution}=={__version__}"
    try:
        version = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return f"{distribution} was not installed by a package manager, so its version is unknown; {cure}"
    if version != __version__:
        return f"{distribution} {version} is not for imatrix {__version__}; {cure}"
    return ""
