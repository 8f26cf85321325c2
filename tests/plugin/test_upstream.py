"""A SAELens that this plugin was not made for is said, not patched."""

from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens.saes.sae import TrainingSAEConfig
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.activations_store import ActivationsStore
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from sae_lens.training.prefetch import PrefetchingIterator
from sae_lens.training.sae_trainer import SAETrainer

import saelens_asi
from saelens_asi.activations import sae_state
from saelens_asi.evaluation import reconstruction
from saelens_asi.plugin import quirks, topk_pass, upstream
from saelens_asi.plugin.fields import DEFAULTS

TREES = {path: ast.parse(path.read_text()) for path in sorted(Path(saelens_asi.__file__).parent.rglob("*.py"))}
PACKAGES = ("sae_lens", "transformer_lens")

# Private names of torch and of the standard library; SAELens and TransformerLens are no place for an exception.
OTHERS = {
    *("_int_mm", "_fused_adam_", "_backward_hooks", "_post_accumulate_grad_hooks", "_version", "_indices"),  # torch
    *("_replace", "_field_type", "_FIELD", "_actions", "_prog"),  # NamedTuple, dataclasses, argparse
}


@pytest.fixture
def _without_our_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    """``check_upstream`` runs before the fields are added."""
    every = TrainingSAEConfig.__dataclass_fields__.items()
    stock = {name: field for name, field in every if name not in DEFAULTS}
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
    ("owner", "name"),
    [
        (SAETrainer, "load_trainer_state"),
        (MultiSAETrainer, "_estimate_scaling_factors"),
        (ActivationsStore, "_iterate_tokenized_sequences"),
        (PrefetchingIterator, "close"),
    ],
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


@pytest.mark.usefixtures("_without_our_fields")
@pytest.mark.parametrize("table", ["IMPORTED", "MEMBERS", "FIELDS", "PARAMETERS"])
def test_whatever_the_tables_name_is_looked_for(table, monkeypatch):
    names = {place: (*names, "_of_another_release") for place, names in getattr(upstream, table).items()}
    monkeypatch.setattr(upstream, table, names)
    with pytest.raises(ImportError) as error:
        upstream.check_upstream()
    assert str(error.value).count("_of_another_release") == len(names)


@pytest.mark.usefixtures("_without_our_fields")
@pytest.mark.parametrize("table", ["IMPORTED", "MEMBERS", "FIELDS", "PARAMETERS"])
def test_a_place_that_is_gone_is_named(table, monkeypatch):
    place = "sae_lens.another_module" + (":Class" if table != "IMPORTED" else "")
    monkeypatch.setitem(getattr(upstream, table), place, ("name",))
    with pytest.raises(ImportError, match=f" {place.replace(':', '.')} changed"):
        upstream.check_upstream()


@pytest.mark.usefixtures("_without_our_fields")
def test_an_attribute_that_no_method_sets_any_more_is_named(monkeypatch):
    def __init__(self: Any, source: Any, prefetch: int = 4) -> None:
        self._items = source

    monkeypatch.setattr(PrefetchingIterator, "__init__", __init__)
    with pytest.raises(ImportError, match=r"PrefetchingIterator\._queue changed"):
        upstream.check_upstream()


@pytest.mark.usefixtures("_without_our_fields")
def test_a_function_that_wants_more_than_it_is_given_is_named(monkeypatch):
    monkeypatch.setattr(SAETrainer, "_train_step", lambda self, sae, sae_in, step_number: None)
    with pytest.raises(ImportError, match=r"SAETrainer\._train_step\(step_number=\.\.\.\) changed"):
        upstream.check_upstream()


@pytest.mark.usefixtures("_without_our_fields")
def test_a_module_of_newer_releases_may_be_missing(monkeypatch):
    stock = upstream.import_module

    def import_module(name: str) -> object:
        if name in upstream.ONLY_IN_NEWER:
            raise ImportError(name)
        return stock(name)

    monkeypatch.setattr(upstream, "import_module", import_module)
    with pytest.raises(ImportError, match=r"transformer_lens\.model_bridge changed"):
        upstream.check_upstream()
    monkeypatch.setattr(upstream, "find_spec", lambda name: None)
    upstream.check_upstream()


