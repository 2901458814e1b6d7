"""Flags of `collect` and `evaluate` for their text: where it comes from, how chats are rendered, and
how it is cut."""

from __future__ import annotations

import argparse
from datetime import datetime
from typing import Any, TypedDict

import imatrix
from imatrix.cli.flags.values import at_least
from imatrix.cli.terminal import Terminal
from imatrix.text.documents import FIELDS, OnBadRecord
from imatrix.text.inputs import Texts
from imatrix.text.plain import parsed_json, read_json, read_text
from imatrix.text.template import DATE
from imatrix.text.tokens import Packing

__all__ = ["add_arguments", "add_min_expert_rows", "print_report", "run_arguments", "texts"]


def add_arguments(
    command: argparse.ArgumentParser, *, kind: str = "calibration text", required: bool = False
) -> None:
    """-f, -p and what belongs to them.

    Args:
        kind: what to call the text in the help.
        required: whether one of the two has to be given.
    """
    text = command.add_mutually_exclusive_group(required=required)
    text.add_argument(
        "-f",
        "--file",
        metavar="TEXT[:WEIGHT]",
        action="append",
        help=f"{kind}: UTF-8, .jsonl, .parquet, any of the first two as .gz or .zst, a "
        "folder of such files, - for standard input (jsonl:- for JSON lines), or "
        "hf:NAME[:CONFIG][/SPLIT]. May be repeated; with weights the sources are mixed by their "
        "shares of the tokens",
    )
    text.add_argument("-p", "--prompt", metavar="TEXT", help=f"{kind}, spelled out")
    add = command.add_argument
    add(
        "--text-field",
        metavar="NAME",
        action="append",
        help="field of a record that holds its text or its messages; may be repeated, the first "
        f"that a record has counts (default: {', '.join(FIELDS)})",
    )
    add(
        "--seed",
        metavar="N",
        type=at_least(0),
        help="shuffle the documents, with that seed (default: their own order)",
    )
    add(
        "--packing",
        choices=("stream", "document"),
        default="stream",
        help="stream: all text in one stream, cut every -c tokens, as llama-imatrix does; "
        "document: no chunk with text of two documents (default: stream)",
    )
    add(
        "--on-bad-record",
        choices=("stop", "skip"),
        default="stop",
        help="what a record does that cannot be used (not JSON, a message without a role, an error "
        "of the template, ...): end the run, or be left out and counted (default: stop)",
    )
    add(
        "--chat-template",
        metavar="NAME",
        help="one of the model's chat templates, by name (default: its default, or tool_use for "
        "chats with tools)",
    )
    add(
        "--chat-template-file",
        metavar="FILE",
        help="a Jinja chat template to use instead of the model's",
    )
    add(
        "--chat-template-kwargs",
        metavar="JSON",
        type=_mapping,
        default={},
        help="further names for the template, as '{\"enable_thinking\": false}'",
    )
    add("--chat-system", metavar="TEXT", help="a system message for chats that bring none")
    add("--chat-tools", metavar="FILE", help="a JSON list of tools for chats that bring none")
    add(
        "--chat-generation-prompt",
        action="store_true",
        help="end each chat with the start of an answer",
    )
    add(
        "--chat-date",
        metavar="YYYY-MM-DD",
        type=_date,
        default=DATE,
        help=f"the date that a template is told (default: {DATE:%Y-%m-%d}, so that the result does "
        "not depend on the day)",
    )


def add_min_expert_rows(command: argparse.ArgumentParser) -> None:
    """--min-expert-rows, into `args.min_expert_rows`."""
    command.add_argument(
        "--min-expert-rows",
        metavar="N",
        type=at_least(1),
        help="go on until every expert of every block has seen N rows, or the text (or --chunks) "
        "comes to its end",
    )


def texts(args: argparse.Namespace, *, again: bool = False) -> Texts | None:
    """The text that the flags name, None for no text. It is found out now whether it can be read.

    Args:
        again: whether it will be read more than once; the text of standard input is then held in
            memory.

    Raises:
        ValueError, OSError, ImportError: as Mixture.check does.
    """
    if args.file is None:
        return args.prompt or None
    fields = FIELDS if args.text_field is None else tuple(args.text_field)
    sources = [imatrix.Source.parse(each, fields=fields) for each in args.file]
    mixture = imatrix.Mixture(sources, seed=args.seed)
    mixture.check()
    if again and any(each.at == "-" for each in sources):
        sources = [_held(each) if each.at == "-" else each for each in sources]
        mixture = imatrix.Mixture(sources, seed=args.seed)
    plain = sources[0].plain if len(sources) == 1 else None
    # whole at once, so that its length is known, and the bar has an end
    return mixture if plain is None else plain


def _held(source: imatrix.Source) -> imatrix.Source:
    return imatrix.Source(list(source.documents()), weight=source.weight, name=source.name)


class TextArguments(TypedDict):
    """Arguments of Collector.run and of evaluate() that the flags decide."""

    packing: Packing
    on_bad_record: OnBadRecord
    chat: imatrix.ChatOptions | None


def run_arguments(args: argparse.Namespace) -> TextArguments:
    """What the flags say of the text.

    Raises:
        ValueError, OSError: a file of a flag cannot be read, or does not hold what it should.
    """
    text = None
    if args.chat_template_file is not None:
        if args.chat_template is not None:
            raise ValueError("--chat-template and --chat-template-file: give one of them")
        text = read_text(args.chat_template_file)
    options = imatrix.ChatOptions(
        template=args.chat_template,
        text=text,
        system=args.chat_system,
        tools=None if args.chat_tools is None else _tools(args.chat_tools),
        generation_prompt=args.chat_generation_prompt,
        variables=args.chat_template_kwargs,
        now=args.chat_date,
    )
    return {
        "packing": args.packing,
        "on_bad_record": args.on_bad_record,
        "chat": None if options == imatrix.ChatOptions() else options,
    }


def print_report(report: imatrix.Report, terminal: Terminal) -> None:
    """Print what the run made of its text."""
    for line in report.lines():
        terminal.note(line)
    experts = report.experts
    if experts is not None and experts.wanted > 1 and not experts.reached:
        why = "--chunks" if report.ended == "max_chunks" else "the end of the text"
        terminal.warn(
            f"--min-expert-rows {experts.wanted}: {experts.n_experts - experts.n_reached} "
            f"expert(s) had fewer rows when {why} ended the run"
        )


def _mapping(text: str) -> dict[str, Any]:
    try:
        found = parsed_json(text, repr(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON object, got {text!r}")
    return found


def _date(text: str) -> datetime:
    try:
        return datetime.strptime(text, "%Y-%m-%d")
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected YYYY-MM-DD, got {text!r}") from None


def _tools(path: str) -> list[Any]:
    found = read_json(path)
    if not isinstance(found, list):
        raise ValueError(f"{path}: expected a JSON list of tools, found {type(found).__name__}")
    return found
