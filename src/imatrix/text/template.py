"""Rendering a chat template, which is a program from a stranger, in a process of its own.

`ChatTemplate` starts that process (imatrix.text.template_child), asks it, and ends it.
"""

from __future__ import annotations

import atexit
import importlib.util
import json
import os
import queue
import subprocess
import threading
import weakref
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from imatrix.errors import TemplateError
from imatrix.files import processes
from imatrix.text.plain import repaired

__all__ = ["DATE", "ChatTemplate"]

DATE = datetime(2025, 1, 1)
"""What a template that asks for the time is told unless somebody says otherwise: a matrix must not
depend on the day it was made."""


TOOL_USE = "tool_use"


# transformers' names of special tokens, and the keys of GGUF with their ids (gguf-py, constants.py;
# "seperator" is how they spell it)
SPECIAL = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "sep_token": "seperator_token_id",
    "pad_token": "padding_token_id",
    "cls_token": "cls_token_id",
    "mask_token": "mask_token_id",
}

# Names that a message's reasoning goes by; the first is what templates read
_REASONING = ("reasoning_content", "thinking", "reasoning")

# What a template gets from the chat and the options, not from anybody's further names
ARGUMENTS = ("messages", "tools", "add_generation_prompt")
_CHARACTERS = 16 * 2**20
_MEMORY = 512 * 2**20
_SECONDS = 10.0
# a busy machine may take a while to start an interpreter, which is not the template's doing
_START_SECONDS = 60.0


class ChatTemplate:
    """A Jinja chat template, rendered as transformers' apply_chat_template renders it.

    Templates come with models, from anybody. This one runs in a process of its own, in Jinja's
    immutable sandbox, and gets plain JSON values only. It is ended after 10 seconds, 16 Mi
    characters of output, or 512 MiB of memory (if the system is Linux).

    Args:
        text: the template.
        name: what to call it in errors.
        variables: names that it may use, such as bos_token.
        now: the time that strftime_now() tells.

    The process starts with the first rendering. Use it as a context manager, or call close(); one
    that is left open ends with the interpreter. A fork of this process starts its own.

    Raises (from render):
        TemplateError (a ValueError): the template has an error, raised one, or exceeds a limit;
            the message has its name and line.
    """

    def __init__(
        self,
        text: str,
        *,
        name: str = "chat template",
        variables: Mapping[str, Any] | None = None,
        now: datetime = DATE,
        seconds: float = _SECONDS,
    ) -> None:
        self.text = text
        self.name = name
        self.variables = dict(variables or {})
        self._now = now
        self._seconds = seconds
        self._child: subprocess.Popen[bytes] | None = None
        self._requests: BinaryIO | None = None
        self._replies: BinaryIO | None = None
        self._answers: queue.Queue[bytes] = queue.Queue()

    def render(
        self,
        messages: Iterable[Mapping[str, Any]],
        /,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        **variables: Any,
    ) -> str:
        """The chat as text.

        Args:
            messages: mappings with a `role`. Names with the value None are left out, and a
                message's reasoning is given under each of the names that templates read, as
                transformers does it.
            tools: JSON schemas; None for none.
            add_generation_prompt: end with the start of an answer.
            variables: further names for the template, over those of the constructor.

        Raises:
            TemplateError: see the class.
            ValueError: there are no messages.
        """
        chat = [_message(each) for each in messages]
        if not chat:
            raise ValueError("a chat without messages cannot be rendered")
        values = {
            "documents": None,
            **self.variables,
            **variables,
            "messages": chat,
            "tools": None if tools is None else list(tools),
            "add_generation_prompt": add_generation_prompt,
        }
        if self._child is None:
            self._start()
        found = self._ask(json.dumps(values, default=placeholder), self._seconds)
        return repaired(found["text"])

    def close(self) -> None:
        """End the process. Safe to call twice; another rendering starts another."""
        child, self._child = self._child, None
        if child is None:
            return
        _open.discard(self)
        child.kill()
        child.wait()
        if self._requests is not None:
            self._requests.close()
        # _read, which sees the end now, closes the other
        self._requests = self._replies = None

    def _forget(self) -> None:
        """In a fork: leave the process to the one that started it."""
        child, self._child = self._child, None
        if child is None:
            return
        child.returncode = 0  # not our child: nothing to wait for
        for stream in (self._requests, self._replies):
            if stream is not None:
                stream.close()  # unbuffered: there is no lock that a thread elsewhere may hold
        self._requests = self._replies = None

    def __enter__(self) -> ChatTemplate:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_child", None) is not None:
            self.close()

    def _start(self) -> None:
        if importlib.util.find_spec("jinja2") is None:
            raise ImportError("chat templates need the library jinja2: pip install 'jinja2>=3.1.6'")
        self._child = child = processes.start(
            Path(__file__).with_name("template_child.py"),
            stderr=subprocess.DEVNULL,
            # no buffers: the lock of one, held by a thread that waits for an answer, would be
            # fatal to an interpreter that exits
            bufsize=0,
        )
        self._requests, self._replies = child.stdin, child.stdout  # type: ignore[assignment]
        child.stdin = child.stdout = None
        self._answers = queue.Queue()
        threading.Thread(
            target=_read, args=(self._replies, self._answers), name="imatrix-template", daemon=True
        ).start()
        _open.add(self)
        setup = {
            "template": self.text,
            "name": self.name,
            "now": self._now.isoformat(),
            "characters": _CHARACTERS,
            "memory": _MEMORY,
            "seconds": self._seconds + _START_SECONDS,
        }
        try:
            self._ask(json.dumps(setup), _START_SECONDS)
        except TemplateError as error:
            self.close()  # it has ended, or will
            error.for_all = True
            raise

    def _ask(self, line: str, seconds: float) -> dict[str, Any]:
        assert self._requests is not None
        try:
            _write(self._requests, line.encode("ascii") + b"\n")
            answer = self._answers.get(timeout=seconds)
        except BrokenPipeError:
            answer = b""
        except queue.Empty:
            self.close()
            raise TemplateError(f"{self.name}: not done after {seconds:g} seconds") from None
        except BaseException:
            self.close()  # Ctrl-C: an answer to come would be taken for the next one's
            raise
        if not answer:
            self.close()
            raise TemplateError(
                f"{self.name}: the process that renders it ended; it takes too much memory or time"
            )
        found: dict[str, Any] = json.loads(answer)
        if "error" in found:
            line_ = "" if found["line"] is None else f", line {found['line']}"
            raise TemplateError(f"{self.name}{line_}: {found['error']}", line=found["line"])
        return found


