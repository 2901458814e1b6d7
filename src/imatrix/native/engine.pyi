from collections.abc import Iterable
from typing import TypeAlias, TypedDict

import numpy as np
from numpy.typing import NDArray

# As imatrix.formats.checkpoint has it.
Group: TypeAlias = tuple[
    list[str], NDArray[np.float64], NDArray[np.int64], NDArray[np.float64] | None
]

class PartData(TypedDict):
    architecture: str
    tokenizer: str
    split_count: int
    split_no: int
    split_tensors: int
    aligned: bool
    tables: list[tuple[str, int, int]]
    data_offset: int
    tensors: dict[str, tuple[int, ...]]
    integers: dict[str, int]

class DeviceInfo(TypedDict):
    backend: str
    name: str
    description: str
    buffer_type: str
    gpu: bool
    memory_free: int
    memory_total: int

class PlacementData(TypedDict):
    split_mode: str
    tensor_split: list[float]
    main_gpu: int
    devices: list[str] | None
    overrides: list[tuple[str, str]]

class LoadData(TypedDict):
    mtp: bool
    n_gpu_layers: int
    placement: PlacementData | None
    use_mmap: bool
    check_tensors: bool
    no_alloc: bool
    changeable: bool

class SessionData(TypedDict):
    n_ctx: int
    n_batch: int
    n_ubatch: int
    n_seq: int
    n_threads: int
    mtp: bool
    process_output: bool
    perplexity: bool
    signed_sums: bool
    device_sums: bool

class Counters(TypedDict):
    stops: int
    fetched_bytes: int
    squared_elements: int
    ended: int

class MemoryUse(TypedDict):
    device: str
    host: bool
    plain: bool
    model: int
    context: int
    compute: int

class ContextPlans(TypedDict):
    trunk: tuple[bool, dict[str, int]]
    head: tuple[bool, dict[str, int]]

class ChunkPredictions(TypedDict):
    nll: NDArray[np.float64]
    top: NDArray[np.int32]
    reference_nll: NDArray[np.float64]
    reference_top: NDArray[np.int32]
    kl: NDArray[np.float64]

class ChunkEvaluation(TypedDict):
    trunk: ChunkPredictions
    head: ChunkPredictions
    known: NDArray[np.int8]
    accepted: NDArray[np.int8]

def set_log_level() -> None: ...
def model_file(path: str) -> PartData: ...
def engine() -> tuple[str, str]: ...
def system_info() -> str: ...
def backends() -> tuple[list[str], list[DeviceInfo]]: ...
def load_backends() -> None: ...
def backend_modules() -> list[tuple[str, str]]: ...
def cpu_variant() -> str: ...
def add_rpc_server(endpoint: str) -> None: ...
def find_name(pattern: str, names: Iterable[str]) -> str | None: ...
def row_kernel_names() -> list[str]: ...
def chosen_row_kernel() -> str: ...
def add_squares(
    kernel: str,
    rows: NDArray[np.float32],
    acc: NDArray[np.float32],
    signed_acc: NDArray[np.float32] | None = None,
) -> None: ...

class RowAdder:
    def __init__(self, n_threads: int) -> None: ...
    def add(
        self,
        blocks: list[NDArray[np.float32]],
        sums: list[NDArray[np.float64]],
        signed_sums: list[NDArray[np.float64]] | None = None,
    ) -> tuple[int, int] | None: ...

def live_objects() -> dict[str, int]: ...

class Product:
    def __init__(
        self, type: str, *, n_in: int, n_out: int, n_rows: int, n_mat: int, n_threads: int
    ) -> None: ...
    def run(self) -> float: ...
    @property
    def buffer_type(self) -> str: ...

class Model:
    def __init__(
        self,
        path: str,
        *,
        mtp: bool,
        n_gpu_layers: int,
        use_mmap: bool,
        check_tensors: bool,
        no_alloc: bool = False,
        changeable: bool = False,
        placement: PlacementData | None = None,
    ) -> None: ...
    @property
    def n_nextn(self) -> int: ...
    @property
    def n_trunk(self) -> int: ...
    @property
    def n_vocab(self) -> int: ...
    @property
    def n_ctx_train(self) -> int: ...
    @property
    def has_tokenizer(self) -> bool: ...
    @property
    def has_decoder(self) -> bool: ...
    @property
    def has_encoder(self) -> bool: ...
    def causal(self) -> bool: ...
    @property
    def add_bos(self) -> bool: ...
    @property
    def bos(self) -> int: ...
    @property
    def description(self) -> str: ...
    def token_text(self, token: int) -> str: ...
    def metadata(self, prefix: str) -> dict[str, str]: ...
    def tokenize(
        self, text: str, *, add_special: bool, parse_special: bool
    ) -> NDArray[np.int32]: ...

