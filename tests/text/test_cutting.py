"""What is known about a text before it is read, and how it is cut for a run."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.characters import Characters

from imatrix import Mixture, ModelError, Source
from imatrix.text.cutting import TextFacts, cut
from imatrix.text.inputs import Texts


class Checked(Characters):
    """A tokenizer of characters that counts how often it was asked whether it can tokenize."""

    n_vocab = 1 << 21

    def __init__(self, fault: str = "", **options: Any) -> None:
        super().__init__(**options)
        self.fault = fault

    def check(self) -> None:
        if self.fault:
            raise ModelError(self.fault)


def named(name: str) -> io.StringIO:
    file = io.StringIO("abc")
    file.name = name  # type: ignore[misc]
    return file


@pytest.mark.parametrize(
    ("texts", "facts"),
    [
        ("abc", TextFacts((), ("",), (None,), None)),
        (["abc"], TextFacts((), ("",), (None,), None)),
        (Path("a.txt"), TextFacts(("a.txt",), ("a.txt",), (None,), None)),
        (named("b.txt"), TextFacts(("b.txt",), ("b.txt",), (None,), None)),
        (io.StringIO("abc"), TextFacts((), ("",), (None,), None)),
        (Source(["abc"], name="c"), TextFacts(("c",), ("c",), (None,), None)),
        (Source(["abc"]), TextFacts((), ("",), (None,), None)),
        (
            Mixture([Source(["a"], name="d"), Source(["b"]), Source(["c"], name="d")], seed=5),
            TextFacts(("d",), ("d", "", "d"), (None, None, None), 5),
        ),
        (
            Mixture([Source(["a"], name="e", weight=1), Source(["b"], name="f", weight=2.5)]),
            TextFacts(("e", "f"), ("e", "f"), (1.0, 2.5), None),
        ),
    ],
)
def test_facts(texts: Texts, facts: TextFacts) -> None:
    assert TextFacts.of(texts) == facts


def cut_up(texts: Texts, tokenizer: Checked | None = None, **options: Any) -> Any:
    options = {"parse_special": False, "skip_chunks": 0, "max_chunks": None, **options}
    return cut(texts, tokenizer or Checked(), 4, **options)


def test_one_text_is_known_as_a_whole() -> None:
    found = cut_up("abcdefghij")
    digest = hashlib.sha256(np.array([*map(ord, "abcdefghij")], "<i4").tobytes()).hexdigest()
    assert found.settings == {"text_tokens": 10, "text_digest": digest}
    assert found.total == 2
    assert [chunk.tokens.tolist() for chunk in found.chunks] == [
        [*map(ord, "abcd")],
        [*map(ord, "efgh")],
    ]
    assert cut_up("abcdefghij", skip_chunks=1).total == 1
    assert cut_up("abcdefghij", max_chunks=1).total == 1
    # each chunk of a document begins with a BOS, so that it takes 3 of the 10 characters, the last
    # one 1
    assert cut_up("abcdefghij", Checked(add_bos=True), packing="document").total == 4


def test_a_stream_is_known_when_it_was_read() -> None:
    found = cut_up(
        Mixture([Source(["abcdef"], weight=1), Source(["ghijkl"], weight=2)], seed=3),
        on_bad_record="skip",
        packing="document",
    )
    assert found.total is None
    # in the order in checkpoint files
    assert list(found.settings.items()) == [
        ("packing", "document"),
        ("on_bad_record", "skip"),
        ("seed", 3),
        ("weights", "1 2"),
    ]


def test_a_text_is_refused_before_it_is_read(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no tokenizer"):
        cut_up(tmp_path / "missing.txt", Checked("no tokenizer"))
    assert next(cut_up([[1, 2, 3, 4]], Checked("no tokenizer")).chunks).tokens.tolist() == [
        1,
        2,
        3,
        4,
    ]
