"""TODO."""

from __future__ import annotations

from imatrix.engine import process
from imatrix.native import engine

__all__ = ["FOREIGN_HEAD", "NativeModel", "NativeSession"]

# Here, or in a process of their own.
NativeModel = engine.Model | process.Model
NativeSession = engine.Session | process.Session
FOREIGN_HEAD = "mtp:"  # kForeignHead in ext/session.h
