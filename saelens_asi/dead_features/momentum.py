"""What an optimizer's momentum did to features while they were silent."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import numpy as np
import torch
from sae_lens import SAE
from torch import Tensor

from saelens_asi.activations.sae_state import feature_row_groups
from saelens_asi.dead_features.firings import Firings
from saelens_asi.history import TRAINING_HISTORY, read_history
from saelens_asi.resume import MANIFEST, damage

TRAINER_STATE = "trainer_state.pt"  # SAELens's name for it

_KEYS = {"state", "param_groups"}
_MOMENTS = ("exp_avg", "exp_avg_sq")

# Steps after which 0.9**n leaves too little of a float32 moment to be traced back.
_LONGEST_MEMORY = 600

# Moments in float32 are off by some rounding a step.
_ROUNDING = 1.01


class AdamGroup(TypedDict, total=False):
    """What is read of a parameter group; ``initial_lr`` and ``row_dim`` may be missing."""

    params: list[int]
    lr: float
    initial_lr: float
    betas: tuple[float, float]
    eps: float
    row_dim: int | None


@dataclass(frozen=True)
class OptimizerState:
    """What an Adam keeps between steps, and what SAELens counts beside it.

    Attributes:
        moments: from a parameter's number to ``step``, ``exp_avg`` and ``exp_avg_sq``.
        groups: of parameters.
        silent_steps: (d_sae,) steps since each feature fired, SAELens's own count; None where it was not given.
        firings: in training, SAELens's own count; None likewise.
        learning_rates: (step, learning rate of that step), ascending, as the training history recorded them; empty
            without one.
        known_since: the first step whose learning rate is known.
    """

    moments: Mapping[int, Mapping[str, Tensor]]
    groups: Sequence[AdamGroup]
    silent_steps: Tensor | None
    firings: Firings | None = None
    learning_rates: Sequence[tuple[int, float]] = ()
    known_since: int = 1

    @property
    def knows_learning_rates(self) -> bool:
        """Whether the rates of the last steps are known: recorded, or the same from the beginning to the end."""
        return bool(self.learning_rates) or all(
            group["lr"] == group.get("initial_lr", group["lr"]) for group in self.groups
        )

    def rates_before(self, step: int, n: int) -> Tensor:
        """(n,) learning rates of a step and the ones before it, float64; between records by a straight line."""
        if not self.learning_rates:
            return torch.full((n,), float(self.groups[0].get("initial_lr", self.groups[0]["lr"])), dtype=torch.float64)
        steps, rates = zip(*self.learning_rates, strict=True)
        return torch.from_numpy(np.interp(step - np.arange(n), steps, rates))


class Drift(NamedTuple):
    """How far momentum alone carried the parameters of some features since they last had a gradient.

    Attributes:
        moved: from a parameter's name to what was added to it, in the layout of ``contests.feature_parameters``.
        steps: (n,) silent steps, 0 where nothing is known.
        is_traced: (n,) bool; not where the feature never had a gradient, its moments have decayed to nothing or do not
            fit the silence, or the learning rate of one of those steps is not known.
    """

    moved: dict[str, Tensor]
    steps: Tensor
    is_traced: Tensor


class _Moments(NamedTuple):
    """Adam's moments of some features in one parameter, and what it steps with.

    Attributes:
        first, second: moments, float64, as they lie in the parameter.
        feature_dim: dimension along which the features lie.
        step: steps that Adam has counted.
        group: of the parameter.
    """

    first: Tensor
    second: Tensor
    feature_dim: int
    step: float
    group: AdamGroup

    def ratios(self) -> Tensor:
        """(n,) largest |m| / sqrt(v) of each feature."""
        ratios = (self.first.abs() / self.second.sqrt().clamp(min=1e-30)).movedim(self.feature_dim, 0)
        return ratios if ratios.ndim == 1 else ratios.flatten(1).amax(dim=1)

    def moved(self, steps: Tensor, state: OptimizerState) -> Tensor:
        """What the last (n,) ``steps`` without a gradient added to the parameter, float32."""
        beta1, beta2 = self.group["betas"]
        factor = _summed_steps(steps, self.step, self.group["betas"], state)
        factor = factor.reshape([-1 if i == self.feature_dim else 1 for i in range(self.first.ndim)])
        last = self.first / (1 - beta1**self.step) / ((self.second / (1 - beta2**self.step)).sqrt() + self.group["eps"])
        return (-last * factor).float()


def load_optimizer_state(source: str | Path | Mapping[str, Any]) -> OptimizerState:
    """A SAELens checkpoint folder, its ``trainer_state.pt``, what is in it, or an optimizer's ``state_dict()``.

    Nothing in the file is executed: only tensors and plain values are read.

    Raises:
        ValueError: for anything else, damaged files, and moments that are not finite.
    """
    name, recorded = "optimizer_state", list[tuple[int, float]]()
    if isinstance(source, str | Path):
        path = Path(source)
        path = path / TRAINER_STATE if path.is_dir() else path
        name = f"optimizer_state={str(source)!r}"
        if not path.is_file():
            raise ValueError(
                f"{name} holds no {TRAINER_STATE}: give the folder of a SAELens checkpoint "
                "(a finished SAE has no optimizer state)"
            )
        recorded = _recorded_rates(path.parent)
        source = _loaded(path, name)
    optimizer = source.get("optimizer", source) if isinstance(source, Mapping) else None
    if not isinstance(source, Mapping) or not isinstance(optimizer, Mapping) or not optimizer.keys() >= _KEYS:
        what = f"with keys {sorted(map(str, source))}" if isinstance(source, Mapping) else f"of {type(source)}"
        raise ValueError(
            f"{name} {what} is not the state of an optimizer: give "
            "optimizer.state_dict(), or the folder of a SAELens checkpoint"
        )
    _check_adam(optimizer, name)
    now, n_steps = float(optimizer["param_groups"][0]["lr"]), _steps_taken(optimizer)
    learning_rates = sorted((step, lr) for step, lr in recorded if step <= n_steps)
    known_since = learning_rates[0][0] if learning_rates else _constant_since(source.get("lr_scheduler"), n_steps)
    if learning_rates:
        learning_rates.append((n_steps + 1, now))  # the schedule has moved on to the step that would come next
    return OptimizerState(
        optimizer["state"],
        optimizer["param_groups"],
        source.get("n_forward_passes_since_fired"),
        Firings.of_state(source, n_steps),
        learning_rates,
        known_since,
    )


def _loaded(path: Path, name: str) -> Any:
    if (path.parent / MANIFEST).exists() and (broken := damage(path.parent)):
        raise ValueError(f"{name} is damaged ({broken}): give the folder of a whole checkpoint")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes torch raise nearly anything
        said = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise ValueError(
            f"{name}: {path} is damaged, or holds more than tensors and plain values ({said}): give the folder of a "
            "whole checkpoint"
        ) from None


def _check_adam(optimizer: Mapping[str, Any], name: str) -> None:
    """Raise ValueError for what is not the state of an Adam, or not finite."""
    moments, groups = optimizer["state"], optimizer["param_groups"]
    is_adam = (
        isinstance(moments, Mapping)
        and isinstance(groups, list)
        and len(groups) > 0
        and all(isinstance(group, Mapping) and group.keys() >= {"params", "lr", "betas", "eps"} for group in groups)
        and all(isinstance(own, Mapping) and own.keys() >= {"step", *_MOMENTS} for own in moments.values())
        and all(isinstance(own[key], Tensor) for own in moments.values() for key in _MOMENTS)
        and all(0 <= float(torch.as_tensor(own["step"]).max()) < math.inf for own in moments.values())
        and all(_is_rate(beta) and beta < 1 for group in groups for beta in group["betas"])
        and all(len(group["betas"]) == 2 and _is_rate(group["lr"]) and _is_rate(group["eps"]) for group in groups)
    )
    if not is_adam:
        raise ValueError(f"{name} is not the state of Adam or SparseAdam, whose moments an autopsy reads")
    for number, own in moments.items():
        if not all(bool(own[key].isfinite().all()) for key in _MOMENTS):
            raise ValueError(f"{name}: moments of parameter {number} are NaN or infinite: give an earlier checkpoint")


def _is_rate(value: object) -> bool:
    return isinstance(value, float | int | Tensor) and bool(0 <= value < math.inf)


def _steps_taken(optimizer: Mapping[str, Any]) -> int:
    return max((int(torch.as_tensor(own["step"]).max()) for own in optimizer["state"].values()), default=0)


def _constant_since(scheduler: object, n_steps: int) -> int:
    """The first step of the present part of a schedule of SAELens's; without one, the first of all."""
    milestones = scheduler.get("_milestones", ()) if isinstance(scheduler, Mapping) else ()
    return 1 + max((int(milestone) for milestone in milestones if milestone <= n_steps), default=0)


