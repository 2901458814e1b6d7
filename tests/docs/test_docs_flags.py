"""The pages that describe flags, compared with the programs that take them."""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.running import EngineTool
from markdown_it import MarkdownIt

from imatrix.cli.program import build_parser

pytestmark = [
    pytest.mark.engine("common/arg.cpp", "llama-imatrix has these flags"),
]

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"


def collect_parser() -> argparse.ArgumentParser:
    for action in build_parser()._actions:
        if isinstance(action, argparse._SubParsersAction):
            return action.choices["collect"]
    raise AssertionError("no commands")


def rows(page: Path) -> Iterator[tuple[list[str], str]]:
    """For every table row: the code spans of its first cell, and the text of its second cell."""
    tokens = MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8"))
    cells: list[Any] = []
    for token in tokens:
        if token.type == "tr_open":
            cells = []
        elif token.type == "inline":
            cells.append(token)
        elif token.type == "tr_close" and len(cells) > 1:
            spans = [c.content for c in cells[0].children or () if c.type == "code_inline"]
            yield spans, cells[1].content


def page_verdicts() -> dict[str, str]:
    """The verdict on each flag that the page gives."""
    verdicts: dict[str, str] = {}
    for flags, verdict in rows(DOCS / "llama-imatrix.md"):
        if verdict not in ("same", "more", "no"):
            continue
        for flag in flags:
            assert flag not in verdicts, f"{flag} is there twice"
            verdicts[flag] = verdict
    return verdicts


@pytest.fixture(scope="module")
def theirs(engine_tool: EngineTool) -> set[str]:
    """Every spelling of every flag that llama-imatrix --help lists."""
    done = subprocess.run(
        [engine_tool("llama-imatrix"), "--help"], capture_output=True, text=True, check=True
    )
    found: set[str] = set()
    for line in done.stdout.splitlines():
        if not line.startswith("-") or line.startswith("----"):
            continue
        for word in line.split():
            if not word.startswith("-"):
                break  # the value, or the description
            found.add(word.rstrip(","))
            if not word.endswith(","):
                break
    assert {"-m", "--model", "-ofreq", "--no-ppl", "--show-statistics"} <= found
    return found


def test_the_page_has_every_flag_of_llama_imatrix(theirs: set[str]) -> None:
    assert theirs - set(page_verdicts()) == set()
    assert set(page_verdicts()) - theirs == set()


def test_the_verdict_on_a_flag_is_right() -> None:
    ours = {*collect_parser()._option_string_actions, *build_parser()._option_string_actions}
    taken = {flag for flag, verdict in page_verdicts().items() if verdict != "no"}
    assert taken - ours == set(), "the page says that these are taken"
    assert (set(page_verdicts()) - taken) & ours == set(), "the page says that these are refused"


def test_the_page_of_commands_is_up_to_date() -> None:
    """Make it again: python docs/make_cli.py."""
    path = DOCS / "make_cli.py"
    spec = importlib.util.spec_from_file_location("make_cli", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (DOCS / "cli.md").read_text(encoding="utf-8") == module.page()
