"""What goes wrong in a run, and what is left of it: one fault a test, each in a run of SAELens's own."""

from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sae_lens import LanguageModelSAETrainingRunner
from sae_lens.config import SAETrainerConfig
from sae_lens.training._interruption import InterruptedException
from sae_lens.training.activations_store import ActivationsStore
from sae_lens.training.sae_trainer import SAETrainer

from saelens_asi import ActiveSubspaceInit
from saelens_asi import resume as resuming
from saelens_asi.plugin import checkpoints as keeping
from saelens_asi.plugin.trainer import PluginTrainer
from saelens_asi.resume import MANIFEST, damage, one_writer, read_manifest
from tests.helpers import kept_run, tiny
from tests.helpers.damage import Hostile

FLAGS: dict[str, Any] = {"initializer": ActiveSubspaceInit(d_init=4, n_tokens=256), "optimizer": "sparse_adam"}


def _checkpoints(folder: Path) -> list[Path]:
    found = (path.parent for path in folder.glob(f"**/{MANIFEST}"))
    return sorted((path for path in found if damage(path) is None), key=lambda path: read_manifest(path)["written"])


def _by_hand(folder: Path, n_steps: int = 20, **changes: Any) -> Any:
    changes = {"provider": kept_run.Batches(), "checkpoint_path": str(folder), **FLAGS, **changes}
    return tiny.trainer(n_steps=n_steps, **changes)


def _end(trainer: Any) -> dict[str, torch.Tensor]:
    moments = trainer.optimizer.state_dict()["state"]
    return {
        **trainer.sae.state_dict(),
        **{f"{n}.{name}": torch.as_tensor(v) for n, state in moments.items() for name, v in state.items()},
        "fired": trainer.act_freq_scores,
        "silent": trainer.n_forward_passes_since_fired,
    }


def _same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# Signals


@pytest.mark.parametrize("numbers", [["SIGTERM"], ["SIGINT"], ["SIGTERM", "SIGTERM"], ["SIGINT", "SIGTERM"]], ids=str)
def test_a_signal_lets_the_step_end_and_the_run_goes_on_exactly(numbers, tmp_path, monkeypatch):
    torch.manual_seed(0)
    whole = _by_hand(tmp_path / "whole")
    whole.fit()
    torch.manual_seed(0)
    stopped = _by_hand(tmp_path / "stopped")
    stock = stopped.sae.training_forward_pass
    stock_step = type(stopped)._train_step

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.steps_done() == 11:
            for number in numbers:
                signal.raise_signal(getattr(signal, number))
        return stock_step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(type(stopped), "_train_step", step)
        with pytest.raises(KeyboardInterrupt if numbers[0] == "SIGINT" else SystemExit):
            stopped.fit()
    assert stock == stopped.sae.training_forward_pass
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    (path,) = _checkpoints(tmp_path / "stopped")
    assert (path.name, read_manifest(path)["reason"]) == (str(12 * tiny.BATCH), "interrupt")
    assert read_manifest(path)["n_training_steps"] == 12
    resumed = _by_hand(tmp_path / "stopped", resume="latest")
    resumed.fit()
    assert _same(_end(whole), _end(resumed))


