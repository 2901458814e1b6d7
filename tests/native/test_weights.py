"""Weights changed in place, compared with what llama-quantize writes and gguf-py reads of it, and
trials, compared with evaluate() of files that hold the changed weights."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as GgmlType
from gguf import GGUFReader, dequantize
from helpers.forge import ModelSpec
from helpers.forge_any import make_any
from helpers.running import EngineTool, Forged, RpcServer, run_tool
from numpy.typing import NDArray

import imatrix
from imatrix.native import engine, quantizer

N_CTX = 32
TYPES = {name: number for name, (number, _) in quantizer.tensor_types().items()}


def load(path: Path, *, mtp: bool = True, **options: Any) -> engine.Model:
    return engine.Model(
        str(path),
        mtp=mtp,
        use_mmap=False,
        check_tensors=False,
        changeable=True,
        **{"n_gpu_layers": 0, **options},
    )


def bytes_of(path: Path) -> dict[str, NDArray[np.uint8]]:
    return {
        tensor.name: np.ascontiguousarray(tensor.data).view(np.uint8).reshape(-1)
        for tensor in GGUFReader(path).tensors
    }


def tokens_of(spec: ModelSpec, text: str, n: int) -> list[NDArray[np.int32]]:
    return [np.asarray(chunk, dtype=np.int32) for chunk in spec.chunks(text, N_CTX, n)]


@pytest.fixture(scope="module")
def experts(forged: Forged) -> ModelSpec:
    return forged("glm4moe", seed=3, n_nextn=1, dtype="F16")


@pytest.fixture(scope="module")
def matrix(
    experts: ModelSpec, prose_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> imatrix.ImportanceMatrix:
    path = tmp_path_factory.mktemp("matrix") / "matrix.gguf"
    with imatrix.Collector(experts.path, n_ctx=64, rehearse=False) as collector:
        collector.run(prose_file, mtp=True, max_chunks=8).save(path)
    return imatrix.ImportanceMatrix.load(path)  # float32, as llama-quantize reads it


# --- weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["iq2_xxs", "q2_K", "iq4_nl"])
def test_what_is_put_in_place_is_what_a_quantized_file_holds(
    experts: ModelSpec,
    matrix: imatrix.ImportanceMatrix,
    kind: str,
    engine_tool: EngineTool,
    tmp_path: Path,
) -> None:
    matrix.save(tmp_path / "matrix.gguf")
    names = [
        *("blk.0.attn_v.weight", "blk.0.ffn_down.weight"),
        *("blk.1.ffn_down_exps.weight", "blk.2.nextn.eh_proj.weight"),
    ]
    rules = tmp_path / "rules.txt"
    rules.write_text("".join(f"{name}={kind.lower()}\n" for name in names))
    run_tool(
        engine_tool("llama-quantize"),
        *("--imatrix", tmp_path / "matrix.gguf", "--tensor-type-file", rules),
        *(experts.path, tmp_path / "quantized.gguf", "Q8_0", "2"),
    )
    quantized = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "quantized.gguf").tensors}
    source = bytes_of(experts.path)
    model = load(experts.path)
    weights = engine.Weights(model, model)
    weights.set_threads(2)
    for name in names:
        tensor = quantized[name]
        assert tensor.tensor_type.name.lower() == kind.lower()
        made = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        importance = matrix[name].importance.astype(np.float32)
        error = weights.quantize(name, TYPES[kind], source[name], importance.reshape(-1))
        assert weights.holds(name, made.astype(np.float16).view(np.uint8).reshape(-1)), name

        original = experts.tensors[name].astype(np.float64)
        columns = importance.reshape(-1, 1, original.shape[-1]).astype(np.float64)
        squares = (original - made.reshape(original.shape)) ** 2
        squares = squares.reshape(len(columns), -1, original.shape[-1])
        # both are float64 sums in another order
        assert error == pytest.approx(float((columns * squares).sum()), rel=1e-9)

        # of every row it is the same; rows of random weights are alike, so that a quarter of at
        # least 128 gives it to some percent
        estimate = weights.error(name, TYPES[kind], source[name], importance.reshape(-1), every=4)
        assert estimate == pytest.approx(error, rel=0.1)
        assert weights.error(
            name, TYPES[kind], source[name], importance.reshape(-1), every=1
        ) == pytest.approx(error, rel=1e-12)
        assert not weights.holds(name, source[name])
        weights.put(name, source[name])
    assert all(weights.holds(name, source[name]) for name in weights.names())


def test_it_is_the_same_with_any_number_of_threads(experts: ModelSpec) -> None:
    name = "blk.1.ffn_up_exps.weight"
    source = bytes_of(experts.path)[name]
    model = load(experts.path)
    errors = []
    for n_threads in (1, 3):
        weights = engine.Weights(model, model)
        weights.set_threads(n_threads)
        errors.append(weights.quantize(name, TYPES["q3_K"], source, None))
    assert errors[0] == errors[1]


def test_what_cannot_be_put_in_place_is_refused(experts: ModelSpec, forged: Forged) -> None:
    source = bytes_of(experts.path)
    model = load(experts.path)
    weights = engine.Weights(model, model)
    name = "blk.0.attn_v.weight"
    with pytest.raises(ValueError, match=r"nothing\.weight: the loaded model has no such tensor"):
        weights.put("nothing.weight", source[name])
    with pytest.raises(ValueError, match=r"bytes of it, the file 3"):
        weights.put(name, source[name][:3])
    with pytest.raises(ValueError, match="iq2_xxs needs importance data"):
        weights.quantize(name, TYPES["iq2_xxs"], source[name], None)
    with pytest.raises(ValueError, match="2 values of importance, expected 256"):
        weights.quantize(name, TYPES["q4_K"], source[name], np.ones(2, np.float32))
    with pytest.raises(ValueError, match="no type has the number 999"):
        weights.quantize(name, 999, source[name], None)
    assert weights.holds(name, source[name])

    narrow = forged("llama", n_embd=160, n_head=4, head_dim=40, n_rot=40, dtype="F16")
    small = engine.Weights(load(narrow.path, mtp=False))
    with pytest.raises(ValueError, match="rows have 160 values, no multiple of the 256"):
        small.quantize(name, TYPES["q4_K"], bytes_of(narrow.path)[name], None)

    coarse = forged("llama", dtype="Q8_0")
    quantized = engine.Weights(load(coarse.path, mtp=False))
    with pytest.raises(ValueError, match="it is q8_0 already"):
        quantized.quantize(name, TYPES["q4_K"], bytes_of(coarse.path)[name], None)


# --- trials ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_a_trial_is_an_evaluation_of_a_file_with_the_changed_weight(
    forged: Forged, dtype: str, prose: str, tmp_path: Path
) -> None:
    spec = forged("llama", seed=4, n_layer=3, dtype=dtype)
    name = "blk.2.ffn_down.weight"
    source = bytes_of(spec.path)
    model = load(spec.path, mtp=False)
    weights, trials = engine.Weights(model), engine.Trials(model)
    weights.set_threads(2)
    trials.open(n_ctx=N_CTX, n_threads=2)
    chunks = tokens_of(spec, prose, 3)
    for chunk in chunks:
        trials.keep(chunk)
    assert trials.count == 3
    assert trials.start(2) == 2
    weights.quantize(name, TYPES["q4_0"], source[name], None)
    found = [trials.run(chunk) for chunk in range(3)]

    made = GgmlType.Q4_0
    run = imatrix.quantize(spec.path, tmp_path / "q.gguf", "Q4_0")
    tensor = next(t for t in GGUFReader(run.path).tensors if t.name == name)
    values = dequantize(tensor.data, made).astype(np.float32)
    bits = {
        "F16": values.astype(np.float16),
        # round to nearest even, as ggml's conversion does
        "BF16": ((v := values.view(np.uint32)) + 0x7FFF + ((v >> 16) & 1) >> 16).astype(np.uint16),
    }[dtype]
    changed = tmp_path / "changed.gguf"
    content = bytearray(spec.path.read_bytes())
    place = next(t for t in GGUFReader(spec.path).tensors if t.name == name)
    content[place.data_offset : place.data_offset + place.n_bytes] = bits.tobytes()
    changed.write_bytes(content)
    # as evaluate() runs it, but for the weights' place: where the CPU has instructions for a matrix of
    # F16, the engine may keep weights for these, and rounds otherwise
    evaluator = engine.Evaluator(load(changed, mtp=False), reference=load(spec.path, mtp=False))
    evaluator.open(n_ctx=N_CTX, n_batch=N_CTX, n_ubatch=N_CTX, n_threads=2, depth=1)
    for chunk, row in zip(chunks, found, strict=True):
        want = evaluator.step(chunk)["trunk"]
        # the same logits and the same function: the same numbers
        assert np.array_equal(row["kl"], want["kl"])
        assert np.array_equal(row["nll"], want["nll"])
        assert np.array_equal(row["top"], want["top"])


# Of each way to give rows to the next block, one: plain and shared keys, experts, states, streams, rows
# that the next block names, tokens that see those after them.
ARCHS = (
    *("deepseek4", "dream", "gemma4", "glm5-next", "gpt2", "lfm2", "nemotron_h_moe", "qwen35moe"),
    *("qwen4exp", "step35"),
)


@pytest.mark.parametrize("arch", ARCHS)
def test_a_pass_that_begins_at_a_block_is_a_whole_one(arch: str, tmp_path: Path) -> None:
    spec = make_any(tmp_path / "model.gguf", arch, seed=5)
    model = load(spec.path, mtp=False)
    block = model.n_trunk - 1
    source = bytes_of(spec.path)
    name = next(
        name
        for name, shape in spec.shapes.items()
        if name.startswith(f"blk.{block}.")
        and len(shape) > 1
        and shape[-1] % 32 == 0
        and ("attn_out" in name or "ffn_down" in name or "ssm_out" in name)
    )
    weights, trials = engine.Weights(model), engine.Trials(model)
    trials.open(n_ctx=N_CTX, n_threads=2)
    rng = np.random.default_rng(6)
    for _ in range(2):
        trials.keep(rng.integers(0, model.n_vocab, N_CTX, dtype=np.int32))
    weights.quantize(name, TYPES["q4_0"], source[name], None)
    whole = [trials.run(chunk) for chunk in range(2)]
    assert sum(row["kl"].sum() for row in whole) > 0
    weights.put(name, source[name])
    assert trials.start(block) == block
    again = [trials.run(chunk) for chunk in range(2)]
    assert all((row["kl"] == 0).all() for row in again)
    weights.quantize(name, TYPES["q4_0"], source[name], None)
    part = [trials.run(chunk) for chunk in range(2)]
    for one, other in zip(whole, part, strict=True):
        assert np.array_equal(one["kl"], other["kl"])
        assert np.array_equal(one["nll"], other["nll"])


def test_blocks_one_after_the_other_and_back(experts: ModelSpec, prose: str) -> None:
    model = load(experts.path)
    source = bytes_of(experts.path)
    weights, trials = engine.Weights(model), engine.Trials(model)
    trials.open(n_ctx=N_CTX, n_threads=1)
    for chunk in tokens_of(experts, prose, 2):
        trials.keep(chunk)
    # of a chunk the second half is scored but for the last token: float32 logits of these rows
    kept = 2 * (N_CTX // 2 - 1) * model.n_vocab * 4
    assert trials.kept_bytes == kept

    def found(block: int, changed: int) -> list[float]:
        name = f"blk.{changed}.attn_output.weight"
        assert trials.start(block) == block
        weights.quantize(name, TYPES["q4_K"], source[name], None)
        kl = [float(trials.run(chunk)["kl"].sum()) for chunk in range(2)]
        weights.put(name, source[name])
        return kl

    whole = [found(0, changed) for changed in range(model.n_trunk)]
    assert [found(block, block) for block in range(model.n_trunk)] == whole
    assert found(1, 1) == whole[1]
    assert found(0, 1) == whole[1]
    assert trials.start(1) == 1
    # and the float32 rows that go into block 1, with a byte for each node that is left out
    rows = 2 * N_CTX * experts.hparams.n_embd * 4
    assert rows < trials.kept_bytes - kept < rows + 2 * 1000
    assert trials.start(0) == 0
    assert trials.kept_bytes == kept


def test_the_likeliest_tokens_give_a_lower_bound(experts: ModelSpec, prose: str) -> None:
    """The rest of the vocabulary counts as one token: less than it gives token by token, and more
    with more of them kept."""
    model = load(experts.path)
    name = "blk.0.ffn_down.weight"
    source = bytes_of(experts.path)[name]
    (chunk,) = tokens_of(experts, prose, 1)
    found = {}
    for top in (0, 1, 16, 256, model.n_vocab):
        weights, trials = engine.Weights(model), engine.Trials(model)
        trials.open(n_ctx=N_CTX, n_threads=1, top=top)
        trials.keep(chunk)
        # a float32 logit a token, and its number where not all are kept
        bytes_a_row = 8 * top if top else 4 * model.n_vocab
        assert trials.kept_bytes == (N_CTX // 2 - 1) * bytes_a_row
        assert (np.abs(trials.run(0)["kl"]) < 1e-9).all()
        weights.quantize(name, TYPES["q2_K"], source, None)
        found[top] = trials.run(0)["kl"]
        weights.put(name, source)
    assert (found[1] > 0).all()
    for less, more in ((1, 16), (16, 256), (256, model.n_vocab)):
        assert (found[less] <= found[more] + 1e-9).all()
    # float32 exponentials there, float64 here
    assert found[model.n_vocab] == pytest.approx(found[0], rel=1e-4, abs=1e-7)


# A client keeps its connection, and the server has one at a time: the tests' own process must not
# be one.
ON_A_DEVICE = """
import sys
import numpy as np
from gguf import GGUFReader
import imatrix
from imatrix.native import engine, quantizer

