"""Deterministic mutations: the same generator of random numbers and input give the same output.

There are two layers: bytes, as in any fuzzer, and the pieces of a GGUF file, which reach the code
    behind the checks of its structure.
"""

from __future__ import annotations

import math
import random
import struct
from typing import Any

from ggufs import ARRAY, SCALARS, STRING, TYPES, File, Key, Tensor, parsed, size_of

NUMBERS = (
    0, 1, 2, 3, 4, 7, 8, 31, 32, 33, 63, 64, 127, 128, 255, 256, 257, 511, 512, 513, 1024, 4096,
    65535, 65536, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**60, 2**62, 2**63 - 1, 2**63,
    2**64 - 32, 2**64 - 1, -1, -2, -(2**31), -(2**63),
)  # fmt: skip
FLOATS = (0.0, -0.0, 1.0, -1.0, 1e-45, 1e-5, 1e30, -1e30, math.inf, -math.inf, math.nan)
TEXTS = (
    b"", b" ", b"\n", b"\0", b"a\0b", b"\xff\xfe", b"\xc3", b"\xf0\x9f\x98\x80", b"x" * 64, b"x" * 5000,
    b"../../etc/passwd", b"/dev/zero", b"%s%n", b"llama", b"bert", b"gpt2", b"t5", b"rwkv", b"plamo2",
    b"no_vocab", b"none", b"test", b"gemma4", b"whitespace", b"hybriddna", b"default", b"qwen2",
    b"llama-bpe", b"deepseek-llm", b"gpt-2", b"kimi-k2", b"tekken", b"linear", b"yarn", b"longrope",
    b"glm4moe", b"qwen35", b"qwen35moe", b"qwen3next", b"deepseek2", b"step35", b"mimo2", b"gemma4-assistant",
    b"mamba", b"rwkv6", b"t5encoder", b"clip", b"imatrix", b"imatrix-checkpoint", b"model", b"<0x0A>",
    b"<0xZZ>", b"\xe2\x96\x81", b"<s>", b"</s>", b"<unk>",
)  # fmt: skip


