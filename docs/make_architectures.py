"""Writes docs/architectures.md: what is collected of each architecture with an MTP graph.

    python docs/make_architectures.py

Everything except the columns of names and notes is measured on forged models, by the functions that
tests/model/test_architectures.py checks against a reading of the engine's graphs. It needs what the
tests need (make tools).
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from helpers import engine_tools  # noqa: E402
from helpers.forge_any import MTP_ARCHS  # noqa: E402
from helpers.measured import (  # noqa: E402
    HEAD_CROPS,
    NO_HEAD_GRAPH,
    NO_TABLES,
    OUTSIDE,
    SEVERAL,
    Measured,
    iq2_xxs_of_most,
    measure,
    never,
)

# From the sizes that load_arch_hparams in src/models/*.cpp knows by name, and the model cards
KNOWN_AS: Mapping[str, str] = {
    "bailingmoe3": "Ling 3 (Bailing MoE V3)",
    "cohere2moe": "Cohere's mixture-of-experts models",
    "deepseek2": "DeepSeek-V2, V3 and R1, Kimi K2, GLM-4.7-Flash",
    "deepseek32": "DeepSeek-V3.2",
    "deepseek4": "DeepSeek-V4",
    "glm-dsa": "GLM-5",
    "glm5-next": "GLM-5.3-Flash",
    "glm4moe": "GLM-4.5, 4.6 and 4.7, GLM-4.5-Air, Solar Open",
    "hy_v3": "Hunyuan 3 (Hy3)",
    "mimo2": "MiMo-V2-Flash",
    "nemotron_h_moe": "Nemotron 3",
    "qwen35": "Qwen3.5, dense",
    "qwen35moe": "Qwen3.5, mixture of experts",
    "qwen3next": "Qwen3-Next",
    "qwen4exp": "Qwen3.8-Flash-Next",
    "step35": "Step-3.5-Flash",
}

NOTES: Mapping[str, str] = {
    "bailingmoe3": "its trunk needs a layer of each kind, recurrent and attention",
    "deepseek2": "its head needs MLA keys, `attention.q_lora_rank` above 0, experts, and no "
    "attention temperature",
    "deepseek4": "`attention.key_length` must differ from `attention.indexer.key_length`",
    "glm5-next": "its trunk needs a layer of each kind, recurrent and attention",
    "mimo2": "the head needs a fused `attn_qkv` and a dense FFN",
    "nemotron_h_moe": "its trunk needs a layer of each kind, recurrent and attention",
    "qwen35": "its trunk needs a layer of each kind, recurrent and attention",
    "qwen35moe": "its trunk needs a layer of each kind, recurrent and attention",
    "qwen3next": "its trunk needs a layer of each kind, recurrent and attention",
    "qwen4exp": "its trunk needs a layer of each kind, recurrent and attention",
}

_LOOKUP = "nextn.embed_tokens.weight"  # the same for all, so it stands once, above the table

_HEADER = """\
# Architectures

<!-- Written by docs/make_architectures.py from what the tests measure; a test compares. -->

The engine has a graph for the MTP head of {n} architectures. This is what `imatrix` collects of
each, measured on small models with random weights: a trunk of two blocks (three if it has that
many kinds), one head, and three heads if the graph takes several.

- **Weights** are matrices in blocks, and vectors that are multiplied as one; "24 of 28" means that
  four of them are never multiplied. Each of the 24 has a row for every token (experts: in sum as
  many rows as tokens times experts used), unless the notes say otherwise. The second figure of
  the head is for a file with `nextn.embed_tokens` and `nextn.shared_head_head`.
- **Never multiplied**: no data can reach these. `Collector.plan(mtp=True).never` names them for a
  given file. If a file has `nextn.embed_tokens`, it is always one of them: it is looked up by
  token.
- **Outputs**: rows for which the run must ask for logits, and so run the LM head, because the graph
  keeps no others at its end. `imatrix` finds out by looking at the graph; no block of a trunk
  needs any, only a weight behind the blocks does.
- **IQ2_XXS**: whether `llama-quantize` succeeds with the matrix of trunk and head, and which weights
  must get a larger type by name because there can be no data; `nextn.embed_tokens` is one of these
  too. With the trunk's matrix alone it ends at a weight of the head, for every architecture here.

