"""A small byte-level BPE, which gives the random model (random_model.py) a tokenizer of its own.

It learns merges from a text and writes them the way the engine reads a ``gpt2``
vocabulary with ``tokenizer.ggml.pre = "gpt-2"``. At run time the engine does the
encoding; `BytePairEncoding.encode` follows the same rules and is here so that a
trained vocabulary can be checked without it.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

PRE_TYPE = "gpt-2"
"""The ``tokenizer.ggml.pre`` whose splitting `split_words` follows."""


def _byte_alphabet() -> tuple[str, ...]:
    """One printable character a byte, as in GPT-2 (unicode_byte_to_utf8_map, unicode.cpp).

    Visible Latin-1 bytes stand for themselves; the others take the code points from
    U+0100 on, so that a token never holds a space or a control character.
    """
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    alphabet = []
    spare = 0x100
    for byte in range(256):
        if byte in visible:
            alphabet.append(chr(byte))
        else:
            alphabet.append(chr(spare))
            spare += 1
    return tuple(alphabet)


_BYTE_TO_CHAR = _byte_alphabet()
_CHAR_TO_BYTE = {char: byte for byte, char in enumerate(_BYTE_TO_CHAR)}

# unicode_set_whitespace in unicode-data.cpp. str.isspace() also has U+001C to U+001F.
_WHITESPACE = frozenset(
    "\t\n\v\f\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a"
    "\u2028\u2029\u202f\u205f\u3000"
)

_CONTRACTION = re.compile("'s|'t|'re|'ve|'m|'ll|'d")

# The rest of the gpt-2 expression (unicode_regex_split_custom_gpt2, unicode.cpp), but over one
# class letter a character, since `re` has no \p{L}: L letter, N number, O other, W white space
# that is not U+0020.
_CLASS_WORD = re.compile(r" ?L+| ?N+| ?O+|[ W]+(?![LNO])|[ W]+")


def _class_of(char: str) -> str:
    if char == " ":
        return " "
    if char in _WHITESPACE:
        return "W"
    category = unicodedata.category(char)[0]
    return category if category in "LN" else "O"


def split_words(text: str) -> list[str]:
    """Cut `text` at the places where the engine's ``gpt-2`` pre-tokenizer cuts; no merge crosses a
    cut."""
    classes = "".join(map(_class_of, text))
    words = []
    start = 0
    while start < len(text):
        match = _CONTRACTION.match(text, start) or _CLASS_WORD.match(classes, start)
        if match is None:  # every class letter begins some alternative
            raise AssertionError(f"no word at {start}")
        words.append(text[start : match.end()])
        start = match.end()
    return words


def _to_chars(text: str) -> str:
    return "".join(_BYTE_TO_CHAR[byte] for byte in text.encode("utf-8"))


def _merge(symbols: Sequence[str], left: str, right: str) -> list[str]:
    """`symbols` with every neighbouring `left`, `right` joined, from the left."""
    merged = []
    i = 0
    while i < len(symbols):
        if i + 1 < len(symbols) and symbols[i] == left and symbols[i + 1] == right:
            merged.append(left + right)
            i += 2
        else:
            merged.append(symbols[i])
            i += 1
    return merged


@dataclass(frozen=True)
class BytePairEncoding:
    """A vocabulary: 256 byte tokens, learnt tokens, then the special ones."""

    tokens: tuple[str, ...]
    """Token texts in the byte alphabet, by id, as ``tokenizer.ggml.tokens`` holds them."""
    merges: tuple[tuple[str, str], ...]
    """Pairs to join, the first learnt first, as ``tokenizer.ggml.merges`` holds them."""
    specials: tuple[str, ...]
    """The last tokens of the vocabulary. No text encodes to them."""

    @cached_property
    def _ids(self) -> dict[str, int]:
        n_plain = len(self.tokens) - len(self.specials)
        return {token: i for i, token in enumerate(self.tokens[:n_plain])}

    @cached_property
    def _ranks(self) -> dict[tuple[str, str], int]:
        return {pair: rank for rank, pair in enumerate(self.merges)}

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without special tokens."""
        known: dict[str, list[int]] = {}
        ids: list[int] = []
        for word in split_words(text):
            if word not in known:
                known[word] = [self._ids[symbol] for symbol in self._symbols(word)]
            ids += known[word]
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; special tokens are left out, broken UTF-8 becomes U+FFFD."""
        n_plain = len(self.tokens) - len(self.specials)
        chars = "".join(self.tokens[i] for i in ids if i < n_plain)
        return bytes(_CHAR_TO_BYTE[char] for char in chars).decode("utf-8", errors="replace")

    def _symbols(self, word: str) -> list[str]:
        symbols = list(_to_chars(word))
        while len(symbols) > 1:
            pairs = set(pairwise(symbols))
            best = min(pairs, key=lambda pair: self._ranks.get(pair, len(self._ranks)))
            if best not in self._ranks:
                break
            symbols = _merge(symbols, *best)
        return symbols


def train(text: str, n_vocab: int, *, specials: Sequence[str] = ()) -> BytePairEncoding:
    """Learn a vocabulary of exactly `n_vocab` tokens from `text`.

    The most frequent neighbouring pair is joined first; of equally frequent ones the
    smallest in code point order, so that the same text always gives the same vocabulary.

    Raises:
        ValueError: `n_vocab` has no room for the bytes and `specials`, or `text` runs out
            of pairs before the vocabulary is full, or `specials` are not distinct.
    """
    n_plain = n_vocab - len(specials)
    if n_plain < len(_BYTE_TO_CHAR):
        raise ValueError(f"n_vocab {n_vocab} is less than 256 bytes and {len(specials)} specials")

    counts = Counter(split_words(text))
    words = [(list(_to_chars(word)), count) for word, count in counts.items()]

    pair_counts: Counter[tuple[str, str]] = Counter()
    words_with: defaultdict[tuple[str, str], set[int]] = defaultdict(set)
    for index, (symbols, count) in enumerate(words):
        for pair in pairwise(symbols):
            pair_counts[pair] += count
            words_with[pair].add(index)

    tokens = list(_BYTE_TO_CHAR)
    merges: list[tuple[str, str]] = []
    while len(tokens) < n_plain:
        if not pair_counts:
            raise ValueError(f"the text yields only {len(tokens)} of {n_plain} tokens")
        best = min(pair_counts, key=lambda pair: (-pair_counts[pair], pair))
        merges.append(best)
        tokens.append(best[0] + best[1])

        for index in words_with.pop(best):
            symbols, count = words[index]
            merged = _merge(symbols, *best)
            for pair in pairwise(symbols):
                pair_counts[pair] -= count
                if pair_counts[pair] <= 0:
                    del pair_counts[pair]
                if pair != best:
                    words_with[pair].discard(index)
            for pair in pairwise(merged):
                pair_counts[pair] += count
                words_with[pair].add(index)
            words[index] = (merged, count)

    tokens += specials
    # The engine asserts it (llama-vocab.cpp, id_to_token against token_to_id). Learnt tokens are
    # distinct anyway: a text is joined in one way only.
    if len(set(tokens)) != n_vocab:
        raise ValueError(f"specials must differ from each other and from the tokens: {specials}")
    return BytePairEncoding(tuple(tokens), tuple(merges), tuple(specials))
