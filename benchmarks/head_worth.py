"""Which type the shipped model's draft head should have, and whether it is worth its memory.

    python benchmarks/head_worth.py    # writes benchmarks/results/head-worth.md; minutes, resumable

The head is quantized in the loaded model to every candidate of imatrix.recipes.heads, behind a trunk of
three mixtures, which is quantized in place as well. Then the engine's own program,
llama-speculative-simple, drafts with files whose heads have the chosen types, and its log says what was
accepted (tests/helpers/speculative.py).
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from helpers import engine_tools, speculative  # noqa: E402
from store import machine  # noqa: E402

import imatrix  # noqa: E402
from imatrix import demo  # noqa: E402
from imatrix.engine.quantizing import HereQuantizer  # noqa: E402
from imatrix.evaluation.estimates import Difference, Estimate  # noqa: E402
from imatrix.native import engine, quantizer  # noqa: E402
from imatrix.recipes.head_table import HeadTable  # noqa: E402
from imatrix.recipes.heads import (  # noqa: E402
    AS_IT_IS,
    HeadCandidate,
    HeadFiles,
    HeadTrial,
    head_candidates,
    measure_head,
)
from imatrix.text import chunks as texts  # noqa: E402
from imatrix.words import plural, size  # noqa: E402

RESULTS = Path(__file__).parent / "results"
KEPT = ROOT / "build" / "head-worth"  # trials, by trunk
N_CTX, DEPTH, N_THREADS = 256, 4, 1
HELD_OUT = {"held-out.txt": 24, "held-out-prose.txt": 12}  # chunks of each
TRUNKS = (AS_IT_IS, "Q4_K_M", "IQ2_XXS")
N_PREDICT = 120
# With quantized weights activations are rounded to 8 bits, and another batch moves a token's share by
# more than the tests allow for F16.
speculative.CLOSE_CALL = 1.2


def types_of(ftype: str, matrix: imatrix.ImportanceMatrix, files: HeadFiles) -> dict[str, str]:
    """The trunk's types in a mixture of llama-quantize."""
    if ftype == AS_IT_IS:
        return {}
    names = set(files.trunk_names)
    found = imatrix.coverage(demo.MODEL, matrix, ftype)
    return {
        t.name: t.target_type
        for t in found.tensors
        if t.name in names and t.source_type != t.target_type
    }


def kept_file(ftype: str) -> Path:
    """Where trials are kept: with a name for what they were made of."""
    digest = hashlib.sha256(repr((ftype, N_CTX, DEPTH, HELD_OUT)).encode()).hexdigest()[:12]
    return KEPT / f"{digest}.jsonl"


def kept(ftype: str) -> dict[str, HeadTrial]:
    """Trials of an earlier run."""
    path = kept_file(ftype)
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    found = [HeadTrial.of_data(json.loads(line)) for line in lines]
    return {trial.label: trial for trial in found}


def keeper(ftype: str) -> Callable[[HeadTrial], None]:
    """Keeps a trial for a later run."""
    KEPT.mkdir(parents=True, exist_ok=True)

    def keep(trial: HeadTrial) -> None:
        with kept_file(ftype).open("a", encoding="utf-8") as file:
            file.write(json.dumps(trial.as_data()) + "\n")

    return keep


