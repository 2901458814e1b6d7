"""What tells one run from another: put together here, and compared here.

A checkpoint keeps the identity of its run, and a worker of a cluster is sent that part of it which
does not depend on the text. Names and values stand in the files: do not change them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from imatrix._version import __version__
from imatrix.engine.devices import engine_name
from imatrix.engine.models import Models
from imatrix.engine.settings import SessionSettings
from imatrix.formats.checkpoint import Setting

__all__ = [
    "describe_differences_of_runs",
    "describe_differences_of_work",
    "differences_of_runs",
    "identity_of_run",
    "identity_of_work",
]

# Of the text, what stands before min_expert_rows: checkpoint files have this order.
_TEXT_BEFORE = ("packing", "on_bad_record")


def identity_of_work(models: Models, settings: SessionSettings) -> dict[str, Setting]:
    """What decides the numbers of a chunk: the program, the engine, the files and the batch, by
    which float32 sums are rounded."""
    return {
        "collector": f"imatrix {__version__}",
        "engine": engine_name(),
        **models.files.identity(settings.mtp),
        "n_ctx": settings.n_ctx,
        "n_batch": settings.batch.n_batch,
        "n_ubatch": settings.batch.n_ubatch,
        "n_seq": settings.batch.n_seq,
    }


def identity_of_run(
    models: Models,
    settings: SessionSettings,
    text: Mapping[str, Setting],
    *,
    parse_special: bool,
    skip_chunks: int,
    max_chunks: int | None,
    min_expert_rows: int | None,
    block: int | None,
    part: int | None,
) -> dict[str, Setting]:
    """What has to be the same to go on from a checkpoint.

    Args:
        settings: of the run's session.
        text: what decides the chunks (imatrix.text.cutting.Cut.settings).
        parse_special, skip_chunks, max_chunks, min_expert_rows: as Collector.run has them.
        block, part: chunks of a cluster's block and of a part of it, in whose order sums are added;
            None without a cluster.
    """
    found: dict[str, Setting] = {
        **identity_of_work(models, settings),
        "mtp": settings.mtp,
        "process_output": settings.process_output,
        "signed_sums": settings.signed_sums,
        "parse_special": parse_special,
        "perplexity": settings.perplexity,
        "skip_chunks": skip_chunks,
        "max_chunks": -1 if max_chunks is None else max_chunks,
    }
    if block is not None:
        found["block"] = block
    if part is not None and part != block:
        found["part"] = part
    found |= {name: text[name] for name in _TEXT_BEFORE if name in text}
    if min_expert_rows is not None:
        found["min_expert_rows"] = min_expert_rows
    return {**found, **text}


def differences_of_runs(there: Mapping[str, Setting], here: Mapping[str, Setting]) -> list[str]:
    """Names of what keeps the run `here` from going on from a checkpoint of the run `there`."""
    return [
        name
        # a text can be known as a whole to one run and as a stream to the other: the chunks
        # that are done are compared in any case
        for name in {**there, **here}
        if there.get(name) != here.get(name)
        and not (name.startswith("text_") and (name in here) != (name in there))
        # a run that ends at a bad record has met none before, so that what it did is what one
        # that skips them would have done; the other way round the text differs
        and not (name == "on_bad_record" and name not in there)
    ]


def describe_differences_of_runs(
    names: Iterable[str], there: Mapping[str, Setting], here: Mapping[str, Setting]
) -> str:
    """These differences in words; long values are shortened."""

    def shown(value: Setting) -> str:
        text = str(value)
        return f"{text[:16]}..." if len(text) > 48 else text

    return _describe(names, there, here, shown)


def describe_differences_of_work(there: Mapping[str, Setting], here: Mapping[str, Setting]) -> str:
    """What of the work `here` is otherwise `there`, in words; "" for nothing."""
    names = [name for name, value in here.items() if there.get(name) != value]
    return _describe(names, there, here, str)


def _describe(
    names: Iterable[str],
    there: Mapping[str, Setting],
    here: Mapping[str, Setting],
    shown: Callable[[Setting], str],
) -> str:
    return "; ".join(
        f"{name} is {shown(there.get(name, 'absent'))} there and "
        f"{shown(here.get(name, 'absent'))} here"
        for name in names
    )
