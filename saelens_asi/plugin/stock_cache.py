"""SAELens's own cached activations, written with a model that is loaded already, whole or not at all."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset
from sae_lens import (
    CacheActivationsRunner,
    CacheActivationsRunnerConfig,
    LanguageModelSAERunnerConfig,
    cache_activations_runner,
)
from sae_lens.cache_activations_runner import load_model
from sae_lens.training.activations_store import ActivationsStore
from torch import Tensor

from saelens_asi.activations.fingerprint import fingerprints
from saelens_asi.activations.hooks import HookedModel
from saelens_asi.resume import damage, differences, folder_written_whole, read_manifest

_FLOAT32 = 4  # bytes

# Settings of training that SAELens's caching runner lacks, or that what it writes cannot be read with.
_NOT_CACHED = {
    "hook_head_index": None,
    "disable_concat_sequences": False,
    "sequence_separator_token": "bos",
    "seqpos_slice": (None,),
    "use_chat_formatting": False,
    "dtype": "float32",
}


@dataclass(frozen=True)
class StockCache:
    """Activations on disk that ``cached_activations_path`` of a runner's config names.

    Attributes:
        folder: of SAELens's dataset, with our manifest beside its files.
        n_tokens: windows times context size, special tokens included.
        n_bytes: on disk.
        replaced: in words, why what was there before was not taken; None where nothing was, or where it was taken.
        is_new: whether the model was run for it now.
    """

    folder: Path
    n_tokens: int
    n_bytes: int
    replaced: str | None
    is_new: bool


def stock_cache(
    cfg: LanguageModelSAERunnerConfig[Any], model: HookedModel, text: Dataset, *, n_estimate: int = 0
) -> StockCache:
    """What ``cfg``, with its ``cached_activations_path``, trains on; from the folder where that holds it, else written.

    The forward passes are those of training from the model: the same text in the same order, the same windows in each,
    so that what is trained has the same bits. What SAELens calls ``shuffle`` there is left out: it shuffles what its
    runner returns, and not what it has saved; the mixing buffer of training shuffles as ever.

    A cache of another model, text, hook or setting, and one that is damaged, is written anew. Disk: 4 d_in bytes a
    token, and there are a buffer and a batch of windows more than ``training_tokens``.

    Args:
        cfg: a config with ``use_cached_activations``.
        model: as for ``override_model``.
        text: as for ``override_dataset``.
        n_estimate: activations that are read from the beginning before training, as by the initialization.

    Raises:
        ValueError: where ``cfg`` uses no cached activations, has settings that SAELens caches nothing for, or names a
            folder that was not written here.
        OSError: where the disk is full; nothing is left then.
    """
    if not cfg.use_cached_activations or cfg.cached_activations_path is None:
        raise ValueError("use_cached_activations=False: SAELens would not read what is cached")
    for name, default in _NOT_CACHED.items():
        if getattr(cfg, name) != default:
            raise ValueError(f"{name}={getattr(cfg, name)!r} has no counterpart in SAELens's cached activations")
    folder = Path(cfg.cached_activations_path)
    n_tokens = _n_tokens(cfg, n_estimate)
    facts = {
        **fingerprints(model, text),
        "hook_name": cfg.hook_name,
        "d_in": cfg.sae.d_in,
        "windows_in_a_batch": cfg.store_batch_size_prompts,
        "context_size": cfg.context_size,
        "prepend_bos": cfg.prepend_bos,
        "dtype": cfg.dtype,
        "sae_lens": cfg.sae_lens_version,
    }
    is_empty = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
    replaced = None if is_empty else _why_not(folder, facts, n_tokens)
    is_new = is_empty or replaced is not None
    if is_new:
        with folder_written_whole(folder, {"n_tokens": n_tokens, "made_of": facts}) as unfinished:
            _write(_cache_config(cfg, unfinished, n_tokens), model, text)
    manifest = read_manifest(folder) or {}
    n_bytes = sum(file["bytes"] for file in manifest["files"].values())
    return StockCache(folder, manifest["n_tokens"], n_bytes, replaced, is_new)


def read_all(cfg: LanguageModelSAERunnerConfig[Any], model: HookedModel, text: Dataset) -> Iterator[Tensor]:
    """All that the cache of ``cfg`` holds, special tokens excepted where training leaves them out; the model rests.

    Batches (n, d_in), in the order of the text.
    """
    store = ActivationsStore.from_config(model, cfg, override_dataset=text)  # type: ignore[arg-type]
    with suppress(StopIteration):
        while True:
            yield store.get_filtered_llm_batch(raise_on_epoch_end=True)


def _n_tokens(cfg: LanguageModelSAERunnerConfig[Any], n_estimate: int) -> int:
    """Tokens of whole batches of windows that training comes to read, and an estimate before it.

    Of each window one BOS is left out, and a separator where documents are longer than windows: with shorter ones
    SAELens begins a cache anew before training ends, and says so.
    """
    # The mixing buffer is filled beyond its size, by a batch of windows at most, before anything is served.
    ahead = (cfg.n_batches_in_buffer + cfg.store_batch_size_prompts) * cfg.context_size
    n_kept = cfg.store_batch_size_prompts * max(cfg.context_size - 2, 1)
    n_batches = math.ceil(max(cfg.training_tokens + ahead, n_estimate) / n_kept)
    return n_batches * cfg.store_batch_size_prompts * cfg.context_size


def _why_not(folder: Path, facts: Mapping[str, Any], n_tokens: int) -> str | None:
    manifest = read_manifest(folder)
    if manifest is None or "made_of" not in manifest:
        raise ValueError(
            f"cached_activations_path={str(folder)!r} holds something else: move it, or set another folder"
        )
    changed = differences(manifest["made_of"], facts)
    if changed:
        return changed
    if manifest["n_tokens"] < n_tokens:
        return f"it holds {manifest['n_tokens']:,} tokens, and {n_tokens:,} are needed"
    return damage(folder)


def _cache_config(cfg: LanguageModelSAERunnerConfig[Any], folder: Path, n_tokens: int) -> CacheActivationsRunnerConfig:
    n_bytes = cfg.store_batch_size_prompts * cfg.context_size * cfg.sae.d_in * _FLOAT32
    return CacheActivationsRunnerConfig(
        dataset_path=cfg.dataset_path,
        model_name=cfg.model_name,
        model_class_name=cfg.model_class_name,
        model_batch_size=cfg.store_batch_size_prompts,
        hook_name=cfg.hook_name,
        d_in=cfg.sae.d_in,
        training_tokens=n_tokens,
        context_size=cfg.context_size,
        new_cached_activations_path=str(folder),
        shuffle=False,
        dtype=cfg.dtype,
        device=cfg.llm_device or cfg.device,
        # One batch in a file. By default SAELens writes 2 GB at least, and computes as many activations; half a token
        # more, so that the number of bytes is not rounded down to no batch at all.
        buffer_size_gb=(n_bytes + cfg.sae.d_in * _FLOAT32 / 2) / 1e9,
        model_kwargs=cfg.model_kwargs,
        prepend_bos=cfg.prepend_bos,
        autocast_lm=cfg.autocast_lm,
    )


def _write(cfg: CacheActivationsRunnerConfig, model: HookedModel, text: Dataset) -> None:
    with _loads(model), _no_bar_for_each_file():
        CacheActivationsRunner(cfg, override_dataset=text).run()


@contextmanager
def _loads(model: HookedModel) -> Iterator[None]:
    """SAELens's caching runner takes no model, and loads one by its name."""
    cache_activations_runner.load_model = lambda *_args, **_kwargs: model
    try:
        yield
    finally:
        cache_activations_runner.load_model = load_model


@contextmanager
def _no_bar_for_each_file() -> Iterator[None]:
    """datasets shows a bar for every file that it saves."""
    were_off = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not were_off:
            datasets.enable_progress_bars()
