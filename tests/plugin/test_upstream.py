"""A SAELens that this plugin was not made for is said, not patched."""

from __future__ import annotations

import pytest
from sae_lens.saes.sae import TrainingSAEConfig
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from sae_lens.training.sae_trainer import SAETrainer

from saelens_asi.plugin import upstream


@pytest.fixture
def _without_our_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    """``check_upstream`` runs before the fields are added."""
    every = TrainingSAEConfig.__dataclass_fields__.items()
    stock = {name: field for name, field in every if name not in ("initializer", "optimizer")}
    monkeypatch.setattr(TrainingSAEConfig, "__dataclass_fields__", stock)


@pytest.mark.usefixtures("_without_our_fields")
def test_the_installed_packages_pass():
    upstream.check_upstream()


@pytest.mark.usefixtures("_without_our_fields")
@pytest.mark.parametrize(
    ("package", "installed"),
    [
        ("torch", "2.5.1"),
        ("sae-lens", "6.51.0"),
        ("sae-lens", "7.0.0"),
        ("transformer-lens", "2.15.0"),
        ("transformer-lens", "4.0.0"),
    ],
)
def test_a_version_outside_the_bounds_is_named(package, installed, monkeypatch):
    stock = upstream.version
    monkeypatch.setattr(upstream, "version", lambda name: installed if name == package else stock(name))
    with pytest.raises(ImportError, match=rf"needs {package}.*found {installed}.*pip install"):
        upstream.check_upstream()


@pytest.mark.usefixtures("_without_our_fields")
@pytest.mark.parametrize(
    ("owner", "name"), [(SAETrainer, "load_trainer_state"), (MultiSAETrainer, "_estimate_scaling_factors")]
)
def test_a_method_that_is_gone_is_named(owner, name, monkeypatch):
    monkeypatch.delattr(owner, name)
    with pytest.raises(ImportError, match=rf"{owner.__name__}\.{name} changed.*sae-lens==6\.54\.12"):
        upstream.check_upstream()


@pytest.mark.usefixtures("_without_our_fields")
def test_another_trainer_signature_is_named(monkeypatch):
    monkeypatch.setattr(SAETrainer, "__init__", lambda self, cfg, sae: None)
    with pytest.raises(ImportError, match=r"SAETrainer\.__init__"):
        upstream.check_upstream()


def test_fields_that_saelens_has_itself_are_named():
    with pytest.raises(ImportError, match=r"TrainingSAEConfig\.initializer \(SAELens has this field itself now\)"):
        upstream.check_upstream()
