"""How a document ends if the tokenizer ends every text with a token of its own: an EOS
(tokenizer.ggml.add_eos_token), or the SEP of a wordpiece vocabulary. The results are compared with
tokens worked out by hand, and with llama-imatrix given the same tokens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.characters import BOS, Characters
from helpers.forge import ModelSpec
from helpers.parity import PARITY, assert_same_trunk
from helpers.running import EngineTool, Forged, run_tool

from imatrix import (
    Chat,
    ChatOptions,
    CheckpointError,
    Collector,
    ImportanceMatrix,
    Mixture,
    Progress,
    Source,
)
from imatrix.text.chunks import Chunks
from imatrix.text.inputs import Texts
from imatrix.text.tokens import Packing

EOS = 2
N_CTX = 8
DOCUMENTS = ["the cat", "", "sat", "on the mat and slept"]


@dataclass
class Ending(Characters):
    """Characters, with an EOS at the end of each text."""

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> np.ndarray:
        tokens = super().tokenize(text, add_special=add_special, parse_special=parse_special)
        return np.append(tokens, EOS).astype(np.int32) if add_special else tokens


class Wordpiece(Ending):
    """CLS in front, whatever add_bos says, as in wordpiece."""

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> np.ndarray:
        tokens = super().tokenize(text, add_special=add_special, parse_special=parse_special)
        return np.insert(tokens, 0, BOS) if add_special and not self.add_bos else tokens


def spelled(
    texts: Texts, tokenizer: Characters, n_ctx: int, packing: Packing = "stream"
) -> list[str]:
    """The chunks as text; BOS is shown as ^, EOS as $."""
    found = Chunks(
        texts, tokenizer, n_ctx, packing=packing, render=lambda chat: chat.messages[0]["content"]
    )
    names = {BOS: "^", EOS: "$"}
    return ["".join(names.get(t, chr(t)) for t in chunk.tokens.tolist()) for chunk in found]


def stream(texts: Texts, tokenizer: Characters) -> str:
    """The stream before it is cut, as one short chunk."""
    (found,) = spelled(texts, tokenizer, 100)
    return found


class TestStream:
    def test_every_document_ends_with_it(self) -> None:
        assert stream(["ab", "", "c", "de"], Ending()) == "ab$c$de$"
        assert stream(["ab", "", "c", "de"], Ending(add_bos=True)) == "^ab$c$de$"
        assert stream(["ab", "", "c", "de"], Wordpiece()) == "^ab$c$de$"
        assert stream(["ab", "", "c", "de"], Wordpiece(add_bos=True)) == "^ab$c$de$"
        assert stream(["ab", "", "c", "de"], Characters(add_bos=True)) == "^abcde"

    def test_a_token_that_is_both(self) -> None:
        # GPT-2's <|endoftext|> is both BOS and EOS
        assert stream(["ab", "c"], Ending(bos=EOS)) == "ab$c$"
        assert stream(["ab", "c"], Ending(bos=EOS, add_bos=True)) == "$ab$c$"

    def test_one_text_ends_as_the_tokenizer_ends_it(self, tmp_path: Path) -> None:
        path = tmp_path / "a.txt"
        path.write_text("abc\n")
        for texts in ("abc", path, ["abc"], Source(path), Mixture([path])):
            assert stream(texts, Ending(add_bos=True)) == "^abc$", texts

    def test_the_cut_is_where_it_would_be_in_one_stream(self) -> None:
        # ^ab$cde$fg$, cut by 3; the BOS takes the first place of each
        assert spelled(["ab", "cde", "fg"], Ending(add_bos=True), 3) == ["^ab", "^cd", "^$f"]

    def test_each_source_of_a_mixture(self) -> None:
        sources = [Source(["ab", "cd"], name="a"), Source(["ef", "gh"], name="b")]
        assert stream(Mixture(sources), Ending(add_bos=True)) == "^ab$cd$ef$gh$"
        weighted = [Source(["ab", "cd"], weight=1), Source(["ef", "gh"], weight=1)]
        assert spelled(Mixture(weighted), Ending(add_bos=True), 7) == ["^ab$cd$", "^ef$gh$"]

    def test_token_lists_are_taken_as_they_are(self) -> None:
        assert stream([[97, 98], [99]], Ending(add_bos=True)) == "^b" + "c"
        assert stream([[97, 98], [99]], Ending()) == "abc"
        assert stream(Source([[97], "b", [99], "d"]), Ending()) == "ab$cd$"

    def test_chats_end_as_their_template_ends_them(self) -> None:
        def chat(text: str) -> Chat:
            return Chat([{"role": "user", "content": text}])

        # what the template spells, with an EOS or without; none is added
        texts = [chat("^ab$"), chat("cd"), "e", chat("f$")]
        found = stream(texts, Ending(add_bos=True))
        assert found == "^ab$cde$f$"  # "^" and "$" of the chats are characters of this tokenizer


class TestDocuments:
    def test_every_document_ends_with_it(self) -> None:
        texts = ["ab", "", "cde", "fghi"]
        assert spelled(texts, Ending(add_bos=True), 5, "document") == [
            "^ab$",
            "^cde$",
            "^fghi",
            "^$",
        ]
        assert spelled(texts, Ending(), 5, "document") == ["ab$", "cde$", "fghi$"]


# --- a model -----------------------------------------------------------------------------------


def forged_with(forged: Forged, **options: Any) -> ModelSpec:
    return forged("llama", metadata={"tokenizer.ggml.add_eos_token": True}, **options)


def ids(spec: ModelSpec, documents: Iterable[str]) -> Iterator[int]:
    """The stream by hand: the tiny tokenizer's ids, a BOS in front, an EOS after each document."""
    assert spec.tokenizer is not None
    assert spec.tokenizer.bos is not None
    if spec.tokenizer.add_bos:
        yield spec.tokenizer.bos
    for text in documents:
        if text:
            yield from spec.encode(text)
            yield spec.tokenizer.bos + 1


