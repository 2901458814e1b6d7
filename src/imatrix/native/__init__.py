"""The compiled parts: the engine and the quantizer, and their types for type checkers."""

import os
import sys
from pathlib import Path

if sys.platform == "win32":
    # There a library has no rpath: the folder of the engine's is named once for the process.
    _libraries = Path(__file__).parents[1] / "lib"
    if _libraries.is_dir():
        os.add_dll_directory(str(_libraries))