def tables(files: HeadFiles, matrix: imatrix.ImportanceMatrix) -> dict[str, HeadTable]:
    """A table for each trunk."""
    model = engine.Model(
        str(demo.MODEL), mtp=True, n_gpu_layers=0, use_mmap=False, check_tensors=False,
        changeable=True,
    )  # fmt: skip
    held_out: list[NDArray[np.int32]] = [
        chunk
        for name, n in HELD_OUT.items()
        for chunk in texts.chunks(demo.MODEL.with_name(name), model, N_CTX, max_chunks=n)
    ]
    evaluator = engine.Evaluator(model, model)
    evaluator.open(n_ctx=N_CTX, n_batch=N_CTX, n_ubatch=N_CTX, n_threads=N_THREADS, depth=DEPTH)
    weights = engine.Weights(model)
    weights.set_threads(N_THREADS)
    candidates = head_candidates(files, matrix, HereQuantizer())
    numbers = quantizer.tensor_types()
    found = {}
    for ftype in TRUNKS:
        types = types_of(ftype, matrix, files)
        for name, kind in types.items():
            tensor = files.trunk.tensors[name]
            source = np.fromfile(tensor.path, np.uint8, tensor.size, offset=tensor.start)
            entry = matrix.get(name)
            importance = None if entry is None else entry.importance.astype(np.float32).ravel()
            weights.quantize(name, numbers[kind][0], source, importance)

        def tell(done: int, total: int, ftype: str = ftype) -> None:
            print(f"\r{ftype}: {done} of {total} chunks", end="", file=sys.stderr, flush=True)

        trials = measure_head(
            evaluator, weights, files, candidates.offered, held_out, matrix, depth=DEPTH,
            known=kept(ftype), done=keeper(ftype), progress=tell,
        )  # fmt: skip
        print(file=sys.stderr)
        found[ftype] = HeadTable(files, candidates, trials, types)
    return found


class Drafted(NamedTuple):
    """Drafts that two programs judged.

    Attributes:
        n: how many.
        apart: those of which the two say something else.
        unexplained: those of `apart` that no rounding decides.
        theirs, ours: accepted a draft, by the program's log, and by the evaluator on the text that it
            wrote.
    """

    n: int
    apart: int
    unexplained: int
    theirs: float
    ours: float