def digest(spec: ModelSpec, tokens: list[int]) -> str:
    """The digest of the chunks that a stream makes, from the matrix."""
    assert spec.tokenizer is not None
    front = [spec.tokenizer.bos] if spec.tokenizer.add_bos else []
    full = range(0, len(tokens) - N_CTX + 1, N_CTX)
    cut = [front + tokens[i + len(front) : i + N_CTX] for i in full]
    return hashlib.sha256(np.array(cut, dtype="<i4").tobytes()).hexdigest()


@pytest.mark.parametrize("add_bos", [False, True])
def test_the_chunks_of_a_model(forged: Forged, tmp_path: Path, add_bos: bool) -> None:
    spec = forged_with(forged, add_bos=add_bos)
    want = digest(spec, list(ids(spec, DOCUMENTS)))
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": each}) + "\n" for each in DOCUMENTS))
    with Collector(spec.path, n_ctx=N_CTX, n_threads=1) as collector:
        for texts in (DOCUMENTS, iter(DOCUMENTS), Source(path), Mixture([path]), Source(DOCUMENTS)):
            found = collector.run(texts).provenance
            assert found is not None
            assert found.dataset_digest == want
    plain = forged("llama", add_bos=add_bos)
    with Collector(plain.path, n_ctx=N_CTX, n_threads=1) as collector:
        found = collector.run(DOCUMENTS).provenance
    assert found is not None
    eos = plain.tokenizer.bos + 1  # type: ignore[operator,union-attr]
    without = [token for token in ids(plain, DOCUMENTS) if token != eos]
    assert found.dataset_digest == digest(plain, without)


