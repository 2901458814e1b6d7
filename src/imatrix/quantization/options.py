"""What a quantization is asked for, read once and checked."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from imatrix.engine.quantizing import Choice
from imatrix.native import quantizer
from imatrix.quantization.keys import Override, Overrides, overrides_of
from imatrix.quantization.recipe import Recipe
from imatrix.quantization.rules import (
    Rule,
    TensorType,
    TensorTypes,
    near,
    request,
    rules_of,
    tensor_type,
)
from imatrix.quantization.types import EMBEDDINGS, FTYPES

__all__ = ["Options"]

_OUTPUT = "output.weight"


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a quantization is asked for, as imatrix.quantize takes it.

    Attributes:
        ftype: the file type, in upper case.
        rules: exceptions, in order.
        output_tensor_type: the type of output.weight; None for the file type's.
        token_embedding_type: the type of the token embeddings; None for the file type's.
        override_kv: keys to write, in order.
        recipe: what gives every tensor its type; `rules` say the same then. None for none.
        recipe_name: its file, as it was given; None if it came from memory.
        allow_requantize, pure, quantize_output, keep_split: as imatrix.quantize takes them.
    """

    ftype: str
    rules: tuple[Rule, ...] = ()
    output_tensor_type: TensorType | None = None
    token_embedding_type: TensorType | None = None
    override_kv: tuple[tuple[str, Override], ...] = ()
    recipe: Recipe | None = None
    recipe_name: str | None = None
    allow_requantize: bool = False
    pure: bool = False
    quantize_output: bool = True
    keep_split: bool = False

    @classmethod
    def read(
        cls,
        ftype: str | None,
        *,
        tensor_types: TensorTypes | None,
        output_tensor_type: str | None,
        token_embedding_type: str | None,
        override_kv: Overrides | None,
        has_matrix: bool,
        allow_requantize: bool,
        pure: bool,
        quantize_output: bool,
        keep_split: bool,
        recipe: Recipe | str | os.PathLike[str] | None = None,
    ) -> Options:
        """Read the arguments of imatrix.quantize.

        Raises:
            ValueError: an unknown type, or none; a bad pattern; a key that the engine cannot take;
                or an option that does not go with a recipe.
            FormatError (a ValueError): `recipe` is the path of something else.
            OSError: it cannot be read.
        """
        recipe_name = os.fspath(recipe) if isinstance(recipe, (str, os.PathLike)) else None
        if isinstance(recipe, (str, os.PathLike)):
            recipe = Recipe.load(recipe)
        if recipe is not None:
            _check_alone(
                tensor_types=bool(tensor_types),
                output_tensor_type=output_tensor_type is not None,
                token_embedding_type=token_embedding_type is not None,
                pure=pure,
                quantize_output=not quantize_output,
            )
            tensor_types = recipe.tensor_types()
            ftype = recipe.ftype if ftype is None else ftype
        if ftype is None:
            raise ValueError(
                f"no type to quantize to; only a recipe brings one. Types: {', '.join(sorted(FTYPES))}"
            )
        name = ftype.upper()
        if name not in FTYPES:
            raise ValueError(
                f"unknown type {ftype!r}{near(name, FTYPES)}. Types: {', '.join(sorted(FTYPES))}"
            )
        return cls(
            ftype=name,
            rules=rules_of(tensor_types),
            output_tensor_type=_named("output_tensor_type", output_tensor_type),
            token_embedding_type=_named("token_embedding_type", token_embedding_type),
            override_kv=overrides_of(override_kv, has_matrix=has_matrix),
            recipe=recipe,
            recipe_name=recipe_name,
            allow_requantize=allow_requantize,
            pure=pure,
            quantize_output=quantize_output,
            keep_split=keep_split,
        )

    def choice(
        self,
        ftype: str | None = None,
        *,
        pure: bool | None = None,
        rules: Sequence[Rule] | None = None,
        metadata: Sequence[tuple[str, Override]] = (),
    ) -> Choice:
        """How to ask the engine for it, or for what differs in the arguments given.

        Args:
            metadata: keys to write beside `override_kv`.
        """
        ftype = self.ftype if ftype is None else ftype
        asked = request(ftype, self.rules if rules is None else rules)
        keys = list(self.override_kv)
        if asked.rewritten and "general.file_type" not in dict(self.override_kv):
            keys.append(("general.file_type", FTYPES[ftype]))
        keys += metadata
        output, embedding = self.output_tensor_type, self.token_embedding_type
        return Choice(
            ftype=FTYPES[asked.ftype],
            pure=self.pure if pure is None else pure,
            quantize_output=self.quantize_output,
            output_tensor_type=None if output is None else output.number,
            token_embedding_type=None if embedding is None else embedding.number,
            keep_split=self.keep_split,
            tensor_types=asked.rules,
            metadata=tuple(keys),
        )

    def named(self, name: str) -> tuple[str, TensorType] | None:
        """The option that gives a tensor its type before the rules do, and that type.

        None if there is none (llama_tensor_get_type in src/llama-quant.cpp).
        """
        if name == _OUTPUT and self.output_tensor_type is not None and self.quantize_output:
            return "output_tensor_type", self.output_tensor_type
        if name in EMBEDDINGS and self.token_embedding_type is not None:
            # a rule for the table of each layer counts before the option
            if name != EMBEDDINGS[0] and self._in_rules(name):
                return None
            return "token_embedding_type", self.token_embedding_type
        return None

    def check_rows(self, tensors: Mapping[str, tuple[int, ...]]) -> None:
        """Refuse a type whose blocks do not fit the rows of the tensor that it is named for.

        The engine looks for a type that fits only if the type comes from the file type or a rule.

        Args:
            tensors: shapes by name, ggml order.

        Raises:
            ValueError: the option, the type and the tensor.
        """
        for name, shape in tensors.items():
            found = self.named(name)
            if found is None:
                continue
            option, kind = found
            block = quantizer.type_blocks()[kind.name][0]
            if shape[0] % block:
                fitting = "q8_0" if shape[0] % 32 == 0 else "f16"
                raise ValueError(
                    f"{option}: the rows of {name} have {shape[0]} values, no multiple of the "
                    f"{block} of a block of {kind.name}; name another type, such as {fitting!r}"
                )

    def idle(self, tensors: Mapping[str, tuple[int, ...]]) -> list[str]:
        """What is wrong with options that do nothing for a model with these tensors, in words."""
        told = []
        if _OUTPUT not in tensors and not self.quantize_output:
            told.append(
                "there is no output.weight to leave as it is: the model's output is "
                "token_embd.weight, which is quantized"
            )
        if self.output_tensor_type is not None:
            if _OUTPUT not in tensors:
                told.append(
                    "output_tensor_type does nothing: there is no output.weight, the model's "
                    "output is token_embd.weight, which token_embedding_type is for"
                )
            elif not self.quantize_output:
                told.append("output_tensor_type does nothing: output.weight is left as it is")
        if self.token_embedding_type is not None and not any(
            self.named(name) for name in EMBEDDINGS if name in tensors
        ):
            told.append("token_embedding_type does nothing: the model has no token embeddings")
        return told

    def _in_rules(self, name: str) -> bool:
        return any(quantizer.matching(rule.pattern, [name])[0] for rule in self.rules)


def _named(option: str, name: str | None) -> TensorType | None:
    return None if name is None else tensor_type(name, option)


def _check_alone(**given: bool) -> None:
    """Refuse what a recipe leaves nothing to.

    Args:
        given: each option, and whether it was given.
    """
    for option, is_given in given.items():
        if is_given:
            raise ValueError(
                f"{option} does not go with a recipe, which gives every tensor its type; leave out "
                "one of them"
            )
