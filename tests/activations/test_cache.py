"""Activations on disk: what the model computes, whatever interrupts the pass, and none but what was asked for."""

from __future__ import annotations

import copy
import itertools
import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from saelens_asi.activations import cache as activation_cache
from saelens_asi.activations import reader
from saelens_asi.activations.cache import cache_activations
from saelens_asi.activations.hooks import hook_points, read_activations
from tests.helpers import tiny
from tests.helpers.damage import Hostile, assert_survives_kills, damages, hit_in_the_third_batch

HOOKS = ["blocks.0.hook_attn_out", "blocks.1.attn.hook_z"]
HOW: dict[str, Any] = {"batch_size": 4, "context_size": 16, "progress": False}


def _expected(model: Any, name: str, n: int) -> torch.Tensor:
    tokens = torch.tensor(tiny.tokens()["tokens"])
    found: list[torch.Tensor] = []
    read_activations(model, tokens, hook_points(model, [name]), {name: found.append})
    return found[0].flatten(0, 1).flatten(1)[:n]


def test_it_holds_what_the_model_computes(model, dataset, tmp_path):
    cached = cache_activations(tmp_path, model, dataset, HOOKS, 500, **HOW)
    assert list(cached) == HOOKS
    for name in HOOKS:
        torch.testing.assert_close(cached[name], _expected(model, name, 500))


def test_a_finished_cache_needs_neither_model_nor_data(model, dataset, tmp_path):
    first = cache_activations(tmp_path, model, dataset, HOOKS, 300, **HOW)

    def never() -> Any:
        raise AssertionError("was asked for")

    again = cache_activations(tmp_path, never, never, HOOKS, 300, **HOW)
    assert all(torch.equal(again[name], first[name]) for name in HOOKS)


