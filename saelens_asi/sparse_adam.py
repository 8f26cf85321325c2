"""SparseAdam: Adam for parameters of which a step moves only some rows. The update is a pure function of tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple, Protocol, TypeAlias, TypedDict, cast

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT, StateDict

from saelens_asi.sparse import kernels
from saelens_asi.sparse.kernels import kernels_take
from saelens_asi.sparse.rows import RowGradient, update_row_norms_

# Numbers of one tensor that are updated at once: with those of parameter, moments and gradient they stay in cache.
_CHUNK_ENTRIES = 2**20

# From this share of active rows on, a stretch of rows is updated where it lies and its silent rows are put back.
_IN_PLACE_SHARE = 0.75


Step: TypeAlias = Float[Tensor, " ..."] | float


class AdamSettings(NamedTuple):
    """Learning rate, decay rates of the two moments, what is added to the root of the second, and what divides the
    gradient first (a tensor, as of clipping); None for 1.
    """

    lr: float | Float[Tensor, ""]
    beta1: float
    beta2: float
    eps: float
    grad_divisor: Float[Tensor, ""] | None = None


def adam_update_(
    param: Float[Tensor, " *shape"],
    grad: Float[Tensor, " *shape"],
    exp_avg: Float[Tensor, " *shape"],
    exp_avg_sq: Float[Tensor, " *shape"],
    step: Step,
    settings: AdamSettings,
) -> None:
    """One Adam step in place (arXiv 1412.6980, algorithm 1); ``step``, the steps taken, broadcasts to the shape.

    The moments are computed in their own dtype, which may be wider than the parameter's.
    """
    lr, beta1, beta2, eps, divisor = settings
    if not isinstance(step, Tensor) and _can_be_fused(param, grad, exp_avg, exp_avg_sq):
        torch._fused_adam_(
            [param],
            [grad],
            [exp_avg],
            [exp_avg_sq],
            [],
            [torch.tensor(step, dtype=torch.float32, device=param.device)],
            lr=float(lr),
            beta1=beta1,
            beta2=beta2,
            weight_decay=0.0,
            eps=eps,
            amsgrad=False,
            maximize=False,
            grad_scale=divisor,
        )
        return
    grad = grad.to(exp_avg.dtype) if divisor is None else grad.to(exp_avg.dtype) / divisor
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    denominator = (exp_avg_sq / _bias_correction(beta2, step)).sqrt_().add_(eps)
    update = (exp_avg / _bias_correction(beta1, step)).div_(denominator).mul_(lr)
    param.sub_(update.to(param.dtype))


def adam_update_rows_(
    tensors: Sequence[Float[Tensor, " n *row"]],
    rows: Int64[Tensor, " n_rows"],
    grad: Float[Tensor, " n_rows *row"],
    step: Float[Tensor, " n_rows"] | float,
    settings: AdamSettings,
    norms: Float[Tensor, " n"] | None = None,
) -> None:
    """``adam_update_`` of some rows; all others keep their bits.

    Args:
        tensors: parameter, first and second moment; fastest where a row is contiguous.
        rows: ascending, without repetition.
        grad: gradient of those rows.
        step: steps taken, by all rows or by each.
        settings: of the update.
        norms: Euclidean norms of the rows of a parameter (n, d), of which those of ``rows`` are renewed.
    """
    if kernels_take(*tensors, grad, *([] if norms is None else [norms])):
        _update_compiled_(tensors, rows, grad, step, settings, norms)
        return
    _update_by_torch_(tensors, rows, grad, step, settings)
    if norms is not None:
        update_row_norms_(norms, tensors[0], rows)


def _update_by_torch_(
    tensors: Sequence[Float[Tensor, " n *row"]],
    rows: Int64[Tensor, " n_rows"],
    grad: Float[Tensor, " n_rows *row"],
    step: Float[Tensor, " n_rows"] | float,
    settings: AdamSettings,
) -> None:
    n, row_size = tensors[0].shape[0], max(1, grad[:1].numel())
    chunk = max(1, _CHUNK_ENTRIES // row_size)
    if isinstance(step, Tensor):
        step = step.view(-1, *[1] * (grad.ndim - 1))
    if isinstance(step, Tensor) or rows.numel() < _IN_PLACE_SHARE * n or rows.device.type != "cpu":
        for lo in range(0, rows.numel(), chunk):
            part = slice(lo, lo + chunk)
            _update_gathered_(
                tensors, rows[part], grad[part], step[part] if isinstance(step, Tensor) else step, settings
            )
        return
    firsts = range(0, n, chunk)
    bounds = [*torch.searchsorted(rows, torch.tensor(firsts)).tolist(), rows.numel()]
    for first, lo, hi in zip(firsts, bounds, bounds[1:], strict=False):
        stretch = [tensor[first : first + chunk] for tensor in tensors]
        _update_stretch_(stretch, rows[lo:hi] - first, grad[lo:hi], step, settings)


def _update_compiled_(
    tensors: Sequence[Float[Tensor, " n *row"]],
    rows: Int64[Tensor, " n_rows"],
    grad: Float[Tensor, " n_rows *row"],
    step: Float[Tensor, " n_rows"] | float,
    settings: AdamSettings,
    norms: Float[Tensor, " n"] | None,
) -> None:
    """Every number of the rows is read and written once."""
    lr, beta1, beta2, eps, divisor = settings
    step_size = torch.as_tensor(lr / _bias_correction(beta1, step), dtype=grad.dtype)
    root_scale = torch.as_tensor(_bias_correction(beta2, step), dtype=grad.dtype).rsqrt()
    param, exp_avg, exp_avg_sq, grad = (t.view(t.shape[0], math.prod(t.shape[1:])) for t in (*tensors, grad))
    kernels.adam_rows(
        param,
        exp_avg,
        exp_avg_sq,
        grad,
        rows,
        norms,
        step_size=step_size.expand(rows.numel()).contiguous(),
        root_scale=root_scale.expand(rows.numel()).contiguous(),
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        grad_scale=1.0 if divisor is None else 1 / float(divisor),
    )


def _update_gathered_(
    tensors: Sequence[Float[Tensor, " n *row"]],
    rows: Int64[Tensor, " n_rows"],
    grad: Float[Tensor, " n_rows *row"],
    step: Step,
    settings: AdamSettings,
) -> None:
    param, exp_avg, exp_avg_sq = gathered = [tensor.index_select(0, rows) for tensor in tensors]
    adam_update_(param, grad, exp_avg, exp_avg_sq, step, settings)
    for tensor, values in zip(tensors, gathered, strict=True):
        tensor.index_copy_(0, rows, values)


def _update_stretch_(
    tensors: Sequence[Float[Tensor, " n *row"]],
    rows: Int64[Tensor, " n_rows"],
    grad: Float[Tensor, " n_rows *row"],
    step: float,
    settings: AdamSettings,
) -> None:
    """Update all rows where they lie, and put back those that are not among ``rows``."""
    is_silent = torch.ones(tensors[0].shape[0], dtype=torch.bool).index_fill_(0, rows, False)
    silent = is_silent.nonzero().squeeze(1)
    before = [tensor.index_select(0, silent) for tensor in tensors]
    if silent.numel() > 0:
        grad = torch.empty_like(tensors[0], dtype=grad.dtype).index_copy_(0, rows, grad)  # the rest is put back
    adam_update_(tensors[0], grad, tensors[1], tensors[2], step, settings)
    for tensor, values in zip(tensors, before, strict=True):
        tensor.index_copy_(0, silent, values)


def _can_be_fused(*tensors: Tensor) -> bool:
    """Whether torch's fused kernel, which reads memory in order, takes these."""
    same_dtype = len({tensor.dtype for tensor in tensors}) == 1
    return same_dtype and tensors[0].device.type in ("cpu", "cuda") and all(t.is_contiguous() for t in tensors)


