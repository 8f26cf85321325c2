"""Checkpoints, resume, loaded weights and interruptions of runs with the flags."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE, LanguageModelSAETrainingRunner, TrainingSAE
from sae_lens.training._interruption import InterruptedException
from sae_lens.training.activations_store import ActivationsStore
from sae_lens.training.sae_trainer import SAETrainer

from saelens_asi import ActiveSubspaceInit, SparseAdam
from saelens_asi.initialization import METADATA_KEY
from saelens_asi.plugin import estimate
from saelens_asi.plugin.trainer import PluginTrainer
from tests.helpers import third_party, tiny

SETTINGS = ActiveSubspaceInit(d_init=5, n_tokens=256)
FLAGS: dict[str, Any] = {"initializer": SETTINGS, "optimizer": "sparse_adam"}
ALL = (*tiny.ARCHITECTURES, third_party.ARCHITECTURE)


@pytest.fixture
def no_initialization(monkeypatch: pytest.MonkeyPatch):
    """Call it, and any further initialization fails the test."""

    def forbid(*args: Any) -> None:
        pytest.fail("initialised a second time")

    return lambda: monkeypatch.setattr(estimate, "initialize_", forbid)


def _checkpoints(folder: Path) -> list[Path]:
    return sorted((path.parent for path in folder.glob("**/trainer_state.pt")), key=lambda path: int(path.name))


def _runner(folder: Path, model: Any, dataset: Any, sae: Any = None, **changes: Any) -> LanguageModelSAETrainingRunner:
    settings = {"checkpoint_path": str(folder), "n_checkpoints": 3, "training_tokens": 20 * tiny.BATCH}
    cfg = tiny.runner_config(sae or tiny.sae_config(**FLAGS), folder, **{**settings, **changes})
    return LanguageModelSAETrainingRunner(cfg, override_dataset=dataset, override_model=model)


@pytest.mark.parametrize("architecture", ALL)
@pytest.mark.parametrize(
    "optimizer",
    [{"optimizer": "adam"}, {"optimizer": "sparse_adam"}, {"optimizer": "sparse_adam", "silent_moments": "keep"}],
    ids=["adam", "sparse_adam", "keep"],
)
def test_a_resumed_trainer_goes_on_bit_exactly(architecture, optimizer, tmp_path, no_initialization):
    batches = [tiny.activations(tiny.BATCH, seed=seed) for seed in range(8 + 12)]
    flags = {"initializer": SETTINGS, **optimizer}
    settings = {"lr_warm_up_steps": 3, "lr_decay_steps": 4, "dead_feature_window": 2, "n_steps": 12}
    whole = tiny.trainer(architecture, iter(batches), **settings, **flags)
    stock_step = whole.step

    def step(batch: torch.Tensor) -> Any:
        if whole.n_training_steps == 6:
            whole.save_checkpoint("6", base_path=tmp_path)
        return stock_step(batch)

    whole.step = step
    whole.fit()

    no_initialization()
    resumed = tiny.trainer(architecture, iter(batches[8 + 6 :]), **settings, **flags)
    resumed.load_trainer_state(tmp_path / "6")
    resumed.sae.load_weights_from_checkpoint(tmp_path / "6")
    resumed.fit()
    assert resumed.n_training_steps == whole.n_training_steps == 12
    for name, value in whole.sae.state_dict().items():
        assert torch.equal(resumed.sae.state_dict()[name], value), name
    assert resumed.sae.cfg.metadata[METADATA_KEY] == whole.sae.cfg.metadata[METADATA_KEY]


@pytest.mark.parametrize("optimizer", ["adam", "sparse_adam"])
def test_what_a_resume_goes_on_from_lies_in_torchs_own_memory(optimizer, tmp_path):
    """A file's memory is not aligned as torch's is, and other alignments give other bits on some processors."""
    flags = {"initializer": SETTINGS, "optimizer": optimizer, "d_sae": 47}  # an odd size shifts what follows in a file
    whole = tiny.trainer("topk", n_steps=4, **flags)
    whole.fit()
    whole.save_checkpoint("4", base_path=tmp_path)
    resumed = tiny.trainer("topk", n_steps=8, **flags)
    resumed.load_trainer_state(tmp_path / "4")
    resumed.sae.load_weights_from_checkpoint(tmp_path / "4")
    moments = [value for state in resumed.optimizer.state.values() for value in state.values() if value.ndim]
    tensors = [*resumed.sae.parameters(), *moments]
    assert len(tensors) == 4 + 2 * 4 + 3 * (optimizer == "sparse_adam")  # of which step the moments of each row are
    assert all(tensor.data_ptr() % 64 == 0 for tensor in tensors)


@pytest.mark.parametrize("prefetch", [False, 2])
def test_a_resumed_run_keeps_weights_optimizer_and_record(
    prefetch, model, dataset, tmp_path, no_initialization, monkeypatch
):
    _runner(tmp_path / "first", model, dataset).run()
    checkpoint = _checkpoints(tmp_path / "first")[1]
    assert checkpoint.name == str(11 * tiny.BATCH)
    saved = torch.load(checkpoint / "trainer_state.pt")
    record = TrainingSAE.load_from_disk(checkpoint).cfg.metadata[METADATA_KEY]

    started: list[dict[str, Any]] = []
    stock_fit = PluginTrainer.fit

    def fit(self: PluginTrainer) -> Any:
        steps = [state["step"].item() for state in self.optimizer.state.values()]
        started.append({"steps": steps, "n": self.n_training_samples, "lr": self.optimizer.param_groups[0]["lr"]})
        return stock_fit(self)

    monkeypatch.setattr(PluginTrainer, "fit", fit)
    no_initialization()
    resume = {"resume_from_checkpoint": str(checkpoint), "prefetch_llm_batches": prefetch}
    sae = _runner(tmp_path / "second", model, dataset, **resume).run()
    assert started[0]["n"] == 11 * tiny.BATCH
    assert started[0]["steps"] == [state["step"].item() for state in saved["optimizer"]["state"].values()]
    assert max(started[0]["steps"]) == 11
    assert sae.cfg.metadata[METADATA_KEY] == record
    assert SAE.load_from_disk(tmp_path / "second" / "output").cfg.metadata[METADATA_KEY] == record


def test_checkpoints_that_were_passed_are_not_written_again(model, dataset, tmp_path):
    _runner(tmp_path / "first", model, dataset).run()
    names = [path.name for path in _checkpoints(tmp_path / "first")]
    assert len(names) == 3
    resume = {"resume_from_checkpoint": str(_checkpoints(tmp_path / "first")[1])}
    _runner(tmp_path / "second", model, dataset, **resume).run()
    assert [path.name for path in _checkpoints(tmp_path / "second")] == names[2:]


def test_a_prefetching_resume_sees_the_batches_of_a_plain_one(model, dataset, tmp_path, monkeypatch):
    unshuffled = {"activations_mixing_fraction": 0}
    _runner(tmp_path / "first", model, dataset, **unshuffled).run()
    checkpoint = _checkpoints(tmp_path / "first")[1]
    seen: dict[Any, list[torch.Tensor]] = {}
    stock_step = SAETrainer.step

    for prefetch in (False, 2):
        seen[prefetch] = []

        def step(self: Any, batch: torch.Tensor, batches: list[torch.Tensor] = seen[prefetch]) -> Any:
            batches.append(batch.clone())
            return stock_step(self, batch)

        monkeypatch.setattr(SAETrainer, "step", step)
        resume = {"resume_from_checkpoint": str(checkpoint), "prefetch_llm_batches": prefetch, **unshuffled}
        _runner(tmp_path / str(prefetch), model, dataset, **resume).run()
    assert len(seen[False]) == len(seen[2]) == 9
    assert all(torch.equal(a, b) for a, b in zip(seen[False], seen[2], strict=True))


def test_the_state_of_another_optimizer_is_refused(model, dataset, tmp_path):
    _runner(tmp_path / "first", model, dataset, sae=tiny.sae_config()).run()
    checkpoint = _checkpoints(tmp_path / "first")[0]
    runner = _runner(tmp_path / "second", model, dataset, resume_from_checkpoint=str(checkpoint))
    with pytest.raises(ValueError, match=r"optimizer was 'adam' and is 'sparse_adam'"):
        runner.run()


@pytest.mark.parametrize("optimizer", ["adam", "sparse_adam"])
def test_loaded_weights_are_not_initialised_and_take_the_configs_optimizer(
    optimizer, model, dataset, tmp_path, no_initialization, monkeypatch
):
    first = tiny.trainer(n_steps=2, **FLAGS).fit()
    first.save_model(tmp_path / "weights")
    no_initialization()
    trainers: list[SAETrainer] = []
    stock_fit = SAETrainer.fit

    def fit(self: SAETrainer) -> Any:
        trainers.append(self)
        assert all(torch.equal(value, first.state_dict()[name]) for name, value in self.sae.state_dict().items())
        return stock_fit(self)

    monkeypatch.setattr(SAETrainer, "fit", fit)
    changes = {"from_pretrained_path": str(tmp_path / "weights"), "checkpoint_path": None, "n_checkpoints": 0}
    asking = tiny.sae_config(initializer=SETTINGS, optimizer=optimizer)
    sae = _runner(tmp_path, model, dataset, sae=asking, **changes).run()
    assert isinstance(trainers[0].optimizer, SparseAdam) is (optimizer == "sparse_adam")
    assert (sae.cfg.initializer, sae.cfg.optimizer) == ("default", optimizer)
    assert sae.cfg.metadata[METADATA_KEY] == first.cfg.metadata[METADATA_KEY]


def _interrupt_after(n_batches: int, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stock_next = ActivationsStore.__next__
    count = 0

    def interrupted_next(self: ActivationsStore) -> torch.Tensor:
        nonlocal count
        count += 1
        if count > n_batches:
            if how == "KeyboardInterrupt":
                raise KeyboardInterrupt
            signal.raise_signal(getattr(signal, how))
        return stock_next(self)

    monkeypatch.setattr(ActivationsStore, "__next__", interrupted_next)


@pytest.mark.parametrize("how", ["KeyboardInterrupt", "SIGINT", "SIGTERM"])
def test_an_interrupted_run_leaves_a_checkpoint_to_resume_from(how, model, dataset, tmp_path, no_initialization):
    with pytest.MonkeyPatch.context() as patch:
        _interrupt_after(4, how, patch)
        with pytest.raises((KeyboardInterrupt, InterruptedException)):
            _runner(tmp_path / "first", model, dataset, n_checkpoints=0).run()
    (checkpoint,) = _checkpoints(tmp_path / "first")
    # A signal lets the step end that it came in; an exception ends it.
    assert checkpoint.name == str((4 if how == "KeyboardInterrupt" else 5) * tiny.BATCH)
    loaded = TrainingSAE.load_from_disk(checkpoint)
    assert loaded.cfg.metadata[METADATA_KEY]["d_init"] == 5
    assert json.loads((checkpoint / "runner_cfg.json").read_text())["sae"]["optimizer"] == "sparse_adam"

    no_initialization()
    resumed = _runner(tmp_path / "second", model, dataset, resume_from_checkpoint=str(checkpoint)).run()
    assert resumed.cfg.metadata[METADATA_KEY] == loaded.cfg.metadata[METADATA_KEY]


def test_an_interruption_during_the_estimate_is_not_masked(model, dataset, tmp_path, monkeypatch):
    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ActivationsStore, "get_filtered_llm_batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _runner(tmp_path, model, dataset).run()
    assert _checkpoints(tmp_path) == [], "weights that were never initialised look like a checkpoint"


def test_an_interrupted_trainer_without_a_checkpoint_path_just_stops(tmp_path, monkeypatch):
    def provider() -> Any:
        stream = tiny.batches()
        for _ in range(8 + 3):
            yield next(stream)
        raise KeyboardInterrupt

    for path in (None, tmp_path):
        trainer = tiny.trainer(provider=provider(), checkpoint_path=None if path is None else str(path), **FLAGS)
        with pytest.raises(KeyboardInterrupt):
            trainer.fit()
    (checkpoint,) = _checkpoints(tmp_path)
    assert checkpoint.name == str(3 * tiny.BATCH)
