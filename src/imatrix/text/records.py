"""Messages of chats as data sets spell them, brought to the one form that templates read."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

__all__ = [
    "CHAT_FIELDS",
    "check_messages",
    "is_empty_chat",
    "messages_of",
    "unpadded",
    "unpadding",
    "with_parsed_arguments",
]

CHAT_FIELDS = ("messages", "conversations", "conversation")
"""Fields whose value, if it is a text, may spell a list of messages as JSON."""

# ShareGPT's names of who speaks ("from"), in lower case, and what templates call them
_ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(
        (
            *("assistant", "gpt", "chatgpt", "gpt-4", "gpt4", "bing", "bard", "gemini", "claude"),
            *("model", "bot", "chatbot", "ai"),
        ),
        "assistant",
    ),
    "system": "system",
    "developer": "developer",
    **dict.fromkeys(
        (
            *("tool", "tool_response", "tool_result", "function", "function_response"),
            *("function_result", "observation", "ipython"),
        ),
        "tool",
    ),
    **dict.fromkeys(("function_call", "tool_call"), "function_call"),
}
# Of these a template that finds them as `role` knows nothing; other roles are the template's affair
_FOREIGN_ROLES = ("human", "prompter", "gpt", "chatgpt", "bing", "bard")

# Says who speaks, or what to learn from; not what was said
_BESIDE = ("role", "name", "weight", "train", "loss")

# What else a message has if its `content` may be absent, and names that others give to the content:
# no template reads these, so that the message would be rendered as if it were empty
_CARRIERS = ("content", "tool_calls", "function_call", "reasoning_content", "thinking", "reasoning")
_MISNAMED = ("text", "message", "msg", "utterance", "body")


def messages_of(found: Sequence[Mapping[str, Any]], where: str) -> list[Mapping[str, Any]]:
    """The messages with a `role` and a `content` each, ShareGPT's `from` and `value` translated.

    Raises:
        ValueError: a message has no role, or one that is not known.
    """
    return [_message(each, f"{where}: message {at}") for at, each in enumerate(found)]


def check_messages(messages: Sequence[Mapping[str, Any]]) -> None:
    """That every message has a role, and its content under the name that templates read.

    Raises:
        ValueError: one has none.
        TypeError: one is no mapping.
    """
    for at, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise TypeError(f"a message is a mapping with a role, not {type(message).__name__}")
        _check(message, f"message {at}")


def _check(message: Mapping[str, Any], where: str) -> None:
    role = message.get("role")
    names = [name for name, value in message.items() if value is not None]
    if isinstance(role, str) and role.strip():
        if any(name in _CARRIERS for name in names) or not any(each in _MISNAMED for each in names):
            return
        said = "no content"
    else:
        said = "no role" if role is None else f"the role {role!r}, which is no name"
    has = ", ".join(map(repr, names))
    raise ValueError(
        f"{where} has {said}; it has {has or 'no field'}. A message needs 'role' and 'content', or "
        "'from' and 'value' as ShareGPT spells them"
    )


def _message(message: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    spoken, said = message.get("from"), message.get("value")
    role = message.get("role")
    if spoken is None and said is None:
        _check(message, where)
        known = str(role).strip().lower()
        return {**message, "role": _ROLES[known]} if known in _FOREIGN_ROLES else message
    speaker = spoken if role is None else role
    if speaker is None:
        _check(message, where)
    if not isinstance(speaker, str) or (name := speaker.strip().lower()) not in _ROLES:
        raise ValueError(
            f"{where} is from {speaker!r}, which is none of {', '.join(map(repr, _ROLES))}"
        )
    made = {key: value for key, value in message.items() if key not in ("role", "from", "value")}
    if made.get("content") is None:
        made["content"] = said
    if _ROLES[name] != "function_call":
        return {"role": _ROLES[name], **made}
    calls = _calls(made["content"])
    if calls is not None:
        del made["content"]
        made["tool_calls"] = calls
    return {"role": "assistant", **made}


def _calls(content: object) -> list[dict[str, Any]] | None:
    """The calls that a message of them spells; None if it is something else."""
    if isinstance(content, str):
        try:
            content = json.loads(content)
        except (ValueError, RecursionError):
            return None
    calls: list[Any] = content if isinstance(content, list) else [content]
    if not calls or not all(isinstance(each, Mapping) and "name" in each for each in calls):
        return None
    return [{"type": "function", "function": dict(each)} for each in calls]


def with_parsed_arguments(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """The message with a mapping for `arguments` of each call, where they are a text that spells a
    JSON object, as OpenAI's interface gives them. Templates expect a mapping."""
    made: dict[str, Any] = dict(message)
    calls = made.get("tool_calls")
    if isinstance(calls, Sequence) and not isinstance(calls, str):
        made["tool_calls"] = [_with_parsed(each) for each in calls]
    if (call := made.get("function_call")) is not None:
        made["function_call"] = _with_parsed(call)
    return made


