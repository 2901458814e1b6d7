"""Fixtures that several test modules share: the engine's own programs, and models made once."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Generator, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import engine_tools
from helpers.forge import Arch, ModelSpec, make_model
from helpers.random_model import make_random_model
from helpers.running import NO_GPU, TEXT, Done, EngineTool, Forged, RpcServer, Run
from hypothesis import settings

import imatrix

# A shell starts a job in the background with SIGINT ignored, and children would inherit that,
# although some tests interrupt their children.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# no test measures time, and a busy machine takes more than Hypothesis allows an example
settings.register_profile("busy", deadline=None)
settings.load_profile("busy")


# What a test may need and a machine or build may lack, for the mark `needs`.
HAS = {
    "gpu": lambda: any(device.gpu for device in imatrix.backends().devices),
    "modules": lambda: imatrix.backends().cpu_variant is not None,
    "no rpc": lambda: "RPC" not in imatrix.backends().built,
}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests that this machine cannot run, because a skipped test looks like one that
    was forgotten. If IMATRIX_NO_SKIPS is set, a skip fails, see pytest_runtest_makereport."""
    here = {what: has() for what, has in HAS.items()}
    left_out = [
        item for item in items if not all(here[mark.args[0]] for mark in item.iter_markers("needs"))
    ]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]
    # files with long tests first: a worker that got one last would keep the others waiting
    long = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in long)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.skipped and os.environ.get("IMATRIX_NO_SKIPS"):
        report.outcome = "failed"
        report.longrepr = f"skipped where nothing is to be: {report.longrepr}"
    return report


@pytest.fixture(scope="session")
def engine_tool() -> EngineTool:
    """The path of one of the engine's programs, by name: llama-imatrix, llama-quantize,
    llama-perplexity, llama-speculative-simple. If it is missing, the test fails."""

    def find(name: str) -> Path:
        try:
            return engine_tools.find(name)
        except LookupError as error:
            pytest.fail(str(error), pytrace=False)

    return find


@pytest.fixture(scope="session")
def rpc_server(engine_tool: EngineTool) -> Iterator[RpcServer]:
    """host:port of the n-th ggml-rpc-server, which is started when it is first asked for."""
    with ExitStack() as running:
        endpoints: list[str] = []

        def nth(n: int) -> str:
            while len(endpoints) <= n:
                with socket.socket() as free:
                    free.bind(("127.0.0.1", 0))
                    port = free.getsockname()[1]
                tool = engine_tool("ggml-rpc-server")
                process = running.enter_context(
                    subprocess.Popen(
                        [tool, "-H", "127.0.0.1", "-p", str(port), "-t", "1"],
                        env={**os.environ, **NO_GPU},
                        stdout=subprocess.DEVNULL,
                        stderr=subprocess.DEVNULL,
                    )
                )
                running.callback(process.kill)
                for _ in range(600):
                    try:
                        socket.create_connection(("127.0.0.1", port), timeout=1).close()
                        break
                    except OSError:
                        assert process.poll() is None, "the server ended"
                        time.sleep(0.05)
                endpoints.append(f"127.0.0.1:{port}")
            return endpoints[n]

        yield nth


@pytest.fixture(scope="session")
def forged(tmp_path_factory: pytest.TempPathFactory) -> Forged:
    """make_model without the path: forged(arch, **options). Equal arguments give the same file, so
    that no test may write to it."""
    folder = tmp_path_factory.mktemp("forged")
    made: dict[str, ModelSpec] = {}

    def forge(arch: Arch, **options: Any) -> ModelSpec:
        key = repr((arch, sorted(options.items())))
        if key not in made:
            made[key] = make_model(folder / f"{arch}-{len(made)}.gguf", arch, **options)
        return made[key]

    return forge


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The random model with a tokenizer. No test may write to it."""
    path = tmp_path_factory.mktemp("model") / "random.gguf"
    make_random_model(path)
    return path


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of some 5000 tokens by its tokenizer."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT[:12_000] + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def head_matrix(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A matrix of that model's trunk and head, from 4 chunks of 64 tokens."""
    path = tmp_path_factory.mktemp("matrix") / "with-head.gguf"
    with imatrix.Collector(model, n_ctx=64) as collector:
        collector.run(text, mtp=True, max_chunks=4).save(path)
    return path


@pytest.fixture(scope="session")
def prose() -> str:
    """Ten thousand characters of ASCII that looks like English: more tokens than any test needs.

    It is made here and not read from a file, because the distance between two experts, which
    decides whether counts can be compared at all, depends on every word.
    """
    rng = np.random.default_rng(7)
    words = rng.choice(WORDS, size=1800)
    ends = rng.choice(["", "", "", "", ",", ".", ".\n"], size=len(words))
    return " ".join(word + end for word, end in zip(words, ends, strict=True)).rstrip("\n")


@pytest.fixture(scope="session")
def prose_file(prose: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "prose.txt"
    path.write_text(prose + "\n", encoding="ascii")  # readers drop one last newline
    return path


WORDS = [
    "the",
    "of",
    "and",
    "a",
    "to",
    "in",
    "that",
    "it",
    "is",
    "was",
    "he",
    "for",
    "on",
    "are",
    "with",
    "as",
    "his",
    "they",
    "at",
    "be",
    "this",
    "from",
    "have",
    "or",
    "by",
    "one",
    "had",
    "not",
    "but",
    "what",
    "all",
    "were",
    "when",
    "we",
    "there",
    "can",
    "an",
    "your",
    "which",
    "their",
    "said",
    "if",
    "do",
    "will",
    "each",
    "river",
    "winter",
    "kettle",
    "orchard",
    "seven",
    "quietly",
    "letter",
    "window",
    "harbour",
    "walked",
    "carried",
    "bright",
    "stone",
    "paper",
    "engine",
    "between",
    "morning",
    "nothing",
    "answer",
]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    """Run the command in this process."""
    from imatrix import cli  # not every test needs the native part

    def run_(*argv: object) -> Done:
        capfd.readouterr()
        status = cli.main([str(arg) for arg in argv])
        out, err = capfd.readouterr()
        assert "Traceback" not in err
        return Done(status, out, err)

    return run_
