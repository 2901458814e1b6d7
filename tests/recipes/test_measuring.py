"""What is measured in the loaded model, held against files that other programs made and read."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import gguf
import numpy as np
import pytest
from helpers.running import Run

import imatrix
from imatrix import Collector
from imatrix.demo import CALIBRATION, HELD_OUT, MODEL
from imatrix.engine.placement import Placement
from imatrix.errors import CheckpointError, ModelError
from imatrix.matrix.importance import ImportanceMatrix
from imatrix.native import engine
from imatrix.quantization.recipe import Recipe
from imatrix.recipes.measured import Measurement, identity_in, opened
from imatrix.recipes.measuring import Bench, Measurer, RecipeProgress
from imatrix.recipes.options import RecipeOptions, Target

N_CTX, CHUNKS = 64, 2
UP, OUT = "blk.1.ffn_up.weight", "blk.2.attn_output.weight"
# few and quick ones
TYPES = ("q4_k", "q6_k", "q8_0")


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("matrix") / "matrix.gguf"
    with Collector(MODEL, n_ctx=128, n_threads=1) as collector:
        collector.run(CALIBRATION, max_chunks=2, mtp=True).save(path)
    return path


def options(**more: object) -> RecipeOptions:
    given = {
        "model": MODEL,
        "targets": (Target("bpw", 6.0),),
        "effort": "quick",
        "types": TYPES,
        "n_ctx": N_CTX,
        "n_chunks": CHUNKS,
        "n_threads": 1,
        "placement": Placement(),
        "rehearse": False,
    }
    return RecipeOptions(**{**given, **more})  # type: ignore[arg-type]


@pytest.fixture
def bench(matrix: Path) -> Iterator[Bench]:
    with Bench(options(), ImportanceMatrix.load(matrix)) as found:
        found.load(with_head=False)
        found.read(HELD_OUT)
        yield found


def made(
    matrix: Path | None,
    measured: Path | None = None,
    progress: Callable[[RecipeProgress], object] | None = None,
    **more: object,
) -> list[Recipe]:
    given = {
        "bpw": 6.0,
        "effort": "quick",
        "types": TYPES,
        "head": "q8_0",
        "n_ctx": N_CTX,
        "max_chunks": CHUNKS,
        "n_threads": 1,
        "rehearse": False,
    }
    return imatrix.recipe(
        MODEL,
        matrix,
        HELD_OUT,
        measured=measured,
        progress=progress,
        **{**given, **more},  # type: ignore[arg-type]
    )


def values(tensor: gguf.ReaderTensor) -> np.ndarray:
    return gguf.quants.dequantize(np.array(tensor.data), tensor.tensor_type)


def with_values(path: Path, changed: dict[str, np.ndarray]) -> Path:
    """The model with other values in some tensors, in their own type, as gguf-py writes it."""
    reader = gguf.GGUFReader(MODEL)
    writer = gguf.GGUFWriter(path, reader.fields["general.architecture"].contents())
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            writer.add_key_value(key, field.contents(), field.types[0], field.types[-1])
    for tensor in reader.tensors:
        data = np.array(tensor.data)
        if tensor.name in changed:
            data = changed[tensor.name].astype(data.dtype).reshape(data.shape)
        writer.add_tensor(tensor.name, data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def quantized_values(
    matrix: Path, types: dict[str, str], folder: Path
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Values of these tensors in a file that the engine's quantizer wrote, and before."""
    out = folder / "quantized.gguf"
    rules = {f"^{name}$": kind for name, kind in types.items()}
    imatrix.quantize(MODEL, out, "F16", imatrix=matrix, tensor_types=rules, n_threads=1)
    after, before = (
        {t.name: values(t) for t in gguf.GGUFReader(path).tensors if t.name in types}
        for path in (out, MODEL)
    )
    return after, before


def evaluated(path: Path, chunks: Sequence[np.ndarray]) -> list[np.ndarray]:
    """KL to the model of each position, by chunk, as evaluate() finds it, but for the place of the
    weights: where the CPU has instructions for a matrix of F16, the engine may keep them for these,
    and rounds otherwise."""

    def loaded(path: Path) -> engine.Model:
        return engine.Model(
            str(path),
            mtp=False,
            n_gpu_layers=0,
            use_mmap=False,
            check_tensors=False,
            changeable=True,
        )

    evaluator = engine.Evaluator(loaded(path), reference=loaded(MODEL))
    evaluator.open(n_ctx=N_CTX, n_batch=N_CTX, n_ubatch=N_CTX, n_threads=1, depth=1)
    return [evaluator.step(chunk)["trunk"]["kl"] for chunk in chunks]


