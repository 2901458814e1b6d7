"""Runs llama-speculative-simple, and reads from its log what was drafted and accepted."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

import gguf

from helpers.running import run_tool, until_printed
from imatrix import Collector, evaluate

# If the ratio of the head's two likeliest tokens is below this, the rounding of other batches may
# exchange them. The ratio comes from the engine's log, whose probabilities have 3 decimals.
CLOSE_CALL = 1.1
NOT_LOGGED = -1


@dataclass
class Draft:
    slot: int  # position of the token that the draft continues
    tokens: list[int] = field(default_factory=list)
    accepted: int = 0
    restored: bool = False  # the trunk went back to the position before it, see speculate()
    close: bool = False  # one of its tokens was practically chosen by lot


@dataclass
class Decoding:
    tokens: list[int]  # the prompt, and the text that was written
    drafts: list[Draft]
    # share of drafts whose token at that place was accepted; empty if the program ended early
    per_position: list[float]


_CANDIDATE = re.compile(r"draft candidate +(\d+), pos +(\d+): +(\d+) \( *([\d.]+)\)")
_TRUNCATED = re.compile(r"truncating draft to (\d+) tokens")
_RESTORED = re.compile(r"partial acceptance: (\d+) < (\d+), restoring checkpoint")
_ACCEPTED = re.compile(r"accepted (\d+)/(\d+) draft tokens, the last target token is: \((\d+)\)")
_RATES = re.compile(r"#acc rate/pos = \(([\d., ]*)\)")


def speculate(
    tool: Path, model: Path, prompt: str, n_predict: int, n_max: int, *more: str
) -> Decoding:
    """What the engine's program does, by its log.

    more: further flags of it.
    """
    with Collector(model, rehearse=False) as collector:
        tokens = [int(t) for t in collector.tokenize(prompt, parse_special=True)]
    eos = int(gguf.GGUFReader(model).fields["tokenizer.ggml.eos_token_id"].contents())
    # fmt: off
    log = until_printed("target:", lambda: run_tool(
        tool, "-m", model, "-p", prompt, "-n", str(n_predict), "-c", "512", "-t", "1", "-td", "1",
        "--spec-type", "draft-mtp", "--spec-draft-n-max", str(n_max), "--spec-draft-p-min", "0",
        "--temp", "0", "-lv", "5", *more,
    ))
    # fmt: on
    assert f"encoded {len(tokens):4d} tokens" in log
    drafts: list[Draft] = []
    draft: Draft | None = None
    best = 0.0
    for line in log.splitlines():
        if found := _CANDIDATE.search(line):
            rank, place, token, share = (*map(int, found.groups()[:3]), float(found[4]))
            if draft is None:
                draft = Draft(len(tokens) - 1)
            if rank == 0:
                assert place == len(draft.tokens)
                draft.tokens.append(token)
                best = share
            elif rank == 1:
                draft.close |= share * CLOSE_CALL >= best
        elif found := _TRUNCATED.search(line):
            assert draft is not None
            del draft.tokens[int(found[1]) :]
        elif found := _RESTORED.search(line):
            # A trunk whose state cannot be cut short goes back to the position before the draft,
            # and decodes the accepted tokens and its own token again, as if these were the draft.
            assert draft is not None
            draft.accepted, draft.restored = int(found[1]), True
            assert int(found[2]) == len(draft.tokens)
        elif found := _ACCEPTED.search(line):
            n, last = int(found[1]), int(found[3])
            assert draft is not None
            if last == eos:  # maybe amid the draft: the log lacks the tokens before it
                return Decoding(tokens, drafts, [])
            if draft.restored:  # its own token, which it does not log, counts as an accepted one
                assert n == draft.accepted + 1
                tokens += [*draft.tokens[: n - 1], NOT_LOGGED, last]
            else:
                draft.accepted = n
                assert int(found[2]) == len(draft.tokens)
                tokens += [*draft.tokens[:n], last]
            drafts.append(draft)
            draft = None
    rates = _RATES.search(log)
    assert rates
    return Decoding(tokens, drafts, [float(r) for r in rates[1].split(",") if r.strip()])


def fill_in_tokens(model: Path, tokens: list[int]) -> None:
    """Fill in the tokens that the log leaves out: each is what the trunk predicts after those
    before it."""
    while NOT_LOGGED in tokens:
        i = tokens.index(NOT_LOGGED)
        # fmt: off
        found = evaluate(model, [[*tokens[:i], 0]], n_ctx=i + 1, mtp=False, n_threads=1,
                         rehearse=False)
        # fmt: on
        tokens[i] = int(found.trunk.top[-1])


# Prompts for the trained model.
ENGLISH = """\
A queue is a list of things that wait. The first thing that was put into the queue is the first one
that is taken out of it. If the queue is empty, the caller waits until another thread puts something
into it, or until the time that was given is over; then an exception is raised. The size of a queue
may be limited. If it is full, the caller who wants to put something into it has to wait as well.

A stack is the other way round. The last thing that was put on top of it is the first one to be
taken away. Both can be made of a list, but taking the first element from a list is slow, because
all the others have to be moved by one place. A deque, which is made of blocks that are linked to
each other, gives both ends in the same time. It is safe to use
"""
PYTHON = """\
class Counter:
    \"\"\"Count how often each element of an iterable appears.\"\"\"

    def __init__(self, iterable=None):
        self._counts = {}
        if iterable is not None:
            self.update(iterable)

    def update(self, iterable):
        \"\"\"Add the elements of an iterable to the counts.\"\"\"
        for element in iterable:
            self._counts[element] = self._counts.get(element, 0) + 1

    def most_common(self, n=None):
        \"\"\"Return a list of the n most common elements and their counts.\"\"\"
        items = sorted(self._counts.items(), key=lambda item: item[1], reverse=True)
        if n is None:
            return items
        return items[:n]

    def __getitem__(self, element):
        return self._counts.get(element, 0)

    def __setitem__(self, element, count):
"""