def drafted(
    ftype: str, head: HeadCandidate, matrix: imatrix.ImportanceMatrix, folder: Path, depth: int
) -> Drafted:
    """What the engine's program accepts with a file of these types."""
    model: Path = demo.MODEL
    if ftype != AS_IT_IS or head.types:
        model = folder / f"{ftype}.{head.label}.gguf".replace(" ", "-")
        rules = [(f"^{name}$", kind) for name, kind in head.types.items()]
        base = "F16" if ftype == AS_IT_IS else ftype
        imatrix.quantize(demo.MODEL, model, base, imatrix=matrix, tensor_types=rules)
    tool = engine_tools.find("llama-speculative-simple")
    theirs: list[int] = []
    ours: list[int] = []
    apart = unexplained = 0
    prose = demo.MODEL.with_name("held-out-prose.txt").read_text("utf-8")
    prompts = [speculative.ENGLISH, speculative.PYTHON]
    prompts += [prose[at : at + 900] for at in (0, 20_000, 40_000, 60_000)]
    for prompt in prompts:
        # -nr and changeable: no buffers that keep weights in an order of their own, which round
        # otherwise: the same in both
        said = speculative.speculate(tool, model, prompt, N_PREDICT, depth, "-nr")
        loaded = engine.Model(
            str(model), mtp=True, n_gpu_layers=0, use_mmap=False, check_tensors=False,
            changeable=True,
        )  # fmt: skip
        n = len(said.tokens)
        evaluator = engine.Evaluator(loaded, loaded)
        evaluator.open(n_ctx=n, n_batch=n, n_ubatch=n, n_threads=N_THREADS, depth=depth)
        found = evaluator.step(np.asarray(said.tokens, np.int32))
        at = {n // 2 + i: i for i in range(len(found["known"]))}  # of the second half
        top = found["trunk"]["top"]
        for draft in said.drafts:
            if draft.slot not in at or len(draft.tokens) != depth:
                continue
            first = at[draft.slot]
            got = int(found["accepted"][first])
            theirs.append(draft.accepted)
            ours.append(got)
            if got == draft.accepted:
                continue
            # as tests/evaluation/test_speculative.py has it: two tokens of the head were nearly
            # equal, or the trunk would say something else in this batch
            after = range(first, min(first + draft.accepted + 1, len(top)))
            greedy = all(top[i] == said.tokens[n // 2 + i + 1] for i in after)
            apart += 1
            unexplained += not draft.close and greedy
    return Drafted(len(theirs), apart, unexplained, float(np.mean(theirs)), float(np.mean(ours)))


def figure(found: Estimate) -> str:
    sign = "+" if isinstance(found, Difference) else ""
    places = 3 if isinstance(found, Difference) else 2
    value, low, high = (
        f"{number:{sign}.{places}f}" for number in (found.value, found.low, found.high)
    )
    return f"{value} ({low} to {high})"


def section(ftype: str, table: HeadTable) -> list[str]:
    """One trunk."""
    decision = table.choose()
    row = table.rows[0]
    chosen = None if decision.candidate is None else decision.candidate.label
    lines = [
        f"## Trunk: {'F16, as it is' if ftype == AS_IT_IS else ftype}",
        "",
        f"The trunk reads {size(row.trunk_bytes)} a token. Drafts of "
        f"{plural(table.depth, 'token')} pay best.",
        "",
        "| head | bytes | read a draft | accepted | beside as it is | speed-up | beside as it is | "
        "cautious |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in table.rows:
        first = row.label == AS_IT_IS
        label = f"**{row.label}**" if row.label == chosen else row.label
        lines.append(
            f"| {label} | {size(row.bytes)} | {size(row.draft_bytes)} | {figure(row.accepted)} | "
            f"{'' if first else figure(row.difference)} | {figure(row.speed_up)} | "
            f"{'' if first else figure(row.speed_up_difference)} | {row.cautious:.2f} |"
        )
    told = [decision.why, *decision.notes]
    lines += ["", *(f"- {text[0].upper()}{text[1:]}." for text in told), ""]
    return lines


def spoken(found: Mapping[str, HeadTable], matrix: imatrix.ImportanceMatrix) -> list[str]:
    """Beside llama-speculative-simple."""
    lines = [
        "## Beside llama-speculative-simple",
        "",
        f"Files whose heads have the chosen types, six prompts, {N_PREDICT} tokens written greedily "
        "after each. `engine`: accepted tokens a draft, by the program's log. `here`: of the same "
        "drafts, by the evaluator of `imatrix.evaluate` on the text that it wrote. `apart`: drafts of "
        "which the two say something else. `unexplained`: those of them in which neither two tokens of "
        "the head were nearly equal nor the trunk would say something else in the other batch, as the "
        "tests have it. `held-out`: the figure of the tables, on text that "
        "the model did not write; a model is easier to draft for on its own text.",
        "",
        "| trunk | head | drafts | apart | unexplained | engine | here | held-out |",
        "|---|---|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        for ftype, table in found.items():
            best = table.best or max(table.rows, key=lambda row: row.speed_up.value)
            got = drafted(ftype, best.candidate, matrix, Path(folder), table.depth)
            lines.append(
                f"| {ftype} | {best.label} | {got.n} | {got.apart} | {got.unexplained} | "
                f"{got.theirs:.3f} | {got.ours:.3f} | {figure(best.accepted)} |"
            )
    return [*lines, ""]


def main() -> None:
    files = HeadFiles.read(demo.MODEL)
    with imatrix.Collector(demo.MODEL, n_threads=N_THREADS) as collector:
        matrix = collector.run(demo.CALIBRATION, mtp=True)
    found = tables(files, matrix)
    n_chunks = " and ".join(f"{n} of {name}" for name, n in HELD_OUT.items())
    lines = [
        "# What a draft head's type is worth",
        "",
        f"{date.today()}, {machine()}. The shipped model; chunks of {N_CTX} tokens: {n_chunks}. "
        f"Drafts of 1 to {DEPTH} tokens were measured, and the tables have the depth with the largest "
        "speed-up. Intervals are 95 %, from a bootstrap over chunks; differences are paired. The head "
        "and the trunk are quantized in the loaded model, with data of the shipped calibration text. "
        "Speed-ups are expected ones, by bytes read: [which type for the "
        "head](../../docs/head-worth.md) has the formula. Nothing was timed. Made by "
        "benchmarks/head_worth.py.",
        "",
        "The shipped model is no large one: its head is one block beside four, and its LM head, which "
        "every drafted token reads again, is a sixth of what the trunk reads, more if that is quantized. In a model of 40 to 90 "
        "blocks both are a few hundredths, and a head pays far sooner.",
        "",
    ]
    for ftype, table in found.items():
        lines += section(ftype, table)
    lines += spoken(found, matrix)
    (RESULTS / "head-worth.md").write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
