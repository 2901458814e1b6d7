"""Renders one chat template in a process of its own, for imatrix.text.chats.

Run as a file, without the package around it: it needs the standard library and Jinja. A JSON value
a line comes in and goes out. First the template and its limits; then what each rendering is given:

    {"template": str, "name": str, "now": str in ISO 8601, "characters": int, "memory": int,
     "seconds": float}                          -> {} or {"error": str, "line": int or null}
    {"messages": [...], "tools": ..., ...}      -> {"text": str} or {"error": ..., "line": ...}

A template is a program from a stranger. Here it gets Jinja's immutable sandbox, plain JSON values
and nothing else; an end to its output, counted as it comes; and as much memory and time as the
parent says, if the system can hold it to that (the parent has a clock of its own).
"""

from __future__ import annotations

import json
import random
import signal
import sys
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

_FILE = "<chat template>"


class _Generation(Extension):
    """{% generation %} … {% endgeneration %}: marks what the assistant wrote, for training. The
    text inside is rendered as it is, in a scope of its own."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class _Namespace(Namespace):
    """namespace() without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # a name `self` may be given
        self, *rest = args
        values = dict(*rest, **kwargs)
        for name in values:
            _public(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _public(name)
        super().__setitem__(name, value)


def _public(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot have the underscored name {name!r}")


class _Dict:
    """dict() and dict.fromkeys(), and nothing else of the type."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _raise(message: object) -> None:
    raise TemplateError(str(message))


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML; what a model was trained on does not
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def environment(now: datetime) -> ImmutableSandboxedEnvironment:
    """The environment of transformers' chat templates (utils/chat_template_utils.py there), with
    `now` for the clock."""
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    made.filters["tojson"] = _to_json
    made.globals.update(
        raise_exception=_raise,
        strftime_now=now.strftime,
        dict=_Dict(),
        namespace=_Namespace,
    )
    return made


def _limit_memory(n_bytes: int) -> None:
    """Let the process take `n_bytes` more than it has, if the system counts that."""
    try:
        import resource

        with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123
            has = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (has + n_bytes, has + n_bytes))
    except (ImportError, OSError, ValueError):
        return  # not Linux; the clock and the cap on the output are left


def _alarm(seconds: float) -> None:
    """End this process after a while: nobody else would, were the parent gone."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, seconds)


def _line_of(error: BaseException) -> int | None:
    """The template's line that an error comes from: the innermost frame of the template."""
    if isinstance(error, TemplateSyntaxError):
        return error.lineno
    line = None
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == _FILE:
            line = trace.tb_lineno
        trace = trace.tb_next
    return line


def _failure(error: BaseException) -> dict[str, Any]:
    if isinstance(error, MemoryError):
        told = "it takes too much memory"
    elif isinstance(error, RecursionError):
        told = "it calls itself too deeply"
    elif isinstance(error, TemplateError) and error.message:
        told = error.message
    else:
        told = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return {"error": told, "line": _line_of(error)}


class _TooLong(Exception):
    pass


def main() -> None:
    setup = json.loads(sys.stdin.readline())
    limit = setup["characters"]

    def answer(value: dict[str, Any]) -> None:
        sys.stdout.write(json.dumps(value) + "\n")
        sys.stdout.flush()

    _limit_memory(setup["memory"])
    _alarm(setup["seconds"])
    try:
        made = environment(datetime.fromisoformat(setup["now"]))
        code = made.compile(setup["template"], name=setup["name"], filename=_FILE)
        template = made.template_class.from_code(made, code, made.make_globals(None))
    except Exception as error:
        answer(_failure(error))
        return
    _alarm(0)
    answer({})
    for line in sys.stdin:
        try:
            values = json.loads(line)
        except RecursionError:
            answer({"error": "the chat is nested too deeply", "line": None})
            continue
        # the filter `random` and lipsum() draw from here: the same for every rendering
        random.seed(0)
        _alarm(setup["seconds"])
        found: dict[str, Any]
        try:
            pieces, length = [], 0
            for piece in template.generate(values):
                length += len(piece)
                if length > limit:
                    raise _TooLong(f"it writes more than {limit} characters")
                pieces.append(piece)
            found = {"text": "".join(pieces)}
        except _TooLong as error:
            found = {"error": str(error), "line": None}
        except Exception as error:
            found = _failure(error)
        pieces = []
        _alarm(0)
        answer(found)


if __name__ == "__main__":
    main()