endpoint, path, n_ctx = sys.argv[1], sys.argv[2], int(sys.argv[3])
imatrix.add_rpc_server(endpoint)
device = next(d.name for d in imatrix.backends().devices if d.name.startswith("RPC"))
placement = dict(split_mode="layer", tensor_split=[], main_gpu=0, devices=[device], overrides=[])
model = engine.Model(path, mtp=True, n_gpu_layers=2, use_mmap=False, check_tensors=False,
                     changeable=True, placement=placement)
source = {t.name: np.ascontiguousarray(t.data).view(np.uint8).reshape(-1)
          for t in GGUFReader(path).tensors}
weights, trials = engine.Weights(model, model), engine.Trials(model)
assert all(weights.holds(name, source[name]) for name in weights.names())
trials.open(n_ctx=n_ctx, n_threads=1)
for seed in range(2):
    tokens = np.random.default_rng(seed).integers(0, model.n_vocab, n_ctx, dtype=np.int32)
    trials.keep(tokens)
block = model.n_trunk - 1
name = f"blk.{block}.attn_output.weight"
q4_K = quantizer.tensor_types()["q4_K"][0]
weights.quantize(name, q4_K, source[name], None)
whole = trials.run(0)["kl"]
weights.put(name, source[name])
assert trials.start(block) == block
weights.quantize(name, q4_K, source[name], None)
assert (whole > 0).any() and np.array_equal(trials.run(0)["kl"], whole)
weights.put(name, source[name])
assert all(weights.holds(name, source[name]) for name in weights.names())
print("the same")
"""


def test_weights_on_a_device(experts: ModelSpec, rpc_server: RpcServer) -> None:
    """A graph in several splits, with copies between them."""
    command = [sys.executable, "-c", ON_A_DEVICE, rpc_server(0), str(experts.path), str(N_CTX)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.endswith("the same\n"), done.stderr


def test_what_trials_refuse(experts: ModelSpec, prose: str) -> None:
    model = load(experts.path)
    trials = engine.Trials(model)
    (chunk,) = tokens_of(experts, prose, 1)
    with pytest.raises(ValueError, match="not open"):
        trials.keep(chunk)
    with pytest.raises(ValueError, match="top must be 0 to the"):
        trials.open(n_ctx=N_CTX, n_threads=1, top=model.n_vocab + 1)
    trials.open(n_ctx=N_CTX, n_threads=1)
    with pytest.raises(ValueError, match="1 to n_ctx tokens"):
        trials.keep(np.zeros(N_CTX + 1, np.int32))
    with pytest.raises(ValueError, match="chunk 0 is none of the 0"):
        trials.run(0)
    trials.keep(chunk)
    trials.cancel()
    with pytest.raises(InterruptedError):
        trials.run(0)
    trials.clear_cancel()
    assert (trials.run(0)["kl"] == 0).all()
    assert trials.start(1) == 1
    with pytest.raises(ValueError, match="before runs begin"):
        trials.keep(chunk)
