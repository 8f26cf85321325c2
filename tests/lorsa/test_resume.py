"""A run of a Lorsa that stops anywhere ends with the same bits; nothing good is overwritten, nothing bad is taken."""

from __future__ import annotations

import json
import logging
import os
import pickle
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from saelens_asi.lorsa import (
    CachedSequences,
    Lorsa,
    LorsaInit,
    LorsaTraining,
    ModelSequences,
    batches,
    initialize_lorsa_,
    load_lorsa,
    read_attention,
    read_history,
    save_lorsa,
    train_lorsa,
)
from saelens_asi.lorsa.checkpoints import Checkpoints, last_checkpoint
from saelens_asi.lorsa.run import TrainingRun, batch_index
from saelens_asi.resume import checksum
from saelens_asi.sparse_adam import SparseAdam
from tests.helpers import tiny_attention
from tests.helpers.damage import Hostile

LAYER, N_OV, K = 1, 64, 4
STEPS = 20
SETTINGS: dict[str, Any] = {
    **{"steps": STEPS, "lr": 1e-3, "lr_warm_up_steps": 5, "log_every": 5},
    **{"k_start": 12, "k_warm_up_steps": 15},
}


class Noisy(CachedSequences):
    """Sequences with noise from torch's global generator, as of a model with dropout; ``at`` does what a test needs."""

    at: Callable[[int], object]
    calls: int

    def batch(self, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        object.__setattr__(self, "calls", self.calls + 1)
        x, y = super().batch(index)
        x, y = x + 0.1 * torch.randn_like(x), y.clone()
        self.at(self.calls)
        return x, y


def noisy(data: CachedSequences, at: Callable[[int], object] = lambda call: None) -> Noisy:
    """``at`` is called in each batch, after it has drawn, with the number of the batch in this process."""
    sequences = Noisy(data.x, data.y, data.tokens, data.source)
    object.__setattr__(sequences, "at", at)
    object.__setattr__(sequences, "calls", 0)
    return sequences


def made(model: Any, data: CachedSequences, **settings: Any) -> Lorsa:
    lorsa = Lorsa.from_attention(model, LAYER, n_ov_heads=N_OV, k=K, activation="batch_topk", **settings)
    start = LorsaInit(d_init=4, n_tokens=64 * (tiny_attention.N_CTX - 1))
    initialize_lorsa_(lorsa, read_attention(model, LAYER), batches(data, 8), start)
    return lorsa


class Result(NamedTuple):
    """What a run ends with, as bits."""

    tensors: dict[str, torch.Tensor]
    history: list[dict[str, Any]]


def result(folder: Path) -> Result:
    last = last_checkpoint(folder)
    assert last is not None
    assert last.name == f"step_{STEPS:08d}"
    tensors = {**load_file(last / "run.safetensors"), **load_file(folder / "lorsa_weights.safetensors")}
    history = [{name: value for name, value in r.items() if name != "seconds"} for r in read_history(folder)]
    return Result(tensors, history)


def assert_same(one: Result, other: Result) -> None:
    assert one.history == other.history
    assert one.tensors.keys() == other.tensors.keys()
    assert not [name for name, tensor in one.tensors.items() if not torch.equal(tensor, other.tensors[name])]


@pytest.fixture(scope="module")
def whole(model: Any, data: CachedSequences, tmp_path_factory: pytest.TempPathFactory) -> Result:
    folder = tmp_path_factory.mktemp("whole")
    torch.manual_seed(7)
    train_lorsa(made(model, data), noisy(data), LorsaTraining(**SETTINGS), out=folder, progress=False)
    return result(folder)


def start(model: Any, data: CachedSequences, folder: Path, at: Callable[[int], object], **settings: Any) -> None:
    torch.manual_seed(7)
    settings = {**SETTINGS, **settings}
    train_lorsa(made(model, data), noisy(data, at), LorsaTraining(**settings), out=folder, resume=True, progress=False)


def resume(model: Any, data: CachedSequences, folder: Path, **settings: Any) -> list[dict[str, float]]:
    torch.manual_seed(1000)  # another process has drawn other numbers before
    other = Lorsa.from_attention(model, LAYER, n_ov_heads=N_OV, k=K, activation="batch_topk")  # weights are replaced
    return train_lorsa(
        other, noisy(data), LorsaTraining(**{**SETTINGS, **settings}), out=folder, resume=True, progress=False
    )


def fail_at(call: int, error: BaseException) -> Callable[[int], None]:
    def fail(now: int) -> None:
        if now == call:
            raise error

    return fail


@pytest.mark.parametrize("step", [2, 14, STEPS])
@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), MemoryError("none left"), IndexError("the data end"), OSError("no such host")]
)
def test_after_any_error_the_last_whole_step_is_saved_and_resumed_exactly(
    error: BaseException, step: int, model: Any, data: CachedSequences, whole: Result, tmp_path: Path, caplog: Any
) -> None:
    with pytest.raises(type(error)):
        start(model, data, tmp_path, fail_at(step, error))
    saved = last_checkpoint(tmp_path)
    assert saved == tmp_path / "checkpoints" / f"step_{step - 1:08d}"
    assert f"give train_lorsa out={str(tmp_path)!r} and resume=True: it goes on from {saved}" in caplog.text
    resume(model, data, tmp_path)
    assert_same(result(tmp_path), whole)


