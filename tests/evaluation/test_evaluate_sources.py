"""evaluate() and its command take the same texts as collect: the figures are, to the bit, those of
the same tokens given by hand."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import zstandard
from helpers.running import Forged, Run
from pyarrow import parquet

import imatrix
from imatrix import Chat, ChatOptions, Evaluation, Mixture, Source

Data = dict[str, Any]

N_CTX = 16
TEXTS = [
    "the cat sat on the mat and the dog slept in the house",
    "of all that was said there was little that he had heard",
    "",
    "a house on the hill, a cat, a dog and a mouse that was never seen",
]
CHATS = [
    [{"role": "user", "content": TEXTS[0]}, {"role": "assistant", "content": TEXTS[1]}],
    [{"role": "user", "content": TEXTS[3]}],
]
# the model's own template; the end token is a control token of its vocabulary
TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}> {{ message.content }}<|endoftext|>"
    "{% endfor %}"
)


def rendered(messages: Sequence[Any], system: str | None = None) -> str:
    """What TEMPLATE gives, by hand."""
    first = "" if system is None else f"<system> {system}<|endoftext|>"
    return first + "".join(f"<{m['role']}> {m['content']}<|endoftext|>" for m in messages)


@pytest.fixture(scope="module")
def model(forged: Forged) -> Path:
    return forged(
        "glm4moe", seed=11, n_nextn=1, metadata={"tokenizer.chat_template": TEMPLATE}
    ).path


def evaluate(model: Path, texts: Any, **options: Any) -> Evaluation:
    return imatrix.evaluate(model, texts, **{"n_ctx": N_CTX, "n_threads": 1, **options})


def as_plain_data(found: Evaluation) -> Data:
    plain: Data = json.loads(json.dumps(found.as_data()))
    return plain


def spelled_out(model: Path, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of texts whose control tokens are spelled out."""
    with imatrix.Collector(model, n_ctx=N_CTX, n_threads=1, rehearse=False) as collector:
        return [
            collector.tokenize(text, add_special=False, parse_special=True).tolist()
            for text in texts
        ]


def command(run: Run, model: Path, *options: Any) -> Data:
    done = run("evaluate", model, "-c", N_CTX, "-t", 1, "--json", *options)
    assert done.status == 0, done.err
    found: Data = json.loads(done.out)
    return found


def lines(records: Sequence[Any]) -> bytes:
    return "".join(json.dumps(each) + "\n" for each in records).encode()


def test_every_form_of_the_same_texts(
    model: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = evaluate(model, TEXTS)
    records = [{"text": each} for each in TEXTS]
    content = lines(records)
    (tmp_path / "a.jsonl").write_bytes(content)
    (tmp_path / "a.ndjson.gz").write_bytes(gzip.compress(content))
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(content))
    parquet.write_table(pa.Table.from_pylist(records), tmp_path / "a.parquet")
    (tmp_path / "strings.jsonl").write_bytes(lines(TEXTS))
    folder = tmp_path / "folder"
    folder.mkdir()
    for number, text in enumerate(TEXTS):
        (folder / f"{number}.txt").write_text(text)
    named = ["a.jsonl", "a.ndjson.gz", "a.jsonl.zst", "a.parquet", "strings.jsonl", "folder"]
    for name in named:
        found = evaluate(model, Source(tmp_path / name))
        np.testing.assert_array_equal(found.trunk.nll, want.trunk.nll, err_msg=name)
        assert as_plain_data(found) == as_plain_data(want), name
    assert command(run, model, "-f", tmp_path / "a.jsonl") == as_plain_data(want)
    assert command(run, model, "-f", folder) == as_plain_data(want)
    two = ("-f", tmp_path / "a.jsonl", "-f", tmp_path / "a.parquet")
    assert command(run, model, *two) == as_plain_data(evaluate(model, TEXTS * 2))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
    assert command(run, model, "-f", "jsonl:-") == as_plain_data(want)


def test_the_numbers_of_plain_text_stay(model: Path, tmp_path: Path, run: Run) -> None:
    """A file with one text, whatever is in it, and the text itself give the same."""
    text = " ".join(TEXTS)
    path = tmp_path / "a.txt"
    path.write_text(text + "\n")
    want = as_plain_data(evaluate(model, text))
    assert command(run, model, "-f", path) == want
    assert command(run, model, "-p", text) == want
    records = tmp_path / "a.jsonl"
    records.write_bytes(lines(TEXTS))
    # as before: the file exactly as it is
    raw = as_plain_data(evaluate(model, records.read_text().removesuffix("\n")))
    assert command(run, model, "-f", f"text:{records}") == raw
    # a path is a text, as collector.run takes it
    assert as_plain_data(evaluate(model, records)) == raw


