"""Files of a Lorsa that are damaged, of two saves, or something else: refused by name, never loaded wrongly."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from saelens_asi.lorsa import CachedSequences, Lorsa, LorsaConfig, import_llamascopium, load_lorsa, save_lorsa
from tests.helpers.damage import Hostile
from tests.lorsa.test_training import llamascopium_folder

CONFIG = LorsaConfig(d_model=8, n_qk_heads=2, n_ov_heads=12, d_qk=4, k=2, n_ctx=8)


def other() -> Lorsa:
    lorsa = Lorsa(CONFIG, seed=1)
    lorsa.provenance = {"saved": "later"}
    return lorsa


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def folder_instead(path: Path) -> None:
    path.unlink()
    path.mkdir()


def hostile_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps(Hostile(path.parent / "executed")))


def a_list(path: Path) -> None:
    path.write_text("[1]")


def with_nan(path: Path) -> None:
    tensors = load_file(path)
    tensors["b_D"][3] = torch.nan
    save_file(tensors, path, metadata={"format": "saelens_asi.lorsa.v1"})


WEIGHTS = (truncate, empty, folder_instead, hostile_pickle, with_nan)
JSON = (truncate, empty, folder_instead, hostile_pickle, a_list)


@pytest.mark.parametrize(
    ("name", "damage"),
    [("lorsa_weights.safetensors", damage) for damage in WEIGHTS] + [("lorsa.json", damage) for damage in JSON],
)
def test_a_damaged_lorsa_is_refused_by_name(name: str, damage: Callable[[Path], None], tmp_path: Path) -> None:
    save_lorsa(Lorsa(CONFIG), tmp_path)
    damage(tmp_path / name)
    with pytest.raises(ValueError, match=name):
        load_lorsa(tmp_path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("name", "damage"),
    [("sae_weights.safetensors", damage) for damage in WEIGHTS] + [("config.json", damage) for damage in JSON],
)
def test_a_damaged_llamascopium_folder_is_refused_by_name(
    name: str, damage: Callable[[Path], None], tmp_path: Path
) -> None:
    llamascopium_folder(tmp_path)
    damage(tmp_path / name)
    with pytest.raises(ValueError, match=name):
        import_llamascopium(tmp_path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("missing", ["W_K", "b_V", "b_D", "ln_q.w"])
def test_a_llamascopium_folder_without_some_weights_is_refused(missing: str, tmp_path: Path) -> None:
    _, tensors = llamascopium_folder(tmp_path)
    del tensors[missing]
    save_file(tensors, tmp_path / "sae_weights.safetensors")
    with pytest.raises(ValueError, match=r"sae_weights.safetensors lacks"):
        import_llamascopium(tmp_path)


@pytest.mark.parametrize("missing", ["d_model", "d_qk_head", "top_k", "rotary_dim", "n_ctx"])
def test_a_llamascopium_folder_without_some_settings_is_refused(missing: str, tmp_path: Path) -> None:
    cfg, _ = llamascopium_folder(tmp_path)
    del cfg[missing]
    (tmp_path / "config.json").write_text(json.dumps(cfg))
    with pytest.raises(ValueError, match=f"config.json does not set '{missing}'"):
        import_llamascopium(tmp_path)


def test_weights_that_are_not_finite_are_not_saved_over_good_ones(tmp_path: Path) -> None:
    save_lorsa(Lorsa(CONFIG), tmp_path)
    poisoned = other()
    with torch.no_grad():
        poisoned.W_O[3, 2] = torch.inf
    with pytest.raises(ValueError, match=r"\['W_O'\] of this Lorsa hold numbers that are not finite"):
        save_lorsa(poisoned, tmp_path)
    assert torch.equal(load_lorsa(tmp_path).W_O, Lorsa(CONFIG).W_O)


def test_files_of_two_saves_are_refused(tmp_path: Path) -> None:
    save_lorsa(Lorsa(CONFIG), tmp_path / "one")
    save_lorsa(other(), tmp_path / "other")
    (tmp_path / "one" / "lorsa.json").write_bytes((tmp_path / "other" / "lorsa.json").read_bytes())
    with pytest.raises(ValueError, match=r"not saved with its lorsa\.json"):
        load_lorsa(tmp_path / "one")


def test_a_folder_of_an_earlier_version_without_a_checksum_is_read(tmp_path: Path) -> None:
    save_lorsa(other(), tmp_path)
    record = json.loads((tmp_path / "lorsa.json").read_text())
    del record["weights_xxh3_128"], record["checksum"]
    (tmp_path / "lorsa.json").write_text(json.dumps(record))
    assert torch.equal(load_lorsa(tmp_path).W_V, other().W_V)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_lorsa(Lorsa(CONFIG), tmp_path_factory.mktemp("saved"))


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_flipped_or_cut_file_is_refused_or_loads_the_same_weights(saved: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["lorsa_weights.safetensors", "lorsa.json"]))
    content = (saved / name).read_bytes()
    place = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        changed = content[:place]
    else:
        changed = content[:place] + bytes([content[place] ^ data.draw(st.integers(1, 255))]) + content[place + 1 :]
    (saved / name).write_bytes(changed)
    try:
        loaded = load_lorsa(saved)
    except ValueError as error:
        refused = str(error)
        assert str(saved) in refused
    else:  # white space, or the name of a checksum
        assert name == "lorsa.json"
        assert loaded.cfg == CONFIG
        assert all(torch.equal(tensor, Lorsa(CONFIG).state_dict()[key]) for key, tensor in loaded.state_dict().items())
    finally:
        (saved / name).write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, empty, folder_instead, hostile_pickle])
def test_damaged_cached_sequences_are_refused_by_name(damage: Callable[[Path], None], tmp_path: Path) -> None:
    x = torch.randn(4, 6, 8)
    path = CachedSequences(x, x + 1, torch.zeros(4, 6, dtype=torch.int64)).save(tmp_path / "sequences.safetensors")
    damage(path)
    with pytest.raises(ValueError, match=r"sequences\.safetensors"):
        CachedSequences.load(path)
    assert not (tmp_path / "executed").exists()