def _recorded_rates(folder: Path) -> list[tuple[int, float]]:
    path = folder / TRAINING_HISTORY
    if not path.exists():
        return []
    try:
        return [(int(record["step"]), float(record["lr"])) for record in read_history(path)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"the training history {path} cannot be read ({error!r}): mend it, or remove it to do without its "
            "learning rates"
        ) from None


def silent_drift(sae: SAE, state: OptimizerState, features: Tensor) -> Drift:
    """Trace the moments of silent features back to their last gradient, and add up the steps in between.

    Adam moves a parameter by -lr m / (sqrt(v) + eps), gradient or not. Without one m and v only decay, so that the
    steps before are known from the moments now: s steps ago m was beta1**-s times larger, v beta2**-s. Their sum over
    the silent steps is what SparseAdam would not have moved (arXiv 2508.16929, stale momentum).

    The learning rates are those that the training history recorded; without one, a schedule that has changed them
    leaves nothing to be traced. The number of silent steps is SAELens's own count; where only the optimizer's state is
    given, it is read from the moments, which a gradient after long silence leaves at
    |m| / sqrt(v) = (1 - beta1) / sqrt(1 - beta2). Moments larger than such a silence can leave tell of a gradient in
    between, as an auxiliary loss gives: what holds them counts as not moved.

    Args:
        sae: the SAE whose ``named_parameters()`` the optimizer holds.
        state: of its optimizer.
        features: (n,) indices.

    Raises:
        ValueError: for the state of other parameters.
    """
    moments = _feature_moments(sae, state, features)
    direction = moments.get("W_enc") or moments.get("W_dec") or next(iter(moments.values()))
    group = direction.group
    ratio = torch.stack([one.ratios() for one in moments.values()]).amax(dim=0)
    if state.silent_steps is None:
        steps = _silent_steps(ratio, group["betas"])
    else:
        steps = state.silent_steps.to(features.device)[features].long()
    can_be_traced = "row_dim" not in group and state.knows_learning_rates  # SparseAdam moves no silent row
    is_traced = (ratio > 0) & (steps > 0) & (steps <= _LONGEST_MEMORY) & can_be_traced
    is_traced &= direction.step - steps + 1 >= state.known_since
    is_counted = state.silent_steps is not None
    if is_counted:
        is_traced &= direction.ratios() <= _largest_ratio(steps, group["betas"])
    steps = torch.where(is_traced, steps, 0)
    moved = {}
    for name, one in moments.items():
        fits = one.ratios() <= _largest_ratio(steps, one.group["betas"])
        moved[name] = one.moved(torch.where(fits, steps, 0) if is_counted else steps, state)
    return Drift(moved, steps, is_traced)


