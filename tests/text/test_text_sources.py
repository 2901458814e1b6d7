"""Sources of text compared with files written by the formats' own libraries; mixtures compared with
counts."""

from __future__ import annotations

import gzip
import io
import itertools
import json
import random
import socket
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import zstandard
from helpers.characters import BOS, Characters
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from imatrix import Chat, Mixture, Source
from imatrix.text.chunks import Chunks, chunks
from imatrix.text.inputs import Texts

RECORDS: list[dict[str, Any]] = [{"text": "first"}, {"text": "zweité\n"}, {"text": "third"}]
TEXTS = [record["text"] for record in RECORDS]
MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]


def lines(records: list[Any]) -> bytes:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


def cut(texts: Texts, n_ctx: int, **options: Any) -> list[str]:
    """The chunks as text; BOS is shown as ^, a chat as its first message's words."""
    tokenizer = options.pop("tokenizer", Characters())
    found = Chunks(
        texts, tokenizer, n_ctx, render=lambda chat: chat.messages[0]["content"], **options
    )
    return ["".join("^" if t == BOS else chr(t) for t in chunk.tokens) for chunk in found]


# --- formats -------------------------------------------------------------------------------------


def test_the_formats(tmp_path: Path) -> None:
    content = lines(RECORDS)
    # two frames in one file, as appending makes it; and one frame without its length
    frames = zstandard.compress(content[:30]) + zstandard.ZstdCompressor().compress(content[30:])
    written = {
        "a.jsonl": content,
        "b.ndjson": b"\n" + content.replace(b"\n", b"\r\n"),
        "c.jsonl.gz": gzip.compress(content[:20]) + gzip.compress(content[20:]),
        "d.jsonl.zst": frames,
    }
    for name, data in written.items():
        (tmp_path / name).write_bytes(data)
        assert list(Source(tmp_path / name).documents()) == TEXTS, name
    parquet.write_table(pa.Table.from_pylist(RECORDS), tmp_path / "e.parquet", row_group_size=2)
    assert list(Source(str(tmp_path / "e.parquet")).documents()) == TEXTS
    (tmp_path / "f.txt.gz").write_bytes(gzip.compress(b"a\nb\n\n"))
    assert list(Source(tmp_path / "f.txt.gz").documents()) == ["a\nb\n"]
    # whatever the name suggests
    (tmp_path / "g.data").write_bytes(content)
    assert list(Source(f"jsonl:{tmp_path / 'g.data'}").documents()) == TEXTS
    assert list(Source(tmp_path / "g.data").documents()) == [content.decode().removesuffix("\n")]
    assert list(Source(f"text:{tmp_path / 'a.jsonl'}").documents()) == [
        content.decode().removesuffix("\n")
    ]


def test_records(tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        lines(
            [
                "a string",
                {"text": "t", "messages": None},
                {"text": "t", "messages": MESSAGES},
                {"messages": MESSAGES, "tools": tools, "system": "be brief"},
                {"messages": MESSAGES, "tools": json.dumps(tools), "documents": [{"text": "d"}]},
                {"messages": [{"role": "system", "content": "s"}], "system": "not this one"},
                {"messages": MESSAGES, "tools": [], "chat_template_kwargs": {"x": 1}},
            ]
        )
    )
    system = {"role": "system", "content": "be brief"}
    assert list(Source(path).documents()) == [
        "a string",
        "t",
        Chat(MESSAGES),
        Chat([system, *MESSAGES], tools),
        Chat(MESSAGES, tools, {"documents": [{"text": "d"}]}),
        Chat([{"role": "system", "content": "s"}]),
        Chat(MESSAGES, None, {"x": 1}),
    ]
    # Parquet gives every message every field, as null if the message has none
    rows = [{"messages": [*MESSAGES, {"role": "tool", "name": "f"}], "other": 1}]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "b.parquet")
    (chat,) = Source(tmp_path / "b.parquet").documents()
    assert isinstance(chat, Chat)
    assert chat.messages == [*MESSAGES, {"role": "tool", "name": "f"}]
    # a field given by name, or the first of several
    path.write_bytes(lines([{"code": "c", "text": "t"}, {"prose": "p"}]))
    assert list(Source(path, fields=("code", "prose")).documents()) == ["c", "p"]


