"""A config that asks for nothing trains and saves as if the plugin were not there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sae_lens.config import SAETrainerConfig
from sae_lens.registry import get_sae_training_class
from sae_lens.training.sae_trainer import SAETrainer

import saelens_asi  # noqa: F401
from saelens_asi.plugin.fields import DEFAULTS
from tests.helpers import tiny

SAVED = ("cfg.json", "sae_weights.safetensors", "sparsity.safetensors", "runner_cfg.json", "trainer_state.pt")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: tmp_path_factory.mktemp(name) for name in ("stock", "plugin")}


@pytest.fixture(scope="module")
def reports(folders: dict[str, Path], python: Callable[..., str]) -> dict[str, Any]:
    """The same training twice, each in its own process: without and with the plugin imported."""
    printed = {
        "stock": python("-m", "tests.helpers.stock_run", cwd=folders["stock"]),
        "plugin": python("-m", "tests.helpers.stock_run", "saelens_asi", cwd=folders["plugin"]),
    }
    return {name: json.loads(text.splitlines()[-1]) for name, text in printed.items()}


def test_losses_are_identical_with_the_plugin_imported(reports):
    assert not reports["stock"]["plugin_imported"]
    assert reports["plugin"]["plugin_imported"]
    for architecture in tiny.ARCHITECTURES:
        stock, plugin = (reports[name]["report"][architecture] for name in ("stock", "plugin"))
        assert len(stock["losses"]) == 10
        assert stock["losses"] == plugin["losses"], architecture


@pytest.mark.usefixtures("reports")
def test_saved_files_are_byte_identical_with_the_plugin_imported(folders):
    stock, plugin = folders["stock"], folders["plugin"]
    files = sorted(path.relative_to(stock) for path in stock.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(plugin) for path in plugin.rglob("*") if path.is_file())
    assert {path.name for path in files} >= set(SAVED)
    different = [str(path) for path in files if (stock / path).read_bytes() != (plugin / path).read_bytes()]
    assert different == []


def test_the_trainer_is_saelens_own(reports):
    report = reports["plugin"]["report"]
    for architecture in tiny.ARCHITECTURES:
        assert report[architecture]["classes"] == ["sae_lens.training.sae_trainer.SAETrainer", "Adam"]


def test_saved_configs_have_no_new_key(reports):
    for architecture in tiny.ARCHITECTURES:
        stock, plugin = (reports[name]["report"][architecture] for name in ("stock", "plugin"))
        assert stock["keys"] == plugin["keys"]
        assert stock["metadata"] == plugin["metadata"]


def test_positional_parameters_keep_their_order_and_the_fields_are_keyword_only(reports):
    for architecture in tiny.ARCHITECTURES:
        stock, plugin = (reports[name]["report"][architecture]["parameters"] for name in ("stock", "plugin"))
        new = sorted([name, "KEYWORD_ONLY"] for name in DEFAULTS)
        assert [parameter for parameter in plugin if parameter not in new] == stock
        assert sorted(parameter for parameter in plugin if parameter in new) == new


def test_a_trainer_made_by_hand_is_exactly_saelens_own():
    sae_class, _ = get_sae_training_class("topk")
    cfg = SAETrainerConfig(total_training_samples=64, train_batch_size_samples=32, lr_end=1e-4)
    trainer = SAETrainer(cfg, sae_class(tiny.sae_config("topk")), iter(()))
    assert type(trainer) is SAETrainer
