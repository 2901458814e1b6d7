"""Types of imatrix: what its table in __init__.py hands on. A test compares the two."""

from imatrix._version import (
    __version__,
)
from imatrix.cluster import (
    Cluster,
    ClusterUse,
)
from imatrix.collect.collector import (
    Collector,
)
from imatrix.engine.devices import (
    Backends,
    Device,
    UnusableBackend,
    add_rpc_server,
    backends,
)
from imatrix.engine.plan import (
    Plan,
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
from imatrix.evaluation import (
    Comparison,
    Difference,
    Estimate,
    Evaluation,
    Predictions,
    evaluate,
)
from imatrix.formats import (
    FormatError,
)
from imatrix.heads.drop import (
    DropReport,
    drop_mtp,
)
from imatrix.heads.extract import (
    ExtractReport,
    extract_mtp,
)
from imatrix.heads.graft import (
    GraftReport,
    graft_mtp,
)
from imatrix.matrix import (
    Entry,
    ImportanceMatrix,
    LeftOut,
    Provenance,
    TextSource,
)
from imatrix.matrix.activations import (
    LayerActivations,
    MatrixActivations,
    activation_statistics,
)
from imatrix.matrix.comparison import (
    MatrixComparison,
    WeightComparison,
    compare_matrices,
)
from imatrix.matrix.conversion import (
    convert,
    merge,
)
from imatrix.matrix.experts import (
    ExpertCoverage,
)
from imatrix.matrix.statistics import (
    LayerStatistics,
    PartStatistics,
    Statistics,
    expert_statistics,
    statistics,
)
from imatrix.matrix.weight_activations import (
    ActivationStatistics,
)
from imatrix.matrix.weight_statistics import (
    ExpertStatistics,
    WeightStatistics,
)
from imatrix.model.header import (
    ModelFile,
)
from imatrix.quantization.adaptation import (
    Adapted,
    Placed,
    adapt,
)
from imatrix.quantization.coverage import (
    Coverage,
    coverage,
)
from imatrix.quantization.quantizer import (
    Quantized,
    quantize,
)
from imatrix.quantization.recipe import (
    HeadChoice,
    Recipe,
)
from imatrix.quantization.rules import (
    RuleUse,
)
from imatrix.quantization.verdicts import (
    TensorCoverage,
)
from imatrix.recipes.beside import (
    Beside,
    BesideProgress,
    BesideSide,
    compare_beside,
)
from imatrix.recipes.making import (
    recipe,
)
from imatrix.recipes.measuring import (
    RecipeProgress,
)
from imatrix.report.page import (
    report_page,
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
from imatrix.text.progress import (
    Perplexity,
    Progress,
    Report,
)
from imatrix.text.sources import (
    Source,
)
from imatrix.text.template import (
    ChatTemplate,
)

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