def test_a_folder(tmp_path: Path) -> None:
    for name, data in {
        "b.txt": b"three\n",
        "a/z.jsonl": lines(["one"]),
        "a/.hidden.txt": b"no",
        ".git/x.txt": b"no",
        "a-b/x.md": b"two",
        "c.bin": b"\xff",
        "d.txt.gz": gzip.compress(b"four"),
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    assert list(Source(tmp_path).documents()) == ["one", "two", "three", "four"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        ValueError, match=r"empty: no file to read in this folder; looked for \.txt"
    ):
        Source(tmp_path / "empty").check()


def test_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"one\ntwo\n")))
    assert list(Source("-").documents()) == ["one\ntwo"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines(RECORDS))))
    assert list(Source("jsonl:-").documents()) == TEXTS
    with pytest.raises(ValueError, match="Parquet cannot be read from standard input"):
        Source("parquet:-").check()


def test_a_dataset_from_a_local_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a folder needs no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/train.jsonl").write_bytes(lines(RECORDS))
    (tmp_path / "data/test.jsonl").write_bytes(lines([{"text": "held out"}]))
    assert list(Source(f"hf:{tmp_path / 'data'}").documents()) == TEXTS
    assert list(Source(f"hf:{tmp_path / 'data'}:/test").documents()) == ["held out"]
    with pytest.raises(ValueError, match=r"hf:.*data:/none: .*none"):
        list(Source(f"hf:{tmp_path / 'data'}:/none").documents())


@pytest.mark.parametrize(
    ("spelled", "parts"),
    [
        ("hf:user/data", ("user/data", None, "train")),
        ("hf:user/data/test", ("user/data", None, "test")),
        ("hf:user/data:config", ("user/data", "config", "train")),
        ("hf:wikitext:wikitext-2-raw-v1/test", ("wikitext", "wikitext-2-raw-v1", "test")),
        ("hf:wikitext:/test", ("wikitext", None, "test")),
        ("hf:/a/b:c/d", ("/a/b", "c", "d")),
        ("hf:./a/b/c", ("./a/b/c", None, "train")),
    ],
)
def test_names_of_datasets(spelled: str, parts: tuple[str, ...]) -> None:
    from imatrix.text.readers import dataset_of

    assert dataset_of(Source(spelled).at) == parts
    assert dataset_of(Source.parse(f"{spelled}:0.5").at) == parts


def test_weights_on_the_command_line(tmp_path: Path) -> None:
    odd = tmp_path / "chapter:2"
    odd.write_text("x")
    for spelled, at, weight in (
        ("a.txt", "a.txt", None),
        ("a.txt:0.3", "a.txt", 0.3),
        ("a.txt:3", "a.txt", 3.0),
        ("a:b.txt:.5", "a:b.txt", 0.5),
        (r"C:\data\a.txt:1", r"C:\data\a.txt", 1.0),
        (r"C:\data\a.txt", r"C:\data\a.txt", None),
        ("jsonl:-:2", "-", 2.0),
        (str(odd), str(odd), None),
        (f"{odd}:0.25", str(odd), 0.25),
    ):
        source = Source.parse(spelled)
        assert (source.at, source.weight) == (at, weight), spelled
    with pytest.raises(ValueError, match=r"a\.txt:0: a weight must be a positive number, got 0"):
        Source.parse("a.txt:0")
    with pytest.raises(ValueError, match="expected hf:NAME"):
        Source.parse("hf:a/b/c/d")


