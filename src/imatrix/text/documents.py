"""Documents: texts, chats and lists of token ids, and the records of files that hold them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from imatrix.text.plain import decoded, parsed_json
from imatrix.text.records import CHAT_FIELDS, messages_of

__all__ = [
    "BESIDE_MESSAGES",
    "FIELDS",
    "Chat",
    "Found",
    "Item",
    "OnBadRecord",
    "document",
    "no_field_error",
]

OnBadRecord = Literal["stop", "skip"]
"""What happens if a record cannot be used: it ends the run, or it is counted as skipped."""

FIELDS = (*CHAT_FIELDS, "text")
"""Fields that may hold a record's document. The first one that the record has is taken."""

_TOOLS, _DOCUMENTS, _SYSTEM, _VARIABLES = "tools", "documents", "system", "chat_template_kwargs"

BESIDE_MESSAGES = (_TOOLS, _DOCUMENTS, _SYSTEM, _VARIABLES)
"""Fields of a record that are read together with its messages."""


@dataclass(frozen=True)
class Chat:
    """A conversation, to be rendered with the model's chat template.

    Attributes:
        messages: mappings with a `role` and whatever else the template reads, such as `content`
            and `tool_calls`.
        tools: JSON schemas of tools, for the template's `tools`; None for no tools.
        variables: further names for the template, such as `enable_thinking` or `documents`; they
            go before those of the run.
    """

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)


Item: TypeAlias = "str | Chat | Sequence[int]"
"""A document: a text, a chat, or token ids."""


@dataclass(frozen=True)
class Found:
    """What a source has at one place.

    Attributes:
        where: file and line, row or number, for errors; "" for a text without a name.
        item: the document; None if its text is null, or if there is an error.
        error: why the record cannot be used; None if it can.
    """

    where: str
    item: Item | None = None
    error: Exception | None = None


def document(record: object, fields: Sequence[str], where: str) -> Item | None:
    """The document in a record: the first of `fields` that it has; None if all of them are null.

    Args:
        record: a str, or a mapping with one of the fields.
        fields: names to look for.
        where: what to call the record in an error.

    Raises:
        ValueError: the record has none of the fields, the field is neither a text nor messages, or
            a message has no role.
    """
    if isinstance(record, str):
        return record
    if not isinstance(record, Mapping):
        raise ValueError(
            f"{where}: expected a JSON object or string, found {type(record).__name__}"
        )
    name = next((each for each in fields if record.get(each) is not None), None)
    if name is None:
        if any(each in record for each in fields):
            return None
        raise no_field_error(where, list(record), fields)
    value = record[name]
    if isinstance(value, bytes):  # a column of text whose type says bytes
        value = decoded(value, f"{where}: field {name!r}")
    if isinstance(value, str):
        if name not in CHAT_FIELDS or not value.lstrip().startswith("["):
            return value
        value = parsed_json(value.strip(), f"{where}: field {name!r}", field=True)
    if isinstance(value, list) and not value:
        raise ValueError(
            f"{where}: field {name!r} is an empty list; a chat needs at least one message"
        )
    if isinstance(value, list) and all(isinstance(each, Mapping) for each in value):
        return _chat(value, record, where)
    found = type(value).__name__
    if isinstance(value, list):
        found += (
            f" of {next(type(each).__name__ for each in value if not isinstance(each, Mapping))}"
        )
    raise ValueError(
        f"{where}: field {name!r} must be a text, or a list of messages, found {found}"
    )


def _chat(found: list[Any], record: Mapping[str, Any], where: str) -> Chat:
    """The chat of these messages, with the fields of the record that belong to a chat."""
    variables = dict(_parsed(record, _VARIABLES, Mapping, where) or {})
    if (documents := _parsed(record, _DOCUMENTS, list, where)) is not None:
        variables.setdefault("documents", documents)
    tools = _parsed(record, _TOOLS, list, where) or None
    messages = messages_of(found, where)
    system = record.get(_SYSTEM)
    if isinstance(system, str) and system and messages[0].get("role") != "system":
        messages = [{"role": "system", "content": system}, *messages]
    return Chat(messages, tools, variables)


def _parsed(record: Mapping[str, Any], name: str, kind: type, where: str) -> Any:
    """The value of a field, which may be spelled as JSON: columns of mixed types often are."""
    value = record.get(name)
    if isinstance(value, str):
        field_at = f"{where}: field {name!r}"
        value = parsed_json(value, field_at, field=True) if value.strip() else None
    if value is not None and not isinstance(value, kind):
        raise ValueError(
            f"{where}: field {name!r} must be a {'list' if kind is list else 'mapping'}, found "
            f"{type(value).__name__}"
        )
    return value


def no_field_error(where: object, names: Sequence[str], fields: Sequence[str]) -> ValueError:
    """The error for a record, or a file, that has `names` and none of `fields`."""
    return ValueError(
        f"{where}: no field {' or '.join(map(repr, fields))}; it has "
        f"{', '.join(map(repr, names)) or 'none'}. Name the one with the text or the messages: "
        "--text-field NAME (fields=). If the text lies in several, as in 'instruction' and "
        "'output', make one of them first"
    )