def test_one_message_comes_before_any_failing_import():
    program = "import sae_lens.util; del sae_lens.util.get_special_token_ids; import saelens_asi"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "does not fit sae-lens" in done.stderr
    assert ": sae_lens.util.get_special_token_ids changed" in done.stderr


def test_a_release_that_lacks_a_module_is_named_by_its_version_before_any_import_of_that_module():
    """As sae-lens 6.52.0, which has no ``saes.abstopk_sae``: bounds come first, and then what is inside."""
    program = """if True:
        import sys
        from importlib import metadata
        import sae_lens
        stock = metadata.version
        metadata.version = lambda name: "6.52.0" if name == "sae-lens" else stock(name)
        sys.modules["sae_lens.saes.abstopk_sae"] = None
        import saelens_asi
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    last = done.stderr.strip().splitlines()[-1]
    bounds = upstream.REQUIREMENTS["sae-lens"]
    assert last == (f"ImportError: saelens_asi needs sae-lens{bounds}, found 6.52.0: pip install 'sae-lens{bounds}'")


def test_the_bounds_are_those_of_the_metadata_and_of_the_readme():
    root = Path(__file__).parents[2]
    project, readme = (root / "pyproject.toml").read_text(), (root / "README.md").read_text()
    for package, bounds in upstream.REQUIREMENTS.items():
        assert f'"{package}{bounds}"' in project
        assert f"`{package}{bounds}`" in readme


def _imports() -> Iterator[tuple[str, str]]:
    """Module and name of everything that the package imports from the two packages, ``import sae_lens`` included."""
    for tree in TREES.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith(PACKAGES):
                yield from ((node.module, alias.name) for alias in node.names)
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in PACKAGES:
                yield node.value.id, node.attr


def test_every_name_that_is_imported_is_named_there():
    forgotten = {f"{module}.{name}" for module, name in _imports() if name not in upstream.IMPORTED.get(module, ())}
    assert forgotten == set()


def test_nothing_is_named_there_that_is_not_imported():
    used = set(_imports())
    assert {(module, name) for module, names in upstream.IMPORTED.items() for name in names} == used


def _private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def _private_uses() -> set[str]:
    """Private names after a dot, and of methods that are defined (which may override one)."""
    nodes = [node for tree in TREES.values() for node in ast.walk(tree)]
    names = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    return {*filter(_private, names | {node.name for node in nodes if isinstance(node, ast.FunctionDef)})}


def _own_names() -> set[str]:
    """What the package defines itself: functions, classes, variables, attributes that it sets."""
    names: set[str] = set()
    for node in (node for tree in TREES.values() for node in ast.walk(tree)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.attr)
    return names


def _extended_classes() -> list[type]:
    """The classes of the two packages that the package imports."""
    found = [getattr(importlib.import_module(module), name) for module, name in _imports()]
    return [one for one in found if isinstance(one, type)]


def test_every_private_name_is_the_packages_own_or_named_there():
    named = {name for names in (*upstream.MEMBERS.values(), *upstream.IMPORTED.values()) for name in names}
    assert _private_uses() - _own_names() - OTHERS - named == set()


def test_a_private_name_that_saelens_has_too_is_named_there():
    """Also where the package has one of that name: it may override SAELens's, or be set on its objects."""
    torchs = upstream._members(torch.nn.Module)
    stock = {name for cls in _extended_classes() for name in upstream._members(cls) - torchs}
    named = {name for names in upstream.MEMBERS.values() for name in names}
    assert (_private_uses() & {*filter(_private, stock)}) - OTHERS - named == set()


def test_the_whitening_constant_is_saelens_own():
    assert inspect.signature(ActivationScaler.estimate_whitening).parameters["eps"].default == quirks.WHITENING_EPS


def test_methods_that_are_compared_with_the_stock_ones_are_named_there():
    named = {name for names in upstream.MEMBERS.values() for name in names}
    assert {*topk_pass._METHODS, *reconstruction._METHODS, *sae_state._STATISTICS} - named == set()
