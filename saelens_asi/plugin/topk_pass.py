"""SAELens's TopK family (topk, abstopk, batchtopk, matryoshka_batchtopk), with gradients of active rows only."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple, TypeGuard

import torch
from sae_lens.saes.abstopk_sae import AbsTopKTrainingSAE
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE
from sae_lens.saes.matryoshka_batchtopk_sae import MatryoshkaBatchTopKTrainingSAE
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput, mse_loss
from sae_lens.saes.topk_sae import TopKTrainingSAE
from torch import Tensor

from saelens_asi.activations.sae_state import NORMALIZED_INSIDE, has_hooks, replaced_methods, shard_of, stock_methods
from saelens_asi.plugin.fields import AnyTrainingSAE
from saelens_asi.plugin.sharded_sae import sharded_class
from saelens_asi.sparse.gradients import TopKGradients, merge_rows, squared_error_, stack_levels, topk_gradients
from saelens_asi.sparse.kernels import kernels_take
from saelens_asi.sparse.rows import Entries, Workspace
from saelens_asi.sparse.screens import AdaptiveScreen
from saelens_asi.sparse.selection import BatchSelection, batch_top_k, batch_width, select_top_k
from saelens_asi.sparse.shards import Shard
from saelens_asi.sparse.topk import Encoder, Query, TopK, encode_top_k, encode_top_k_among

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
_STOCK = stock_methods([*_FAMILY, *map(sharded_class, _FAMILY)], _METHODS)


@dataclass(frozen=True)
class AuxiliaryLevel:
    """Dead features that are to predict a residual.

    Attributes:
        features: those that lie here.
        n: how many there are in all processes.
        k: how many of these a token has.
        weight: of their loss.
        residual_level: the reconstruction whose residual it is.
    """

    features: Tensor
    n: int
    k: int
    weight: float
    residual_level: int

    @property
    def k_here(self) -> int:
        """How many of them a token can have here."""
        return min(self.k, self.features.numel())


class SparsePass(NamedTuple):
    """What a forward and backward pass over a batch gives, to each process of the features that it holds.

    Attributes:
        output: losses are of the whole batch; ``sae_in``, ``sae_out`` and the activations of the tokens seen here.
        gradients: over all tokens.
        gradient_norm: of all parameters in all processes; a tensor without dimensions.
        firings: (n_features,) int64, on how many tokens of the batch each feature fired.
    """

    output: TrainStepOutput
    gradients: TopKGradients
    gradient_norm: Tensor
    firings: Tensor


class _Encoded(NamedTuple):
    """The active features, of a BatchTopK the lowest score of all, and the dead features of every auxiliary level."""

    active: Entries
    lowest: Tensor | None
    auxiliary: list[Entries]


def is_topk(sae: AnyTrainingSAE) -> TypeGuard[TopKTrainingSAE]:
    """Whether an SAE belongs to the family that can be trained sparsely."""
    return isinstance(sae, TopKTrainingSAE)


def is_of_family(sae: AnyTrainingSAE) -> TypeGuard[TopKTrainingSAE]:
    """Whether an SAE is of one of SAELens's own classes of the family: a subclass may encode in another way."""
    return type(sae) in _STOCK


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
    shard, n_tokens = shard_of(sae), len(step_input.sae_in)
    step_input = replace(step_input, sae_in=step_input.sae_in[shard.part(n_tokens)])
    with torch.no_grad():
        x = sae.process_sae_in(step_input.sae_in)
        auxiliary = auxiliary_levels(sae, step_input)
        encoded = _encode(sae, x, encoder, auxiliary, workspace, screen, n_tokens)
        hidden_pre, *dead = [_unscaled(entries, encoder.scale) for entries in (encoded.active, *encoded.auxiliary)]
        activations = stack_levels([*_by_level(sae, hidden_pre), *dead], x.shape[0])
        decoded = shard.features.sum_(activations.decode(sae.W_dec))
    loss, losses, sae_out, d_decoded, d_b_dec = _losses_and_gradients(sae, step_input, decoded, auxiliary, workspace)
    with torch.no_grad():
        losses = _of_batch({"": loss, **losses}, d_decoded, d_b_dec, shard, n_tokens)
        loss = losses.pop("")
        gradients = merge_rows(topk_gradients(activations, d_decoded, x, sae.W_enc, sae.W_dec, workspace), shard.tokens)
        if sae.cfg.apply_b_dec_to_input:
            d_b_dec = d_b_dec + shard.world.sum_(gradients.b_dec)
        output = TrainStepOutput(
            sae_in=step_input.sae_in,
            sae_out=sae_out.detach(),
            feature_acts=as_coo(encoded.active, (x.shape[0], sae.cfg.d_sae)),
            hidden_pre=as_coo(hidden_pre, (x.shape[0], sae.cfg.d_sae)),
            loss=loss,
            losses=losses,
        )
        if isinstance(sae, BatchTopKTrainingSAE):
            sae.update_topk_threshold(x.new_empty(0) if encoded.lowest is None else encoded.lowest.view(1))
            output.metrics["topk_threshold"] = sae.topk_threshold
        firings = shard.tokens.sum_(torch.bincount(encoded.active.features, minlength=sae.cfg.d_sae))
        gradient_norm = (shard.features.sum_(gradients.row_square()) + d_b_dec.double().square().sum()).sqrt()
    return SparsePass(output, gradients._replace(b_dec=d_b_dec), gradient_norm, firings)


