"""The version, from the package's own metadata: pyproject.toml is the one place it is written."""

from importlib.metadata import version

__version__ = version("imatrix")
