"""Sessions of worker.py, each in a process of its own, which is started when it is first needed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


class Sessions:
    """The sessions of one model and chunk size.

    Args:
        work: the settings of worker.py, without those that run() chooses.
    """

    def __init__(self, work: dict[str, Any]) -> None:
        self._work = work
        self._running: dict[tuple[tuple[str, Any], ...], subprocess.Popen[str]] = {}

    def run(self, hook: str, **choice: Any) -> dict[str, Any]:
        """Run chunks with the hook "on" or "off", in the session of this choice."""
        key = tuple(sorted(choice.items()))
        if key not in self._running:
            self._running[key] = subprocess.Popen(
                [
                    sys.executable,
                    Path(__file__).parent / "worker.py",
                    json.dumps({**self._work, **choice}),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            self._answer(self._running[key])
        process = self._running[key]
        assert process.stdin is not None
        print(hook, file=process.stdin, flush=True)
        return self._answer(process)

    def _answer(self, process: subprocess.Popen[str]) -> dict[str, Any]:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            sys.exit(f"a session ended with status {process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End all sessions: each ends when its input ends."""
        for process in self._running.values():
            process.communicate()
