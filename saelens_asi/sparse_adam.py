"""SparseAdam: Adam for parameters of which a step moves only some rows. The update is a pure function of tensors."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple, Protocol, TypeAlias, TypedDict, cast, get_args

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

# On an accelerator, where each part costs launches, and temporary memory of its size.
_LAUNCH_ENTRIES = 2**25

# From this share of active rows on, a stretch of rows is updated where it lies and its silent rows are put back.
_IN_PLACE_SHARE = 0.75


Step: TypeAlias = Float[Tensor, " ..."] | float


class AdamSettings(NamedTuple):
    """Of an update.

    Attributes:
        lr: learning rate.
        beta1: decay rate of the first moment.
        beta2: of the second.
        eps: what is added to the root of the bias-corrected second moment; by all rows or by each.
        grad_divisor: what divides the gradient first (a tensor, as of clipping); None for 1.
    """

    lr: float | Float[Tensor, ""]
    beta1: float
    beta2: float
    eps: Step
    grad_divisor: Float[Tensor, ""] | None = None


class MomentShares(NamedTuple):
    """What is left of the two moments of each row before it is updated."""

    exp_avg: Float[Tensor, " n_rows"]
    exp_avg_sq: Float[Tensor, " n_rows"]


def adam_update_(
    param: Float[Tensor, " *shape"],
    grad: Float[Tensor, " *shape"],
    exp_avg: Float[Tensor, " *shape"],
    exp_avg_sq: Float[Tensor, " *shape"],
    step: Step,
    settings: AdamSettings,
) -> None:
    """One Adam step in place (arXiv 1412.6980, algorithm 1); ``step``, the steps taken, broadcasts to the shape.

    The moments are computed in their own dtype, which may be wider than the parameter's. The gradient stays as it is.
    """
    lr, beta1, beta2, eps, divisor = settings
    if not isinstance(step, Tensor) and not isinstance(eps, Tensor) and _can_be_fused(param, grad, exp_avg, exp_avg_sq):
        torch._fused_adam_(
            [param],
            [grad if divisor is None else grad / divisor],  # its own grad_scale would divide the caller's tensor
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
        )
        for tensor in (param, exp_avg, exp_avg_sq):  # which torch leaves to its callers
            torch.autograd.graph.increment_version(tensor)
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
    shares: MomentShares | None = None,
) -> None:
    """``adam_update_`` of some rows; all others keep their bits.

    Args:
        tensors: parameter, first and second moment; fastest where a row is contiguous.
        rows: ascending, without repetition.
        grad: gradient of those rows.
        step: steps taken, by all rows or by each.
        settings: of the update.
        norms: Euclidean norms of the rows of a parameter (n, d), of which those of ``rows`` are renewed.
        shares: what is left of the moments of ``rows``; None for all of them.

    Raises:
        ValueError: for rows that the parameter does not have (looked for on a CPU), or a gradient of another shape.
    """
    RowGradient(rows, grad).check(tensors[0].shape)
    _update_rows_(tensors, rows, grad, step, settings, norms, shares)


def _update_rows_(
    tensors: Sequence[Float[Tensor, " n *row"]],
    rows: Int64[Tensor, " n_rows"],
    grad: Float[Tensor, " n_rows *row"],
    step: Float[Tensor, " n_rows"] | float,
    settings: AdamSettings,
    norms: Float[Tensor, " n"] | None,
    shares: MomentShares | None,
) -> None:
    """See ``adam_update_rows_``, which has looked at the rows."""
    if kernels_take(*tensors, grad, *([] if norms is None else [norms])):
        _update_compiled_(tensors, rows, grad, step, settings, norms, shares)
        return
    _update_by_torch_(tensors, rows, grad, step, settings, shares)
    if norms is not None:
        update_row_norms_(norms, tensors[0], rows)


def _update_by_torch_(
    tensors: Sequence[Float[Tensor, " n *row"]],
    rows: Int64[Tensor, " n_rows"],
    grad: Float[Tensor, " n_rows *row"],
    step: Float[Tensor, " n_rows"] | float,
    settings: AdamSettings,
    shares: MomentShares | None,
) -> None:
    n, row_size = tensors[0].shape[0], max(1, grad[:1].numel())
    n_entries = _CHUNK_ENTRIES if rows.device.type == "cpu" else _LAUNCH_ENTRIES
    chunk = max(1, n_entries // row_size)
    is_alike = shares is None and not isinstance(step, Tensor) and not isinstance(settings.eps, Tensor)
    if is_alike and rows.numel() >= _IN_PLACE_SHARE * n and rows.device.type == "cpu":
        firsts = range(0, n, chunk)
        bounds = [*torch.searchsorted(rows, torch.tensor(firsts)).tolist(), rows.numel()]
        for first, lo, hi in zip(firsts, bounds, bounds[1:], strict=False):
            stretch = [tensor[first : first + chunk] for tensor in tensors]
            _update_stretch_(stretch, rows[lo:hi] - first, grad[lo:hi], float(step), settings)
        return

    def of_part(value: Step, part: slice) -> Step:
        return value[part].view(-1, *[1] * (grad.ndim - 1)) if isinstance(value, Tensor) else value

    for lo in range(0, rows.numel(), chunk):
        part = slice(lo, lo + chunk)
        own = settings._replace(eps=of_part(settings.eps, part))
        left = None if shares is None else [of_part(share, part) for share in shares]
        _update_gathered_(tensors, rows[part], grad[part], of_part(step, part), own, left)


def _update_compiled_(
    tensors: Sequence[Float[Tensor, " n *row"]],
    rows: Int64[Tensor, " n_rows"],
    grad: Float[Tensor, " n_rows *row"],
    step: Float[Tensor, " n_rows"] | float,
    settings: AdamSettings,
    norms: Float[Tensor, " n"] | None,
    shares: MomentShares | None,
) -> None:
    """Every number of the rows is read and written once."""
    lr, beta1, beta2, eps, divisor = settings

    def of_rows(value: Step) -> Tensor:
        return torch.as_tensor(value, dtype=grad.dtype).expand(rows.numel()).contiguous()

    left = (1.0, 1.0) if shares is None else shares
    param, exp_avg, exp_avg_sq, flat = (t.view(t.shape[0], math.prod(t.shape[1:])) for t in (*tensors, grad))
    kernels.adam_rows(
        param,
        exp_avg,
        exp_avg_sq,
        flat,
        rows,
        norms,
        step_size=of_rows(lr / _bias_correction(beta1, step)),
        root_scale=of_rows(torch.as_tensor(_bias_correction(beta2, step), dtype=grad.dtype).rsqrt()),
        eps=of_rows(eps),
        kept=(of_rows(beta1 * left[0]), of_rows(beta2 * left[1])),
        grad_shares=(1 - beta1, 1 - beta2),
        grad_scale=1.0 if divisor is None else 1 / float(divisor),
    )


def _update_gathered_(
    tensors: Sequence[Float[Tensor, " n *row"]],
    rows: Int64[Tensor, " n_rows"],
    grad: Float[Tensor, " n_rows *row"],
    step: Step,
    settings: AdamSettings,
    shares: Sequence[Step] | None,
) -> None:
    param, exp_avg, exp_avg_sq = gathered = [tensor.index_select(0, rows) for tensor in tensors]
    for moment, share in zip((exp_avg, exp_avg_sq), shares or (), strict=False):
        moment.mul_(share)
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
EpsPlacement = Literal["adam", "sparse_adam"]
SilentMoments = Literal["keep", "decay"]

# Options of a group with a choice, the first being the default: also that of a state that was saved without the option.
_CHOICES = {
    "bias_correction": get_args(BiasCorrection),
    "eps_placement": get_args(EpsPlacement),
    "silent_moments": get_args(SilentMoments),
}

# Those that a ``RowUpdate`` knows at their defaults alone.
_OF_ROW_UPDATES = ("bias_correction", "eps_placement")


class _Group(TypedDict):
    """A parameter group of ``SparseAdam``, with its options."""

    params: list[Tensor]
    lr: float | Tensor
    betas: tuple[float, float]
    eps: float
    bias_correction: BiasCorrection
    eps_placement: EpsPlacement
    silent_moments: SilentMoments
    row_dim: int | None


class RowUpdate(Protocol):
    """Makes the gradients of some parameters and moves them in one go, as a fused kernel does.

    Of groups with ``bias_correction="global"`` and ``eps_placement="adam"`` alone.
    """

    @property
    def params(self) -> Sequence[Tensor]:
        """What it moves: parameters of the optimizer, each in one update of a step at most."""

    def apply_(
        self,
        moments: Sequence[tuple[Tensor, Tensor]],
        settings: Sequence[AdamSettings],
        steps: Sequence[float],
        last_steps: Sequence[Tensor | None],
    ) -> None:
        """Move rows of ``params`` and of their moments in place; all other rows keep their bits.

        Args:
            moments: ``exp_avg`` and ``exp_avg_sq`` of each parameter, in its shape and layout.
            settings: of each parameter's group.
            steps: that the optimizer has taken with each parameter, this one included.
            last_steps: of each parameter whose silent rows have moments that decay, of which step the moments of each
                row are, (n_rows,) int32: to be made good, and brought up to this step, for the rows that move.
        """


class SparseAdam(Optimizer):
    """Adam in which a row without gradient in a step keeps its parameters and both moments untouched.

    The rows and moments that move are those of ``torch.optim.SparseAdam`` (used by arXiv 2508.16929, section on stale
    momentum): a feature that is silent for a thousand steps comes back with the moments it had, instead of moments that
    decayed or drifted. Unlike it, this optimizer also takes dense gradients and ordinary dense parameters, and adds
    ``eps`` where Adam does (see ``eps_placement``).

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

    Where ``eps`` is added, ``eps_placement``, in units of the gradient:

    - ``"adam"``: to the root of the bias-corrected second moment, as in ``torch.optim.Adam``.
    - ``"sparse_adam"``: to the root before its bias correction, as in ``torch.optim.SparseAdam``. The two differ where
      gradients are not far above ``eps``: after a step, 1e-8 is added to 0.032 times the gradient instead of to it.

    What becomes of the moments of a silent row, ``silent_moments``; its parameters stay as they are either way:

    - ``"keep"``: they keep their bits.
    - ``"decay"``: they decay by their beta each step, as with gradients of zero, which is what the code released with
      arXiv 2508.16929 does. Made good in the row's next update, at the betas of then, so that a step costs what fires:
      until then the state holds the moments of step ``last_step``, one integer a row. Switched on in a run, silence
      counts from there; switched off, what is due is made good at once. A parameter without any gradient takes no step,
      and nothing of it decays; without ``row_dim`` every entry moves, and there is no silence.

    When every row is active in every step, all of these but ``eps_placement="sparse_adam"`` equal ``torch.optim.Adam``.
    Moments of float16 and bfloat16
    parameters are kept in float32.

    Args:
        params: tensors, or parameter groups with the options below.
        lr: learning rate.
        betas: decay rates of the two moments, each in [0, 1).
        eps: added to the root of the second moment, see above.
        bias_correction: ``"global"`` (the default: lower error in every pair of runs that were compared on a real
            model, benchmarks/results/ablation.md) or ``"per_row"``.
        row_dim: see above.
        eps_placement: see above.
        silent_moments: see above.

    Attributes:
        moved_versions: ``_version`` of each parameter that the last step moved, right after it: where it is another one
            now, somebody else has written to the parameter since.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        bias_correction: BiasCorrection = "global",
        row_dim: int | None = None,
        eps_placement: EpsPlacement = "adam",
        silent_moments: SilentMoments = "keep",
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "bias_correction": bias_correction, "row_dim": row_dim}
        defaults |= {"eps_placement": eps_placement, "silent_moments": silent_moments}
        self.row_gradients: dict[Tensor, RowGradient] = {}
        self.row_norms: dict[Tensor, Tensor] = {}
        self.row_updates: list[RowUpdate] = []
        self.moved_versions: dict[Tensor, int] = {}
        super().__init__(params, defaults)

    def __setstate__(self, state: StateDict) -> None:
        super().__setstate__(state)
        self.row_gradients, self.row_norms, self.row_updates, self.moved_versions = {}, {}, [], {}
        for group in self.param_groups:
            for option, (default, *_) in _CHOICES.items():
                group.setdefault(option, default)  # a state that was saved before there was a choice

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
                    moved.add(param)
        self.moved_versions = {param: param._version for param in moved}
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
            states = [self._state_of(p, groups[p]["row_dim"], groups[p]) for p in update.params]
            for state in states:
                state["step"] += 1
            moments = [(state["exp_avg"], state["exp_avg_sq"]) for state in states]
            steps = [float(state["step"]) for state in states]
            settings = [_settings_of(groups[param], step) for param, step in zip(update.params, steps, strict=True)]
            last_steps = [state.get("last_step") for state in states]
            update.apply_(moments, settings, steps, last_steps)
            for tensor in (*update.params, *itertools.chain.from_iterable(moments)):
                torch.autograd.graph.increment_version(tensor)  # a kernel of somebody else's may not have done so
        return set(claimed)

    def _step_param(self, param: Tensor, gradient: Tensor | RowGradient, group: _Group) -> None:
        row_dim = 0 if isinstance(gradient, Tensor) and gradient.is_sparse else group["row_dim"]
        if row_dim is None:
            if isinstance(gradient, RowGradient):
                raise ValueError("row_dim=None: set row_dim in the group of a parameter that has row_gradients")
            state = self._state_of(param, row_dim, group)
            state["step"] += 1
            step = float(state["step"])
            adam_update_(param, gradient, state["exp_avg"], state["exp_avg_sq"], step, _settings_of(group, step))
            return
        by_row = gradient if isinstance(gradient, RowGradient) else _active_rows(gradient, row_dim)
        by_row.check(param.shape, row_dim)
        self._step_rows(param, by_row, row_dim, group)

    def _step_rows(self, param: Tensor, gradient: RowGradient, row_dim: int, group: _Group) -> None:
        rows, values, divisor = gradient
        state = self._state_of(param, row_dim, group)
        state["step"] += 1
        step: Step = float(state["step"])
        shares = None
        if "last_step" in state:
            silent = int(step) - 1 - state["last_step"].index_select(0, rows).double()
            shares = MomentShares(*(_power(beta, silent).to(state["exp_avg"].dtype) for beta in group["betas"]))
            state["last_step"].index_fill_(0, rows, int(step))
        if "row_step" in state:
            state["row_step"][rows] += 1
            step = state["row_step"][rows].to(state["exp_avg"].dtype)
        settings = _settings_of(group, step)._replace(grad_divisor=divisor)
        tensors = [tensor.movedim(row_dim, 0) for tensor in (param, state["exp_avg"], state["exp_avg_sq"])]
        _update_rows_(tensors, rows, values, step, settings, self.row_norms.get(param), shares)

    def _state_of(self, param: Tensor, row_dim: int | None, group: _Group) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[param]
        if not state:
            dtype = torch.promote_types(param.dtype, torch.float32)
            state["step"] = torch.zeros((), dtype=torch.float64)
            state["exp_avg"] = torch.zeros_like(param, dtype=dtype)
            state["exp_avg_sq"] = torch.zeros_like(param, dtype=dtype)
        if group["bias_correction"] == "global":
            state.pop("row_step", None)  # after a switch mid-run, rows are no longer counted
        elif row_dim is not None and "row_step" not in state:
            # Switched on mid-run: rows that were updated before are past their first step.
            steps = int(state["step"])
            seen = state["exp_avg_sq"].movedim(row_dim, 0).reshape(param.shape[row_dim], -1).any(dim=1)
            state["row_step"] = seen.to(torch.int32) * steps
        if row_dim is None or group["silent_moments"] == "keep":
            _settle_(state, group)  # after a switch mid-run, or where a gradient of every entry follows sparse ones
        elif "last_step" not in state:
            # Switched on mid-run: silence counts from here.
            n_rows = param.shape[row_dim]
            state["last_step"] = torch.full((n_rows,), int(state["step"]), dtype=torch.int32, device=param.device)
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


