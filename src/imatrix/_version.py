"""The version, from the package's own metadata: pyproject.toml is the one place it is written."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("imatrix")
except PackageNotFoundError:  # a source tree on the path that was never installed
    __version__ = "0+uninstalled"
