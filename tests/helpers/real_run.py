"""A short run of SAELens's runner on SmolLM2 with both flags, in one process or in those that torchrun has launched.

``torchrun ... -m tests.helpers.real_run FOLDER``; the SAE and its history are in FOLDER/output.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from sae_lens import (
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    LoggingConfig,
    TopKTrainingSAEConfig,
)

from saelens_asi import ActiveSubspaceInit
from saelens_asi.activations.loading import load_model
from saelens_asi.activations.texts import world_english_bible

BATCH, N_STEPS = 256, 6


def run(folder: Path) -> None:
    torch.manual_seed(0)
    sae = TopKTrainingSAEConfig(d_in=576, d_sae=1024, k=16)
    sae.initializer, sae.optimizer = ActiveSubspaceInit(n_tokens=2048), "sparse_adam"
    cfg = LanguageModelSAERunnerConfig(
        sae=sae,
        model_name="smollm2",
        hook_name="blocks.3.hook_attn_out",
        dataset_path="bible",
        is_dataset_tokenized=False,
        context_size=64,
        training_tokens=N_STEPS * BATCH,
        train_batch_size_tokens=BATCH,
        store_batch_size_prompts=8,
        n_batches_in_buffer=4,
        n_batches_for_norm_estimate=2,
        exclude_special_tokens=True,
        lr=3e-4,
        device="cpu",
        checkpoint_path=str(folder / "checkpoints"),
        n_checkpoints=1,
        output_path=str(folder / "output"),
        logger=LoggingConfig(log_to_wandb=False, wandb_log_frequency=1),
        verbose=False,
    )
    text, _ = world_english_bible()
    LanguageModelSAETrainingRunner(cfg, override_model=load_model("smollm2"), override_dataset=text).run()


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(Path(sys.argv[1]))