def test_a_failure_in_the_first_step_leaves_no_checkpoint(
    model: Any, data: CachedSequences, whole: Result, tmp_path: Path, caplog: Any
) -> None:
    with pytest.raises(MemoryError):
        start(model, data, tmp_path, fail_at(1, MemoryError()))
    assert last_checkpoint(tmp_path) is None
    assert "there is no checkpoint, it would begin again" in caplog.text
    start(model, data, tmp_path, lambda call: None)
    assert_same(result(tmp_path), whole)


def test_a_step_that_fails_in_its_backward_pass_has_not_happened(
    model: Any, data: CachedSequences, whole: Result, tmp_path: Path
) -> None:
    lorsa, calls = made(model, data), []

    def out_of_memory(gradient: torch.Tensor) -> None:
        calls.append(1)
        if len(calls) == 9:
            raise torch.OutOfMemoryError("on the device")

    lorsa.W_Q.register_hook(out_of_memory)
    torch.manual_seed(7)
    with pytest.raises(torch.OutOfMemoryError):  # the threshold of batch-TopK has moved by then
        train_lorsa(lorsa, noisy(data), LorsaTraining(**SETTINGS), out=tmp_path, progress=False)
    assert last_checkpoint(tmp_path).name == "step_00000008"
    resume(model, data, tmp_path)
    assert_same(result(tmp_path), whole)