def test_a_handler_of_the_users_own_is_called_once_the_run_is_saved(tmp_path):
    """One that returns, such as that of a queue, lets the run go on."""
    saved: list[int] = []

    def own(number: int, frame: Any) -> None:
        saved.extend(int(path.name) // tiny.BATCH for path in _checkpoints(tmp_path))

    class Batches(kept_run.Batches):
        def __next__(self) -> torch.Tensor:
            if self.n == 8 + 5:
                signal.raise_signal(signal.SIGTERM)
            return super().__next__()

    before = signal.signal(signal.SIGTERM, own)
    try:
        trainer = _by_hand(tmp_path, provider=Batches())
        trainer.fit()
        assert signal.getsignal(signal.SIGTERM) is own
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (saved, trainer.steps_done()) == ([6], 20)


def test_killed_processes_end_as_untouched_ones(tmp_path):
    """Real processes, at random moments; ``make kills`` does this some hundred times, and to every kind of run."""
    command = [sys.executable, "-m", "benchmarks.kills", "--kills", "12", "--out", str(tmp_path / "kills.json")]
    kinds = ["prefetch", "multi", "synthetic", "cached"]
    subprocess.run([*command, "--kinds", *kinds], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    told = json.loads((tmp_path / "kills.json").read_text())["all"]
    assert (told["kills"] >= 12, told["lost"], told["bit_exact"]) == (True, 0, told["runs"])


# Exceptions


class _Fails(kept_run.Batches):
    def __init__(self, at: int, error: BaseException) -> None:
        super().__init__()
        self.at, self.error = at, error

    def __next__(self) -> torch.Tensor:
        if self.n == self.at:
            raise self.error
        return super().__next__()


@pytest.mark.parametrize(
    "error", [OSError("the hub is gone"), StopIteration(), RuntimeError("out of memory"), KeyboardInterrupt()], ids=repr
)
def test_a_data_source_that_fails_leaves_an_exact_checkpoint(error, tmp_path, caplog):
    torch.manual_seed(0)
    whole = _by_hand(tmp_path / "whole")
    whole.fit()
    torch.manual_seed(0)
    with pytest.raises(type(error)):
        _by_hand(tmp_path / "failed", provider=_Fails(8 + 13, error)).fit()
    (path,) = _checkpoints(tmp_path / "failed")
    assert path.name == str(13 * tiny.BATCH)
    assert f"resume_from_checkpoint={str(path)!r}" in caplog.text
    resumed = _by_hand(tmp_path / "failed", resume=str(path))
    resumed.fit()
    assert _same(_end(whole), _end(resumed))


@pytest.mark.parametrize("architecture", ["topk", "standard"])
def test_memory_that_runs_out_in_a_step_leaves_an_exact_checkpoint(architecture, tmp_path, monkeypatch):
    torch.manual_seed(0)
    whole = _by_hand(tmp_path / "whole", architecture=architecture)
    whole.fit()
    torch.manual_seed(0)
    failing = _by_hand(tmp_path / "failed", architecture=architecture)
    stock = type(failing)._train_step

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.steps_done() == 9:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return stock(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(type(failing), "_train_step", step)
        with pytest.raises(torch.OutOfMemoryError):
            failing.fit()
    (path,) = _checkpoints(tmp_path / "failed")
    assert path.name == str(9 * tiny.BATCH)
    # The batch that failed comes first; what follows has its place as before, for one more failure.
    again = _by_hand(tmp_path / "failed", architecture=architecture, resume="latest", n_checkpoints=4)
    again.fit()
    assert _same(_end(whole), _end(again))
    shutil.rmtree(_checkpoints(tmp_path / "failed")[-1])
    resumed = _by_hand(tmp_path / "failed", architecture=architecture, resume="latest")
    resumed.fit()
    assert resumed.steps_done() == 20
    assert _same(_end(whole), _end(resumed))


def test_half_a_step_of_the_optimizer_is_never_saved(tmp_path, caplog):
    trainer = _by_hand(tmp_path, n_checkpoints=4)

    def fail(*unused: Any) -> None:
        if trainer.steps_done() == 10:
            raise RuntimeError("a device is gone")

    trainer.optimizer.register_step_post_hook(fail)
    with pytest.raises(RuntimeError, match="a device is gone"):
        trainer.fit()
    paths = _checkpoints(tmp_path)
    assert [int(path.name) // tiny.BATCH for path in paths] == [5, 9]
    assert f"no checkpoint can be written of that. set resume_from_checkpoint={str(paths[-1])!r}" in caplog.text


@pytest.mark.parametrize("kind", ["tokens", "multi"])
def test_an_interrupt_before_training_leaves_no_checkpoint(kind, tmp_path, monkeypatch):
    stock, seen = ActivationsStore.get_batch_tokens, []

    def get(self: ActivationsStore, *args: Any, **kwargs: Any) -> Any:
        seen.append(signal.raise_signal(signal.SIGTERM) if len(seen) == 2 else None)
        return stock(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(ActivationsStore, "get_batch_tokens", get)
        with pytest.raises(InterruptedException):
            kept_run.train(kind, tmp_path, 10)
    assert list((tmp_path / "checkpoints").glob("**/*.safetensors")) == []
    kept_run.train(kind, tmp_path, 10)


# The disk


def test_a_full_disk_does_not_end_the_run(tmp_path, caplog):
    """Files of more than 12 kB fail from the eighth step to the fourteenth, as on a disk that is full."""
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)

    class Batches(kept_run.Batches):
        def __next__(self) -> torch.Tensor:
            limit = 12_000 if 8 + 8 <= self.n < 8 + 14 else unlimited[0]
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, unlimited[1]))
            return super().__next__()

    torch.manual_seed(0)
    whole = _by_hand(tmp_path / "whole")
    whole.fit()
    torch.manual_seed(0)
    try:
        trainer = _by_hand(tmp_path / "full", provider=Batches(), n_checkpoints=9)
        trainer.fit()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert _same(_end(whole), _end(trainer))
    steps = [int(path.name) // tiny.BATCH for path in _checkpoints(tmp_path / "full")]
    assert steps == [3, 5, 7, 15, 17, 19]
    assert caplog.text.count("no checkpoint was written") == 3
    assert f"the last good one is {tmp_path / 'full' / str(7 * tiny.BATCH)}" in caplog.text
    assert not list((tmp_path / "full").glob(".*.tmp"))


def test_checkpoints_by_time_and_how_many_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(resuming, "_SHARE_OF_TIME", 1e9)
    trainer = _by_hand(tmp_path, n_checkpoints=2, checkpoint_minutes=1e-9, keep_checkpoints=3)
    trainer.fit()
    told = [(int(path.name) // tiny.BATCH, read_manifest(path)["reason"]) for path in _checkpoints(tmp_path)]
    assert told == [(7, "asked for"), (14, "asked for"), (17, "interval"), (18, "interval"), (19, "interval")]


def test_checkpoints_take_at_most_their_share_of_the_time(tmp_path, monkeypatch):
    """A checkpoint of two seconds is followed by no other for two hundred."""
    now = [0.0]
    monkeypatch.setattr(keeping.time, "monotonic", lambda: now[0])
    keeper = keeping.Keeper(keeping.KeepSettings(0.5, 2, 1.0), tmp_path, lambda: {"run": "a"})
    now[0] = 31.0
    assert keeper.is_due("2")
    with keeper.writing("1", "interval") as folder:
        (folder / "file").write_text("")
        now[0] += 2
    now[0] += 199
    assert not keeper.is_due("2")
    now[0] += 2
    assert keeper.is_due("2")


def test_no_checkpoints_by_time_where_none_are_wanted(tmp_path, monkeypatch):
    monkeypatch.setattr(resuming, "_SHARE_OF_TIME", 1e9)
    _by_hand(tmp_path, checkpoint_minutes=0).fit()
    assert _checkpoints(tmp_path) == []


def test_without_the_buffer_the_log_says_what_is_lost(tmp_path, caplog):
    cfg = {"n_checkpoints": 2, "checkpoint_path": str(tmp_path)}
    sae = tiny.sae_config(**FLAGS, checkpoint_buffer=0)
    tiny.run(tiny.runner_config(sae, tmp_path, **cfg), tiny.hooked_transformer(), tiny.tokens())
    assert "a resume does not repeat its" in caplog.text
    path = _checkpoints(tmp_path)[0]
    caplog.clear()
    cfg |= {"resume_from_checkpoint": str(path)}
    tiny.run(tiny.runner_config(sae, tmp_path, **cfg), tiny.hooked_transformer(), tiny.tokens())
    assert "holds no mixing buffer" in caplog.text


def test_two_runs_do_not_write_one_folder(tmp_path):
    with one_writer(tmp_path, "checkpoint_path"):
        code = "from saelens_asi.resume import one_writer\nwith one_writer({!r}, 'checkpoint_path'): pass"
        told = subprocess.run([sys.executable, "-c", code.format(str(tmp_path))], capture_output=True, text=True)
    assert told.returncode == 1
    assert f"is being written by process {os.getpid()} on " in told.stderr
    with one_writer(tmp_path, "checkpoint_path"):
        pass


# What is damaged


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    kept_run.train("text", folder, 20)
    return folder


FILES = (
    *("cfg.json", "sae_weights.safetensors", "trainer_state.pt", "activation_scaler.json", "data_place.safetensors"),
    *("generators.safetensors", "guard.json", "training_history.jsonl", "sparsity.safetensors", MANIFEST),
)


@given(
    name=st.sampled_from(FILES),
    how=st.sampled_from(["flip", "cut", "empty", "swap", "missing", "folder"]),
    place=st.floats(0, 1, exclude_max=True),
)
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
def test_a_damaged_checkpoint_is_passed_over_or_refused(name, how, place, run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("damaged") / "run"
    shutil.copytree(run, folder)
    before, newest = _checkpoints(folder)[-2:]
    harm(newest / name, how, place)
    runner = _runner(folder, resume_from_checkpoint=str(newest))
    if how == "flip" and name == MANIFEST and damage(newest) is None:
        return  # a letter of what the manifest tells beside its files
    if name == MANIFEST:
        assert damage(newest) is not None
    else:
        with pytest.raises(ValueError, match=r"resume_from_checkpoint=.* (is damaged|cannot be read)"):
            runner.run()
    latest = _runner(folder, resume_from_checkpoint="latest")
    latest.run()
    assert latest.cfg.resume_from_checkpoint == str(before)


def harm(path: Path, how: str, place: float) -> None:
    data = bytearray(path.read_bytes())
    at = int(place * len(data))
    if how == "flip":
        data[at] ^= 1 << (at % 8)
    elif how == "cut":
        data = data[:at]
    elif how == "empty":
        data = bytearray()
    elif how == "swap":
        data = data[at:] + data[:at] if at else data[::-1]
    path.unlink()
    if how == "folder":
        path.mkdir()
    elif how != "missing":
        path.write_bytes(bytes(data))


@pytest.mark.parametrize("name", ["trainer_state.pt", "data_provider.pt"])
def test_no_pickle_is_executed(name, tmp_path):
    _by_hand(tmp_path / "run", n_checkpoints=1).fit()
    (path,) = _checkpoints(tmp_path / "run")
    assert (path / name).exists()
    with (path / name).open("wb") as file:
        pickle.dump(Hostile(tmp_path / "executed"), file)
    (path / MANIFEST).unlink()  # which would have told
    with pytest.raises(ValueError, match="cannot be read"):
        _by_hand(tmp_path / "again").load_trainer_state(path)
    assert not (tmp_path / "executed").exists()


# What does not fit


def _runner(folder: Path, model: Any = None, dataset: Any = None, sae: Any = None, **changes: Any) -> Any:
    settings = {
        "checkpoint_path": str(folder / "checkpoints"),
        "n_checkpoints": kept_run.N_CHECKPOINTS,
        "training_tokens": 20 * tiny.BATCH,
        "lr_warm_up_steps": 5,
        "lr_decay_steps": 10,
        "feature_sampling_window": 7,
    }
    cfg = tiny.runner_config(sae or tiny.sae_config(**kept_run.FLAGS), folder, **{**settings, **changes})
    data = kept_run._text(folder) if dataset is None else dataset
    return LanguageModelSAETrainingRunner(cfg, override_dataset=data, override_model=model or tiny.hooked_transformer())


def _other_model() -> Any:
    model = tiny.hooked_transformer()
    with torch.no_grad():
        model.blocks[0].mlp.W_in.mul_(1.001)
    return model


MISFITS: dict[str, tuple[dict[str, Any], str]] = {
    "k": ({"sae": tiny.sae_config(**{**kept_run.FLAGS, "k": 8})}, "k was 4 and is 8"),
    "architecture": (
        {"sae": tiny.sae_config("standard", **kept_run.FLAGS)},
        "architecture was 'topk' and is 'standard'",
    ),
    "d_sae": ({"sae": tiny.sae_config(d_sae=64, **kept_run.FLAGS)}, "d_sae was 48 and is 64"),
    "optimizer": ({"sae": tiny.sae_config(initializer=kept_run.FLAGS["initializer"])}, "optimizer was 'sparse_adam'"),
    "dtype": ({"sae": tiny.sae_config(**kept_run.FLAGS, dtype="float64")}, "dtype was 'float32' and is 'float64'"),
    "hook": ({"hook_name": "blocks.0.hook_attn_out"}, "hook_name was 'blocks.1.hook_attn_out'"),
    "d_in": (
        {"hook_name": "blocks.1.attn.hook_z", "sae": tiny.sae_config(d_in=12, **kept_run.FLAGS)},
        "d_in was 16 and is 12",
    ),
    "lr": ({"lr": 2e-3}, "lr was 0.001 and is 0.002"),
    "batch": ({"train_batch_size_tokens": 64}, "train_batch_size_samples was 32 and is 64"),
    "context": ({"context_size": 8}, "context_size was 16 and is 8"),
    "end of the schedule": ({"training_tokens": 30 * tiny.BATCH}, "total_training_samples was 640 and is 960"),
    "dataset": ({"dataset": Dataset.from_dict({"text": ["w3 w4 w5 " * 9] * 70})}, "dataset was "),
    "model": ({"model": _other_model()}, "model was "),
}


@pytest.mark.parametrize("name", MISFITS)
def test_a_resume_that_does_not_fit_is_refused_with_the_difference(name, run, monkeypatch):
    changes, told = MISFITS[name]
    path = _checkpoints(run)[1]
    monkeypatch.setattr(SAETrainer, "_train_step", lambda *args, **kwargs: pytest.fail("it has started"))
    with pytest.raises(ValueError, match="is of another run") as refused:
        _runner(run, resume_from_checkpoint=str(path), **changes).run()
    assert str(refused.value).startswith(f"resume_from_checkpoint={str(path)!r}")
    assert told in str(refused.value)
    with pytest.raises(ValueError, match="no checkpoint is of a run with these settings"):
        _runner(run, resume_from_checkpoint="latest", **changes).run()


def test_the_newest_that_fits_is_taken_among_other_runs(run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    other = tiny.sae_config(**{**kept_run.FLAGS, "k": 8})
    _runner(folder, sae=other).run()
    runner = _runner(folder, resume_from_checkpoint="latest")
    newest = [path for path in _checkpoints(folder) if json.loads((path / "cfg.json").read_text())["k"] == 4][-1]
    runner.run()
    assert runner.cfg.resume_from_checkpoint == str(newest)


def test_without_a_checkpoint_latest_starts_anew(tmp_path, caplog):
    runner = _runner(tmp_path, resume_from_checkpoint="latest", n_checkpoints=1)
    cfg = runner.cfg
    runner.run()
    assert "no checkpoint to resume from" in caplog.text
    assert cfg.resume_from_checkpoint == "latest", "the user's config stays as it was"


# Before it starts


def test_k_above_d_sae_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"k=49 is more than the d_sae=48 features"):
        _by_hand(tmp_path, k=49).fit()


@pytest.mark.parametrize("device", ["cuda:77", "nowhere"])
def test_a_device_that_is_not_there_is_named(device):
    cfg = SAETrainerConfig(total_training_samples=64, train_batch_size_samples=32, lr_end=1e-4, device=device)
    with pytest.raises(ValueError, match=f"device='{device}' cannot be used here"):
        SAETrainer(cfg, tiny.training_sae(**FLAGS), iter(()))


def test_a_disk_too_small_is_said_at_the_start(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 90, 10))
    with pytest.raises(ValueError, match=r"checkpoint_path=.*GiB free, and two checkpoints take"):
        _by_hand(tmp_path).fit()


@pytest.mark.parametrize("content", [b"", b"no tensors", b"\x80" * 400])
def test_a_spectrum_file_that_cannot_be_read_is_named_with_its_setting(content, tmp_path):
    path = tmp_path / "spectrum.safetensors"
    path.write_bytes(content)
    settings = ActiveSubspaceInit(spectrum=str(path))
    with pytest.raises(ValueError, match=rf"spectrum='{path}' cannot be loaded"):
        _by_hand(tmp_path, initializer=settings)


def test_a_provider_without_a_place_is_said(tmp_path, caplog):
    def batches() -> Iterator[torch.Tensor]:
        yield from tiny.batches()

    _by_hand(tmp_path, provider=batches(), n_checkpoints=3).fit()
    assert caplog.text.count("generator has no state_dict") == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("checkpoint_minutes", -1),
        ("checkpoint_minutes", float("nan")),
        ("keep_checkpoints", 0),
        ("checkpoint_buffer", "large"),
        ("max_skipped_fraction", 1.5),
        ("resume", 3),
    ],
)
def test_settings_that_make_no_sense_are_named(name, value):
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        tiny.sae_config(**{name: value})


@pytest.mark.parametrize("kind", ["text", "prefetch", "cached", "multi", "multi_prefetch", "synthetic"])
def test_a_step_that_fails_is_taken_again_by_every_runner(kind, tmp_path, monkeypatch):
    whole = kept_run.train(kind, tmp_path / "whole", 30)
    with monkeypatch.context() as patch:
        patch.setattr(PluginTrainer, "_train_step", _failing(PluginTrainer._train_step, 17))
        with pytest.raises(torch.OutOfMemoryError):
            kept_run.train(kind, tmp_path / "failed", 30)
    resumed = kept_run.train(kind, tmp_path / "failed", 30)
    assert kept_run.differences(whole, resumed) == []


def _failing(stock: Any, at: int) -> Any:
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.steps_done() == at:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return stock(self, *args, **kwargs)

    return step
