"""How good SAEs are: dead features by tokens, error, sparsity, predictions; any number of SAEs in one pass."""

from saelens_asi.evaluation.evaluate import evaluate
from saelens_asi.evaluation.loss import SAELossRecovered, sae_loss_recovered
from saelens_asi.evaluation.record import SAEEvaluation

__all__ = ["SAEEvaluation", "SAELossRecovered", "evaluate", "sae_loss_recovered"]