def _feature_moments(sae: SAE, state: OptimizerState, features: Tensor) -> dict[str, _Moments]:
    """Moments of some features in each parameter that holds features. Raises ValueError where they do not fit."""
    names = _parameter_names(sae, state)
    groups = {i: group for group in state.groups for i in group["params"]}
    if len(groups) != len(names):
        raise ValueError(f"the optimizer's state is of {len(groups)} parameters, this SAE has {len(names)}: {names}")
    moments: dict[str, _Moments] = {}
    for (index, group), name in zip(groups.items(), names, strict=True):
        own = state.moments.get(index)
        parameter = sae.get_parameter(name)
        if own is None or sae.cfg.d_sae not in parameter.shape or name == "b_dec":
            continue
        if own["exp_avg"].shape != parameter.shape:
            raise ValueError(
                f"the optimizer's moments of {name} are {tuple(own['exp_avg'].shape)}, the parameter is "
                f"{tuple(parameter.shape)}: give the state that belongs to this SAE"
            )
        at = (slice(None), features) if name == "W_enc" else (features,)
        first, second = (own[key].to(parameter.device)[at].double() for key in ("exp_avg", "exp_avg_sq"))
        moments[name] = _Moments(first, second, len(at) - 1, float(torch.as_tensor(own["step"]).max()), group)
    if not moments:
        raise ValueError("the optimizer's state holds no moments of this SAE's features: it has taken no step yet")
    return moments