def begins_with_system(messages: Sequence[Mapping[str, Any]]) -> bool:
    return (
        bool(messages)
        and isinstance(messages[0], Mapping)
        and (messages[0].get("role") == "system")
    )


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise TypeError(f"a message is a mapping with a role, not {type(message).__name__}")
    found = {name: value for name, value in message.items() if value is not None}
    reasoning = next((found[name] for name in _REASONING if name in found), None)
    if reasoning is not None:
        found = {"thinking": reasoning, **found, "reasoning_content": reasoning}
    return found


def placeholder(value: object) -> object:
    """What a template sees of a value that is not JSON."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, (set, frozenset, Sequence)) and not isinstance(value, (bytes, bytearray)):
        return list(value)
    return f"<{type(value).__name__}>"


def _write(stream: BinaryIO, content: bytes) -> None:
    """All of it: an unbuffered write may take a part only."""
    rest = memoryview(content)
    while rest:
        rest = rest[stream.write(rest) :]


def _read(stream: BinaryIO, answers: queue.Queue[bytes]) -> None:
    """Put each line into the queue, and b"" at the end."""
    with suppress(ValueError, OSError), stream:
        held: list[bytes] = []
        while block := os.read(stream.fileno(), 2**16):
            *whole, rest = block.split(b"\n")
            for line in whole:
                answers.put(b"".join([*held, line]))
                held = []
            held.append(rest)
    answers.put(b"")


_open: weakref.WeakSet[ChatTemplate] = weakref.WeakSet()


def _in_fork() -> None:
    for template in list(_open):
        template._forget()
    _open.clear()


@atexit.register
def _at_exit() -> None:
    # after the runs that render have ended (imatrix.engine.background registers later and so comes first)
    for template in list(_open):
        template.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_fork)