def test_a_step_cut_off_while_weights_move_is_not_saved(
    model: Any, data: CachedSequences, whole: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    own, calls = SparseAdam._step_param, []

    def cut_off(self: Any, param: Any, *args: Any) -> None:
        calls.append(1)
        if len(calls) == 9 * 8 + 3:  # of eight parameters, in the tenth step
            raise torch.OutOfMemoryError("on the device")
        own(self, param, *args)

    monkeypatch.setattr(SparseAdam, "_step_param", cut_off)
    with pytest.raises(torch.OutOfMemoryError):
        start(model, data, tmp_path, lambda call: None, checkpoint_every=4)
    assert "step 9 was cut off while weights moved: it is not saved" in caplog.text
    assert last_checkpoint(tmp_path).name == "step_00000008"
    resume(model, data, tmp_path)
    assert_same(result(tmp_path), whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("times", [1, 2])
def test_a_signal_lets_the_step_end_and_saves(
    number: signal.Signals, times: int, model: Any, data: CachedSequences, whole: Result, tmp_path: Path
) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def send(call: int) -> None:
        for _ in range(times if call == 7 else 0):
            os.kill(os.getpid(), number)

    with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else SystemExit) as stopped:
        start(model, data, tmp_path, send)
    if number == signal.SIGTERM:
        assert stopped.value.code == 143
    assert last_checkpoint(tmp_path).name == "step_00000007"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    resume(model, data, tmp_path)
    assert_same(result(tmp_path), whole)


def test_a_handler_of_the_program_is_called_after_the_step(
    model: Any, data: CachedSequences, whole: Result, tmp_path: Path
) -> None:
    at_step: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: at_step.append(calls[-1]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    calls: list[int] = []

    def send(call: int) -> None:
        assert not at_step or call > 3
        calls.append(call)
        if call == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
            assert not at_step

    start(model, data, tmp_path, send)  # it returns, so the run goes on
    assert at_step == [3]
    assert_same(result(tmp_path), whole)


def test_a_run_in_another_thread_leaves_signals_alone(
    model: Any, data: CachedSequences, whole: Result, tmp_path: Path
) -> None:
    thread = threading.Thread(target=start, args=(model, data, tmp_path, lambda call: None))
    thread.start()
    thread.join()
    assert_same(result(tmp_path), whole)


def test_checkpoints_come_by_time_and_take_at_most_one_per_cent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("saelens_asi.resume.time.monotonic", lambda: now[0])
    kept = Checkpoints(tmp_path, every=0, minutes=10)
    for seconds, due in ((599, False), (600, True)):
        now[0] = seconds
        assert kept.is_due(3) == due
    with kept.writing(3) as folder:
        (folder / "state").write_text("x")
        now[0] += 60  # a slow disk
    for seconds, due in ((5_999, False), (6_000, True)):
        now[0] = 660 + seconds
        assert kept.is_due(7) == due
    assert not Checkpoints(tmp_path, every=0, minutes=0).is_due(3)
    assert [Checkpoints(tmp_path, every=4, minutes=0).is_due(step) for step in (3, 4, 8)] == [False, True, True]


def test_by_default_a_run_is_saved_by_time(model: Any, data: CachedSequences, tmp_path: Path) -> None:
    assert LorsaTraining(steps=1, lr_warm_up_steps=0).checkpoint_minutes == 10
    seen: list[list[str]] = []

    def look(call: int) -> None:
        seen.append(sorted(path.name for path in (tmp_path / "checkpoints").glob("*")))

    start(model, data, tmp_path, look, checkpoint_minutes=1e-9)
    assert any(seen)
    assert max(map(len, seen)) <= 2
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2


def test_a_full_disk_keeps_the_last_good_checkpoint_and_the_run_goes_on(
    model: Any, data: CachedSequences, whole: Result, tmp_path: Path, caplog: Any
) -> None:
    resource = pytest.importorskip("resource")  # a limit on the size of files fails as a full disk does
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    kept: list[str] = []

    def fill(call: int) -> None:
        if call == 12:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
        if call == 16:
            kept.extend(path.name for path in (tmp_path / "checkpoints").iterdir())
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    try:
        start(model, data, tmp_path, fill, checkpoint_every=4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert sorted(kept) == ["step_00000004", "step_00000008"]
    assert "step 12 was not saved" in caplog.text
    assert "the last good checkpoint is" in caplog.text
    assert "the history is kept in memory" in caplog.text
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step_00000016", "step_00000020"]
    assert_same(result(tmp_path), whole)


def cut(path: Path) -> None:
    (path / "run.safetensors").write_bytes((path / "run.safetensors").read_bytes()[:-1])


def flip(path: Path) -> None:
    content = bytearray((path / "lorsa_weights.safetensors").read_bytes())
    content[-1] ^= 1
    (path / "lorsa_weights.safetensors").write_bytes(content)


def remove(path: Path) -> None:
    (path / "run.json").unlink()


def without_manifest(path: Path) -> None:
    (path / "manifest.json").unlink()


def empty_manifest(path: Path) -> None:
    (path / "manifest.json").write_text('{"files": {}}')


def odd_manifest(path: Path) -> None:
    (path / "manifest.json").write_text('{"files": {"run.json": 3}}')


DAMAGES = (cut, flip, remove, without_manifest, empty_manifest, odd_manifest)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    damage: Callable[[Path], None], model: Any, data: CachedSequences, whole: Result, tmp_path: Path, caplog: Any
) -> None:
    with pytest.raises(MemoryError):
        start(model, data, tmp_path, fail_at(14, MemoryError()), checkpoint_every=5)
    damage(tmp_path / "checkpoints" / "step_00000013")
    (tmp_path / "checkpoints" / ".step_00000013.99.tmp").mkdir()  # of a process that was killed
    resume(model, data, tmp_path)
    assert f"checkpoint {tmp_path / 'checkpoints' / 'step_00000013'} is passed over" in caplog.text
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step_00000010", "step_00000020"]
    assert_same(result(tmp_path), whole)


@pytest.mark.parametrize("damage", DAMAGES)
def test_without_a_whole_checkpoint_nothing_is_begun(
    damage: Callable[[Path], None], model: Any, data: CachedSequences, tmp_path: Path
) -> None:
    with pytest.raises(MemoryError):
        start(model, data, tmp_path, fail_at(14, MemoryError()))
    damage(tmp_path / "checkpoints" / "step_00000013")
    with pytest.raises(ValueError, match=r"no checkpoint there is whole \(step_00000013: .*overwrite=True"):
        resume(model, data, tmp_path)


def with_fitting_manifest(checkpoint: Path) -> None:
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    for name, listed in manifest["files"].items():
        listed |= {"bytes": (checkpoint / name).stat().st_size, "xxh3_128": checksum(checkpoint / name)}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def not_finite(path: Path) -> None:
    tensors = load_file(path)
    tensors["W_O"][1, 1] = torch.nan
    save_file(tensors, path, metadata={"format": "saelens_asi.lorsa.v1"})


def other_shapes(path: Path) -> None:
    tensors = load_file(path)
    tensors["optimizer/W_O/exp_avg"] = torch.zeros(3)
    save_file(tensors, path)


def without_generator(path: Path) -> None:
    save_file({name: tensor for name, tensor in load_file(path).items() if name != "generator/cpu"}, path)


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("lorsa_weights.safetensors", not_finite, "lorsa_weights.safetensors"),
        ("run.safetensors", other_shapes, "no moments that fit W_O"),
        ("run.safetensors", without_generator, "lacks counts of silent positions, or the state of a generator"),
        ("run.json", lambda path: path.write_text("[]"), "run.json holds no JSON object"),
        ("run.json", lambda path: path.write_text("{"), "run.json cannot be read as JSON"),
        ("run.json", lambda path: path.write_text('{"format": "saelens_asi.lorsa_run.v1"}'), "not what a run writes"),
        ("history.jsonl", lambda path: path.write_text("{\n"), "history.jsonl is not JSON"),
    ],
)
def test_a_checkpoint_whose_content_cannot_be_is_refused_by_name(
    name: str, change: Callable[[Path], None], reason: str, model: Any, data: CachedSequences, tmp_path: Path
) -> None:
    with pytest.raises(MemoryError):
        start(model, data, tmp_path, fail_at(14, MemoryError()))
    checkpoint = tmp_path / "checkpoints" / "step_00000013"
    change(checkpoint / name)
    with_fitting_manifest(checkpoint)
    with pytest.raises(ValueError, match=reason) as refused:
        resume(model, data, tmp_path)
    assert str(checkpoint) in str(refused.value)


