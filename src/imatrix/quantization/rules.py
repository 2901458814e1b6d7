"""Exceptions to a file type: which weights get a type of their own.

A rule is llama-quantize's (--tensor-type, --tensor-type-file): a regular expression, searched for
in the names of the weights, and a ggml type. The first rule that matches a weight counts for it.
Expressions are the engine's, std::regex, and are matched by it here too: Python's dialect differs.

The engine looks at rules only if the file type is a quantized one (llama_tensor_get_type in
src/llama-quant.cpp), so that llama-quantize ignores them for F32, F16 and BF16. Here they apply
to those as well: the engine is asked for Q8_0 with the rules, and with a last one that gives all
other weights the float type.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from imatrix.native import quantizer
from imatrix.tensors import parsed_name
from imatrix.words import few

__all__ = [
    "FLOATS",
    "Request",
    "Rule",
    "RuleUse",
    "TensorType",
    "TensorTypes",
    "read_rules",
    "request",
    "rules_of",
    "tensor_type",
    "uses",
]

TensorTypes = Mapping[str, str] | Iterable[tuple[str, str]]
"""Pattern -> ggml type, or pairs of both: several may have the same pattern, the first counts."""

# llama_ftype_get_default_type in src/llama-quant.cpp: file types whose weights are not quantized
FLOATS = {"F32": "f32", "F16": "f16", "BF16": "bf16"}
# A quantized type whose mixture asks for no data. What it would give to a weight never counts,
# since the last rule matches every name.
_BASE = "Q8_0"
_EVERY_NAME = "."

# std::regex follows nested groups by recursion: whatever the stack's size, some pattern overflows it.
_MAX_PATTERN = 10_000
_MAX_GROUPS = 200

_FEW = 3  # names in a message


class TensorType(NamedTuple):
    """A type of ggml: its name, as the engine spells it, and its number in enum ggml_type."""

    name: str
    number: int


@dataclass(frozen=True)
class Rule:
    """An exception.

    Attributes:
        pattern: regular expression (std::regex, ECMAScript), searched for in a name.
        type: the ggml type, as the engine spells it.
        number: its number in enum ggml_type.
    """

    pattern: str
    type: str
    number: int


@dataclass(frozen=True)
class RuleUse:
    """What came of an exception.

    Attributes:
        pattern, type: the rule.
        tensors: names of the tensors that it counts for: it is the first that matches.
        behind: names of those that it matches too, but an earlier rule does first.
        kept: those of `tensors` that the quantizer leaves as they are whatever a rule says:
            norms, biases, routers, convolution kernels.
        other_type: those of `tensors` whose rows the type does not fit -> the type they get.
        warning: what is wrong with the rule, "" if nothing is.
        shadowed: whether earlier rules have left it nothing that it could change.
        idle: whether it would do nothing alone: it matches nothing, or nothing that is quantized.
    """

    pattern: str
    type: str
    tensors: tuple[str, ...]
    behind: tuple[str, ...]
    kept: tuple[str, ...]
    other_type: Mapping[str, str] = field(default_factory=dict)
    warning: str = ""
    shadowed: bool = False
    idle: bool = False


@dataclass(frozen=True)
class Request:
    """What the engine's quantizer is asked for.

    Attributes:
        ftype: the file type that it works by.
        rules: (pattern, number of the ggml type), the first that matches counts.
        rewritten: whether `ftype` is not the one that was asked for, so that the result's
            general.file_type has to be set.
        unsaid: a line of the engine's log to leave out, since it is about the last rule, which
            nobody gave; "" if there is none.
    """

    ftype: str
    rules: tuple[tuple[str, int], ...]
    rewritten: bool = False
    unsaid: str = ""


def request(ftype: str, rules: Sequence[Rule]) -> Request:
    """How to ask the engine for a file type with exceptions, so that it heeds them."""
    pairs = tuple((rule.pattern, rule.number) for rule in rules)
    if not rules or ftype not in FLOATS:
        return Request(ftype, pairs)
    other = FLOATS[ftype]
    number = quantizer.tensor_types()[other][0]
    unsaid = f"applying manual override: {_BASE.lower()} -> {other}"
    return Request(_BASE, (*pairs, (_EVERY_NAME, number)), rewritten=True, unsaid=unsaid)


def rules_of(tensor_types: TensorTypes | None) -> tuple[Rule, ...]:
    """Exceptions as the engine takes them, in the order given.

    Raises:
        ValueError: a pattern that is empty or no regular expression, or an unknown type.
    """
    pairs = tensor_types.items() if isinstance(tensor_types, Mapping) else tensor_types or ()
    rules = []
    for pair in pairs:
        if isinstance(pair, str) or len(pair) != 2:
            raise ValueError(
                f"tensor_types takes pairs of a pattern and a type, as ('attn_q', 'q8_0'), got "
                f"{pair!r}"
            )
        rules.append(_rule(*pair))
    return tuple(rules)


def _rule(pattern: str, name: str) -> Rule:
    if not isinstance(pattern, str) or not isinstance(name, str):
        raise ValueError(
            f"tensor_types takes a pattern and a type as text, got {pattern!r} and {name!r}"
        )
    if not pattern:
        raise ValueError(f"a pattern for {name!r} is empty; it would match every weight")
    found = tensor_type(name, f"{pattern!r}")
    _check_pattern(pattern)
    return Rule(pattern, found.name, found.number)


def tensor_type(name: str, purpose: str) -> TensorType:
    """A type of ggml by its name, in any case.

    Args:
        name: the name.
        purpose: what the type is for, as an error names it.

    Raises:
        ValueError: the engine cannot quantize to such a type.
    """
    if not isinstance(name, str):
        raise ValueError(f"{purpose} takes the name of a type as text, as 'q8_0', got {name!r}")
    types = {known.lower(): (known, number) for known, (number, _) in _types().items()}
    if name.lower() not in types:
        raise ValueError(
            f"unknown tensor type {name!r} for {purpose}{near(name.lower(), types)}. "
            f"Types: {', '.join(sorted(types))}"
        )
    return TensorType(*types[name.lower()])


def _types() -> dict[str, tuple[int, bool]]:
    return quantizer.tensor_types()


def _check_pattern(pattern: str) -> None:
    """Raises ValueError for what the engine could not search for."""
    wrong = "a pattern in tensor_types is wrong"
    shown = repr(pattern if len(pattern) <= 60 else pattern[:60] + "...")
    if "\0" in pattern:
        raise ValueError(f"{wrong}: {shown} holds a zero byte, which no name has")
    if len(pattern) > _MAX_PATTERN or pattern.count("(") > _MAX_GROUPS:
        raise ValueError(
            f"{wrong}: {shown} has {len(pattern)} characters and {pattern.count('(')} groups; "
            f"{_MAX_PATTERN} and {_MAX_GROUPS} are the most. Give several rules."
        )
    try:
        pattern.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{wrong}: {shown} is not UTF-8") from None
    try:
        quantizer.matching(pattern, [])
    except ValueError as error:
        raise ValueError(
            f"{wrong}: {error}: {shown}. The engine takes expressions of ECMAScript (std::regex): "
            "no look-behind, no flags such as (?i)"
        ) from None


def near(name: str, known: Iterable[str]) -> str:
    """Suggest similar names: "; near: q4_k, q4_1", or "" if there are none."""
    close = difflib.get_close_matches(name, list(known), n=3)
    return f"; near: {', '.join(close)}" if close else ""


def parse_rule(text: str) -> tuple[str, str]:
    """(pattern, type) of NAME=TYPE, as llama-quantize takes it.

    llama-quantize lowers the name (parse_tensor_type in tools/quantize/quantize.cpp). Here the
    letter after a backslash is kept, because \\d means the opposite of \\D.

    Raises:
        ValueError: it is not of that form.
    """
    # from the right: a look-ahead, (?=...), has a sign of its own, and no type has one
    name, _, kind = text.rpartition("=")
    if not name or not kind:
        raise ValueError(f"expected NAME=TYPE, as attn_q=q8_0, got {text!r}")
    lowered = re.sub(r"\\.|[^\\]+", lambda m: m[0] if m[0][0] == "\\" else m[0].lower(), name)
    return lowered, kind


def read_rules(path: str | os.PathLike[str]) -> list[tuple[str, str]]:
    """The rules in a file of llama-quantize's --tensor-type-file, in order.

    Each is NAME=TYPE, with spaces or line ends between them. There are no comments.

    Raises:
        ValueError: a rule is wrong, or there is none; the message has the file and the line.
        OSError: it cannot be read.
    """
    file = Path(path)
    found = []
    data = file.read_bytes().removeprefix(b"\xef\xbb\xbf")
    for number, line in enumerate(data.split(b"\n"), 1):
        for word in line.split():  # where `>>` splits in the C locale
            try:
                pair = parse_rule(word.decode())
                _rule(*pair)
            except UnicodeDecodeError:
                raise ValueError(f"{file}:{number}: not UTF-8: {word!r}") from None
            except ValueError as error:
                raise ValueError(f"{file}:{number}: {error}") from None
            found.append(pair)
    if not found:
        raise ValueError(f"{file}: no rule in it; expected NAME=TYPE, as attn_q=q8_0")
    return found


# --- what comes of them --------------------------------------------------------------------------


def uses(
    rules: Sequence[Rule],
    shapes: Mapping[str, tuple[int, ...]],
    targets: Mapping[str, str],
    quantized: frozenset[str],
    named: frozenset[str] = frozenset(),
) -> tuple[RuleUse, ...]:
    """What each rule does.

    Args:
        rules: in order.
        shapes: of every tensor of the model, ggml order.
        targets: the types that the quantizer would give the tensors, with these rules.
        quantized: tensors that it may quantize at all.
    """
    names = list(shapes)
    blocks = quantizer.type_blocks()
    counts_for: dict[str, Rule] = {}
    found = []
    for rule in rules:
        matched = [
            name
            for name, hit in zip(names, quantizer.matching(rule.pattern, names), strict=True)
            if hit
        ]
        first = tuple(name for name in matched if name not in counts_for)
        behind = tuple(name for name in matched if name in counts_for)
        kept = tuple(n for n in first if n not in quantized and targets[n] != rule.type)
        block = blocks[rule.type][0]
        other = {
            n: targets[n]
            for n in first
            if n in quantized and targets[n] != rule.type and shapes[n][0] % block
        }
        taken = [name for name in behind if name in quantized]
        before = list(dict.fromkeys(counts_for[name].pattern for name in taken or behind))
        counts_for.update(dict.fromkeys(first, rule))
        found.append(
            RuleUse(
                pattern=rule.pattern,
                type=rule.type,
                tensors=first,
                behind=behind,
                kept=kept,
                other_type=other,
                warning=_warning(rule, names, first, taken, before, kept, other, named),
                shadowed=len(kept) == len(first) and bool(taken),
                idle=len(kept) == len(first) and not taken,
            )
        )
    return tuple(found)


def _warning(
    rule: Rule,
    names: Sequence[str],
    first: Sequence[str],
    taken: Sequence[str],
    before: Sequence[str],
    kept: Sequence[str],
    other: Mapping[str, str],
    named: frozenset[str],
) -> str:
    """Say what is wrong with a rule; "" if nothing is.

    Args:
        rule: the rule.
        names: every tensor of the model.
        first: those that the rule counts for.
        taken: those that it matches and the quantizer may change, but an earlier rule counts for.
        before: patterns of the earlier rules.
        kept: those of `first` that the quantizer leaves as they are.
        other: those of `first` that get another type, and that type.
        named: tensors whose type is given by an option of their own.
    """
    subject = f"the rule {rule.pattern}={rule.type}"
    if not first and not before:
        return f"{subject} matches no tensor of the model{_near_misses(rule.pattern, names)}"
    if len(kept) == len(first) and taken:
        return (
            f"{subject} never counts: an earlier rule ({few(before, _FEW)}) matches whatever it could "
            "change"
        )
    if kept and len(kept) == len(first) and named.issuperset(kept):
        return (
            f"{subject} does nothing: output_tensor_type and token_embedding_type count before the "
            f"rules ({few(kept, _FEW)})"
        )
    if len(kept) == len(first):
        return (
            f"{subject} does nothing: the quantizer leaves the tensors that it matches as they are, "
            f"whatever the rules say ({few(kept or first or before, _FEW)})"
        )
    if other:
        kinds = ", ".join(dict.fromkeys(other.values()))
        return (
            f"{subject}: the rows of {len(other)} of {len(first)} tensors are no multiple of its "
            f"block; they get {kinds} ({few(tuple(other), _FEW)})"
        )
    return ""


def _near_misses(pattern: str, names: Sequence[str]) -> str:
    """Suggest what may have been meant by a pattern that matches nothing."""
    lowered = parse_rule(f"{pattern}=f32")[0]
    if lowered != pattern and any(quantizer.matching(lowered, names)):
        return f": names are matched with their case, and {lowered} matches some"
    plain = re.sub(r"\\(.)", r"\1", pattern).strip("^$").lower().removesuffix(".weight")
    places = {name: parsed_name(name) for name in names}
    blocks = {place.block for place in places.values() if place is not None}
    kind_of = {name: name if place is None else place.kind for name, place in places.items()}
    number = re.search(r"blk\.(\d+)", plain)
    if number is not None and blocks and int(number[1]) not in blocks:
        return f": its blocks are {min(blocks)} to {max(blocks)}"
    if plain == "output" and "token_embd.weight" in names and "output.weight" not in names:
        return ": it has no output.weight, its output is token_embd.weight"
    # a kind of tensor, or one of them if the pattern names a block
    kinds = {
        (name if number is not None else kind_of[name]).removesuffix(".weight").lower(): name
        for name in names
    }
    close = difflib.get_close_matches(plain, kinds, n=_FEW)
    if not close:  # a part of a name, as "experts" for "exps"
        parts = {part: kind for kind in kinds for part in kind.split("_")}
        close = list(
            dict.fromkeys(parts[p] for p in difflib.get_close_matches(plain, parts, n=_FEW))
        )
    if not close:
        return "; `imatrix check --json` lists their names"
    shown = [k if k in kinds[k] else kind_of[kinds[k]] for k in close]
    return f"; near: {', '.join(shown)}"
