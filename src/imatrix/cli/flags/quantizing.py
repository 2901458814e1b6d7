"""Flags of `check` and `quantize` that decide what the quantizer does to a tensor."""

from __future__ import annotations

import argparse
from typing import TypedDict

from imatrix.cli.flags import tensor_types

__all__ = ["Options", "add_arguments", "options"]


class Options(TypedDict):
    """Keyword arguments of imatrix.quantize and imatrix.coverage."""

    tensor_types: list[tuple[str, str]]
    recipe: str | None
    output_tensor_type: str | None
    token_embedding_type: str | None
    override_kv: dict[str, bool | int | float | str]
    allow_requantize: bool
    pure: bool
    quantize_output: bool
    keep_split: bool


def add_arguments(command: argparse.ArgumentParser) -> None:
    """The flags of llama-quantize; see `options`."""
    add = command.add_argument
    add(
        "--recipe",
        metavar="FILE",
        help="what imatrix recipe wrote: it gives every tensor its type",
    )
    tensor_types.add_arguments(command)
    add(
        "--output-tensor-type",
        metavar="GGML_TYPE",
        type=_type,
        help="type of output.weight; counts before --tensor-type",
    )
    add(
        "--token-embedding-type",
        metavar="GGML_TYPE",
        type=_type,
        help="type of token_embd.weight; counts before --tensor-type",
    )
    add("--allow-requantize", action="store_true", help="start from quantized weights")
    add("--pure", action="store_true", help="one format for all weights, no mixture")
    add("--leave-output-tensor", action="store_true", help="leave output.weight as it is")
    add(
        "--override-kv",
        metavar="KEY=TYPE:VALUE",
        action="append",
        default=[],
        type=_override,
        help="metadata to write instead of the model's; TYPE is int, float, bool or str. May be "
        "repeated",
    )
    add(
        "--keep-split",
        action="store_true",
        help="the same parts as the model has: DST-00001-of-0000N.gguf and so on",
    )


def options(args: argparse.Namespace) -> Options:
    """The flags as keyword arguments of imatrix.quantize and imatrix.coverage.

    Raises:
        ValueError: a rule of a file is wrong, or a key is given twice.
        OSError: a file cannot be read.
    """
    keys = [key for key, _ in args.override_kv]
    if twice := [key for key in keys if keys.count(key) > 1]:
        raise ValueError(f"--override-kv sets {twice[0]} twice; give each key once")
    return {
        "tensor_types": tensor_types.read(args),
        "recipe": args.recipe,
        "output_tensor_type": args.output_tensor_type,
        "token_embedding_type": args.token_embedding_type,
        "override_kv": dict(args.override_kv),
        "allow_requantize": args.allow_requantize,
        "pure": args.pure,
        "quantize_output": not args.leave_output_tensor,
        "keep_split": args.keep_split,
    }


def _type(text: str) -> str:
    from imatrix.quantization.rules import tensor_type  # here: it needs the native part

    try:
        return tensor_type(text, "a tensor").name
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _override(text: str) -> tuple[str, bool | int | float | str]:
    from imatrix.quantization.keys import overrides_of, parse_override

    try:
        key, value = parse_override(text)
        overrides_of({key: value}, has_matrix=False)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return key, value
