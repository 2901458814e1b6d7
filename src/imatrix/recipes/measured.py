"""What was measured, in a file that a run can go on from.

A file of JSON lines. The first one is the identity: what has to be the same for the figures to be
the same. Every line after it is one trial, of the trunk or of the head, or the errors of one tensor;
it is on the disk before the next one is begun. A line that a killed process left torn is the last
one, and is cut off.

    {"format": "imatrix-measurement", "version": 1, "identity": {...}}
    {"positions": [127, 127]}
    {"types": {"blk.0.attn_q.weight": "q4_k"}, "kl": [0.0012, 0.0009]}
    {"tensor": "blk.0.attn_q.weight", "errors": {"q4_k": 0.031, "q2_k": 1.9}}
    {"head": {"label": "Q4_K", ...}}

Numbers are written so that they are read as the same bits.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from imatrix.engine.identity import describe_differences_of_runs
from imatrix.errors import CheckpointError
from imatrix.files import atomic
from imatrix.files.lock import locked
from imatrix.formats.checkpoint import Setting
from imatrix.recipes.heads import HeadTrial

__all__ = ["Measurement", "Trial", "identity_in", "opened", "standard_error"]

_FORMAT, _VERSION = "imatrix-measurement", 1
_START_OVER = (
    "name another file (measured=, --measured), or start from zero (restart=True, --restart)"
)

Types = Mapping[str, str]
"""Tensor -> ggml type, in lower case, of those that are changed; all others are the source's."""


@dataclass(frozen=True)
class Trial:
    """What a change of types did to the model's output.

    Attributes:
        types: tensor -> ggml type, of those that were changed.
        kl: mean KL divergence to the unchanged model of each chunk, over its scored positions, nats.
    """

    types: Types
    kl: tuple[float, ...]


class Measurement:
    """Trials and errors, in memory and, line by line, in a file.

    Args:
        identity: what decides the figures.
        path: the file; None for memory alone.

    Attributes:
        positions: scored positions of each chunk; () until they are known.
    """

    def __init__(self, identity: Mapping[str, Setting], path: Path | None = None) -> None:
        self.identity = dict(identity)
        self.positions: tuple[int, ...] = ()
        self._path = path
        self._trials: dict[tuple[tuple[str, str], ...], Trial] = {}
        self._errors: dict[tuple[str, str], float] = {}
        self._heads: dict[str, HeadTrial] = {}

    @property
    def heads(self) -> Mapping[str, HeadTrial]:
        """Trials of the head by label."""
        return self._heads

    @property
    def trials(self) -> tuple[Trial, ...]:
        """Every trial, in the order in which they were made."""
        return tuple(self._trials.values())

    def trial(self, types: Types) -> Trial | None:
        """The trial of these changes; None if there is none yet."""
        return self._trials.get(_key(types))

    def error(self, tensor: str, type_: str) -> float | None:
        """The importance-weighted squared error of a type, summed over the tensor; None if it is
        not known yet."""
        return self._errors.get((tensor, type_))

    @property
    def errors(self) -> Mapping[tuple[str, str], float]:
        """(tensor, type) -> importance-weighted squared error, summed over the tensor."""
        return self._errors

    def set_positions(self, positions: tuple[int, ...]) -> None:
        """Say how many positions of each chunk are scored.

        Raises:
            CheckpointError: the file has other numbers.
        """
        if self.positions and self.positions != positions:
            raise CheckpointError(
                f"{self._path}: its trials are over {sum(self.positions)} positions, this text has "
                f"{sum(positions)}; {_START_OVER}"
            )
        if not self.positions:
            self.positions = positions
            self._append({"positions": list(positions)})

    def add_trial(self, types: Types, kl: tuple[float, ...]) -> Trial:
        """Remember a trial, and write it down."""
        trial = Trial(dict(types), kl)
        self._append({"types": dict(sorted(types.items())), "kl": list(kl)})
        self._trials[_key(types)] = trial
        return trial

    def add_errors(self, tensor: str, errors: Mapping[str, float]) -> None:
        """Remember the errors of a tensor by type, and write them down."""
        self._append({"tensor": tensor, "errors": dict(errors)})
        self._errors.update({(tensor, type_): error for type_, error in errors.items()})

    def add_head(self, trial: HeadTrial) -> None:
        """Remember a trial of the head, and write it down."""
        self._append({"head": trial.as_data()})
        self._heads[trial.label] = trial

    def mean(self, trial: Trial) -> float:
        """The mean KL divergence over all positions, in nats a token."""
        total = sum(kl * n for kl, n in zip(trial.kl, self.positions, strict=True) if n)
        return total / sum(self.positions)

    def _append(self, line: Mapping[str, Any]) -> None:
        if self._path is None:
            return
        with self._path.open("ab") as file:
            file.write(_line(line))
            file.flush()
            os.fsync(file.fileno())

    def read(self, data: bytes) -> None:
        """Take the lines of a file, but for the first.

        Raises:
            ValueError: one is no line of a measurement.
        """
        for number, line in enumerate(data.splitlines()[1:], 2):
            try:
                self._take(json.loads(line))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"line {number}: {error!r}") from None

    def _take(self, found: dict[str, Any]) -> None:
        if "positions" in found:
            self.positions = tuple(int(n) for n in found["positions"])
        elif "types" in found:
            types = {str(name): str(kind) for name, kind in found["types"].items()}
            self._trials[_key(types)] = Trial(types, tuple(float(kl) for kl in found["kl"]))
        elif "head" in found:
            trial = HeadTrial.of_data(found["head"])
            self._heads[trial.label] = trial
        else:
            tensor = str(found["tensor"])
            for kind, error in found["errors"].items():
                self._errors[tensor, str(kind)] = float(error)