def _bias_correction(beta: float, step: Step) -> Step:
    """1 - beta^step, without the cancellation that costs a float32 ``step`` three digits where beta is near 1."""
    if isinstance(step, Tensor) and beta > 0:
        return -torch.expm1(step * math.log(beta))
    return 1 - beta**step


BiasCorrection = Literal["global", "per_row"]
_BIAS_CORRECTIONS = ("global", "per_row")


class _Group(TypedDict):
    """A parameter group of ``SparseAdam``, with its options."""

    params: list[Tensor]
    lr: float | Tensor
    betas: tuple[float, float]
    eps: float
    bias_correction: BiasCorrection
    row_dim: int | None


class RowUpdate(Protocol):
    """Makes the gradients of some parameters and moves them in one go, as a fused kernel does."""

    @property
    def params(self) -> Sequence[Tensor]:
        """What it moves: parameters of the optimizer, each in one update of a step at most."""

    def apply_(
        self, moments: Sequence[tuple[Tensor, Tensor]], settings: Sequence[AdamSettings], steps: Sequence[float]
    ) -> None:
        """Move rows of ``params`` and of their moments in place; all other rows keep their bits.

        Args:
            moments: ``exp_avg`` and ``exp_avg_sq`` of each parameter, in its shape and layout.
            settings: of each parameter's group.
            steps: that the optimizer has taken with each parameter, this one included.
        """


