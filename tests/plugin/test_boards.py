"""What goes to W&B beside SAELens's values, and to TensorBoard without W&B: numbers of the history, at its steps."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import wandb
from sae_lens import LoggingConfig
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from wandb.proto import wandb_internal_pb2

from saelens_asi import ActiveSubspaceInit, read_history
from saelens_asi.plugin.boards import TENSORBOARD_FOLDER, TensorBoard, all_of, beside_saelens
from tests.helpers import tiny

FLAGS: dict[str, Any] = {"initializer": ActiveSubspaceInit(d_init=4, n_tokens=256), "optimizer": "sparse_adam"}
EVERY = LoggingConfig(log_to_wandb=False, wandb_log_frequency=3)
BESIDE = {
    "metrics/nmse": "nmse",
    "metrics/explained_variance": "explained_variance",
    "sparsity/never_fired": "never_fired",
    "details/gradient_norm": "grad_norm",
    "details/skipped_tokens": "n_skipped_tokens",
}


@pytest.fixture(autouse=True)
def _windows_that_are_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saelens_asi.plugin.recorder.SILENT_TOKENS", (64, 128, 100_000))


class Written:
    """Stands for TensorBoard's writer."""

    def __init__(self) -> None:
        self.opened: list[tuple[Path, int]] = []
        self.scalars: list[tuple[Path, int, str, float]] = []
        self.n_open = 0

    def SummaryWriter(self, log_dir: str, purge_step: int, flush_secs: int) -> Any:
        folder = Path(log_dir)
        self.opened.append((folder, purge_step))
        self.n_open += 1

        def close() -> None:
            self.n_open -= 1

        def add_scalar(name: str, value: float, step: int) -> None:
            self.scalars.append((folder, step, name, value))

        return SimpleNamespace(add_scalar=add_scalar, close=close)

    def at(self, folder: Path) -> dict[int, dict[str, float]]:
        found: dict[int, dict[str, float]] = {}
        for where, step, name, value in self.scalars:
            if where == folder:
                found.setdefault(step, {})[name] = value
        return found


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> Written:
    found = Written()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", found)  # type: ignore[arg-type]
    return found


def _logged(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, dict[str, Any]]]:
    logged: list[tuple[int, dict[str, Any]]] = []
    monkeypatch.setattr(wandb, "log", lambda values, step: logged.append((step, values)))
    return logged


def _assert_beside(values: dict[str, Any], record: dict[str, Any]) -> None:
    for name, field in BESIDE.items():
        assert values[name] == pytest.approx(record[field], rel=1e-5), name
    live = {f"sparsity/live_features_{n}_tokens": 48 - silent for n, silent in record["silent_features"].items()}
    assert {name: value for name, value in values.items() if "live" in name} == live
    assert values["details/tokens_per_second"] > 0


def test_wandb_gets_them_at_saelens_steps(monkeypatch: pytest.MonkeyPatch, written: Written, tmp_path: Path) -> None:
    logged = _logged(monkeypatch)
    logger = LoggingConfig(log_to_wandb=True, wandb_log_frequency=3, eval_every_n_wandb_logs=1000)
    trainer = tiny.trainer(logger=logger, checkpoint_path=str(tmp_path), **FLAGS)
    monkeypatch.setattr(trainer, "save_checkpoint", lambda *args, **kwargs: None)
    trainer.fit()
    by_step = {step: values for step, values in logged if "losses/overall_loss" in values}
    records = {record["step"]: record for record in trainer.history}
    assert list(by_step) == [2, 5, 8]
    for step, values in by_step.items():
        _assert_beside(values, records[step + 1])
        assert values["details/n_training_samples"] == records[step + 1]["n_tokens"]
    assert len([name for name in by_step[8] if "live" in name]) == 2
    assert written.opened == []