def test_chats_are_the_text_that_the_template_makes(model: Path, tmp_path: Path, run: Run) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_bytes(lines([{"messages": each} for each in CHATS]))
    want = as_plain_data(evaluate(model, spelled_out(model, [rendered(each) for each in CHATS])))
    for texts in ([Chat(each) for each in CHATS], Source(path), Mixture([path])):
        assert as_plain_data(evaluate(model, texts)) == want
    assert command(run, model, "-f", path) == want

    # another template, a system message, a field
    other = "{% for message in messages %}{{ message.content }}|{% endfor %}"
    template = tmp_path / "chat.jinja"
    template.write_text(other)
    renamed = tmp_path / "renamed.jsonl"
    renamed.write_bytes(lines([{"turns": each, "text": "not this"} for each in CHATS]))
    by_hand = ["SYS|" + "".join(m["content"] + "|" for m in each) for each in CHATS]
    # fmt: off
    found = command(
        run, model, "-f", renamed, "--text-field", "turns", "--chat-template-file", template,
        "--chat-system", "SYS",
    )
    # fmt: on
    assert found == as_plain_data(evaluate(model, spelled_out(model, by_hand)))
    options = ChatOptions(text=other, system="SYS")
    assert as_plain_data(evaluate(model, Source(renamed, fields=["turns"]), chat=options)) == found


def test_document_packing(model: Path, tmp_path: Path, run: Run) -> None:
    path = tmp_path / "a.jsonl"
    short = [*TEXTS, "a", "the", "a cat"]
    path.write_bytes(lines(short))
    found = evaluate(model, short, packing="document")
    assert command(run, model, "-f", path, "--packing", "document") == as_plain_data(found)
    assert (
        command(run, model, "-f", path)
        == as_plain_data(evaluate(model, short))
        != as_plain_data(found)
    )
    # by hand: each document alone, in pieces of N_CTX; there is no BOS here
    documents = [text for text in spelled_out(model, short) if text]
    pieces = [each[i : i + N_CTX] for each in documents for i in range(0, len(each), N_CTX)]
    pieces = [piece for piece in pieces if len(piece) > 1]
    parts = []
    for piece in pieces:
        # in a chunk of n tokens the positions n // 2 to n - 2 are scored: none in a chunk of two
        if len(piece) > 2:
            parts.append(evaluate(model, [piece]).trunk.nll)
    np.testing.assert_array_equal(found.trunk.nll, np.concatenate(parts))


def test_mixtures(model: Path, tmp_path: Path, run: Run) -> None:
    a, b = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    a.write_bytes(lines(TEXTS * 3))
    b.write_bytes(lines([text.upper() for text in TEXTS * 3]))
    mixed = Mixture([Source(str(a), weight=0.75), Source(str(b), weight=0.25)], seed=3)
    found = command(run, model, "-f", f"{a}:0.75", "-f", f"{b}:0.25", "--seed", 3)
    assert found == as_plain_data(evaluate(model, mixed))
    # the same tokens, cut by the corpus
    with imatrix.Collector(model, n_ctx=N_CTX, n_threads=1, rehearse=False) as collector:
        matrix = collector.run(mixed)
    assert matrix.provenance is not None
    assert matrix.chunk_count == found["n_chunks"]


def test_against_reads_the_text_again(
    model: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = lines(TEXTS)
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    want = command(run, model, "-f", path, "--against", model)
    assert want["trunk"] == want["against"][0]["trunk"]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
    assert command(run, model, "-f", "jsonl:-", "--against", model) == want


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"text": "a"}\n{"text"', "line 2: not JSON"),
        (
            b'{"body": "a b c d e f"}\n',
            "no field 'messages' or 'conversations' or 'conversation' or 'text'; it has 'body'",
        ),
    ],
)
def test_a_record_that_cannot_be_read(
    content: bytes, said: str, model: Path, tmp_path: Path, run: Run
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    done = run("evaluate", model, "-f", path, "-c", N_CTX)
    assert (done.status, done.out) == (2, "")
    assert str(path) in done.err
    assert said in done.err


def test_chats_without_a_template(forged: Forged, tmp_path: Path, run: Run) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines([{"messages": CHATS[0]}]))
    done = run("evaluate", forged("llama").path, "-f", path, "-c", N_CTX)
    assert done.status == 2
    assert "has no chat template" in done.err
    assert "--chat-template-file" in done.err


def test_a_text_is_needed(model: Path, run: Run) -> None:
    assert run("evaluate", model).status == 2
    assert run("evaluate", model, "-p", "").status == 2
    assert run("evaluate", model, "-p", "a", "-f", "b").status == 2