def mutated_bytes(data: bytes, rng: random.Random, dictionary: list[bytes], limit: int) -> bytes:
    """One to eight changes to bytes, most of them in the first `limit` bytes."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 4, 8))):
        at = (
            rng.randrange(min(len(out), limit) + 1)
            if rng.random() < 0.9
            else rng.randrange(len(out) + 1)
        )
        match rng.randrange(9):
            case 0 if at < len(out):
                out[at] ^= 1 << rng.randrange(8)
            case 1 if at < len(out):
                out[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
            case 2:
                out[at : at + 8] = _number(rng).to_bytes(8, "little")
            case 3:
                out[at : at + 4] = (_number(rng) & 0xFFFFFFFF).to_bytes(4, "little")
            case 4:
                del out[at : at + rng.choice((1, 4, 8, 64, 1024))]
            case 5:
                out[at:at] = bytes(rng.randrange(256) for _ in range(rng.choice((1, 4, 8))))
            case 6:
                del out[at:]
            case 7 if dictionary:
                word = rng.choice(dictionary)
                out[at : at + (len(word) if rng.random() < 0.5 else 0)] = word
            case _:
                start = rng.randrange(len(out) + 1)
                out[at:at] = out[start : start + rng.choice((4, 16, 64))]
    return bytes(out)


def mutated_gguf(data: bytes, rng: random.Random) -> bytes:
    """One to four changes to the pieces of a GGUF file."""
    file = parsed(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 4))):
        change = rng.random()
        if change < 0.55 and file.keys:
            _change_key(file, rng)
        elif change < 0.65:
            _change_keys(file, rng)
        elif change < 0.95 and file.tensors:
            _change_tensor(file, rng)
        else:
            _change_frame(file, rng)
    packed = file.packed()
    if rng.random() < 0.03:
        packed = packed[: rng.randrange(len(packed) + 1)]
    return packed


def _number(rng: random.Random) -> int:
    return rng.choice(NUMBERS) & (2**64 - 1)


def _value(kind: int, old: Any, rng: random.Random) -> Any:
    if kind == STRING:
        if isinstance(old, bytes) and old and rng.random() < 0.3:
            at = rng.randrange(len(old))
            return old[:at] + rng.choice((b"", b"\0", b" ", b"\xff", b"zz")) + old[at + 1 :]
        return rng.choice(TEXTS)
    if kind in (6, 12):
        if rng.random() < 0.2 and isinstance(old, (int, float)) and math.isfinite(old):
            return _bounded(-old if rng.random() < 0.5 else old * rng.choice((0.5, 2.0, 1000.0)))
        return rng.choice(FLOATS)
    if isinstance(old, int) and rng.random() < 0.4:
        return (
            old + rng.choice((-2, -1, 1, 2))
            if rng.random() < 0.6
            else rng.choice((old * 2, old // 2, -old, old * 3))
        )
    return rng.choice(NUMBERS)


def _bounded(value: float) -> float:
    return max(-3e38, min(3e38, value))


def _change_key(file: File, rng: random.Random) -> None:
    key = rng.choice(file.keys)
    if isinstance(key.value, list):
        values = key.value
        match rng.randrange(8):
            case 0 | 1 | 2 if values:
                for _ in range(rng.choice((1, 1, 2, 5))):
                    at = rng.randrange(len(values))
                    values[at] = _value(key.kind, values[at], rng)
            case 3 if values:
                at, other = rng.randrange(len(values)), rng.randrange(len(values))
                values[at] = values[other]
            case 4:
                del values[rng.randrange(len(values) + 1) :]
            case 5:
                values += [values[-1] if values else _value(key.kind, None, rng)] * rng.choice(
                    (1, 2, 100)
                )
            case 6:
                _retype(key, rng)
            case _:
                key.value = values[0] if values else _value(key.kind, None, rng)
    elif rng.random() < 0.8:
        key.value = _value(key.kind, key.value, rng)
    elif rng.random() < 0.5:
        _retype(key, rng)
    else:
        key.value = [key.value] * rng.choice((0, 1, 2, 3, 4, 64))


def _retype(key: Key, rng: random.Random) -> None:
    kind = rng.choice([*SCALARS, STRING])

    def cast(value: Any) -> Any:
        if kind == STRING:
            return value if isinstance(value, bytes) else str(value).encode()
        if isinstance(value, bytes):
            return rng.choice(NUMBERS)
        finite = math.isfinite(value)
        if kind in (6, 12):
            return _bounded(float(value)) if finite else value
        return int(value) if finite else 0

    key.value = [cast(v) for v in key.value] if isinstance(key.value, list) else cast(key.value)
    key.kind = kind


def _change_keys(file: File, rng: random.Random) -> None:
    at = rng.randrange(len(file.keys) + 1)
    match rng.randrange(4):
        case 0 | 1 if at < len(file.keys):
            del file.keys[at]
        case 2 if at < len(file.keys):
            old = file.keys[at]
            file.keys.append(Key(old.name, old.kind, old.value))
        case _:
            if file.keys:
                key = rng.choice(file.keys)
                key.name = rng.choice(
                    (rng.choice(file.keys).name, key.name[:-1], key.name + b"\0", *TEXTS[:6])
                )


def _change_tensor(file: File, rng: random.Random) -> None:
    at = rng.randrange(len(file.tensors))
    tensor = file.tensors[at]
    match rng.randrange(12):
        case 0 | 1:
            del file.tensors[at]
        case 2:
            other = rng.choice(file.tensors)
            tensor.name, other.name = other.name, tensor.name
        case 3:
            tensor.name = rng.choice(
                (rng.choice(file.tensors).name, tensor.name + b"\0x", tensor.name + b"x" * 64, b"")
            )
        case 4 | 5 | 6:
            _reshape(tensor, rng)
        case 7:
            tensor.kind = rng.choice((*TYPES, 3, 4, 5, 39, 40, 41, 200, 2**31, 2**32 - 1))
            _refill(tensor)
        case 8:
            tensor.offset = rng.choice((*NUMBERS, 32, 64, len(tensor.data)))
        case 9:
            fill = rng.choice(
                (
                    b"\0",
                    b"\xff",
                    struct.pack("<f", math.nan),
                    struct.pack("<f", math.inf),
                    struct.pack("<f", 3e38),
                    struct.pack("<f", 1e-45),
                    struct.pack("<i", 1000),
                )
            )
            tensor.data = (fill * len(tensor.data))[: len(tensor.data)]
        case 10:
            file.tensors.append(
                Tensor(tensor.name + b"2", list(tensor.dims), tensor.kind, tensor.data)
            )
        case _:
            tensor.data = tensor.data[: len(tensor.data) // 2]


def _reshape(tensor: Tensor, rng: random.Random) -> None:
    dims = tensor.dims
    match rng.randrange(6):
        case 0 | 1 if dims:
            at = rng.randrange(len(dims))
            dims[at] = rng.choice(
                (0, 1, dims[at] - 1, dims[at] + 1, dims[at] * 2, dims[at] // 2, rng.choice(NUMBERS))
            )
        case 2 if dims:
            del dims[rng.randrange(len(dims))]
        case 3:
            dims.append(rng.choice((0, 1, 2, 3)))
        case 4:
            dims.reverse()
        case _:
            dims += [1] * 5
    if rng.random() < 0.8:
        _refill(tensor)


def _refill(tensor: Tensor) -> None:
    """As many bytes as the new shape and type need, if that is a reasonable number."""
    if (
        all(0 <= dim < 2**32 for dim in tensor.dims)
        and (size := size_of(tensor.dims, tensor.kind)) < 2**23
    ):
        data = tensor.data or b"\0"
        tensor.data = (data * (size // len(data) + 1))[:size]


def _change_frame(file: File, rng: random.Random) -> None:
    match rng.randrange(6):
        case 0:
            file.version = rng.choice((0, 1, 2, 4, 3 << 24, 2**32 - 1))
        case 1:
            file.n_keys = rng.choice(NUMBERS) & (2**64 - 1)
        case 2:
            file.n_tensors = rng.choice(NUMBERS) & (2**64 - 1)
        case 3:
            rng.shuffle(file.tensors)
        case 4:
            rng.shuffle(file.keys)
        case _:
            alignment = rng.choice((0, 1, 2, 8, 16, 33, 64, 4096, 2**31, 2**32 - 1))
            file.keys.append(
                Key(
                    b"general.alignment",
                    rng.choice((4, 4, 4, 10, STRING)),
                    b"x" if alignment == 33 else alignment,
                )
            )
            last = file.keys[-1]
            if last.kind == STRING:
                last.value = b"32"
            elif isinstance(last.value, bytes):
                last.value = 33
            if rng.random() < 0.7 and 0 < alignment <= 4096:
                file.alignment = alignment


__all__ = ["ARRAY", "FLOATS", "NUMBERS", "TEXTS", "mutated_bytes", "mutated_gguf"]
