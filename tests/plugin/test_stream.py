"""The initialization does not move the training stream, nor any randomness; where it must, it says so."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sae_lens.cache_activations_runner
import torch
from datasets import Dataset
from sae_lens import (
    CacheActivationsRunner,
    LoggingConfig,
    MultiSAETrainingRunner,
    MultiSAETrainingRunnerConfig,
)
from sae_lens.config import SAETrainerConfig
from sae_lens.registry import get_sae_training_class
from sae_lens.synthetic import SyntheticModelConfig, SyntheticSAERunner, SyntheticSAERunnerConfig
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

from saelens_asi import ActiveSubspaceInit
from saelens_asi.initialization import METADATA_KEY
from tests.helpers import tiny

SETTINGS = ActiveSubspaceInit(d_init=4, n_tokens=700)


def _batches_of(train: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> tuple[list[Tensor], list[float], Tensor]:
    """Raw batches that reach the trainer, learning rates, and torch's random state at the end."""
    seen: list[Tensor] = []
    rates: list[float] = []
    stock_step = SAETrainer.step

    def step(self: SAETrainer, batch: Tensor) -> Any:
        seen.append(batch.clone())
        rates.append(self.optimizer.param_groups[0]["lr"])
        return stock_step(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(SAETrainer, "step", step)
        torch.manual_seed(3)
        train()
    return seen, rates, torch.get_rng_state()


def _assert_same_stream(train: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """``train(initializer)`` must give the same batches and randomness for stock and for active-subspace starts."""
    stock, stock_rates, stock_random = _batches_of(lambda: train("default"), monkeypatch)
    ours, our_rates, our_random = _batches_of(lambda: train(SETTINGS), monkeypatch)
    assert len(stock) == len(ours) > 5
    assert all(torch.equal(a, b) for a, b in zip(stock, ours, strict=True))
    assert not torch.equal(stock[0], stock[1]), "a stream of equal batches proves nothing"
    assert stock_rates == our_rates
    assert torch.equal(stock_random, our_random)


@pytest.mark.parametrize("normalize", ["none", "expected_average_only_in", "covariance_whitening"])
@pytest.mark.parametrize("streaming", [False, True])
def test_language_model_batches_are_bit_identical(normalize, streaming, model, dataset, tmp_path, monkeypatch):
    data = dataset.to_iterable_dataset() if streaming else dataset

    def train(initializer: Any) -> None:
        sae = tiny.sae_config(normalize_activations=normalize, initializer=initializer)
        tiny.run(tiny.runner_config(sae, tmp_path, streaming=streaming), model, data)

    _assert_same_stream(train, monkeypatch)


def test_an_estimate_longer_than_the_dataset_ends_with_it(model, tmp_path, monkeypatch):
    short = tiny.tokens(30)  # 480 activations, of which whole batches of 8 sequences are read

    def train(initializer: Any) -> Any:
        return tiny.run(tiny.runner_config(tiny.sae_config(initializer=initializer), tmp_path), model, short)

    _assert_same_stream(train, monkeypatch)
    assert train(SETTINGS).cfg.metadata[METADATA_KEY]["n_tokens"] == 24 * tiny.CONTEXT


def test_batches_without_special_tokens_are_bit_identical(model, dataset, tmp_path, monkeypatch):
    def train(initializer: Any) -> None:
        cfg = tiny.runner_config(
            tiny.sae_config(initializer=initializer), tmp_path, exclude_special_tokens=[3, 4, 5], seqpos_slice=(2, None)
        )
        tiny.run(cfg, model, dataset)

    _assert_same_stream(train, monkeypatch)


def test_prefetched_batches_are_bit_identical(model, dataset, tmp_path, monkeypatch):
    def train(initializer: Any) -> None:
        cfg = tiny.runner_config(tiny.sae_config(initializer=initializer), tmp_path, prefetch_llm_batches=2)
        tiny.run(cfg, model, dataset)

    stock, _, _ = _batches_of(lambda: train("default"), monkeypatch)
    ours, _, _ = _batches_of(lambda: train(SETTINGS), monkeypatch)
    assert len(stock) == len(ours) == 10
    assert all(torch.equal(a, b) for a, b in zip(stock, ours, strict=True))


@pytest.mark.parametrize("prefetch", [False, 2])
def test_multi_sae_batches_are_bit_identical(prefetch, model, dataset, tmp_path, monkeypatch):
    def train(initializer: Any) -> None:
        cfg = MultiSAETrainingRunnerConfig(
            saes={name: tiny.sae_config(initializer=initializer) for name in ("attn", "mlp")},
            hook_names={"attn": tiny.ATTN_OUT, "mlp": "blocks.0.hook_mlp_out"},
            context_size=tiny.CONTEXT,
            n_batches_in_buffer=16,
            store_batch_size_prompts=8,
            train_batch_size_tokens=tiny.BATCH,
            training_tokens=10 * tiny.BATCH,
            streaming=False,
            prefetch_llm_batches=prefetch,
            checkpoint_path=None,
            output_path=None,
            logger=LoggingConfig(log_to_wandb=False),
        )
        MultiSAETrainingRunner(cfg, override_dataset=dataset, override_model=model).run()

    stock, _, _ = _batches_of(lambda: train("default"), monkeypatch)
    ours, _, _ = _batches_of(lambda: train(SETTINGS), monkeypatch)
    assert len(stock) == len(ours) == 20
    assert all(torch.equal(a, b) for a, b in zip(stock, ours, strict=True))


@pytest.fixture
def cache(model, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Activations on disk, written by SAELens's own runner."""
    monkeypatch.setattr(sae_lens.cache_activations_runner, "load_model", lambda **_: model)
    cfg = tiny.cache_config(tmp_path / "cache")
    CacheActivationsRunner(cfg, override_dataset=dataset).run()
    return tmp_path / "cache"


def test_cached_batches_are_bit_identical(cache, model, dataset, tmp_path, monkeypatch):
    records = []

    def train(initializer: Any) -> None:
        cached = {"use_cached_activations": True, "cached_activations_path": str(cache)}
        cfg = tiny.runner_config(tiny.sae_config(initializer=initializer), tmp_path, **cached)
        records.append(tiny.run(cfg, model, dataset).cfg.metadata[METADATA_KEY])

    _assert_same_stream(train, monkeypatch)
    assert (records[1]["n_tokens"], records[1]["n_tokens_taken_from_training"]) == (SETTINGS.n_tokens, 0)


def test_synthetic_batches_are_bit_identical(tmp_path, monkeypatch):
    def train(initializer: Any) -> None:
        cfg = SyntheticSAERunnerConfig(
            synthetic_model=SyntheticModelConfig(num_features=24, hidden_dim=tiny.D_MODEL, seed=0),
            sae=tiny.sae_config(initializer=initializer),
            training_samples=10 * tiny.BATCH,
            batch_size=tiny.BATCH,
            run_final_eval=False,
            checkpoint_path=None,
            output_path=None,
            logger=LoggingConfig(log_to_wandb=False),
        )
        SyntheticSAERunner(cfg).run()

    _assert_same_stream(train, monkeypatch)


def _generator(n_batches: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(5)
    for _ in range(n_batches):
        yield torch.randn(tiny.BATCH, tiny.D_MODEL, generator=generator)


def _by_hand(provider: Iterator[Tensor], **sae: Any) -> SAETrainer:
    training_sae = get_sae_training_class("topk")[0](tiny.sae_config(**sae))
    cfg = SAETrainerConfig(
        total_training_samples=6 * tiny.BATCH,
        train_batch_size_samples=tiny.BATCH,
        lr_end=1e-4,
        n_batches_for_norm_estimate=3,
    )
    return SAETrainer(cfg, training_sae, provider)


@pytest.mark.parametrize(("normalize", "n_before"), [("none", 0), ("expected_average_only_in", 3)])
def test_a_generator_gives_up_batches_and_the_record_counts_them(normalize, n_before, monkeypatch, caplog):
    every = list(_generator(60))
    trainer = _by_hand(_generator(60), initializer=SETTINGS, normalize_activations=normalize)
    seen, _, _ = _batches_of(trainer.fit, monkeypatch)
    n_taken = -(-SETTINGS.n_tokens // tiny.BATCH)  # whole batches
    record = trainer.sae.cfg.metadata[METADATA_KEY]
    assert record["n_tokens"] == SETTINGS.n_tokens
    assert record["n_tokens_taken_from_training"] == n_taken * tiny.BATCH
    expected = every[n_before + n_taken :][: len(seen)]
    assert all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True))
    assert "no second look" in caplog.text


def test_a_generator_shorter_than_the_estimate_is_an_error_that_says_so():
    trainer = _by_hand(_generator(0), initializer=SETTINGS)
    with pytest.raises(ValueError, match="the data ended after 0 activations"):
        trainer.fit()


def test_the_directions_do_not_touch_the_global_random_state():
    trainer = _by_hand(_generator(60), initializer=SETTINGS)
    before = torch.get_rng_state()
    trainer._initialize_if_pending()
    assert torch.equal(torch.get_rng_state(), before)


def test_the_seed_alone_decides_the_directions():
    def decoder(seed: int) -> Tensor:
        torch.manual_seed(torch.seed() % 1000)
        trainer = _by_hand(_generator(60), initializer=ActiveSubspaceInit(d_init=4, n_tokens=256, seed=seed))
        trainer._initialize_if_pending()
        return trainer.sae.W_dec.detach().clone()

    assert torch.equal(decoder(1), decoder(1))
    assert not torch.equal(decoder(1), decoder(2))


def test_a_provider_with_a_second_look_is_not_used_up(caplog):
    class Twice:
        def __init__(self):
            self.batches = tiny.batches()

        def __next__(self):
            return next(self.batches)

        def __iter__(self):
            return self

        def second_look(self):
            return tiny.batches()

    trainer = tiny.trainer(provider=Twice(), initializer=ActiveSubspaceInit(d_init=4, n_tokens=256))
    seen = []
    stock = trainer.step
    trainer.step = lambda batch: (seen.append(batch), stock(batch))[1]
    trainer.fit()
    assert "no second look" not in caplog.text
    assert trainer.sae.cfg.metadata["active_subspace_init"]["n_tokens_taken_from_training"] == 0
    assert all(torch.equal(batch, expected) for batch, expected in zip(seen, tiny.batches(), strict=False))
