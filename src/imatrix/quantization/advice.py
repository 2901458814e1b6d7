"""Says in words what to do about tensors that stop the quantizer, or that have little data.

Each fix is a sentence, and often a command or options to paste.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence

from imatrix.entries import THIN
from imatrix.errors import ModelError
from imatrix.model.architectures import check_trunk
from imatrix.quantization.cures import Cure, Cures
from imatrix.quantization.keys import spelled
from imatrix.quantization.question import Question
from imatrix.quantization.types import EMBEDDINGS
from imatrix.quantization.verdicts import TensorCoverage, Verdicts
from imatrix.words import few, plural

__all__ = ["Advice"]

_FEW = 3  # names in a sentence

_COLLECT: tuple[Cure, ...] = ("collect", "collect the head", "collect the output")

# What adapt() does for a weight, in a few words.
_HOW = {
    "stacked": "the experts are apart there and merged here",
    "cut": "the experts are merged there and apart here",
    "fused": "weights are apart there and fused here",
    "split": "weights are fused there and apart here",
    "shared": "gate and up take the same rows",
}


class Advice:
    """What to do about the verdicts on a question."""

    def __init__(self, question: Question, cures: Cures, verdicts: Verdicts) -> None:
        self._question = question
        self._cures = cures
        self._verdicts = verdicts

    def fixes(
        self,
        tensors: Sequence[TensorCoverage],
        overrides: Mapping[str, str],
        unused: Sequence[str],
    ) -> Iterable[str]:
        """What to do, the cure before the workaround.

        Args:
            tensors: the verdicts.
            overrides: exceptions that let every missing tensor pass, from Verdicts.overrides.
            unused: entries of the matrix that belong to no tensor of the model.
        """
        question = self._question
        if question.matrix is not None and len(unused) == len(question.matrix):
            yield (
                "No entry of the matrix names a tensor of this model: was it collected from "
                "another one?"
            )
        if any(tensor.status == "wrong size" for tensor in tensors):
            command = self._collect(question.file.n_nextn > 0 and question.head_refusal is None)
            yield (
                "Entries of another size come from another model: collect from this one "
                f"({command})."
            )
        yield from self._missing_fixes([t for t in tensors if t.status == "missing"], overrides)
        if any(tensor.status == "requantize" for tensor in tensors):
            yield (
                "The model is quantized already: start from its F16 or BF16 file, or accept the "
                "loss with --allow-requantize."
            )
        if unseen := [t for t in tensors if t.status == "partial" and t.n_empty]:
            most = max(t.n_empty for t in unseen)
            yield (
                f"{plural(len(unseen), 'tensor')} with parts that saw no rows (at most "
                f"{plural(most, 'expert')} each): the quantizer weighs their columns all the "
                "same (1.0). More or more varied text may reach them."
            )
        elif any(tensor.status == "partial" for tensor in tensors):
            yield f"Parts of tensors saw fewer than {THIN} rows: more text gives a steadier mean."

    def _missing_fixes(
        self, missing: Sequence[TensorCoverage], overrides: Mapping[str, str]
    ) -> Iterable[str]:
        question = self._question
        by_cure: dict[Cure, list[TensorCoverage]] = {}
        for tensor in missing:
            by_cure.setdefault(tensor.cure, []).append(tensor)
        collect = [t for cure in _COLLECT for t in by_cure.get(cure, ())]
        adaptable = by_cure.get("adapt", [])
        merge = by_cure.get("merge", [])
        never = by_cure.get("another type", [])
        unknown = by_cure.get("find out", [])
        named = [t for t in missing if question.options.named(t.name) is not None]
        missing = [t for t in missing if t not in named]
        never = [t for t in never if t not in named]
        unknown = [t for t in unknown if t not in named]
        if collect:  # from this model, which makes up for what could be adapted too
            yield self._collect_fix(collect)
        elif adaptable:
            steps = [step for t in adaptable for step in self._cures.adapted[t.name].steps]
            how = ", ".join(dict.fromkeys(_HOW[step] for step in steps))
            yield (
                f"The matrix has the data of {plural(len(adaptable), 'tensor')} in another form "
                f"({how}): {self._adapt_command(question.matrix_name)}"
            )
        if merge:
            yield (
                f"The engine runs no model whose experts are apart ({plural(len(merge), 'tensor')} "
                "without data): collect from a conversion that has them merged, then adapt: "
                f"{self._adapt_command('MERGED-MATRIX.gguf')}"
            )
        if question.head_refusal and any(t.in_head for t in never):
            yield f"The head cannot be collected: {question.head_refusal}"
        if never:
            even_then = " even then" if collect or adaptable or merge else ""
            why = ", ".join(dict.fromkeys(self._why_never(t) for t in never))
            yield self._with_paste(
                f"No run collects data for {plural(len(never), 'tensor')}{even_then} ({why}): "
                "use a type that needs none",
                never,
            )
        if unknown:
            which = "is" if len(unknown) == 1 else "are"
            yield self._with_paste(
                f"{plural(len(unknown), 'tensor')} of a part that the matrix covers {which} not "
                "in it. A type that needs no data lets such pass",
                unknown,
            )
            yield (
                "Whether a run reaches them, so that collecting again is better: "
                f"{self._check_command()} --plan"
            )
        for tensor in named:
            yield self._named_fix(tensor)
        # a whole model is not spelled out
        if (
            (collect or adaptable or merge)
            and missing
            and (question.matrix is not None or len(overrides) <= 16)
        ):
            yield self._with_paste("Or quantize without the data, at a loss", missing, overrides)

    def _named_fix(self, tensor: TensorCoverage) -> str:
        """What to do about a tensor whose type is given by an option of its own."""
        named = self._question.options.named(tensor.name)
        assert named is not None
        option, kind = named
        return (
            f"{tensor.name} gets {kind.name} from {_flag(option)}, which needs data: name a type "
            f"that needs none, as {_flag(option)} q4_K."
        )

    def _collect_fix(self, tensors: Sequence[TensorCoverage]) -> str:
        """One command that collects them, and all that the matrix has already."""
        question = self._question
        head = question.head_refusal is None and any(t.in_head for t in tensors)
        output = any(t.name == question.lm_head for t in tensors)
        command = self._collect(
            head or (question.head_refusal is None and question.covers_head),
            output or question.lm_head in (question.matrix or ()),
        )
        if all(t.name == question.lm_head for t in tensors):
            return f"Collect {question.lm_head} too: {command}"
        part = "the head's weights" if all(t.in_head for t in tensors) else "the data"
        return f"Collect {part}{' with --mtp' if head else ''}: {command}"

    def _why_never(self, tensor: TensorCoverage) -> str:
        if tensor.name in EMBEDDINGS or ".nextn.embed_tokens." in tensor.name:
            return "rows are looked up in a table"
        if tensor.in_head and self._question.head_refusal:
            return "the head cannot be run"
        if tensor.collectable is False:
            return "no graph multiplies it"
        return "it is collected for blk.* and output.weight alone"

    def _with_paste(
        self,
        words: str,
        tensors: Sequence[TensorCoverage],
        overrides: Mapping[str, str] | None = None,
    ) -> str:
        """Words, and the exceptions to paste.

        Those that were given come last, because the first that matches counts.

        Args:
            overrides: the exceptions; None for one for each of the tensors.
        """
        if self._question.options.recipe is not None:
            names = few([tensor.name for tensor in tensors], _FEW)
            return f"{words}. With this matrix the recipe has to be made again ({names})."
        if overrides is None:
            overrides = self._verdicts.safe_types(t.name for t in tensors)
        if self._question.options.rules:
            words += " (instead of the rules given, which are in it)"
        pairs = [*overrides.items(), *((r.pattern, r.type) for r in self._question.options.rules)]
        lines = (f"--tensor-type {shlex.quote(f'{p}={t}')}" for p, t in pairs)
        return f"{words}:\n" + " \\\n".join(lines)

    def _collect(self, mtp: bool, process_output: bool = False) -> str:
        path = shlex.quote(str(self._question.file.path))
        try:
            check_trunk(self._question.file)
        except ModelError:  # a head's own file
            command = f"imatrix collect -m TRUNK.gguf --mtp-model {path} -f TEXT"
        else:
            command = f"imatrix collect -m {path} -f TEXT" + (" --mtp" if mtp else "")
        return command + (" --process-output" if process_output else "")

    def _adapt_command(self, matrix: str) -> str:
        model = shlex.quote(str(self._question.file.path))
        return f"imatrix adapt {shlex.quote(matrix)} --to {model} -o adapted.gguf"

    def _check_command(self) -> str:
        """This check, as a command."""
        question = self._question
        words = ["imatrix", "check", str(question.file.path)]
        if question.matrix is not None:
            words.append(question.matrix_name)
        options = question.options
        words += ["--type", options.ftype]
        if options.pure:
            words.append("--pure")
        if options.allow_requantize:
            words.append("--allow-requantize")
        if not options.quantize_output:
            words.append("--leave-output-tensor")
        if options.output_tensor_type is not None:
            words += [_flag("output_tensor_type"), options.output_tensor_type.name]
        if options.token_embedding_type is not None:
            words += [_flag("token_embedding_type"), options.token_embedding_type.name]
        if options.keep_split:
            words.append("--keep-split")
        for key, value in options.override_kv:
            words += ["--override-kv", spelled(key, value)]
        if options.recipe is not None:
            return shlex.join([*words, "--recipe", options.recipe_name or "RECIPE.json"])
        for rule in options.rules:
            words += ["--tensor-type", f"{rule.pattern}={rule.type}"]
        return shlex.join(words)


def _flag(option: str) -> str:
    """An option as the commands call it."""
    return f"--{option.replace('_', '-')}"
