"""imatrix: importance matrices for low-bit GGUF quantization, MTP/NextN heads included.

from imatrix import Collector

with Collector("model-BF16.gguf") as collector:
    matrix = collector.run(open("calibration.txt"), mtp=True)
matrix.save("imatrix.gguf")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from imatrix._version import __version__
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
from imatrix.formats import FormatError
from imatrix.matrix import Entry, ImportanceMatrix, LeftOut, Provenance, TextSource
from imatrix.text.chats import ChatOptions
from imatrix.text.documents import Chat
from imatrix.text.mixtures import Mixture
from imatrix.text.sources import Source
from imatrix.text.template import ChatTemplate

if TYPE_CHECKING:
    from imatrix.cluster import Cluster, ClusterUse
    from imatrix.collect.collector import Collector
    from imatrix.engine.devices import Backends, Device, add_rpc_server, backends
    from imatrix.engine.plan import Plan
    from imatrix.evaluation import (
        Comparison,
        Difference,
        Estimate,
        Evaluation,
        Predictions,
        evaluate,
    )
    from imatrix.heads.drop import DropReport, drop_mtp
    from imatrix.heads.extract import ExtractReport, extract_mtp
    from imatrix.heads.graft import GraftReport, graft_mtp
    from imatrix.matrix.activations import (
        LayerActivations,
        MatrixActivations,
        activation_statistics,
    )
    from imatrix.matrix.comparison import MatrixComparison, WeightComparison, compare_matrices
    from imatrix.matrix.conversion import convert, merge
    from imatrix.matrix.experts import ExpertCoverage
    from imatrix.matrix.statistics import (
        LayerStatistics,
        PartStatistics,
        Statistics,
        expert_statistics,
        statistics,
    )
    from imatrix.matrix.weight_activations import ActivationStatistics
    from imatrix.matrix.weight_statistics import ExpertStatistics, WeightStatistics
    from imatrix.model.header import ModelFile
    from imatrix.quantization.adaptation import Adapted, Placed, adapt
    from imatrix.quantization.coverage import Coverage, coverage
    from imatrix.quantization.quantizer import Quantized, quantize
    from imatrix.quantization.rules import RuleUse
    from imatrix.quantization.verdicts import TensorCoverage
    from imatrix.report.page import report_page
    from imatrix.text.progress import Perplexity, Progress, Report

__all__ = [
    "ActivationStatistics",
    "Adapted",
    "Backends",
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
    "Report",
    "RowsMissingError",
    "RuleUse",
    "Source",
    "Statistics",
    "TemplateError",
    "TensorCoverage",
    "TextSource",
    "WeightComparison",
    "WeightStatistics",
    "__version__",
    "activation_statistics",
    "adapt",
    "add_rpc_server",
    "backends",
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
    "report_page",
    "statistics",
]

# A module must not bear the name of a function here: importing it would replace the function.
# What needs the native modules is imported on first use, so that a matrix made elsewhere can
# be read, merged and shown where the engine was never built.
_NATIVE = {
    "Adapted": "quantization.adaptation",
    "Placed": "quantization.adaptation",
    "adapt": "quantization.adaptation",
    "Backends": "engine.devices",
    "Device": "engine.devices",
    "add_rpc_server": "engine.devices",
    "backends": "engine.devices",
    "Collector": "collect.collector",
    "Perplexity": "text.progress",
    "Plan": "engine.plan",
    "Progress": "text.progress",
    "Comparison": "evaluation",
    "Difference": "evaluation",
    "Estimate": "evaluation",
    "Evaluation": "evaluation",
    "Predictions": "evaluation",
    "evaluate": "evaluation",
    "ModelFile": "model.header",
    "DropReport": "heads.drop",
    "ExtractReport": "heads.extract",
    "GraftReport": "heads.graft",
    "drop_mtp": "heads.drop",
    "extract_mtp": "heads.extract",
    "graft_mtp": "heads.graft",
    "Coverage": "quantization.coverage",
    "TensorCoverage": "quantization.verdicts",
    "coverage": "quantization.coverage",
    "ExpertCoverage": "matrix.experts",
    "Report": "text.progress",
    "Quantized": "quantization.quantizer",
    "quantize": "quantization.quantizer",
    "RuleUse": "quantization.rules",
}
# Plain Python, imported on first use for the sake of a short start.
_LAZY = {
    "Cluster": "cluster",
    "ClusterUse": "cluster",
    "MatrixComparison": "matrix.comparison",
    "WeightComparison": "matrix.comparison",
    "compare_matrices": "matrix.comparison",
    "convert": "matrix.conversion",
    "merge": "matrix.conversion",
    "report_page": "report.page",
    "ActivationStatistics": "matrix.weight_activations",
    "LayerActivations": "matrix.activations",
    "MatrixActivations": "matrix.activations",
    "activation_statistics": "matrix.activations",
    "ExpertStatistics": "matrix.weight_statistics",
    "LayerStatistics": "matrix.statistics",
    "PartStatistics": "matrix.statistics",
    "Statistics": "matrix.statistics",
    "WeightStatistics": "matrix.weight_statistics",
    "expert_statistics": "matrix.statistics",
    "statistics": "matrix.statistics",
}


def __getattr__(name: str) -> Any:
    sources = _NATIVE if name in _NATIVE else _LAZY
    if name not in sources:
        raise AttributeError(f"module 'imatrix' has no attribute {name!r}")
    import importlib
    import importlib.util

    if sources is _NATIVE and importlib.util.find_spec("imatrix.native.engine") is None:
        raise ImportError(
            f"imatrix.{name} needs the native part, which is not built here. "
            "Run `pip install .` in the source tree (or `make dev` to work on it)."
        )
    module = importlib.import_module(f"imatrix.{sources[name]}")
    # all that it offers: the import has set imatrix.backends to the module, not the function
    for each, source in sources.items():
        if source == sources[name]:
            globals()[each] = getattr(module, each)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted(__all__)
