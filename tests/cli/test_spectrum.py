"""saelens-asi spectrum from the command line to the report: files, interruption, errors in one line."""

from __future__ import annotations

import csv
import importlib
import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from saelens_asi import ActiveSubspaceInit, Spectrum, activation_spectra, cli
from saelens_asi.activations import reader
from saelens_asi.activations.hooks import parse_layers
from saelens_asi.activations.loading import load_documents
from saelens_asi.activations.tokens import token_batches
from saelens_asi.spectra import hook_spectra as spectra_module
from tests.helpers import tiny

command = importlib.import_module("saelens_asi.cli.spectrum")  # the package has a function of that name too


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_text(tmp_path_factory.mktemp("dataset"), 60, 100)


def spectrum(model: Path, dataset: Path, out: Path, *flags: str) -> None:
    sizes = "--context-size 16 --n-tokens 2000 --loss-tokens 96 --batch-size 4"
    names = ["--model", str(model), "--dataset", str(dataset), "--out", str(out)]
    cli.main(["spectrum", *names, *sizes.split(), *flags])


@pytest.fixture(scope="module")
def finished(llama_folder: Path, text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished")
    spectrum(llama_folder, text_folder, out)
    return out


def test_it_writes_table_spectra_figures_and_page(finished: Path) -> None:
    rows = json.loads((finished / "table.json").read_text())
    assert len(rows) == 8
    with (finished / "table.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [row["hook"] for row in table] == [row["hook"] for row in rows]
    assert {(row["layer"], row["kind"]) for row in rows} == {
        (layer, kind) for layer in (0, 1) for kind in ("attn_out", "mlp_out", "resid_post", "hook_z")
    }
    for row in rows:
        s = Spectrum.load(finished / "spectra" / f"{row['hook']}.safetensors")
        assert (s.n_tokens, s.d) == (row["n_tokens"], row["width"]) == (2000, 16)
        assert row["effective_rank"] == pytest.approx(s.effective_rank)
        assert row["dimension_99.9"] == s.intrinsic_dimension(0.999)
        assert row["above_5_percent"] == s.components_above(0.05)
    figures = ("ranks", "singular_values", "loss_recovered", "decomposition")
    for name in figures:
        assert (finished / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    page = (finished / "report.md").read_text()
    assert re.findall(r"^!\[.*\]\((.*)\)$", page, flags=re.MULTILINE) == [f"{name}.png" for name in figures]
    for part in (
        "attn_out is ",
        "Layer 1, why: ",
        "zero-ablated",
        "mean-ablated",
        "blocks.0.attn.hook_z",
        "--n-tokens",
    ):
        assert part in page
    assert not (finished / "pass.safetensors").exists()


def test_its_numbers_are_those_of_the_function(finished: Path, bridge, text_folder: Path) -> None:
    training, _ = load_documents(str(text_folder), 2000)
    name = "blocks.1.hook_mlp_out"
    how = {"batch_size": 4, "context_size": 16, "progress": False}
    expected = activation_spectra(bridge, training, [name], 2000, **how)[name]
    assert torch.equal(Spectrum.load(finished / "spectra" / f"{name}.safetensors").covariance, expected.covariance)


def test_finished_spectra_are_not_measured_again_unless_the_settings_change(
    finished: Path, llama_folder: Path, text_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    spectrum(llama_folder, text_folder, tmp_path)
    assert "already: delete" in capsys.readouterr().out
    assert (tmp_path / "table.csv").read_text() == (finished / "table.csv").read_text()
    spectrum(llama_folder, text_folder, tmp_path, "--n-tokens", "500", "--loss-tokens", "0")
    assert "already: delete" not in capsys.readouterr().out
    assert {row["n_tokens"] for row in json.loads((tmp_path / "table.json").read_text())} == {500}


def test_its_spectrum_file_initialises_an_sae(finished: Path, bridge, text_folder: Path, tmp_path: Path) -> None:
    hook = "blocks.1.hook_attn_out"
    path = finished / "spectra" / f"{hook}.safetensors"
    settings = ActiveSubspaceInit(d_init=5, spectrum=path)
    sae = tiny.sae_config(initializer=settings)
    cfg = tiny.runner_config(sae, tmp_path, hook_name=hook, is_dataset_tokenized=False, training_tokens=64, lr=1e-9)
    trained = tiny.run(cfg, bridge, load_documents(str(text_folder), 100)[0])
    basis = Spectrum.load(path).principal_directions(5).float()
    rows = trained.W_dec.detach()
    assert (rows - rows @ basis @ basis.T).norm() < 1e-3 * rows.norm()
    assert trained.cfg.metadata["active_subspace_init"]["n_tokens"] == 2000


def test_interrupted_it_continues_to_the_same_files(
    finished: Path,
    llama_folder: Path,
    text_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Ctrl-C during the pass, then during the losses; then it finishes, and what was measured is not measured again."""
    stock_read = reader.read_activations
    n_read: list[int] = []

    def read(*args):
        n_read.append(1)
        if len(n_read) == 20:
            raise KeyboardInterrupt
        return stock_read(*args)

    stock = spectra_module._Checkpoint
    monkeypatch.setattr(reader, "read_activations", read)
    monkeypatch.setattr(spectra_module, "_CHECKPOINT_PAUSE", 0)
    monkeypatch.setattr(spectra_module, "_Checkpoint", lambda *args: stock(*args[:-1], 0))
    with pytest.raises(SystemExit) as exit_info:
        spectrum(llama_folder, text_folder, tmp_path)
    assert exit_info.value.code == 130
    assert "the same command continues" in capsys.readouterr().err
    assert (tmp_path / "pass.safetensors").exists()
    assert not (tmp_path / "table.json").exists()

    stock_loss, measured = command.loss_recovered, []

    def loss(model, tokens, name, *args, **kwargs):
        if len(measured) == 1:
            raise KeyboardInterrupt
        measured.append(name)
        return stock_loss(model, tokens, name, *args, **kwargs)

    monkeypatch.setattr(command, "loss_recovered", loss)
    with pytest.raises(SystemExit):
        spectrum(llama_folder, text_folder, tmp_path)
    assert len(n_read) == 20 + 34 - 19  # of 34 batches in all, 19 were done

    def rest(model, tokens, name, *args, **kwargs):
        measured.append(name)
        return stock_loss(model, tokens, name, *args, **kwargs)

    monkeypatch.setattr(command, "loss_recovered", rest)
    spectrum(llama_folder, text_folder, tmp_path)
    assert measured == [f"blocks.1.hook_{kind}" for kind in ("attn_out", "mlp_out", "resid_post")]
    assert not (tmp_path / "pass.safetensors").exists()
    for path in sorted((finished / "spectra").glob("*.safetensors")):
        one, other = Spectrum.load(path), Spectrum.load(tmp_path / "spectra" / path.name)
        assert torch.equal(one.covariance, other.covariance)
    for name in ("table.csv", "table.json", "losses.json"):
        assert (tmp_path / name).read_bytes() == (finished / name).read_bytes()


def test_a_few_hooks_and_layers_without_losses(llama_folder: Path, text_folder: Path, tmp_path: Path) -> None:
    flags = "--hooks mlp_out blocks.0.ln1.hook_out --layers 1 --loss-tokens 0 --dtype bfloat16 --exclude-positions 0 1"
    spectrum(llama_folder, text_folder, tmp_path, *flags.split())
    rows = json.loads((tmp_path / "table.json").read_text())
    assert [row["hook"] for row in rows] == ["blocks.1.hook_mlp_out", "blocks.0.ln1.hook_out"]
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {"spectra", "table.csv", "table.json", "ranks.png", "singular_values.png", "report.md"}


def test_a_dataset_of_tokens(llama_folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    rows = tiny.tokens(200)["tokens"]
    lines = (json.dumps({"input_ids": row, "attention_mask": [1] * 15 + [0]}) + "\n" for row in rows)
    (data / "train.jsonl").write_text("".join(lines))
    spectrum(llama_folder, data, tmp_path / "out", "--hooks", "attn_out", "--n-tokens", "600")
    (row, _) = json.loads((tmp_path / "out" / "table.json").read_text())
    assert row["n_tokens"] == 600


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--layers", "5"], "--layers 5: this model has layers 0 to 1"),
        (["--layers", "first"], "'first' must be all, a number, or a range"),
        (["--hooks", "attnout"], "'attnout' must be one of"),
        (["--hooks", "blocks.0.hook_nothing"], "no hook of this model is called"),
        (["--detail-layer", "7"], "--detail-layer 7: this model has layers 0 to 1"),
        (["--exclude-positions", "99"], "exclude_positions=[99]"),
        (["--n-tokens", "1"], "n_tokens=1 must be at least 2"),
    ],
)
def test_a_bad_flag_ends_in_one_line(
    llama_folder: Path,
    text_folder: Path,
    tmp_path: Path,
    flags: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        spectrum(llama_folder, text_folder, tmp_path, *flags)
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_layers_are_numbers_and_ranges() -> None:
    assert parse_layers(["all"], 3) == [0, 1, 2]
    assert parse_layers(["5", "0-2", "1"], 6) == [0, 1, 2, 5]
    for words in (["-1"], ["1-"], ["2-1"], ["0-6"]):
        with pytest.raises(ValueError, match="--layers"):
            parse_layers(words, 6)


def test_a_folder_without_text_or_tokens_is_named(llama_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"words": "a"}\n')
    with pytest.raises(ValueError, match=r"no column 'text' or 'tokens' or 'input_ids'; its columns are \['words'\]"):
        load_documents(str(tmp_path), 100)


def test_windows_for_the_loss_are_held_out(bridge, text_folder: Path) -> None:
    training, held_out = load_documents(str(text_folder), 2000)
    windows = {
        tuple(row)
        for data in (training,)
        for tokens, _ in token_batches(bridge, data, 1, 16)
        for row in tokens.tolist()
    }
    for tokens, _ in token_batches(bridge, held_out, 1, 16):
        assert tuple(tokens[0].tolist()) not in windows


@pytest.mark.parametrize("name", ["settings.json", "losses.json"])
def test_what_a_second_run_reads_is_written_whole(
    name: str, llama_folder: Path, text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full when half of the text is there."""
    stock = Path.write_text

    def half(self: Path, text: str, *args: object) -> int:
        if not self.name.startswith(name):
            return stock(self, text, *args)
        stock(self, text[: len(text) // 2])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", half)
        with pytest.raises(SystemExit):
            spectrum(llama_folder, text_folder, tmp_path, "--hooks", "mlp_out")
    assert not list(tmp_path.rglob(f"{name}*"))
    spectrum(llama_folder, text_folder, tmp_path, "--hooks", "mlp_out")
    assert json.loads(next(tmp_path.rglob(name)).read_text())


def test_another_model_or_damaged_losses_are_measured_again(
    finished: Path, llama_folder: Path, text_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    settings, losses = tmp_path / "spectra" / "settings.json", tmp_path / "losses.json"
    saved = json.loads(settings.read_text())
    saved.pop("checksum")
    saved["fingerprints"]["model"] = "another model under this name"
    settings.write_text(json.dumps(saved))
    losses.write_bytes(losses.read_bytes()[:-100])
    spectrum(llama_folder, text_folder, tmp_path)
    assert "model was 'another model under this name' and is" in caplog.text
    assert "the losses are measured again" in caplog.text
    assert settings.read_bytes() == (finished / "spectra" / "settings.json").read_bytes()
    assert losses.read_bytes() == (finished / "losses.json").read_bytes()


def test_processes_of_torchrun_share_the_pass_and_the_first_writes(
    finished: Path, llama_folder: Path, text_folder: Path, tmp_path: Path, python
) -> None:
    names = ["--model", str(llama_folder), "--dataset", str(text_folder), "--out", "out"]
    sizes = ["--context-size", "16", "--n-tokens", "2000", "--loss-tokens", "0", "--batch-size", "4"]
    sizes += ["--hooks", "mlp_out"]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "saelens_asi", "spectrum"]
    printed = python(*launch, *names, *sizes, cwd=tmp_path)
    assert printed.count("Written:") == 1
    for name in ("blocks.0.hook_mlp_out", "blocks.1.hook_mlp_out"):
        own, one = (Spectrum.load(out / "spectra" / f"{name}.safetensors") for out in (tmp_path / "out", finished))
        assert own.n_tokens == one.n_tokens == 2000
        torch.testing.assert_close(own.covariance, one.covariance, rtol=1e-5, atol=1e-9)
    assert python(*launch, *names, *sizes, cwd=tmp_path).count("are in out/spectra already") == 1
