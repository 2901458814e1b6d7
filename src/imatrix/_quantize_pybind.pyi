from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

def ftypes() -> dict[str, int]: ...
def quantize(
    src: str,
    dst: str,
    *,
    ftype: int,
    n_threads: int,
    allow_requantize: bool,
    pure: bool,
    quantize_output: bool,
    matrix: Sequence[tuple[str, NDArray[np.float32]]],
    tensor_types: Sequence[tuple[str, int]],
    metadata: Sequence[tuple[str, str]],
) -> None: ...