@pytest.mark.parametrize("name", ["run.safetensors", "lorsa_weights.safetensors", "run.json", "lorsa.json"])
def test_no_pickle_is_executed(name: str, model: Any, data: CachedSequences, tmp_path: Path) -> None:
    with pytest.raises(MemoryError):
        start(model, data, tmp_path, fail_at(14, MemoryError()))
    checkpoint = tmp_path / "checkpoints" / "step_00000013"
    (checkpoint / name).write_bytes(pickle.dumps(Hostile(tmp_path / "executed")))
    with_fitting_manifest(checkpoint)
    with pytest.raises(ValueError, match=name):
        resume(model, data, tmp_path)
    assert not (tmp_path / "executed").exists()


def test_a_finished_run_is_neither_overwritten_nor_trained_again(
    model: Any, data: CachedSequences, tmp_path: Path, whole: Result
) -> None:
    start(model, data, tmp_path, lambda call: None)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    untouched = noisy(data, fail_at(1, AssertionError("trained again")))
    with pytest.raises(ValueError, match=f"out={str(tmp_path)!r} holds a finished Lorsa: set resume=True .* overwrite"):
        train_lorsa(made(model, data), untouched, LorsaTraining(**SETTINGS), out=tmp_path, progress=False)
    (tmp_path / "lorsa.json").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="holds the checkpoints of another run"):
        train_lorsa(made(model, data), untouched, LorsaTraining(**SETTINGS), out=tmp_path, progress=False)
    (tmp_path / "elsewhere").rename(tmp_path / "lorsa.json")
    with pytest.raises(ValueError, match="exclude each other"):
        train_lorsa(
            made(model, data),
            untouched,
            LorsaTraining(**SETTINGS),
            tmp_path,
            resume=True,
            overwrite=True,
            progress=False,
        )
    lorsa = made(model, data)
    history = train_lorsa(lorsa, untouched, LorsaTraining(**SETTINGS), out=tmp_path, resume=True, progress=False)
    assert history == read_history(tmp_path)
    assert torch.equal(lorsa.W_O, whole.tensors["W_O"])
    assert not lorsa.training
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_a_finished_run_without_checkpoints_is_returned(
    model: Any, data: CachedSequences, tmp_path: Path, whole: Result
) -> None:
    start(model, data, tmp_path, lambda call: None)
    shutil.rmtree(tmp_path / "checkpoints")
    lorsa = made(model, data)
    untouched = noisy(data, fail_at(1, AssertionError("trained again")))
    history = train_lorsa(lorsa, untouched, LorsaTraining(**SETTINGS), out=tmp_path, resume=True, progress=False)
    assert history == read_history(tmp_path)
    assert torch.equal(lorsa.W_O, whole.tensors["W_O"])
    with pytest.raises(ValueError, match=r"lr was 0\.001 and is 0\.5"):
        resume(model, data, tmp_path, lr=0.5)
    save_lorsa(Lorsa(lorsa.cfg), tmp_path)
    with pytest.raises(ValueError, match="holds a Lorsa that no run has written"):
        resume(model, data, tmp_path)


