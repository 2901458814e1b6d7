"""imatrix: importance matrices for low-bit GGUF quantization, MTP/NextN heads included.

from imatrix import Collector

with Collector("model-BF16.gguf") as collector:
    matrix = collector.run(open("calibration.txt"), mtp=True)
matrix.save("imatrix.gguf")
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from imatrix._version import (
    __version__,
)
from imatrix.errors import (
    CheckpointError,
    ClusterError,
    EngineDiedError,
    EngineError,
    ImatrixError,
    LockedError,
    ModelError,
    NonFiniteError,
    RowsMissingError,
    TemplateError,
)
from imatrix.formats import (
    FormatError,
)
from imatrix.matrix import (
    Entry,
    ImportanceMatrix,
    LeftOut,
    Provenance,
    TextSource,
)
from imatrix.text.chats import (
    ChatOptions,
)
from imatrix.text.documents import (
    Chat,
)
from imatrix.text.mixtures import (
    Mixture,
)
from imatrix.text.sources import (
    Source,
)
from imatrix.text.template import (
    ChatTemplate,
)

# No module directly in imatrix may bear the name of a function here: importing it would replace the
# function.
#
# What is imported on first use, for a short start, and so that a matrix made elsewhere can be read,
# merged and shown in a tree without the native modules. Types are in __init__.pyi.
_MODULES = {
    "Cluster": "cluster",
    "ClusterUse": "cluster",
    "Collector": "collect.collector",
    "Backends": "engine.devices",
    "Device": "engine.devices",
    "UnusableBackend": "engine.devices",
    "add_rpc_server": "engine.devices",
    "backends": "engine.devices",
    "Plan": "engine.plan",
    "Comparison": "evaluation",
    "Difference": "evaluation",
    "Estimate": "evaluation",
    "Evaluation": "evaluation",
    "Predictions": "evaluation",
    "evaluate": "evaluation",
    "DropReport": "heads.drop",
    "drop_mtp": "heads.drop",
    "ExtractReport": "heads.extract",
    "extract_mtp": "heads.extract",
    "GraftReport": "heads.graft",
    "graft_mtp": "heads.graft",
    "LayerActivations": "matrix.activations",
    "MatrixActivations": "matrix.activations",
    "activation_statistics": "matrix.activations",
    "MatrixComparison": "matrix.comparison",
    "WeightComparison": "matrix.comparison",
    "compare_matrices": "matrix.comparison",
    "convert": "matrix.conversion",
    "merge": "matrix.conversion",
    "ExpertCoverage": "matrix.experts",
    "LayerStatistics": "matrix.statistics",
    "PartStatistics": "matrix.statistics",
    "Statistics": "matrix.statistics",
    "expert_statistics": "matrix.statistics",
    "statistics": "matrix.statistics",
    "ActivationStatistics": "matrix.weight_activations",
    "ExpertStatistics": "matrix.weight_statistics",
    "WeightStatistics": "matrix.weight_statistics",
    "ModelFile": "model.header",
    "Adapted": "quantization.adaptation",
    "Placed": "quantization.adaptation",
    "adapt": "quantization.adaptation",
    "Coverage": "quantization.coverage",
    "coverage": "quantization.coverage",
    "Quantized": "quantization.quantizer",
    "quantize": "quantization.quantizer",
    "HeadChoice": "quantization.recipe",
    "Recipe": "quantization.recipe",
    "RuleUse": "quantization.rules",
    "TensorCoverage": "quantization.verdicts",
    "Beside": "recipes.beside",
    "BesideProgress": "recipes.beside",
    "BesideSide": "recipes.beside",
    "compare_beside": "recipes.beside",
    "RecipeProgress": "recipes.measuring",
    "recipe": "recipes.making",
    "report_page": "report.page",
    "Perplexity": "text.progress",
    "Progress": "text.progress",
    "Report": "text.progress",
}

__all__ = [
    "ActivationStatistics",
    "Adapted",
    "Backends",
    "Beside",
    "BesideProgress",
    "BesideSide",
    "Chat",
    "ChatOptions",
    "ChatTemplate",
    "CheckpointError",
    "Cluster",
    "ClusterError",
    "ClusterUse",
    "Collector",
    "Comparison",
    "Coverage",
    "Device",
    "Difference",
    "DropReport",
    "EngineDiedError",
    "EngineError",
    "Entry",
    "Estimate",
    "Evaluation",
    "ExpertCoverage",
    "ExpertStatistics",
    "ExtractReport",
    "FormatError",
    "GraftReport",
    "HeadChoice",
    "ImatrixError",
    "ImportanceMatrix",
    "LayerActivations",
    "LayerStatistics",
    "LeftOut",
    "LockedError",
    "MatrixActivations",
    "MatrixComparison",
    "Mixture",
    "ModelError",
    "ModelFile",
    "NonFiniteError",
    "PartStatistics",
    "Perplexity",
    "Placed",
    "Plan",
    "Predictions",
    "Progress",
    "Provenance",
    "Quantized",
    "Recipe",
    "RecipeProgress",
    "Report",
    "RowsMissingError",
    "RuleUse",
    "Source",
    "Statistics",
    "TemplateError",
    "TensorCoverage",
    "TextSource",
    "UnusableBackend",
    "WeightComparison",
    "WeightStatistics",
    "__version__",
    "activation_statistics",
    "adapt",
    "add_rpc_server",
    "backends",
    "compare_beside",
    "compare_matrices",
    "convert",
    "coverage",
    "drop_mtp",
    "evaluate",
    "expert_statistics",
    "extract_mtp",
    "graft_mtp",
    "merge",
    "quantize",
    "recipe",
    "report_page",
    "statistics",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'imatrix' has no attribute {name!r}")
    try:
        module = importlib.import_module(f"imatrix.{_MODULES[name]}")
    except ImportError as error:
        if importlib.util.find_spec("imatrix.native.engine") is not None:
            raise
        raise ImportError(
            f"imatrix.{name} needs the native part, which is not built here. "
            "Run `pip install .` in the source tree (or `make dev` to work on it)."
        ) from error
    globals()[name] = found = getattr(module, name)
    return found


def __dir__() -> list[str]:
    return sorted(__all__)
