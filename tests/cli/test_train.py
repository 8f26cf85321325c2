"""SAELens's own command line knows the two fields."""

from __future__ import annotations

import argparse
import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sae_lens import SAE
from sae_lens.constants import TRAINER_STATE_FILENAME
from sae_lens.llm_sae_training_runner import _parse_cfg_args
from sae_lens.training.sae_trainer import SAETrainer

import saelens_asi
from saelens_asi import cli, read_history
from tests.helpers import tiny

BASE = ["--model_name", "tiny", "--hook_name", tiny.ATTN_OUT, "--dataset_path", "tiny", "--d_in", "16"]


def _parsed(*args: str, architecture: str = "topk"):
    return _parse_cfg_args(["--architecture", architecture, *BASE, *args]).sae


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_both_flags_are_parsed_for_every_architecture(architecture):
    sae = _parsed("--initializer", "active_subspace", "--optimizer", "sparse_adam", architecture=architecture)
    assert sae.architecture() == architecture
    assert (sae.initializer, sae.optimizer) == ("active_subspace", "sparse_adam")


def test_without_the_flags_the_config_is_stock():
    sae = _parsed()
    assert (sae.initializer, sae.optimizer) == ("default", "adam")


def test_settings_are_given_as_json():
    sae = _parsed("--initializer", '{"d_init": 0.2, "n_tokens": 100000, "center": "zeros"}')
    assert sae.initializer == saelens_asi.ActiveSubspaceInit(d_init=0.2, n_tokens=100_000, center="zeros")


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["--initializer", "activ_subspace"], ["activ_subspace", "active_subspace"]),
        (["--initializer", '{"d_init": 0}'], ["d_init=0", "at least 1"]),
        (["--initializer", '{"dinit": 4}'], ["dinit", "d_init"]),
        (["--initializer", '{"d_init": '], ["initializer", '{"d_init": ', "not JSON"]),
        (["--optimizer", "sgd"], ["sgd", "sparse_adam"]),
    ],
)
def test_a_bad_value_is_named_with_what_is_allowed(args, named):
    with pytest.raises(argparse.ArgumentError) as caught:
        _parsed(*args)
    assert all(word in str(caught.value) for word in named), str(caught.value)


def test_d_init_above_d_in_is_named():
    with pytest.raises(ValueError, match="d_init=17 exceeds d_in=16"):
        _parsed("--initializer", '{"d_init": 17}')


def test_help_shows_both_flags(capsys):
    with pytest.raises(SystemExit):
        _parse_cfg_args(["--architecture", "topk", "--help"])
    text = capsys.readouterr().out
    assert "--initializer {default,active_subspace,JSON}" in text
    assert "--optimizer {adam,sparse_adam}" in text


@pytest.fixture
def command(llama_folder: Path, tmp_path: Path) -> list[str]:
    """Of a run on a tiny model and text."""
    (tmp_path / "text").mkdir(exist_ok=True)
    tiny.save_text(tmp_path / "text", 120, 100)
    flags = f"--model_name {llama_folder} --model_class_name AutoModelForCausalLM --dataset_path {tmp_path / 'text'}"
    flags += " --hook_name model.layers.1.self_attn.o_proj --architecture topk --d_in 16 --d_sae 48 --k 4"
    flags += " --context_size 16 --training_tokens 1024 --train_batch_size_tokens 32 --n_batches_in_buffer 4"
    flags += " --store_batch_size_prompts 4 --streaming false --is_dataset_tokenized false --lr 0.001"
    flags += " --device cpu --log_to_wandb false --optimizer sparse_adam --initializer"
    flags += f' {{"d_init":4,"n_tokens":64}} --output_path {tmp_path / "output"}'
    return flags.split()


@pytest.fixture
def trained(command: list[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``saelens-asi train`` with these flags, and more; a signal may be sent at a step."""
    stock = SAETrainer.step

    def run(*more: str, number: signal.Signals | None = None, at: int = 8) -> None:
        def step(self: Any, batch: Any) -> Any:
            if self.n_training_steps == at and number is not None:
                os.kill(os.getpid(), number)
            return stock(self, batch)

        monkeypatch.setattr(SAETrainer, "step", step)
        cli.main(["train", *command, *more])

    return run


@pytest.mark.parametrize("more", [[], ["--prefetch_llm_batches", "true"]], ids=["read at once", "prefetched"])
def test_torchrun_takes_the_same_command(
    more: list[str], command: list[str], trained: Callable[..., None], tmp_path: Path
) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ended = subprocess.run([*launch, "-m", "saelens_asi", "train", *command, *more], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-3000:]
    of_two, files_of_two = read_history(tmp_path / "output")[-1], _files(tmp_path / "output")
    assert SAE.load_from_disk(tmp_path / "output").cfg.d_sae == 48
    trained()
    of_one = read_history(tmp_path / "output")[-1]
    assert files_of_two == _files(tmp_path / "output")
    assert (of_two["step"], of_two["n_tokens"], of_two["l0"]) == (of_one["step"], of_one["n_tokens"], of_one["l0"])
    assert of_two["nmse"] == pytest.approx(of_one["nmse"], rel=0.5)  # the seeds differ: nobody has set them


def _files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_says_with_which_flag_it_continues_and_it_does(
    number: signal.Signals,
    code: int,
    trained: Callable[..., None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    places = ("--checkpoint_path", str(tmp_path / "checkpoints"))
    with pytest.raises(SystemExit) as exit_info:
        trained(*places, number=number)
    assert exit_info.value.code == code
    *_, line = capsys.readouterr().err.strip().splitlines()
    found = re.fullmatch(
        r"saelens-asi train: interrupted: the same command with (--resume_from_checkpoint) (.*) continues", line
    )
    assert found is not None, line
    assert (Path(found[2]) / TRAINER_STATE_FILENAME).exists()
    with caplog.at_level(logging.INFO):
        trained(*places, found[1], found[2])
    assert f"Resuming from checkpoint: {found[2]}" in caplog.text
    assert (tmp_path / "output" / "sae_weights.safetensors").exists()


def test_without_checkpoints_a_signal_says_how_to_have_some(
    trained: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        trained("--checkpoint_path", number=signal.SIGTERM)
    assert exit_info.value.code == 143
    assert "no checkpoint was kept, give --checkpoint_path" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--model_name", "./nowhere"], "nowhere"),
        (["--dataset_path", "nowhere/there"], "nowhere/there"),
        (["--hook_name", "model.layers.9.mlp"], "model.layers.9.mlp"),
        (["--resume_from_checkpoint", "nowhere"], "nowhere"),
        (["--training_tokens", "many"], "argument --training_tokens: invalid int value: 'many'"),
        (["--initializer", '{"d_init": 17}'], "d_init=17 exceeds d_in=16"),
    ],
)
def test_bad_input_ends_in_one_line(
    flags: list[str], said: str, trained: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        trained(*flags)
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert "usage:" not in error
    *_, line = error.strip().splitlines()
    assert line.startswith("saelens-asi train: error: ")
    assert said in line


def test_help_is_under_our_name_and_has_help_for_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["train", "--architecture", "topk", "--help"])
    assert exit_info.value.code == 0
    text = capsys.readouterr().out
    assert "usage: saelens-asi train [-h]" in text
    assert not re.findall(r"(?:error|usage): (?!saelens-asi train)", text)
    for flag in ("--initializer", "--optimizer"):
        (said,) = re.findall(rf"^  {flag} .*\n((?: {{10,}}.*\n)+)", text, flags=re.MULTILINE)
        assert len(said.split()) > 5
