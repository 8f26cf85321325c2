"""Every config that the types allow trains, or is refused in words before it does."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from saelens_asi import ActiveSubspaceInit
from tests.helpers import tiny

INITIALIZERS = st.one_of(
    st.sampled_from(["default", "active_subspace"]),
    st.fixed_dictionaries(
        {
            "d_init": st.sampled_from(["auto", 0.2, 1, 3, tiny.D_MODEL]),
            "n_tokens": st.sampled_from([2, 64, 500]),
            "center": st.sampled_from(["mean", "zeros"]),
            "subspace": st.sampled_from(["active", "random", "full"]),
        }
    ),
)

SAES = st.fixed_dictionaries(
    {
        "initializer": INITIALIZERS,
        "optimizer": st.sampled_from(["adam", "sparse_adam"]),
        "silent_moments": st.sampled_from(["keep", "decay"]),
        "d_sae": st.sampled_from([1, 5, 24, 48]),
        "normalize_activations": st.sampled_from(
            ["none", "expected_average_only_in", "constant_norm_rescale", "layer_norm", "covariance_whitening"]
        ),
        "dtype": st.sampled_from(["float32", "float64"]),
        "apply_b_dec_to_input": st.booleans(),
        "checkpoint_minutes": st.sampled_from([0, 1e-9, 10.0]),
        "keep_checkpoints": st.integers(1, 3),
        "checkpoint_buffer": st.sampled_from([0, 1.0]),
        "max_skipped_fraction": st.sampled_from([0, 0.01, 1]),
    }
)
TOPK = st.fixed_dictionaries(
    {"k": st.sampled_from([1, 4, 48, 100]), "rescale_acts_by_decoder_norm": st.booleans()},
    optional={"use_sparse_activations": st.booleans(), "aux_loss_coefficient": st.sampled_from([0.0, 1.0])},
)
RUNS = st.fixed_dictionaries(
    {
        "lr_warm_up_steps": st.integers(0, 2),
        "lr_decay_steps": st.integers(0, 2),
        "lr_scheduler_name": st.sampled_from(["constant", "cosineannealing"]),
        "dead_feature_window": st.sampled_from([1, 1000]),
        "feature_sampling_window": st.integers(1, 3),
        "n_checkpoints": st.integers(0, 2),
    }
)


@given(architecture=st.sampled_from(tiny.ARCHITECTURES), sae=SAES, topk=TOPK, run=RUNS)
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
def test_a_config_trains_or_is_refused(architecture, sae, topk, run, tmp_path_factory):
    asked: dict[str, Any] = {**sae, **run, **(topk if architecture.endswith("topk") else {})}
    if architecture == "matryoshka_batchtopk":
        asked["matryoshka_widths"] = sorted({max(1, asked["d_sae"] // 3), asked["d_sae"]})
    asked["checkpoint_path"] = str(tmp_path_factory.mktemp("run"))
    batches = (batch.to(getattr(torch, sae["dtype"])) for batch in tiny.batches())
    made: list[Any] = []
    refused = ""
    try:
        if isinstance(asked["initializer"], dict):
            asked["initializer"] = ActiveSubspaceInit(**asked["initializer"])
        made.append(tiny.trainer(architecture, provider=batches, n_steps=6, **asked))
        trained = made[0].fit()
    except ValueError as error:
        refused = str(error)
        trained = None
    if trained is None:
        assert refused
        assert not made or made[0].n_training_samples == 0
    else:
        assert all(bool(weights.isfinite().all()) for weights in trained.parameters())
