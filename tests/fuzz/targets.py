"""What is fuzzed: each reader of the package, the seeds that it starts from, and the errors that it
may raise.

A target takes the path of a file that may hold anything. It has to end, and to raise nothing but
what its docstring promises.
"""

from __future__ import annotations

import random
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parent))

from ggufs import STRING, File, Key, Tensor
from mutations import mutated_bytes, mutated_gguf

from imatrix import FormatError, ImatrixError, ImportanceMatrix, ModelFile
from imatrix.formats import checkpoint, dat
from imatrix.heads.extract import extract_mtp
from imatrix.heads.graft import graft_mtp
from imatrix.model import architectures
from imatrix.text import chunks

HERE = Path(__file__).resolve().parent
CORPUS = HERE / "corpus"
DICTIONARY = HERE / "gguf.dict"

_F32, _F64, _I64, _U32, _I32 = 0, 28, 27, 4, 5


def _floats(count: int, code: str = "<f4") -> bytes:
    return (np.arange(count) + 1).astype(code).tobytes()


def _matrix_file(left_out: bool = False) -> bytes:
    """A matrix as llama-imatrix writes it: a dense weight, and a weight of two experts."""
    file = File(
        keys=[
            Key(b"general.type", STRING, b"imatrix"),
            Key(b"imatrix.datasets", STRING, [b"wiki.txt"]),
            Key(b"imatrix.chunk_count", _U32, 2),
            Key(b"imatrix.chunk_size", _U32, 32),
        ],
        tensors=[
            Tensor(b"blk.0.attn_q.weight.counts", [1, 1], _F32, _floats(1)),
            Tensor(b"blk.0.attn_q.weight.in_sum2", [4, 1], _F32, _floats(4)),
            Tensor(b"blk.0.ffn_up_exps.weight.counts", [1, 2], _F32, _floats(2)),
            Tensor(b"blk.0.ffn_up_exps.weight.in_sum2", [4, 2], _F32, _floats(8)),
        ],
    )
    if left_out:
        file.keys += [
            Key(b"imatrix.collector.version", STRING, b"imatrix 0"),
            Key(b"imatrix.collector.mtp", 7, 1),
            Key(b"imatrix.collector.n_ctx", _U32, 32),
            Key(b"imatrix.collector.left_out.chunks", 10, [1]),
            Key(b"imatrix.collector.left_out.tokens", 10, [32]),
            Key(b"imatrix.collector.left_out.weights", STRING, [b"blk.0.attn_q.weight"]),
        ]
    return file.packed()


def _checkpoint_file() -> bytes:
    prefix = b"imatrix.checkpoint."
    file = File(
        keys=[
            Key(b"general.type", STRING, b"imatrix-checkpoint"),
            Key(prefix + b"version", _U32, 1),
            Key(prefix + b"done", 10, 3),
            Key(prefix + b"tokens", 10, 96),
            Key(prefix + b"scored", 10, 0),
            Key(prefix + b"seconds", 12, 1.5),
            Key(prefix + b"nll", 12, 0.0),
            Key(prefix + b"nll_sq", 12, 0.0),
            Key(prefix + b"text_digest", STRING, b"00"),
            Key(prefix + b"setting.n_ctx", 11, 32),
            Key(prefix + b"setting.mtp", 7, 1),
            Key(prefix + b"setting.engine", STRING, b"llama.cpp"),
            Key(prefix + b"shared.weights", STRING, [b"blk.0.attn_k.weight"]),
            Key(prefix + b"shared.with", STRING, [b"blk.0.attn_q.weight"]),
        ],
        tensors=[
            Tensor(b"blk.0.attn_q.weight.in_sum2", [4, 1], _F64, _floats(4, "<f8")),
            Tensor(b"blk.0.attn_q.weight.counts", [1, 1], _I64, _floats(1, "<i8")),
            Tensor(b"blk.0.ffn_up_exps.weight.in_sum2", [4, 2], _F64, _floats(8, "<f8")),
            Tensor(b"blk.0.ffn_up_exps.weight.counts", [1, 2], _I64, _floats(2, "<i8")),
        ],
    )
    return file.packed()


