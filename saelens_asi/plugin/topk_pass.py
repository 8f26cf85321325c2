"""SAELens's TopK family (topk, abstopk, batchtopk, matryoshka_batchtopk), with gradients of active rows only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, TypeGuard

import torch
from sae_lens.saes.abstopk_sae import AbsTopKTrainingSAE
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE
from sae_lens.saes.matryoshka_batchtopk_sae import MatryoshkaBatchTopKTrainingSAE
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput, mse_loss
from sae_lens.saes.topk_sae import TopKTrainingSAE
from torch import Tensor

from saelens_asi.activations.sae_state import NORMALIZED_INSIDE, has_hooks, replaced_methods, stock_methods
from saelens_asi.plugin.fields import AnyTrainingSAE
from saelens_asi.sparse.gradients import TopKGradients, squared_error_, stack_levels, topk_gradients
from saelens_asi.sparse.kernels import kernels_take
from saelens_asi.sparse.rows import Entries, Workspace
from saelens_asi.sparse.screens import AdaptiveScreen
from saelens_asi.sparse.topk import (
    Encoder,
    Query,
    batch_top_k,
    batch_width,
    encode_top_k,
    encode_top_k_among,
    entries_of,
)

# With more dead features than this, whose scores an auxiliary loss needs, the whole product is cheaper than a screen.
_MAX_DEAD_SHARE = 0.1

_FAMILY = (TopKTrainingSAE, AbsTopKTrainingSAE, BatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAE)
_PARAMETERS = {"W_enc", "b_enc", "W_dec", "b_dec"}
_METHODS = (
    "training_forward_pass",
    "encode_with_hidden_pre",
    "process_sae_in",
    "decode",
    "calculate_aux_loss",
    "calculate_topk_aux_loss",
    "update_topk_threshold",
)
_STOCK = stock_methods(_FAMILY, _METHODS)


@dataclass(frozen=True)
class AuxiliaryLevel:
    """Dead features that are to predict a residual: which, how many a token, and the weight of their loss.

    ``residual_level`` is the reconstruction whose residual it is.
    """

    features: Tensor
    k: int
    weight: float
    residual_level: int


class SparsePass(NamedTuple):
    """What a forward and backward pass over a batch gives: all gradients, and how often each feature fired (d_sae,)."""

    output: TrainStepOutput
    gradients: TopKGradients
    firings: Tensor


def is_topk(sae: AnyTrainingSAE) -> TypeGuard[TopKTrainingSAE]:
    """Whether an SAE belongs to the family that can be trained sparsely."""
    return isinstance(sae, TopKTrainingSAE)


def dense_path_reason(sae: AnyTrainingSAE, sae_in: Tensor) -> str | None:
    """Why this SAE cannot be trained on the sparse path as it stands; None when it can, or is not a TopK at all."""
    if type(sae) not in _STOCK:
        return f"{type(sae).__name__} is not a TopK architecture of SAELens"
    if replaced := replaced_methods(sae, _STOCK):
        return f"{', '.join(replaced)} of the SAE is replaced (by compile_sae, for one)"
    if any(has_hooks(module) for module in sae.modules()):
        return "hooks are attached to the SAE"
    parameters = dict(sae.named_parameters())
    if parameters.keys() != _PARAMETERS or not all(param.requires_grad for param in parameters.values()):
        return "the SAE's parameters are not W_enc, b_enc, W_dec and b_dec, all of them trained"
    if any(param._backward_hooks or param._post_accumulate_grad_hooks for param in parameters.values()):
        return "hooks are attached to the SAE's parameters"
    if sae_in.ndim != 2 or sae.W_dec.device.type not in ("cpu", "cuda"):
        return f"activations have {sae_in.ndim} dimensions on a device of type {sae.W_dec.device.type!r}"
    return None


def sparse_pass(
    sae: TopKTrainingSAE,
    step_input: TrainStepInput,
    encoder: Encoder,
    workspace: Workspace,
    screen: AdaptiveScreen | None = None,
) -> SparsePass:
    """Losses, metrics and gradients of ``sae.training_forward_pass``, without anything of size d_sae x d_in.

    The norm of the decoder rows, by which SAELens rescales activations, takes part in the selection only: it cancels
    in the reconstruction, and so does its gradient. ``feature_acts`` and ``hidden_pre`` of the output are sparse COO
    tensors (batch, d_sae); ``hidden_pre`` has the active features only.

    Args:
        sae: one for which ``dense_path_reason`` gave None.
        step_input: as the trainer makes it.
        encoder: of the SAE, see ``encoder_of``.
        workspace: of the run.
        screen: of the run; without one, scores come from the whole product.
    """
    with torch.no_grad():
        x = sae.process_sae_in(step_input.sae_in)
        auxiliary = auxiliary_levels(sae, step_input)
        active, answers = _encode(sae, x, encoder, auxiliary, workspace, screen)
        hidden_pre, *auxiliary_entries = [_unscaled(entries, encoder.scale) for entries in (active, *answers)]
        activations = stack_levels([*_by_level(sae, hidden_pre), *auxiliary_entries], x.shape[0])
        decoded = activations.decode(sae.W_dec)
    loss, losses, sae_out, d_decoded, d_b_dec = _losses_and_gradients(sae, step_input, decoded, auxiliary, workspace)
    with torch.no_grad():
        gradients = topk_gradients(activations, d_decoded, x, sae.W_enc, sae.W_dec, workspace)
        if sae.cfg.apply_b_dec_to_input:
            d_b_dec = d_b_dec + gradients.b_dec
        shape = (x.shape[0], sae.cfg.d_sae)
        output = TrainStepOutput(
            sae_in=step_input.sae_in,
            sae_out=sae_out.detach(),
            feature_acts=as_coo(active, shape),
            hidden_pre=as_coo(hidden_pre, shape),
            loss=loss.detach(),
            losses={name: value.detach() for name, value in losses.items()},
        )
        if isinstance(sae, BatchTopKTrainingSAE):
            sae.update_topk_threshold(active.scores)
            output.metrics["topk_threshold"] = sae.topk_threshold
        firings = torch.bincount(active.features, minlength=sae.cfg.d_sae)
    return SparsePass(output, gradients._replace(b_dec=d_b_dec), firings)


def auxiliary_levels(sae: TopKTrainingSAE, step_input: TrainStepInput) -> list[AuxiliaryLevel]:
    """The dead features that take part in SAELens's auxiliary loss, level by level."""
    mask = step_input.dead_neuron_mask
    if mask is None or sae.cfg.aux_loss_coefficient == 0:
        return []
    dead = mask.nonzero().squeeze(1)
    widths = _widths(sae)
    if not getattr(sae.cfg, "use_matryoshka_aux_loss", False):
        groups = [(len(widths) - 1, dead)]
    else:
        bounds = torch.searchsorted(dead, torch.tensor(widths[:-1], device=dead.device))
        groups = list(enumerate(dead.tensor_split(bounds.tolist())))
    k_aux = step_input.sae_in.shape[-1] // 2
    return [
        AuxiliaryLevel(
            features, min(k_aux, n), sae.cfg.aux_loss_coefficient * min(n / k_aux, 1.0), residual_level=level
        )
        for level, features in groups
        if (n := features.numel()) > 0
    ]


