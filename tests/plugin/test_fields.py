"""The ``initializer`` and ``optimizer`` fields behave as if SAELens's config classes had always had them."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import pickle
from pathlib import Path

import pytest
from sae_lens import LanguageModelSAERunnerConfig, TrainingSAE
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY, get_sae_training_class
from sae_lens.saes.sae import SAEMetadata, TrainingSAEConfig
from sae_lens.training.sae_trainer import SAETrainer

import saelens_asi
from saelens_asi import ActiveSubspaceInit
from saelens_asi.plugin.fields import DEFAULTS
from tests.helpers import third_party, tiny

SETTINGS = ActiveSubspaceInit(d_init=0.25, n_tokens=500, norm=0.3, center="zeros", subspace="random", seed=7)
ALL = (*tiny.ARCHITECTURES, third_party.ARCHITECTURE)


def test_every_training_architecture_of_saelens_is_covered():
    assert set(SAE_TRAINING_CLASS_REGISTRY) == set(ALL)


@pytest.mark.parametrize("architecture", ALL)
@pytest.mark.parametrize("initializer", ["default", "active_subspace", SETTINGS])
@pytest.mark.parametrize("optimizer", ["adam", "sparse_adam"])
def test_a_config_survives_dict_json_pickle_and_copies(architecture, initializer, optimizer):
    cfg = tiny.sae_config(architecture, initializer=initializer, optimizer=optimizer)
    assert (cfg.initializer, cfg.optimizer) == (initializer, optimizer)
    strict = json.dumps(cfg.to_dict(), allow_nan=False)
    copies = {
        "dict": type(cfg).from_dict(cfg.to_dict()),
        "base class": TrainingSAEConfig.from_dict(cfg.to_dict()),
        "json": type(cfg).from_dict(json.loads(strict)),
        "pickle": pickle.loads(pickle.dumps(cfg)),
        "deepcopy": copy.deepcopy(cfg),
        "copy": copy.copy(cfg),
        "replace": dataclasses.replace(cfg),
    }
    for way, again in copies.items():
        assert type(again) is type(cfg), way
        assert again == cfg, way
        assert (again.initializer, again.optimizer) == (initializer, optimizer), way
    assert isinstance(copies["json"].initializer, type(initializer))


@pytest.mark.parametrize("architecture", ALL)
def test_all_fields_are_keyword_only_and_default_to_stock(architecture):
    config_class = get_sae_training_class(architecture)[1]
    parameters = inspect.signature(config_class).parameters
    for name, default in DEFAULTS.items():
        assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
        assert parameters[name].default == default
        assert name not in config_class.__match_args__
    assert {"initializer", "optimizer"} <= {field.name for field in dataclasses.fields(config_class)}


@pytest.mark.parametrize("architecture", ALL)
def test_eq_sees_each_field(architecture):
    plain = tiny.sae_config(architecture)
    assert plain == tiny.sae_config(architecture, initializer="default", optimizer="adam")
    asking = [
        dataclasses.replace(plain, metadata=SAEMetadata(), initializer=SETTINGS),
        dataclasses.replace(plain, metadata=SAEMetadata(), initializer="active_subspace"),
        dataclasses.replace(plain, metadata=SAEMetadata(), optimizer="sparse_adam"),
    ]
    for cfg in asking:
        cfg.metadata = plain.metadata
        assert cfg != plain
    assert asking[0] != asking[1]


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_repr_names_both_fields(architecture):
    text = repr(tiny.sae_config(architecture, initializer=SETTINGS, optimizer="sparse_adam"))
    assert f"initializer={SETTINGS!r}" in text
    assert "optimizer='sparse_adam'" in text


def test_a_repr_written_by_hand_is_kept():
    assert repr(tiny.sae_config("third_party", initializer=SETTINGS)) == "ThirdParty(16, 48)"


@pytest.mark.parametrize("architecture", ALL)
def test_default_factories_are_called_for_every_instance(architecture):
    config_class = get_sae_training_class(architecture)[1]
    first, second = config_class(d_in=16, d_sae=48), config_class(d_in=16, d_sae=48)
    factories = [f.name for f in dataclasses.fields(config_class) if f.default_factory is not dataclasses.MISSING]
    assert "metadata" in factories
    if architecture == "matryoshka_batchtopk":
        assert "matryoshka_widths" in factories
    for name in factories:
        assert getattr(first, name) is not getattr(second, name), name
        assert not isinstance(getattr(first, name), dataclasses.Field), name
    first.metadata.note = "mine"
    assert "note" not in second.metadata


def test_fields_at_their_defaults_are_not_saved():
    saved = tiny.sae_config(initializer="default", optimizer="adam").to_dict()
    details = saved["metadata"]["training_architecture_details"]
    assert not {"initializer", "optimizer"} & (saved.keys() | details.keys())


def test_fields_that_were_set_are_saved_as_plain_values():
    saved = tiny.sae_config(initializer=SETTINGS, optimizer="sparse_adam").to_dict()
    for place in (saved, saved["metadata"]["training_architecture_details"]):
        assert place["initializer"] == SETTINGS.to_dict()
        assert place["optimizer"] == "sparse_adam"


@pytest.mark.parametrize("initializer", ["active_subspace", SETTINGS])
def test_a_runner_config_survives_json(tmp_path, initializer):
    cfg = tiny.runner_config(tiny.sae_config(initializer=initializer, optimizer="sparse_adam"), tmp_path)
    again = LanguageModelSAERunnerConfig.from_dict(json.loads(json.dumps(cfg.to_dict(), allow_nan=False)))
    assert (again.sae.initializer, again.sae.optimizer) == (initializer, "sparse_adam")
    assert again.sae == cfg.sae


def test_a_training_sae_made_from_a_dict_keeps_the_fields():
    sae = TrainingSAE.from_dict(tiny.sae_config("jumprelu", initializer=SETTINGS, optimizer="sparse_adam").to_dict())
    assert (sae.cfg.initializer, sae.cfg.optimizer) == (SETTINGS, "sparse_adam")


def test_settings_may_be_given_as_a_mapping():
    assert tiny.sae_config(initializer={"d_init": 4}).initializer == ActiveSubspaceInit(d_init=4)


def test_an_assignment_is_checked_like_a_constructor_argument():
    cfg = tiny.sae_config()
    with pytest.raises(ValueError, match="initializer='asi'"):
        cfg.initializer = "asi"
    with pytest.raises(ValueError, match="optimizer='sgd'"):
        cfg.optimizer = "sgd"
    assert (cfg.initializer, cfg.optimizer) == ("default", "adam")
    cfg.optimizer = "sparse_adam"
    assert cfg.to_dict()["optimizer"] == "sparse_adam"


def test_a_subclass_defined_after_the_import_has_the_fields():
    @dataclasses.dataclass
    class Late(third_party.ThirdPartyTrainingSAEConfig):
        extra: int = 3

    cfg = Late(16, 48, extra=4, initializer=SETTINGS, optimizer="sparse_adam")
    assert (cfg.extra, cfg.initializer, cfg.optimizer) == (4, SETTINGS, "sparse_adam")
    assert Late(16, 48).groups is not Late(16, 48).groups


def test_registering_again_changes_nothing():
    before = SAETrainer.__new__, TrainingSAEConfig.to_dict, TrainingSAEConfig.__init__
    saelens_asi.register()
    after = SAETrainer.__new__, TrainingSAEConfig.to_dict, TrainingSAEConfig.__init__
    assert all(a is b for a, b in zip(before, after, strict=True))


def test_import_after_third_party_classes_configs_pickles_and_trainers_exist(python, tmp_path: Path):
    assert python("-m", "tests.helpers.late_import", cwd=tmp_path).splitlines()[-1] == "OK"
