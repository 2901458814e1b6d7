"""The random model, its tokenizer and the calibration text, checked without the engine."""

from __future__ import annotations

import hashlib
import math
from importlib import resources
from pathlib import Path

import gguf
import numpy as np
import pytest
from helpers import bpe
from helpers.random_model import make_random_model

DATA = resources.files("imatrix").joinpath("data")


@pytest.fixture(scope="module")
def text() -> str:
    return DATA.joinpath("calibration.txt").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def vocab(text: str) -> bpe.BytePairEncoding:
    return bpe.train(text, 1024, specials=("<|begin|>", "<|endoftext|>", "<|pad|>"))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("random") / "random.gguf"
    make_random_model(path)
    return path


@pytest.fixture(scope="module")
def reader(made: Path) -> gguf.GGUFReader:
    return gguf.GGUFReader(made)


def value(reader: gguf.GGUFReader, key: str) -> object:
    field = reader.get_field(key)
    assert field is not None, key
    return field.contents()


def tensors(path: Path) -> dict[str, gguf.ReaderTensor]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


# --- the text -------------------------------------------------------------------------------


def test_text_is_utf8_with_plain_line_ends() -> None:
    raw = DATA.joinpath("calibration.txt").read_bytes()
    decoded = raw.decode("utf-8")
    assert 45_000 < len(raw) < 80_000
    assert "\r" not in decoded
    assert "\ufffd" not in decoded
    assert not decoded.startswith("\ufeff")
    assert decoded.endswith("\n")


def test_text_does_not_repeat_itself(text: str) -> None:
    long_lines = [line for line in text.splitlines() if len(line) > 60]
    assert len(long_lines) == len(set(long_lines))


@pytest.mark.parametrize(
    "sign",
    [
        "User: ",
        "Assistant: ",
        "def main(",
        "#include <stdio.h>",
        "export class",
        "SELECT ",
        "#!/usr/bin/env bash",
        '{"id": "t1"',
        "healthcheck:",
        "|---",
        "- [ ] ",
        "\\int_0^\\infty",
        "shall not be unreasonably withheld",
        "simmer for",
        "„Man kann nichts beschleunigen“",
        "« Comme d'habitude ? »",
        "¿Y si no llueve?",
        "«Não há pressa»",
        "finché non",
    ],
)
def test_text_has_the_kind(text: str, sign: str) -> None:
    assert sign in text


@pytest.mark.parametrize(
    ("script", "first", "last"),
    [
        ("han", "\u4e00", "\u9fff"),
        ("kana", "\u3040", "\u30ff"),
        ("cyrillic", "\u0400", "\u04ff"),
        ("arabic", "\u0600", "\u06ff"),
    ],
)
def test_text_has_the_script(text: str, script: str, first: str, last: str) -> None:
    assert sum(first <= char <= last for char in text) > 150, script


# --- the tokenizer --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("Hello world", ["Hello", " world"]),
        ("it's we'll I'd", ["it", "'s", " we", "'ll", " I", "'d"]),
        ("IT'S", ["IT", "'", "S"]),
        ("a  b", ["a", " ", " b"]),
        ("a\n\n  b", ["a", "\n\n ", " b"]),
        ("a\nb", ["a", "\n", "b"]),
        ("end  \n", ["end", "  \n"]),
        ("x2 += 10;", ["x", "2", " +=", " 10", ";"]),
        ("½ ² Ⅻ", ["½", " ²", " Ⅻ"]),
        ("日本語、三", ["日本語", "、", "三"]),
        ("'", ["'"]),
        ("", []),
    ],
)
def test_words_are_cut_as_gpt2_cuts_them(line: str, words: list[str]) -> None:
    assert bpe.split_words(line) == words


def test_vocabulary_layout(vocab: bpe.BytePairEncoding) -> None:
    assert len(vocab.tokens) == len(set(vocab.tokens)) == 1024
    assert vocab.tokens[-3:] == ("<|begin|>", "<|endoftext|>", "<|pad|>")
    assert all(len(token) == 1 for token in vocab.tokens[:256])
    known = set(vocab.tokens)
    for left, right in vocab.merges:
        assert {left, right, left + right} <= known
    # GGUF holds a merge as "left right", so a space inside a part would be misread.
    assert not any(char.isspace() for token in vocab.tokens for char in token)


def test_round_trip(vocab: bpe.BytePairEncoding, text: str) -> None:
    ids = vocab.encode(text)
    assert vocab.decode(ids) == text
    assert max(ids) < 1021
    assert len(text.encode()) / len(ids) > 2  # the merges are used


@pytest.mark.parametrize(
    "line", ["", " ", "\t\r\n\0", "naïve café", "🙂 not in 中文 alone", "e\u0301 \u200d \U0010fffd"]
)
def test_round_trip_of_text_never_seen(vocab: bpe.BytePairEncoding, line: str) -> None:
    assert vocab.decode(vocab.encode(line)) == line


def test_decode_leaves_out_specials_and_marks_broken_text(vocab: bpe.BytePairEncoding) -> None:
    assert vocab.decode([1021, *vocab.encode("hello"), 1022]) == "hello"
    assert vocab.decode([0xC3, *vocab.encode("x")]) == "\ufffdx"  # a lone lead byte


def test_merges_apply_in_the_order_learnt() -> None:
    vocab = bpe.train("abab abab cab", 259)
    assert vocab.merges[:2] == (("a", "b"), ("ab", "ab"))
    assert [vocab.tokens[i] for i in vocab.encode("ababab")] == ["abab", "ab"]


