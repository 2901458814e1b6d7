from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

class Watch:
    def __init__(self, on_tensor: Callable[[int, int], object] | None = None) -> None: ...
    def cancel(self) -> None: ...
    @property
    def progress(self) -> tuple[int, int]: ...

def ftypes() -> dict[str, int]: ...
def tensor_types() -> dict[str, tuple[int, bool]]: ...
def matching(pattern: str, names: Sequence[str]) -> list[bool]: ...
def tensor_totals(path: str | bytes) -> tuple[int, int]: ...
def type_blocks() -> dict[str, tuple[int, int]]: ...
def dry_run(
    src: str | bytes,
    *,
    ftype: int,
    pure: bool,
    quantize_output: bool,
    output_tensor_type: int | None,
    token_embedding_type: int | None,
    keep_split: bool,
    tensor_types: Sequence[tuple[str, int]],
    metadata: Sequence[tuple[str, bool | int | float | str]],
    has_matrix: bool,
) -> list[tuple[str, str, str]]: ...
def quantize(
    watch: Watch,
    src: str | bytes,
    dst: str | bytes,
    *,
    ftype: int,
    pure: bool,
    quantize_output: bool,
    output_tensor_type: int | None,
    token_embedding_type: int | None,
    keep_split: bool,
    tensor_types: Sequence[tuple[str, int]],
    metadata: Sequence[tuple[str, bool | int | float | str]],
    n_threads: int,
    allow_requantize: bool,
    matrix: Sequence[tuple[str, NDArray[np.float32]]],
    unsaid: str,
) -> None: ...