@pytest.mark.parametrize("types", [{UP: "q4_k"}, {UP: "iq2_xxs", OUT: "q6_k"}])
def test_a_trial_is_an_evaluation_of_the_file_with_these_values(
    types: dict[str, str], bench: Bench, matrix: Path, tmp_path: Path
) -> None:
    after, before = quantized_values(matrix, types, tmp_path)
    changed = with_values(tmp_path / "changed.gguf", after)
    expected = evaluated(changed, bench.chunks)
    measurer = Measurer(bench, Measurement({}), None)
    (trial,) = measurer.trials([types], "a trial")
    assert trial.kl == tuple(chunk.mean() for chunk in expected)
    assert measurer.measurement.positions == tuple(map(len, expected))
    mean = np.concatenate(expected).mean()  # added in another order
    assert measurer.measurement.mean(trial) == pytest.approx(mean, rel=1e-12)

    same = imatrix.evaluate(
        changed,
        HELD_OUT,
        reference=MODEL,
        mtp=False,
        n_ctx=N_CTX,
        max_chunks=CHUNKS,
        n_threads=1,
        rehearse=False,
    )
    assert same.kl is not None
    assert same.kl.n == sum(map(len, expected))
    # BF16 instructions for F16 weights, see above, which both models go through
    assert same.kl.value == pytest.approx(mean, rel=0.1)

    # the errors of a tensor with few rows are those of all its values
    weights = ImportanceMatrix.load(matrix)
    for name, kind in types.items():
        difference = (before[name].astype(np.float64) - after[name].astype(np.float64)) ** 2
        error = (difference * weights[name].importance.astype(np.float32)).sum()
        # the engine adds a row in float64 too, in another order
        assert bench.error(name, kind) == pytest.approx(error, rel=1e-6)

    # and all is as it was
    by_gguf = {t.name: t for t in gguf.GGUFReader(MODEL).tensors}
    native = bench.weights
    for name in types:
        source = np.frombuffer(np.array(by_gguf[name].data).tobytes(), np.uint8)
        assert not native.holds(name, source)
    measurer.finish(types)
    for name in native.names():
        source = np.frombuffer(np.array(by_gguf[name].data).tobytes(), np.uint8)
        assert native.holds(name, source), name


def test_trials_are_made_once_and_by_block(bench: Bench) -> None:
    done: list[int] = []
    measurer = Measurer(bench, Measurement({}), lambda each: done.append(each.done))
    late, early = {OUT: "q8_0"}, {UP: "q8_0"}
    first = measurer.trials([late, early, {}], "trials")
    assert [trial.types for trial in measurer.measurement.trials] == [early, late]
    assert [trial.types for trial in first] == [late, early, {}]
    assert first[2].kl == ()
    told = len(done)
    assert measurer.trials([early, late], "trials") == [first[1], first[0]]
    assert len(done) == told
    # one that begins later leaves what is before it alone: the same as from a fresh bench
    assert measurer.trials([{UP: "q8_0", OUT: "q8_0"}], "both")[0].kl != first[0].kl


