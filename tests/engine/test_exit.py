"""Programs that end while they hold an open object of the package, or use it in a daemon thread:
they end with their own status, without a fatal error, and leave no process behind."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.running import Forged

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks for children in /proc")

START = """
import atexit, itertools, os, sys, threading, time
MODEL, OUT = sys.argv[1:]
CHUNK = [7 * i % 60 + 3 for i in range(32)]
CHAT = [{"role": "user", "content": "the cat sat on the mat and slept"}]
TEMPLATE = "{{ messages[0].content }}"

def forever():
    return itertools.repeat(CHUNK)

def in_daemon(function):
    ready = threading.Event()
    threading.Thread(target=function, args=(ready,), daemon=True).start()
    ready.wait(60)

"""

PROGRAMS = {
    "a template": """
from imatrix import ChatTemplate
made = ChatTemplate(TEMPLATE)
made.render(CHAT)
""",
    "a template in a circle": """
from imatrix import ChatTemplate
made = ChatTemplate(TEMPLATE)
made.itself = [made]
made.render(CHAT)
del made
""",
    "a template that renders": """
from imatrix import ChatTemplate
made = ChatTemplate(
    "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}"
)
def work(ready):
    ready.set()
    made.render(CHAT)
in_daemon(work)
time.sleep(0.5)  # it has been asked by now, as a rule
""",
    "a template that is first used at exit": """
import imatrix.text.chats  # so that our own handler runs after the one below
made = imatrix.ChatTemplate(TEMPLATE)
atexit.register(made.render, CHAT)
""",
    "a template that is used after our handler": """
# handlers run last come, first served
atexit.register(lambda: made.render(CHAT))
from imatrix import ChatTemplate
made = ChatTemplate(TEMPLATE)
""",
    "a model's template": """
from imatrix import Chat, ChatOptions, Collector
collector = Collector(MODEL, n_ctx=8, n_threads=1)
collector.run([Chat(CHAT)] * 3, chat=ChatOptions(text=TEMPLATE))
made = collector._models.renderer(ChatOptions(text=TEMPLATE)).template()
made.render(CHAT)
""",
    "a Collector": """
from imatrix import Collector
collector = Collector(MODEL, n_ctx=32, n_threads=1)
collector.run([CHUNK] * 2)
""",
    "a Collector with an engine": """
from imatrix import Collector
collector = Collector(MODEL, n_ctx=32, n_threads=1, isolate=True)
collector.run([CHUNK] * 2)
""",
    "a run in a daemon thread": """
from imatrix import Chat, ChatOptions, Collector
collector = Collector(MODEL, n_ctx=8, n_threads=1)
def work(ready):
    collector.run(
        itertools.repeat(Chat(CHAT)), chat=ChatOptions(text=TEMPLATE),
        progress=lambda at: ready.set(),
    )
in_daemon(work)
""",
    "a run of an engine in a daemon thread": """
from imatrix import Collector
collector = Collector(MODEL, n_ctx=32, n_threads=1, isolate=True)
def work(ready):
    collector.run(forever(), progress=lambda at: ready.set())
in_daemon(work)
""",
    "runs one after the other": """
from imatrix import Collector
def work(ready):
    while True:
        try:
            with Collector(MODEL, n_ctx=32, n_threads=1, rehearse=False) as collector:
                collector.run(forever(), progress=lambda at: ready.set())
        except Exception:
            pass
in_daemon(work)
""",
    "an interrupted run": """
from imatrix import Collector
def stop(at):
    raise KeyboardInterrupt
collector = Collector(MODEL, n_ctx=32, n_threads=1, isolate=True)
try:
    collector.run(forever(), progress=stop)
except KeyboardInterrupt as error:
    kept = error
""",
    "an interrupted evaluation": """
from imatrix import evaluate
def stop(at):
    raise KeyboardInterrupt
try:
    evaluate(MODEL, forever(), n_ctx=32, n_threads=1, progress=stop)
except KeyboardInterrupt as error:
    kept = error
""",
    "an evaluation in a daemon thread": """
from imatrix import evaluate
def work(ready):
    evaluate(MODEL, forever(), n_ctx=32, n_threads=1, progress=lambda at: ready.set())
in_daemon(work)
""",
    "an evaluation in a daemon thread, at any moment": """
from imatrix import evaluate
def work(ready):
    ready.set()
    evaluate(MODEL, forever(), n_ctx=32, n_threads=1, rehearse=False)
in_daemon(work)
""",
    "quantizations in a daemon thread": """
from imatrix import quantize
def work(ready):
    while True:
        quantize(MODEL, OUT, "Q4_0", n_threads=2)
        ready.set()
in_daemon(work)
""",
    "an evaluation of an engine in a daemon thread": """
