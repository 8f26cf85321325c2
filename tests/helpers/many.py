"""A training run of any number of processes, and all that it did, put together: to be compared with that of one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from saelens_asi.activations.sae_state import feature_dim, shard_of
from tests.helpers import tiny


@dataclass
class Done:
    """Weights, moments and counters of the whole, at the start and at the end, and what each step did."""

    tensors: dict[str, Tensor]
    initial: dict[str, Tensor] = field(default_factory=dict)
    losses: list[dict[str, float]] = field(default_factory=list)
    gradient_norms: list[float] = field(default_factory=list)
    selected: list[Tensor] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)
    n_bytes: float = 0.0


def train(architecture: str, n_steps: int, **settings: Any) -> Done:
    """In every process of the group that it is called in, all of which it gives the same."""
    torch.manual_seed(0)
    dtype = getattr(torch, settings.get("dtype", "float32"))
    provider = (batch.to(dtype) for batch in tiny.batches())
    period, dead_from = settings.pop("equal_every", None), settings.pop("dead_from", None)
    trainer = tiny.trainer(architecture, provider, n_steps=n_steps, **settings)
    if period is not None:
        make_equal_(trainer.sae, period)
    if dead_from is not None:
        take_for_dead_(trainer, dead_from)
    return watched(trainer)


def take_for_dead_(trainer: Any, first: int) -> None:
    """Have all features from one on counted as dead from the third step on."""
    stock_step, here = trainer.step, torch.arange(trainer.sae.cfg.d_sae) + shard_of(trainer.sae).first

    def step(batch: Tensor) -> Any:
        if trainer.steps_done() >= 2:
            trainer.n_forward_passes_since_fired[here >= first] = 1e6
        return stock_step(batch)

    trainer.step = step


@torch.no_grad()
def make_equal_(sae: Any, period: int) -> None:
    """Give features the same weights as those ``period`` before: their scores tie on every token."""
    first = shard_of(sae).first
    rows = torch.randn(period, sae.cfg.d_in, generator=torch.Generator().manual_seed(5), dtype=sae.W_dec.dtype)
    sae.W_dec.copy_(rows[(torch.arange(len(sae.W_dec)) + first) % period] * 0.1)
    sae.W_enc.copy_(sae.W_dec.T)


def watched(trainer: Any) -> Done:
    """Let a trainer train, and put together what it did."""
    done, stock_step = Done({}), trainer.step
    shard = shard_of(trainer.sae)

    def step(batch: Tensor) -> Any:
        done.initial = done.initial or whole_state(trainer)
        output = stock_step(batch)
        done.losses.append({"loss": float(output.loss), **{name: float(x) for name, x in output.losses.items()}})
        done.gradient_norms.append(float(trainer._gradient_norm))
        tokens, features = output.feature_acts.to_sparse().coalesce().indices()
        places = torch.stack([tokens + shard.part(len(batch)).start, features + shard.first], dim=1)
        found = torch.cat(shard.world.gather_rows(places))
        done.selected.append(found[(found[:, 0] * shard.d_sae + found[:, 1]).argsort()])
        return output

    trainer.step = step
    trainer.fit()
    done.tensors = whole_state(trainer)
    done.history = trainer.history
    done.n_bytes = shard.world.traffic.n_bytes
    return done


def whole_state(trainer: Any) -> dict[str, Tensor]:
    """Weights, moments and counters of all features."""
    shard, found = shard_of(trainer.sae), {}
    for name, param in trainer.sae.named_parameters():
        dim = feature_dim(name, param, shard.n_features)
        found[name] = _whole(param.detach(), dim, shard)
        for key, value in trainer.optimizer.state[param].items():
            of_rows = 0 if dim is not None and value.ndim else None  # one number a row
            found[f"{name}.{key}"] = _whole(value, dim if value.shape == param.shape else of_rows, shard)
    for name in ("act_freq_scores", "n_forward_passes_since_fired"):
        found[name] = _whole(getattr(trainer, name), 0, shard)
    if hasattr(trainer.sae, "topk_threshold"):
        found["topk_threshold"] = trainer.sae.topk_threshold.clone()
    return found


def _whole(tensor: Tensor, dim: int | None, shard: Any) -> Tensor:
    if dim is None:
        return tensor.clone()
    rows = torch.cat(shard.features.gather_rows(tensor.movedim(dim, 0).contiguous()))
    return rows.movedim(0, dim).contiguous()
