"""The statistics of a matrix as a pandas DataFrame."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

from imatrix.entries import Entry
from imatrix.matrix.weight_statistics import (
    ExpertStatistics,
    WeightStatistics,
    of_experts,
    of_weights,
    without_figures,
)

if TYPE_CHECKING:
    import pandas

__all__ = ["to_frame"]


def to_frame(
    entries: Mapping[str, Entry],
    head_blocks: Collection[int],
    *,
    experts: bool = False,
    exact: bool = False,
) -> pandas.DataFrame:
    """See ImportanceMatrix.to_frame."""
    try:
        import pandas
    except ImportError as error:
        raise ImportError(
            "ImportanceMatrix.to_frame needs the library pandas: pip install 'imatrix[pandas]'"
        ) from error
    records: list[dict[str, Any]]
    if experts:
        kind: type = ExpertStatistics
        records = [asdict(each) for each in of_experts(entries, head_blocks)]
        index = ["name", "expert"]
    else:
        kind = WeightStatistics
        found = of_weights(entries, head_blocks, exact)
        by_name = {each.name: asdict(each) for each in found}
        records = [
            by_name.get(name) or without_figures(name, entry, head_blocks)
            for name, entry in entries.items()
        ]
        index = ["name"]
    columns = [field.name for field in fields(kind)]
    types = {
        "int": "int64",
        "int | None": "Int64",  # pandas' own, which has a missing value
        "float": "float64",
    }
    frame = pandas.DataFrame.from_records(records, columns=columns)
    frame = frame.astype({each.name: types.get(str(each.type), "object") for each in fields(kind)})
    return frame.set_index(index)
