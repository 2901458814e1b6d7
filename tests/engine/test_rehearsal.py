"""The graphs are built in a child process first: whatever ends that process is an exception
here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from helpers.forge_any import make_any

from imatrix import Collector, ModelError
from imatrix.engine import models
from imatrix.engine.rehearsal import Rehearsal
from imatrix.engine.settings import SessionSettings


@pytest.fixture(scope="module")
def fatal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A glm4moe whose head is dense by its metadata, so that the engine ends at
    GGML_ASSERT(layer.ffn_gate_inp)."""
    path = tmp_path_factory.mktemp("fatal") / "fatal.gguf"
    return make_any(path, "glm4moe", metadata={"leading_dense_block_count": 3}).path


def test_the_engines_last_words_are_in_the_error(fatal: Path) -> None:
    with Collector(fatal, n_ctx=32) as collector:
        with pytest.raises(ModelError) as caught:
            collector.run([range(32)], mtp=True)
        message = str(caught.value)
        assert message.startswith(f"{fatal}: the engine ends the process on this model")
        assert "models/glm4-moe.cpp:" in message
        assert "GGML_ASSERT(layer.ffn_gate_inp" in message
        # the trunk alone works, in the same process
        assert len(collector.run([range(32)])) > 0


def test_without_a_rehearsal_it_would_end_the_process(fatal: Path) -> None:
    """Otherwise the test above would show nothing."""
    code = (
        "import sys; from imatrix import Collector\n"
        "Collector(sys.argv[1], n_ctx=32, rehearse=False).run([range(32)], mtp=True)\n"
    )
    child = subprocess.run(
        [sys.executable, "-c", code, fatal],
        capture_output=True,
        text=True,
        env={"GGML_NO_BACKTRACE": "1", "PATH": ""},
    )
    assert child.returncode < 0
    assert "GGML_ASSERT(layer.ffn_gate_inp" in child.stderr


def test_once_for_each_kind_of_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_any(tmp_path / "good.gguf", "glm4moe").path
    rehearsed = []
    real = models.rehearse_in_child

    def counted(
        path: Path, head: Path | None, mtp: bool, settings: SessionSettings | None
    ) -> Rehearsal | None:
        assert settings is not None
        assert settings.mtp == mtp
        rehearsed.append(mtp)
        return real(path, head, mtp, settings)

    monkeypatch.setattr(models, "rehearse_in_child", counted)
    with Collector(model, n_ctx=32) as collector:
        for mtp in (False, True, False, True):
            collector.run([range(32)], mtp=mtp)
    assert rehearsed == [False, True]
