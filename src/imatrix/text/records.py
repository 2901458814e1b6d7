"""Messages of chats: the spellings that data sets use, brought to the form that templates read."""

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

# The speakers in ShareGPT's "from", in lower case, and their roles in templates.
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
# No template knows these if they stand in `role`, so they are translated there too. All other roles
# are left to the template.
_FOREIGN_ROLES = ("human", "prompter", "gpt", "chatgpt", "bing", "bard")

# These fields say who speaks or what to learn from, not what was said.
_BESIDE = ("role", "name", "weight", "train", "loss")

# A message may lack `content` if it has one of the other carriers. The misnamed fields are names that
# data sets give to the content; no template reads them, so the message would be rendered as empty.
_CARRIERS = ("content", "tool_calls", "function_call", "reasoning_content", "thinking", "reasoning")
_MISNAMED = ("text", "message", "msg", "utterance", "body")


def messages_of(found: Sequence[Mapping[str, Any]], where: str) -> list[Mapping[str, Any]]:
    """The messages with a `role` and a `content` each. ShareGPT's `from` and `value` are translated.

    Args:
        found: the messages as a record has them.
        where: what to call the record in an error.

    Raises:
        ValueError: a message has no role or no content, or its speaker is not known.
    """
    return [_message(each, f"{where}: message {at}") for at, each in enumerate(found)]


def check_messages(messages: Sequence[Mapping[str, Any]]) -> None:
    """Check that every message has a role, and its content under a name that templates read.

    Raises:
        ValueError: a message has no role, or no content.
        TypeError: a message is not a mapping.
    """
    for at, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise TypeError(f"a message is a mapping with a role, not {type(message).__name__}")
        _check(message, f"message {at}")


def _check(message: Mapping[str, Any], where: str) -> None:
    """See check_messages; `where` names the message in errors."""
    role = message.get("role")
    names = [name for name, value in message.items() if value is not None]
    if isinstance(role, str) and role.strip():
        if any(name in _CARRIERS for name in names) or not any(each in _MISNAMED for each in names):
            return
        lacks = "no content"
    else:
        lacks = "no role" if role is None else f"the role {role!r}, which is no name"
    has = ", ".join(map(repr, names))
    raise ValueError(
        f"{where} has {lacks}; it has {has or 'no field'}. A message needs 'role' and 'content', or "
        "'from' and 'value' as ShareGPT spells them"
    )


def _message(message: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """One message in the form that templates read; `where` names it in errors."""
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
    """The tool calls that the content of a message spells; None if it is something else."""
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
    """The message with a mapping for the `arguments` of each call, which templates expect. OpenAI's
    interface gives them as a text that spells a JSON object; a text that spells something else is
    left as it is."""
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
            return made  # the template either takes the text or says what it expects
        if isinstance(found, dict):
            made["arguments"] = found
    return made


def is_empty_chat(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether no message has a text, an image or a call: anything but who speaks."""
    return not any(
        _says(value)
        for message in messages
        for name, value in message.items()
        if name not in _BESIDE
    )


def _says(value: object) -> bool:
    """Whether there is anything in the value but nulls, blanks and the types of parts."""
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
    """A function that takes a Python value of an Arrow type and leaves out null fields of structs.

    A column has one type: the union of the fields of its records. So a record has a null for each
    field that only other records have. A map is different: it has just the keys that it was given,
    so it becomes a mapping with its nulls.

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
    # lists of every kind; pyarrow.types has no one test for them that knows list views too
    if hasattr(kind, "value_type"):
        each_of = unpadding(kind.value_type)

        def listed(value: Any) -> Any:
            return None if value is None else [each_of(each) for each in value]

        return listed
    return _same


def _same(value: Any) -> Any:
    return value


def unpadded(value: Any) -> Any:
    """The value without null fields, in every mapping; for values whose Arrow type is not known."""
    if isinstance(value, Mapping):
        return {name: unpadded(each) for name, each in value.items() if each is not None}
    if isinstance(value, (list, tuple)):
        return [unpadded(each) for each in value]
    return value
