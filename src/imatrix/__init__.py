"""imatrix: importance matrices for low-bit GGUF quantization, MTP/NextN heads included.

from imatrix import Collector

with Collector("model-BF16.gguf") as collector:
    matrix = collector.run(open("calibration.txt"), mtp=True)
matrix.save("imatrix.gguf")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from imatrix._version import __version__
from imatrix.chat_template import ChatOptions, ChatTemplate
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
from imatrix.text_sources import Chat, Mixture, Source

if TYPE_CHECKING:
    from imatrix.activation_stats import (
        ActivationStatistics,
        LayerActivations,
        MatrixActivations,
        activation_statistics,
    )
    from imatrix.adaptation import Adapted, Placed, adapt
    from imatrix.cluster import Cluster, ClusterUse
    from imatrix.collector import Collector, Plan
    from imatrix.conversion import convert, merge
    from imatrix.devices import Backends, Device, add_rpc_server, backends
    from imatrix.evaluation import (
        Comparison,
        Difference,
        Estimate,
        Evaluation,
        Predictions,
        evaluate,
    )
    from imatrix.html_report import report_page
    from imatrix.matrix_comparison import MatrixComparison, WeightComparison, compare_matrices
    from imatrix.model_file import ModelFile
    from imatrix.mtp_files import (
        DropReport,
        ExtractReport,
        GraftReport,
        drop_mtp,
        extract_mtp,
        graft_mtp,
    )
    from imatrix.preflight import Coverage, TensorCoverage, coverage
    from imatrix.quantizer import Quantized, quantize
    from imatrix.run_report import ExpertCoverage, Perplexity, Progress, Report
    from imatrix.tensor_rules import RuleUse
    from imatrix.weight_stats import (
        ExpertStatistics,
        LayerStatistics,
        PartStatistics,
        Statistics,
        WeightStatistics,
        expert_statistics,
        statistics,
    )

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
    "Adapted": "adaptation",
    "Placed": "adaptation",
    "adapt": "adaptation",
    "Backends": "devices",
    "Device": "devices",
    "add_rpc_server": "devices",
    "backends": "devices",
    "Collector": "collector",
    "Perplexity": "run_report",
    "Plan": "collector",
    "Progress": "run_report",
    "Comparison": "evaluation",
    "Difference": "evaluation",
    "Estimate": "evaluation",
    "Evaluation": "evaluation",
    "Predictions": "evaluation",
    "evaluate": "evaluation",
    "ModelFile": "model_file",
    "DropReport": "mtp_files",
    "ExtractReport": "mtp_files",
    "GraftReport": "mtp_files",
    "drop_mtp": "mtp_files",
    "extract_mtp": "mtp_files",
    "graft_mtp": "mtp_files",
    "Coverage": "preflight",
    "TensorCoverage": "preflight",
    "coverage": "preflight",
    "ExpertCoverage": "run_report",
    "Report": "run_report",
    "Quantized": "quantizer",
    "quantize": "quantizer",
    "RuleUse": "tensor_rules",
}
# Plain Python, imported on first use for the sake of a short start.
_LAZY = {
    "Cluster": "cluster",
    "ClusterUse": "cluster",
    "MatrixComparison": "matrix_comparison",
    "WeightComparison": "matrix_comparison",
    "compare_matrices": "matrix_comparison",
    "convert": "conversion",
    "merge": "conversion",
    "report_page": "html_report",
    "ActivationStatistics": "activation_stats",
    "LayerActivations": "activation_stats",
    "MatrixActivations": "activation_stats",
    "activation_statistics": "activation_stats",
    "ExpertStatistics": "weight_stats",
    "LayerStatistics": "weight_stats",
    "PartStatistics": "weight_stats",
    "Statistics": "weight_stats",
    "WeightStatistics": "weight_stats",
    "expert_statistics": "weight_stats",
    "statistics": "weight_stats",
}


def __getattr__(name: str) -> Any:
    sources = _NATIVE if name in _NATIVE else _LAZY
    if name not in sources:
        raise AttributeError(f"module 'imatrix' has no attribute {name!r}")
    import importlib
    import importlib.util

    if sources is _NATIVE and importlib.util.find_spec("imatrix._session") is None:
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