def _model_file(
    architecture: bytes = b"glm4moe", *, head: bool = True, trunk: bool = True
) -> bytes:
    """A model's header and tensors with a few values; its shapes fit what check_fit asks for."""
    tensors = [Tensor(b"token_embd.weight", [2, 3], _F32, _floats(6))]
    if trunk:
        tensors += [
            Tensor(b"blk.0.attn_q.weight", [2, 2], _F32, _floats(4)),
            Tensor(b"blk.0.ffn_gate_tid2eid.weight", [2, 3], 26, bytes(24)),
        ]
    if head:
        tensors += [
            Tensor(b"blk.1.attn_norm.weight", [2], _F32, _floats(2)),
            Tensor(b"blk.1.nextn.eh_proj.weight", [4, 2], _F32, _floats(8)),
            Tensor(b"blk.1.nextn.enorm.weight", [2], _F32, _floats(2)),
            Tensor(b"blk.1.nextn.hnorm.weight", [2], _F32, _floats(2)),
        ]
    tensors.append(Tensor(b"output_norm.weight", [2], _F32, _floats(2)))
    file = File(
        keys=[
            Key(b"general.architecture", STRING, architecture),
            Key(architecture + b".block_count", _U32, 2 if head else 1),
            Key(architecture + b".embedding_length", _U32, 2),
            Key(architecture + b".expert_count", _U32, 2),
            Key(architecture + b".attention.head_count_kv", _U32, [1, 1] if head else [1]),
            Key(b"tokenizer.ggml.model", STRING, b"gpt2"),
            Key(b"tokenizer.ggml.tokens", STRING, [b"a", b"b", b"c"]),
        ],
        tensors=tensors,
    )
    if head:
        file.keys.insert(2, Key(architecture + b".nextn_predict_layers", _U32, 1))
    return file.packed()


def _part_file(number: int, count: int, tensors: list[Tensor]) -> bytes:
    file = File(keys=[Key(b"split.no", 2, number), Key(b"split.count", 2, count)], tensors=tensors)
    if number == 0:
        file.keys += [
            Key(b"general.architecture", STRING, b"llama"),
            Key(b"llama.block_count", _U32, 1),
            Key(b"split.tensors.count", _I32, 3),
        ]
    return file.packed()


def _parts() -> list[bytes]:
    names = (b"token_embd.weight", b"blk.0.attn_q.weight", b"output_norm.weight")
    return [
        _part_file(i, 3, [Tensor(name, [2, 2], _F32, _floats(4))]) for i, name in enumerate(names)
    ]


def _dat_file() -> bytes:
    out = [(2).to_bytes(4, "little")]
    for name in (b"blk.0.attn_q.weight", b"blk.0.ffn_up.weight"):
        out.append(len(name).to_bytes(4, "little") + name)
        out.append((2).to_bytes(4, "little") + (4).to_bytes(4, "little") + _floats(4))
    out.append((2).to_bytes(4, "little") + (8).to_bytes(4, "little") + b"wiki.txt")
    return b"".join(out)


_TEXTS = (
    b"",
    b"\n",
    b"The quick brown fox.\n" * 20,
    "Größe 中文 \U0001f600\n".encode() * 8,
    b"a\0b\0\0",
    b"\xff\xfe\x00",
    b"caf\xc3",
    b"<s></s><|endoftext|>",
    b"\xef\xbb\xbfwith a mark",
)


class _Bytes:
    """A tokenizer of bytes: it turns bytes into numbers, with a BOS in front."""

    add_bos = True
    bos = 256
    n_vocab = 257

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> NDArray[np.int32]:
        data = list(text.encode())
        return np.array([256] * add_special + data, dtype=np.int32)


def _read_matrix(path: Path) -> None:
    ImportanceMatrix.load(path)


def _read_dat(path: Path) -> None:
    dat.read(path)


def _read_checkpoint(path: Path) -> None:
    checkpoint.read(path)


def _read_model(path: Path) -> None:
    file = ModelFile.read(path)
    for check in (
        architectures.check_trunk,
        architectures.check_memory,
        architectures.check_tables,
        architectures.check_head,
    ):
        check(file)
    file.fingerprint()


def _read_parts(path: Path) -> None:
    """The input is the second of three parts, in a folder with the other two."""
    folder = path.with_suffix(".parts")
    folder.mkdir(exist_ok=True)
    for number, data in enumerate(_parts(), start=1):
        part = folder / f"model-{number:05d}-of-00003.gguf"
        part.unlink(missing_ok=True)
        part.write_bytes(path.read_bytes() if number == 2 else data)
    first = folder / "model-00001-of-00003.gguf"
    for use in (ModelFile.read, lambda file: extract_mtp(file, folder / "out.gguf")):
        try:
            use(first)
        except ImatrixError:
            continue
    ModelFile.read(first)


