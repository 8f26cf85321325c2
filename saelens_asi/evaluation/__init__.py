"""How good SAEs are: dead features by tokens, error, sparsity, predictions; any number of SAEs in one pass."""

from saelens_asi.evaluation.loss import sae_loss_recovered
from saelens_asi.evaluation.metrics import SAEEvaluation, SAELossRecovered
from saelens_asi.evaluation.run import evaluate

__all__ = ["SAEEvaluation", "SAELossRecovered", "evaluate", "sae_loss_recovered"]
