"""Runs that are killed, or that lose their disk, folder or memory: some dozens of them here,
thousands in benchmarks/robustness.py."""

from __future__ import annotations

import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from helpers import faults
from helpers.random_model import make_random_model

import imatrix

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "robustness.py"

watched = pytest.mark.skipif(not faults.SUPPORTED, reason="Linux on x86-64 or aarch64 only")
limited = pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS is heeded on Linux")


@pytest.mark.slow
@watched
def test_killed_at_any_moment() -> None:
    command = [sys.executable, str(SCRIPT)]
    command += ["--kills", "8", "--steps", "5", "--errors", "10", "--isolated", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(": 5 of ") == 2
    assert done.stdout.count(": 10 of ") == 2
    assert "random moments: 8 kills in " in done.stdout
    assert "two processes: 2 kills in " in done.stdout


# --- one kind of trouble at a time ---------------------------------------------------------------

COLLECT = "collect -c 64 -b 64 -t 1 --mtp -ofreq 1 --no-ppl"


class Ground:
    """A model, a text, and a folder with a run that was interrupted after two of its five
    chunks."""

    def __init__(self, folder: Path) -> None:
        self.model, self.text = folder / "model.gguf", folder / "text.txt"
        self.work = folder / "work"
        self.out = self.work / "out.gguf"
        self.checkpoint = self.work / "out.gguf.checkpoint"
        make_random_model(self.model)
        text = Path(imatrix.__file__).with_name("data") / "calibration.txt"
        self.text.write_text(text.read_text(encoding="utf-8")[:3000], encoding="utf-8")
        self.work.mkdir()
        assert self.run().returncode == 0
        self.expected = self.out.read_bytes()
        self.out.unlink()
        done = self.run(
            """
            from imatrix.collect.run import Run
            saved = Run.progress
            def interrupt(self, *total, **how):
                if self.done == 2:
                    raise KeyboardInterrupt
                return saved(self, *total, **how)
            Run.progress = interrupt
            """
        )
        assert done.returncode == 130, done.stderr
        self.before = self.out.read_bytes(), self.checkpoint.read_bytes()

    def restore(self) -> None:
        """Make the folder what it was when the run had been interrupted."""
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir()
        for path, content in zip((self.out, self.checkpoint), self.before, strict=True):
            path.write_bytes(content)

    def run(self, prepare: str = "", *more: str) -> subprocess.CompletedProcess[str]:
        """Runs the command after some lines of Python."""
        command = f"import sys; from imatrix import cli\n{textwrap.dedent(prepare)}\n"
        command += "sys.exit(cli.main(sys.argv[1:]))"
        argv = [*COLLECT.split(), "--chunks", "5", "-m", self.model, "-f", self.text]
        argv += ["-o", self.out, *more]
        return subprocess.run(
            [sys.executable, "-c", command, *map(str, argv)],
            capture_output=True,
            text=True,
            timeout=200,
            cwd=Path(__file__).parents[1],
        )

    def faulty(self, arm: str, **where: Any) -> subprocess.CompletedProcess[str]:
        """Runs the command with file calls that fail."""
        return self.run(
            f"""
            sys.path.insert(0, "")
            import errno
            from helpers import faults
            from imatrix.engine import models
            models.rehearse_in_child = lambda *_: None  # nothing can be started any more
            faults.watch({str(self.work)!r}, faults.Tally())
            faults.arm({arm})
            """,
            "--no-isolate",
        )

    def is_as_before(self) -> bool:
        names = {path.name for path in self.work.iterdir()}
        return self.before == (self.out.read_bytes(), self.checkpoint.read_bytes()) and names <= {
            "out.gguf",
            "out.gguf.checkpoint",
            "out.gguf.lock",
        }

    def goes_on(self) -> bool:
        done = self.run()
        assert done.returncode == 0, done.stderr
        assert f"going on from {self.checkpoint}: 2 of 5 chunk(s) are done" in done.stderr
        return self.out.read_bytes() == self.expected


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Ground:
    return Ground(tmp_path_factory.mktemp("ground"))


@pytest.fixture
def ground(interrupted: Ground) -> Ground:
    interrupted.restore()
    return interrupted


@watched
def test_a_full_disk(ground: Ground) -> None:
    # from the first write of the run on, which is that of its locks
    done = ground.faulty("3, faults.FAIL_ON, kinds=faults.WRITE, error=errno.ENOSPC")
    assert done.returncode == 1
    assert f"warning: cannot write the checkpoint {ground.checkpoint}: [Errno 28]" in done.stderr
    assert f"error: cannot write {ground.out}: [Errno 28] No space left on device" in done.stderr
    assert "Traceback" not in done.stderr
    assert ground.is_as_before()
    assert ground.goes_on()


@watched
def test_a_disk_that_does_not_take_what_was_written(ground: Ground) -> None:
    done = ground.faulty("1, faults.FAIL_ON, kinds=faults.SYNC, error=errno.EIO")
    assert done.returncode == 1
    assert f"error: cannot write {ground.out}: [Errno 5] Input/output error" in done.stderr
    assert ground.is_as_before()
    assert ground.goes_on()


@watched
def test_a_folder_that_is_read_only(ground: Ground) -> None:
    done = ground.faulty(
        "1, faults.FAIL_ON, kinds=faults.ALL & ~faults.OPEN_READ, error=errno.EROFS"
    )
    assert done.returncode == 2
    assert f"error: cannot write {ground.out}: {ground.work}: Read-only file" in done.stderr
    assert "chunk 3/5" not in done.stderr  # it is refused before the work
    assert ground.is_as_before()
    assert ground.goes_on()


def test_a_folder_that_is_removed(ground: Ground) -> None:
    done = ground.run(
        f"""
        import shutil
        from imatrix.collect.run import Run
        collect = Run.collect
        def and_remove(self, *args):
            collect(self, *args)
            if self.done == 4:
                shutil.rmtree({str(ground.work)!r})
        Run.collect = and_remove
        """
    )
    assert done.returncode == 1
    assert f"warning: cannot write the checkpoint {ground.checkpoint}: " in done.stderr
    assert f"error: cannot write {ground.out}: " in done.stderr
    assert "does not exist; create it first" in done.stderr
    assert "Traceback" not in done.stderr


@limited
@pytest.mark.parametrize("isolate", ["--isolate", "--no-isolate"])
def test_no_memory(isolate: str, ground: Ground) -> None:
    # there is memory for what is loaded by now, not for the context
    done = ground.run(
        """
        import resource
        import dataclasses
        from imatrix.engine import models
        def limited(open=models.Models.open):
            def with_limit(self, settings):
                return open(self, dataclasses.replace(settings, n_ctx=1 << 30))
            models.Models.open = with_limit
        limited()
        models.rehearse_in_child = lambda *_: None
        resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
        """,
        isolate,
    )
    assert done.returncode == 1, done.stderr
    assert "error: out of memory: the engine made no context" in done.stderr
    assert ground.is_as_before()
    assert ground.goes_on()