def test_training_refuses_what_it_cannot_fill() -> None:
    with pytest.raises(ValueError, match="256 bytes"):
        bpe.train("text", 257, specials=("<a>", "<b>"))
    with pytest.raises(ValueError, match="yields only"):
        bpe.train("ab", 300)
    for specials in [("<a>", "<a>"), ("<a>", "e")]:
        with pytest.raises(ValueError, match="must differ"):
            bpe.train("some text", 260, specials=specials)


# --- the model ------------------------------------------------------------------------------


def test_keys(reader: gguf.GGUFReader) -> None:
    assert value(reader, "general.architecture") == "glm4moe"
    assert value(reader, "general.name") == "random weights"
    assert value(reader, "glm4moe.block_count") == 4
    assert value(reader, "glm4moe.nextn_predict_layers") == 1
    assert value(reader, "glm4moe.leading_dense_block_count") == 1
    assert value(reader, "glm4moe.embedding_length") == 256
    assert value(reader, "glm4moe.expert_count") == 8
    assert value(reader, "glm4moe.expert_used_count") == 2
    assert value(reader, "glm4moe.expert_shared_count") == 1
    assert reader.get_field("glm4moe.rope.dimension_sections") is None


def test_tokenizer_keys(reader: gguf.GGUFReader, vocab: bpe.BytePairEncoding) -> None:
    assert value(reader, "tokenizer.ggml.model") == "gpt2"
    assert value(reader, "tokenizer.ggml.pre") == "gpt-2"
    assert value(reader, "tokenizer.ggml.tokens") == list(vocab.tokens)
    assert value(reader, "tokenizer.ggml.merges") == [" ".join(pair) for pair in vocab.merges]
    assert value(reader, "tokenizer.ggml.bos_token_id") == 1021
    assert value(reader, "tokenizer.ggml.eos_token_id") == 1022
    assert value(reader, "tokenizer.ggml.padding_token_id") == 1023
    assert value(reader, "tokenizer.ggml.add_bos_token") is True
    types = value(reader, "tokenizer.ggml.token_type")
    assert types == [int(gguf.TokenType.NORMAL)] * 1021 + [int(gguf.TokenType.CONTROL)] * 3


def test_tensors(made: Path) -> None:
    shapes = {name: tuple(map(int, tensor.shape)) for name, tensor in tensors(made).items()}
    assert shapes["token_embd.weight"] == shapes["output.weight"] == (256, 1024)
    assert shapes["blk.0.ffn_down.weight"] == (512, 256)
    assert "blk.0.ffn_gate_inp.weight" not in shapes
    for il in (1, 2, 3):
        assert shapes[f"blk.{il}.ffn_gate_exps.weight"] == (256, 256, 8)
        assert shapes[f"blk.{il}.ffn_down_shexp.weight"] == (256, 256)
        assert shapes[f"blk.{il}.ffn_gate_inp.weight"] == (256, 8)
        assert shapes[f"blk.{il}.exp_probs_b.bias"] == (8,)
    assert shapes["blk.3.nextn.eh_proj.weight"] == (512, 256)
    assert sorted(name for name in shapes if "nextn" in name) == [
        "blk.3.nextn.eh_proj.weight",
        "blk.3.nextn.enorm.weight",
        "blk.3.nextn.hnorm.weight",
        "blk.3.nextn.shared_head_norm.weight",
    ]


def test_matmul_weights_take_any_type(made: Path) -> None:
    for name, tensor in tensors(made).items():
        small = "norm" in name or "ffn_gate_inp" in name or name.endswith(".bias")
        expected = gguf.GGMLQuantizationType.F32 if small else gguf.GGMLQuantizationType.F16
        assert tensor.tensor_type == expected, name
        if not small:
            assert tensor.shape[0] % 256 == 0, name


def test_weights_are_finite_and_uneven(made: Path) -> None:
    found = tensors(made)
    for name, tensor in found.items():
        assert np.isfinite(np.asarray(tensor.data, dtype=np.float32)).all(), name
    norm = found["blk.1.attn_norm.weight"].data
    assert norm.min() > 0
    assert norm.max() / norm.min() > 5
    rms = math.sqrt(np.square(found["token_embd.weight"].data, dtype=np.float32).mean())
    assert 0.5 < rms < 2


def test_same_arguments_same_bytes(made: Path, tmp_path: Path) -> None:
    again, other = tmp_path / "again.gguf", tmp_path / "other.gguf"
    make_random_model(str(again))
    make_random_model(other, seed=21)
    digests = [hashlib.sha256(path.read_bytes()).digest() for path in (made, again, other)]
    assert digests[0] == digests[1] != digests[2]


def test_without_the_head(made: Path, tmp_path: Path) -> None:
    path = tmp_path / "trunk.gguf"
    make_random_model(path, mtp=False)
    reader = gguf.GGUFReader(path)
    assert value(reader, "glm4moe.block_count") == 3
    assert reader.get_field("glm4moe.nextn_predict_layers") is None
    whole, trunk = tensors(made), tensors(path)
    assert set(trunk) == {name for name in whole if not name.startswith("blk.3.")}
    for name, tensor in trunk.items():
        assert np.array_equal(tensor.data, whole[name].data), name


def test_with_an_lm_head_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "random.gguf"
    make_random_model(path, shared_head_head=True)
    assert tuple(tensors(path)["blk.3.nextn.shared_head_head.weight"].shape) == (256, 1024)
    with pytest.raises(ValueError, match="mtp=True"):
        make_random_model(path, mtp=False, shared_head_head=True)


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: gguf.GGUFWriter) -> None:
        raise OSError("disk full")

    path = tmp_path / "random.gguf"
    path.write_bytes(b"before")
    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", fail)
    with pytest.raises(OSError, match="disk full"):
        make_random_model(path)
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]
