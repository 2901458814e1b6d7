"""Chats to text, with the chat templates that a model file brings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from imatrix.errors import TemplateError
from imatrix.text.documents import Chat
from imatrix.text.plain import repaired_value
from imatrix.text.records import with_parsed_arguments
from imatrix.text.template import (
    ARGUMENTS,
    DATE,
    SPECIAL,
    TOOL_USE,
    ChatTemplate,
    begins_with_system,
    placeholder,
)

__all__ = ["ChatOptions", "Renderer", "templates"]

_KEY = "tokenizer.chat_template"


@dataclass(frozen=True)
class ChatOptions:
    """How the chats of a text are rendered.

    Attributes:
        template: name of one of the model's templates. None chooses as transformers does: tool_use
            if the model has a template of that name and the chat has tools, else the default one.
        text: a template to use instead of the model's.
        system: a system message for chats that do not begin with one; None for no message.
        tools: JSON schemas for chats that have none of their own; None for no tools.
        generation_prompt: end each chat with the start of an answer.
        variables: further names for the template, such as {"enable_thinking": False}.
        now: the time that strftime_now() gives.
    """

    template: str | None = None
    text: str | None = None
    system: str | None = None
    tools: Sequence[Mapping[str, Any]] | None = None
    generation_prompt: bool = False
    variables: Mapping[str, Any] = field(default_factory=dict)
    now: datetime = DATE

    def digest(self) -> str:
        """SHA-256 of these options, in hexadecimal: other options have another one."""
        content = json.dumps(
            [
                self.template,
                self.text,
                self.system,
                self.tools,
                self.generation_prompt,
                self.variables,
                self.now.isoformat(),
            ],
            sort_keys=True,
            default=placeholder,
        )
        return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()


class Renderer:
    """Renders the chats of a text with a model's templates.

    Args:
        metadata: the model's keys that begin with "tokenizer.", values as text.
        spelled: a function that gives the text of a token id.
        options: how to render.
        where: what to call the model in errors.

    Raises (when called):
        TemplateError: the model has no such template, or the template fails (see ChatTemplate).
    """

    def __init__(
        self,
        metadata: Mapping[str, str],
        spelled: Any,
        options: ChatOptions,
        where: str,
    ) -> None:
        self._texts = templates(metadata)
        self._special = {
            name: spelled(int(metadata[f"tokenizer.ggml.{key}"]))
            for name, key in SPECIAL.items()
            if f"tokenizer.ggml.{key}" in metadata
        }
        self._options = options
        self._where = where
        self._made: dict[str, ChatTemplate] = {}

    def __call__(self, chat: Chat) -> str:
        options = self._options
        tools = repaired_value(options.tools if chat.tools is None else chat.tools)
        messages = [
            with_parsed_arguments(each) if isinstance(each, Mapping) else each
            for each in repaired_value(chat.messages)
        ]
        if options.system is not None and not begins_with_system(messages):
            messages.insert(0, {"role": "system", "content": options.system})
        variables = repaired_value({**options.variables, **chat.variables})
        if taken := [name for name in ARGUMENTS if name in variables]:
            raise TemplateError(
                f"{', '.join(map(repr, taken))} cannot be among a template's further names "
                "(chat_template_kwargs, --chat-template-kwargs): a chat has them by itself",
                for_all=any(name in options.variables for name in taken),
            )
        return self.template(with_tools=tools is not None).render(
            messages,
            tools=tools,
            add_generation_prompt=options.generation_prompt,
            **variables,
        )

    def template(self, *, with_tools: bool = False) -> ChatTemplate:
        """The template for a chat with or without tools; see ChatOptions.template."""
        options = self._options
        if options.text is not None:
            name, text, called = "", options.text, "the chat template given"
        else:
            name = options.template or (
                TOOL_USE if with_tools and TOOL_USE in self._texts else "default"
            )
            if name not in self._texts:
                raise TemplateError(self._no_template(name), for_all=True)
            text = self._texts[name]
            called = f"{self._where}: chat template {name!r}"
        if name not in self._made:
            self._made[name] = ChatTemplate(
                text, name=called, variables=self._special, now=options.now
            )
        return self._made[name]

    def close(self) -> None:
        """End the processes that render the templates."""
        for made in self._made.values():
            made.close()

    def _no_template(self, name: str) -> str:
        """The message if the model does not have that template."""
        give = "give one with --chat-template-file (ChatOptions.text)"
        if not self._texts:
            return f"{self._where} has no chat template ({_KEY}), and the text has chats; {give}"
        return (
            f"{self._where} has no chat template {name!r}; it has "
            f"{', '.join(map(repr, sorted(self._texts)))}: name one with --chat-template "
            f"(ChatOptions.template), or {give}"
        )


def templates(metadata: Mapping[str, str]) -> dict[str, str]:
    """The chat templates of a model by name. The one without a name is called default.

    Args:
        metadata: the model's keys, values as text.
    """
    named = {
        key.removeprefix(f"{_KEY}."): text
        for key, text in metadata.items()
        if key.startswith(f"{_KEY}.")
    }
    return {**named, "default": metadata[_KEY]} if _KEY in metadata else named
