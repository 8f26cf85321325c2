"""Settings of a Lorsa and of its training, frozen and inert."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

_T = TypeVar("_T")

ACTIVATIONS = ("topk", "batch_topk")
POSITIONS = ("rotary", "learned", "none")


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Frequencies of Llama 3.1 ("NTK by parts"): slow ones divided by ``factor``, fast ones kept, a ramp between.

    Attributes:
        factor: divides the frequencies whose wavelength exceeds ``original_context / low_freq_factor`` positions.
        low_freq_factor: see above.
        high_freq_factor: wavelengths below ``original_context / high_freq_factor`` stay as they are.
        original_context: positions of the model before its context was extended.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int

    def __post_init__(self) -> None:
        if not (self.factor > 0 and self.original_context > 0 and 0 < self.low_freq_factor < self.high_freq_factor):
            raise ValueError(f"{self} must be positive, with low_freq_factor below high_freq_factor")


@dataclass(frozen=True, kw_only=True)
class RotaryPositions:
    """Rotary positions (arXiv 2104.09864).

    Attributes:
        dim: leading dimensions of each head that rotate; the rest pass.
        base: of the geometric series of wavelengths.
        adjacent_pairs: rotate dimensions (0, 1), (2, 3), ... as in GPT-J; otherwise (0, dim / 2), (1, dim / 2 + 1),
            ... as in GPT-NeoX and Llama.
        linear_factor: positions are divided by it.
        llama3: frequency scaling of Llama 3.1, or None.
    """

    dim: int
    base: float = 10_000.0
    adjacent_pairs: bool = False
    linear_factor: float = 1.0
    llama3: Llama3Scaling | None = None

    def __post_init__(self) -> None:
        if isinstance(self.llama3, Mapping):
            object.__setattr__(self, "llama3", from_dict(Llama3Scaling, self.llama3))
        if self.dim < 2 or self.dim % 2:
            raise ValueError(f"rotary dim={self.dim} must be a positive even number: dimensions rotate in pairs")
        if not (self.base > 0 and self.linear_factor > 0):
            raise ValueError(f"rotary base={self.base} and linear_factor={self.linear_factor} must be positive")


@dataclass(frozen=True, kw_only=True)
class LorsaConfig:
    """Shape of a Lorsa (arXiv 2504.20938), and how the attention that it replaces computes its patterns.

    Attributes:
        d_model: width of what it reads and writes.
        n_qk_heads: attention patterns.
        n_ov_heads: rank-one OV heads, the features. Consecutive groups of n_ov_heads / n_qk_heads share a pattern.
        d_qk: width of queries and keys.
        k: features active at a position ("topk"), or on average in a batch ("batch_topk").
        n_ctx: longest context it takes.
        activation: ``"topk"``, or ``"batch_topk"``: the k * positions largest of a batch in training, and a threshold
            that was tracked meanwhile in evaluation.
        relu: of the selected, only positive pre-activations count.
        positions: ``"rotary"``, ``"learned"`` (the target's input already carries them) or ``"none"``.
        rotary: settings of the rotary positions.
        attn_scale: what scores are divided by; sqrt(d_qk) when None.
        soft_cap: scores s become soft_cap * tanh(s / soft_cap), as in Gemma 2; or None.
        window: a position attends to itself and the window - 1 before it; or None.
        qk_norm: queries and keys are divided by their root mean square and scaled, head by head, before they rotate.
        qk_norm_eps: added to the mean square.
        skip_positions: first positions of a sequence that are read but not reconstructed: 1 leaves the BOS token out
            of loss, counts and replacement, as arXiv 2508.16929 does.
    """

    d_model: int
    n_qk_heads: int
    n_ov_heads: int
    d_qk: int
    k: int
    n_ctx: int
    activation: Literal["topk", "batch_topk"] = "topk"
    relu: bool = True
    positions: Literal["rotary", "learned", "none"] = "none"
    rotary: RotaryPositions | None = None
    attn_scale: float | None = None
    soft_cap: float | None = None
    window: int | None = None
    qk_norm: bool = False
    qk_norm_eps: float = 1e-6
    skip_positions: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.rotary, Mapping):
            object.__setattr__(self, "rotary", from_dict(RotaryPositions, self.rotary))
        for name in ("d_model", "n_qk_heads", "n_ov_heads", "d_qk", "k", "n_ctx"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}={value!r} must be a positive integer")
        if self.n_ov_heads % self.n_qk_heads:
            below = self.n_ov_heads // self.n_qk_heads * self.n_qk_heads
            raise ValueError(
                f"n_ov_heads={self.n_ov_heads} must be divisible by n_qk_heads={self.n_qk_heads}, since equal groups "
                f"of features share a pattern: give {below or self.n_qk_heads} or {below + self.n_qk_heads}"
            )
        if self.k > self.n_ov_heads:
            raise ValueError(f"k={self.k} exceeds n_ov_heads={self.n_ov_heads}: give a lower k, or more features")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation={self.activation!r} must be one of {ACTIVATIONS}")
        if self.positions not in POSITIONS:
            raise ValueError(f"positions={self.positions!r} must be one of {POSITIONS}")
        if (self.positions == "rotary") != (self.rotary is not None):
            raise ValueError("positions='rotary' goes with rotary=RotaryPositions(...), and other positions without")
        if self.rotary is not None and self.rotary.dim > self.d_qk:
            raise ValueError(f"rotary dim={self.rotary.dim} exceeds d_qk={self.d_qk}")
        for name in ("attn_scale", "soft_cap", "window"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value!r} must be positive, or None")
        if not 0 <= self.skip_positions < self.n_ctx:
            raise ValueError(f"skip_positions={self.skip_positions} must lie in [0, n_ctx={self.n_ctx})")

    @property
    def group_size(self) -> int:
        """Features that share a pattern."""
        return self.n_ov_heads // self.n_qk_heads

    @property
    def scale(self) -> float:
        """What scores are divided by."""
        return math.sqrt(self.d_qk) if self.attn_scale is None else self.attn_scale

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LorsaConfig:
        """Inverse of ``to_dict``. Raises ValueError for a setting that does not exist."""
        return from_dict(cls, values)


@dataclass(frozen=True, kw_only=True)
class LorsaTraining:
    """Settings of a training run. Frozen and inert.

    Attributes:
        steps: optimizer steps.
        batch_size: sequences a step.
        lr: learning rate after warm-up.
        lr_warm_up_steps: first steps, in which the learning rate rises linearly from zero.
        lr_decay_steps: last steps, in which it falls linearly to zero.
        optimizer: ``"adam"``, or ``"sparse_adam"``: features that do not fire in a step keep their rows of W_V and
            W_O, b_V and all moments.
        betas: decay of the optimizer's first and second moments in a step.
        train_qk: whether queries and keys are trained too.
        k_start: features active at a position in the first step; it falls linearly to the config's k. None: k itself.
        k_warm_up_steps: steps in which it falls from ``k_start``; 0 without one.
        max_grad_norm: gradients are scaled down to this norm; None: never.
        seed: of the order of the sequences.
        log_every: steps between two lines of the history.
        checkpoint_minutes: minutes between two checkpoints, and longer where they would take over 1 % of the time;
            0: none by time.
        checkpoint_every: steps between two checkpoints, beside those by time; 0: none by steps.
        max_skipped_fraction: share of positions that may be left out because their sequence holds a number that is
            not finite. Above it the run stops.
        dead_after: positions after which a feature that has not fired counts as dead in the history.
    """

    steps: int
    batch_size: int = 8
    lr: float = 4e-4
    lr_warm_up_steps: int = 20
    lr_decay_steps: int = 0
    optimizer: Literal["adam", "sparse_adam"] = "sparse_adam"
    betas: tuple[float, float] = (0.9, 0.999)
    train_qk: bool = True
    k_start: int | None = None
    k_warm_up_steps: int = 0
    max_grad_norm: float | None = None
    seed: int = 0
    log_every: int = 10
    checkpoint_minutes: float = 10.0
    checkpoint_every: int = 0
    max_skipped_fraction: float = 0.01
    dead_after: int = 100_000

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))
        for name, least in (("steps", 1), ("batch_size", 1), ("log_every", 1), ("dead_after", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")
        for name in ("lr_warm_up_steps", "lr_decay_steps", "k_warm_up_steps", "checkpoint_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if not 0 <= self.checkpoint_minutes < math.inf:
            raise ValueError(f"checkpoint_minutes={self.checkpoint_minutes} must be a number of at least 0")
        if not 0 <= self.max_skipped_fraction <= 1:
            raise ValueError(f"max_skipped_fraction={self.max_skipped_fraction} must lie in [0, 1]")
        if self.lr_warm_up_steps + self.lr_decay_steps > self.steps:
            raise ValueError(
                f"lr_warm_up_steps={self.lr_warm_up_steps} and lr_decay_steps={self.lr_decay_steps} exceed "
                f"steps={self.steps}: shorten them"
            )
        if self.optimizer not in ("adam", "sparse_adam"):
            raise ValueError(f"optimizer={self.optimizer!r} must be 'adam' or 'sparse_adam'")
        if (self.k_start is None) != (self.k_warm_up_steps == 0):
            raise ValueError("k_start and k_warm_up_steps go together: give both, or neither")

    def lr_at(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        warm = min(1.0, (step + 1) / self.lr_warm_up_steps) if self.lr_warm_up_steps else 1.0
        decay = min(1.0, (self.steps - step) / self.lr_decay_steps) if self.lr_decay_steps else 1.0
        return self.lr * min(warm, decay)

    def k_at(self, step: int, k: int) -> int:
        """Features active at a position in a step, for a Lorsa with this ``k``."""
        if self.k_start is None or step >= self.k_warm_up_steps:
            return k
        return round(self.k_start + (k - self.k_start) * step / self.k_warm_up_steps)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LorsaTraining:
        """From plain values, as JSON has them. Raises ValueError for a setting that does not exist."""
        return from_dict(cls, values)


def from_dict(cls: type[_T], values: Mapping[str, Any]) -> _T:
    """Build a settings dataclass; ValueError for a setting that it does not have."""
    known = [field.name for field in fields(cls)]  # type: ignore[arg-type]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ValueError(f"{cls.__name__} has no setting {unknown}; its settings are {known}")
    return cls(**values)


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ValueError, naming the path, for a file that cannot be read or holds none."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object")
    return value