def _parameter_names(sae: SAE, state: OptimizerState) -> list[str]:
    """Names in the order in which the optimizer numbers its parameters.

    That of ``named_parameters()``, but for the groups that a trainer makes for SparseAdam, by where features lie.
    """
    names = {parameter: name for name, parameter in sae.named_parameters() if parameter.requires_grad}
    own = feature_row_groups(sae)
    shapes = [(group["row_dim"], len(group["params"])) for group in own]
    of_state = [(group.get("row_dim"), len(group["params"])) for group in state.groups]
    if any("row_dim" in group for group in state.groups) and shapes == of_state:
        return [names[parameter] for group in own for parameter in group["params"]]
    return list(names.values())


def _silent_steps(ratio: Tensor, betas: tuple[float, float]) -> Tensor:
    """Silent steps since |m| / sqrt(v) was what one gradient after silence makes it."""
    beta1, beta2 = betas
    if beta1 == 0:
        return torch.zeros_like(ratio, dtype=torch.long)
    first = (1 - beta1) / math.sqrt(1 - beta2)
    steps = (first / ratio.clamp(min=1e-300)).log() / math.log(math.sqrt(beta2) / beta1)
    return steps.round().clamp(min=0, max=2**31).long()


def _largest_ratio(steps: Tensor, betas: tuple[float, float]) -> Tensor:
    """(n,) the largest |m| / sqrt(v) that any gradients can leave after so many steps without one, float64.

    By the inequality of Cauchy and Schwarz, with m and v as sums over gradients.
    """
    beta1, beta2 = betas
    if beta1**2 >= beta2:
        return torch.full_like(steps, math.inf, dtype=torch.float64)
    at_once = (1 - beta1) / math.sqrt(1 - beta2) / math.sqrt(1 - beta1**2 / beta2)
    return _ROUNDING * at_once * (beta1 / math.sqrt(beta2)) ** steps.double()


def _summed_steps(steps: Tensor, step: float, betas: tuple[float, float], state: OptimizerState) -> Tensor:
    """(n,) all silent steps together, each times its learning rate, in units of the last; 0 for no silent step."""
    beta1, beta2 = betas
    longest = int(steps.max()) if len(steps) else 0
    if beta1 == 0 or longest == 0:
        return torch.zeros_like(steps, dtype=torch.float64)
    before = torch.arange(min(longest, max(1, int(step) - 1)), dtype=torch.float64, device=steps.device)
    correction = (1 - beta2 ** (step - before)).sqrt() / (1 - beta1 ** (step - before))
    sizes = (math.sqrt(beta2) / beta1) ** before * correction / correction[0]
    sizes = sizes * state.rates_before(int(step), len(sizes)).to(sizes.device)
    total = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
    return total[steps.clamp(max=len(sizes))]