@pytest.mark.parametrize(
    ("name", "data", "told"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', r"a\.jsonl, line 2: not JSON: Expecting value"),
        ("a.jsonl", b'\n{"text": "\xe9"}\n', r"a\.jsonl, line 2: not utf-8 text: byte 0xe9"),
        ("a.jsonl", b"[1]\n", r"line 1: expected a JSON object or string, found list"),
        ("a.jsonl", b'{"body": "x"}\n', r"or 'conversation' or 'text'; it has 'body'.*--text-f"),
        ("a.jsonl", b'{"text": 5}\n', r"field 'text' must be a text, or a list of messages, fou"),
        ("a.jsonl", b'{"text": [1]}\n', r"found list of int"),
        ("a.jsonl", b'{"messages": [{}], "tools": "{"}\n', r"field 'tools' is not JSON"),
        ("a.jsonl", b'{"messages": [{}], "tools": {}}\n', r"field 'tools' must be a list, found d"),
        ("a.jsonl", b"[" * 100_000, r"line 1: (nested too deeply|not JSON)"),
        # without the time of day, which would get into the test's name: all processes must have the
        # same name
        ("a.txt.gz", gzip.compress(b"x" * 99, mtime=0)[:-9], r"a\.txt\.gz: damaged or cut short"),
        ("a.txt.gz", b"plain", r"a\.txt\.gz: damaged or cut short: Not a gzipped file"),
        ("a.txt.zst", zstandard.compress(b"x" * 99)[:-1], r"ends within a Zstandard frame"),
        ("a.txt.zst", b"plain text", r"a\.txt\.zst: damaged or cut short"),
        ("a.parquet", b"PAR1 not", r"a\.parquet: not a Parquet file"),
        ("a.parquet.gz", b"", r"Parquet has compression of its own; unpack the file"),
    ],
)
def test_what_cannot_be_read(tmp_path: Path, name: str, data: bytes, told: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=told):
        list(Source(tmp_path / name).documents())


