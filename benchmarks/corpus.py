"""The texts for training and measuring the small model, taken from the running Python's library.

Everything comes from the standard library's own folder (sources, tests and documentation, PSF
licence), so any machine with the same Python has the same text. Files are ordered by the SHA-256 of
their path, not at random, and every text has a digest.

    held-out        whole modules, in-domain; shipped as src/imatrix/data/held-out.txt
    held-out-prose  language reference in English, out-of-domain; data/held-out-prose.txt
    train           all other sources, with the library's tests
    code            calibration: sources kept out of training
    prose           calibration: the rest of the language reference, and docstrings
    tables          calibration: test vectors, code pages, mail and markup

`python benchmarks/corpus.py FOLDER` writes the texts into that folder and prints their sizes and
digests. The repository has only the two held-out texts. No other text shares 200 characters in a row
with them.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import platform
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Set
from functools import cache
from pathlib import Path

__all__ = ["CALIBRATION", "DATA", "HELD_OUT", "describe", "documents", "shared_text", "text"]

DATA = Path(__file__).resolve().parent.parent / "src" / "imatrix" / "data"
HELD_OUT = {"held-out": "held-out.txt", "held-out-prose": "held-out-prose.txt"}
CALIBRATION = ("code", "prose", "tables")

# Bytes of each text: enough for 200k tokens of a calibration text if a token has 2.5 bytes or more.
_HELD_OUT_BYTES = 150_000
_PROSE_BYTES = 100_000
_CALIBRATION_BYTES = 800_000
# If two texts share this many characters in a row, they are assumed to share a passage.
_SHARED = 200


def _library() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _order(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError:
        return None  # some tests are in other encodings on purpose


# Code pages are tables of numbers, not language; the language reference is the out-of-domain text.
_NOT_SOURCES = ("site-packages/", "encodings/", "pydoc_data/", "config-", "ensurepip/_bundled/")


@cache
def _sources() -> dict[str, str]:
    """Every module and test, by its path in the library, in the order of the paths' hashes."""
    root = _library()
    found = {}
    for path in root.rglob("*.py"):
        name = path.relative_to(root).as_posix()
        if name.startswith(_NOT_SOURCES) or name.startswith("_sysconfigdata"):
            continue
        content = _read(path)
        if content is not None and len(content) > 200:
            found[name] = content
    return {name: found[name] for name in sorted(found, key=_order)}


def _windows(content: str) -> set[str]:
    """Every run of half of _SHARED characters. If two texts share a run of _SHARED - 1 characters,
    one of these half runs begins at a multiple of the half in the other text."""
    half = _SHARED // 2
    return {content[i : i + half] for i in range(len(content) - half + 1)}


def _meets(content: str, windows: Set[str]) -> bool:
    half = _SHARED // 2
    return any(content[i : i + half] in windows for i in range(0, len(content) - half + 1, half))


def shared_text(one: str, other: str) -> bool:
    """Whether two texts share 200 characters in a row; true for some that share only 100."""
    return _meets(other, _windows(one))


@cache
def _split() -> dict[str, dict[str, str]]:
    """Sources into held-out, code (for calibration) and train."""
    sources = _sources()
    # Modules of ordinary size, not tests: what a model of Python should know.
    candidates = [
        name
        for name, content in sources.items()
        if not name.startswith(("test/", "lib2to3/tests", "distutils/tests", "idlelib/idle_test"))
        and "/test" not in name
        and 4_000 <= len(content.encode()) <= 40_000
    ][:60]
    windows = {name: _windows(sources[name]) for name in candidates}
    together = set().union(*windows.values())
    # Licence headers and copied functions: a file that shares a passage with another is left out.
    touched = [name for name in sources if name not in windows and _meets(sources[name], together)]
    own_text = {name: _windows(sources[name]) for name in touched}
    held: dict[str, str] = {}
    size = 0
    for name in candidates:
        others = [own_text[other] for other in touched]
        others += [windows[other] for other in candidates if other != name]
        if any(_meets(sources[name], other) for other in others):
            continue
        if any(_meets(sources[other], windows[name]) for other in touched):
            continue
        held[name] = sources[name]
        size += len(held[name].encode())
        if size >= _HELD_OUT_BYTES:
            break
    rest = {name: content for name, content in sources.items() if name not in held}
    code: dict[str, str] = {}
    size = 0
    for name, content in rest.items():
        if name.startswith("test/") or len(content.encode()) > 100_000:
            continue
        if size >= _CALIBRATION_BYTES:
            break
        code[name] = content
        size += len(content.encode())
    train = {name: content for name, content in rest.items() if name not in code}
    return {"held-out": held, "code": code, "train": train}


