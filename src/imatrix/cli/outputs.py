"""What a command reads and what it writes, compared before the work, so that no output replaces an
input.

Each command declares both (`Files`): what its flags name, the other parts of a model in several
files, the files of a folder of texts, and the names that are made from the one given
(OUT.checkpoint). Files are compared as files, whatever they are called: by another spelling of the
path, a symbolic or a hard link, or in other letters if the file system makes no difference.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imatrix.files.outputs import Input, Output, check_files
from imatrix.model.parts import model_inputs
from imatrix.text.inputs import text_inputs
from imatrix.text.sources import Source

__all__ = ["Files", "check_command", "check_copies", "check_output", "named_outputs"]


@dataclass(frozen=True, kw_only=True)
class Files:
    """Which of a command's arguments name files, by their names in the namespace.

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


def named_outputs(*names: str) -> Callable[[argparse.Namespace], Iterator[Output]]:
    """For `Files.outputs`: the paths that these arguments give."""

    def outputs(args: argparse.Namespace) -> Iterator[Output]:
        for name in names:
            if getattr(args, name) is not None:
                yield Output(os.fspath(getattr(args, name)))

    return outputs


def check_command(files: Files, args: argparse.Namespace) -> None:
    """Refuse a command that would replace what it reads. A model from the Hub counts once it has
    been fetched and its path is in the arguments.

    Raises:
        ValueError: see check_files; or it would write a file into a folder that it reads.
    """
    outputs = list(files.outputs(args))
    if not outputs:
        return
    check_files(outputs, _inputs(files, args))
    for source in _sources(files, args):
        for output in outputs:
            if source.would_read(Path(output.path)):
                raise ValueError(
                    f"the output {output} would be read as a text of {source.at}, which it lies "
                    "in; name a file elsewhere"
                )


def check_copies(files: Files, args: argparse.Namespace, chunks: int) -> None:
    """Refuse copies of --save-frequency that would replace an input.

    Args:
        chunks: the number at which the count begins; copies have larger ones.

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
        check_files(copies, _inputs(files, args))


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


def _inputs(files: Files, args: argparse.Namespace) -> list[Input]:
    inputs = [
        *model_inputs(*dict.fromkeys(_named(args, files.models))),
        # a worker's path may hold its variables, and a worker may be here
        *model_inputs(*map(os.path.expandvars, _named(args, files.models))),
        *map(Input, _named(args, files.files)),
        *files.reads(args),
    ]
    for source in _sources(files, args):
        inputs += text_inputs(source)
    return inputs


def _named(args: argparse.Namespace, names: Iterable[str]) -> Iterator[str]:
    for name in names:
        value: Any = getattr(args, name, None)
        if value is not None:
            yield from map(os.fspath, value if isinstance(value, (list, tuple)) else [value])


def _sources(files: Files, args: argparse.Namespace) -> Iterator[Source]:
    for each in _named(args, files.texts):
        with contextlib.suppress(ValueError):  # the command tells what is wrong with it
            yield Source.parse(each)