def _settings_of(group: _Group, step: Step) -> AdamSettings:
    """Settings of an update after which ``step`` steps are taken."""
    eps: Step = group["eps"]
    if group["eps_placement"] == "sparse_adam":
        # sqrt(v / c) + eps / sqrt(c) = (sqrt(v) + eps) / sqrt(c), c the bias correction
        eps = eps / _bias_correction(group["betas"][1], step) ** 0.5
    return AdamSettings(group["lr"], *group["betas"], eps)


def _power(beta: float, silent: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """beta^silent; an exponential, which takes a fifth of the time of torch's power."""
    return (silent * math.log(beta)).exp_() if beta > 0 else beta**silent


def _settle_(state: dict[str, Tensor], group: _Group) -> None:
    """Let the moments of silent rows decay by what is due; from here on they are what they are."""
    last_step = state.pop("last_step", None)
    if last_step is None:
        return
    silent = int(state["step"]) - last_step.double()
    for moment, beta in zip((state["exp_avg"], state["exp_avg_sq"]), group["betas"], strict=True):
        rows = moment.movedim(group["row_dim"] or 0, 0)
        rows.mul_(_power(beta, silent).to(moment.dtype).view(-1, *[1] * (moment.ndim - 1)))


def _check_claimed(claimed: Sequence[Tensor], groups: Mapping[Tensor, _Group]) -> None:
    """What the updates of a step move: parameters of this optimizer, once each, of groups with options they serve."""
    for i, param in enumerate(claimed):
        if param not in groups or any(param is other for other in claimed[:i]):
            problem = "is in two of row_updates" if param in groups else "in row_updates is no parameter of the groups"
            raise ValueError(f"a tensor of shape {tuple(param.shape)} {problem}: give each parameter to one of them")
        for option in _OF_ROW_UPDATES:
            value, (served, *_) = groups[param][option], _CHOICES[option]  # type: ignore[literal-required]
            if value != served:
                raise ValueError(
                    f"{option}={value!r} is not served by row_updates: set {option}={served!r}, or give row_gradients"
                )


def _check_group(group: _Group) -> None:
    lr, betas, eps = group["lr"], group["betas"], group["eps"]
    if not lr >= 0:
        raise ValueError(f"lr={lr} must not be negative")
    if not eps >= 0:
        raise ValueError(f"eps={eps} must not be negative")
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas={betas} must be two numbers in [0, 1)")
    for option, choices in _CHOICES.items():
        value = group[option]  # type: ignore[literal-required]
        if value not in choices:
            raise ValueError(f"{option}={value!r} must be one of {choices}")
    row_dim = group["row_dim"]
    if row_dim is None:
        return
    for param in group["params"]:
        if not 0 <= row_dim < param.ndim:
            raise ValueError(f"row_dim={row_dim} does not exist in a parameter of shape {tuple(param.shape)}")
