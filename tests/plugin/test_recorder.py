"""The training history of runs with the flags, from every place where SAELens trains."""

from __future__ import annotations

import json
import logging
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import LoggingConfig, MultiSAETrainingRunner, MultiSAETrainingRunnerConfig
from sae_lens.saes.sae import TrainStepOutput
from sae_lens.synthetic import SyntheticModelConfig, SyntheticSAERunner, SyntheticSAERunnerConfig
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

from saelens_asi import ActiveSubspaceInit, read_history
from saelens_asi.history import TRAINING_HISTORY
from saelens_asi.plugin.boards import TENSORBOARD_FOLDER
from saelens_asi.plugin.recorder import Recorder, Silence, StepFacts
from saelens_asi.resume import MANIFEST
from tests.helpers import tiny

FLAGS: dict[str, Any] = {"initializer": ActiveSubspaceInit(d_init=4, n_tokens=256), "optimizer": "sparse_adam"}
EVERY = LoggingConfig(log_to_wandb=False, wandb_log_frequency=3)


def _steps(records: list[dict[str, Any]]) -> list[int]:
    return [record["step"] for record in records]


class Twin:
    """Measures every step of a trainer from dense activations, and counts silent tokens one feature at a time."""

    def __init__(self, trainer: Any) -> None:
        self.trainer, self.records, self.silent = trainer, [], torch.zeros(trainer.sae.cfg.d_sae)
        self.stock_step = trainer.step
        trainer.step = self.step

    def step(self, batch: Tensor) -> Any:
        lr = self.trainer.optimizer.param_groups[0]["lr"]
        output = self.stock_step(batch)
        acts = output.feature_acts.detach()
        fired = (acts.to_dense() if acts.is_sparse else acts) != 0
        for i in range(fired.shape[1]):
            self.silent[i] = 0 if fired[:, i].any() else self.silent[i] + len(batch)
        x = output.sae_in.double()
        error = (output.sae_out.detach().double() - x).square().sum()
        self.records.append(
            {
                "loss": output.loss.item(),
                "l0": fired.sum().item() / len(batch),
                "nmse": float(error / (x - x.mean(dim=0)).square().sum()),
                "lr": lr,
                "silent": self.silent.clone(),
            }
        )
        return output


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
@pytest.mark.parametrize("optimizer", ["adam", "sparse_adam"])
def test_records_are_those_of_the_steps(architecture: str, optimizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saelens_asi.plugin.recorder.SILENT_TOKENS", (64, 128, 100_000))
    flags = {"initializer": FLAGS["initializer"], "optimizer": optimizer}
    trainer = tiny.trainer(architecture, n_steps=11, lr_warm_up_steps=5, dead_feature_window=2, logger=EVERY, **flags)
    twin = Twin(trainer)
    trainer.fit()
    assert _steps(trainer.history) == [3, 6, 9, 11]
    for record in trainer.history:
        expected = twin.records[record["step"] - 1]
        for name in ("loss", "l0", "nmse", "lr"):
            assert record[name] == pytest.approx(expected[name], rel=1e-4), name
        assert record["explained_variance"] == pytest.approx(1 - expected["nmse"], abs=1e-4)
        assert record["n_tokens"] == record["step"] * tiny.BATCH
        assert record["dead_window_tokens"] == 2 * tiny.BATCH
        assert record["dead_features"] == int((expected["silent"] > 2 * tiny.BATCH).sum())
        assert record["dead_fraction"] == record["dead_features"] / 48
        assert record["never_fired"] == int((expected["silent"] == record["n_tokens"]).sum())
        windows = [n for n in (64, 128) if n <= record["n_tokens"]]
        assert record["silent_features"] == {str(n): int((expected["silent"] >= n).sum()) for n in windows}
        assert sum(record["losses"].values()) == pytest.approx(record["loss"], rel=1e-4)
        is_sparse = architecture.endswith("topk")
        assert (record["grad_norm"] is not None) is is_sparse
    assert trainer.history == json.loads(json.dumps(trainer.history))


def test_the_history_costs_no_forward_pass_and_changes_no_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, calls = [], []
    sae_class = type(tiny.training_sae())
    for method in ("encode_with_hidden_pre", "encode", "decode", "forward"):
        stock = getattr(sae_class, method)

        def counted(self: Any, *args: Any, stock: Any = stock, **kwargs: Any) -> Any:
            calls.append(stock.__name__)
            return stock(self, *args, **kwargs)

        monkeypatch.setattr(sae_class, method, counted)
    for every in (1, 1000):
        torch.manual_seed(0)
        calls.clear()
        logger = LoggingConfig(log_to_wandb=False, wandb_log_frequency=every)
        trainer = tiny.trainer("topk", iter([tiny.activations(tiny.BATCH, seed=i) for i in range(30)]), logger=logger,
                               **FLAGS)  # fmt: skip
        trainer.fit()
        weights.append((trainer.sae.W_dec.detach().clone(), len(calls), len(trainer.history)))
    assert torch.equal(weights[0][0], weights[1][0])
    assert weights[0][1] == weights[1][1]
    assert (weights[0][2], weights[1][2]) == (10, 1)


def test_a_run_without_a_folder_keeps_it_in_memory_and_says_so(
    caplog: pytest.LogCaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with caplog.at_level(logging.INFO, "saelens_asi"):
        trainer = tiny.trainer(**FLAGS)
        trainer.fit()
    assert _steps(trainer.history) == [10]
    assert caplog.text.count("kept in memory, as trainer.history") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_run_without_flags_has_none(model: Any, dataset: Any, tmp_path: Path) -> None:
    changes = {"checkpoint_path": str(tmp_path / "c"), "n_checkpoints": 1, "logger": EVERY}
    tiny.run(tiny.runner_config(tiny.sae_config(), tmp_path, **changes), model, dataset)
    assert list(tmp_path.rglob("*.safetensors"))
    assert not list(tmp_path.rglob(TRAINING_HISTORY))
    assert not hasattr(tiny.trainer(), "history")


@pytest.mark.parametrize("checkpoints", [None, "checkpoints"])
@pytest.mark.parametrize("flag", ["initializer", "optimizer"])
def test_llm_runner(checkpoints: str | None, flag: str, model: Any, dataset: Any, tmp_path: Path) -> None:
    path = checkpoints and str(tmp_path / checkpoints)
    cfg = tiny.runner_config(tiny.sae_config(**{flag: FLAGS[flag]}), tmp_path, logger=EVERY, checkpoint_path=path)
    tiny.run(cfg, model, dataset)
    records = read_history(tmp_path / "output")
    assert _steps(records) == [3, 6, 9, 10]
    assert records[-1]["seconds"] > 0
    if checkpoints:
        assert read_history(cfg.checkpoint_path) == records
    names = {path.name for path in (tmp_path / "output").iterdir()}
    saved = {"cfg.json", "sae_weights.safetensors", "sparsity.safetensors", "runner_cfg.json"}
    assert names - {TENSORBOARD_FOLDER} == {*saved, TRAINING_HISTORY}  # which is there where the package is


def test_with_wandb_the_same_steps_are_written(
    model: Any, dataset: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: list[tuple[int, dict[str, Any]]] = []
    for name in ("init", "finish"):
        monkeypatch.setattr(f"wandb.{name}", lambda **kwargs: None)
    monkeypatch.setattr("wandb.log", lambda values, step: logged.append((step, values)))
    monkeypatch.setattr(LoggingConfig, "log", lambda *args, **kwargs: None)
    logger = LoggingConfig(log_to_wandb=True, wandb_log_frequency=3, eval_every_n_wandb_logs=1000)
    tiny.run(tiny.runner_config(tiny.sae_config(**FLAGS), tmp_path, logger=logger), model, dataset)
    records = read_history(tmp_path / "output")
    wandb = {step + 1: values for step, values in logged if "losses/overall_loss" in values}
    assert _steps(records) == [*wandb, 10]
    for record in records[:-1]:
        values = wandb[record["step"]]
        assert record["loss"] == pytest.approx(values["losses/overall_loss"], rel=1e-5)
        assert record["l0"] == pytest.approx(values["metrics/l0"], rel=1e-5)
        assert record["explained_variance"] == pytest.approx(values["metrics/explained_variance"], abs=1e-5)
        assert record["dead_features"] == values["sparsity/dead_features"]


def _resumable(folder: Path, model: Any, dataset: Any, sae: Any = None, **changes: Any) -> Any:
    settings = {"checkpoint_path": str(folder), "n_checkpoints": 3, "training_tokens": 20 * tiny.BATCH}
    cfg = tiny.runner_config(sae or tiny.sae_config(**FLAGS), folder, logger=EVERY, **{**settings, **changes})
    tiny.run(cfg, model, dataset)
    return cfg


def _checkpoints(folder: Path) -> list[Path]:
    return sorted((path.parent for path in folder.glob("**/trainer_state.pt")), key=lambda path: int(path.name))


def test_a_resumed_run_continues_without_duplicates_or_loss(model: Any, dataset: Any, tmp_path: Path) -> None:
    first = _resumable(tmp_path / "first", model, dataset)
    whole = read_history(first.checkpoint_path)
    checkpoint = _checkpoints(tmp_path / "first")[1]
    assert checkpoint.name == str(11 * tiny.BATCH)
    assert read_history(checkpoint) == whole[:3]
    second = _resumable(tmp_path / "second", model, dataset, resume_from_checkpoint=str(checkpoint))
    records = read_history(second.checkpoint_path)
    assert _steps(records) == _steps(whole) == [3, 6, 9, 12, 15, 18, 20]
    assert records[:3] == whole[:3]
    assert all(a["seconds"] < b["seconds"] for a, b in pairwise(records))
    assert read_history(tmp_path / "second" / "output") == records


def test_a_resume_into_the_same_folder_replaces_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    batches = [tiny.activations(tiny.BATCH, seed=seed) for seed in range(8 + 12)]
    settings = {"n_steps": 12, "logger": EVERY, "checkpoint_path": str(tmp_path), "n_checkpoints": 1, **FLAGS}
    whole = tiny.trainer("topk", iter(batches), **settings)
    whole.fit()
    (checkpoint,) = _checkpoints(tmp_path)
    step = int(checkpoint.name) // tiny.BATCH
    before = read_history(tmp_path)
    resumed = tiny.trainer("topk", iter(batches[8 + step :]), **settings)
    resumed.load_trainer_state(checkpoint)
    resumed.sae.load_weights_from_checkpoint(checkpoint)
    resumed.fit()
    after = read_history(tmp_path)
    assert resumed.history == after
    assert [{**record, "seconds": 0} for record in after] == [{**record, "seconds": 0} for record in before]


def test_a_checkpoint_without_a_history_is_gone_on_from(model: Any, dataset: Any, tmp_path: Path) -> None:
    _resumable(tmp_path / "first", model, dataset)
    checkpoint = _checkpoints(tmp_path / "first")[1]
    (checkpoint / TRAINING_HISTORY).unlink()
    (checkpoint / MANIFEST).unlink()  # as SAELens's own have none
    second = _resumable(tmp_path / "second", model, dataset, resume_from_checkpoint=str(checkpoint))
    assert _steps(read_history(second.checkpoint_path)) == [12, 15, 18, 20]


@pytest.mark.parametrize("checkpoints", [None, "checkpoints"])
def test_multi_runner(checkpoints: str | None, model: Any, dataset: Any, tmp_path: Path) -> None:
    saes = {
        "flag": tiny.sae_config(**FLAGS),
        "stock": tiny.sae_config(),
        "mlp": tiny.sae_config(optimizer="sparse_adam"),
    }
    hooks = {"flag": tiny.ATTN_OUT, "stock": tiny.ATTN_OUT, "mlp": "blocks.0.hook_mlp_out"}
    settings = {
        "context_size": tiny.CONTEXT,
        "n_batches_in_buffer": 16,
        "store_batch_size_prompts": 8,
        "train_batch_size_tokens": tiny.BATCH,
        "training_tokens": 10 * tiny.BATCH,
        "n_checkpoints": 2,
        "checkpoint_path": checkpoints and str(tmp_path / checkpoints),
        "output_path": str(tmp_path / "output"),
        "logger": EVERY,
        "streaming": False,
        "model_name": "tiny",
    }
    cfg = MultiSAETrainingRunnerConfig(saes=saes, hook_names=hooks, **settings)
    MultiSAETrainingRunner(cfg, override_dataset=dataset, override_model=model).run()
    for name in ("flag", "mlp"):
        records = read_history(tmp_path / "output" / name)
        assert _steps(records) == [3, 6, 9, 10]
        if checkpoints:
            assert read_history(Path(cfg.checkpoint_path) / name) == records
            inner = [path.parent for path in Path(cfg.checkpoint_path).glob(f"*/{name}/trainer_state.pt")]
            assert sorted(len(read_history(path)) for path in inner) == [1, 2]
    assert not list(tmp_path.rglob(f"stock/{TRAINING_HISTORY}"))


def test_synthetic_runner(tmp_path: Path) -> None:
    cfg = SyntheticSAERunnerConfig(
        synthetic_model=SyntheticModelConfig(num_features=24, hidden_dim=tiny.D_MODEL, seed=0),
        sae=tiny.sae_config(**FLAGS),
        training_samples=10 * tiny.BATCH,
        batch_size=tiny.BATCH,
        eval_samples=64,
        checkpoint_path=None,
        output_path=str(tmp_path / "output"),
        logger=EVERY,
    )
    SyntheticSAERunner(cfg).run()
    assert _steps(read_history(tmp_path / "output")) == [3, 6, 9, 10]


def test_a_folder_that_cannot_be_written_is_said_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    trainer = tiny.trainer(checkpoint_path=str(tmp_path / "file"), logger=EVERY, **FLAGS)
    with pytest.raises(ValueError, match=r"checkpoint_path='.*file' cannot be written to"):
        trainer.fit()
    assert trainer.n_training_samples == 0


def test_a_history_that_cannot_be_written_stops_no_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / TRAINING_HISTORY).mkdir()
    (tmp_path / TRAINING_HISTORY / "full").write_text("")
    trainer = tiny.trainer(checkpoint_path=str(tmp_path), logger=EVERY, **FLAGS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Recorder, "_set_aside_other_runs", lambda self, path: None)
        trainer.fit()
    assert _steps(trainer.history) == [3, 6, 9, 10]
    assert caplog.text.count("goes on in memory only") == 1


def test_a_users_own_history_is_left_alone(tmp_path: Path) -> None:
    class MyTrainer(SAETrainer[Any, Any]):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.history = "mine"  # type: ignore[assignment]

    trainer = tiny.trainer(trainer_class=MyTrainer, checkpoint_path=str(tmp_path), logger=EVERY, **FLAGS)
    trainer.fit()
    assert trainer.history == "mine"
    assert _steps(read_history(tmp_path)) == [3, 6, 9, 10]


def test_a_recorder_needs_no_trainer(tmp_path: Path) -> None:
    x = tiny.activations(8)
    output = TrainStepOutput(
        sae_in=x,
        sae_out=x,
        feature_acts=x,
        hidden_pre=x,
        loss=torch.tensor(0.5),
        losses={"mse_loss": torch.tensor(0.5)},
    )
    facts = StepFacts(
        step=2,
        n_tokens=16,
        lr=0.1,
        gradient_norm=torch.tensor(3.0),
        coefficients={"l1": 2},
        l0=torch.tensor(1.5),
        n_skipped=0,
    )
    silence = Silence(torch.tensor([0.0, 1.0, 2.0]), torch.tensor([False, False, True]), dead_window=1, batch=8)
    recorder = Recorder()
    recorder.place(None, tmp_path)
    recorder.start_clock()
    recorder.record(output, facts, silence)
    recorder.finish()
    (record,) = recorder.records
    assert read_history(tmp_path) == [record]
    assert {"step": 2, "n_tokens": 16, "lr": 0.1, "grad_norm": 3.0, "l0": 1.5}.items() <= record.items()
    assert {"nmse": 0.0, "explained_variance": 1.0, "loss": 0.5}.items() <= record.items()
    assert {"d_sae": 3, "dead_features": 1, "dead_window_tokens": 8, "never_fired": 1}.items() <= record.items()
    assert record["coefficients"] == {"l1": 2.0}
