"""saelens-asi autopsy from a folder or a checkpoint to table, JSON and figure; errors in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from saelens_asi import autopsy, cli
from saelens_asi.activations.loading import load_documents
from saelens_asi.activations.reader import HookActivations
from saelens_asi.cli.autopsy import load_sae
from tests.helpers import tiny


@pytest.fixture(scope="module")
def trained(llama_folder: Path, bridge: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """An SAE trained by SAELens on a tiny model, with a checkpoint, and the text it was trained on."""
    data = tiny.save_text(tmp_path_factory.mktemp("data"), 60, 100)
    folder = tmp_path_factory.mktemp("run")
    sae = tiny.sae_config(d_sae=64, normalize_activations="expected_average_only_in")
    cfg = tiny.runner_config(
        sae,
        folder,
        model_name=str(llama_folder),
        dataset_path=str(data),
        is_dataset_tokenized=False,
        checkpoint_path=str(folder / "checkpoints"),
        save_final_checkpoint=True,
        training_tokens=20 * tiny.BATCH,
        lr=1e-2,
    )
    tiny.run(cfg, bridge, load_documents(str(data), 1000)[0])
    (checkpoint,) = Path(cfg.checkpoint_path).glob("*/trainer_state.pt")
    return {"data": data, "sae": folder / "output", "checkpoint": checkpoint.parent}


def test_it_examines_a_saved_sae_on_its_own_model_text_and_hook(
    trained: dict[str, Any], bridge: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.main(["autopsy", str(trained["sae"]), "--n-tokens", "1000", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    read = json.loads((tmp_path / "autopsy.json").read_text())
    assert (tmp_path / "autopsy.png").read_bytes().startswith(b"\x89PNG")
    text = load_documents(str(trained["data"]), 1000)[0]
    batches = HookActivations(bridge, text, tiny.ATTN_OUT, 1000, context_size=tiny.CONTEXT, progress=False)
    found = autopsy(load_sae(str(trained["sae"])), batches, firing_rates=trained["sae"], progress=False)
    assert read == json.loads(json.dumps(found.to_dict()))
    assert read["n_tokens"] == 1000
    assert read["n_dead"] > 0
    assert str(found) in (tmp_path / "autopsy.md").read_text()
    assert str(found) in printed
    assert "needs the optimizer's state" in printed


def test_a_checkpoint_brings_its_optimizer_and_its_scale(trained: dict[str, Any], tmp_path: Path) -> None:
    for name in ("sae", "checkpoint"):
        flags = [] if name == "sae" else ["--checkpoint", str(trained["checkpoint"])]
        cli.main(["autopsy", str(trained["sae"]), *flags, "--n-tokens", "1000", "--out", str(tmp_path / name)])
    plain, whole = (json.loads((tmp_path / name / "autopsy.json").read_text()) for name in ("sae", "checkpoint"))
    assert (plain["has_optimizer_state"], whole["has_optimizer_state"]) == (False, True)
    assert "fires_if_momentum" in whole["dead"]
    # the saved SAE is the last checkpoint with the scale folded in: the same features are dead of the same causes
    assert plain["gamma"] == pytest.approx(whole["gamma"], rel=1e-4)
    assert set(plain["dead"]["feature"]) == set(whole["dead"]["feature"])


def test_model_hook_and_text_can_be_given(trained: dict[str, Any], llama_folder: Path, tmp_path: Path) -> None:
    names = ["--model", str(llama_folder), "--dataset", str(trained["data"]), "--hooks", "blocks.0.hook_attn_out"]
    cli.main(["autopsy", str(trained["sae"]), *names, "--n-tokens", "200", "--n-sample", "50", "--out", str(tmp_path)])
    read = json.loads((tmp_path / "autopsy.json").read_text())
    assert (read["n_tokens"], read["n_sample"]) == (200, 50)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nowhere"], "'nowhere' is no folder here and no release"),
        (["{empty}"], "holds no SAE"),
        (["{sae}", "--n-sample", "1", "--n-tokens", "50"], "n_sample=1"),
        (["{sae}", "--hooks", "blocks.7.hook_attn_out"], "no hook of this model"),
    ],
)
def test_a_bad_argument_ends_in_one_line(
    args: list[str], message: str, trained: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"{empty}": str(tmp_path), "{sae}": str(trained["sae"])}
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["autopsy", *(places.get(arg, arg) for arg in args), "--out", str(tmp_path / "out")])
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_training_weights_of_a_checkpoint_are_read_as_they_are(trained: dict[str, Any]) -> None:
    sae = load_sae(str(trained["checkpoint"]))
    names = [name for name, _ in sae.named_parameters()]
    state = torch.load(trained["checkpoint"] / "trainer_state.pt", weights_only=True)
    assert len(names) == len(state["optimizer"]["state"])


@pytest.mark.parametrize("file", ["cfg.json", "sae_weights.safetensors", "trainer_state.pt", "activation_scaler.json"])
@pytest.mark.parametrize("damage", ["cut", "text", "empty"])
def test_a_damaged_checkpoint_ends_in_one_line_that_names_it(
    file: str, damage: str, trained: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(trained["checkpoint"], tmp_path / "checkpoint")
    whole = (folder / file).read_bytes()
    (folder / file).write_bytes({"cut": whole[: len(whole) // 2], "text": b"[1, 2]", "empty": b""}[damage])
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["autopsy", str(folder), "--n-tokens", "100", "--out", str(tmp_path / "out")])
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert str(folder) in error
    assert "Traceback" not in error


def test_the_firing_rates_saved_beside_an_sae_are_used(trained: dict[str, Any], tmp_path: Path) -> None:
    args = ["autopsy", str(trained["sae"]), "--n-tokens", "600", "--dead-rate", "0.003", "--out", str(tmp_path)]
    cli.main(args)
    read = json.loads((tmp_path / "autopsy.json").read_text())
    assert read["settings"]["dead_rate"] == 0.003
    rates = 10 ** load_file(trained["sae"] / "sparsity.safetensors")["sparsity"][read["dead"]["feature"]].double()
    given = torch.tensor(read["dead"]["past_rate"], dtype=torch.float64)
    torch.testing.assert_close(given, torch.where(rates > 1e-9, rates, 0.0), rtol=1e-4, atol=1e-9)
    assert max(read["dead"]["silent_tokens"]) > 0
