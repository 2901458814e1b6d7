"""Runs over sources of text: packed by documents, resumed, and run until the experts have
enough."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.forge import ModelSpec
from helpers.heads import assert_agrees, reference
from helpers.running import Forged
from helpers.runs import Enough, saved, stop_at

from imatrix import Chat, ChatOptions, Collector, ImportanceMatrix, Mixture, Source, TextSource, cli
from imatrix.text.progress import Progress

N_CTX = 32


@pytest.fixture(scope="module")
def experts(forged: Forged) -> ModelSpec:
    """Experts in the trunk and in the head."""
    return forged("glm4moe", seed=2, n_nextn=1)


def collector(spec: ModelSpec, **options: Any) -> Collector:
    return Collector(spec.path, **{"n_ctx": N_CTX, "n_threads": 1, "rehearse": False, **options})


def pieces_of(spec: ModelSpec, texts: list[str], n_ctx: int) -> list[list[int]]:
    documents = [spec.encode(text) for text in texts]
    return [each[i : i + n_ctx] for each in documents for i in range(0, len(each), n_ctx)]


# --- documents apart -----------------------------------------------------------------------------


def test_documents_do_not_see_one_another(forged: Forged, prose: str) -> None:
    """Trunk and head compared with NumPy, which runs each piece from position 0 with a state of
    zeros."""
    spec = forged("qwen35", seed=2, n_nextn=1)
    texts = [prose[:700], prose[700:760], prose[760:1400]]
    pieces = pieces_of(spec, texts, 128)
    lengths = [len(piece) for piece in pieces]
    assert len(lengths) > len(texts)
    assert min(lengths) > 1
    with collector(spec, n_ctx=128, mtp=True) as made:
        got = made.run(texts, mtp=True, packing="document")
        report = made.report
    assert_agrees(got, reference(spec, pieces))
    # slot 0 of a chunk is not counted
    assert got["blk.2.nextn.eh_proj.weight"].counts.tolist() == [sum(lengths) - len(lengths)]
    assert (got.chunk_count, got.chunk_size) == (len(pieces), 128)
    assert got.provenance is not None
    assert (got.provenance.tokens, got.provenance.packing) == (sum(lengths), "document")
    assert report.sources == (TextSource("", 3, sum(lengths)),)
    assert report.digest == hashlib.sha256(np.concatenate(pieces).astype("<i4")).hexdigest()


@pytest.mark.parametrize("n_seq", [1, 3])
def test_the_sums_are_those_of_each_piece_by_itself(
    experts: ModelSpec, prose: str, n_seq: int
) -> None:
    mtp = n_seq == 1
    texts = [prose[:50], prose[50:400], prose[400:415], prose[415:600], prose[600:700]]
    pieces = pieces_of(experts, texts, N_CTX)
    with collector(experts, n_seq=n_seq) as made:
        together = made.run(texts, mtp=mtp, packing="document")
    with collector(experts) as made:
        alone = [made.run([piece], mtp=mtp) for piece in pieces]
    merged = alone[0].merge(*alone[1:])
    assert set(together) == set(merged)
    for name in merged:
        np.testing.assert_array_equal(together[name].counts, merged[name].counts)
        if n_seq == 1:
            # the same additions in the same order
            np.testing.assert_array_equal(together[name].sums, merged[name].sums)
        else:
            # with chunks side by side the engine multiplies other shapes, and with fewer than 64
            # rows its attention adds in float16 either way (ops.cpp)
            scale = merged[name].sums.max()
            np.testing.assert_allclose(together[name].sums, merged[name].sums, atol=1e-3 * scale)


# --- what the file and the report say ------------------------------------------------------------


def mixed(folder: Path, prose: str) -> list[Source]:
    """Three sources: JSON lines with chats, a gzip file, and a folder."""
    words = prose.split(" ")
    chats = [
        {"messages": [{"role": "user", "content": " ".join(words[i : i + 9])}]}
        for i in range(0, 400, 9)
    ]
    (folder / "chat.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    (folder / "web.txt.gz").write_bytes(gzip.compress(" ".join(words[400:700]).encode()))
    (folder / "books").mkdir()
    for n in range(30):
        (folder / f"books/{n}.txt").write_text(" ".join(words[700 + 9 * n : 709 + 9 * n]))
    return [
        Source(folder / "chat.jsonl", weight=0.5),
        Source(folder / "web.txt.gz", weight=0.3),
        Source(folder / "books", weight=0.2),
    ]


TEMPLATE = ChatOptions(text="{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")


def test_report_and_file(experts: ModelSpec, prose: str, tmp_path: Path) -> None:
    sources = mixed(tmp_path, prose)
    names = tuple(source.name for source in sources)
    with collector(experts) as made:
        matrix = made.run(Mixture(sources, seed=5), chat=TEMPLATE, max_chunks=40)
        report = made.report
    assert report.ended == "max_chunks"
    assert [source.tokens for source in report.sources] == [20 * N_CTX, 12 * N_CTX, 8 * N_CTX]
    matrix.save(tmp_path / "out.gguf")
    read = ImportanceMatrix.load(tmp_path / "out.gguf")
    assert read.datasets == names
    found = read.provenance
    assert found is not None
    assert found.sources == report.sources
    assert [source.weight for source in found.sources] == [0.5, 0.3, 0.2]
    assert (found.tokens, found.packing, found.seed) == (40 * N_CTX, "stream", 5)
    assert found.dataset_digest == report.digest
    # the text ends: the rest of each stream is dropped, and the source that ended it is named
    with collector(experts) as made:
        made.run(Mixture(sources[2:], seed=5))
        (books,) = made.report.sources
        books_ = [(tmp_path / f"books/{i}.txt").read_text() for i in range(30)]
        n = sum(len(experts.encode(book.removesuffix("\n"))) for book in books_)
        assert books == TextSource(names[2], 30, n - n % N_CTX, n % N_CTX)
        assert made.report.dropped == n % N_CTX / n
        assert "dropped: they filled no chunk" in made.report.lines()[-1]
        made.run(Mixture(sources, seed=5), chat=TEMPLATE)
        assert made.report.ended == "text"
        assert made.report.ended_by in names
    # two matrices together: their sources are added one by one
    both = matrix + matrix
    assert both.provenance is not None
    assert both.provenance.tokens == 80 * N_CTX
    assert [source.tokens for source in both.provenance.sources] == [
        2 * source.tokens for source in report.sources
    ]


# --- going on ------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", ["stream", "document"])
def test_a_resumed_run_over_mixed_sources(
    experts: ModelSpec, prose: str, tmp_path: Path, packing: Any
) -> None:
    options: dict[str, Any] = {"chat": TEMPLATE, "packing": packing, "mtp": True, "max_chunks": 14}

    def texts() -> Mixture:
        return Mixture(sources, seed=1)

    sources = mixed(tmp_path, prose)
    with collector(experts) as made:
        whole = saved(made.run(texts(), **options), tmp_path)
        report = made.report
    for n in (1, 6, 13):
        path = tmp_path / f"{n}.checkpoint"
        with collector(experts) as made, pytest.raises(Enough):
            made.run(texts(), checkpoint=path, progress=stop_at(n), **options)
        with collector(experts) as made:
            assert saved(made.run(texts(), checkpoint=path, **options), tmp_path) == whole
            assert made.report == report
    # other order, shares, cuts or words make it another run
    path = tmp_path / "6.checkpoint"
    others: list[tuple[Mixture, dict[str, Any], str]] = [
        (Mixture(sources, seed=2), {}, "seed is 1 there and 2 here"),
        (Mixture([Source(s.name, weight=1) for s in sources], seed=1), {}, "weights is 0.5 0.3"),
        (texts(), {"packing": "document" if packing == "stream" else "stream"}, "packing is "),
        (texts(), {"chat": ChatOptions(text="{{ messages }}")}, "chat is "),
        (texts(), {"min_expert_rows": 9}, "min_expert_rows is absent there and 9 here"),
    ]
    with collector(experts) as made:
        for other, changed, told in others:
            with pytest.raises(ValueError, match=told):
                made.run(other, checkpoint=path, **{**options, **changed})


# --- experts -------------------------------------------------------------------------------------


def rows(matrix: ImportanceMatrix) -> int:
    return min(int(entry.counts.min()) for entry in matrix.values() if entry.n_counts > 1)


@pytest.mark.parametrize("n_seq", [1, 2])
def test_until_every_expert_has_enough(
    experts: ModelSpec, prose: str, n_seq: int, tmp_path: Path
) -> None:
    mtp = n_seq == 1
    reports: list[Progress] = []
    with collector(experts, n_seq=n_seq) as made:
        # the reference: the thinnest expert after every group of chunks
        every = [rows(made.run(prose, mtp=mtp, max_chunks=n)) for n in range(n_seq, 17, n_seq)]
        wanted = every[-3] + 1
        expected = next(n for n, least in enumerate(every) if least >= wanted) * n_seq + n_seq
        matrix = made.run(prose, mtp=mtp, min_expert_rows=wanted, progress=reports.append)
        report = made.report
        assert matrix.chunk_count == expected
        assert report.ended == "min_expert_rows"
        assert report.experts is not None
        assert report.experts.reached
        assert report.experts.thinnest[2] == rows(matrix) >= wanted
        assert reports[-1].experts == report.experts
        assert reports[0].experts is not None
        assert not reports[0].experts.reached
        if mtp:  # the head's experts count too
            blocks = {name.split(".")[1] for name, entry in matrix.items() if entry.n_counts > 1}
            assert str(experts.hparams.n_layer) in blocks
        # the same bytes again, also after an interruption, and also at the end
        expected_bytes = saved(matrix, tmp_path)
        options: dict[str, Any] = {"mtp": mtp, "min_expert_rows": wanted}
        assert saved(made.run(prose, **options), tmp_path) == expected_bytes
        path = tmp_path / "checkpoint"
        with pytest.raises(Enough):
            made.run(prose, checkpoint=path, progress=stop_at(n_seq), **options)
        for _ in range(2):
            again = made.run(prose, checkpoint=path, **options)
            assert saved(again, tmp_path) == expected_bytes
            assert made.report == report


def test_too_little_text_for_the_experts(experts: ModelSpec, prose: str) -> None:
    with collector(experts) as made:
        matrix = made.run(prose, min_expert_rows=10**6, max_chunks=5)
        report = made.report
        assert report.ended == "max_chunks"
        made.run(prose[:400], min_expert_rows=10**6)
        assert made.report.ended == "text"
    found = report.experts
    assert found is not None
    least = rows(matrix)
    assert found.thinnest[2] == least
    assert found.n_reached == 0
    # the estimate is proportional: every expert needs 10^6 rows, the thinnest has `least` of 160
    # tokens
    assert found.tokens_needed(160) == -(-160 * 10**6 // least)
    assert f"about {found.tokens_needed(160)} tokens of such text would do" in report.lines()[-1]
    name, expert, _ = found.thinnest
    assert any(
        int(matrix[weight].counts[expert]) == least
        for weight in matrix
        if weight.startswith(f"{name}.") and matrix[weight].n_counts > 1
    )


def test_an_expert_that_no_row_reaches(experts: ModelSpec) -> None:
    with collector(experts) as made:
        made.run([[5, 6]], min_expert_rows=3)
        report = made.report
    assert report.experts is not None
    assert report.experts.n_unseen > 0
    assert report.experts.tokens_needed(2) is None
    assert "add text of another kind" in report.lines()[-1]


def test_rows_for_the_experts_of_a_model_without_any(forged: Forged, prose: str) -> None:
    with collector(forged("llama", seed=2)) as made:
        with pytest.raises(ValueError, match=r"min_expert_rows=5, but .* has no experts; leave"):
            made.run(prose, min_expert_rows=5)
        assert made.run(prose[:100]).chunk_count
        assert made.report.experts is None


# --- the command ---------------------------------------------------------------------------------


def test_the_command(
    model: Path,
    prose: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run(*argv: object) -> tuple[int, str]:
        capfd.readouterr()
        status = cli.main(
            ["collect", "-m", str(model), "-c", "64", "-b", "64", "-t", "1", "--no-ppl"]
            + [str(each) for each in argv]
        )
        return status, capfd.readouterr().err

    mixed(tmp_path, prose)
    template = tmp_path / "template.jinja"
    assert TEMPLATE.text is not None
    template.write_text(TEMPLATE.text)
    given = [
        *("-f", f"{tmp_path / 'chat.jsonl'}:0.5", "-f", f"{tmp_path / 'web.txt.gz'}:0.5"),
        *("--seed", 3, "--packing", "document", "--chat-template-file", template, "--mtp"),
    ]
    out = tmp_path / "out.gguf"
    status, err = run(*given, "--min-expert-rows", 20, "-o", out)
    assert status == 0, err
    with Collector(model, n_ctx=64, n_threads=1) as made:
        sources = [
            Source(str(tmp_path / "chat.jsonl"), weight=0.5),
            Source(str(tmp_path / "web.txt.gz"), weight=0.5),
        ]
        expected = made.run(
            Mixture(sources, seed=3),
            packing="document",
            chat=TEMPLATE,
            min_expert_rows=20,
            mtp=True,
        )
        for line in made.report.lines():
            assert line in err
    expected.save(tmp_path / "expected.gguf")
    assert out.read_bytes() == (tmp_path / "expected.gguf").read_bytes()
    assert "experts 24/24 at 20 rows, thinnest " in err
    assert cli.main(["show", str(out)]) == 0
    shown = capfd.readouterr().out
    assert expected.provenance is not None
    tokens = expected.provenance.tokens
    assert f"of up to 64 tokens, no document beside another; {tokens} tokens\n" in shown
    assert re.search(r"text +\S+(chat\.jsonl|web\.txt\.gz) 5\d\.\d%, \S+ 4\d\.\d%\n", shown)
    with monkeypatch.context() as patch:
        patch.setenv("FORCE_COLOR", "1")  # with this, rich takes the stream for a terminal
        status, err = run(*given, "--min-expert-rows", 20, "-o", out, "--restart")
    assert status == 0
    bar = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", err)
    assert re.search(r"experts +━+ 24/24 at 20 rows, thin", bar)
    # a chat without a template, or whose template fails, is bad input
    status, err = run("-f", tmp_path / "chat.jsonl", "-o", tmp_path / "no.gguf")
    assert status == 2
    assert "has no chat template" in err
    status, err = run(
        *("-f", tmp_path / "web.txt.gz", "-o", tmp_path / "thin.gguf", "--min-expert-rows", 9999)
    )
    assert status == 0
    assert "--min-expert-rows 9999: 16 expert(s) had fewer rows when the end of the text" in err
    for flags, told in (
        (["-f", f"{tmp_path / 'no.txt'}:0.5"], "no.txt: No such file or directory"),
        (["-f", f"{tmp_path / 'web.txt.gz'}:0"], "a weight must be a positive number"),
        (["-f", "a.txt:1", "-f", "b.txt"], "b.txt has no weight and a.txt has one"),
        (["-f", out, "-o", out], "would replace the input"),
        (["-p", "x y z", "--chat-date", "soon"], "expected YYYY-MM-DD, got 'soon'"),
        (["-p", "x y z", "--chat-template-kwargs", "[]"], "expected a JSON object, got '[]'"),
        (["-p", "x y z", "--chat-tools", template], "template.jinja: not JSON"),
        (
            ["-p", "x", "--chat-template", "a", "--chat-template-file", template],
            "give one of them",
        ),
    ):
        status, err = run("-o", tmp_path / "no.gguf", *flags)
        assert status == 2, err
        assert told in err
    assert not (tmp_path / "no.gguf").exists()


def test_chats_given_to_run(experts: ModelSpec) -> None:
    chats = [Chat([{"role": "user", "content": "the river and the stone " * 9}])]
    with collector(experts) as made:
        got = made.run(chats, chat=TEMPLATE)
        same = made.run("user: " + "the river and the stone " * 9 + "\n")
    assert dict(got) == dict(same)