def _widths(sae: TopKTrainingSAE) -> list[int]:
    return getattr(sae.cfg, "matryoshka_widths", None) or [sae.cfg.d_sae]


def encoder_of(sae: TopKTrainingSAE, decoder_norms: Tensor | None) -> Encoder:
    """The features of an SAE as they are ranked; inside autocast, with its products.

    It shows the weights as they are, also after an optimizer has moved them in place.

    Args:
        sae: of the TopK family.
        decoder_norms: (d_sae,) norms of the decoder rows where ``rescale_acts_by_decoder_norm`` is set.
    """
    device = sae.W_enc.device.type
    return Encoder(
        rows=sae.W_enc.detach().t(),
        bias=sae.b_enc.detach(),
        scale=decoder_norms,
        magnitude=isinstance(sae, AbsTopKTrainingSAE),
        matmul_dtype=torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None,
    )


def _encode(
    sae: TopKTrainingSAE,
    x: Tensor,
    encoder: Encoder,
    auxiliary: list[AuxiliaryLevel],
    workspace: Workspace,
    screen: AdaptiveScreen | None,
) -> tuple[Entries, list[Entries]]:
    """The active features, and the dead ones of every auxiliary level."""
    n_dead = sum(level.features.numel() for level in auxiliary)
    n_entries, d_sae, k = int(sae.activation_fn.k * x.shape[0]), sae.cfg.d_sae, sae.activation_fn.k
    is_batch = isinstance(sae, BatchTopKTrainingSAE)
    if screen is not None and n_dead <= d_sae * _MAX_DEAD_SHARE:
        answers = [encode_top_k_among(x, encoder, level.features, level.k, workspace) for level in auxiliary]
        if is_batch:
            return screen.batch_top_k(x, encoder, n_entries, workspace), [entries_of(answer) for answer in answers]
        best = screen.top_k(x, encoder, k, workspace)
    else:
        width = batch_width(n_entries, x.shape[0], d_sae) if is_batch else k
        queries = [Query(width), *(Query(level.k, level.features) for level in auxiliary)]
        best, *answers = encode_top_k(x, encoder, queries, workspace)
        if is_batch:
            active = batch_top_k(
                best, n_entries, d_sae, lambda some, k: encode_top_k(x[some], encoder, [Query(k)], workspace)[0]
            )
            return active, [entries_of(answer) for answer in answers]
    active = entries_of(best)
    # Not "> 0": a score that is not a number stays, and the loss is none either, as with SAELens's own step.
    active = active.where(active.scores != 0 if encoder.magnitude else ~(active.scores <= 0))
    return active, [entries_of(answer) for answer in answers]