def _with_parsed(call: Any) -> Any:
    if not isinstance(call, Mapping):
        return call
    made: dict[str, Any] = dict(call)
    if (function := made.get("function")) is not None:
        made["function"] = _with_parsed(function)
    if isinstance(arguments := made.get("arguments"), str):
        try:
            found = json.loads(arguments)
        except (ValueError, RecursionError):
            return made  # the template may take it as it is, or says what it expects
        if isinstance(found, dict):
            made["arguments"] = found
    return made


def is_empty_chat(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether no message says or calls anything."""
    return not any(
        _says(value)
        for message in messages
        for name, value in message.items()
        if name not in _BESIDE
    )


def _says(value: object) -> bool:
    if isinstance(value, str):
        return bool(value.strip())
    if isinstance(value, Mapping):
        return any(_says(each) for name, each in value.items() if name != "type")
    if isinstance(value, (list, tuple)):
        return any(map(_says, value))
    return value is not None and value is not False


# --- what Arrow pads -----------------------------------------------------------------------------

_Convert = Callable[[Any], Any]


def unpadding(kind: Any) -> _Convert:
    """What takes a Python value of an Arrow type and leaves out the null fields of its structs.

    A column has one type, the union of its records' fields, and a record has a null for each that
    only another has. A map has the keys that it was given: it becomes a mapping, nulls and all.

    Args:
        kind: a pyarrow.DataType.
    """
    from pyarrow import BaseExtensionType, types

    if isinstance(kind, BaseExtensionType):
        return unpadding(kind.storage_type)
    if types.is_dictionary(kind) or types.is_run_end_encoded(kind):
        return unpadding(kind.value_type)
    if types.is_struct(kind):
        fields = {field.name: unpadding(field.type) for field in kind}

        def struct(value: Any) -> Any:
            if value is None:
                return None
            return {
                name: convert(value[name])
                for name, convert in fields.items()
                if value.get(name) is not None
            }

        return struct
    if types.is_map(kind):
        key, item = unpadding(kind.key_type), unpadding(kind.item_type)

        def mapping(value: Any) -> Any:
            if value is None:
                return None
            return {key(name): item(each) for name, each in value}

        return mapping
    # views of lists too, which types has no one name for
    if hasattr(kind, "value_type"):
        each_of = unpadding(kind.value_type)

        def listed(value: Any) -> Any:
            return None if value is None else [each_of(each) for each in value]

        return listed
    return _same


def _same(value: Any) -> Any:
    return value


def unpadded(value: Any) -> Any:
    """unpadding() for a value whose Arrow type is not at hand: of every mapping."""
    if isinstance(value, Mapping):
        return {name: unpadded(each) for name, each in value.items() if each is not None}
    if isinstance(value, (list, tuple)):
        return [unpadded(each) for each in value]
    return value
