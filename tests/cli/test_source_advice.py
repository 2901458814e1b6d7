"""What `imatrix collect` says of a slow type, with a probe that the test has made up, and that the
command it gives works."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from helpers.forge import ModelSpec
from helpers.running import TEXT, Forged, Run

from imatrix.cli import source_advice
from imatrix.collect.collector import Collector
from imatrix.engine import loading
from imatrix.engine.models import Models
from imatrix.engine.products import ProductShape, ProductTimes, Timed
from imatrix.matrix.importance import ImportanceMatrix

_SAYS = re.compile(
    r"^F16 is a slow type on this CPU: products of its weights run at (\S+), those of BF16 at (\S+) "
    r"GFLOP/s, so that a run of the same model in BF16 would take about (\S+) of the time "
    r"\(BF16 keeps 8 of F16's 11 significant bits, and more than its range\)\. "
    r"To convert: (.*) \(--no-advice: say nothing of this\)$",
    re.MULTILINE,
)


@pytest.fixture
def probes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """The types that were asked about. A multiplication by F16 takes 4 seconds, so that products are
    all that a run does, by BF16 one. Every run is long enough."""
    asked: list[tuple[str, ...]] = []

    def measure(shapes: Sequence[ProductShape], types: Sequence[str], *, n_threads: int) -> Timed:
        assert n_threads == 1
        asked.append(tuple(types))
        seconds = {kind: 1.0 if kind == "bf16" else 4.0 for kind in types}
        return tuple(
            {kind: ProductTimes(each, each, 8) for kind, each in seconds.items()} for _ in shapes
        )

    monkeypatch.setattr(loading, "measure", measure)
    monkeypatch.setattr(Models, "on_cpu", property(lambda _self: True))
    monkeypatch.setattr(source_advice, "_WORTH", 0.0)
    return asked


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT[:2000], encoding="utf-8")
    return path


def flags(model: object, text: Path, out: Path, *more: object) -> list[object]:
    """One chunk a decode; without a process of its own the probe is the test's."""
    return [
        "collect", "-m", model, "-f", text, "-o", out, "-c", 64, "-b", 64, "-t", 1, "--chunks", 3,
        "--no-isolate", "--no-ppl", *more,
    ]  # fmt: skip


def headed(forged: Forged, tmp_path: Path, name: str = "some model-F16.gguf") -> Path:
    path = tmp_path / name
    path.write_bytes(forged("qwen35", seed=2, n_nextn=1, dtype="F16").path.read_bytes())
    return path


def test_it_is_said_once_with_a_command_that_works(
    forged: Forged, text: Path, run: Run, tmp_path: Path, probes: list[tuple[str, ...]]
) -> None:
    model = headed(forged, tmp_path)
    done = run(*flags(model, text, tmp_path / "out.gguf", "--mtp"))
    assert (done.status, done.out) == (0, "")
    [said] = _SAYS.findall(done.err)
    slow, fast, time, command = said
    # a multiplication and an addition in four seconds, and in one
    assert (float(slow), float(fast)) == (5e-10, 2e-9)
    assert time == "0.25"
    assert len(probes) == 1
    imatrix, *words = shlex.split(command)
    assert imatrix == "imatrix"
    converted = tmp_path / "some model-BF16.gguf"
    assert words == ["quantize", str(model), str(converted), "BF16"]
    assert run(*words).status == 0

    # the converted model is the fastest: it is collected from, head included, and nothing is said
    out = tmp_path / "converted.gguf"
    done = run(*flags(converted, text, out, "--mtp"))
    assert done.status == 0
    assert "slow type" not in done.err
    before, after = ImportanceMatrix.load(tmp_path / "out.gguf"), ImportanceMatrix.load(out)
    assert list(before) == list(after)
    assert after.head_blocks
    # the name is taken now
    done = run(*flags(model, text, tmp_path / "again.gguf", "--mtp"))
    [(*_, command)] = _SAYS.findall(done.err)
    assert shlex.split(command)[3] == str(tmp_path / "some model-BF16-2.gguf")


@pytest.mark.parametrize("more", [["--no-advice"], ["--chunks", 3]])
def test_who_does_not_want_it_hears_nothing(
    forged: Forged, text: Path, run: Run, tmp_path: Path, probes: list[tuple[str, ...]],
    monkeypatch: pytest.MonkeyPatch, more: list[object],
) -> None:  # fmt: skip
    """With --no-advice; and in a run of seconds, which gets no probe either."""
    if more != ["--no-advice"]:
        monkeypatch.setattr(source_advice, "_WORTH", 60.0)
    done = run(*flags(headed(forged, tmp_path), text, tmp_path / "out.gguf", *more))
    assert done.status == 0
    assert "slow type" not in done.err
    assert probes == []


