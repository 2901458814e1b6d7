"""What a command reads and what it writes, held against each other before the work.

No output may replace an input. Both lists of every command are here: what its flags name, the other
parts of a model in several files, the files of a folder of texts, and the names that are made from
the one given (OUT.checkpoint). Files are compared as files, whatever they are called: by another
spelling of the path, a symbolic or a hard link, or in other letters where the file system makes no
difference.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imatrix.files.outputs import Input, Output, check_files
from imatrix.model.parts import model_inputs
from imatrix.text.inputs import text_inputs
from imatrix.text.sources import Source

__all__ = ["COMMANDS", "check_command", "check_copies", "check_output", "command_files"]


def check_output(path: str, inputs: Sequence[str | None] = ()) -> None:
    """Find out whether a file can be written.

    Raises:
        ValueError: it cannot, or would replace an input.
    """
    check_files([path], model_inputs(*inputs))
    target = Path(path)
    folder = Path(os.path.realpath(path)).parent
    if not folder.is_dir():
        raise ValueError(f"cannot write {path}: there is no folder {folder}; create it first")
    if target.exists() and not target.is_file():
        kind = "a folder" if target.is_dir() else "not a regular file"
        raise ValueError(f"cannot write {path}: it is {kind}")
    try:
        # the only sure way to know: permission bits say nothing of read-only file systems
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"cannot write {path}: {folder}: {error.strerror}") from error


# --- the commands ------------------------------------------------------------


@dataclass(frozen=True)
class Command:
    """What a command's arguments name, by their names in the namespace.

    Attributes:
        models: GGUF models, maybe in several parts.
        texts: sources of text, as --file of collect.
        files: whatever else is read.
        outputs: gives the files that the command writes, those with names of its own too.
        reads: gives what it reads beside these.
    """

    models: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    outputs: Callable[[argparse.Namespace], Iterable[Output]] = lambda _: ()
    reads: Callable[[argparse.Namespace], Iterable[Input]] = lambda _: ()


def _as_given(*names: str) -> Callable[[argparse.Namespace], Iterator[Output]]:
    def outputs(args: argparse.Namespace) -> Iterator[Output]:
        for name in names:
            if getattr(args, name) is not None:
                yield Output(os.fspath(getattr(args, name)))

    return outputs


def _of_collect(args: argparse.Namespace) -> Iterator[Output]:
    out = args.output
    # an earlier matrix may be added to, under its own name
    yield Output(out, replaces=tuple(each for each in args.in_file if _is(each, out)))
    yield from _locks(out, out)
    yield Output(f"{out}.checkpoint", out)
    yield from _locks(f"{out}.checkpoint", out)
    if args.mtp_model is not None and _is_assistant(args.mtp_model):
        yield Output(head_output(out), out)


def _locks(path: str, of: str) -> Iterator[Output]:
    yield Output(f"{os.path.realpath(path)}.lock", of)  # as imatrix.files.lock has it


def _is(one: str, other: str) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)


def _is_assistant(path: str) -> bool:
    from imatrix.model.header import ModelFile

    try:
        return ModelFile.read(path).architecture == "gemma4-assistant"
    except (OSError, ValueError):
        return False  # the run tells what is wrong with it


def head_output(path: str) -> str:
    """Where the matrix of a head that is a model of its own kind goes: OUT with -mtp in its name."""
    out = Path(path)
    return str(out.with_name(f"{out.stem}-mtp{out.suffix}"))


def _of_extract(args: argparse.Namespace) -> Iterator[Output]:
    from imatrix.heads.extract import mtp_name

    folder = Path(args.model).parent if args.output is None else Path(args.output)
    yield Output(str(folder / mtp_name(args.model) if folder.is_dir() else folder))
    if args.trunk_out is not None:
        yield Output(args.trunk_out)


def _of_demo(args: argparse.Namespace) -> Iterator[Output]:
    from imatrix import demo

    if args.dir is not None:
        yield from (Output(str(args.dir / name), str(args.dir)) for name in demo.FILES)


def _rule_files(args: argparse.Namespace) -> Iterator[Input]:
    # rules of --tensor-type, and paths of files of them
    yield from (Input(os.fspath(each)) for each in args.tensor_type if isinstance(each, Path))


def _demo_reads(_: argparse.Namespace) -> Iterator[Input]:
    from imatrix import demo

    yield from map(Input, map(str, (demo.MODEL, demo.CALIBRATION, demo.HELD_OUT)))


COMMANDS: Mapping[str, Command] = {
    "collect": Command(
        models=("model", "mtp_model", "dask_model", "dask_mtp_model"),
        texts=("file",),
        files=("in_file", "chat_template_file", "chat_tools"),
        outputs=_of_collect,
    ),
    "check": Command(models=("model",), files=("imatrix",), reads=_rule_files),
    "show": Command(files=("file",)),
    "stats": Command(files=("file",)),
    "plot": Command(files=("file", "other"), outputs=_as_given("output")),
    "report": Command(models=("model",), files=("file", "against"), outputs=_as_given("output")),
    "convert": Command(files=("src",), outputs=_as_given("dst")),
    "merge": Command(files=("files",), outputs=_as_given("output")),
    "diff": Command(files=("a", "b")),
    "adapt": Command(models=("to",), files=("file",), outputs=_as_given("output")),
    "quantize": Command(
        models=("src",), files=("imatrix",), outputs=_as_given("dst"), reads=_rule_files
    ),
    "evaluate": Command(
        models=(
            *("model", "mtp_model", "reference", "reference_mtp_model"),
            *("against", "against_mtp_model"),
        ),
        texts=("file",),
        files=("chat_template_file", "chat_tools"),
    ),
    "extract-mtp": Command(models=("model",), outputs=_of_extract),
    "graft-mtp": Command(models=("trunk", "mtp_model"), outputs=_as_given("output")),
    "drop-mtp": Command(models=("model",), outputs=_as_given("output")),
    "demo": Command(outputs=_of_demo, reads=_demo_reads),
    "completion": Command(),
}
"""Every command, by its name."""


def command_files(args: argparse.Namespace) -> tuple[list[Input], list[Output]]:
    """The files that a command reads and those that it writes. A model from the Hub counts once
    it has been fetched, and its path is in the arguments."""
    command = COMMANDS[args.command]
    inputs = [
        *model_inputs(*dict.fromkeys(_named(args, command.models))),
        # a worker's path may hold its variables, and a worker may be here
        *model_inputs(*map(os.path.expandvars, _named(args, command.models))),
        *map(Input, _named(args, command.files)),
        *command.reads(args),
    ]
    for source in _sources(args):
        inputs += text_inputs(source)
    return inputs, list(command.outputs(args))


def _named(args: argparse.Namespace, names: Iterable[str]) -> Iterator[str]:
    for name in names:
        value: Any = getattr(args, name, None)
        if value is not None:
            yield from map(os.fspath, value if isinstance(value, (list, tuple)) else [value])


def _sources(args: argparse.Namespace) -> Iterator[Source]:
    for each in _named(args, COMMANDS[args.command].texts):
        with contextlib.suppress(ValueError):  # the command tells what is wrong with it
            yield Source.parse(each)


def check_command(args: argparse.Namespace) -> None:
    """Refuse a command that would replace what it reads.

    Raises:
        ValueError: see check_files; or it would write a file into a folder that it reads.
    """
    inputs, outputs = command_files(args)
    if not outputs:
        return
    check_files(outputs, inputs)
    for source in _sources(args):
        for output in outputs:
            if source.would_read(Path(output.path)):
                raise ValueError(
                    f"the output {output} would be read as a text of {source.at}, which it lies "
                    "in; name a file elsewhere"
                )


def check_copies(args: argparse.Namespace, chunks: int) -> None:
    """Refuse copies of --save-frequency that would replace an input.

    Args:
        chunks: where the count begins: copies have larger numbers.

    Raises:
        ValueError: see check_files.
    """
    out = Path(args.output)
    pattern = re.compile(re.escape(out.name) + r"\.at_(\d+)")
    with contextlib.suppress(OSError):
        copies = [
            Output(str(path), args.output)
            for path in out.parent.iterdir()
            if (found := pattern.fullmatch(path.name)) and int(found[1]) > chunks
        ]
        check_files(copies, command_files(args)[0])