def identity_in(path: str | os.PathLike[str]) -> Mapping[str, Setting]:
    """The identity of the measurement that a file holds; {} if there is none that can be read."""
    try:
        with Path(path).open("rb") as file:
            first = json.loads(file.readline())
        return dict(first["identity"]) if first.get("format") == _FORMAT else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


@contextmanager
def opened(
    path: str | os.PathLike[str] | None, identity: Mapping[str, Setting], *, restart: bool = False
) -> Iterator[Measurement]:
    """A measurement that goes on from a file, or begins it; one writer at a time.

    Args:
        path: None to keep all in memory.
        identity: what decides the figures.
        restart: begin anew whatever is there.

    Raises:
        CheckpointError: the file is damaged, or of another measurement; with what differs.
        LockedError: another process is writing it.
        OSError: it cannot be read or written.
    """
    if path is None:
        yield Measurement(identity)
        return
    file = Path(path)
    with locked(file, "file (measured=, --measured)"):
        found = Measurement(identity, file)
        data = b"" if restart or not file.exists() else file.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]  # what is behind was being written when it was killed
        if whole:
            _check(file, whole, identity)
            try:
                found.read(whole)
            except ValueError as error:
                raise CheckpointError(f"{file} is damaged: {error}; {_START_OVER}") from None
            _cut(file, len(whole), len(data))
        else:
            first = _line({"format": _FORMAT, "version": _VERSION, "identity": dict(identity)})
            if not first.startswith(data):
                _check(file, data, identity)
            with atomic.replacing(file) as temporary:
                temporary.write_bytes(first)
        yield found


def _cut(file: Path, size: int, found: int) -> None:
    """Take away what is behind the last whole line, in place: the lines before it are not touched."""
    if size == found:
        return
    os.truncate(file, size)
    with file.open("rb+") as out:
        os.fsync(out.fileno())


def _check(file: Path, data: bytes, identity: Mapping[str, Setting]) -> None:
    try:
        first = json.loads(data.splitlines()[0])
        known = first["format"] == _FORMAT
    except (ValueError, KeyError, TypeError):
        known = False
    if not known:
        raise CheckpointError(
            f"{file} is no measurement of imatrix recipe, and would be written over; {_START_OVER}"
        )
    if first.get("version") != _VERSION:
        raise CheckpointError(
            f"{file}: version {first.get('version')!r} of the format, expected {_VERSION}: it was "
            f"made by another version of imatrix; {_START_OVER}"
        )
    there = first.get("identity", {})
    if names := [name for name in {**there, **identity} if there.get(name) != identity.get(name)]:
        raise CheckpointError(
            f"{file} is of another measurement: "
            f"{describe_differences_of_runs(names, there, identity)}. Give what that one was given "
            f"to go on from it, {_START_OVER}"
        )


def standard_error(trial: Trial) -> float:
    """Standard error of a trial's mean KL: over its chunks, since the positions of one hang together.
    0 for a trial that changes nothing."""
    chunks = np.array(trial.kl)
    return float(chunks.std(ddof=1) / math.sqrt(len(chunks))) if len(chunks) > 1 else 0.0


def _key(types: Types) -> tuple[tuple[str, str], ...]:
    return tuple(sorted(types.items()))


def _line(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, allow_nan=False).encode() + b"\n"
