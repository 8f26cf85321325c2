"""What SAELens does that a run with the flags has to refuse, to mend or to know (checked on 6.54.12).

What its SAEs leave behind, and which of their methods are stock, stands in ``activations/sae_state``, below the rooms
that ask.
"""

from __future__ import annotations

from dataclasses import replace

from sae_lens.config import SAETrainerConfig

from saelens_asi.activations.sae_state import NORMALIZED_INSIDE
from saelens_asi.plugin.fields import AnyTrainingSAE

# Added by SAELens to the covariance's eigenvalues before it inverts them (ActivationScaler.estimate_whitening).
WHITENING_EPS = 1e-3


def with_lr_end(cfg: SAETrainerConfig) -> SAETrainerConfig:
    """A config with the documented default of ``lr_end``, which only SAELens's runners fill in."""
    return replace(cfg, lr_end=cfg.lr / 10) if cfg.lr_end is None else cfg


def refuse_known_failures(cfg: SAETrainerConfig, sae: AnyTrainingSAE) -> None:
    """Raise ValueError for settings with which SAELens itself fails later in the run."""
    topk_family = hasattr(sae, "calculate_topk_aux_loss")
    if topk_family and sae.cfg.use_sparse_activations and sae.cfg.rescale_acts_by_decoder_norm:
        raise ValueError(
            "use_sparse_activations=True with rescale_acts_by_decoder_norm=True fails in SAELens's backward pass: "
            "set use_sparse_activations=False (or rescale_acts_by_decoder_norm=False)"
        )
    if sae.cfg.normalize_activations not in NORMALIZED_INSIDE or not topk_family:
        return
    if hasattr(sae.cfg, "matryoshka_widths"):
        raise ValueError(
            f"normalize_activations={sae.cfg.normalize_activations!r} fails in SAELens's matryoshka decoder "
            "(its statistics are used up by the first level): set 'none' or 'expected_average_only_in'"
        )
    if cfg.dead_feature_window < cfg.total_training_steps:
        raise ValueError(
            f"normalize_activations={sae.cfg.normalize_activations!r} with a TopK architecture: SAELens's auxiliary "
            f"loss raises as soon as one feature is dead (dead_feature_window={cfg.dead_feature_window} of "
            f"{cfg.total_training_steps} steps). Set dead_feature_window={cfg.total_training_steps} or more, or "
            "normalize_activations='expected_average_only_in'"
        )
