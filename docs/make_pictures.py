"""Draw the pictures of docs/plot.md into docs/pictures/, of the model that comes with the package.

python docs/make_pictures.py
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
DATA = HERE.parent / "src" / "imatrix" / "data"
MODEL = DATA / "tiny-glm4moe-mtp.gguf"
TEXTS = {"imatrix.gguf": "calibration.txt", "python.gguf": "held-out.txt"}
PICTURES = {
    "layers.png": ["--dpi", "120"],
    "experts.svg": ["--kind", "experts"],
    "channels.svg": ["--weight", "blk.3.ffn_down_exps", "--weight", "blk.4.nextn.eh_proj"],
    "compare.svg": ["--with", "python.gguf", "--difference", "cosine"],
}


def main() -> None:
    (HERE / "pictures").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:

        def imatrix(*arguments: object) -> None:
            command = [sys.executable, "-m", "imatrix", *map(str, arguments)]
            subprocess.run(command, cwd=folder, check=True)

        for matrix, text in TEXTS.items():
            imatrix("collect", "-m", MODEL, "-f", DATA / text, "-o", matrix, "--mtp", "--no-ppl")
        for name, flags in PICTURES.items():
            imatrix("plot", "imatrix.gguf", "-o", HERE / "pictures" / name, *flags)


if __name__ == "__main__":
    main()