def test_overwrite_replaces_a_run(model: Any, data: CachedSequences, tmp_path: Path, whole: Result) -> None:
    shorter = LorsaTraining(**{**SETTINGS, "steps": 18, "checkpoint_every": 6})
    train_lorsa(made(model, data), noisy(data), shorter, out=tmp_path, progress=False)
    torch.manual_seed(7)
    with pytest.raises(MemoryError):
        train_lorsa(
            made(model, data), noisy(data, fail_at(3, MemoryError())), LorsaTraining(**SETTINGS),
            out=tmp_path, overwrite=True, progress=False,
        )  # fmt: skip
    assert not (tmp_path / "lorsa.json").exists()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000002"]
    resume(model, data, tmp_path)
    assert_same(result(tmp_path), whole)


def test_a_resume_with_other_settings_or_data_is_refused_before_it_starts(
    model: Any, data: CachedSequences, tmp_path: Path
) -> None:
    with pytest.raises(MemoryError):
        start(model, data, tmp_path, fail_at(14, MemoryError()))

    def refused(lorsa: Lorsa, sequences: Any, reason: str, **settings: Any) -> None:
        now = LorsaTraining(**{**SETTINGS, **settings})
        with pytest.raises(ValueError, match=reason):
            train_lorsa(lorsa, sequences, now, out=tmp_path, resume=True, progress=False)

    untouched = noisy(data, fail_at(1, AssertionError("trained")))
    for settings, reason in (
        ({"lr": 2e-3}, "lr was 0.001 and is 0.002"),
        ({"batch_size": 4}, "batch_size was 8 and is 4"),
        ({"optimizer": "adam"}, "optimizer was 'sparse_adam' and is 'adam'"),
        ({"steps": 40, "seed": 3}, "seed was 0 and is 3; steps was 20 and is 40"),
    ):
        refused(made(model, data), untouched, reason, **settings)
    refused(Lorsa.from_attention(model, LAYER, n_ov_heads=N_OV, k=3), untouched, "k was 4 and is 3")
    other_layer = Lorsa.from_attention(model, 0, n_ov_heads=N_OV, k=K, activation="batch_topk")
    refused(other_layer, untouched, "layer of the Lorsa was 1 and is 0")
    fewer = Noisy(data.x[:32], data.y[:32], data.tokens[:32], data.source)
    refused(made(model, data), fewer, "n_sequences was 64 and is 32")
    other_text = Noisy(data.x, data.y, data.tokens.flip(0), data.source)
    refused(made(model, data), other_text, "tokens was .* and is")
    fine_tuned = tiny_attention.hooked("grouped queries")
    with torch.no_grad():
        fine_tuned.blocks[0].mlp.W_in += 1e-3
    refused(made(model, data), CachedSequences.collect(fine_tuned, LAYER, data.tokens), "model was .* and is")
    refused(made(model, data), CachedSequences.collect(model, 0, data.tokens), "layer was 1 and is 0")
    refused(made(model, data), ModelSequences(model, LAYER, data.tokens), "sequences was 'cached' and is 'model'")
    resume(model, data, tmp_path, log_every=5, checkpoint_every=3, checkpoint_minutes=0, max_skipped_fraction=0.5)


