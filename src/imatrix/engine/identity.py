"""TODO."""

from __future__ import annotations

from collections.abc import Mapping

from imatrix.formats.checkpoint import Setting
from imatrix.text.chats import ChatOptions
from imatrix.text.documents import OnBadRecord
from imatrix.text.inputs import Texts
from imatrix.text.mixtures import Mixture
from imatrix.text.tokens import Packing

__all__ = ["differing", "text_settings"]


def differing(wanted: Mapping[str, Setting], found: Mapping[str, Setting]) -> str:
    """What of `wanted` is otherwise in `found`, in words; "" for nothing."""
    return "; ".join(
        f"{name} is {found.get(name, 'absent')} there and {value} here"
        for name, value in wanted.items()
        if found.get(name) != value
    )


def text_settings(
    texts: Texts,
    packing: Packing,
    chat: ChatOptions | None,
    min_expert_rows: int | None,
    on_bad_record: OnBadRecord = "stop",
) -> dict[str, Setting]:
    """What decides the chunks beside the text, where it is not the default."""
    found: dict[str, Setting] = {}
    if packing != "stream":
        found["packing"] = packing
    if on_bad_record != "stop":
        found["on_bad_record"] = on_bad_record
    if min_expert_rows is not None:
        found["min_expert_rows"] = min_expert_rows
    if isinstance(texts, Mixture):
        if texts.seed is not None:
            found["seed"] = texts.seed
        if texts.weights is not None:
            found["weights"] = " ".join(map(repr, texts.weights))
    if chat is not None:
        found["chat"] = chat.digest()
    return found
