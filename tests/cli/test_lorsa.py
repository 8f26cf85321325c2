"""``saelens-asi lorsa`` from end to end on a tiny model."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from pathlib import Path

import pytest

import saelens_asi
from saelens_asi import cli
from saelens_asi.lorsa import Lorsa, LorsaConfig, load_lorsa, read_history, save_lorsa
from tests.helpers import tiny


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_text(tmp_path_factory.mktemp("text"), 80, 60)


def flags(llama_folder: Path, text_folder: Path) -> list[str]:
    settings = f"--model {llama_folder} --dataset {text_folder} --context-size 16 --held-out-tokens 256"
    return settings.split()


def test_train_resume_and_evaluate(
    llama_folder: Path, text_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    common = flags(llama_folder, text_folder)
    own = "--n-ov-heads 64 --k 4 --layer 1 --n-sequences 64 --steps 12 --batch-size 4 --lr 0.003 --lr-warm-up-steps 2"
    own += " --log-every 4 --checkpoint-every 4 --init-d-init 3 --init-n-tokens 500 --init-balance 0.5 --cache"
    cli.main(["lorsa", "train", *common, *own.split(), "--out", str(out)])
    printed = capsys.readouterr().out
    assert "initialized: d_init [3, 3, 3, 3]" in printed
    lorsa = load_lorsa(out)
    assert lorsa.provenance["layer"] == 1
    assert lorsa.provenance["initialization"]["settings"]["balance"] == 0.5
    assert lorsa.cfg.n_ctx == 16
    assert [record["step"] for record in read_history(out)] == [4, 8, 12]
    trained = json.loads((out / "metrics.json").read_text())
    assert 0 < trained["nmse"] < 2
    assert trained["n_tokens"] == 16 * 15

    before = (out / "history.jsonl").read_text()
    cli.main(["lorsa", "train", *common, *own.split(), "--out", str(out), "--resume"])
    assert (out / "history.jsonl").read_text() == before
    capsys.readouterr()

    cli.main(["lorsa", "evaluate", str(out), *common])
    evaluated = json.loads(capsys.readouterr().out)
    assert evaluated["dead_fraction"] == trained["dead_fraction"]
    assert evaluated["nmse"] == pytest.approx(trained["nmse"], rel=1e-5)
    assert evaluated["kl_recovered"] == pytest.approx(trained["kl_recovered"], rel=1e-3)


SMALL = "--n-ov-heads 64 --k 4 --layer 1 --n-sequences 64 --batch-size 4 --init-d-init 3 --init-n-tokens 500 --cache"


def test_a_terminated_run_is_saved_and_resumed_to_the_same_bits(
    llama_folder: Path, text_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = [*flags(llama_folder, text_folder), *SMALL.split(), "--steps", "400", "--log-every", "5"]
    cli.main(["lorsa", "train", *own, "--out", str(tmp_path / "whole")])
    cut = tmp_path / "cut"

    def terminate() -> None:
        while not (cut / "history.jsonl").exists() or not (cut / "history.jsonl").read_text():
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=terminate)
    thread.start()
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["lorsa", "train", *own, "--out", str(cut)])
    thread.join()
    assert exit_info.value.code == 143
    assert f"interrupted: the same command with --resume continues from {cut}" in capsys.readouterr().err
    assert 0 < len(read_history(cut)) < 80
    cli.main(["lorsa", "train", *own, "--out", str(cut), "--resume"])
    names = ["lorsa_weights.safetensors", "checkpoints/step_00000400/run.safetensors"]
    assert [(cut / name).read_bytes() for name in names] == [(tmp_path / "whole" / name).read_bytes() for name in names]


def test_a_second_run_in_a_folder_is_refused_before_the_model_is_loaded(
    llama_folder: Path, text_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = [*SMALL.split(), "--steps", "20", "--out", str(tmp_path)]
    cli.main(["lorsa", "train", *flags(llama_folder, text_folder), *own])
    for more, reason in (
        ([], f"out={str(tmp_path)!r} holds a finished Lorsa: set resume=True"),
        (["--resume", "--overwrite"], "--resume and --overwrite exclude each other"),
        (["--checkpoint-minutes", "-1"], "checkpoint_minutes=-1.0 must be a number of at least 0"),
        (["--max-skipped-fraction", "2"], "max_skipped_fraction=2.0 must lie in"),
    ):
        with pytest.raises(SystemExit) as exit_info:
            cli.main(["lorsa", "train", "--model", str(tmp_path / "none"), *own, *more])
        assert exit_info.value.code == 2
        assert reason in capsys.readouterr().err
    cli.main(["lorsa", "train", *flags(llama_folder, text_folder), *own, "--k", "3", "--overwrite"])
    assert load_lorsa(tmp_path).cfg.k == 3


@pytest.mark.parametrize("name", ["lorsa.json", "lorsa_weights.safetensors"])
def test_a_damaged_lorsa_is_named(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_lorsa(Lorsa(LorsaConfig(d_model=8, n_qk_heads=2, n_ov_heads=12, d_qk=4, k=2, n_ctx=8)), tmp_path)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-9])
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["lorsa", "evaluate", str(tmp_path)])
    assert exit_info.value.code == 2
    assert str(tmp_path / name) in capsys.readouterr().err


@pytest.mark.parametrize(
    ("own", "reason"),
    [
        ("--layer 7", "layer=7 does not exist: this model has layers 0 to 1"),
        ("--n-ov-heads 63", "n_ov_heads=63 must be divisible by n_qk_heads=4"),
        ("--init-method active", "norm='least_squares' needs an encoder tied"),
        ("--optimizer sgd", "argument --optimizer: invalid choice: 'sgd'"),
        ("--context-size 100", "exceeds|exceed|gives"),
    ],
)
def test_a_bad_flag_ends_in_one_line(
    own: str, reason: str, llama_folder: Path, text_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["--n-ov-heads", "64", "--k", "4", "--steps", "2", "--lr-warm-up-steps", "0", "--out", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["lorsa", "train", *flags(llama_folder, text_folder), *base, *own.split()])
    assert exit_info.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("saelens-asi lorsa train: error: ")
    assert re.search(reason, error)


def test_public_names() -> None:
    for name in ("Lorsa", "LorsaConfig", "LorsaInit", "LorsaTraining", "initialize_lorsa_", "train_lorsa"):
        assert name in saelens_asi.__all__
        assert hasattr(saelens_asi, name)
