"""What an SAE of SAELens carries beside its weights: statistics, replaced methods, hooks. Knows no SAELens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypedDict

from torch import Tensor, nn

from saelens_asi.sparse.shards import Shard

# Modes of normalize_activations that the SAE applies and undoes itself, with statistics of each token.
NORMALIZED_INSIDE = ("constant_norm_rescale", "layer_norm")

# Modes with one scale for all tokens, which SAELens applies in front of the SAE and folds into its weights at the end.
SCALED_OUTSIDE = ("expected_average_only_in", "covariance_whitening")

# run_time_activation_norm_fn_in leaves these on the SAE, and run_time_activation_norm_fn_out uses them up.
_STATISTICS = ("ln_mu", "ln_std", "x_norm_coeff")

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

# Dimensions along which features lie; of other tensors it is the one that has their size.
_FEATURE_DIMS = {"W_enc": 1, "W_dec": 0, "b_dec": None}

# From classes to their own methods by name; None for one that a class does not have.
StockMethods = Mapping[type, Mapping[str, object]]


def shard_of(sae: object) -> Shard:
    """Which features of an SAE lie in this process: all, unless it is spread over several."""
    return getattr(sae, "shard", None) or Shard.whole(sae.cfg.d_sae)  # type: ignore[attr-defined]


def feature_dim(name: str, tensor: Tensor, n_features: int) -> int | None:
    """Along which dimension the features lie of an SAE's tensor with SAELens's name; None for one without, or with two.

    SAELens names the large ones: ``W_dec`` (d_sae, d_in), ``W_enc`` (d_in, d_sae), ``b_dec`` (d_in,).
    """
    if name in _FEATURE_DIMS:
        return _FEATURE_DIMS[name]
    dims = [dim for dim, size in enumerate(tensor.shape) if size == n_features]
    return dims[0] if len(dims) == 1 else None


class RowGroup(TypedDict):
    """A parameter group of ``SparseAdam``: ``row_dim`` is the dimension along which features lie, None for none."""

    params: list[nn.Parameter]
    row_dim: int | None


def feature_row_groups(sae: nn.Module) -> list[RowGroup]:
    """Parameter groups for ``SparseAdam``: every parameter with the dimension along which its features lie.

    One without such a dimension (see ``feature_dim``) is updated as a whole.
    """
    d_sae: int = sae.cfg.d_sae  # type: ignore[assignment, union-attr]
    by_dim: dict[int | None, list[nn.Parameter]] = {}
    for name, param in sae.named_parameters():
        by_dim.setdefault(feature_dim(name, param, d_sae), []).append(param)
    return [{"params": params, "row_dim": row_dim} for row_dim, params in by_dim.items()]


def take_statistics(sae: object) -> dict[str, Tensor]:
    """The per-token statistics of the last encoding, which stay on the SAE; for ``give_statistics``."""
    return {name: vars(sae)[name] for name in _STATISTICS if name in vars(sae)}


def give_statistics(sae: object, statistics: Mapping[str, Tensor]) -> None:
    """Set the statistics that the next decoding uses up: one encoding is decoded twice this way."""
    vars(sae).update(statistics)


@contextmanager
def statistics_forgotten(sae: object) -> Iterator[None]:
    """For an encoding that no decoding follows: what it leaves on the SAE is removed.

    An SAE of somebody else's class may leave attributes of other names: they go too where they are new.
    """
    before = set(vars(sae))
    yield
    for name in (set(vars(sae)) - before).union(_STATISTICS):
        vars(sae).pop(name, None)


def stock_methods(classes: Iterable[type], names: Sequence[str]) -> StockMethods:
    """The methods of SAELens's classes as they are now, before anybody replaces one."""
    return {cls: {name: getattr(cls, name, None) for name in names} for cls in classes}


def replaced_methods(sae: nn.Module, stock: StockMethods) -> list[str]:
    """Names of methods that are not the stock ones, on the object or on its class (which ``stock`` must know)."""
    own = stock[type(sae)]
    return [name for name in own if name in vars(sae) or getattr(type(sae), name, None) is not own[name]]


def has_hooks(module: nn.Module, backward: bool = True) -> bool:
    """Whether hooks are attached to a module itself; ``backward``: to its backward pass too."""
    return any(getattr(module, name) for name in (_HOOKS if backward else _HOOKS[:2]))
