#!/usr/bin/env python3
"""Runs the tests that hold assumptions about the engine, and says which file each rests on.

    make engine-check        after the pin has moved (CONTRIBUTING.md)
    python tests/helpers/engine_check.py --record
                             does the same, and if they pass, notes the engine's files

A test that would fail if the engine behaved otherwise carries the mark

    @pytest.mark.engine("src/llama-graph.cpp", "what is assumed, in words")

with the engine's file, or folder, that the assumption rests on. tests/helpers/engine_files.json
holds the digests of these files when all assumptions were last known to hold: files that differ now
are named too, because an assumption may have become needless or incomplete without a failing test.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from helpers import engine_tools

ROOT = Path(__file__).resolve().parents[2]
ENGINE = ROOT / "vendor" / "llama.cpp"
RECORD = ROOT / "tests" / "helpers" / "engine_files.json"


def assumptions(item: pytest.Item) -> Iterator[tuple[str, str]]:
    """The engine's file and the assumption, for every mark of a test."""
    for mark in item.iter_markers("engine"):
        file, what = mark.args
        yield str(file), str(what)


def digest(file: str) -> str:
    """The digest of a file of the engine, or of all files in a folder of it; "" if there is none.

    It covers names and contents, in order, so that it is the same wherever the source was unpacked.
    """
    path = ENGINE / file
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    if not path.exists():
        return ""
    total = hashlib.sha256()
    for each in files:
        total.update(each.relative_to(ENGINE).as_posix().encode() + b"\0")
        total.update(hashlib.sha256(each.read_bytes()).digest())
    return total.hexdigest()


class Assumptions:
    """A pytest plugin: the assumptions of the collected tests, and which of them failed."""

    def __init__(self) -> None:
        self.tests: dict[str, list[tuple[str, str]]] = {}
        self.failed: list[str] = []

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.tests = {item.nodeid: list(assumptions(item)) for item in session.items}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and report.nodeid not in self.failed:
            self.failed.append(report.nodeid)

    @property
    def files(self) -> dict[str, list[str]]:
        """Assumptions by the engine's file, each once."""
        found: dict[str, list[str]] = {}
        for marks in self.tests.values():
            for file, what in marks:
                known = found.setdefault(file, [])
                if what not in known:
                    known.append(what)
        return dict(sorted(found.items()))


def changed(files: Iterable[str]) -> list[str]:
    """The files that differ from what they were when the assumptions were last known to hold."""
    recorded = json.loads(RECORD.read_text(encoding="utf-8"))["files"] if RECORD.is_file() else {}
    return [file for file in files if digest(file) != recorded.get(file)]


def record(files: Iterable[str]) -> None:
    about = {"archive": engine_tools.pin()["sha256"], "files": {f: digest(f) for f in files}}
    RECORD.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def report(found: Assumptions) -> str:
    """The assumptions that no longer hold, and those that should be read again."""
    pin = engine_tools.pin()
    lines = [f"llama.cpp {pin['engine']} ({pin['build']})"]
    if found.failed:
        lines += ["", "No longer as assumed:"]
    for test in found.failed:
        lines.append(f"  {test}")
        lines += [f"    {file}: {what}" for file, what in found.tests.get(test, [])]
    other = changed(found.files)
    if other:
        lines += ["", f"Files that differ from the last record ({RECORD.name}), to read again:"]
    for file in other:
        lines.append(f"  {file}" + ("" if digest(file) else " (it is not there)"))
        lines += [f"    {what}" for what in found.files[file]]
    if not found.failed and not other:
        lines += ["", "All as assumed, and no file differs from the last record."]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", action="store_true",
                        help=f"note the engine's files in {RECORD.name} if all tests pass")  # fmt: skip
    parser.add_argument("--list", action="store_true", help="print the assumptions, run nothing")
    args, pytest_args = parser.parse_known_args()
    found = Assumptions()
    quiet = ["--collect-only", "-qq", "--no-header", "--no-summary"] if args.list else ["-q"]
    status = int(
        pytest.main([str(ROOT / "tests"), "-m", "engine", *quiet, *pytest_args], plugins=[found])
    )
    if args.list:
        for file, what in found.files.items():
            print(file, *(f"    {each}" for each in what), sep="\n")
        return status
    print("\n" + report(found))
    if args.record and status == 0:
        record(found.files)
        print(f"\nnoted in {RECORD}")
    return status


if __name__ == "__main__":
    sys.exit(main())
