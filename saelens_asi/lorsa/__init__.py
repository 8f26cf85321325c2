"""Low-rank sparse attention (Lorsa, arXiv 2504.20938): train it with ASI, put it into the model, read its features."""

from saelens_asi.history import read_history
from saelens_asi.lorsa.attach import attached, lorsa_loss_recovered, replaced
from saelens_asi.lorsa.attention import AttentionTarget, attention_activations, read_attention
from saelens_asi.lorsa.config import Llama3Scaling, LorsaConfig, LorsaTraining, RotaryPositions
from saelens_asi.lorsa.initialization import LorsaInit, LorsaInitialization, initialize_lorsa_
from saelens_asi.lorsa.io import load_lorsa, save_lorsa
from saelens_asi.lorsa.llamascopium import import_llamascopium
from saelens_asi.lorsa.metrics import lorsa_metrics
from saelens_asi.lorsa.model import Lorsa
from saelens_asi.lorsa.read import FeatureContext, FeatureReading, firing_rates, read_feature, top_contexts, words_of
from saelens_asi.lorsa.sequences import CachedSequences, ModelSequences, batches, token_windows
from saelens_asi.lorsa.training import train_lorsa

__all__ = [
    "AttentionTarget",
    "CachedSequences",
    "FeatureContext",
    "FeatureReading",
    "Llama3Scaling",
    "Lorsa",
    "LorsaConfig",
    "LorsaInit",
    "LorsaInitialization",
    "LorsaTraining",
    "ModelSequences",
    "RotaryPositions",
    "attached",
    "attention_activations",
    "batches",
    "firing_rates",
    "import_llamascopium",
    "initialize_lorsa_",
    "load_lorsa",
    "lorsa_loss_recovered",
    "lorsa_metrics",
    "read_attention",
    "read_feature",
    "read_history",
    "replaced",
    "save_lorsa",
    "token_windows",
    "top_contexts",
    "train_lorsa",
    "words_of",
]
