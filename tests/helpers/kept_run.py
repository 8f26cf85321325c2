"""A training run that resumes from what its folder holds, and leaves all that it ended with in ``final.pt``.

``python -m tests.helpers.kept_run KIND FOLDER [STEPS] [SECONDS_A_STEP]``, to be killed and called again.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from sae_lens import (
    CacheActivationsRunner,
    LanguageModelSAETrainingRunner,
    LoggingConfig,
    MultiSAETrainingRunner,
    MultiSAETrainingRunnerConfig,
    cache_activations_runner,
)
from sae_lens.synthetic import SyntheticModelConfig, SyntheticSAERunner, SyntheticSAERunnerConfig
from sae_lens.training.sae_trainer import SAETrainer

from saelens_asi import ActiveSubspaceInit, read_history
from tests.helpers import tiny

FLAGS: dict[str, Any] = {"initializer": ActiveSubspaceInit(d_init=5, n_tokens=512), "optimizer": "sparse_adam"}
N_CHECKPOINTS = 12

_SCALED = "expected_average_only_in"


class Batches:
    """A data provider of a user's own, whose place can be saved."""

    def __init__(self) -> None:
        self.n = 0

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> torch.Tensor:
        self.n += 1
        return tiny.activations(tiny.BATCH, seed=self.n)

    def state_dict(self) -> dict[str, int]:
        return {"n": self.n}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.n = state["n"]


def _language_model(folder: Path, n_steps: int, dataset: Any, sae: Any = None, **changes: Any) -> None:
    settings = {
        "checkpoint_path": str(folder / "checkpoints"),
        "n_checkpoints": N_CHECKPOINTS,
        "training_tokens": n_steps * tiny.BATCH,
        "resume_from_checkpoint": "latest",
        "lr_warm_up_steps": 5,
        "lr_decay_steps": 10,
        "feature_sampling_window": 7,
    }
    cfg = tiny.runner_config(sae or tiny.sae_config(**FLAGS), folder, **{**settings, **changes})
    LanguageModelSAETrainingRunner(cfg, override_dataset=dataset, override_model=tiny.hooked_transformer()).run()


def _text(folder: Path) -> Dataset:
    # Written anew, and to another folder, by each process: it may be killed here too.
    with tempfile.TemporaryDirectory() as source:
        rows = tiny.save_text(Path(source), 70, 23) / "train.jsonl"
        return Dataset.from_list([json.loads(line) for line in rows.read_text().splitlines()])


def _streamed(folder: Path) -> Any:
    return _text(folder).to_iterable_dataset(num_shards=3)


def _cached(folder: Path, n_steps: int) -> None:
    cache = folder / "cached"
    if not cache.exists():
        unfinished = folder / f"cached_{os.getpid()}"  # SAELens's runner leaves half a cache when it is killed
        # The runner takes no model, and loads one by its name.
        cache_activations_runner.load_model = lambda *args, **kwargs: tiny.hooked_transformer()
        CacheActivationsRunner(tiny.cache_config(unfinished), override_dataset=tiny.tokens()).run()
        unfinished.rename(cache)
    options = {"use_cached_activations": True, "cached_activations_path": str(cache)}
    _language_model(folder, n_steps, tiny.tokens(), **options)


def _multi(folder: Path, n_steps: int, **changes: Any) -> None:
    hooks = {"a": tiny.ATTN_OUT, "stock": tiny.ATTN_OUT, "b": "blocks.0.hook_mlp_out"}
    saes = {"a": tiny.sae_config(**FLAGS), "stock": tiny.sae_config(), "b": tiny.sae_config("standard", **FLAGS)}
    cfg = MultiSAETrainingRunnerConfig(
        saes=saes,
        hook_names=hooks,
        context_size=tiny.CONTEXT,
        n_batches_in_buffer=16,
        store_batch_size_prompts=8,
        train_batch_size_tokens=tiny.BATCH,
        training_tokens=n_steps * tiny.BATCH,
        n_checkpoints=N_CHECKPOINTS,
        streaming=False,
        checkpoint_path=str(folder / "checkpoints"),
        output_path=str(folder / "output"),
        resume_from_checkpoint="latest",
        feature_sampling_window=7,
        logger=LoggingConfig(log_to_wandb=False),
        **changes,
    )
    MultiSAETrainingRunner(cfg, override_dataset=tiny.tokens(), override_model=tiny.hooked_transformer()).run()


