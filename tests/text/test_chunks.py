"""Chunks compared with slices worked out by hand; the tokenizer here makes one token per
character."""

from __future__ import annotations

import io
import itertools
import tracemalloc
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from helpers.characters import BOS, Characters
from hypothesis import given
from hypothesis import strategies as st

from imatrix.text.chunks import chunks


@dataclass
class SmallVocabulary(Characters):
    n_vocab: int = 100


def spelled(pieces: Iterator[np.ndarray]) -> list[str]:
    """The chunks as text; BOS is shown as ^."""
    return ["".join("^" if t == BOS else chr(t) for t in piece) for piece in pieces]


class TestCutting:
    def test_tail_is_dropped(self) -> None:
        assert spelled(chunks("abcdefgh", Characters(), 3)) == ["abc", "def"]
        assert spelled(chunks("abcdef", Characters(), 3)) == ["abc", "def"]

    def test_bos_replaces_the_first_token_of_every_chunk(self) -> None:
        # The stream is ^abcdefgh; in the second and third chunk c and f give way.
        assert spelled(chunks("abcdefgh", Characters(add_bos=True), 3)) == ["^ab", "^de", "^gh"]

    def test_types(self) -> None:
        for chunk in chunks("abcdef", Characters(), 2):
            assert chunk.dtype == np.int32
            assert chunk.shape == (2,)

    def test_chunks_do_not_share_memory(self) -> None:
        first, second = chunks("abcd", Characters(), 2)
        first[:] = 0
        assert second.tolist() == [ord("c"), ord("d")]

    def test_a_short_stream_is_one_short_chunk(self) -> None:
        assert spelled(chunks("ab", Characters(), 512)) == ["ab"]
        assert spelled(chunks("a", Characters(add_bos=True), 512)) == ["^a"]
        assert spelled(chunks([[7, 98]], Characters(add_bos=True), 512)) == ["^b"]

    def test_skip_and_max(self) -> None:
        text = "aabbccddee"
        assert spelled(chunks(text, Characters(), 2, skip_chunks=2)) == ["cc", "dd", "ee"]
        assert spelled(chunks(text, Characters(), 2, max_chunks=2)) == ["aa", "bb"]
        assert spelled(chunks(text, Characters(), 2, skip_chunks=1, max_chunks=2)) == ["bb", "cc"]
        assert spelled(chunks(text, Characters(), 2, skip_chunks=4)) == ["ee"]
        assert spelled(chunks(text, Characters(), 2, max_chunks=99)) == [
            "aa",
            "bb",
            "cc",
            "dd",
            "ee",
        ]

    @given(
        lengths=st.lists(st.integers(0, 9), max_size=12),
        n_ctx=st.integers(2, 7),
        add_bos=st.booleans(),
        skip=st.integers(0, 3),
        limit=st.none() | st.integers(1, 4),
    )
    def test_any_partition_of_a_stream_gives_the_same_chunks(
        self, lengths: list[int], n_ctx: int, add_bos: bool, skip: int, limit: int | None
    ) -> None:
        stream = list(range(10, 10 + sum(lengths)))
        ends = list(itertools.accumulate(lengths, initial=0))
        lists = [stream[a:b] for a, b in itertools.pairwise(ends)]
        # The reference is plain slices of the whole stream.
        starts = range(0, len(stream) - n_ctx + 1, n_ctx)
        expected = [stream[i : i + n_ctx] for i in starts][skip:][:limit]
        if not starts and skip == 0:
            expected = [stream]
        if add_bos:
            expected = [[BOS, *chunk[1:]] for chunk in expected]
        result = chunks(
            lists, Characters(add_bos=add_bos), n_ctx, skip_chunks=skip, max_chunks=limit
        )
        if len(stream) < 2 or not expected:
            with pytest.raises(ValueError, match=r"no tokens|1 token only|nothing is left"):
                list(result)
        else:
            assert [chunk.tolist() for chunk in result] == expected


