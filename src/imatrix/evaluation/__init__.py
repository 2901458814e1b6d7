"""How well a model and its MTP head predict a text, with the errors of the figures."""

from __future__ import annotations

from imatrix.evaluation.estimates import Difference, Estimate
from imatrix.evaluation.results import Comparison, Evaluation, Predictions
from imatrix.evaluation.scoring import evaluate

__all__ = ["Comparison", "Difference", "Estimate", "Evaluation", "Predictions", "evaluate"]