def test_a_parquet_file_without_the_field(tmp_path: Path) -> None:
    parquet.write_table(pa.table({"body": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet: no field 'messages' .*; it has 'bo"):
        list(Source(tmp_path / "a.parquet").documents())


@pytest.mark.parametrize(
    ("module", "name", "extra"),
    [
        ("pyarrow", "a.parquet", "parquet"),
        ("zstandard", "a.txt.zst", "zstd"),
        ("datasets", "hf:a/b", "datasets"),
    ],
)
def test_a_library_that_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, name: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # this makes an import fail
    (tmp_path / "a.parquet").write_bytes(b"")
    (tmp_path / "a.txt.zst").write_bytes(b"")
    source = Source(name if name.startswith("hf:") else str(tmp_path / name))
    with pytest.raises(ImportError, match=rf"pip install 'imatrix\[{extra}\]'"):
        source.check()


# --- mixtures ------------------------------------------------------------------------------------


def test_sources_without_weights_are_one_stream() -> None:
    mixture = Mixture([["ab", "cd"], Source(["ef", "g"], name="second")])
    assert cut(mixture, 3) == ["abc", "def"]
    assert cut(mixture, 3) == ["abc", "def"]  # once more
    assert cut(mixture, 3, tokenizer=Characters(add_bos=True)) == ["^ab", "^de"]
    found = Chunks(mixture, Characters(), 3)
    assert [(chunk.parts, chunk.start) for chunk in found] == [
        (((0, 3),), 0),
        (((0, 1), (1, 2)), 3),
    ]
    assert [(t.documents, t.tokens, t.dropped) for t in found.tallies] == [(2, 4, 0), (2, 3, 1)]


def test_a_file_as_a_source_is_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("Grüße\n\nund so weiter\n".encode())
    tokenizer = Characters(add_bos=True)
    for texts in (path, Source(path), Mixture([path]), Mixture([Source(path, weight=2)])):
        assert [c.tolist() for c in chunks(texts, tokenizer, 4)] == [
            c.tolist() for c in chunks(path.read_text()[:-1], tokenizer, 4)
        ]


@given(
    lengths=st.lists(st.lists(st.integers(2, 30), min_size=1, max_size=8), min_size=2, max_size=4),
    weights=st.lists(st.sampled_from([0.1, 0.3, 0.5, 1.0, 2.0]), min_size=4, max_size=4),
    packing=st.sampled_from(["stream", "document"]),
    seed=st.none() | st.integers(0, 5),
)
def test_every_beginning_of_a_mixture_has_the_shares(
    lengths: list[list[int]], weights: list[float], packing: Any, seed: int | None
) -> None:
    n_ctx = 8
    letters = "abcd"
    sources = [
        Source([letter * n for n in each], weight=weight)
        for letter, each, weight in zip(letters, lengths, weights, strict=False)
    ]
    shares = np.array([source.weight for source in sources])
    shares /= shares.sum()
    found = Chunks(Mixture(sources, seed=seed), Characters(), n_ctx, packing=packing)
    tokens = np.zeros(len(sources))
    for chunk in found:
        (source, n), *more = chunk.parts
        assert not more
        assert set(chunk.tokens) == {ord(letters[source])}
        tokens[source] += n
        # a source gets a chunk only if it is the furthest behind, so that none is ahead of its
        # share by more than that chunk
        assert (tokens - shares * tokens.sum() <= n_ctx).all()
    assert found.ended is not None
    # the text ends at the end of a source, and not before
    used = tokens[found.ended] + found.tallies[found.ended].dropped
    assert used == sum(lengths[found.ended])


@given(
    documents=st.lists(st.text("abcdef", min_size=1, max_size=4), min_size=1, max_size=30),
    seed=st.integers(0, 2**63 - 1),
)
def test_a_shuffle_is_a_permutation_and_the_seed_decides_it(
    documents: list[str], seed: int
) -> None:
    def order(seed: int) -> list[Any]:
        (stream,) = Mixture([documents[::2], documents[1::2]], seed=seed).streams()
        return [item for _, item in stream]

    assert sorted(order(seed)) == sorted(documents)
    assert order(seed) == order(seed)


def test_a_shuffle_is_one_draw_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Worked out from the rule, with the random numbers that Python promises to keep."""
    from imatrix.text import shuffling

    monkeypatch.setattr(shuffling, "_HELD_DOCUMENTS", 3)
    rng = random.Random("7/")
    assert [rng.random() for _ in range(2)] == [0.775599518470933, 0.46352469513118444]
    rng = random.Random("7/")
    left = list("abcdefgh")
    held: list[str] = []
    expected = []
    while left or held:
        while left and len(held) < 3:
            held.append(left.pop(0))
        index = int(rng.random() * len(held))
        held[index], held[-1] = held[-1], held[index]
        expected.append(held.pop())
    (stream,) = Mixture([list("abcdefgh")], seed=7).streams()
    assert [item for _, item in stream] == expected
    assert expected != list("abcdefgh")
    # a document larger than the whole buffer passes through by itself
    monkeypatch.setattr(shuffling, "_HELD_CHARACTERS", 2)
    (stream,) = Mixture([["aaa", "bbb", "ccc"]], seed=7).streams()
    assert [item for _, item in stream] == ["aaa", "bbb", "ccc"]


def test_a_shuffle_takes_files_in_random_order(tmp_path: Path) -> None:
    for n in range(20):
        (tmp_path / f"{n:02d}.txt").write_text(f"{n:02d}")
    orders = {
        tuple(item for _, item in Mixture([tmp_path], seed=seed).streams()[0]) for seed in range(3)
    }
    assert len(orders) == 3
    assert {tuple(sorted(order)) for order in orders} == {tuple(f"{n:02d}" for n in range(20))}


def test_mixtures_that_make_no_sense() -> None:
    with pytest.raises(ValueError, match="one source at least"):
        Mixture([])
    with pytest.raises(ValueError, match=r"b has no weight and a has one; give every source a we"):
        Mixture([Source("a", weight=1), Source("b")])
    with pytest.raises(ValueError, match=r"seed must be in \[0, 2\^63\), got -1"):
        Mixture(["a"], seed=-1)
    with pytest.raises(ValueError, match="thin: no tokens to take a share of"):
        cut(Mixture([Source(["ab"] * 9, weight=1), Source([""], weight=1, name="thin")]), 2)
    with pytest.raises(TypeError, match="a source is a path, a name, or an iterable of documents"):
        Source(5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="an open file has no documents to tell apart; give its p"):
        Source(io.StringIO("x"))
    with pytest.raises(TypeError, match=r"documents\[0\] is float"):
        cut(Mixture([[1.5]]), 2)


# --- packing by documents ------------------------------------------------------------------------


@given(
    lengths=st.lists(st.integers(0, 20), min_size=1, max_size=8),
    n_ctx=st.integers(2, 7),
    add_bos=st.booleans(),
)
def test_no_chunk_has_two_documents_and_nothing_is_lost(
    lengths: list[int], n_ctx: int, add_bos: bool
) -> None:
    documents = [[100 * number + i for i in range(n)] for number, n in enumerate(lengths, start=1)]
    tokenizer = Characters(add_bos=add_bos)
    found = Chunks(documents, tokenizer, n_ctx, packing="document")
    # the reference is the pieces of each document, as long as a BOS in front leaves room
    room = n_ctx - add_bos
    expected = [
        [BOS] * add_bos + document[i : i + room]
        for document in documents
        for i in range(0, len(document), room)
    ]
    expected = [piece for piece in expected if len(piece) > 1]
    if not expected:
        with pytest.raises(ValueError, match=r"no tokens|1 token only|documents has 2 tokens"):
            list(found)
        return
    assert [chunk.tokens.tolist() for chunk in found] == expected
    (tally,) = found.tallies
    assert tally.documents == len(documents)
    assert tally.dropped == sum(lengths) - sum(len(e) - add_bos for e in expected)


def test_documents_of_text() -> None:
    tokenizer = Characters(add_bos=True)
    assert cut(["abc", "defgh", "", "i"], 4, tokenizer=tokenizer, packing="document") == [
        "^abc",
        "^def",
        "^gh",
        "^i",
    ]
    # a BOS that is already there stays the only one
    assert cut(["abc", "\x01de"], 3, tokenizer=Characters(add_bos=True), packing="document") == [
        "^ab",
        "^c",
        "^^d",
        "^e",
    ]
    chat = Chat([{"role": "user", "content": "\x01abcd"}])
    assert cut([chat, "ef"], 3, tokenizer=tokenizer, packing="document") == ["^ab", "^cd", "^ef"]
    # a chat's special tokens are spelled out by its template, and parsed
    tokenizer.calls.clear()
    cut([chat, "ef"], 3, tokenizer=tokenizer, packing="document")
    assert tokenizer.calls == [("\x01abcd", False, True), ("ef", True, False)]
    with pytest.raises(ValueError, match="no chat template to render it with"):
        list(chunks([chat], tokenizer, 3))


def test_skipping_documents() -> None:
    texts = ["abc", "de", "fghij"]
    assert cut(texts, 3, packing="document", skip_chunks=1, max_chunks=2) == ["de", "fgh"]
    starts = [c.start for c in Chunks(texts, Characters(), 3, packing="document", skip_chunks=1)]
    assert starts == [3, 5, 8]
    with pytest.raises(ValueError, match="the texts make 10 tokens, 4 chunks; skip fewer"):
        cut(texts, 3, packing="document", skip_chunks=4)
    with pytest.raises(ValueError, match="packing must be 'stream' or 'document', got 'best'"):
        cut(texts, 3, packing="best")


def test_a_mixture_reads_no_further_than_it_must() -> None:
    taken = []

    def endless(name: str) -> Any:
        for n in itertools.count():
            taken.append(f"{name}{n}")
            yield name * 4

    mixture = Mixture([Source(endless("a"), weight=3), Source(endless("b"), weight=1)])
    assert cut(mixture, 4, max_chunks=5) == ["aaaa", "bbbb", "aaaa", "aaaa", "aaaa"]
    assert taken == ["a0", "b0", "a1", "a2", "a3"]