from imatrix import evaluate
def work(ready):
    evaluate(
        MODEL, forever(), n_ctx=32, n_threads=1, isolate=True, progress=lambda at: ready.set()
    )
in_daemon(work)
""",
    "quantizations of an engine in a daemon thread": """
from imatrix import quantize
def work(ready):
    while True:
        quantize(MODEL, OUT, "Q4_0", n_threads=2, isolate=True)
        ready.set()
in_daemon(work)
""",
    "a cluster": """
from imatrix import Cluster, Collector
if __name__ == "__main__":
    cluster = Cluster("local:1")
    collector = Collector(MODEL, n_ctx=32, n_threads=1)
    collector.run([CHUNK] * 2, cluster=cluster)
""",
}
ENDS = {
    "at its end": ("", 0),
    "by sys.exit": ("sys.exit(3)", 3),
    "by an exception": ("raise ValueError('its own')", 1),
}


@pytest.fixture(scope="module")
def model(forged: Forged) -> Path:
    return forged("glm4moe", seed=3, n_nextn=1).path


def left_over(mark: str) -> list[str]:
    """Processes that have this in their environment, by their command lines."""
    found = []
    for process in Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        try:
            if mark.encode() in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_bytes().decode())
        except OSError:  # it has ended meanwhile, or belongs to another user
            continue
    return found


def end(program: str, model: Path, folder: Path, *, status: int) -> str:
    """Run the program and check how it ended; returns its standard error."""
    script = folder / "program.py"
    script.write_text(program)
    mark = f"IMATRIX_TEST_MARK={folder}/{time.monotonic_ns()}"
    name, value = mark.split("=")
    done = subprocess.run(
        [sys.executable, script, model, folder / "out.gguf"],
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, name: value},
    )
    assert done.returncode == status, done.stderr
    assert "Fatal Python error" not in done.stderr
    assert done.stdout == ""
    # a process that was killed, or whose input ended, may take a moment to go
    patience = time.monotonic() + 20
    while left := left_over(mark):
        assert time.monotonic() < patience, left
        time.sleep(0.05)
    return done.stderr


# one of each kind: something that a thread holds, a child process, a native step
IN_EVERY_WAY = (
    "a template",
    "a Collector with an engine",
    "a run in a daemon thread",
    "an evaluation in a daemon thread",
)


@pytest.mark.parametrize(
    ("what", "how"),
    [
        *((what, "at its end") for what in PROGRAMS),
        *((what, how) for what in IN_EVERY_WAY for how in ENDS if how != "at its end"),
    ],
)
def test_it_ends_with_its_own_status(what: str, how: str, model: Path, tmp_path: Path) -> None:
    last, status = ENDS[how]
    told = end(f"{START}\n{PROGRAMS[what]}\n{last}\n", model, tmp_path, status=status)
    if how == "by an exception":
        assert "ValueError: its own" in told
    # an unfinished quantization is removed
    assert {each.name for each in tmp_path.iterdir()} <= {"program.py", "out.gguf"}


def test_it_does_so_every_time(model: Path, tmp_path: Path) -> None:
    """What goes wrong may depend on what a thread is doing at that moment."""
    for _ in range(5):
        end(START + PROGRAMS["a template"], model, tmp_path, status=0)


def test_a_fork_has_a_process_of_its_own(model: Path, tmp_path: Path) -> None:
    """The parent of the fork keeps its own process, and neither waits for the other."""
    program = """
import gc
from imatrix import ChatTemplate
made = ChatTemplate(TEMPLATE)
text = made.render(CHAT)
first = made._child.pid
for ending in (lambda: None, made.close, lambda: made.render(CHAT)):
    pid = os.fork()
    if pid == 0:
        ending()
        if made._child is not None and made._child.pid == first:
            os._exit(5)
        if ending() not in (None, text):
            os._exit(6)
        sys.exit(0)
    _, ended = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(ended) == 0, ended
    assert made.render(CHAT) == text
    assert made._child.pid == first
made.close()
"""
    assert end(START + program, model, tmp_path, status=0) == ""


def test_a_thread_that_the_interpreter_waits_for(model: Path, tmp_path: Path) -> None:
    """The main thread is done; what runs in a thread that is no daemon comes to its end."""
    program = """
from imatrix import evaluate, quantize
ready = threading.Event()
def work():
    ready.wait()
    time.sleep(0.3)
    found = evaluate(MODEL, [CHUNK] * 5, n_ctx=32, n_threads=1)
    quantize(MODEL, OUT, "Q4_0")
    print(found.n_chunks, file=sys.stderr)
threading.Thread(target=work).start()
ready.set()
"""
    assert end(START + program, model, tmp_path, status=0) == "5\n"
    assert (tmp_path / "out.gguf").exists()
