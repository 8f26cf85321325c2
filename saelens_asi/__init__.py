"""Active Subspace Initialization and SparseAdam for SAELens (arXiv 2508.16929).

Importing this package adds fields to SAELens's training configs, ``initializer`` and ``optimizer`` first of all.
"""

# ruff: noqa: E402 - what follows imports from SAELens, which is checked first: one message names all that is missing
from saelens_asi.plugin import register

register()

from saelens_asi.dead_features import Autopsy, autopsy
from saelens_asi.evaluation import SAEEvaluation, evaluate
from saelens_asi.history import read_history
from saelens_asi.initialization import ActiveSubspaceInit, Initialization, initialize_, package_version
from saelens_asi.lorsa import Lorsa, LorsaConfig, LorsaInit, LorsaTraining, initialize_lorsa_, train_lorsa
from saelens_asi.planning import Plan, plan
from saelens_asi.sparse_adam import SparseAdam
from saelens_asi.spectra.attention import AttentionDecomposition, decompose_attention_output
from saelens_asi.spectra.components import ComponentLosses, loss_recovered
from saelens_asi.spectra.hook_spectra import activation_spectra, spectra_from_cache
from saelens_asi.spectra.moments import RunningMoments
from saelens_asi.spectra.spectrum import Spectrum, principal_angles

__all__ = [
    "ActiveSubspaceInit",
    "AttentionDecomposition",
    "Autopsy",
    "ComponentLosses",
    "Initialization",
    "Lorsa",
    "LorsaConfig",
    "LorsaInit",
    "LorsaTraining",
    "Plan",
    "RunningMoments",
    "SAEEvaluation",
    "SparseAdam",
    "Spectrum",
    "activation_spectra",
    "autopsy",
    "decompose_attention_output",
    "evaluate",
    "initialize_",
    "initialize_lorsa_",
    "loss_recovered",
    "plan",
    "principal_angles",
    "read_history",
    "register",
    "spectra_from_cache",
    "train_lorsa",
]

__version__ = package_version()
