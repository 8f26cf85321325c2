"""Checkpoints and resume of several SAEs trained together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import LoggingConfig, MultiSAETrainingRunner, MultiSAETrainingRunnerConfig, TrainingSAE
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from sae_lens.training.sae_trainer import SAETrainer

from saelens_asi import ActiveSubspaceInit, SparseAdam
from saelens_asi.initialization import METADATA_KEY
from saelens_asi.plugin import estimate
from tests.helpers import tiny

HOOKS = {"ours": tiny.ATTN_OUT, "stock": tiny.ATTN_OUT, "mlp": "blocks.0.hook_mlp_out"}


def _runner(folder: Path, model: Any, dataset: Any, flags: bool = True, **changes: Any) -> MultiSAETrainingRunner:
    asking: dict[str, Any] = {}
    if flags:
        asking = {"initializer": ActiveSubspaceInit(d_init=4, n_tokens=256), "optimizer": "sparse_adam"}
    settings = {
        "context_size": tiny.CONTEXT,
        "n_batches_in_buffer": 16,
        "store_batch_size_prompts": 8,
        "train_batch_size_tokens": tiny.BATCH,
        "training_tokens": 20 * tiny.BATCH,
        "n_checkpoints": 3,
        "streaming": False,
        "checkpoint_path": str(folder),
        "output_path": None,
        "logger": LoggingConfig(log_to_wandb=False),
    }
    saes = {"ours": tiny.sae_config(**asking), "stock": tiny.sae_config(), "mlp": tiny.sae_config("standard", **asking)}
    cfg = MultiSAETrainingRunnerConfig(saes=saes, hook_names=HOOKS, **{**settings, **changes})
    return MultiSAETrainingRunner(cfg, override_dataset=dataset, override_model=model)


def _checkpoints(folder: Path) -> list[Path]:
    return sorted({path.parents[1] for path in folder.glob("*/*/*/trainer_state.pt")}, key=lambda path: int(path.name))


@pytest.fixture(scope="module")
def first(model, dataset, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("first")
    _runner(folder, model, dataset).run()
    return folder


def test_a_resumed_run_does_not_initialise_again_and_keeps_the_records(first, model, dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(estimate, "initialize_", lambda *args: pytest.fail("initialised a second time"))
    trainers: list[SAETrainer] = []
    stock_fit = MultiSAETrainer.fit

    def fit(self: MultiSAETrainer) -> Any:
        trainers.extend(self.trainers.values())
        assert {trainer.n_training_samples for trainer in trainers} == {11 * tiny.BATCH}
        return stock_fit(self)

    monkeypatch.setattr(MultiSAETrainer, "fit", fit)
    checkpoint = _checkpoints(first)[1]
    saes = _runner(tmp_path, model, dataset, resume_from_checkpoint=str(checkpoint)).run()
    assert [isinstance(trainer.optimizer, SparseAdam) for trainer in trainers] == [True, False, True]
    for name in ("ours", "mlp"):
        saved = TrainingSAE.load_from_disk(checkpoint / name)
        assert saved.cfg.metadata[METADATA_KEY]["d_init"] == 4
        assert saes[name].cfg.metadata[METADATA_KEY] == saved.cfg.metadata[METADATA_KEY]
    assert METADATA_KEY not in saes["stock"].cfg.metadata


def test_checkpoints_that_were_passed_are_not_written_again(first, model, dataset, tmp_path):
    names = [path.name for path in _checkpoints(first)]
    assert len(names) == 3
    _runner(tmp_path, model, dataset, resume_from_checkpoint=str(_checkpoints(first)[1])).run()
    assert [path.name for path in _checkpoints(tmp_path)] == names[2:]


def test_an_interrupted_run_leaves_every_sae(model, dataset, tmp_path, monkeypatch):
    stock_step = SAETrainer.step

    def step(self: SAETrainer, batch: torch.Tensor) -> Any:
        if self.n_training_steps == 4:
            raise KeyboardInterrupt
        return stock_step(self, batch)

    monkeypatch.setattr(SAETrainer, "step", step)
    with pytest.raises(KeyboardInterrupt):
        _runner(tmp_path, model, dataset, n_checkpoints=0).run()
    (checkpoint,) = _checkpoints(tmp_path)
    for name in HOOKS:
        assert TrainingSAE.load_from_disk(checkpoint / name).W_dec.shape == (48, tiny.D_MODEL)


def test_a_neighbour_with_the_flags_leaves_a_stock_sae_as_it_would_be(model, dataset, tmp_path):
    weights = []
    for flags in (False, True):
        torch.manual_seed(0)
        saes = _runner(tmp_path / str(flags), model, dataset, flags=flags, n_checkpoints=0).run()
        weights.append(saes["stock"].state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
