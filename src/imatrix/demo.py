"""`imatrix demo`: the whole job on a small model, and why the head's data matter."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path

from rich.text import Text

import imatrix
from imatrix import _show
from imatrix._terminal import CollectProgress, StepProgress, Terminal, size, tensors_told
from imatrix.demo_model import make_demo_model
from imatrix.matrix import ImportanceMatrix

__all__ = ["run"]

_TYPE = "IQ2_XXS"

# Enough for every expert to see hundreds of rows, and done in seconds.
_CHUNKS = 16


def run(terminal: Terminal, folder: Path | None = None, *, keep: bool = False) -> bool:
    """Make a small model with an MTP head, collect from it with and without the head, and
    quantize it with both matrices.

    Args:
        terminal: where to tell.
        folder: where to put the files, made if need be, and left there; None for a temporary one.
        keep: leave the temporary folder too.

    Returns:
        Whether everything went as told: the engine refused the matrix of the trunk alone, and
        took the one with the head.

    Raises:
        OSError: the files cannot be written.
        ImatrixError: the engine failed where it should not.
    """
    with _place(folder, keep) as place:
        done = _steps(terminal, place)
        if folder is not None or keep:
            terminal.out.print(Text(f"\nThe files are in {place}"), soft_wrap=True)
    return done


@contextmanager
def _place(folder: Path | None, keep: bool) -> Iterator[Path]:
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
    elif keep:
        yield Path(tempfile.mkdtemp(prefix="imatrix-demo-"))
    else:
        with tempfile.TemporaryDirectory(prefix="imatrix-demo-") as name:
            yield Path(name)


def _steps(terminal: Terminal, place: Path) -> bool:
    out = terminal.out
    model = place / "demo-F16.gguf"

    _heading(terminal, 1, "A small model with an MTP head, random weights")
    make_demo_model(model)
    header = imatrix.ModelFile.read(model)
    first_head = header.n_trunk
    out.print(
        Text(
            f"   {model.name}: {header.architecture}, {size(model.stat().st_size)}, blocks 0 to "
            f"{first_head - 1} are the trunk, block {first_head} is the head"
        )
    )

    _heading(terminal, 2, "The trunk alone, which is all that llama-imatrix sees")
    trunk_only = _collect(terminal, model, place / "trunk-only.gguf", mtp=False)

    _heading(terminal, 3, "The trunk and the head: --mtp")
    with_head = _collect(terminal, model, place / "with-head.gguf", mtp=True)
    out.print()
    _show.render(out, ImportanceMatrix.load(with_head), with_head.name)

    _heading(terminal, 4, f"Quantize to {_TYPE} with the trunk alone")
    refused = _refusal(terminal, model, place, trunk_only)
    if refused is None:
        terminal.error("the engine took a matrix without the head, which it should refuse")
        return False
    out.print(Text("   refused: ", "red") + Text(refused.replace(f"{place}/", "")))

    _heading(terminal, 5, f"Quantize to {_TYPE} with the trunk and the head")
    target = place / f"demo-{_TYPE}.gguf"
    with StepProgress(terminal, "   quantizing", tensors_told) as bar:
        done = imatrix.quantize(model, target, _TYPE, imatrix=with_head, progress=bar)
    out.print(
        Text("   done: ", "green")
        + Text(
            f"{target.name}, {size(model.stat().st_size)} -> {size(done.bytes)}, "
            f"{done.bits_per_weight:.2f} bits per weight, head included"
        )
    )
    return True


def _heading(terminal: Terminal, number: int, text: str) -> None:
    terminal.out.print(Text(f"\n{number}. {text}", "bold"))


def _collect(terminal: Terminal, model: Path, target: Path, *, mtp: bool) -> Path:
    text = resources.files("imatrix").joinpath("data/calibration.txt").read_text(encoding="utf-8")
    with (
        imatrix.Collector(model) as collector,
        CollectProgress(terminal, "   collecting", every=0) as bar,
    ):
        matrix = collector.run(text, mtp=mtp, max_chunks=_CHUNKS, progress=bar)
    matrix.save(target)
    terminal.out.print(Text(f"   {target.name}: {_show.weights_told(matrix)}"))
    return target


def _refusal(terminal: Terminal, model: Path, place: Path, matrix: Path) -> str | None:
    """The engine's reason to refuse; None if it did not."""
    try:
        with StepProgress(terminal, "   quantizing", tensors_told) as bar:
            imatrix.quantize(
                model, place / f"demo-{_TYPE}.gguf", _TYPE, imatrix=matrix, progress=bar
            )
    except imatrix.EngineError as error:
        return str(error)
    return None