def _move_heads(path: Path) -> None:
    """Take a head out of the input; put the input's head into a trunk, and another head into the
    input."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = path.with_suffix(".out")
        trunk, head = path.with_suffix(".trunk"), path.with_suffix(".head")
        if not trunk.exists():
            trunk.write_bytes(_model_file(head=False))
            head.write_bytes(_model_file(trunk=False))
        refused = 0
        for work in (
            lambda: extract_mtp(path, out, trunk_out=path.with_suffix(".out2")),
            lambda: graft_mtp(trunk, path, out),
            lambda: graft_mtp(path, head, out),
        ):
            try:
                work()
            except ImatrixError:
                refused += 1
        if refused == 3:
            raise ImatrixError("refused by each")


def _read_text(path: Path) -> None:
    data = path.read_bytes()
    n_ctx = 2 + (data[0] % 30 if data else 0)
    for chunk in chunks.chunks(path, _Bytes(), n_ctx, skip_chunks=len(data) % 2):
        if (
            chunk.ndim != 1
            or not 2 <= len(chunk) <= n_ctx
            or not 0 <= chunk.min() <= chunk.max() < 257
        ):
            raise AssertionError(f"a chunk of {chunk}")


@dataclass(frozen=True)
class Target:
    """A reader under test.

    run: raises `allowed` for a bad file, and nothing else.
    seeds: well-formed files, by name.
    is_gguf: whether a mutation may work on the pieces of a GGUF file.
    """

    run: Callable[[Path], None]
    allowed: tuple[type[BaseException], ...]
    seeds: Callable[[], dict[str, bytes]]
    is_gguf: bool = True


TARGETS: dict[str, Target] = {
    "matrix": Target(
        _read_matrix,
        (FormatError,),
        lambda: {"llama-imatrix": _matrix_file(), "collector": _matrix_file(left_out=True)},
    ),
    "checkpoint": Target(
        _read_checkpoint, (FormatError,), lambda: {"checkpoint": _checkpoint_file()}
    ),
    "model": Target(
        _read_model,
        (ImatrixError,),
        lambda: {
            "glm4moe": _model_file(),
            "deepseek4": _model_file(b"deepseek4"),
            "trunk": _model_file(head=False),
            "qwen35": _model_file(b"qwen35"),
        },
    ),
    "parts": Target(
        _read_parts, (ImatrixError,), lambda: {f"part-{i}": part for i, part in enumerate(_parts())}
    ),
    "mtp": Target(
        _move_heads,
        (ImatrixError,),
        lambda: {
            "bundled": _model_file(),
            "trunk": _model_file(head=False),
            "head": _model_file(trunk=False),
        },
    ),
    "text": Target(
        _read_text, (ValueError,), lambda: {f"text-{i}": t for i, t in enumerate(_TEXTS)}, False
    ),
    "dat": Target(_read_dat, (FormatError,), lambda: {"llama-imatrix": _dat_file()}, is_gguf=False),
}


def dictionary() -> list[bytes]:
    """The words in the dictionary file, which libFuzzer reads too."""
    words = []
    for line in DICTIONARY.read_text(encoding="ascii").splitlines():
        if line and not line.startswith("#"):
            words.append(line.strip()[1:-1].encode().decode("unicode_escape").encode("latin-1"))
    return words


def corpus_of(name: str) -> list[bytes]:
    """The committed files of a target, by name."""
    return [path.read_bytes() for path in sorted((CORPUS / name).iterdir())]


def mutated(name: str, inputs: list[bytes], number: int, words: list[bytes]) -> bytes:
    """The input of a target with this number."""
    rng = random.Random(f"{name} {number}")
    data = rng.choice(inputs)
    if TARGETS[name].is_gguf and rng.random() < 0.7:
        try:
            return mutated_gguf(data, rng)
        except Exception:
            pass  # a corpus file that is not well-formed: it caused a crash once
    return mutated_bytes(data, rng, words, 4096)


def tried(name: str, data: bytes, path: Path) -> bool:
    """Give an input to a target; returns whether it accepted it. Raises what the target may not
    raise."""
    # A new file: ext4 writes a file at once that was cut to nothing and filled again.
    path.unlink(missing_ok=True)
    path.write_bytes(data)
    try:
        TARGETS[name].run(path)
    except TARGETS[name].allowed:
        return False
    return True


def write_corpus() -> None:
    for name, target in TARGETS.items():
        folder = CORPUS / name
        folder.mkdir(parents=True, exist_ok=True)
        for seed, data in target.seeds().items():
            (folder / seed).write_bytes(data)


if __name__ == "__main__":
    write_corpus()