# Options of a group that a RowUpdate serves.
_OPTIONS_OF_UPDATES = {"bias_correction": "global"}


class SparseAdam(Optimizer):
    """Adam in which a row without gradient in a step keeps its parameters and both moments untouched.

    The semantics are those of ``torch.optim.SparseAdam`` (used by arXiv 2508.16929, section on stale momentum):
    a feature that is silent for a thousand steps comes back with the moments it had, instead of moments that
    decayed or drifted. Unlike it, this optimizer also takes dense gradients and ordinary dense parameters.

    What counts as a row is set by ``row_dim`` of a parameter group:

    - ``row_dim=0`` or ``1``: rows lie along that dimension; a row is updated when any entry of its gradient is
      not zero. For an SAE, ``W_dec`` (d_sae, d_in) has 0 and ``W_enc`` (d_in, d_sae) has 1.
    - ``row_dim=None`` (default): with a dense gradient every entry is updated, as in ``torch.optim.Adam``.
    - A sparse (COO) gradient, as from ``nn.Embedding(sparse=True)``, names its own rows along dimension 0.
    - A ``RowGradient`` in ``row_gradients[param]`` stands in for ``param.grad``, with rows along ``row_dim``: no
      tensor of the parameter's size need exist. It is forgotten by ``zero_grad``, as gradients are.
      ``row_norms[param]`` (n_rows,), where given beside it, are norms of the rows that the step is to keep up to date.
    - A ``RowUpdate`` in ``row_updates`` moves its parameters itself, in place of their gradients: the optimizer keeps
      their moments and counts their steps. It is forgotten by ``zero_grad`` too.

    Bias correction, ``bias_correction``:

    - ``"global"``: by the number of steps the optimizer took with this parameter, as torch does. A row that first
      fires at step 1001 then moves 2.5 times the learning rate (up to 3.16 in the limit).
    - ``"per_row"``: by the number of steps in which this row was updated, kept as one integer a row; its first
      update is an ordinary first Adam step, whenever it comes.

    When every row is active in every step, both equal ``torch.optim.Adam``. Moments of float16 and bfloat16
    parameters are kept in float32.

    Args:
        params: tensors, or parameter groups with the options below.
        lr: learning rate.
        betas: decay rates of the two moments, each in [0, 1).
        eps: added to the root of the second moment.
        bias_correction: ``"global"`` (the default: lower error in every pair of runs that were compared on a real
            model, benchmarks/results/ablation.md) or ``"per_row"``.
        row_dim: see above.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        bias_correction: BiasCorrection = "global",
        row_dim: int | None = None,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "bias_correction": bias_correction, "row_dim": row_dim}
        self.row_gradients: dict[Tensor, RowGradient] = {}
        self.row_norms: dict[Tensor, Tensor] = {}
        self.row_updates: list[RowUpdate] = []
        super().__init__(params, defaults)

    def __setstate__(self, state: StateDict) -> None:
        super().__setstate__(state)
        self.row_gradients, self.row_norms, self.row_updates = {}, {}, []

    def add_param_group(self, param_group: StateDict) -> None:
        super().add_param_group(param_group)
        try:
            _check_group(cast("_Group", self.param_groups[-1]))
        except ValueError:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        moved = self._apply_updates()
        for group in self.param_groups:
            for param in group["params"]:
                gradient = self.row_gradients.get(param, param.grad)
                if gradient is not None and param not in moved:
                    self._step_param(param, gradient, cast("_Group", group))
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        self.row_gradients.clear()
        self.row_norms.clear()
        self.row_updates.clear()

    def _apply_updates(self) -> set[Tensor]:
        """Call every ``RowUpdate``; returns the parameters that are moved by it."""
        if not self.row_updates:
            return set()
        groups = {param: cast("_Group", group) for group in self.param_groups for param in group["params"]}
        claimed = [param for update in self.row_updates for param in update.params]
        _check_claimed(claimed, groups)
        for update in self.row_updates:
            states = [self._state_of(p, groups[p]["row_dim"], groups[p]["bias_correction"]) for p in update.params]
            for state in states:
                state["step"] += 1
            update.apply_(
                [(state["exp_avg"], state["exp_avg_sq"]) for state in states],
                [_settings_of(groups[param]) for param in update.params],
                [float(state["step"]) for state in states],
            )
        return set(claimed)

    def _step_param(self, param: Tensor, gradient: Tensor | RowGradient, group: _Group) -> None:
        row_dim = 0 if isinstance(gradient, Tensor) and gradient.is_sparse else group["row_dim"]
        state = self._state_of(param, row_dim, group["bias_correction"])
        state["step"] += 1
        step = float(state["step"])
        settings = _settings_of(group)
        tensors = (param, state["exp_avg"], state["exp_avg_sq"])
        if row_dim is None:
            if isinstance(gradient, RowGradient):
                raise ValueError("row_dim=None: set row_dim in the group of a parameter that has row_gradients")
            adam_update_(param, gradient, *tensors[1:], step, settings)
            return
        rows, values, divisor = gradient if isinstance(gradient, RowGradient) else _active_rows(gradient, row_dim)
        settings = settings._replace(grad_divisor=divisor)
        row_step: Tensor | None = None
        if "row_step" in state:
            state["row_step"][rows] += 1
            row_step = state["row_step"][rows].to(state["exp_avg"].dtype)
        by_row = [tensor.movedim(row_dim, 0) for tensor in tensors]
        steps = step if row_step is None else row_step
        adam_update_rows_(by_row, rows, values, steps, settings, self.row_norms.get(param))

    def _state_of(self, param: Tensor, row_dim: int | None, bias_correction: str) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[param]
        if not state:
            dtype = torch.promote_types(param.dtype, torch.float32)
            state["step"] = torch.zeros((), dtype=torch.float64)
            state["exp_avg"] = torch.zeros_like(param, dtype=dtype)
            state["exp_avg_sq"] = torch.zeros_like(param, dtype=dtype)
        if bias_correction == "global":
            state.pop("row_step", None)  # after a switch mid-run, rows are no longer counted
        elif row_dim is not None and "row_step" not in state:
            # Switched on mid-run: rows that were updated before are past their first step.
            steps = int(state["step"])
            seen = state["exp_avg_sq"].movedim(row_dim, 0).reshape(param.shape[row_dim], -1).any(dim=1)
            state["row_step"] = seen.to(torch.int32) * steps
        return state

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Restore a state that a SparseAdam wrote. Raises ValueError for the state of another optimizer."""
        for group in state_dict.get("param_groups", ()):
            missing = {"row_dim", "bias_correction"} - group.keys()
            if missing:
                raise ValueError(
                    "this optimizer state was not written by saelens_asi.SparseAdam (its parameter groups lack "
                    f"{sorted(missing)}): resume with the optimizer that wrote it (optimizer='adam' for stock SAELens "
                    "checkpoints), or start a new run from the weights alone"
                )
        super().load_state_dict(state_dict)
        # torch casts floating state to the parameter's dtype; the moments of low-precision parameters are wider.
        params = [param for group in self.param_groups for param in group["params"]]
        saved_ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        for index, param in zip(saved_ids, params, strict=True):
            for key, value in state_dict["state"].get(index, {}).items():
                if isinstance(value, Tensor):
                    device = value.device if key == "step" else param.device
                    self.state[param][key] = value.detach().clone().to(device)