def _synthetic(folder: Path, n_steps: int) -> None:
    cfg = SyntheticSAERunnerConfig(
        synthetic_model=SyntheticModelConfig(num_features=24, hidden_dim=tiny.D_MODEL, seed=0),
        sae=tiny.sae_config(**FLAGS, resume="latest"),
        training_samples=n_steps * tiny.BATCH,
        batch_size=tiny.BATCH,
        run_final_eval=False,
        n_checkpoints=N_CHECKPOINTS,
        checkpoint_path=str(folder / "checkpoints"),
        output_path=None,
        logger=LoggingConfig(log_to_wandb=False),
    )
    SyntheticSAERunner(cfg).run()


def _by_hand(folder: Path, n_steps: int) -> None:
    tiny.trainer(
        provider=Batches(),
        n_steps=n_steps,
        checkpoint_path=str(folder / "checkpoints"),
        n_checkpoints=N_CHECKPOINTS,
        resume="latest",
        **FLAGS,
    ).fit()


KINDS: dict[str, Callable[[Path, int], None]] = {
    "tokens": lambda folder, n: _language_model(folder, n, tiny.tokens()),
    "text": lambda folder, n: _language_model(folder, n, _text(folder)),
    "streamed": lambda folder, n: _language_model(folder, n, _streamed(folder)),
    "single_documents": lambda folder, n: _language_model(folder, n, _text(folder), disable_concat_sequences=True),
    "prefetch": lambda folder, n: _language_model(folder, n, _text(folder), prefetch_llm_batches=3),
    "whitened": lambda folder, n: _language_model(
        folder, n, tiny.tokens(), tiny.sae_config(normalize_activations="covariance_whitening", **FLAGS)
    ),
    "batchtopk": lambda folder, n: _language_model(
        folder,
        n,
        tiny.tokens(),
        tiny.sae_config("batchtopk", normalize_activations="expected_average_only_in", **FLAGS),
    ),
    "jumprelu": lambda folder, n: _language_model(folder, n, tiny.tokens(), tiny.sae_config("jumprelu", **FLAGS)),
    "cached": _cached,
    "multi": _multi,
    "multi_prefetch": lambda folder, n: _multi(folder, n, prefetch_llm_batches=2),
    "synthetic": _synthetic,
    "by_hand": _by_hand,
}


def train(kind: str, folder: Path, n_steps: int) -> dict[str, Any]:
    """Run to the end, from what ``folder`` holds; returns weights, optimizer, statistics, history and random state."""
    trainers: list[Any] = []
    stock = SAETrainer.set_final_sae_metadata

    def keep(self: Any) -> None:
        stock(self)
        trainers.append(self)

    SAETrainer.set_final_sae_metadata = keep  # type: ignore[method-assign]
    try:
        torch.manual_seed(0)
        KINDS[kind](folder, n_steps)
    finally:
        SAETrainer.set_final_sae_metadata = stock  # type: ignore[method-assign]
    end: dict[str, Any] = {"rng": torch.get_rng_state()}
    for i, trainer in enumerate(trainers):
        end |= {f"{i}.{name}": value for name, value in trainer.sae.state_dict().items()}
        for number, state in trainer.optimizer.state_dict()["state"].items():
            end |= {f"{i}.{number}.{name}": torch.as_tensor(value) for name, value in state.items()}
        end[f"{i}.fired"], end[f"{i}.silent"] = trainer.act_freq_scores, trainer.n_forward_passes_since_fired
        end[f"{i}.counts"] = [trainer.n_training_steps, trainer.n_training_samples, trainer.n_frac_active_samples]
    for path in sorted((folder / "checkpoints").glob("**/training_history.jsonl")):
        if (path.parent / "trainer_state.pt").exists():  # a checkpoint's copy
            continue
        records = [{**record, "seconds": None} for record in read_history(path)]
        end[f"history of {path.parent.name if kind.startswith('multi') else 'the run'}"] = records
    return end


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Names of what differs in a bit."""
    differ = sorted(one.keys() ^ other.keys())
    for name in one.keys() & other.keys():
        a, b = one[name], other[name]
        same = torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        differ += [] if same else [name]
    return differ


def main(kind: str, folder: str, n_steps: str = "60", seconds: str = "0") -> None:
    torch.set_num_threads(1)
    if float(seconds):
        SAETrainer.step = _slowed(SAETrainer.step, float(seconds))  # type: ignore[method-assign]
    end = train(kind, Path(folder), int(n_steps))
    torch.save(end, Path(folder) / "final.pt")


def _slowed(step: Any, seconds: float) -> Any:
    def slow_step(self: Any, batch: Any) -> Any:
        time.sleep(seconds)
        return step(self, batch)

    return slow_step


if __name__ == "__main__":
    main(*sys.argv[1:])