def test_one_run_writes_to_a_folder_at_a_time(model: Any, data: CachedSequences, tmp_path: Path) -> None:
    refusals: list[str] = []

    def second(call: int) -> None:
        if call == 3:
            with pytest.raises(ValueError, match="is being written by") as refused:
                start(model, data, tmp_path, lambda call: None)
            refusals.append(str(refused.value))

    start(model, data, tmp_path, second)
    assert f"out={str(tmp_path)!r} is being written by process {os.getpid()} on " in refusals[0]
    resume(model, data, tmp_path)  # the folder is free again


def spoilt(data: CachedSequences, sequences: list[int], value: float = torch.nan) -> CachedSequences:
    x = data.x.clone()
    x[sequences, 3, 5] = value
    return CachedSequences(x, data.y, data.tokens, data.source)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["x", "y"])
def test_sequences_that_are_not_finite_are_left_out_of_a_step(
    name: str, value: float, model: Any, data: CachedSequences
) -> None:
    settings = LorsaTraining(**SETTINGS)
    runs = [TrainingRun(made(model, data).train(), settings, data) for _ in range(2)]
    good = torch.tensor([0, 1, 3, 4, 5, 7])
    batch = {"x": data.x[:8].clone(), "y": data.y[:8].clone()}
    batch["y"][4, 0] = value  # a position that does not count
    expected = runs[0].step(batch["x"][good], batch["y"][good])
    for sequence in (2, 6):
        batch[name][sequence, 9, 3] = value
    outcome = runs[1].step(batch["x"], batch["y"])
    assert torch.equal(outcome.loss, expected.loss)
    assert all(torch.equal(a, b) for a, b in zip(*(run._numbers() for run in runs), strict=True))
    assert [run.n_skipped for run in runs] == [0, 2 * tiny_attention.N_CTX]