def test_an_interrupted_pass_continues_to_the_same_activations(model, dataset, tmp_path, monkeypatch):
    whole = cache_activations(tmp_path / "whole", model, dataset, HOOKS, 400, **HOW)
    monkeypatch.setattr(activation_cache, "_SAVE_SECONDS", 0)
    stock, calls = reader.read_activations, []

    def interrupted(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        stock(*args)

    with monkeypatch.context() as patch:
        patch.setattr(reader, "read_activations", interrupted)
        with pytest.raises(KeyboardInterrupt):
            cache_activations(tmp_path / "parts", model, dataset, HOOKS, 400, **HOW)
    state = json.loads((tmp_path / "parts" / "cache.json").read_text())
    assert state["n_batches"] == 3
    assert not state["complete"]
    calls.clear()
    with monkeypatch.context() as patch:
        patch.setattr(reader, "read_activations", lambda *args: (calls.append(args), stock(*args)))
        parts = cache_activations(tmp_path / "parts", model, dataset, HOOKS, 400, **HOW)
    assert all(torch.equal(parts[name], whole[name]) for name in HOOKS)
    assert len(calls) == -(-400 // (4 * 16)) - 3


def test_data_that_ends_before_gives_fewer_rows_and_says_so(model, dataset, tmp_path, caplog):
    cached = cache_activations(tmp_path, model, dataset.select(range(8)), HOOKS, 10_000, **HOW)
    assert {len(x) for x in cached.values()} == {8 * 16}
    assert "the data ended after 128 of n_tokens=10000" in caplog.text


def test_a_folder_of_other_settings_is_refused(model, dataset, tmp_path: Path):
    cache_activations(tmp_path, model, dataset, HOOKS, 100, **HOW)
    with pytest.raises(ValueError, match="n_tokens was 100 and is 200"):
        cache_activations(tmp_path, model, dataset, HOOKS, 200, **HOW)


def test_data_without_tokens_that_count_is_refused(model, dataset, tmp_path):
    bos_only = torch.full((4, 16), tiny.tokenizer().bos_token_id)
    with pytest.raises(ValueError, match="no token that counts"):
        cache_activations(tmp_path, model, bos_only, HOOKS, 100, **HOW)


def changed(model: Any) -> Any:
    """The same model, with one layer merged with a matrix of rank 1, as a LoRA is."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        weight = other.blocks[0].mlp.W_in
        weight += 1e-3 * torch.ones(weight.shape[0], 1) @ torch.ones(1, weight.shape[1])
    return other


def cut_short(folder: Path, model: Any, data: Any, n_batches: int = 3, n: int = 400) -> None:
    """A pass whose data source fails after some batches."""

    class Failing(list[Any]):
        def __iter__(self) -> Iterator[Any]:
            yield from itertools.islice(super().__iter__(), 4 * n_batches)
            raise ConnectionError("the source went away")

    with pytest.raises(ConnectionError):
        cache_activations(folder, model, Failing(data), HOOKS, n, **HOW)


def test_another_model_or_other_data_are_refused_with_both_sides_named(model, dataset, tmp_path):
    rows = list(dataset)
    cut_short(tmp_path / "parts", model, rows)
    cache_activations(tmp_path / "whole", model, rows, HOOKS, 400, **HOW)
    both = r"was '.*checksum [0-9a-f]+' and is '.*checksum [0-9a-f]+'"
    for folder in (tmp_path / "parts", tmp_path / "whole"):
        before = (folder / "cache.json").read_bytes()
        with pytest.raises(ValueError, match=f"model {both}.*another folder"):
            cache_activations(folder, changed(model), rows, HOOKS, 400, **HOW)
        with pytest.raises(ValueError, match=f"data {both}.*another folder"):
            cache_activations(folder, model, rows[::-1], HOOKS, 400, **HOW)
        assert (folder / "cache.json").read_bytes() == before
    with pytest.raises(ValueError, match="model was"):  # called, since more is to be read
        cache_activations(tmp_path / "parts", lambda: changed(model), lambda: rows, HOOKS, 400, **HOW)


def test_a_function_is_not_called_where_all_is_there_and_the_fingerprint_stays(model, dataset, tmp_path):
    cache_activations(tmp_path, model, dataset, HOOKS, 100, **HOW)
    before = (tmp_path / "cache.json").read_bytes()
    cache_activations(tmp_path, lambda: pytest.fail("called"), lambda: pytest.fail("called"), HOOKS, 100, **HOW)
    assert (tmp_path / "cache.json").read_bytes() == before


def test_a_source_that_fails_loses_no_batch(model, dataset, tmp_path):
    rows = list(dataset)
    cut_short(tmp_path / "parts", model, rows)
    assert json.loads((tmp_path / "parts" / "cache.json").read_text())["n_batches"] == 3
    parts = cache_activations(tmp_path / "parts", model, rows, HOOKS, 400, **HOW)
    whole = cache_activations(tmp_path / "whole", model, rows, HOOKS, 400, **HOW)
    assert all(torch.equal(parts[name], whole[name]) for name in HOOKS)
    files = {path.name for path in (tmp_path / "parts").glob("*.npy")}
    assert files == {f"{name}.npy" for name in HOOKS}
    assert all((tmp_path / "parts" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes() for file in files)


def test_a_cache_of_an_earlier_version_goes_on_with_a_warning(model, dataset, tmp_path, caplog):
    """Which had neither fingerprints nor checksums, and the same .npy files."""
    rows = list(dataset)
    whole = cache_activations(tmp_path / "whole", model, rows, HOOKS, 400, **HOW)
    for name, make in (("parts", cut_short), ("all", lambda *args: cache_activations(*args, HOOKS, 400, **HOW))):
        make(tmp_path / name, model, rows)
        path = tmp_path / name / "cache.json"
        old = json.loads(path.read_text())
        path.write_text(json.dumps({key: old[key] for key in OLD_KEYS}))
        caplog.clear()
        found = cache_activations(tmp_path / name, model, rows, HOOKS, 400, **HOW)
        assert "no fingerprint of the model and the data" in caplog.text
        assert all(torch.equal(found[hook], whole[hook]) for hook in HOOKS)


OLD_KEYS = ("settings", "files", "n_batches", "n_kept", "complete")


@pytest.mark.parametrize("complete", [True, False])
@pytest.mark.parametrize(
    "harm", ["missing", "cut", "folder", "header", "pickle", "content", "state cut", "state folder"]
)
def test_what_does_not_fit_the_state_is_refused_with_the_folder_and_the_way_out(
    harm, complete, model, dataset, tmp_path
):
    rows, folder = list(dataset), tmp_path / "cache"
    cache_activations(folder, model, rows, HOOKS, 400, **HOW) if complete else cut_short(folder, model, rows)
    path = folder / ("cache.json" if harm.startswith("state") else f"{HOOKS[1]}.npy")
    content = bytearray(path.read_bytes())
    if harm in ("missing", "folder", "state folder"):
        path.unlink()
    if "folder" in harm:
        path.mkdir()
    elif "cut" in harm:
        path.write_bytes(content[: len(content) // 2])
    elif harm == "header":
        path.write_bytes(content.replace(b"'<f4'", b"'<i4'"))
    elif harm == "content":
        content[200] ^= 1
        path.write_bytes(content)
    elif harm == "pickle":
        marker = tmp_path / "executed"
        np.save(path, np.array([Hostile(marker)] * 400, dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"folder='.*cache'.*Delete the folder"):
        cache_activations(folder, model, rows, HOOKS, 400, **HOW)
    assert not (tmp_path / "executed").exists()


def test_files_of_a_pass_that_saved_no_state_are_written_anew(model, dataset, tmp_path):
    """Killed while the first file was made."""
    (tmp_path / f"{HOOKS[0]}.npy").write_bytes(b"\x93NUMPY\x01\x00v")
    cached = cache_activations(tmp_path, model, dataset, HOOKS, 300, **HOW)
    torch.testing.assert_close(cached[HOOKS[0]], _expected(model, HOOKS[0], 300))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full")
def test_a_full_disk_keeps_what_was_saved(model, dataset, tmp_path, monkeypatch):
    rows = list(dataset)
    cut_short(tmp_path / "parts", model, rows)
    before = (tmp_path / "parts" / "cache.json").read_bytes()
    stock = activation_cache._write

    def full(file: Any, content: bytes) -> None:
        with open("/dev/full", "wb", buffering=0) as disk:
            stock(disk, content)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(activation_cache, "_write", full)
        with pytest.raises(OSError, match=r"no space left for folder=.*the same call goes on"):
            cache_activations(tmp_path / "parts", model, rows, HOOKS, 400, **HOW)
    assert (tmp_path / "parts" / "cache.json").read_bytes() == before
    parts = cache_activations(tmp_path / "parts", model, rows, HOOKS, 400, **HOW)
    whole = cache_activations(tmp_path / "whole", model, rows, HOOKS, 400, **HOW)
    assert all(torch.equal(parts[name], whole[name]) for name in HOOKS)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(damage=damages())
def test_damaged_caches_are_refused_or_right(damage, model, dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    whole = cache_activations(folder, model, dataset, HOOKS, 60, **HOW)
    whole = {name: tensor.clone() for name, tensor in whole.items()}
    damage.apply(folder / damage.choose(["cache.json", *(f"{name}.npy" for name in HOOKS)]))
    found, refused = whole, str(folder)
    try:
        found = cache_activations(folder, model, dataset, HOOKS, 60, **HOW)
    except ValueError as error:
        refused = str(error)
    assert str(folder) in refused
    assert list(found) == HOOKS
    assert all(torch.equal(found[name], whole[name]) for name in HOOKS)


@pytest.mark.parametrize(("number", "times"), [(signal.SIGTERM, 1), (signal.SIGTERM, 2), (signal.SIGINT, 2)])
def test_signals_let_the_batch_end_and_save_it(number, times, model, dataset, tmp_path):
    rows = list(dataset)
    signal.signal(signal.SIGTERM, lambda number, frame: (_ for _ in ()).throw(KeyboardInterrupt("SIGTERM")))
    with hit_in_the_third_batch(number, times), pytest.raises(KeyboardInterrupt):
        cache_activations(tmp_path / "parts", model, rows, HOOKS, 400, **HOW)
    assert json.loads((tmp_path / "parts" / "cache.json").read_text())["n_batches"] == 3
    parts = cache_activations(tmp_path / "parts", model, rows, HOOKS, 400, **HOW)
    whole = cache_activations(tmp_path / "whole", model, rows, HOOKS, 400, **HOW)
    assert all(torch.equal(parts[name], whole[name]) for name in HOOKS)


def test_killed_at_any_moment_it_ends_with_the_same_bytes(tmp_path):
    assert_survives_kills("cache", tmp_path)


def test_float16_takes_half_the_disk(tmp_path: Path, model: Any, dataset: Any) -> None:
    whole = cache_activations(tmp_path / "whole", model, dataset, HOOKS, 300, **HOW)

    def never() -> Any:
        raise AssertionError("was asked for")

    halved = cache_activations(tmp_path / "half", model, dataset, HOOKS, 300, dtype="float16", **HOW)
    again = cache_activations(tmp_path / "half", never, never, HOOKS, 300, dtype="float16", **HOW)
    for name, values in whole.items():
        assert halved[name].dtype == torch.float16
        assert torch.equal(halved[name], values.half())
        assert torch.equal(again[name], halved[name])
        sizes = [(tmp_path / folder / f"{name}.npy").stat().st_size for folder in ("whole", "half")]
        assert sizes[0] - sizes[1] == 2 * values.numel()
    with pytest.raises(ValueError, match=r"dtype.*float16.*float32"):
        cache_activations(tmp_path / "half", model, dataset, HOOKS, 300, **HOW)


def test_what_float16_does_not_hold_is_refused(tmp_path: Path, model: Any, dataset: Any) -> None:
    huge = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in huge.parameters():
            parameter.mul_(1e4)
    with pytest.raises(ValueError, match="dtype='float16' ends at 65,504"):
        cache_activations(tmp_path, huge, dataset, HOOKS, 300, dtype="float16", **HOW)


def test_another_dtype_is_refused(tmp_path: Path, model: Any, dataset: Any) -> None:
    with pytest.raises(ValueError, match="dtype='int8' must be one of"):
        cache_activations(tmp_path, model, dataset, HOOKS, 300, dtype="int8", **HOW)  # type: ignore[arg-type]
