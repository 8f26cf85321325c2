"""Runs under real torchruns: the result is that of one process, whatever their number and whatever becomes of them."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE
from safetensors.torch import load_file

from saelens_asi import read_history
from tests.helpers import many_run, tiny
from tests.helpers.torchrun import Torchrun, checkpoints

N_STEPS = 60
RUN = {"n_steps": N_STEPS, "n_checkpoints": 2}
FIRST = 21 * tiny.BATCH  # samples at the first of its checkpoints
LAST = 41 * tiny.BATCH

# What is refused, by the name of its folder: settings and words of the message.
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "split": ({"odd": 1, "odd_settings": {"batch_shards": 2}}, "batch_shards is 1 in process 0 and 2 in process 1"),
    "rate": ({"odd": 1, "odd_settings": {"lr": 0.123}}, "lr is 0.001 in process 0 and 0.123 in process 1"),
    "kind": (
        {"odd": 0, "odd_settings": {"architecture": "abstopk"}},
        "architecture is abstopk in process 0 and topk in",
    ),
    "text": ({"odd": 1, "odd_settings": {"context_size": 8}}, "context_size is 16 in process 0 and 8 in process 1"),
    "several": ({"kind": "several"}, "several SAEs at once are trained by one process: start MultiSAETrainingRunner"),
    "lorsa": ({"kind": "lorsa"}, "a Lorsa is trained by one process: start train_lorsa without torchrun"),
    **{
        name: ({"architecture": name}, "cannot be spread over 2 processes: only the TopK family can")
        for name in ("standard", "jumprelu", "gated", "matching_pursuit")
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("torchrun")


@pytest.fixture(scope="module")
def one(folder: Path) -> Path:
    """A run of one process."""
    many_run.run(folder / "one", RUN)
    return folder / "one"


@pytest.fixture(scope="module")
def two(folder: Path, one: Path) -> Path:
    """Runs of two processes, the last of which fails in one of them."""
    runs = [
        *({"name": name, **settings} for name, (settings, _) in REFUSED.items()),
        {"name": "two", **RUN},
        {"name": "two_again", **RUN, "go_on_from": f"two/{FIRST}"},
        {"name": "one_then_two", **RUN, "go_on_from": f"one/{FIRST}"},
        {"name": "fails", **RUN, "fail": 1},
    ]
    with Torchrun(2, folder, runs) as torchrun:
        assert torchrun.end() == 1
        torchrun.seconds_until_gone(60)
        (folder / "of_two.log").write_text(torchrun.said)
    return folder / "two"


@pytest.fixture(scope="module")
def four(folder: Path, two: Path) -> Path:
    """Runs of four processes: of which two each see half of a batch, one that goes on from a checkpoint of two, and one
    in which torchrun is terminated."""
    runs = [
        {"name": "four", **RUN, "batch_shards": 2},
        {"name": "two_then_four", **RUN, "go_on_from": f"two/{FIRST}"},
        {"name": "terminated", **RUN, "seconds": 0.1},
    ]
    terminated = folder / "terminated"
    with Torchrun(4, folder, runs) as torchrun:
        torchrun.until(lambda: len(_begun(terminated)) > 0)
        time.sleep(0.5)
        os.kill(torchrun.agent.pid, signal.SIGTERM)
        assert torchrun.seconds_until_gone(60) < 60
        (folder / "of_four.log").write_text(torchrun.said)
    return folder / "four"


def _end(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "final.pt")


def _assert_close(folder: Path, expected: Path) -> None:
    found, ends = _end(folder), _end(expected)
    assert found.keys() == ends.keys()
    for name, tensor in ends.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


def _assert_same_bits(folder: Path, expected: Path) -> None:
    found, ends = _end(folder), _end(expected)
    assert found.keys() == ends.keys()
    assert [name for name, tensor in ends.items() if not torch.equal(found[name], tensor)] == []
    assert _history(folder) == _history(expected)


def _history(folder: Path) -> list[dict[str, Any]]:
    return [{**record, "seconds": 0} for record in read_history(folder / "output" / "training_history.jsonl")]


def _files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def _checkpoint(folder: Path, n_samples: int) -> Path:
    (found,) = folder.glob(f"checkpoints/*/{n_samples}")
    return found


@pytest.mark.parametrize("name", ["two", "four"])
def test_a_run_of_many_processes_ends_as_that_of_one(name, one, request):
    many = request.getfixturevalue(name)
    _assert_close(many, one)
    ours, of_one = (load_file(folder / "output" / "sae_weights.safetensors") for folder in (many, one))
    assert {name: (x.shape, x.dtype) for name, x in ours.items()} == {n: (x.shape, x.dtype) for n, x in of_one.items()}
    for name, tensor in of_one.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["two", "four"])
def test_every_file_that_one_process_writes_is_there(name, one, request):
    many = request.getfixturevalue(name)
    assert _files(many / "output") == _files(one / "output")
    assert checkpoints(many) == checkpoints(one) == [FIRST, LAST]
    (folder,) = many.glob("checkpoints/*")
    assert {path.name for path in folder.iterdir()} == {str(FIRST), str(LAST), "training_history.jsonl", ".writer.lock"}
    for n_samples in (FIRST, LAST):
        of_many, of_one = _checkpoint(many, n_samples), _checkpoint(one, n_samples)
        assert _files(of_one) - _files(of_many) == {"sae_weights.safetensors"}, "which the shards hold"
        shards = {f"shards/__{rank}_0.distcp" for rank in range(2 if name == "two" else 4)}
        assert _files(of_many) - _files(of_one) - {"pace.json"} == shards | {"shards/.metadata"}


@pytest.mark.parametrize("name", ["two", "four"])
def test_the_configs_are_those_of_one_process(name, one, request):
    many = request.getfixturevalue(name)
    for file in ("cfg.json", "runner_cfg.json"):
        found, expected = (json.loads((folder / "output" / file).read_text()) for folder in (many, one))
        for config in (found, expected):
            for own in ("checkpoint_path", "output_path"):
                config.pop(own, None)
        assert found == expected


@pytest.mark.parametrize("name", ["two", "four"])
def test_the_history_is_written_once_and_is_that_of_one_process(name, one, request):
    many = request.getfixturevalue(name)
    found, expected = _history(many), _history(one)
    assert len(found) == len(expected) > 0
    for ours, theirs in zip(found, expected, strict=True):
        assert _flat(ours) == pytest.approx(_flat(theirs), rel=1e-4, abs=1e-6)
    (live,) = many.glob("checkpoints/*/training_history.jsonl")
    assert [{**record, "seconds": 0} for record in read_history(live)] == found


def _flat(record: dict[str, Any]) -> dict[str, Any]:
    nested = {
        f"{name}/{key}": x for name, value in record.items() if isinstance(value, dict) for key, x in value.items()
    }
    return {**nested, **{name: value for name, value in record.items() if not isinstance(value, dict)}}


@pytest.mark.parametrize("name", ["two", "four"])
def test_stock_saelens_loads_the_sae(name, one, request):
    many = request.getfixturevalue(name)
    x = tiny.activations(8)
    with torch.no_grad():
        found, expected = (SAE.load_from_disk(folder / "output") for folder in (many, one))
        torch.testing.assert_close(found(x), expected(x), rtol=1e-5, atol=1e-5)
    assert found.W_dec.shape == (602, tiny.D_MODEL)


def test_a_resume_by_as_many_processes_has_the_same_bits(two, folder):
    again = folder / "two_again"
    assert (again / "begun.0").read_text() == (again / "begun.1").read_text() == f"{FIRST}\n"
    _assert_same_bits(again, two)


def test_a_checkpoint_of_two_processes_goes_on_in_four_and_that_in_one(four, one, folder):
    assert (folder / "two_then_four" / "begun.3").read_text() == f"{FIRST}\n"
    _assert_close(folder / "two_then_four", one)
    many_run.run(folder / "four_then_one", {**RUN, "go_on_from": f"two_then_four/{LAST}"})
    assert (folder / "four_then_one" / "begun.0").read_text() == f"{LAST}\n"
    _assert_close(folder / "four_then_one", one)


def test_a_checkpoint_of_one_process_goes_on_in_two(two, one, folder):
    assert (folder / "one_then_two" / "begun.1").read_text() == f"{FIRST}\n"
    _assert_close(folder / "one_then_two", one)


@pytest.mark.parametrize("name", REFUSED)
def test_what_many_processes_cannot_do_is_refused_by_all_with_the_reason(name, two, folder):
    for rank in range(2):
        assert REFUSED[name][1] in (folder / name / f"refused.{rank}").read_text()
    assert not list((folder / name).glob("begun.*")), "refused before the first step"


def test_a_process_that_raises_ends_all(two, folder):
    said = (folder / "of_two.log").read_text()
    assert "OSError: this process fails" in said
    assert "process 1 of 2 (on " in said
    assert not list((folder / "fails" / "output").iterdir())


@dataclass
class Stage:
    """What became of one start of a run that is started three times.

    Attributes:
        begun: samples that its processes had seen when they began, of each start by torchrun.
        saved: samples at the newest checkpoint when it was hit, and when all was over.
        seconds: from the hit until all processes were gone.
        code: torchrun's exit code.
        said: by all of them.
    """

    begun: list[int]
    saved: tuple[int, int]
    seconds: float
    code: int
    said: str


@dataclass
class Hit:
    """What is done to a run of two processes once it has written a checkpoint more."""

    number: signal.Signals
    rank: int
    options: tuple[str, ...] = field(default_factory=tuple)


HITS = {
    "kill": Hit(signal.SIGKILL, 1),
    "terminate": Hit(signal.SIGTERM, 1),
    "kill and restart": Hit(signal.SIGKILL, 0, ("--max-restarts", "1")),
}


@pytest.fixture(scope="module")
def hits(folder: Path) -> Iterator[dict[str, Stage]]:
    """One run, hit again and again, and started again with 'latest' but for the last time: with a path."""
    run, stages = folder / "hit", {}
    settings: dict[str, Any] = {**RUN, "n_checkpoints": 29, "seconds": 0.1}
    for name, hit in HITS.items():
        resume: Any = "latest"
        if name == "kill and restart":
            resume = str(_checkpoint(run, checkpoints(run)[-1]))
        stages[name] = _hit(run, {**settings, "resume_from_checkpoint": resume}, hit)
    return stages


def _hit(run: Path, settings: dict[str, Any], hit: Hit) -> Stage:
    before, n_begun = len(checkpoints(run)), len(_begun(run))
    with Torchrun(2, run, settings, *hit.options) as torchrun:
        pids = torchrun.until(torchrun.pids)
        torchrun.until(lambda: len(checkpoints(run)) > before and len(_begun(run)) > n_begun)
        time.sleep(0.05)
        saved = checkpoints(run)[-1]
        os.kill(pids[hit.rank], hit.number)
        seconds = torchrun.seconds_until_gone()
        return Stage(_begun(run)[n_begun:], (saved, checkpoints(run)[-1]), seconds, torchrun.end(), torchrun.said)


def _begun(run: Path) -> list[int]:
    path = run / "begun.0"
    return [int(line) for line in path.read_text().split()] if path.exists() else []


def test_a_process_that_is_killed_ends_all_and_is_named_with_the_way_to_go_on(hits):
    stage = hits["kill"]
    assert stage.seconds < 60
    assert stage.code == 1
    assert "process 1 of 2 (on " in stage.said
    assert f"{stage.saved[1]}', or 'latest', to go on from there" in stage.said


def test_a_signal_to_one_process_is_saved_by_all_who_then_end_as_no_kill_lets_them(hits):
    stage = hits["terminate"]
    assert stage.seconds < 60
    assert stage.begun == [hits["kill"].saved[1]]
    assert stage.saved[1] > stage.saved[0]
    assert "InterruptedException" in stage.said
    assert "ended, and all others with it" not in stage.said


def test_a_signal_to_torchrun_is_saved_by_all(four, folder):
    (n_samples,) = checkpoints(folder / "terminated")
    manifest = json.loads((_checkpoint(folder / "terminated", n_samples) / "manifest.json").read_text())
    assert manifest["reason"] == "interrupt"
    assert f"got signal: {int(signal.SIGTERM)}" in (folder / "of_four.log").read_text()


def test_torchrun_starts_a_run_again_after_a_kill_from_its_newest_checkpoint(hits):
    stage = hits["kill and restart"]
    assert stage.code == 0, stage.said
    assert stage.begun == [hits["terminate"].saved[1], stage.saved[0]]


def test_a_run_that_was_killed_and_terminated_has_the_bits_of_one_that_was_not(hits, two, folder):
    _assert_same_bits(folder / "hit", two)
