"""-hf and what belongs to it: models from the Hugging Face Hub."""

from __future__ import annotations

import argparse
from pathlib import PurePosixPath

import imatrix
from imatrix._terminal import Terminal

__all__ = ["add_arguments", "resolve"]


def add_arguments(command: argparse.ArgumentParser) -> None:
    """-hf, -hff, -hft and --offline, as llama.cpp has them (common/arg.cpp)."""
    add = command.add_argument
    add(
        "-hf",
        "-hfr",
        "--hf-repo",
        metavar="USER/MODEL[:QUANT]",
        help="model from the Hugging Face Hub instead of -m; QUANT is Q4_K_M where it is not given, "
        "else Q8_0, else the first file. For a matrix BF16 or F16 is better, where there is one. "
        "With --mtp and a model without a head, the mtp-*.gguf beside it is fetched too",
    )
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
    from imatrix.hub import HubModel, hide_progress

    if not terminal.err.is_terminal:
        hide_progress()
    hub = HubModel(args.hf_repo, token=args.hf_token, offline=args.offline)
    if hub.offline and not args.offline:
        terminal.warn(f"the Hub cannot be reached; going on with what the cache has of {hub.repo}")
    file = hub.model_file(args.hf_file)
    args.model = str(hub.model(file))
    terminal.note(f"{hub.repo}: {file}")
    if not args.mtp or args.mtp_model is not None:
        return
    own = imatrix.ModelFile.read(args.model)
    if own.n_nextn and any(".nextn." in name for name in own.tensors):
        return
    head = hub.mtp_model(file)
    if head is not None:
        args.mtp_model = str(head)
        terminal.note(f"{hub.repo}: {PurePosixPath(head.as_posix()).name}, its head")