def test_a_quantized_model_hears_nothing(
    forged: Forged, text: Path, run: Run, tmp_path: Path, probes: list[tuple[str, ...]]
) -> None:
    model = forged("qwen35", seed=2, dtype="Q8_0").path
    done = run(*flags(model, text, tmp_path / "out.gguf"))
    assert done.status == 0
    assert "slow type" not in done.err
    assert probes == []


def test_with_a_gpu_nothing_is_said(
    forged: Forged, text: Path, run: Run, tmp_path: Path, probes: list[tuple[str, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(Models, "on_cpu", property(lambda _self: False))
    done = run(*flags(headed(forged, tmp_path), text, tmp_path / "out.gguf"))
    assert done.status == 0
    assert "slow type" not in done.err
    assert probes == []


def test_a_head_in_a_file_of_its_own_is_converted_too(
    forged: Forged, text: Path, run: Run, tmp_path: Path, probes: list[tuple[str, ...]]
) -> None:
    model = headed(forged, tmp_path, "whole.gguf")
    head = tmp_path / "mtp-f16.gguf"
    assert run("extract-mtp", model, "-o", head).status == 0
    trunk = tmp_path / "trunk.gguf"
    assert run("drop-mtp", model, "-o", trunk).status == 0
    done = run(*flags(trunk, text, tmp_path / "out.gguf", "-md", head))
    assert done.status == 0, done.err
    [(*_, command)] = _SAYS.findall(done.err)
    parts = [shlex.split(each)[1:] for each in command.split(" && ")]
    assert parts == [
        ["quantize", str(trunk), str(tmp_path / "trunk-BF16.gguf"), "BF16"],
        ["quantize", str(head), str(tmp_path / "mtp-BF16.gguf"), "BF16"],
    ]
    for words in parts:
        assert run(*words).status == 0
    both = [tmp_path / "trunk-BF16.gguf", tmp_path / "mtp-BF16.gguf"]
    done = run(*flags(both[0], text, tmp_path / "converted.gguf", "-md", both[1]))
    assert done.status == 0, done.err
    assert ImportanceMatrix.load(tmp_path / "converted.gguf").head_blocks


def test_a_run_that_goes_on_hears_nothing(
    forged: Forged, text: Path, run: Run, tmp_path: Path, probes: list[tuple[str, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """What it has collected would not count for the converted model."""
    out = tmp_path / "out.gguf"
    command = flags(headed(forged, tmp_path), text, out)
    advised = source_advice.SourceAdvisor.step

    def interrupt(self: Any, progress: Any) -> None:
        if progress.chunks == 1:
            raise KeyboardInterrupt
        advised(self, progress)

    monkeypatch.setattr(source_advice.SourceAdvisor, "step", interrupt)
    assert run(*command).status == 130
    monkeypatch.setattr(source_advice.SourceAdvisor, "step", advised)
    done = run(*command)
    assert done.status == 0
    assert "slow type" not in done.err
    assert probes == []


def test_a_process_of_its_own_measures(
    forged: Forged, text: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the engine runs: this process multiplies nothing. What is said depends on the CPU."""
    monkeypatch.setattr(source_advice, "_WORTH", 0.0)
    monkeypatch.setattr(Models, "on_cpu", property(lambda _self: True))
    monkeypatch.setattr(loading, "measure", None)
    asked: list[object] = []
    ask = Collector.source_advice

    def remember(self: Collector) -> object:
        asked.append(ask(self))
        return asked[-1]

    monkeypatch.setattr(Collector, "source_advice", remember)
    model = headed(forged, tmp_path)
    command = [each for each in flags(model, text, tmp_path / "out.gguf") if each != "--no-isolate"]
    done = run(*command)
    assert done.status == 0, done.err
    assert 1 <= len(asked) <= 2
    assert done.err.count(" is a slow type on this CPU: ") == sum(
        each is not None for each in asked
    )


def test_the_models_of_the_hub_stay_in_their_cache(tmp_path: Path, forged: Forged) -> None:
    """The converted file goes to the folder that the command was started in."""
    spec: ModelSpec = forged("llama", seed=2, dtype="F16")
    advice = source_advice.SourceAdvice(
        source="F16", target="BF16", source_speed=1e11, target_speed=2e11, time=0.6, loss="x",
        seconds=1.0,
    )  # fmt: skip

    def said(model: Path, repo: str | None) -> str:
        args = source_advice.argparse.Namespace(model=str(model), mtp_model=None, hf_repo=repo)
        [(*_, command)] = re.findall(
            r"(To convert: )(.*) \(--no", source_advice.describe_advice(advice, args)
        )
        return shlex.split(command)[3]

    assert said(spec.path, "user/model") == f"{spec.path.stem}-BF16.gguf"
    assert said(spec.path, None) == str(spec.path.with_name(f"{spec.path.stem}-BF16.gguf"))
    parts = tmp_path / "model.f16-00001-of-00003.gguf"
    assert said(parts, None) == str(tmp_path / "model.BF16.gguf")