class TestSources:
    def test_str_is_one_text(self) -> None:
        tokenizer = Characters()
        list(chunks("abc", tokenizer, 2, parse_special=True))
        assert tokenizer.calls == [("abc", True, True)]

    def test_texts_are_one_stream_with_one_bos(self) -> None:
        tokenizer = Characters(add_bos=True)
        # The stream is ^abcde; c gives way to the BOS of the second chunk.
        assert spelled(chunks(["ab", "cd", "e"], tokenizer, 3)) == ["^ab", "^de"]
        # the empty text shows what a text ends with, which is nothing here
        assert [call for call in tokenizer.calls if call[0]] == [
            ("ab", True, False),
            ("cd", False, False),
            ("e", False, False),
        ]

    def test_empty_texts_do_not_take_the_special_tokens(self) -> None:
        tokenizer = Characters(add_bos=True)
        assert spelled(chunks(["", "ab", ""], tokenizer, 3)) == ["^ab"]
        assert tokenizer.calls == [("ab", True, False)]

    def test_path(self, tmp_path: Path) -> None:
        path = tmp_path / "a.txt"
        path.write_bytes("ä\r\nb\n\n".encode())
        # One newline at the end is dropped, as llama-imatrix -f does; nothing else is changed.
        assert spelled(chunks(path, Characters(), 5)) == ["ä\r\nb\n"]

    def test_open_files(self, tmp_path: Path) -> None:
        path = tmp_path / "a.txt"
        path.write_bytes("äbcd\n".encode())
        with path.open(encoding="utf-8") as file:
            assert spelled(chunks(file, Characters(), 4)) == ["äbcd"]
        with path.open("rb") as file:
            assert spelled(chunks(file, Characters(), 4)) == ["äbcd"]
        assert spelled(chunks(io.StringIO("abcd"), Characters(), 2)) == ["ab", "cd"]

    def test_invalid_utf8_tells_the_offset(self, tmp_path: Path) -> None:
        path = tmp_path / "latin.txt"
        path.write_bytes(b"caf\xe9 au lait")
        told = r"latin\.txt: not utf-8 text: byte 0xe9 at offset 3"
        with path.open(encoding="utf-8") as text, path.open("rb") as binary:
            for source in (path, text, binary):
                with pytest.raises(ValueError, match=told):
                    list(chunks(source, Characters(), 2))

    def test_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError):
            list(chunks(tmp_path / "none.txt", Characters(), 2))

    @pytest.mark.parametrize(
        "lists",
        [
            [[97, 98, 99], [100]],
            [(97, 98), (99, 100)],
            [np.array([97, 98], dtype=np.int64), np.array([99, 100], dtype=np.uint8)],
            [array("i", [97, 98, 99, 100])],
            [[], [97, 98, 99, 100]],
            [range(97, 101)],
            np.array([[97, 98], [99, 100]]),
            iter([[97, 98, 99, 100]]),
        ],
    )
    def test_token_lists(self, lists: list[list[int]]) -> None:
        assert spelled(chunks(lists, Characters(), 2)) == ["ab", "cd"]

    def test_callers_arrays_stay(self) -> None:
        tokens = np.array([5, 6, 7, 8], dtype=np.int32)
        assert [c.tolist() for c in chunks([tokens], Characters(add_bos=True), 2)] == [
            [BOS, 6],
            [BOS, 8],
        ]
        assert tokens.tolist() == [5, 6, 7, 8]


class TestLaziness:
    def test_takes_no_item_that_no_chunk_needs(self) -> None:
        taken = []

        def texts() -> Iterator[str]:
            for n in itertools.count():
                taken.append(n)
                yield "ab"

        stream = chunks(texts(), Characters(), 4, max_chunks=2)
        assert taken == []
        next(stream)
        assert taken == [0, 1]
        assert len(list(stream)) == 1
        assert taken == [0, 1, 2, 3]

    def test_a_long_iterable_is_not_held(self) -> None:
        tokens = np.full(1000, 42, dtype=np.int32)
        tracemalloc.start()
        try:
            count = sum(1 for _ in chunks(itertools.repeat(tokens, 5000), Characters(), 500))
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert count == 10_000
        # The stream is 20 MB; a few chunks of 2 kB each and what the interpreter needs are far
        # below a hundredth of it.
        assert peak < 200_000


