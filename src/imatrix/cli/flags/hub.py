"""-hf and what belongs to it: models from the Hugging Face Hub.

If a model is a positional argument, `-hf X` anywhere in the command line stands for `hf:X` in the
place of the first one. `hf:X` may stand for the path of any model, so that a second one can come
from the Hub too.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import imatrix
from imatrix.cli.flags import common
from imatrix.cli.terminal import Terminal

__all__ = ["Parser", "add_arguments", "add_to_positional", "fetch", "is_hub", "resolve"]

_FLAGS = ("-hf", "-hfr", "--hf-repo")
_PREFIX = "hf:"
_QUANT = (
    "QUANT is Q4_K_M where it is not given, else Q8_0, else the first file. For a matrix BF16 or "
    "F16 is better, where there is one"
)


class Parser(common.Parser):
    """The parser of a command; with add_to_positional(), -hf stands for its first positional argument."""

    model_comes_first = False
    _parsing = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if not self.model_comes_first or args is None or self._parsing:
            return super().parse_known_args(args, namespace)
        # Before Python 3.13 an optional positional argument counts as left out as soon as an
        # option follows what is in front of it (IMATRIX in `check MODEL --type T IMATRIX`).
        self._parsing = True
        try:
            return super().parse_known_intermixed_args(_in_front(args), namespace)
        finally:
            self._parsing = False


def _in_front(args: Sequence[str]) -> list[str]:
    """Arguments with what -hf names in front, as the model's path would be."""
    rest: list[str] = []
    found: list[str] = []
    words = iter(args)
    for word in words:
        flag, equals, value = word.partition("=")
        if word == "--":
            rest += [word, *words]
        elif flag not in _FLAGS:
            rest.append(word)
        elif equals:
            found = [value]
        elif (following := next(words, None)) is not None:
            found = [following]
        else:
            rest.append(word)  # argparse says what is missing
    return [*(_PREFIX + each for each in found), *rest]


def add_to_positional(command: Parser) -> None:
    """-hf, -hff, -hft and --offline for a command whose first positional argument is a model."""
    command.model_comes_first = True
    command.add_argument(
        *_FLAGS,
        metavar="USER/MODEL[:QUANT]",
        help="model from the Hugging Face Hub, in place of the first argument (which may also be "
        f"spelled hf:USER/MODEL[:QUANT]). {_QUANT}",
    )
    _add_rest(command)


def add_arguments(command: argparse.ArgumentParser) -> None:
    """-hf, -hff, -hft and --offline, as llama.cpp has them (common/arg.cpp)."""
    command.add_argument(
        *_FLAGS,
        metavar="USER/MODEL[:QUANT]",
        help=f"model from the Hugging Face Hub instead of -m; {_QUANT}. "
        "With --mtp and a model without a head, the mtp-*.gguf beside it is fetched too",
    )
    _add_rest(command)


def _add_rest(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("-hff", "--hf-file", metavar="FILE", help="the model's file in that repository")
    add(
        "-hft",
        "--hf-token",
        metavar="TOKEN",
        help="access token (default: HF_TOKEN in the environment)",
    )
    add("--offline", action="store_true", help="models from the cache only, ask nobody")


def resolve(args: argparse.Namespace, terminal: Terminal) -> None:
    """Download what -hf names, and put the paths into args.model and args.mtp_model.

    Raises:
        ValueError, OSError, ImportError: as HubModel does; or -m is given too.
    """
    if args.hf_repo is None:
        if args.hf_file is not None:
            raise ValueError("--hf-file names a file of a repository; give it with -hf")
        return
    if args.model is not None:
        raise ValueError("-m and -hf both name a model; give one of them")
    path, head = _download(
        args.hf_repo, args, terminal, file=args.hf_file, head=args.mtp and args.mtp_model is None
    )
    args.model = path
    if head is not None:
        args.mtp_model = head


def is_hub(model: str) -> bool:
    """Whether a model is named on the Hub, not given by its path."""
    return model.startswith(_PREFIX) and not Path(model).exists()


def fetch(
    model: str,
    args: argparse.Namespace,
    terminal: Terminal,
    *,
    first: bool = True,
    head: bool = False,
) -> tuple[str, str | None]:
    """The path of a model, downloaded if it is hf:USER/MODEL[:QUANT].

    Args:
        first: whether --hf-file is about this one.
        head: whether to fetch the mtp-*.gguf beside it too, if it has no head of its own.

    Returns:
        The path, and that of the head, None if there is none.

    Raises:
        ValueError, OSError, ImportError: as HubModel does.
    """
    if not is_hub(model):
        if first and args.hf_file is not None:
            raise ValueError("--hf-file names a file of a repository; give it with -hf")
        return model, None
    file = args.hf_file if first else None
    return _download(model.removeprefix(_PREFIX), args, terminal, file=file, head=head)


def _download(
    name: str, args: argparse.Namespace, terminal: Terminal, *, file: str | None, head: bool
) -> tuple[str, str | None]:
    from imatrix.model.hub import HubModel, hide_progress

    if not terminal.err.is_terminal:
        hide_progress()
    hub = HubModel(name, token=args.hf_token, offline=args.offline)
    if hub.offline and not args.offline:
        terminal.warn(f"the Hub cannot be reached; going on with what the cache has of {hub.repo}")
    file = hub.model_file(file)
    path = str(hub.model(file))
    terminal.note(f"{hub.repo}: {file}")
    if not head:
        return path, None
    own = imatrix.ModelFile.read(path)
    if own.n_nextn and any(".nextn." in tensor for tensor in own.tensors):
        return path, None
    beside = hub.mtp_model(file)
    if beside is None:
        return path, None
    terminal.note(f"{hub.repo}: {PurePosixPath(beside.as_posix()).name}, its head")
    return path, str(beside)
