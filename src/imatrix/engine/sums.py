"""Sums that are held in this process: those of a cluster's blocks, and those of a checkpoint."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from imatrix.errors import ClusterError
from imatrix.formats.checkpoint import Group

__all__ = ["BlockSums"]

# Sums, counts and signed sums, as a Group has them (imatrix.formats.checkpoint).
Data = tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.float64] | None]


class BlockSums:
    """Sums and counts by weight, added block by block or kept from a checkpoint.

    The rest of a run reads and restores them as it does those of a session
    (imatrix.engine.interface.NativeSession).
    """

    def __init__(self) -> None:
        # by the weights that share them; arrays are our own
        self._groups: dict[tuple[str, ...], Data] = {}
        self._group_of: dict[str, tuple[str, ...]] = {}

    def add(self, groups: list[Group]) -> None:
        """Add the sums of a block: all of them or, after an error, none. Weights that share their
        rows in one block and do not in another get sums of their own.

        Raises:
            ClusterError: it has other shapes than the blocks before it.
            MemoryError: no room for weights that those did not have.
        """
        for names, sums, counts, signed in groups:
            self._check(names, (sums, counts, signed))
        for names, sums, counts, signed in groups:
            self._make_room(tuple(names), (sums, counts, signed))
        for names, sums, counts, signed in groups:  # from here on nothing can fail
            key = tuple(names)
            for each in (key,) if key in self._groups else [(name,) for name in names]:
                have_sums, have_counts, have_signed = self._groups[each]
                have_sums += sums
                have_counts += counts
                if have_signed is not None and signed is not None:
                    have_signed += signed

    def _check(self, names: list[str], data: Data) -> None:
        for name in names:
            if (key := self._group_of.get(name)) is None:
                continue
            have = _describe_shapes(self._groups[key])
            if have != (sent := _describe_shapes(data)):
                raise ClusterError(f"{name}: a worker sent {sent}, the blocks before it had {have}")

    def _make_room(self, key: tuple[str, ...], data: Data) -> None:
        """Put zeros for weights that are new, and part weights that share no rows in this block."""
        if key in self._groups:
            return
        if not any(name in self._group_of for name in key):
            self._put(key, _zeros(data))
            return
        for name in key:
            together = self._group_of.get(name, ())
            if not together:
                self._put((name,), _zeros(data))
            elif len(together) > 1:
                have = self._groups.pop(together)
                for each in together:
                    self._put((each,), _copy(have))

    def _put(self, key: tuple[str, ...], data: Data) -> None:
        self._groups[key] = data
        self._group_of.update(dict.fromkeys(key, key))

    def restore(
        self,
        names: list[str],
        sums: NDArray[np.float64],
        counts: NDArray[np.int64],
        signed_sums: NDArray[np.float64] | None = None,
    ) -> None:
        """See NativeSession.restore."""
        self._put(tuple(names), _copy((sums, counts, signed_sums)))

    def taken(self) -> list[Group]:
        """The same as groups(), without copies: nothing can be added any more."""
        return [(list(names), *data) for names, data in self._groups.items() if data[1].any()]

    def groups(self) -> list[Group]:
        """See NativeSession.groups."""
        return [
            (list(names), *_copy(data)) for names, data in self._groups.items() if data[1].any()
        ]

    def snapshot(self) -> dict[str, Data]:
        """See NativeSession.snapshot."""
        return {
            name: _copy(data)
            for names, data in self._groups.items()
            if data[1].any()
            for name in names
        }

    def counts(self) -> dict[str, NDArray[np.int64]]:
        """See NativeSession.counts."""
        return {
            name: counts.copy() for names, (_, counts, _) in self._groups.items() for name in names
        }


def _zeros(data: Data) -> Data:
    sums, counts, signed = data
    return (
        np.zeros_like(sums),
        np.zeros_like(counts),
        None if signed is None else np.zeros_like(signed),
    )


def _copy(data: Data) -> Data:
    sums, counts, signed = data
    return sums.copy(), counts.copy(), None if signed is None else signed.copy()


def _describe_shapes(data: Data) -> str:
    sums, counts, signed = data
    words = "no signed sums" if signed is None else f"signed sums {signed.shape}"
    return f"sums {sums.shape}, counts {counts.shape} and {words}"