def _active_rows(grad: Tensor, row_dim: int) -> RowGradient:
    """The rows of a whole or a COO gradient that are not zero."""
    if grad.is_sparse:
        if grad.sparse_dim() != 1:
            raise ValueError(
                "a sparse gradient must be sparse along its first dimension only (rows), got "
                f"sparse_dim={grad.sparse_dim()}"
            )
        grad = grad.coalesce()
        return RowGradient(grad.indices()[0], grad.values())
    other_dims = [dim for dim in range(grad.ndim) if dim != row_dim]
    nonzero = grad != 0
    active = nonzero.any(dim=other_dims) if other_dims else nonzero
    rows, by_row = active.nonzero().squeeze(1), grad.movedim(row_dim, 0)
    return RowGradient(rows, by_row if rows.numel() == by_row.shape[0] else by_row.index_select(0, rows))


def _settings_of(group: _Group) -> AdamSettings:
    return AdamSettings(group["lr"], *group["betas"], group["eps"])


def _check_claimed(claimed: Sequence[Tensor], groups: Mapping[Tensor, _Group]) -> None:
    """What the updates of a step move: parameters of this optimizer, once each, of groups with options they serve."""
    for i, param in enumerate(claimed):
        if param not in groups or any(param is other for other in claimed[:i]):
            problem = "is in two of row_updates" if param in groups else "in row_updates is no parameter of the groups"
            raise ValueError(f"a tensor of shape {tuple(param.shape)} {problem}: give each parameter to one of them")
        for option, served in _OPTIONS_OF_UPDATES.items():
            if groups[param][option] != served:  # type: ignore[literal-required]
                raise ValueError(
                    f"{option}={groups[param][option]!r} is not served by row_updates: "  # type: ignore[literal-required]
                    f"set {option}={served!r}, or give row_gradients"
                )


def _check_group(group: _Group) -> None:
    lr, betas, eps = group["lr"], group["betas"], group["eps"]
    if not lr >= 0:
        raise ValueError(f"lr={lr} must not be negative")
    if not eps >= 0:
        raise ValueError(f"eps={eps} must not be negative")
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas={betas} must be two numbers in [0, 1)")
    if group["bias_correction"] not in _BIAS_CORRECTIONS:
        raise ValueError(f"bias_correction={group['bias_correction']!r} must be one of {_BIAS_CORRECTIONS}")
    row_dim = group["row_dim"]
    if row_dim is None:
        return
    for param in group["params"]:
        if not 0 <= row_dim < param.ndim:
            raise ValueError(f"row_dim={row_dim} does not exist in a parameter of shape {tuple(param.shape)}")
