"""Files that once ended the process, each as the smallest change to a good model that shows it.

tests/fuzz found all of them. Beside each stands the engine's assertion, an independent proof that
the refusal is right. A regression ends the process, so each file has a process of its own.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "fuzz"))

from fuzz_models import make_models
from ggufs import STRING, File, Key, parsed
from helpers.forge import make_model

from imatrix import FormatError, ModelError, graft_mtp
from imatrix.formats import checkpoint

_TRY = """
import json, sys, warnings
from imatrix import Collector, ImatrixError, coverage, quantize
warnings.simplefilter("ignore")
path, what = sys.argv[1:]
try:
    if what == "coverage":
        coverage(path, None, "Q4_K_M")
    elif what == "quantize":
        quantize(path, path + ".out", "Q4_K_M", n_threads=1)
    else:
        with Collector(path, n_ctx=32, n_threads=1) as collector:
            if what == "load":
                collector.n_vocab
            elif what == "tokenize":
                collector.tokenize("The the\\n")
            elif what == "long":
                collector.tokenize("a" * 200_000)
            else:
                collector.run([list(range(3, 35))], mtp=True)
    print(json.dumps("worked"))
except ImatrixError as error:
    print(json.dumps(str(error)))
"""

Change = Callable[[File], None]


def tried(path: Path, what: str) -> str:
    child = subprocess.run(
        [sys.executable, "-c", _TRY, path, what], capture_output=True, text=True, timeout=120
    )
    assert child.returncode == 0, child.stderr[-2000:]
    said = json.loads(child.stdout.splitlines()[-1])
    assert isinstance(said, str)
    return said


def sets(key: str, value: object) -> Change:
    def change(file: File) -> None:
        found = file.key(key.encode())
        assert found is not None, key
        found.value = value

    return change


def adds(key: str, kind: int, value: object) -> Change:
    return lambda file: file.keys.append(Key(key.encode(), kind, value))


def tensor(name: str, **fields: object) -> Change:
    def change(file: File) -> None:
        (found,) = (t for t in file.tensors if t.name == name.encode())
        for field, value in fields.items():
            setattr(found, field, value)

    return change


def doubles_a_token(file: File) -> None:
    tokens = file.key(b"tokenizer.ggml.tokens")
    assert tokens is not None
    tokens.value[5] = tokens.value[6]


def no_separator(file: File) -> None:
    """No separator is named, and there is none at 102 either, where the engine then expects it."""
    file.keys = [key for key in file.keys if key.name != b"tokenizer.ggml.seperator_token_id"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_models(tmp_path_factory.mktemp("models"))


# model, change, what is done, part of the error
_CASES: list[tuple[str, Change, str, str]] = [
    # GGML_ASSERTs in llama_model_base::load_hparams, src/llama-model.cpp
    ("llama-gpt2", sets("llama.block_count", 0), "load", "block_count is 0, but there are"),
    ("llama-gpt2", sets("llama.block_count", 0), "coverage", "block_count is 0, but there are"),
    ("llama-gpt2", sets("llama.block_count", 0), "quantize", "block_count is 0, but there are"),
    ("glm4moe", sets("glm4moe.expert_used_count", 0), "load", "n_expert_used_max > 0"),
    # llama_vocab::impl::load, src/llama-vocab.cpp
    ("llama-gpt2", doubles_a_token, "load", "id_to_token.size() == token_to_id.size()"),
    ("llama-gpt2", doubles_a_token, "tokenize", "id_to_token.size() == token_to_id.size()"),
    # a separator outside the vocabulary: GGML_ASSERT in llama_vocab::impl::tokenize
    ("llama-wpm", no_separator, "tokenize", "special_sep_id != LLAMA_TOKEN_NULL"),
    # ggml_compute_forward_rope_flt, ggml_mrope_cache_init, ggml-cpu/ops.cpp
    ("llama-gpt2", sets("llama.rope.dimension_count", 33), "run", ""),
    ("qwen3next", sets("qwen3next.rope.dimension_count", 2**32 - 32), "run", "rope over -32"),
    ("glm4moe", sets("glm4moe.rope.dimension_count", 1000), "run", "rope over 1000 dimensions"),
    # GGML_ASSERT(eps >= 0.0f), ggml-cpu/ops.cpp
    ("glm4moe", sets("glm4moe.attention.layer_norm_rms_epsilon", -1.0), "run", "epsilon of -1"),
    # a null function pointer: no vec_dot for the type (ggml-cpu.c)
    ("qwen35", tensor("blk.1.attn_k.weight", kind=28, data=bytes(16384)), "run", "type f64"),
    ("mimo2", tensor("blk.0.attn_output.weight", kind=24, data=bytes(16384)), "run", "type i8"),
    # binary_op: unsupported types, ggml-cpu/binary-ops.cpp
    ("llama-gpt2", tensor("blk.0.attn_norm.weight", kind=1, data=bytes(128)), "run", "type f16"),
    # GGML_ASSERT(!key.empty()) in gguf.cpp, when the quantizer copies the keys
    ("llama-gpt2", adds("\0", 4, 64), "quantize", "key without a name"),
    # GGML_ASSERT(offs + size <= ggml_nbytes(w.tensor)), src/llama-model-loader.cpp
    ("cohere2moe", tensor("output_norm.weight", dims=[64, 0], data=b""), "quantize", "no values"),
    # GGML_ASSERT in ggml_backend_cpu_buffer_from_ptr: such a file is read instead of mapped
    ("llama-gpt2", adds("general.alignment", 4, 8), "run", "worked"),
    # GGML_ASSERT on the expert's number in ggml_compute_forward_mul_mat_id
    ("deepseek4", tensor("blk.0.ffn_gate_tid2eid.weight", data=b"\xe8\3\0\0" * 564), "run", "names expert 1000 of 8"),
]  # fmt: skip


@pytest.mark.parametrize(("model", "change", "what", "said"), _CASES)
def test_is_refused_or_works(
    model: str, change: Change, what: str, said: str, models: dict[str, Path], tmp_path: Path
) -> None:
    file = parsed(models[model].read_bytes())
    change(file)
    if (alignment := file.key(b"general.alignment")) is not None:
        file.alignment = alignment.value
    path = tmp_path / "hostile.gguf"
    path.write_bytes(file.packed())
    assert said in tried(path, what)


@pytest.mark.parametrize(
    "claim",
    [
        "n_keys",
        "n_tensors",
        "string",
        "array",
        "strings",
        "dims",
    ],
)
@pytest.mark.parametrize("target", ["matrix", "checkpoint", "model", "mtp"])
def test_nothing_is_allocated_for_a_claim(claim: str, target: str, tmp_path: Path) -> None:
    """Files of a few hundred bytes that claim 2^60 of something, read with 256 MiB of memory
    left."""
    from targets import CORPUS

    data = sorted((CORPUS / target).iterdir())[0].read_bytes()
    file = parsed(data)
    if claim in ("n_keys", "n_tensors"):
        setattr(file, claim, 2**60)
        data = file.packed()
    elif claim == "dims":
        file.tensors[0].dims = [2**60, 1]
        data = file.packed()
    else:
        kind = {"string": STRING, "array": 9, "strings": 9}[claim]
        last = (4).to_bytes(4, "little") if claim == "array" else (8).to_bytes(4, "little")
        file.keys.insert(0, Key(b"z" * 8, 4, 0))
        data = file.packed()
        at = data.index(b"z" * 8) + 8
        body = kind.to_bytes(4, "little") + (last if kind == 9 else b"")
        data = data[:at] + body + (2**60).to_bytes(8, "little") + data[at + 8 :]
    path = tmp_path / "claims.gguf"
    code = (
        "import resource, sys; from pathlib import Path\n"
        f"sys.path.insert(0, {str(Path(__file__).parents[1] / 'fuzz')!r})\n"
        "import targets\n"
        "size = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (size + (256 << 20),) * 2)\n"
        "data = Path(sys.argv[1]).read_bytes()\n"
        f"print(targets.tried({target!r}, data, Path(sys.argv[1] + '.x')))\n"
    )
    path.write_bytes(data)
    if sys.platform != "linux":
        pytest.skip("RLIMIT_AS and /proc are Linux's")
    child = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr[-2000:]
    assert child.stdout.splitlines()[-1] == "False"


def test_nothing_in_a_file_is_executed() -> None:
    """No module of the package can run what it reads."""
    source = Path(__file__).resolve().parents[2] / "src" / "imatrix"
    modules = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "joblib", "cloudpickle"}
    for path in sorted(source.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names = {(node.module or "").partition(".")[0]}
            else:
                names = set()
            assert not names & modules, f"{path.name}:{node.lineno}"
            if isinstance(node, ast.Call):
                if isinstance(node.func, ast.Name):
                    called = node.func.id
                    assert called not in ("eval", "exec"), f"{path.name}:{node.lineno}"
                allowed = [k for k in node.keywords if k.arg == "allow_pickle"]
                assert not allowed, f"{path.name}:{node.lineno}"


def test_a_tokenizer_that_aborts_is_refused(tmp_path: Path) -> None:
    """GGML_ASSERT(special_bos_id != LLAMA_TOKEN_NULL), src/llama-vocab.cpp."""
    path = tmp_path / "model.gguf"
    keys = {
        "tokenizer.ggml.model": "t5",
        "tokenizer.ggml.tokens": ["<pad>", "</s>", "<unk>", *"▁abcdefghijklmnopqrstuvwxyz"] + [f"w{i}" for i in range(20)],
        "tokenizer.ggml.scores": [-float(i) for i in range(50)],
        "tokenizer.ggml.token_type": [3, 3, 2] + [1] * 47,
        "tokenizer.ggml.add_bos_token": True,
    }  # fmt: skip
    make_model(path, "llama", tokenizer=None, n_vocab=50, n_embd=64, n_ff=64, metadata=keys)
    assert "special_bos_id != LLAMA_TOKEN_NULL" in tried(path, "tokenize")
    without = parsed(path.read_bytes())
    sets("tokenizer.ggml.add_bos_token", 0)(without)
    path.write_bytes(without.packed())
    assert tried(path, "run") == "worked"


def test_a_long_word(tmp_path: Path) -> None:
    """std::regex overflowed the stack on 25000 letters in a row (src/unicode.cpp)."""
    path = tmp_path / "model.gguf"
    make_model(path, "llama", tokenizer="deepseek-llm", n_vocab=600, n_embd=64, n_ff=64)
    assert tried(path, "long") == "worked"


def test_a_checkpoint_with_a_tensor_of_no_dimensions() -> None:
    """It raised an IndexError once; libFuzzer made the file."""
    path = Path(__file__).resolve().parents[1] / "fuzz" / "corpus" / "checkpoint" / "no-dimensions"
    with pytest.raises(FormatError, match="holds no values"):
        checkpoint.read(path)


def test_a_head_whose_scalar_is_of_another_type(tmp_path: Path) -> None:
    """It raised a struct.error once: 1.0 equals the 1 of the trunk's array, but is no integer."""
    from targets import CORPUS

    trunk, head = (
        parsed((CORPUS / "mtp" / "trunk").read_bytes()),
        parsed((CORPUS / "mtp" / "head").read_bytes()),
    )
    key = head.key(b"glm4moe.attention.head_count_kv")
    assert key is not None
    key.kind, key.value = 6, 1.0
    (tmp_path / "trunk").write_bytes(trunk.packed())
    (tmp_path / "head").write_bytes(head.packed())
    with pytest.raises(ModelError, match="has no place in the array"):
        graft_mtp(tmp_path / "trunk", tmp_path / "head", tmp_path / "out")
