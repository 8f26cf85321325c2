"""The command line: SAELens's own flags and ours, and one-line errors."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

import saelens_asi
from saelens_asi import cli


def test_train_passes_every_stock_flag_and_ours_to_the_runner(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    class Runner:
        def __init__(self, cfg: object) -> None:
            seen.append(cfg)

        def run(self) -> None:
            seen.append("ran")

    monkeypatch.setattr("sae_lens.llm_sae_training_runner.LanguageModelSAETrainingRunner", Runner)
    flags = "--architecture topk --d_in 16 --d_sae 64 -k 4 --initializer active_subspace --optimizer sparse_adam"
    for args in (["train", *flags.split()], flags.split()):
        cli.main([*args, "--lr", "0.001", "--hook_name", "blocks.0.hook_attn_out"])
    first, ran, second, ran_again = seen
    assert ran == ran_again == "ran"
    for cfg in (first, second):
        assert (cfg.sae.initializer, cfg.sae.optimizer, cfg.sae.k) == ("active_subspace", "sparse_adam", 4)
        assert (cfg.lr, cfg.hook_name) == (0.001, "blocks.0.hook_attn_out")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--initializer", "activ"], "initializer='activ' must be one of"),
        (["--initializer", '{"d_init": 0}'], "d_init=0 must be at least 1"),
        (["--optimizer", "sgd"], "sgd"),
    ],
)
def test_a_bad_flag_ends_in_one_line(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["train", "--architecture", "topk", *flags])
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_an_unknown_command_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["trian"])
    assert exit_info.value.code == 2
    assert "'trian'" in capsys.readouterr().err


def test_python_m_shows_the_commands() -> None:
    result = subprocess.run([sys.executable, "-m", "saelens_asi", "--help"], capture_output=True, text=True, check=True)
    assert "saelens-asi {train,demo,spectrum,plan,evaluate,card,autopsy,sweep,lorsa}" in result.stdout


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["--version"])
    assert capsys.readouterr().out == f"saelens-asi {saelens_asi.__version__}\n"


def test_every_command_has_a_module_and_a_line_of_help(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["--help"])
    text = capsys.readouterr().out
    for name, (about, _) in cli.COMMANDS.items():
        assert f"  {name:9} {about}" in text
        assert callable(importlib.import_module(f"saelens_asi.cli.{name}").main)