def test_a_wordpiece_vocabulary(forged: Forged) -> None:
    """CLS is in front and SEP at the end, whatever the keys say about a BOS."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "\u2581the", "\u2581cat", "\u2581sat", "\u2581on"]
    kinds = [3, 2, 3, 3, 1, 1, 1, 1]
    spec = forged(
        "llama",
        tokenizer=None,
        n_vocab=len(words),
        metadata={
            "tokenizer.ggml.model": "bert",
            "tokenizer.ggml.pre": "jina-v2-en",
            "tokenizer.ggml.tokens": words,
            "tokenizer.ggml.token_type": kinds,
            "tokenizer.ggml.bos_token_id": 2,
            "tokenizer.ggml.cls_token_id": 2,
            "tokenizer.ggml.seperator_token_id": 3,
            "tokenizer.ggml.unknown_token_id": 1,
            "tokenizer.ggml.padding_token_id": 0,
        },
    )
    with Collector(spec.path, n_ctx=4, n_threads=1) as collector:
        assert collector.tokenize("the cat").tolist() == [2, 4, 5, 3]
        found = collector.run(["the cat", "sat", "on the cat sat"]).provenance
    # [CLS] the cat [SEP] | sat [SEP] on the | cat sat [SEP]; CLS takes the first place of each
    # chunk if the engine says that a chunk begins with one
    want = [[2, 4, 5, 3], [2, 3, 7, 4]]
    assert found is not None
    assert found.dataset_digest == hashlib.sha256(np.array(want, "<i4").tobytes()).hexdigest()


def test_a_chat_has_the_end_that_its_template_spells_once(forged: Forged) -> None:
    spec = forged_with(forged)
    assert spec.tokenizer is not None
    assert spec.tokenizer.bos is not None
    eos = spec.tokenizer.bos + 1
    chat = Chat([{"role": "user", "content": "the cat sat"}])
    template = "{{ messages[0].content }}{{ eos_token }}"
    want = [*spec.encode("the cat sat"), eos] * 4
    with Collector(spec.path, n_ctx=len(want), n_threads=1) as collector:
        found = collector.run([chat] * 4, chat=ChatOptions(text=template)).provenance
        assert found is not None
        assert found.dataset_digest == hashlib.sha256(np.array(want, "<i4").tobytes()).hexdigest()


def test_llama_imatrix_of_the_same_tokens(
    forged: Forged, engine_tool: EngineTool, tmp_path: Path
) -> None:
    """llama-imatrix ends with an assertion on a model that asks for an EOS (main in
    tools/imatrix/imatrix.cpp). The same weights without that key, and a text that spells out the
    EOS, give it the same tokens."""
    n_ctx, n_documents = 64, 8
    asking = forged_with(forged, add_bos=True)
    plain = forged("llama", add_bos=True)
    for name, weights in asking.tensors.items():
        np.testing.assert_array_equal(weights, plain.tensors[name])
    words = [
        "the",
        "cat",
        "sat",
        "on",
        "the",
        "mat",
        "and",
        "the",
        "dog",
        "slept",
        "in",
        "the",
        "house",
        "of",
        "the",
        "cat",
        "",
    ]
    documents = [" ".join(words[i:] + words[:i]) for i in range(n_documents)]
    # the last chunk ends with the last EOS
    while len(list(ids(asking, documents))) % n_ctx:
        documents[-1] += "."
    spelled_out = tmp_path / "a.txt"
    spelled_out.write_text("".join(f"{each}<|endoftext|>" for each in documents))
    theirs = tmp_path / "theirs.gguf"
    # fmt: off
    run_tool(
        engine_tool("llama-imatrix"), "-m", plain.path, "-f", spelled_out, "-o", theirs,
        "-c", str(n_ctx), "-t", "1", "--no-ppl", "--parse-special",
    )
    # fmt: on
    want = ImportanceMatrix.load(theirs)
    lines = tmp_path / "a.jsonl"
    lines.write_text("".join(json.dumps({"text": each}) + "\n" for each in documents))
    one = tmp_path / "one.txt"  # it ends with the EOS that the tokenizer adds to the whole
    one.write_text(spelled_out.read_text().removesuffix("<|endoftext|>"))
    with Collector(asking.path, n_ctx=n_ctx, n_threads=1) as collector:
        for texts, special in ((Source(lines), False), (documents, False), (one, True)):
            found = collector.run(texts, parse_special=special)
            assert found.chunk_count == want.chunk_count == len(list(ids(asking, documents))) // 64
            assert_same_trunk(found, want, PARITY)


# --- going on ----------------------------------------------------------------------------------


class Enough(Exception):
    """Ends a run from its progress function."""


def stop_after(n: int) -> Callable[[Progress], None]:
    def progress(told: Progress) -> None:
        if told.chunks == n:
            raise Enough

    return progress


def test_a_checkpoint_of_other_cuts_is_refused(forged: Forged, tmp_path: Path) -> None:
    """The checkpoint was written when only the first document got its EOS. Neither texts nor token
    lists are known before they are read, so that either could continue from the other's
    checkpoint."""
    spec = forged_with(forged)
    assert spec.tokenizer is not None
    checkpoint = tmp_path / "a.checkpoint"
    first, *rest = [text for text in DOCUMENTS * 2 if text]
    once = [list(ids(spec, [first])), *(spec.encode(text) for text in rest)]
    with Collector(spec.path, n_ctx=N_CTX, n_threads=1) as collector:
        with pytest.raises(Enough):
            collector.run(once, checkpoint=checkpoint, progress=stop_after(3))
        before = checkpoint.read_bytes()
        with pytest.raises(CheckpointError, match="of another text: the first 3 chunks differ"):
            collector.run(DOCUMENTS * 2, checkpoint=checkpoint)
        assert checkpoint.read_bytes() == before
        each = [list(ids(spec, [text])) for text in DOCUMENTS * 2]
        checkpoint.unlink()
        with pytest.raises(Enough):
            collector.run(each, checkpoint=checkpoint, progress=stop_after(3))
        assert collector.run(DOCUMENTS * 2, checkpoint=checkpoint) == collector.run(DOCUMENTS * 2)