def test_what_was_left_out_is_counted_everywhere(
    model: Any, data: CachedSequences, tmp_path: Path, caplog: Any
) -> None:
    bad = spoilt(data, [5])
    settings = LorsaTraining(**{**SETTINGS, "log_every": 1})
    history = train_lorsa(made(model, data), bad, settings, out=tmp_path / "whole", progress=False)
    n = 3 * tiny_attention.N_CTX  # 20 steps of 8 are 2.5 epochs
    assert history[-1]["n_skipped_tokens"] in (n, n - tiny_attention.N_CTX)
    assert [record["n_skipped_tokens"] for record in history] == sorted(r["n_skipped_tokens"] for r in history)
    assert len([r for r in caplog.records if "not finite" in r.message]) == 1
    n = history[-1]["n_skipped_tokens"]
    saved = load_lorsa(tmp_path / "whole")
    assert saved.provenance["n_skipped_tokens"] == n
    assert all(tensor.isfinite().all() for tensor in saved.state_dict().values())

    def stopped(call: int) -> None:
        if call == 12:
            raise MemoryError

    sequences = noisy(bad, stopped)
    with pytest.raises(MemoryError):
        train_lorsa(made(model, data), sequences, settings, out=tmp_path / "cut", progress=False)
    train_lorsa(made(model, data), noisy(bad), settings, out=tmp_path / "cut", resume=True, progress=False)
    assert load_lorsa(tmp_path / "cut").provenance["n_skipped_tokens"] == n


def test_a_batch_of_nothing_finite_moves_nothing(model: Any, data: CachedSequences, tmp_path: Path) -> None:
    settings = LorsaTraining(steps=3, lr_warm_up_steps=0, log_every=1, max_skipped_fraction=1.0)
    lorsa = made(model, data)
    before = {name: tensor.clone() for name, tensor in lorsa.state_dict().items()}
    history = train_lorsa(lorsa, spoilt(data, list(range(64))), settings, out=tmp_path, progress=False)
    assert [record["n_skipped_tokens"] for record in history] == [i * 8 * tiny_attention.N_CTX for i in (1, 2, 3)]
    assert [record["loss"] for record in read_history(tmp_path)] == [None] * 3
    assert all(torch.equal(tensor, before[name]) for name, tensor in lorsa.state_dict().items())


def test_too_many_left_out_stop_the_run_and_name_the_last_good_checkpoint(
    model: Any, data: CachedSequences, tmp_path: Path
) -> None:
    settings = LorsaTraining(**SETTINGS, checkpoint_every=2)
    epoch = torch.cat([batch_index(step, settings, 64) for step in range(5, 8)])
    bad = spoilt(data, epoch[:5].tolist())
    with pytest.raises(FloatingPointError, match=r"more than max_skipped_fraction=0\.01.*last good checkpoint is .*4$"):
        train_lorsa(made(model, data), bad, settings, out=tmp_path, progress=False)
    assert last_checkpoint(tmp_path).name == "step_00000004"
    again = LorsaTraining(**SETTINGS, max_skipped_fraction=0.2)
    history = train_lorsa(made(model, data), bad, again, out=tmp_path, resume=True, progress=False)
    assert history[-1]["n_skipped_tokens"] > 0
    with pytest.raises(FloatingPointError, match="no checkpoint was written"):
        train_lorsa(made(model, data), spoilt(data, list(range(64))), LorsaTraining(**SETTINGS), progress=False)


def poison(run_at: int, lorsa: Lorsa, what: str) -> Callable[[int], None]:
    def act(call: int) -> None:
        if call == run_at:
            with torch.no_grad():
                {"weights": lorsa.W_O, "large weights": lorsa.W_V}[what][3] = torch.nan if what == "weights" else 3e38

    return act


