"""Flags of `collect` for a run on a Dask cluster."""

from __future__ import annotations

import argparse
import contextlib
from contextlib import AbstractContextManager

from imatrix.cli.flags.values import at_least
from imatrix.cli.terminal import Terminal
from imatrix.cluster.cluster import BLOCK, Cluster
from imatrix.words import size

__all__ = ["add_arguments", "check", "connect", "print_use"]


def add_arguments(command: argparse.ArgumentParser) -> None:
    """--dask and what belongs to it."""
    add = command.add_argument
    add(
        "--dask",
        metavar="WHERE",
        help="collect on the workers of a Dask cluster: a scheduler's address (tcp://host:8786), "
        "local:N for N processes here, or slurm:N, pbs:N, ... for N jobs of dask-jobqueue",
    )
    add(
        "--dask-model",
        metavar="PATH",
        help="the model's path on the workers; may hold their environment variables, as "
        "'$SCRATCH/model.gguf' (default: as here)",
    )
    add("--dask-mtp-model", metavar="PATH", help="the same for --mtp-model")
    add(
        "--dask-block",
        metavar="N",
        type=at_least(1),
        help="chunks whose sums come here at once, among what decides their last bits "
        f"(default: {BLOCK})",
    )
    add(
        "--dask-part",
        metavar="N",
        type=at_least(1),
        help="chunks that a worker takes at a time, where blocks are large; the workers add the "
        "parts of a block among themselves (default: whole blocks)",
    )


def check(args: argparse.Namespace) -> None:
    """Check that the flags go together.

    Raises:
        ValueError: they do not.
    """
    if args.dask is None:
        for name in ("dask_model", "dask_mtp_model", "dask_block", "dask_part"):
            if getattr(args, name) is not None:
                raise ValueError(f"--{name.replace('_', '-')} is for a run with --dask")
        return
    if args.rpc is not None:
        raise ValueError(
            "--dask gives each machine its part of the text, --rpc each its part of the model: "
            "give one of them"
        )
    if not args.isolate:
        raise ValueError(
            "--no-isolate is not for --dask: on a worker the engine always has a process of its "
            "own, so that Dask's is there to tell what ended it"
        )


def connect(args: argparse.Namespace, terminal: Terminal) -> AbstractContextManager[Cluster | None]:
    """Connect to the cluster that the flags name; None if they name none.

    Raises:
        ValueError, ImportError, ClusterError: as Cluster does.
    """
    if args.dask is None:
        return contextlib.nullcontext()
    cluster = Cluster(
        args.dask,
        model=args.dask_model,
        mtp_model=args.dask_mtp_model,
        block=args.dask_block,
        part=args.dask_part,
    )
    terminal.note(f"{args.dask}: {cluster.n_workers} worker(s)")
    return cluster


def print_use(cluster: Cluster, terminal: Terminal) -> None:
    """How the cluster fared."""
    use = cluster.use
    if not use.blocks:
        return
    terminal.note(
        f"{use.blocks} block(s), {size(use.nbytes / use.blocks)} of sums each, took "
        f"{use.seconds / use.blocks:.1f} s of a worker; loading took {use.loading:.1f} s in all, "
        f"adding {use.adding:.1f} s here"
    )