def test_the_likeliest_logits_are_kept_if_there_is_no_room(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = CHUNKS * (N_CTX // 2 - 1)
    for room, top in ((4 * rows * 2048 * 4, 0), (4 * rows * 2048 * 4 - 4, 1023), (0, 1)):
        monkeypatch.setattr("imatrix.recipes.measuring.available_memory", lambda room=room: room)
        bench.choose_top(None)
        assert bench.top == top
    bench.choose_top(5)  # what the measurement has that is gone on from
    assert bench.top == 5


# --- the whole way --------------------------------------------------------------------------------


def test_files_have_the_bytes_that_recipes_say(matrix: Path, tmp_path: Path) -> None:
    sizes = (4_500_000, 3_900_000)
    recipes = made(matrix, size=sizes, bpw=6.5, kl=0.01)
    for recipe, most in zip(recipes, (*sizes, None, None), strict=True):
        out = tmp_path / "out.gguf"
        done = imatrix.quantize(MODEL, out, imatrix=matrix, recipe=recipe, n_threads=1)
        assert out.stat().st_size == recipe.bytes <= (most or recipe.bytes)
        assert done.bits_per_weight == pytest.approx(recipe.bits_per_weight, rel=1e-12)
        found = {t.name: t.tensor_type.name.lower() for t in gguf.GGUFReader(out).tensors}
        assert {name: found[name] for name in recipe.types} == dict(recipe.types)
        assert {name for name, kind in found.items() if kind not in ("f32", "f16")} <= set(
            recipe.types
        )
    # no smaller step would have fitted: one block of the smallest tensor is less than this
    assert sizes[0] - recipes[0].bytes < 0.02 * sizes[0]
    assert recipes[2].bits_per_weight <= 6.5
    by_kl = recipes[3]
    assert by_kl.measured_kl is not None
    assert by_kl.measured_kl.value <= 0.01
    assert by_kl.bytes < recipes[0].bytes
    # what was measured is what evaluate() finds of the recipe's values
    imatrix.quantize(MODEL, out, imatrix=matrix, recipe=by_kl, n_threads=1)
    after = {
        t.name: values(t)
        for t in gguf.GGUFReader(out).tensors
        if t.name in by_kl.types and not t.name.startswith("blk.4.")
    }
    chunks = imatrix.evaluate(
        MODEL, HELD_OUT, mtp=False, n_ctx=N_CTX, max_chunks=CHUNKS, n_threads=1
    )
    assert by_kl.measured_kl.positions == len(chunks.chunk)
    with Bench(options(), None) as bench:
        bench.load(with_head=False)
        bench.read(HELD_OUT)
        kl = evaluated(with_values(tmp_path / "values.gguf", after), bench.chunks)
    assert by_kl.measured_kl.value == pytest.approx(np.concatenate(kl).mean(), rel=1e-12)


@pytest.mark.parametrize("head", ["drop", "auto", "keep"])
def test_the_head_counts_for_the_bytes(head: str, matrix: Path, tmp_path: Path) -> None:
    most = {"drop": 4_000_000, "auto": 6_000_000, "keep": 6_500_000}[head]
    recipe = made(matrix, head=head, size=most, bpw=None, types=["q8_0"])[0]
    assert recipe.head is not None
    model = tmp_path / "model.gguf"
    model.symlink_to(MODEL)
    if recipe.head.label == "dropped":
        model = tmp_path / recipe.model
        imatrix.drop_mtp(MODEL, model)
        assert not any(name.startswith("blk.4.") for name in recipe.types)
    assert (recipe.head.label == "dropped") or head != "drop"
    out = tmp_path / "out.gguf"
    imatrix.quantize(model, out, imatrix=matrix, recipe=recipe, n_threads=1)
    assert out.stat().st_size == recipe.bytes <= most
    head_bytes = sum(
        int(t.n_bytes) for t in gguf.GGUFReader(out).tensors if t.name.startswith("blk.4.")
    )
    assert head_bytes == recipe.head.bytes
    if head == "keep":
        assert recipe.head.label == "as it is"


class _StopError(Exception):
    pass


def test_interrupted_and_gone_on(matrix: Path, tmp_path: Path) -> None:
    """Killed after any line, in the midst of a line too: the same file and the same recipe."""
    quick = {"types": ["q8_0"], "bpw": 10.0}
    whole = tmp_path / "whole.measured"
    expected = made(matrix, whole, **quick)[0]
    lines = whole.read_bytes().splitlines(keepends=True)
    assert len(lines) > 20
    assert made(matrix, whole, **quick)[0] == expected  # nothing is measured again
    assert whole.read_bytes() == b"".join(lines)

    part = tmp_path / "part.measured"

    def stop(progress: RecipeProgress) -> None:
        if progress.what == "groups of tensors" and progress.done == 7:
            raise _StopError

    with pytest.raises(_StopError):
        made(matrix, part, stop, **quick)
    before = part.read_bytes()
    assert before == b"".join(lines)[: len(before)]
    for n_lines, torn in ((0, 9), (1, 0), (5, 30), (len(lines) - 1, 12)):
        end = sum(map(len, lines[:n_lines])) + torn
        part.write_bytes(b"".join(lines)[:end])
        before = part.stat()
        found = made(matrix, part, **quick)[0]
        assert found == expected
        assert found.frontier is not None
        assert expected.frontier is not None
        assert found.frontier.as_data() == expected.frontier.as_data()
        assert part.read_bytes() == b"".join(lines)
        if n_lines:  # whole lines are not written anew
            assert part.stat().st_ino == before.st_ino
    assert not list(tmp_path.glob("*.lock"))


def test_what_cannot_be_gone_on_from(matrix: Path, tmp_path: Path) -> None:
    measured = tmp_path / "x.measured"
    with opened(measured, {"n_ctx": 64, "chunks": 2}) as found:
        found.set_positions((3, 3))
        found.add_trial({UP: "q4_k"}, (0.1, 1 / 3))
        found.add_errors(UP, {"q4_k": 0.1})
    assert identity_in(measured) == {"n_ctx": 64, "chunks": 2}
    with opened(measured, {"n_ctx": 64, "chunks": 2}) as found:
        trial = found.trial({UP: "q4_k"})
        assert trial is not None
        assert trial.kl == (0.1, 1 / 3)
        assert found.mean(trial) == pytest.approx((0.1 + 1 / 3) / 2)
        assert found.error(UP, "q4_k") == 0.1
    content = measured.read_bytes()
    with (
        pytest.raises(CheckpointError, match="chunks is 2 there and 3 here"),
        opened(measured, {"n_ctx": 64, "chunks": 3}),
    ):
        pass
    for damage, told in (
        (content.replace(b'"version": 1', b'"version": 2'), "another version"),
        (b"a list of shopping\n", "is no measurement"),
        (b"a list without an end", "is no measurement"),
        (content.replace(b'"kl"', b'"lk"'), "line 3"),
    ):
        measured.write_bytes(damage)
        with (
            pytest.raises(CheckpointError, match=told),
            opened(measured, {"n_ctx": 64, "chunks": 2}),
        ):
            pass
        assert measured.read_bytes() == damage
    with opened(measured, {"n_ctx": 64, "chunks": 3}, restart=True) as found:
        assert found.trials == ()
    assert json.loads(measured.read_bytes())["identity"]["chunks"] == 3


def test_errors(matrix: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"bytes is below the smallest .* bytes \(\d.*\) to \d+"):
        made(matrix, size=100_000)
    with pytest.raises(ValueError, match="above the largest"):
        made(matrix, size="1G")
    with pytest.raises(ValueError, match=r"8 bits per weight .*: \d\.\d+ to \d+\.\d+ bits"):
        made(matrix, bpw=2.8)
    with pytest.raises(ValueError, match=r"too short: it gives 1 chunk .* 1024 tokens"):
        imatrix.recipe(
            MODEL,
            matrix,
            "A short text.",
            bpw=10,
            n_ctx=512,
            max_chunks=2,
            n_threads=1,
            rehearse=False,
            head="keep",
            types=TYPES,
        )
    quantized = tmp_path / "q.gguf"
    imatrix.quantize(MODEL, quantized, "Q4_0", n_threads=1)
    with pytest.raises(ModelError, match="is quantized already"):
        imatrix.recipe(quantized, matrix, HELD_OUT, bpw=3, n_threads=1)
    with pytest.raises(ValueError, match="nothing to choose for"):
        imatrix.recipe(MODEL, matrix, HELD_OUT)
    entries = dict(ImportanceMatrix.load(matrix))
    entries[UP] = imatrix.Entry(np.ones((1, 32)), [3])
    with pytest.raises(ValueError, match="imatrix adapt"):
        imatrix.recipe(MODEL, ImportanceMatrix(entries), HELD_OUT, bpw=10, head="keep", types=TYPES)


def test_the_calibrations_text_is_warned_of(matrix: Path) -> None:
    with pytest.warns(UserWarning, match="seems to be what the matrix was collected from"):
        imatrix.recipe(
            MODEL,
            matrix,
            CALIBRATION,
            bpw=10,
            effort="quick",
            types=["q8_0"],
            head="q8_0",
            n_ctx=N_CTX,
            max_chunks=CHUNKS,
            n_threads=1,
            rehearse=False,
        )


def test_without_a_matrix_only_types_that_need_none(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "recipe.json"
    done = run(
        *("recipe", MODEL, "-f", HELD_OUT, "--bpw", "8", "--effort", "quick", "--head", "q8_0"),
        *("--types", "iq3_xxs,q6_k", "--chunks", CHUNKS, "-c", N_CTX, "-t", "1", "-o", out),
    )
    assert done.status == 0, done.err
    assert "there is no matrix: 32 tensors can get only types that need none" in done.err
    recipe = Recipe.load(out)
    assert "iq3_xxs" not in recipe.types.values()
    assert f"--recipe {out}" in done.err
    assert recipe.text == "held-out.txt"
    # several sizes: a file for each, from what is there already
    before = out.with_name("recipe.json.measured").read_bytes()
    done = run(
        *("recipe", MODEL, "-f", HELD_OUT, "--bpw", "8,8.0", "--size", "7M,7168K", "--kl", "0.5"),
        *("--effort", "quick", "--head", "q8_0", "--types", "iq3_xxs,q6_k", "--chunks", CHUNKS),
        *("-c", N_CTX, "-t", "1", "-o", out),
    )
    assert done.status == 0, done.err
    assert out.with_name("recipe.json.measured").read_bytes().startswith(before)
    assert sorted(path.name for path in tmp_path.glob("*.json")) == [
        *("recipe-7M.json", "recipe-8bpw.json", "recipe-kl0.5.json", "recipe.json")
    ]
    assert Recipe.load(tmp_path / "recipe-8bpw.json") == recipe