"""


def _matrices(measured: Measured) -> tuple[str, str]:
    """How many weights are collected and how many there are, in the trunk and in the head."""
    n_layer = measured.model.n_layer
    idle = [int(name.split(".")[1]) < n_layer for name in measured.never]
    trunk, head = len(measured.trunk), len(measured.head)
    return f"{trunk} of {trunk + sum(idle)}", f"{head} of {head + len(idle) - sum(idle)}"


def _code(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in sorted(names))


def _plain(names: Iterable[str]) -> list[str]:
    return [name.removesuffix(".weight") for name in names]


def _short(names: Iterable[str], n_layer: int) -> list[str]:
    """Names without the number of the block, each once; those of the head are marked."""
    found = []
    for name in names:
        match = re.match(r"blk\.(\d+)\.(.*?)(?:\.weight)?$", name)
        part = f"`{name.removesuffix('.weight')}`" if match is None else f"`{match[2]}`"
        if match is not None and int(match[1]) >= n_layer and not match[2].startswith("nextn"):
            part += " of the head"
        if part not in found:
            found.append(part)
    return found


def _never(arch: str, found: Mapping[str, Measured]) -> str:
    most = found.get("tables", found["plain"])
    by_reason: dict[str, list[str]] = {}
    for name, reason in never(arch).items():
        if name in most.never:
            by_reason.setdefault(reason, []).append(name)
    n_layer = most.model.n_layer
    return "; ".join(
        f"{', '.join(_short(names, n_layer))}: {reason}" for reason, names in by_reason.items()
    )


def _outputs(arch: str, found: Mapping[str, Measured]) -> str:
    plain = found["plain"]
    trunk = f"the trunk's, for {_code(_plain(OUTSIDE[arch]))}; " if plain.trunk_outputs else ""
    if plain.head_outputs:
        return f"{trunk}the head's: {HEAD_CROPS[arch]}"
    where = {"tables": "`shared_head_head`", "three": "more than one head"}
    with_ = [what for name, what in where.items() if name in found and found[name].head_outputs]
    if with_:
        return f"{trunk}the head's with {' or '.join(with_)}"
    return trunk.removesuffix("; ") or "none"


def _row(arch: str, found: Mapping[str, Measured], larger: list[str]) -> str:
    plain = found["plain"]
    trunk, head = _matrices(plain)
    if "tables" in found:
        head += f"; {_matrices(found['tables'])[1]}"
    heads = "any number (3 tried)" if arch in SEVERAL else "1"
    goes = "yes"
    larger = [name for name in larger if not name.endswith(_LOOKUP)]
    if larger:
        goes += f", with a larger type for {', '.join(_short(larger, plain.model.n_layer))}"
    notes = [NOTES[arch]] if arch in NOTES else []
    notes += [
        f"{rows} rows a token for `{name.split('.', 2)[2].removesuffix('.weight')}`"
        for name, rows in plain.rows.items()
        if rows != 1 and "_exps." not in name
    ]
    if arch in NO_TABLES:
        notes.append("no room for `nextn.embed_tokens` and `nextn.shared_head_head`")
    if arch in OUTSIDE:
        names = _code(_plain(OUTSIDE[arch]))
        notes.append(
            f"outside the blocks it has {names}, collected too; llama-imatrix leaves them out"
        )
    cells = [
        f"`{arch}`", KNOWN_AS[arch], heads, trunk, head, _never(arch, found),
        _outputs(arch, found), goes, "; ".join(notes),
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |\n"


def page(found: Mapping[str, tuple[Mapping[str, Measured], list[str]]]) -> str:
    """The text of the page.

    Args:
        found: for each architecture what measure() gives, and the weights that need a larger type
            (iq2_xxs_of_most).
    """
    columns = [
        "architecture", "known as", "heads", "weights of the trunk", "weights of the head",
        "never multiplied", "outputs", "IQ2_XXS", "notes",
    ]  # fmt: skip
    text = _HEADER.format(n=len(found))
    text += "| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|\n"
    text += "".join(_row(arch, *found[arch]) for arch in sorted(found))
    text += (
        f"\nThe engine loads the heads of {_code(NO_HEAD_GRAPH)} too, and has no graph for them: "
        "with `mtp=True` they are refused.\n\n"
        "gemma4's head is a model of its own, `gemma4-assistant`: give it as `mtp_model`.\n"
    )
    return text


def main() -> None:
    quantize = engine_tools.find("llama-quantize")
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for arch in MTP_ARCHS:
            measured = measure(arch, Path(folder))
            found[arch] = (measured, iq2_xxs_of_most(arch, measured, quantize)[0])
            for path in Path(folder).iterdir():
                path.unlink()
    path = ROOT / "docs" / "architectures.md"
    path.write_text(page(found), encoding="utf-8")
    print(path)


if __name__ == "__main__":
    main()
