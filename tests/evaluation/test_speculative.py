"""Compares draft agreement with the engine's own speculative decoding.

llama-speculative-simple (examples/speculative-simple in llama.cpp) decodes greedily with the head
as its drafter. It logs each draft, how much of it the trunk accepted, and the token that came
after, all by its own code. evaluate() then gets the prompt together with the text that the engine
wrote.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from helpers import oracle
from helpers.forge import Arch
from helpers.heads import agreeing
from helpers.running import EngineTool, run_tool, trained_models, until_printed

from imatrix import Collector, evaluate

pytestmark = [
    pytest.mark.engine("examples/speculative-simple", "what the engine's own drafting accepts"),
]

DEPTH = 4
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


def speculate(tool: Path, model: Path, prompt: str, n_predict: int, n_max: int) -> Decoding:
    """What the engine's program does, by its log."""
    with Collector(model, rehearse=False) as collector:
        tokens = [int(t) for t in collector.tokenize(prompt, parse_special=True)]
    eos = int(gguf.GGUFReader(model).fields["tokenizer.ggml.eos_token_id"].contents())
    # fmt: off
    log = until_printed("target:", lambda: run_tool(
        tool, "-m", model, "-p", prompt, "-n", str(n_predict), "-c", "512", "-t", "1", "-td", "1",
        "--spec-type", "draft-mtp", "--spec-draft-n-max", str(n_max), "--spec-draft-p-min", "0",
        "--temp", "0", "-lv", "5",
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


def compare(model: Path, said: Decoding, depth: int) -> tuple[int, int]:
    """Assert that evaluate() accepts of every draft what the engine accepted.

    Returns:
        The number of drafts that were compared, and of those that were not because rounding decided
        them.
    """
    fill_in_tokens(model, said.tokens)
    n = len(said.tokens)
    found = evaluate(model, [said.tokens], n_ctx=n, depth=depth, n_threads=1, rehearse=False)
    assert said.drafts[0].slot >= found.position[0], "the prompt is too short for what was written"
    ours, theirs, close = [], [], 0
    for draft in said.drafts:
        [i] = np.flatnonzero(found.position == draft.slot)
        after = range(i, min(i + draft.accepted + 1, n - 1 - found.position[0]))
        greedy = all(found.trunk.top[j] == said.tokens[found.position[j] + 1] for j in after)
        got = min(int(found.accepted[i]), len(draft.tokens))
        if got != draft.accepted and (draft.close or not greedy):
            close += 1
            continue
        ours.append((draft.slot, got))
        theirs.append((draft.slot, draft.accepted))
    assert ours == theirs
    if close == 0 and said.per_position:
        # the engine's own summary; it counts one token too many for a draft that was decoded again
        rates = [
            np.mean([d.accepted + d.restored >= k for d in said.drafts])
            for k in range(1, len(said.per_position) + 1)
        ]
        assert said.per_position == pytest.approx(rates, abs=5.1e-4)  # 3 decimals
    return len(ours), close


# The seeds were found by trying: these texts do not end at once, and drafts are cut at every depth.
FORGED: dict[str, tuple[Arch, dict[str, Any]]] = {
    "glm4moe": ("glm4moe", {"n_nextn": 1, "seed": 7}),
    "qwen35": ("qwen35", {"n_nextn": 1, "seed": 2}),
    "chain of 2": ("hy_v3", {"n_nextn": 2, "seed": 6}),
}


@pytest.mark.parametrize("case", FORGED)
def test_forged_models_draft_as_the_engine_does(
    case: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    engine_tool: EngineTool,
    prose: str,
) -> None:
    arch, options = FORGED[case]
    model = agreeing(tmp_path / "model.gguf", arch, monkeypatch, blur=0.1, **options).path
    said = speculate(engine_tool("llama-speculative-simple"), model, prose[:300], 60, DEPTH)
    compared, close = compare(model, said, DEPTH)
    assert compared >= 20
    assert close <= 1
    deepest = 2 if case == "chain of 2" else DEPTH
    assert {draft.accepted for draft in said.drafts} == set(range(deepest + 1))


def test_a_chain_of_three_differs_where_the_engine_reads_another_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine_tool: EngineTool, prose: str
) -> None:
    """The driver asks for the row of the last token of a batch with masked rows. If the graph of an
    architecture keeps all rows (src/models/hy-v3.cpp), the engine then gives the first one
    (llama-context.cpp, extract nextn embeddings), so that from the third head on a draft continues
    from a row of another slot. evaluate() takes the row that is meant. The first two tokens are the
    same as ever.
    """
    spec = agreeing(tmp_path / "m.gguf", "hy_v3", monkeypatch, blur=0.15, n_nextn=3, seed=8)
    tool = engine_tool("llama-speculative-simple")
    assert compare(spec.path, speculate(tool, spec.path, prose[:80], 40, 2), 2)[1] <= 1

    said = speculate(tool, spec.path, prose[:80], 40, 3)
    forward = oracle._Forward(spec, np.float16, False)
    text = np.asarray(said.tokens)
    h, _ = forward.trunk(text, False)
    same = {"meant": 0, "first": 0}
    clear = [d for d in said.drafts if len(d.tokens) == 3 and not d.close][:12]
    for draft in clear:
        for row, last in (("meant", -1), ("first", draft.slot)):
            states, fed = [*oracle.pair(h, "shifted")[: draft.slot + 1]], [*text[: draft.slot + 1]]
            for k in range(3):
                rows, logits = forward.head(k, np.asarray(fed), [np.stack(states)], False)
                fed.append(draft.tokens[k])
                states.append(rows[last])
            same[row] += int(logits[-1].argmax()) == draft.tokens[2]
    assert len(clear) > 10
    assert same["first"] == len(clear)
    assert same["meant"] < len(clear) / 2


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


@pytest.mark.parametrize("model", trained_models(), ids=lambda path: path.stem)
def test_the_trained_model_drafts_as_the_engine_does(model: Path, engine_tool: EngineTool) -> None:
    tool = engine_tool("llama-speculative-simple")
    compared = close = 0
    for prompt in (ENGLISH, PYTHON):
        more, less = compare(model, speculate(tool, model, prompt, 150, DEPTH), DEPTH)
        compared, close = compared + more, close + less
    assert compared > 30
    assert close <= 0.05 * compared
