"""Another package's llama.cpp in the process: collects beside llama-cpp-python, in both orders of
import, and compares with a process that has imatrix alone. Run by `portable.py beside`; as a program
of its own it is one of these processes:

    python beside.py {alone,ours-first,theirs-first,theirs-alone} FOLDER

It needs imatrix and, but for "alone", llama-cpp-python, and writes what it made into FOLDER.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

PACKAGE = "llama-cpp-python"
VERSION = "0.3.36"  # the newest when this was written
ORDERS = {"ours-first": "imatrix, then llama_cpp", "theirs-first": "llama_cpp, then imatrix"}
# When a matrix is collected, against what the other package does meanwhile.
MOMENTS = ("before", "between", "during", "after")


def compare(python: Path, folder: Path) -> dict[str, Any]:
    """Run the processes; what they found.

    Args:
        python: the interpreter of an environment with both packages.
        folder: an empty one.

    Returns:
        "version": of the other package, "rows": for each order and moment what was compared.
    """
    told = {}
    for what in ("alone", "theirs-alone", *ORDERS):
        (folder / what).mkdir()
        done = subprocess.run(
            [python, __file__, what, folder / what], capture_output=True, text=True, cwd=folder
        )
        if done.returncode != 0:
            sys.exit(f"{what}: status {done.returncode}\n{done.stdout}{done.stderr}")
        told[what] = json.loads((folder / what / "told.json").read_text())

    import imatrix

    alone = imatrix.ImportanceMatrix.load(folder / "alone" / "alone.gguf")
    rows = []
    for order, words in ORDERS.items():
        # what it generates is not changed either
        assert told[order]["texts"] == told["theirs-alone"]["texts"], (order, told)
        for moment in MOMENTS:
            matrix = imatrix.ImportanceMatrix.load(folder / order / f"{moment}.gguf")
            assert list(matrix) == list(alone)
            for name, entry in matrix.items():
                for mine, other in (
                    (entry.sums, alone[name].sums),
                    (entry.counts, alone[name].counts),
                ):
                    assert mine.tobytes() == other.tobytes(), (order, moment, name)
            rows.append({"order": words, "moment": moment, "weights": len(matrix)})
            print(rows[-1], file=sys.stderr, flush=True)
    return {
        "version": told["theirs-alone"]["version"],
        "libraries": told["theirs-first"]["libraries"],
        "rows": rows,
    }


# --- one of the processes --------------------------------------------------------------------------


def collect(folder: Path, name: str) -> None:
    import imatrix
    from imatrix.demo import CALIBRATION, MODEL

    # in this process: with isolate=True the engine would be in another one
    with imatrix.Collector(MODEL, n_ctx=64, n_threads=2, isolate=False) as collector:
        text = CALIBRATION.read_text("utf-8")[:4000]
        collector.run(text, mtp=True, max_chunks=4).save(folder / f"{name}.gguf")


class Theirs:
    """The same model, loaded with the other package."""

    def __init__(self) -> None:
        import llama_cpp

        path = next((self._data() / "data").glob("*.gguf"))
        self.version: str = llama_cpp.__version__
        self._model = llama_cpp.Llama(str(path), n_ctx=256, n_threads=1, seed=1, verbose=False)
        self.texts: list[str] = []

    def _data(self) -> Path:
        """The folder of the package imatrix, which is not imported for it."""
        import importlib.util

        found = importlib.util.find_spec("imatrix")
        assert found is not None
        assert found.origin is not None
        return Path(found.origin).parent

    def generate(self) -> None:
        answer: Any = self._model.create_completion("def ", max_tokens=24, temperature=0.0)
        self.texts.append(answer["choices"][0]["text"])


def main(what: str, folder: Path) -> None:
    told: dict[str, Any] = {}
    if what == "alone":
        collect(folder, "alone")
    elif what == "theirs-alone":
        theirs = Theirs()
        for _ in range(3):
            theirs.generate()
        told = {"version": theirs.version, "texts": theirs.texts}
    else:
        if what == "ours-first":
            collect(folder, "before")
            theirs = Theirs()
        else:
            theirs = Theirs()
            collect(folder, "before")
        theirs.generate()
        collect(folder, "between")
        thread = threading.Thread(target=theirs.generate)
        thread.start()
        collect(folder, "during")
        thread.join()
        theirs.generate()
        collect(folder, "after")
        names = {
            line.split()[-1].rsplit("/", 1)[-1]
            for line in Path("/proc/self/maps").read_text().splitlines()
        }
        libraries = sorted(n for n in names if "llama" in n or "ggml" in n or "gomp" in n)
        told = {"texts": theirs.texts, "libraries": libraries}
    (folder / "told.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