def test_saelens_own_values_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those that it does not name as we do; and a stock run logs what it did."""
    names: list[set[str]] = []
    for flags in ({}, FLAGS):
        logged = _logged(monkeypatch)
        logger = LoggingConfig(log_to_wandb=True, wandb_log_frequency=5, eval_every_n_wandb_logs=1000)
        trainer = tiny.trainer(logger=logger, **flags)
        monkeypatch.setattr(trainer, "save_checkpoint", lambda *args, **kwargs: None)
        trainer.fit()
        names.append(set(next(values for _, values in logged if "losses/overall_loss" in values)))
    stock, with_flags = names
    assert "metrics/nmse" not in stock
    assert stock < with_flags


def test_several_saes_have_them_under_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    logged = _logged(monkeypatch)
    saes = {"flag": tiny.training_sae(**FLAGS), "stock": tiny.training_sae()}
    logger = LoggingConfig(log_to_wandb=True, wandb_log_frequency=3, eval_every_n_wandb_logs=1000)
    data = ({tiny.ATTN_OUT: batch} for batch in tiny.batches())
    trainer = MultiSAETrainer(tiny.trainer(logger=logger).cfg, saes, dict.fromkeys(saes, tiny.ATTN_OUT), data)
    monkeypatch.setattr(trainer, "save_checkpoint", lambda *args, **kwargs: None)
    trainer.fit()
    by_step = {step: values for step, values in logged if "flag/losses/overall_loss" in values}
    assert list(by_step) == [2, 5, 8]
    for step, values in by_step.items():
        (record,) = (one for one in trainer.trainers["flag"].history if one["step"] == step + 1)
        own = {name.removeprefix("flag/"): value for name, value in values.items() if name.startswith("flag/")}
        _assert_beside(own, record)
        assert "stock/metrics/nmse" not in values


def test_tensorboard_gets_the_history_where_wandb_is_off(written: Written, tmp_path: Path) -> None:
    trainer = tiny.trainer(logger=EVERY, checkpoint_path=str(tmp_path), n_checkpoints=1, **FLAGS)
    trainer.fit()
    values = written.at(tmp_path / TENSORBOARD_FOLDER)
    records = read_history(tmp_path)
    assert list(values) == [2, 5, 8, 9] == [record["step"] - 1 for record in records]
    for record in records:
        found = values[record["step"] - 1]
        _assert_beside(found, record)
        assert found["losses/overall_loss"] == record["loss"]
        assert found["losses/mse_loss"] == record["losses"]["mse_loss"]
        assert found["details/n_training_samples"] == record["n_tokens"]
        assert found["details/current_learning_rate"] == record["lr"]
    assert written.n_open == 0

    checkpoint = next(path.parent for path in tmp_path.glob("*/trainer_state.pt"))
    resumed = tiny.trainer(
        logger=EVERY, checkpoint_path=str(tmp_path), n_checkpoints=1, resume=str(checkpoint), **FLAGS
    )
    resumed.fit()
    first = next(record["step"] - 1 for record in records if record["n_tokens"] > int(checkpoint.name))
    assert written.opened == [(tmp_path / TENSORBOARD_FOLDER, 2), (tmp_path / TENSORBOARD_FOLDER, first)]


def test_the_speed_of_a_resumed_run_is_of_what_it_does(tmp_path: Path) -> None:
    """The first record after a checkpoint tells of the tokens since the checkpoint, in the seconds since then."""
    logger = LoggingConfig(log_to_wandb=False, wandb_log_frequency=4)
    settings = {"logger": logger, "checkpoint_path": str(tmp_path), "n_checkpoints": 1, **FLAGS}
    tiny.trainer(**settings).fit()
    checkpoint = next(path.parent for path in tmp_path.glob("*/trainer_state.pt"))
    trainer = tiny.trainer(**settings, resume=str(checkpoint))
    speeds: list[float] = []
    trainer._to_tensorboard = lambda: speeds.append(trainer._recorder.tokens_per_second)
    trainer.fit()
    before, after, _ = trainer.history
    n_tokens = after["n_tokens"] - int(checkpoint.name)
    assert 0 < n_tokens < after["n_tokens"] - before["n_tokens"]
    assert n_tokens / speeds[0] == pytest.approx(after["seconds"] - before["seconds"], abs=0.0011)


def test_a_run_without_a_folder_or_without_tensorboard_writes_none(
    written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tiny.trainer(logger=EVERY, **FLAGS).fit()
    assert written.opened == []
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # as where the package is missing
    with caplog.at_level(logging.WARNING, "saelens_asi"):
        trainer = tiny.trainer(logger=EVERY, checkpoint_path=str(tmp_path), **FLAGS)
        trainer.fit()
    assert len(trainer.history) == 4
    assert not (tmp_path / TENSORBOARD_FOLDER).exists()
    assert "TensorBoard" not in caplog.text


def test_a_full_disk_stops_no_training(
    written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(**settings: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(written, "SummaryWriter", lambda folder, **settings: full())
    trainer = tiny.trainer(logger=EVERY, checkpoint_path=str(tmp_path), **FLAGS)
    trainer.fit()
    assert len(trainer.history) == 4
    assert caplog.text.count("no more is written to TensorBoard") == 1


def test_a_field_that_a_record_lacks_is_left_out_and_one_that_comes_is_taken() -> None:
    record = {
        **{"loss": 1.0, "l0": 4.0, "lr": 0.1, "nmse": 0.5, "explained_variance": 0.5, "grad_norm": None, "d_sae": 48},
        **{"never_fired": 3, "dead_features": 2, "n_tokens": 64, "n_skipped_tokens": 0, "silent_features": {"64": 8}},
        **{"losses": {"mse_loss": 1.0}, "metrics": {"own": 2.0}, "coefficients": {"l1": 3.0}},
    }
    values = beside_saelens(record, 7.0)
    assert "details/gradient_norm" not in values
    assert "sparsity/revived" not in values
    assert values["sparsity/live_features_64_tokens"] == 40
    assert beside_saelens({**record, "revived_features": 5}, 7.0)["sparsity/revived"] == 5
    every = all_of(record, 7.0)
    assert values.items() <= every.items()
    assert {"metrics/own": 2.0, "details/l1_coefficient": 3.0, "sparsity/dead_features": 2}.items() <= every.items()


def test_the_real_tensorboard_reads_them(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    board = TensorBoard()
    for step in (2, 5, 8):
        board.write(tmp_path, step, {"metrics/nmse": step / 10})
    board.close()
    board.write(tmp_path, 5, {"metrics/nmse": 0.7})  # of a run that was resumed
    board.close()
    events = accumulator.EventAccumulator(str(tmp_path / TENSORBOARD_FOLDER))
    events.Reload()
    found = [(event.step, event.value) for event in events.Scalars("metrics/nmse")]
    assert found == [(2, pytest.approx(0.2)), (5, pytest.approx(0.7))]


def _of_file(path: Path) -> Iterator[bytes]:
    """Records of W&B's offline file, which is a log of LevelDB: blocks of 32 KiB, parts with a header of 7 bytes."""
    data, place, record = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        end = place + 7 + int.from_bytes(data[place + 4 : place + 6], "little")
        record += data[place + 7 : end]
        if data[place + 6] in (1, 4):  # whole, or the last part
            yield record
            record = b""
        place = end


def test_wandb_offline_holds_them(model: Any, dataset: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real W&B, without a network: what its file holds are the numbers of the history."""
    for name, value in {"MODE": "offline", "DIR": str(tmp_path), "SILENT": "true"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    logger = LoggingConfig(log_to_wandb=True, wandb_log_frequency=3, eval_every_n_wandb_logs=1000)
    tiny.run(tiny.runner_config(tiny.sae_config(**FLAGS), tmp_path, logger=logger), model, dataset)
    wandb.teardown()  # its own process has then written what it holds

    found: dict[int, dict[str, Any]] = {}
    (path,) = tmp_path.rglob("*.wandb")
    for content in _of_file(path):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(content)
        row = {"".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        if "metrics/nmse" in row:
            found[row["_step"]] = row
    records = {record["step"]: record for record in read_history(tmp_path / "output")}
    assert list(found) == [2, 5, 8]
    for step, values in found.items():
        _assert_beside(values, records[step + 1])
        assert values["losses/overall_loss"] == pytest.approx(records[step + 1]["loss"], rel=1e-5)
