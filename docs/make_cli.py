"""Writes docs/cli.md from the parser of the `imatrix` command; a test compares."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from imatrix.cli.program import build_parser

PAGE = Path(__file__).with_name("cli.md")

HEAD = """\
# Commands

<!-- Written by docs/make_cli.py from the parser; a test compares. -->

`imatrix COMMAND --help` tells the same. Messages and progress go to stderr, data to stdout. Exit
status: 0 done, 1 it failed, 2 wrong usage or bad input, 130 interrupted (Ctrl-C), 143 terminated.
`imatrix --version` tells what the build has: engine, backends, devices.
"""


def page() -> str:
    """The whole page."""
    lines = [HEAD]
    commands = _commands(build_parser())
    for name, command, text in commands:
        lines += [f"## imatrix {name}", "", command.description or _sentence(text), ""]
        lines += ["```text", _usage(name, command), "```", ""]
        lines += [*_table(command), ""]
    return "\n".join(lines).rstrip() + "\n"


def _commands(parser: argparse.ArgumentParser) -> list[tuple[str, argparse.ArgumentParser, str]]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            helps = {choice.dest: choice.help or "" for choice in action._choices_actions}
            return [(name, each, helps.get(name, "")) for name, each in action.choices.items()]
    raise ValueError("the parser has no commands")


def _usage(name: str, command: argparse.ArgumentParser) -> str:
    given = [
        f"[{action.metavar}]" if action.nargs == "?" else _names(action).replace(", …", " …")
        for action in command._actions
        if not action.option_strings
    ]
    needed = [
        f"{action.option_strings[-1]} {_value(action)}"
        for action in command._actions
        if action.option_strings and action.required
    ]
    return " ".join(["imatrix", name, "[FLAGS]", *needed, *given])


def _table(command: argparse.ArgumentParser) -> Iterator[str]:
    yield "| flag | what it does |"
    yield "|---|---|"
    for action in command._actions:
        if isinstance(action, argparse._HelpAction):
            continue
        text = (action.help or "") % {"default": action.default, "prog": "imatrix"}
        if action.option_strings and action.required:
            text += " (required)"
        yield f"| {_names(action)} | {_cell(text)} |".replace("|  |", "| |")


def _names(action: argparse.Action) -> str:
    if not action.option_strings:
        name = str(action.metavar or action.dest)
        return f"{name} …" if action.nargs in ("+", "*") else name
    value = _value(action)
    names = ", ".join(f"`{option}`" for option in action.option_strings)
    return f"{names} {value}".strip() if value else names


def _value(action: argparse.Action) -> str:
    if action.nargs == 0:
        return ""
    if action.choices:
        return "`" + "`, `".join(str(choice) for choice in action.choices) + "`"
    value = str(action.metavar or action.dest.upper())
    return f"{value} …" if action.nargs in ("+", "*") else value


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "?")) else ".")


def _cell(text: str) -> str:
    """A text of the help with the characters escaped that Markdown would take for markup."""
    for mark in ("|", "*", "_", "<", "["):
        text = text.replace(mark, f"\\{mark}")
    return " ".join(text.split())


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