def _by_level(sae: TopKTrainingSAE, entries: Entries) -> list[Entries]:
    """The entries that each level of reconstruction adds to the one before."""
    widths = torch.tensor(_widths(sae), device=entries.features.device)
    level = torch.bucketize(entries.features, widths, right=True)
    return [entries.where(level == i) for i in range(len(widths))] if len(widths) > 1 else [entries]


def _losses_and_gradients(
    sae: TopKTrainingSAE,
    step_input: TrainStepInput,
    decoded: Tensor,
    auxiliary: list[AuxiliaryLevel],
    workspace: Workspace,
) -> tuple[Tensor, dict[str, Tensor], Tensor, Tensor, Tensor]:
    """What ``_losses`` gives, and the gradients by the decoded rows and by b_dec."""
    b_dec = sae.b_dec.detach()
    if not auxiliary and is_squared_error(sae, decoded) and kernels_take(decoded, b_dec, step_input.sae_in):
        loss, d_decoded, d_b_dec = squared_error_(decoded, b_dec, step_input.sae_in, workspace)
        losses = {"mse_loss": loss, "auxiliary_reconstruction_loss": loss.new_tensor(0.0)}
        return loss, losses, decoded, d_decoded, d_b_dec
    decoded, b_dec = decoded.requires_grad_(), b_dec.requires_grad_()
    levels = decoded.unflatten(0, (-1, step_input.sae_in.shape[0]))
    loss, losses, sae_out = _losses(sae, step_input, levels, b_dec, auxiliary)
    d_decoded, d_b_dec = torch.autograd.grad(loss, [decoded, b_dec])
    return loss, losses, sae_out, d_decoded, d_b_dec


def is_squared_error(sae: TopKTrainingSAE, decoded: Tensor) -> bool:
    """Whether the loss is the squared error of one level, without normalization of activations or another shape."""
    if len(_widths(sae)) > 1 or sae.mse_loss_fn is not mse_loss or sae.cfg.normalize_activations in NORMALIZED_INSIDE:
        return False
    return sae.reshape_fn_out(sae.run_time_activation_norm_fn_out(decoded), sae.d_head) is decoded


def _losses(
    sae: TopKTrainingSAE, step_input: TrainStepInput, decoded: Tensor, b_dec: Tensor, auxiliary: list[AuxiliaryLevel]
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Loss, its parts by SAELens's names, and the reconstruction, from the decoded levels (n_levels, batch, d_in)."""
    widths, sae_in = _widths(sae), step_input.sae_in
    partial = decoded[: len(widths)].cumsum(0) if len(widths) > 1 else decoded[:1]
    outputs = [sae.run_time_activation_norm_fn_out(level + b_dec) for level in partial]
    sae_out = sae.reshape_fn_out(outputs[-1], sae.d_head)
    errors = [sae.mse_loss_fn(out, sae_in).sum(dim=-1).mean() for out in (*outputs[:-1], sae_out)]
    auxiliary_loss = sae_out.new_tensor(0.0)
    for level, predicted in zip(auxiliary, decoded[len(widths) :], strict=True):
        residual = (sae_in - outputs[level.residual_level]).detach()
        auxiliary_loss = auxiliary_loss + level.weight * (predicted - residual).pow(2).sum(dim=-1).mean()
    losses = {"mse_loss": errors[-1], "auxiliary_reconstruction_loss": auxiliary_loss}
    losses |= {f"inner_mse_loss_{width}": error for width, error in zip(widths, errors[:-1], strict=False)}
    return sum(losses.values(), start=sae_out.new_tensor(0.0)), losses, sae_out


def _unscaled(entries: Entries, scale: Tensor | None) -> Entries:
    if scale is None:
        return entries
    return entries._replace(scores=entries.scores / scale[entries.features].to(entries.scores.dtype))


def as_coo(entries: Entries, shape: tuple[int, int]) -> Tensor:
    """The entries as a sparse tensor."""
    indices = torch.stack([entries.tokens, entries.features])
    return torch.sparse_coo_tensor(indices, entries.scores, shape, check_invariants=False)
