"""Every place where SAELens builds a trainer: both flags work there, end to end."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import (
    SAE,
    LoggingConfig,
    MultiSAETrainingRunner,
    MultiSAETrainingRunnerConfig,
)
from sae_lens.config import SAETrainerConfig
from sae_lens.registry import get_sae_training_class
from sae_lens.synthetic import SyntheticModelConfig, SyntheticSAERunner, SyntheticSAERunnerConfig
from sae_lens.training.sae_trainer import SAETrainer
from torch.optim import Adam

from saelens_asi import ActiveSubspaceInit, SparseAdam
from saelens_asi.initialization import METADATA_KEY
from saelens_asi.plugin.trainer import PluginTrainer
from tests.helpers import tiny

SETTINGS = ActiveSubspaceInit(d_init=4, n_tokens=256)
FLAGS: dict[str, Any] = {"initializer": SETTINGS, "optimizer": "sparse_adam"}


@pytest.fixture
def trainers(monkeypatch: pytest.MonkeyPatch) -> list[SAETrainer]:
    """The trainers that are made while the test runs."""
    made: list[SAETrainer] = []
    stock_init = SAETrainer.__init__

    def init(self: SAETrainer, *args: Any, **kwargs: Any) -> None:
        made.append(self)
        stock_init(self, *args, **kwargs)

    monkeypatch.setattr(SAETrainer, "__init__", init)
    return made


def _check(sae: Any, trainer: SAETrainer, d_init: int = 4) -> None:
    assert isinstance(trainer, PluginTrainer)
    assert isinstance(trainer.optimizer, SparseAdam)
    assert trainer.n_training_steps > 0
    record = sae.cfg.metadata[METADATA_KEY]
    assert record["d_init"] == d_init
    assert record["settings"] == SETTINGS.to_dict()
    assert all(bool(torch.isfinite(param).all()) for param in sae.parameters())


@pytest.mark.parametrize(
    ("hook_name", "d_in"),
    [
        ("blocks.1.attn.hook_z", tiny.HOOK_Z_WIDTH),
        ("blocks.1.hook_attn_out", tiny.D_MODEL),
        ("blocks.1.hook_mlp_out", tiny.D_MODEL),
        ("blocks.1.hook_resid_post", tiny.D_MODEL),
    ],
)
def test_llm_runner_with_hooked_transformer(hook_name, d_in, model, dataset, tmp_path, trainers):
    cfg = tiny.runner_config(tiny.sae_config(d_in=d_in, **FLAGS), tmp_path, hook_name=hook_name)
    sae = tiny.run(cfg, model, dataset)
    _check(sae, *trainers)
    loaded = SAE.load_from_disk(tmp_path / "output")
    assert loaded.cfg.metadata.hook_name == hook_name
    assert loaded.cfg.metadata[METADATA_KEY] == sae.cfg.metadata[METADATA_KEY]


@pytest.mark.parametrize("module", ["self_attn.o_proj", "mlp", ""])
def test_llm_runner_with_auto_model_for_causal_lm(module, llama_folder, dataset, tmp_path, trainers):
    hook_name = f"model.layers.0.{module}".rstrip(".")
    model_settings = {"model_class_name": "AutoModelForCausalLM", "model_name": str(llama_folder)}
    cfg = tiny.runner_config(tiny.sae_config(**FLAGS), tmp_path, hook_name=hook_name, **model_settings)
    _check(tiny.run(cfg, None, dataset), *trainers)


@pytest.fixture(scope="module")
def bridge(llama_folder: Path) -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    return TransformerBridge.boot_transformers(str(llama_folder), device="cpu")


@pytest.mark.parametrize(
    "hook_name",
    [
        "blocks.1.attn.hook_z",
        "blocks.1.hook_attn_out",
        "blocks.1.attn.hook_out",
        "blocks.1.hook_mlp_out",
        "blocks.1.hook_resid_post",
    ],
)
def test_llm_runner_with_transformer_bridge(hook_name, bridge, dataset, tmp_path, trainers):
    cfg = tiny.runner_config(tiny.sae_config(**FLAGS), tmp_path, hook_name=hook_name)
    _check(tiny.run(cfg, bridge, dataset), *trainers)


def test_a_hook_that_a_bridge_does_not_have_is_named_with_a_near_one(bridge, dataset, tmp_path):
    cfg = tiny.runner_config(tiny.sae_config(**FLAGS), tmp_path, hook_name="blocks.1.attn.hook_outt")
    with pytest.raises(ValueError, match=r"blocks\.1\.attn\.hook_outt.*did you mean.*'blocks\.1\.attn\.hook_out'"):
        tiny.run(cfg, bridge, dataset)


def test_llm_runner_on_one_head(model, dataset, tmp_path, trainers):
    head = {"hook_name": "blocks.1.attn.hook_z", "hook_head_index": 2}
    sae_cfg = tiny.sae_config(d_in=4, initializer=ActiveSubspaceInit(d_init=3, n_tokens=256))
    sae = tiny.run(tiny.runner_config(sae_cfg, tmp_path, **head), model, dataset)
    assert sae.cfg.metadata[METADATA_KEY]["d_init"] == 3
    assert isinstance(trainers[0], PluginTrainer)


def test_llm_runner_on_text_that_it_tokenizes_itself(model, tmp_path, trainers):
    from datasets import Dataset

    text = [" ".join(f"w{3 + (7 * row + column) % 60}" for column in range(40)) for row in range(120)]
    cfg = tiny.runner_config(tiny.sae_config(**FLAGS), tmp_path, is_dataset_tokenized=False)
    _check(tiny.run(cfg, model, Dataset.from_dict({"text": text})), *trainers)


def test_override_sae_is_initialised_from_its_own_config(model, dataset, tmp_path, trainers):
    sae = get_sae_training_class("topk")[0](tiny.sae_config(**FLAGS))
    result = tiny.run(tiny.runner_config(tiny.sae_config(), tmp_path), model, dataset, override_sae=sae)
    assert result is sae
    _check(sae, *trainers)


@pytest.mark.parametrize("initializer", ["default", SETTINGS])
@pytest.mark.parametrize("optimizer", ["adam", "sparse_adam"])
def test_each_flag_works_alone(initializer, optimizer, model, dataset, tmp_path, trainers):
    cfg = tiny.runner_config(tiny.sae_config(initializer=initializer, optimizer=optimizer), tmp_path)
    sae = tiny.run(cfg, model, dataset)
    assert type(trainers[0].optimizer) is (SparseAdam if optimizer == "sparse_adam" else Adam)
    assert (METADATA_KEY in sae.cfg.metadata) is (initializer != "default")


def test_the_final_runner_config_says_what_was_asked_for(model, dataset, tmp_path):
    tiny.run(tiny.runner_config(tiny.sae_config(**FLAGS), tmp_path), model, dataset)
    saved = json.loads((tmp_path / "output" / "runner_cfg.json").read_text())
    assert saved["sae"]["initializer"] == SETTINGS.to_dict()
    assert saved["sae"]["optimizer"] == "sparse_adam"


@pytest.mark.parametrize("positional", [True, False])
def test_a_trainer_around_a_generator(positional):
    basis = torch.linalg.qr(torch.randn(tiny.D_MODEL, 4))[0]
    batches = (torch.randn(tiny.BATCH, 4) @ basis.T + 1 for _ in range(100))
    sae = get_sae_training_class("topk")[0](tiny.sae_config(**FLAGS))
    cfg = SAETrainerConfig(total_training_samples=10 * tiny.BATCH, train_batch_size_samples=tiny.BATCH)
    trainer = SAETrainer(cfg, sae, batches) if positional else SAETrainer(cfg=cfg, sae=sae, data_provider=batches)
    assert trainer.fit() is sae
    _check(sae, trainer)
    assert sae.cfg.metadata[METADATA_KEY]["variance_explained"] == pytest.approx(1, abs=1e-6)


def test_a_users_own_trainer_class_keeps_what_it_overrides():
    seen = []

    class MyTrainer(SAETrainer[Any, Any]):
        def _train_step(self, sae: Any, sae_in: torch.Tensor) -> Any:
            seen.append(len(sae_in))
            return super()._train_step(sae, sae_in)

    sae = get_sae_training_class("topk")[0](tiny.sae_config(**FLAGS))
    cfg = SAETrainerConfig(total_training_samples=3 * tiny.BATCH, train_batch_size_samples=tiny.BATCH, lr_end=1e-4)
    trainer = MyTrainer(cfg, sae, (torch.randn(tiny.BATCH, tiny.D_MODEL) for _ in range(50)))
    trainer.fit()
    assert isinstance(trainer, MyTrainer)
    assert seen == [tiny.BATCH] * 3
    _check(sae, trainer)


def _multi_config(saes: dict[str, Any], hooks: dict[str, str], tmp_path: Path, **changes: Any) -> Any:
    settings = {
        "context_size": tiny.CONTEXT,
        "n_batches_in_buffer": 16,
        "store_batch_size_prompts": 8,
        "train_batch_size_tokens": tiny.BATCH,
        "training_tokens": 10 * tiny.BATCH,
        "n_batches_for_norm_estimate": 4,
        "checkpoint_path": None,
        "output_path": str(tmp_path / "output"),
        "logger": LoggingConfig(log_to_wandb=False),
        "streaming": False,
        "model_name": "tiny",
    }
    return MultiSAETrainingRunnerConfig(saes=saes, hook_names=hooks, **{**settings, **changes})


@pytest.mark.parametrize("prefetch", [False, 2])
def test_multi_runner_with_and_without_the_flags(prefetch, model, dataset, tmp_path, trainers):
    z, out = "blocks.1.attn.hook_z", "blocks.1.hook_attn_out"
    saes = {
        "z": tiny.sae_config(d_in=tiny.HOOK_Z_WIDTH, **FLAGS),
        "stock": tiny.sae_config(),
        "shared": tiny.sae_config("standard", **FLAGS),
        "scaled": tiny.sae_config(normalize_activations="expected_average_only_in", **FLAGS),
        "white": tiny.sae_config(normalize_activations="covariance_whitening", **FLAGS),
    }
    before = {name: copy.deepcopy(cfg) for name, cfg in saes.items()}
    hooks = {"z": z, "stock": out, "shared": out, "scaled": out, "white": out}
    cfg = _multi_config(saes, hooks, tmp_path, prefetch_llm_batches=prefetch)
    trained = MultiSAETrainingRunner(cfg, override_dataset=dataset, override_model=model).run()

    by_name = dict(zip(saes, trainers, strict=True))
    for name in ("z", "shared", "scaled", "white"):
        _check(trained[name], by_name[name])
        assert saes[name].normalize_activations == before[name].normalize_activations, "the user's config was changed"
        assert METADATA_KEY not in saes[name].metadata, "the user's config was changed"
        assert trained[name].cfg.metadata[METADATA_KEY]["n_tokens"] == 256
        assert trained[name].cfg.metadata[METADATA_KEY]["n_tokens_taken_from_training"] == 0
        assert SAE.load_from_disk(tmp_path / "output" / name).cfg.metadata[METADATA_KEY]["d_init"] == 4
    assert type(by_name["stock"]) is SAETrainer
    assert type(by_name["stock"].optimizer) is Adam
    assert METADATA_KEY not in trained["stock"].cfg.metadata
    explained = {name: trained[name].cfg.metadata[METADATA_KEY]["variance_explained"] for name in ("shared", "scaled")}
    assert explained["scaled"] == pytest.approx(explained["shared"], rel=1e-6), "a scale leaves the subspace"


def _synthetic_config(sae: Any, tmp_path: Path, **changes: Any) -> Any:
    synthetic = SyntheticModelConfig(num_features=24, hidden_dim=tiny.D_MODEL, seed=0)
    settings = {
        "training_samples": 10 * tiny.BATCH,
        "batch_size": tiny.BATCH,
        "eval_samples": 64,
        "n_batches_for_norm_estimate": 4,
        "checkpoint_path": None,
        "output_path": str(tmp_path / "output"),
        "logger": LoggingConfig(log_to_wandb=False),
    }
    return SyntheticSAERunnerConfig(synthetic_model=synthetic, sae=sae, **{**settings, **changes})


@pytest.mark.parametrize("normalize", ["none", "expected_average_only_in"])
def test_synthetic_runner(normalize, tmp_path, trainers):
    cfg = _synthetic_config(tiny.sae_config(normalize_activations=normalize, **FLAGS), tmp_path)
    before = copy.deepcopy(cfg.sae)
    result = SyntheticSAERunner(cfg).run()
    _check(result.sae, *trainers)
    assert result.sae.cfg.metadata[METADATA_KEY]["n_tokens_taken_from_training"] == 0
    assert cfg.sae.normalize_activations == before.normalize_activations, "the user's config was changed"
    assert METADATA_KEY not in cfg.sae.metadata, "the user's config was changed"
    assert SAE.load_from_disk(tmp_path / "output").cfg.metadata[METADATA_KEY]["d_init"] == 4


def test_synthetic_runner_config_survives_json(tmp_path):
    cfg = _synthetic_config(tiny.sae_config(**FLAGS), tmp_path)
    again = type(cfg).from_dict(json.loads(json.dumps(cfg.to_dict(), allow_nan=False)))
    assert (again.sae.initializer, again.sae.optimizer) == (SETTINGS, "sparse_adam")