class TestErrors:
    @pytest.mark.parametrize("texts", ["", [], ["", ""], [[]], io.StringIO("\n")])
    def test_no_tokens(self, texts: str) -> None:
        with pytest.raises(ValueError, match="no tokens"):
            list(chunks(texts, Characters(add_bos=True), 4))

    def test_one_token(self) -> None:
        with pytest.raises(ValueError, match="1 token only; a chunk needs at least 2"):
            list(chunks("a", Characters(), 4))

    def test_skipping_everything(self) -> None:
        with pytest.raises(
            ValueError, match=r"skipping 3 chunks of 2 tokens \(6 tokens\): the texts make 7 tokens"
        ):
            list(chunks("abcdefg", Characters(), 2, skip_chunks=3))
        with pytest.raises(ValueError, match="the texts make 3 tokens, 0 full chunks"):
            list(chunks("abc", Characters(), 4, skip_chunks=1))

    def test_bad_numbers_are_refused_at_the_call(self) -> None:
        with pytest.raises(ValueError, match="n_ctx must be 2 or more, got 1"):
            chunks("ab", Characters(), 1)
        with pytest.raises(ValueError, match="skip_chunks must be 0 or more, got -1"):
            chunks("ab", Characters(), 2, skip_chunks=-1)
        with pytest.raises(ValueError, match="max_chunks must be 1 or more, or None for all, got"):
            chunks("ab", Characters(), 2, max_chunks=0)
        with pytest.raises(ValueError, match=r"asks for a BOS token .* names none"):
            chunks("ab", Characters(add_bos=True, bos=-1), 2)

    @pytest.mark.parametrize(
        ("texts", "told"),
        [
            (b"abc", "texts is bytes; decode it first"),
            (bytearray(b"abc"), "texts is bytearray; decode it first"),
            ([b"abc"], r"texts\[0\] is bytes; decode it first"),
            (["ab", b"abc"], r"texts\[1\] is bytes, the items before it are str"),
            (["ab", [1, 2]], r"texts\[1\] is list, the items before it are str"),
            ([[1, 2], "ab"], r"texts\[1\] is str, the items before it are token lists"),
            ([[1, 2], None], r"texts\[1\] is NoneType, expected a str or a list"),
            ([1, 2, 3], r"texts\[0\] is int, .*; wrap the ids in a list"),
            (np.array([1, 2, 3]), r"texts\[0\] is int64, .*; wrap the ids in a list"),
            ([[1.5, 2.0]], r"texts\[0\]: expected a flat list of int token ids"),
            ([[True, False]], r"texts\[0\]: expected a flat list of int token ids"),
            ([[[1], [2]]], r"texts\[0\]: expected a flat list of int token ids"),
            ([[[1], [2, 3]]], r"texts\[0\]: expected a flat list of int token ids"),
            ([["a"]], r"texts\[0\]: expected a flat list of int token ids"),
            ({"a": 1}, "an iterable of str or of token lists, not dict"),
            (5, "an iterable of str or of token lists, not int"),
            (None, "an iterable of str or of token lists, not NoneType"),
        ],
    )
    def test_wrong_types(self, texts: str, told: str) -> None:
        with pytest.raises(TypeError, match=told):
            list(chunks(texts, Characters(), 2))

    @pytest.mark.parametrize("token", [-1, 100, 2**40])
    def test_token_out_of_range(self, token: int) -> None:
        with pytest.raises(
            ValueError, match=rf"texts\[1\]\[2\]: token id {token} is out of range; .* 0 to 99"
        ):
            list(chunks([[1, 2], [3, 99, token]], SmallVocabulary(), 4))

    def test_token_beyond_int32_without_a_vocabulary_size(self) -> None:
        with pytest.raises(ValueError, match="token id 2147483648 is out of range"):
            list(chunks([[1, 2**31]], Characters(), 2))
        with pytest.raises(ValueError, match="token id -5 is out of range"):
            list(chunks([np.array([1, -5], dtype=np.int8)], Characters(), 2))

    def test_a_file_that_reads_neither_text_nor_bytes(self) -> None:
        class Odd:
            def read(self) -> None:
                return None

        with pytest.raises(TypeError, match=r"read\(\) gave NoneType, expected str or bytes"):
            list(chunks(Odd(), Characters(), 2))  # type: ignore[arg-type]