class Session:
    model: Model
    head: Model | None
    def __init__(self, model: Model, head: Model | None = None) -> None: ...
    def open(
        self,
        *,
        n_ctx: int,
        n_batch: int,
        n_ubatch: int,
        n_seq: int,
        n_threads: int,
        mtp: bool,
        process_output: bool,
        perplexity: bool,
        signed_sums: bool = True,
        device_sums: bool = True,
        leave_out_logits: bool = True,
        first_slot: str = "cached",
        computes: bool = True,
    ) -> None: ...
    def try_decode(self) -> None: ...
    def step(
        self, tokens: NDArray[np.int32], lengths: NDArray[np.int32]
    ) -> list[tuple[float, float, int]]: ...
    def clear_sums(self) -> None: ...
    def cancel(self) -> None: ...
    def clear_cancel(self) -> None: ...
    def set_hook_enabled(self, enabled: bool) -> None: ...
    def snapshot(
        self,
    ) -> dict[str, tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.float64] | None]]: ...
    def counts(self) -> dict[str, NDArray[np.int64]]: ...
    def groups(self) -> list[Group]: ...
    def restore(
        self,
        names: list[str],
        sums: NDArray[np.float64],
        counts: NDArray[np.int64],
        signed_sums: NDArray[np.float64] | None = None,
    ) -> None: ...
    @property
    def counters(self) -> Counters: ...
    @property
    def plan(self) -> ContextPlans: ...
    @property
    def memory(self) -> list[MemoryUse]: ...
    @property
    def kernel(self) -> str: ...

class Evaluator:
    model: Model
    head: Model | None
    reference: Model | None
    reference_head: Model | None
    def __init__(
        self,
        model: Model,
        head: Model | None = None,
        reference: Model | None = None,
        reference_head: Model | None = None,
    ) -> None: ...
    def open(
        self, *, n_ctx: int, n_batch: int, n_ubatch: int, n_threads: int, depth: int
    ) -> None: ...
    def step(self, tokens: NDArray[np.int32]) -> ChunkEvaluation: ...
    def keep(self, tokens: NDArray[np.int32]) -> int: ...
    def step_kept(self, chunk: int) -> ChunkEvaluation: ...
    def cancel(self) -> None: ...
    def clear_cancel(self) -> None: ...

class KeptPredictions(TypedDict):
    nll: NDArray[np.float64]
    top: NDArray[np.int32]

class TrialPredictions(KeptPredictions):
    kl: NDArray[np.float64]

class Weights:
    model: Model
    head: Model | None
    def __init__(self, model: Model, head: Model | None = None) -> None: ...
    def set_threads(self, n: int) -> None: ...
    def names(self) -> list[str]: ...
    def quantize(
        self,
        name: str,
        type: int,
        source: NDArray[np.uint8],
        importance: NDArray[np.float32] | None,
    ) -> float: ...
    def error(
        self,
        name: str,
        type: int,
        source: NDArray[np.uint8],
        importance: NDArray[np.float32] | None,
        *,
        every: int,
    ) -> float: ...
    def put(self, name: str, source: NDArray[np.uint8]) -> None: ...
    def holds(self, name: str, source: NDArray[np.uint8]) -> bool: ...

class Trials:
    model: Model
    def __init__(self, model: Model) -> None: ...
    def open(self, *, n_ctx: int, n_threads: int, top: int = 0) -> None: ...
    def keep(self, tokens: NDArray[np.int32]) -> KeptPredictions: ...
    def start(self, block: int) -> int: ...
    def run(self, chunk: int) -> TrialPredictions: ...
    @property
    def count(self) -> int: ...
    @property
    def kept_bytes(self) -> int: ...
    def cancel(self) -> None: ...
    def clear_cancel(self) -> None: ...
