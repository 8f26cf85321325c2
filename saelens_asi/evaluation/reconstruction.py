"""How well an SAE reconstructs activations, and which of its features fire: one pass, each vector encoded once."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from saelens_asi.evaluation.topk_inference import topk_reconstruction

# Values of a dense (tokens x d_sae) activation matrix made at a time.
_MAX_DENSE_VALUES = 2**25


@dataclass(frozen=True)
class ReconstructionMetrics:
    """How a dictionary reconstructs vectors it was not trained on.

    Attributes:
        n_tokens: vectors evaluated.
        dead_fraction: share of the features that fire on none of them (arXiv 2508.16929 counts over 10M tokens).
        nmse: E|x - x_hat|^2 / E|x - E x|^2.
        l0: mean number of features that fire on a token.
    """

    n_tokens: int
    dead_fraction: float
    nmse: float
    l0: float

    @property
    def explained_variance(self) -> float:
        """1 - nmse, over all tokens at once: ``explained_variance`` of SAELens's evals on the same tokens.

        SAELens's ``explained_variance_legacy`` is another number: the mean of 1 - |x - x_hat|^2 / |x - E x|^2 over the
        tokens, with E x that of each batch.
        """
        return 1 - self.nmse

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class RunningReconstruction:
    """Errors and firings of a dictionary over the vectors seen so far; those of two streams can be merged.

    Attributes:
        firing_counts: (d_sae,) int64, on how many vectors each feature fired.
        mean: (d,) float64, of the vectors x.
        deviation: float64 scalar, the sum of |x - mean|^2.
        error: float64 scalar, the sum of |x - x_hat|^2.
        n_tokens: number of vectors.
    """

    firing_counts: Tensor
    mean: Tensor
    deviation: Tensor
    error: Tensor
    n_tokens: int

    @classmethod
    def zeros(cls, d_sae: int, d: int) -> RunningReconstruction:
        """Nothing seen yet, of a dictionary of ``d_sae`` features for vectors of width ``d``."""
        zero = torch.tensor(0.0, dtype=torch.float64)
        counts = torch.zeros(d_sae, dtype=torch.int64)
        return cls(counts, torch.zeros(d, dtype=torch.float64), zero, zero, 0)

    @torch.no_grad()
    def update_(self, x: Tensor, x_hat: Tensor, firings: Tensor) -> RunningReconstruction:
        """Add vectors (n, d), their reconstructions (n, d), and how often each feature fired on them (d_sae,)."""
        x, x_hat = _wide(x), _wide(x_hat)
        mean = x.mean(dim=0) if len(x) else x.new_zeros(x.shape[1])
        sums = ((x - mean).square().sum(), (x - x_hat).square().sum())
        return self.merge_(RunningReconstruction(firings.to(x.device), mean, *sums, len(x)))

    def merge_(self, other: RunningReconstruction) -> RunningReconstruction:
        """Add what ``other`` has seen (Chan, Golub and LeVeque 1979). Raises ValueError where the shapes differ."""
        shapes = [(len(one.firing_counts), len(one.mean)) for one in (self, other)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"cannot merge a dictionary of (d_sae, d) = {shapes[1]} into one of {shapes[0]}")
        if other.n_tokens:
            n_tokens = self.n_tokens + other.n_tokens
            mean = self.mean.to(other.mean.device)
            delta = other.mean - mean
            between = delta.square().sum() * (self.n_tokens * other.n_tokens / n_tokens)
            self.firing_counts = self.firing_counts.to(other.mean.device) + other.firing_counts
            self.deviation = self.deviation.to(mean.device) + other.deviation + between
            self.error = self.error.to(mean.device) + other.error
            self.mean = mean + delta * (other.n_tokens / n_tokens)
            self.n_tokens = n_tokens
        return self

    def metrics(self) -> ReconstructionMetrics:
        """The measures of all vectors so far.

        Raises:
            ValueError: for fewer than 2 vectors, for vectors that do not vary, or where something is not finite.
        """
        if self.n_tokens < 2:
            raise ValueError(f"an evaluation needs at least 2 activations, got {self.n_tokens}")
        error, deviation = float(self.error), float(self.deviation)
        if not (math.isfinite(error) and math.isfinite(deviation)):
            raise ValueError(
                f"among {self.n_tokens} activations or their reconstructions are NaN or infinity: run the model and "
                "the SAE in a wider dtype (bfloat16 or float32)"
            )
        if deviation == 0:
            raise ValueError(
                f"the {self.n_tokens} activations are all the same, so that no share of their variance can be "
                "explained: check the hook, and that the data holds more than one token"
            )
        counts = self.firing_counts
        dead = int((counts == 0).sum()) / len(counts)
        return ReconstructionMetrics(self.n_tokens, dead, error / deviation, int(counts.sum()) / self.n_tokens)


def _wide(x: Tensor) -> Tensor:
    return (x.cpu() if x.device.type == "mps" else x).double()


@torch.no_grad()
def measure_(running: RunningReconstruction, sae: Any, x: Tensor) -> RunningReconstruction:
    """Add vectors (n, d_in) and what a SAELens SAE makes of them; each is encoded once."""
    reconstruct = topk_reconstruction(sae) or (lambda chunk: _dense_reconstruction(sae, chunk))
    for chunk in x.to(sae.device).split(chunk_size(sae)):
        running.update_(chunk, *reconstruct(chunk))
    return running


def _dense_reconstruction(sae: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    acts = sae.encode(x)
    acts = acts.to_dense() if acts.is_sparse else acts
    return sae.decode(acts), (acts != 0).sum(dim=0)


def chunk_size(sae: Any) -> int:
    """As many tokens at a time as memory should hold activations of."""
    return max(1, _MAX_DENSE_VALUES // sae.cfg.d_sae)


@contextmanager
def on_flat_vectors(sae: Any) -> Iterator[Any]:
    """An SAE as it encodes (n, d_in) vectors in inference: no training mode, heads laid side by side.

    SAELens's SAEs for ``hook_z`` otherwise expect a dimension of heads. What was set is put back.
    """
    was_training, had_heads = getattr(sae, "training", False), getattr(sae, "hook_z_reshaping_mode", False)
    if was_training:
        sae.eval()
    if had_heads:
        sae.turn_off_forward_pass_hook_z_reshaping()
    try:
        yield sae
    finally:
        if had_heads:
            sae.turn_on_forward_pass_hook_z_reshaping()
        if was_training:
            sae.train()