def _of_batch(
    losses: dict[str, Tensor], d_decoded: Tensor, d_b_dec: Tensor, shard: Shard, n_tokens: int
) -> dict[str, Tensor]:
    """Losses of the whole batch from those of the tokens seen here; their gradients, in place, likewise.

    All are means over tokens. Of the gradients, that by decoded rows stays one of the tokens here.
    """
    if shard.tokens.size == 1:
        return {name: loss.detach() for name, loss in losses.items()}
    here = shard.part(n_tokens)
    share = (here.stop - here.start) / n_tokens
    d_decoded.mul_(share)
    shard.tokens.sum_(d_b_dec.mul_(share))
    values = shard.tokens.sum_(torch.stack([loss.detach() for loss in losses.values()]).mul_(share))
    return dict(zip(losses, values, strict=True))


def auxiliary_levels(sae: TopKTrainingSAE, step_input: TrainStepInput) -> list[AuxiliaryLevel]:
    """The dead features that take part in SAELens's auxiliary loss, level by level."""
    mask, shard = step_input.dead_neuron_mask, shard_of(sae)
    if mask is None or sae.cfg.aux_loss_coefficient == 0:
        return []
    dead = mask.nonzero().squeeze(1)
    widths = _widths(sae)
    groups = [(len(widths) - 1, dead)]
    if getattr(sae.cfg, "use_matryoshka_aux_loss", False):
        bounds = torch.searchsorted(dead + shard.first, torch.tensor(widths[:-1], device=dead.device))
        groups = list(enumerate(dead.tensor_split(bounds.tolist())))
    n_dead = shard.features.sum_(torch.tensor([features.numel() for _, features in groups], device=dead.device))
    k_aux = step_input.sae_in.shape[-1] // 2
    return [
        AuxiliaryLevel(
            features, n, min(k_aux, n), sae.cfg.aux_loss_coefficient * min(n / k_aux, 1.0), residual_level=level
        )
        for (level, features), n in zip(groups, n_dead.tolist(), strict=True)
        if n > 0
    ]


def _widths(sae: TopKTrainingSAE) -> list[int]:
    """Of all processes' features together."""
    return getattr(sae.cfg, "matryoshka_widths", None) or [shard_of(sae).d_sae]


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
    n_tokens: int,
) -> _Encoded:
    """Which features are active on the tokens here, of a batch of ``n_tokens``, and which dead ones take part."""
    shard, k = shard_of(sae), sae.activation_fn.k
    n_entries, k_here = int(k * n_tokens), min(int(k), shard.n_features)
    is_batch = isinstance(sae, BatchTopKTrainingSAE)
    best: TopK | BatchSelection
    # By the dead of all processes: in a BatchTopK all have to go the same way, or one would wait for another.
    if screen is not None and sum(level.n for level in auxiliary) <= shard.d_sae * _MAX_DEAD_SHARE:
        answers = [encode_top_k_among(x, encoder, level.features, level.k_here, workspace) for level in auxiliary]
        if is_batch:
            best = screen.batch_top_k(x, encoder, n_entries, workspace, shard, n_tokens)
        else:
            best = screen.top_k(x, encoder, k_here, workspace)
    else:
        width = batch_width(n_entries, n_tokens, shard.n_features) if is_batch else k_here
        queries = [Query(width), *(Query(level.k_here, level.features) for level in auxiliary)]
        best, *answers = encode_top_k(x, encoder, queries, workspace)
        if is_batch:

            def look_up(some: Tensor, k: int) -> TopK:
                return encode_top_k(x[some], encoder, [Query(k)], workspace)[0]

            best = batch_top_k(best, n_entries, shard, n_tokens, look_up)
    group, magnitude = shard.features, encoder.magnitude
    dead = [select_top_k(answer, level.k, group, magnitude) for level, answer in zip(auxiliary, answers, strict=True)]
    if isinstance(best, BatchSelection):
        return _Encoded(best.entries, best.lowest, dead)
    active = select_top_k(best, int(k), group, magnitude)
    # Not "> 0": a score that is not a number stays, and the loss is none either, as with SAELens's own step.
    return _Encoded(active.where(active.scores != 0 if magnitude else ~(active.scores <= 0)), None, dead)


def _by_level(sae: TopKTrainingSAE, entries: Entries) -> list[Entries]:
    """The entries that each level of reconstruction adds to the one before."""
    widths = torch.tensor(_widths(sae), device=entries.features.device)
    level = torch.bucketize(entries.features + shard_of(sae).first, widths, right=True)
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