@cache
def _topics() -> tuple[dict[str, str], dict[str, str]]:
    """The language reference (pydoc_data/topics.py) into held-out and calibration topics."""
    from pydoc_data.topics import topics

    held: dict[str, str] = {}
    rest: dict[str, str] = {}
    windows: set[str] = set()
    size = 0
    for name in sorted(topics, key=_order):
        if size < _PROSE_BYTES and len(topics[name]) < 30_000:
            held[name] = topics[name]
            windows |= _windows(topics[name])
            size += len(topics[name].encode())
        else:
            rest[name] = topics[name]
    # Topics quote each other, sometimes whole sections.
    kept = {name: topic for name, topic in rest.items() if not _meets(topic, windows)}
    return held, kept


def _docstrings(content: str) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd escapes in test files
            tree = ast.parse(content)
    except SyntaxError:
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            doc = ast.get_docstring(node)
            if doc and len(doc) > 200:
                yield doc + "\n"


def _prose() -> Iterator[str]:
    _, topics = _topics()
    yield from topics.values()
    size = sum(len(topic.encode()) for topic in topics.values())
    for name, content in _split()["train"].items():
        if size >= _CALIBRATION_BYTES:
            return
        if name.startswith("test/"):
            continue
        for doc in _docstrings(content):
            yield doc
            size += len(doc.encode())


def _tables() -> Iterator[str]:
    root = _library()
    paths = [
        path
        for pattern in (
            "test/decimaltestdata/*.decTest",
            "encodings/*.py",
            "test/**/*.txt",
            "test/xmltestdata/**/*.xml",
            "test/*.html",
            "idlelib/*.txt",
        )
        for path in root.glob(pattern)
        if "site-packages" not in path.parts
    ]
    size = 0
    for path in sorted(paths, key=lambda path: _order(path.relative_to(root).as_posix())):
        content = _read(path)
        if content is None or len(content) < 500:
            continue
        content = content[:20_000]  # the largest file alone would fill the text
        yield content
        size += len(content.encode())
        if size >= _CALIBRATION_BYTES:
            return


@cache
def _held_out_windows() -> frozenset[str]:
    """The windows of the texts that ship, since another Python's library may give other modules."""
    return frozenset().union(*(_windows(text(name)) for name in HELD_OUT))


@cache
def documents(name: str) -> tuple[str, ...]:
    """The documents of one text, from this machine's library, in their fixed order.

    Args:
        name: "train", "held-out", "held-out-prose", or one of CALIBRATION.

    Raises:
        ValueError: there is no such text.
        FileNotFoundError: this Python came without the library's tests.
    """
    if name == "held-out":
        return tuple(_split()["held-out"].values())
    if name == "held-out-prose":
        return tuple(_topics()[0].values())
    if name in ("train", "tables") and not (_library() / "test").is_dir():
        raise FileNotFoundError(
            f"{_library()} has no test folder, and {name!r} needs it: some distributions "
            "leave it out; use a Python from python.org or one built from source"
        )
    found: Iterable[str]
    if name in ("train", "code"):
        found = _split()[name].values()
    elif name == "prose":
        found = _prose()
    elif name == "tables":
        found = _tables()
    else:
        known = ", ".join(("train", *HELD_OUT, *CALIBRATION))
        raise ValueError(f"no text named {name!r}; there are {known}")
    held = _held_out_windows()
    return tuple(document for document in found if not _meets(document, held))


def text(name: str) -> str:
    """A whole text, its documents joined by a blank line; a held-out text is the one that ships."""
    if name in HELD_OUT:
        return (DATA / HELD_OUT[name]).read_text(encoding="utf-8")
    return "\n\n".join(documents(name))


def describe(name: str) -> dict[str, object]:
    """Size, SHA-256 and origin of one text."""
    content = text(name).encode()
    return {
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "documents": len(documents(name)),
        "python": platform.python_version(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--ship", action="store_true", help="write the held-out texts of this machine's library too"
    )
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    if args.ship:
        for name, file in HELD_OUT.items():
            (DATA / file).write_text("\n\n".join(documents(name)), encoding="utf-8")
    for name in (*HELD_OUT, "train", *CALIBRATION):
        (args.folder / f"{name}.txt").write_text(text(name), encoding="utf-8")
        print(json.dumps({"text": name, **describe(name)}))


if __name__ == "__main__":
    main()
