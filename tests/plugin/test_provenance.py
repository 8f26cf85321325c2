"""What an initialization did is recorded in the SAE, and what is saved needs no saelens_asi to load."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE, TrainingSAE
from sae_lens.registry import get_sae_training_class
from sae_lens.training.sae_trainer import SAETrainer

import saelens_asi
from saelens_asi import ActiveSubspaceInit
from saelens_asi.initialization import METADATA_KEY
from saelens_asi.plugin.trainer import PluginTrainer
from tests.helpers import third_party, tiny

SETTINGS = ActiveSubspaceInit(d_init=5, n_tokens=512, norm=0.25, seed=11)
FLAGS: dict[str, Any] = {"initializer": SETTINGS, "optimizer": "sparse_adam"}
EXPECTED_KEYS = {
    "settings",
    "space",
    "n_tokens",
    "n_tokens_taken_from_training",
    "d_init",
    "variance_explained",
    "effective_rank",
    "mean_to_deviation",
    "norm",
    "initial_nmse",
    "saelens_asi_version",
}


def _initialised(**settings: Any) -> Any:
    trainer = tiny.trainer(**{**FLAGS, **settings})
    trainer._initialize_if_pending()
    return trainer.sae


def test_the_record_says_what_was_done():
    record = _initialised().cfg.metadata[METADATA_KEY]
    assert set(record) == EXPECTED_KEYS
    assert record["settings"] == SETTINGS.to_dict()
    assert ActiveSubspaceInit.from_dict(record["settings"]) == SETTINGS
    assert record["saelens_asi_version"] == saelens_asi.__version__
    assert (record["d_init"], record["n_tokens"], record["norm"]) == (5, 512, 0.25)
    stream = tiny.batches()
    x = torch.cat([next(stream) for _ in range(512 // tiny.BATCH)]).double()
    deviations = torch.linalg.svdvals(x - x.mean(0))
    share = deviations / deviations.sum()
    variance = deviations.square()
    assert record["variance_explained"] == pytest.approx((variance[:5].sum() / variance.sum()).item(), abs=1e-6)
    assert record["effective_rank"] == pytest.approx(torch.exp(-(share * share.log()).sum()).item(), rel=1e-5)
    spread = x.var(dim=0).sum().sqrt()
    assert record["mean_to_deviation"] == pytest.approx((x.mean(0).norm() / spread).item(), rel=1e-5)


def test_the_record_is_strict_json_of_plain_values():
    record = _initialised().cfg.metadata[METADATA_KEY]
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert all(math.isfinite(value) for value in record.values() if isinstance(value, float))


def test_a_record_that_is_not_strict_json_is_refused():
    with pytest.raises(ValueError, match="JSON"):
        saelens_asi.initialization.write_provenance({}, {"norm": math.nan})


@pytest.mark.parametrize("architecture", [*tiny.ARCHITECTURES, third_party.ARCHITECTURE])
def test_the_record_survives_every_way_to_save_and_load(architecture, tmp_path):
    trainer = tiny.trainer(architecture, n_steps=3, initializer="active_subspace", optimizer="sparse_adam")
    sae = trainer.fit()
    record = sae.cfg.metadata[METADATA_KEY]
    sae.save_model(tmp_path / "training")
    sae.save_inference_model(tmp_path / "inference")
    for name in ("training", "inference"):
        text = (tmp_path / name / "cfg.json").read_text()
        assert json.loads(text, parse_constant=pytest.fail)["metadata"][METADATA_KEY] == record
    assert TrainingSAE.load_from_disk(tmp_path / "training").cfg.metadata[METADATA_KEY] == record
    assert SAE.load_from_disk(tmp_path / "inference").cfg.metadata[METADATA_KEY] == record
    again = TrainingSAE.load_from_disk(tmp_path / "training")
    assert (again.cfg.initializer, again.cfg.optimizer) == ("active_subspace", "sparse_adam")


def test_a_loaded_sae_is_not_initialised_again(tmp_path):
    sae = _initialised()
    sae.save_model(tmp_path)
    loaded = TrainingSAE.load_from_disk(tmp_path)
    weights = {name: value.clone() for name, value in loaded.state_dict().items()}
    trainer = SAETrainer(tiny.trainer().cfg, loaded, tiny.batches())
    assert isinstance(trainer, PluginTrainer)
    assert not trainer.initialization_pending
    trainer._initialize_if_pending()
    assert all(torch.equal(value, weights[name]) for name, value in loaded.state_dict().items())


def test_the_users_config_object_is_left_alone():
    cfg = tiny.sae_config(normalize_activations="expected_average_only_in", **FLAGS)
    before = json.dumps(cfg.to_dict(), sort_keys=True)
    trainer = SAETrainer(tiny.trainer().cfg, get_sae_training_class("topk")[0](cfg), tiny.batches())
    trainer.fit()
    assert json.dumps(cfg.to_dict(), sort_keys=True) == before
    assert METADATA_KEY in trainer.sae.cfg.metadata


WITHOUT_PLUGIN = """
import sys
sys.modules["saelens_asi"] = None  # importing it raises ImportError from here on
import json
from pathlib import Path
import torch
from sae_lens import SAE, LanguageModelSAERunnerConfig, TrainingSAE
from tests.helpers import tiny

for architecture in tiny.ARCHITECTURES:
    folder = Path(architecture)
    (checkpoint,) = (path.parent for path in folder.glob("checkpoints/*/*/trainer_state.pt"))
    x = torch.load(folder / "x.pt")
    expected = torch.load(folder / "expected.pt")
    inference = SAE.load_from_disk(folder / "output")
    with torch.no_grad():
        torch.testing.assert_close(inference(x), expected)
    assert inference.cfg.metadata["active_subspace_init"]["d_init"] == 5
    training = TrainingSAE.load_from_disk(checkpoint)
    assert training.cfg.metadata["active_subspace_init"]["d_init"] == 5
    assert training.W_dec.shape == (48, 16)
    for place in (folder / "output", checkpoint):
        cfg = LanguageModelSAERunnerConfig.from_dict(json.loads((place / "runner_cfg.json").read_text()))
        assert cfg.sae.architecture() == architecture
        assert not hasattr(cfg.sae, "initializer")
assert sys.modules["saelens_asi"] is None
try:
    import saelens_asi
except ImportError:
    print("OK")
"""


def test_what_is_saved_loads_where_saelens_asi_cannot_be_imported(model, dataset, tmp_path: Path, python):
    x = tiny.activations(32)
    for architecture in tiny.ARCHITECTURES:
        folder = tmp_path / architecture
        settings = {"checkpoint_path": str(folder / "checkpoints"), "n_checkpoints": 1}
        flags = {"initializer": ActiveSubspaceInit(d_init=5, n_tokens=256), "optimizer": "sparse_adam"}
        sae = tiny.run(tiny.runner_config(tiny.sae_config(architecture, **flags), folder, **settings), model, dataset)
        assert METADATA_KEY in sae.cfg.metadata
        with torch.no_grad():
            torch.save(SAE.load_from_disk(folder / "output")(x), folder / "expected.pt")
        torch.save(x, folder / "x.pt")
    assert python("-c", WITHOUT_PLUGIN, cwd=tmp_path).splitlines()[-1] == "OK"
