"""SAELens's own cached activations: the same training, computed once, whole or not there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from sae_lens import cache_activations_runner
from sae_lens.load_model import load_model
from sae_lens.training.activations_store import ActivationsStore
from torch import Tensor

from saelens_asi import ActiveSubspaceInit
from saelens_asi.plugin.stock_cache import StockCache, read_all, stock_cache
from tests.helpers import tiny

FLAGS = {"initializer": ActiveSubspaceInit(d_init=5, n_tokens=200), "optimizer": "sparse_adam"}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    rows = tiny.save_text(tmp_path_factory.mktemp("text"), 60, 40) / "train.jsonl"
    return Dataset.from_list([json.loads(line) for line in rows.read_text().splitlines()])


def _cfg(folder: Path, flags: dict[str, Any] | None = None, **changes: Any) -> Any:
    of_text = {"is_dataset_tokenized": False, "exclude_special_tokens": True}
    cached = {"use_cached_activations": True, "cached_activations_path": str(folder / "activations")}
    return tiny.runner_config(tiny.sae_config(**(flags or {})), folder, **{**of_text, **cached, **changes})


def _train(cfg: Any, model: Any, text: Dataset) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return tiny.run(cfg, model, text).state_dict()


@pytest.mark.parametrize("flags", [{}, FLAGS], ids=["stock", "with the flag"])
@pytest.mark.parametrize("kind", ["model", "bridge"])
def test_training_from_it_has_the_bits_of_training_from_the_model(
    flags: dict[str, Any], kind: str, text: Dataset, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(kind)
    live = _train(_cfg(tmp_path, flags, use_cached_activations=False), model, text)
    cfg = _cfg(tmp_path, flags)
    cache = stock_cache(cfg, model, text, n_estimate=200)
    assert cache.is_new
    cached = _train(cfg, model, text)
    assert all(torch.equal(live[name], cached[name]) for name in live)


def test_it_holds_whole_batches_and_little_more_than_training_reads(model: Any, text: Dataset, tmp_path: Path) -> None:
    cache = stock_cache(_cfg(tmp_path), model, text)
    # 320 for training, a buffer of 16 windows and a batch of 8; 14 of 16 tokens of a window count at least
    assert cache.n_tokens == 7 * 8 * 16
    assert cache.n_bytes == pytest.approx(cache.n_tokens * (tiny.D_MODEL + 1) * 4, rel=0.5)
    longer = stock_cache(_cfg(tmp_path), model, text, n_estimate=1000)
    assert longer.n_tokens == 9 * 8 * 16
    assert longer.replaced == "it holds 896 tokens, and 1,152 are needed"


def test_the_next_run_does_without_the_model(
    model: Any, text: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = stock_cache(_cfg(tmp_path), model, text)
    monkeypatch.setattr(type(model), "run_with_cache", None)
    second = stock_cache(_cfg(tmp_path, FLAGS), model, text)
    assert second == StockCache(first.folder, first.n_tokens, first.n_bytes, replaced=None, is_new=False)


def test_all_of_it_is_read_once_and_in_the_order_of_the_text(model: Any, text: Dataset, tmp_path: Path) -> None:
    cfg = _cfg(tmp_path, exclude_special_tokens=False)
    cache = stock_cache(cfg, model, text)
    batches = list(read_all(cfg, model, text))
    assert sum(map(len, batches)) == cache.n_tokens
    live = ActivationsStore.from_config(model, _cfg(tmp_path, use_cached_activations=False), override_dataset=text)
    assert all(torch.equal(batch, live.get_raw_llm_batch()[0]) for batch in batches)
    no_special = sum(map(len, read_all(_cfg(tmp_path), model, text)))
    assert cache.n_tokens * 14 / 16 <= no_special < cache.n_tokens


def test_another_text_and_another_hook_are_computed_anew_and_said(model: Any, text: Dataset, tmp_path: Path) -> None:
    stock_cache(_cfg(tmp_path), model, text)
    of_others = stock_cache(_cfg(tmp_path), model, text.select(range(30)))
    assert of_others.is_new
    assert "data was '60 rows" in str(of_others.replaced)
    elsewhere = stock_cache(_cfg(tmp_path, hook_name="blocks.0.hook_mlp_out"), model, text.select(range(30)))
    assert elsewhere.is_new
    assert "hook_name was 'blocks.1.hook_attn_out'" in str(elsewhere.replaced)


def test_a_damaged_one_is_computed_anew(model: Any, text: Dataset, tmp_path: Path) -> None:
    first = stock_cache(_cfg(tmp_path), model, text)
    file = sorted(first.folder.glob("*.arrow"))[1]
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    second = stock_cache(_cfg(tmp_path), model, text)
    assert second.is_new
    assert second.replaced == f"the checksum of {file.name} differs"
    assert stock_cache(_cfg(tmp_path), model, text).replaced is None


def test_a_folder_of_something_else_stays_as_it_is(model: Any, text: Dataset, tmp_path: Path) -> None:
    (tmp_path / "activations").mkdir()
    assert stock_cache(_cfg(tmp_path), model, text).replaced is None  # of nothing there is nothing to lose
    shutil.rmtree(tmp_path / "activations")
    (tmp_path / "activations").mkdir()
    (tmp_path / "activations" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"cached_activations_path=.*holds something else"):
        stock_cache(_cfg(tmp_path), model, text)
    assert (tmp_path / "activations" / "mine.txt").read_text() == "mine"


def test_an_interruption_leaves_nothing_and_saelens_as_it_was(
    model: Any, text: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock, passes = type(model).run_with_cache, []

    def run_with_cache(self: Any, *args: Any, **options: Any) -> Any:
        passes.append(1)
        if len(passes) == 4:
            raise KeyboardInterrupt
        return stock(self, *args, **options)

    monkeypatch.setattr(type(model), "run_with_cache", run_with_cache)
    with pytest.raises(KeyboardInterrupt):
        stock_cache(_cfg(tmp_path), model, text)
    assert list(tmp_path.iterdir()) == []
    assert cache_activations_runner.load_model is load_model


def test_a_config_that_would_not_read_it_is_refused(model: Any, text: Dataset, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="use_cached_activations=False"):
        stock_cache(_cfg(tmp_path, use_cached_activations=False), model, text)
    with pytest.raises(ValueError, match="hook_head_index=1 has no counterpart"):
        stock_cache(_cfg(tmp_path, hook_head_index=1), model, text)