@pytest.mark.parametrize("what", ["weights", "large weights"])
@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
def test_weights_that_are_not_finite_stop_the_run_and_reach_no_checkpoint(
    what: str, max_grad_norm: float | None, model: Any, data: CachedSequences, tmp_path: Path
) -> None:
    lorsa = made(model, data)
    settings = LorsaTraining(**SETTINGS, checkpoint_every=4, max_grad_norm=max_grad_norm)
    with pytest.raises(FloatingPointError, match=r"not finite.*the last good checkpoint is .*step_00000008"):
        train_lorsa(lorsa, noisy(data, poison(10, lorsa, what)), settings, out=tmp_path, progress=False)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step_00000004", "step_00000008"]
    for name in names:
        assert all(t.isfinite().all() for t in load_lorsa(tmp_path / "checkpoints" / name).state_dict().values())
    assert not (tmp_path / "lorsa.json").exists()


@pytest.mark.parametrize("method", ["per_head", "active", "random"])
def test_an_initialization_leaves_out_what_is_not_finite(
    method: Any, model: Any, data: CachedSequences, caplog: Any
) -> None:
    norm: Any = "least_squares" if method == "per_head" else "matched"
    bad, good = spoilt(data, [5, 40]), torch.tensor([i for i in range(64) if i not in (5, 40)])
    lorsas, done = [], []
    for pairs in (batches(bad, 8), (data.batch(index[torch.isin(index, good)]) for index in torch.arange(64).split(8))):
        lorsa = Lorsa.from_attention(model, LAYER, n_ov_heads=N_OV, k=K)
        start = LorsaInit(method=method, norm=norm, d_init=4, n_tokens=62 * (tiny_attention.N_CTX - 1))
        done.append(initialize_lorsa_(lorsa, read_attention(model, LAYER), pairs, start))
        lorsas.append(lorsa)
    assert [one.n_skipped_tokens for one in done] == [2 * tiny_attention.N_CTX, 0]
    assert lorsas[0].provenance["initialization"]["n_skipped_tokens"] == 2 * tiny_attention.N_CTX
    assert len([record for record in caplog.records if "not finite" in record.message]) == 1
    for name, tensor in lorsas[0].state_dict().items():
        assert torch.equal(tensor, lorsas[1].state_dict()[name]), name


def test_a_lorsa_that_starts_poisoned_is_refused(model: Any, data: CachedSequences) -> None:
    lorsa = made(model, data)
    with torch.no_grad():
        lorsa.W_O[60] = torch.nan
    with pytest.raises(FloatingPointError, match="before the first step"):
        train_lorsa(lorsa, data, LorsaTraining(**SETTINGS), progress=False)


def test_what_would_fail_later_is_refused_before_the_model_runs(
    model: Any, data: CachedSequences, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    untouched = noisy(data, fail_at(1, AssertionError("trained")))
    settings = LorsaTraining(**SETTINGS)
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match=r"cannot be written to .* give another folder"):
            train_lorsa(made(model, data), untouched, settings, out=out, progress=False)
    with pytest.raises(ValueError, match="layer=5 does not exist"):
        train_lorsa(made(model, data), ModelSequences(model, 5, data.tokens), settings, out=tmp_path, progress=False)
    lorsa = made(model, data)
    lorsa.provenance["loss"] = float("nan")
    with pytest.raises(ValueError, match=r"lorsa\.provenance cannot be written as JSON"):
        train_lorsa(lorsa, untouched, settings, out=tmp_path / "run", progress=False)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(
        ValueError, match=r"run' has 0 MiB free, and checkpoints and the Lorsa take 0 MiB: free the space"
    ):
        train_lorsa(made(model, data), untouched, settings, out=tmp_path / "run", progress=False)
    with pytest.raises(ValueError, match="need out="):
        train_lorsa(made(model, data), untouched, settings, overwrite=True, progress=False)


def test_a_run_says_where_it_begins(model: Any, data: CachedSequences, tmp_path: Path, caplog: Any) -> None:
    caplog.set_level(logging.INFO, logger="saelens_asi")
    start(model, data, tmp_path, lambda call: None)
    assert f"out={str(tmp_path)!r} holds no checkpoint yet: the run begins" in caplog.text
