"""A recipe: which tensor of a model gets which type, and what that was found to be worth.

`imatrix recipe` makes one, `imatrix quantize --recipe` follows it, and llama-quantize does too, by
rules. The page formats (docs/formats.md) describes the file.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from types import MappingProxyType
from typing import Any

from imatrix.files import atomic
from imatrix.files.names import encoded
from imatrix.formats import FormatError
from imatrix.model.header import ModelFile
from imatrix.quantization.frontier import FrontierCurve
from imatrix.quantization.keys import spelled
from imatrix.quantization.recipe_fields import Fields
from imatrix.quantization.rules import FLOATS, near, tensor_type
from imatrix.quantization.source import (
    SourceTensor,
    data_bytes,
    source_tensors,
    tensors_digest,
)
from imatrix.quantization.types import FTYPES

__all__ = ["HeadChoice", "Measured", "Recipe", "SourceTensor"]

_FORMAT = "imatrix-recipe"
_VERSION = 1
# What llama-quantize is asked for if the file type is a float: it would pass over the rules then.
_BASE = "Q8_0"


@dataclass(frozen=True)
class Measured:
    """A mean that was measured.

    Attributes:
        value: in nats a token.
        error: its standard error; NaN if there is none.
        positions: tokens that it was measured on.
    """

    value: float
    error: float
    positions: int


@dataclass(frozen=True, kw_only=True)
class HeadChoice:
    """What the draft head becomes, and what it is worth then.

    Attributes:
        label: its type, such as "Q4_K"; "Q4_K+Q8_0" for a mixture of two; "as it is", if it keeps
            the types of the model's file; "dropped", if the model is to go without it.
        bytes: of the data of the head's tensors; 0 if it is dropped.
        accepted: drafted tokens that the model accepts a draft, in the mean; NaN if that was not
            measured.
        accepted_low, accepted_high: its 95 % interval; NaN if there is none.
        depth: tokens of a draft; 0 if nothing was measured.
        speed_up: of decoding, beside the trunk alone; NaN if it is not known.
    """

    label: str
    bytes: int
    accepted: float = math.nan
    accepted_low: float = math.nan
    accepted_high: float = math.nan
    depth: int = 0
    speed_up: float = math.nan


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Which tensor of a model gets which type.

    Attributes:
        architecture: the model's general.architecture.
        model: the name of its file, for messages.
        tensors_digest: SHA-256 over the names, types and shapes of all its tensors; see
            imatrix.quantization.source.tensors_digest. A recipe for another model is refused.
        source: every tensor of the model: its type and its shape.
        head_blocks: numbers of the blocks of the MTP/NextN head.
        ftype: llama-quantize's name of a type, such as "Q3_K_M", whose number is written as
            general.file_type. It decides nothing else.
        types: every tensor that the quantizer can change -> ggml type in lower case, such as
            "q4_k"; those that stay as they are have the source's type.
        bytes: of the quantized file, metadata included.
        bits_per_weight: of the data of all tensors.
        predicted_kl: KL divergence from the unchanged model in nats a token; None if it is not
            known.
        measured_kl: the same as measured; None if it was not.
        head: what was chosen for the head, and why; None for a model without one.
        text: what the KL was measured on.
        chunks, n_ctx: how many chunks of it, and tokens in a chunk.
        frontier: the KL of other sizes; None if the recipe does not keep it.

    Raises:
        ValueError: an unknown type, a tensor that `source` lacks, or a type that does not fit the
            rows.
    """

    architecture: str
    model: str
    tensors_digest: str
    source: Mapping[str, SourceTensor]
    ftype: str
    types: Mapping[str, str]
    bytes: int
    bits_per_weight: float
    head_blocks: tuple[int, ...] = ()
    predicted_kl: float | None = None
    measured_kl: Measured | None = None
    head: HeadChoice | None = None
    text: str = ""
    chunks: int = 0
    n_ctx: int = 0
    frontier: FrontierCurve | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        ftype = self.ftype.upper()
        if ftype not in FTYPES:
            raise ValueError(
                f"unknown file type {self.ftype!r}{near(ftype, FTYPES)}. "
                f"Types: {', '.join(sorted(FTYPES))}"
            )
        types = {name: tensor_type(kind, name).name.lower() for name, kind in self.types.items()}
        for name, kind in types.items():
            if name not in self.source:
                raise ValueError(f"{name} has a type, but it is no tensor of the model")
            try:
                data_bytes(self.source[name].shape, kind)
            except ValueError as error:
                raise ValueError(f"{name} as {kind}: {error}") from None
        object.__setattr__(self, "ftype", ftype)
        object.__setattr__(self, "types", MappingProxyType(types))
        object.__setattr__(self, "source", MappingProxyType(dict(self.source)))

    @classmethod
    def for_model(
        cls,
        model: ModelFile,
        types: Mapping[str, str],
        *,
        ftype: str,
        bytes: int,
        predicted_kl: float | None = None,
        measured_kl: Measured | None = None,
        head: HeadChoice | None = None,
        text: str = "",
        chunks: int = 0,
        n_ctx: int = 0,
        frontier: FrontierCurve | None = None,
    ) -> Recipe:
        """Put together a recipe with what follows from the model.

        Args:
            model: the model.
            types: tensor -> ggml type, in any case.
            ftype, bytes, predicted_kl, measured_kl, head, text, chunks, n_ctx, frontier: see the
                attributes. For `bytes` see imatrix.quantization.file_size.quantized_bytes.

        Raises:
            ValueError: as above.
            ModelError: a part of the model is damaged.
            OSError: a part cannot be read.
        """
        source = source_tensors(model)
        sizes = [
            data_bytes(tensor.shape, types.get(name, tensor.type))
            for name, tensor in source.items()
        ]
        return cls(
            architecture=model.architecture,
            model=model.path.name,
            tensors_digest=tensors_digest(source),
            source=source,
            head_blocks=tuple(model.head_blocks),
            ftype=ftype,
            types=types,
            bytes=bytes,
            bits_per_weight=8 * sum(sizes) / sum(tensor.values for tensor in source.values()),
            predicted_kl=predicted_kl,
            measured_kl=measured_kl,
            head=head,
            text=text,
            chunks=chunks,
            n_ctx=n_ctx,
            frontier=frontier,
        )

    # --- for this model? --------------------------------------------------------------------------

    def check_model(self, model: ModelFile) -> None:
        """Refuse a model that the recipe was not made for.

        Raises:
            ValueError: the first thing that differs: the architecture, or a tensor's name, shape or
                type.
            ModelError: a part of the model is damaged.
            OSError: a part cannot be read.
        """
        found = source_tensors(model)
        differs = self._difference(model.architecture, found)
        if differs:
            raise ValueError(
                f"the recipe was made for {self.model}, and {model.path} is another model: {differs}. "
                f"Make a recipe for this one (imatrix recipe)"
            )

    def _difference(self, architecture: str, found: Mapping[str, SourceTensor]) -> str:
        if architecture != self.architecture:
            return f"its architecture is {architecture}, not {self.architecture}"
        for name, expected in self.source.items():
            if name not in found:
                return f"it has no {name}"
            tensor = found[name]
            if tensor.shape != expected.shape:
                return f"{name} has the shape {_told(tensor.shape)}, not {_told(expected.shape)}"
            if tensor.type != expected.type:
                return f"{name} is {tensor.type}, not {expected.type}"
        for name in found:
            if name not in self.source:
                return f"it has {name}, which that one lacks"
        if tensors_digest(found) != self.tensors_digest:
            return "the recipe's tensors_digest is not that of its tensors; the file was changed"
        return ""

    # --- as rules ---------------------------------------------------------------------------------

    def tensor_types(self) -> dict[str, str]:
        """The recipe as rules: regular expression that matches one name -> ggml type.

        As imatrix.quantize takes them for tensor_types, and llama-quantize for --tensor-type.
        """
        return {_exactly(name): kind for name, kind in self.types.items()}

    def write_rules(self, path: str | os.PathLike[str]) -> None:
        """Write the rules as a file for llama-quantize's --tensor-type-file; see `command`.

        Raises:
            OSError: it cannot be written.
        """
        lines = [f"{pattern}={kind}\n" for pattern, kind in self.tensor_types().items()]
        with atomic.replacing(path) as temporary:
            temporary.write_bytes(b"".join(map(encoded, lines)))

    def command(
        self,
        rules: str | os.PathLike[str],
        src: str | os.PathLike[str],
        dst: str | os.PathLike[str],
        *,
        imatrix: str | os.PathLike[str] | None = None,
    ) -> list[str]:
        """What makes llama-quantize follow the recipe: the words of a command.

        The tensors are the same to the bit as imatrix.quantize(src, dst, recipe=...) makes them.

        Args:
            rules: the file that write_rules() wrote.
            src, dst: the model, and what to write.
            imatrix: the file of the importance matrix.
        """
        words = ["llama-quantize"]
        if imatrix is not None:
            words += ["--imatrix", os.fspath(imatrix)]
        words += ["--tensor-type-file", os.fspath(rules)]
        ftype = self.ftype
        if ftype in FLOATS:  # it passes over the rules for these (llama_tensor_get_type)
            words += ["--override-kv", spelled("general.file_type", FTYPES[ftype])]
            ftype = _BASE
        return [*words, os.fspath(src), os.fspath(dst), ftype]

    # --- as a file --------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the recipe, whole or not at all.

        Raises:
            OSError: it cannot be written.
        """
        with atomic.replacing(path) as temporary:
            temporary.write_text(self._text(), encoding="ascii")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Recipe:
        """Read a recipe.

        Raises:
            FormatError (a ValueError): it is none, damaged, of another version, or has a type that
                this engine lacks; the message says what to do.
            OSError: it cannot be read.
        """
        fields = Fields.of_file(path, _FORMAT, _VERSION)
        try:
            return cls(
                architecture=fields.text("architecture"),
                model=fields.text("model"),
                tensors_digest=fields.text("tensors_digest"),
                source={
                    name: SourceTensor(*fields.tensor(name, value))
                    for name, value in fields.mapping("source").items()
                },
                head_blocks=tuple(fields.wholes("head_blocks")),
                ftype=fields.text("ftype"),
                types=fields.texts("types"),
                bytes=fields.whole("bytes"),
                bits_per_weight=fields.number("bits_per_weight"),
                predicted_kl=fields.number_or_none("predicted_kl"),
                measured_kl=_measured(fields.inside("measured_kl")),
                head=_head(fields.inside("head")),
                text=fields.text("text"),
                chunks=fields.whole("chunks"),
                n_ctx=fields.whole("n_ctx"),
                frontier=_frontier(fields.inside("frontier"), path),
            )
        except FormatError:
            raise
        except ValueError as error:
            raise FormatError(
                path,
                f"{error}. If a newer imatrix made the recipe, use that one; otherwise make it again",
            ) from None

    def _text(self) -> str:
        """As JSON, a line a tensor."""
        head: dict[str, Any] = {"format": _FORMAT, "version": _VERSION}
        for name in ("architecture", "model", "tensors_digest", "head_blocks", "ftype", "bytes"):
            head[name] = getattr(self, name)
        for name in ("bits_per_weight", "predicted_kl", "text", "chunks", "n_ctx"):
            head[name] = getattr(self, name)
        head["measured_kl"] = None if self.measured_kl is None else _plain(asdict(self.measured_kl))
        head["head"] = None if self.head is None else _plain(asdict(self.head))
        head["frontier"] = None if self.frontier is None else self.frontier.as_data()
        source = {name: [tensor.type, list(tensor.shape)] for name, tensor in self.source.items()}
        parts = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in head.items()]
        parts += [f'"types": {_lines(dict(self.types))}', f'"source": {_lines(source)}']
        return "{\n " + ",\n ".join(parts) + "\n}\n"


def _exactly(name: str) -> str:
    r"""A regular expression that matches this name alone.

    llama-quantize lowers it (parse_tensor_type in tools/quantize/quantize.cpp), takes what stands
    before the first "=" and splits its file at blanks. So any other character of ASCII than the
    usual ones is written as its number, which lowering leaves alone: "\x4a" for "J".
    """
    return f"^{re.sub(r'[^a-z0-9_-]', _escaped, name)}$"


def _escaped(found: re.Match[str]) -> str:
    character = found[0]
    if character == ".":
        return r"\."
    return character if ord(character) > 127 else f"\\x{ord(character):02x}"


def _told(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """NaN as null."""
    return {
        name: None if isinstance(value, float) and math.isnan(value) else value
        for name, value in values.items()
    }


def _lines(values: Mapping[str, Any]) -> str:
    return (
        "{\n  "
        + ",\n  ".join(f"{json.dumps(name)}: {json.dumps(value)}" for name, value in values.items())
        + "\n }"
    )


def _measured(fields: Fields | None) -> Measured | None:
    if fields is None:
        return None
    return Measured(
        fields.number("value"), fields.number_or_nan("error"), fields.whole("positions")
    )


def _head(fields: Fields | None) -> HeadChoice | None:
    if fields is None:
        return None
    return HeadChoice(
        label=fields.text("label"),
        bytes=fields.whole("bytes"),
        accepted=fields.number_or_nan("accepted"),
        accepted_low=fields.number_or_nan("accepted_low"),
        accepted_high=fields.number_or_nan("accepted_high"),
        depth=fields.whole("depth"),
        speed_up=fields.number_or_nan("speed_up"),
    )


def _frontier(fields: Fields | None, path: str | os.PathLike[str]) -> FrontierCurve | None:
    if fields is None:
        return None
    try:
        return FrontierCurve.of_data(fields.data, "")
    except ValueError as error:
        raise FormatError(path, f"{str(error).partition(': ')[2]}; make the recipe again") from None
