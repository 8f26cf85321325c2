"""TopK steps on an accelerator with SparseAdam: about thirty launches at every size, none of which a step waits for."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from sae_lens.saes.abstopk_sae import AbsTopKTrainingSAE
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from sae_lens.saes.topk_sae import TopKTrainingSAE
from torch import Tensor
from torch.optim import Optimizer

from saelens_asi.plugin.fields import AnyTrainingSAE
from saelens_asi.plugin.topk_pass import as_coo, encoder_of, is_squared_error
from saelens_asi.sparse.fused_step import (
    MAX_WIDTH,
    Decoded,
    FusedEntries,
    FusedUpdate,
    clip,
    decode_tokens,
    gradient_squares,
    renew_norms_,
)
from saelens_asi.sparse.fused_topk import MAX_K, encode_top_k
from saelens_asi.sparse.rows import Entries
from saelens_asi.sparse.topk import TopK
from saelens_asi.sparse_adam import SparseAdam

# The norms of one part in so many of the decoder rows are taken anew in each step, whoever has moved them.
_NORM_STRIPES = 32

# Elsewhere loops of numba make the steps.
_DEVICE = "cuda"

# Options of a group of SparseAdam that a fused update serves.
_OPTIONS = {"bias_correction": "global", "eps_placement": "adam"}


class DeadWatch:
    """Until when no feature can be dead, so that a step need not ask an accelerator whether one is."""

    def __init__(self) -> None:
        self._first: int | None = None  # step in which a feature could be

    def none_is_dead(self, silent: Tensor, window: int, steps_done: int) -> bool:
        """Whether the next step can do without a look at which features are dead.

        A feature is dead after more than ``window`` steps without firing, so the longest silence says how many steps it
        takes at least. It is read, which waits for the device, when that many have passed.

        Args:
            silent: (d_sae,) for how many steps each feature has been silent.
            window: steps.
            steps_done: of the run.
        """
        if self._first is None or steps_done >= self._first:
            longest = 0 if steps_done == 0 else int(silent.max())
            self._first = steps_done + window - longest + 1
        return steps_done < self._first


class FusedSteps:
    """Steps by the operators of ``sparse.fused_step``; keeps the norms of the decoder rows from one to the next."""

    def __init__(self) -> None:
        self.norms: Tensor | None = None
        self._seen: tuple[int, int | None] | None = None  # address and version of the decoder that the norms are of
        self._stripe = 0
        self._features: Tensor | None = None
        self._tokens: Tensor | None = None
        self._none: Tensor | None = None

    def invalidate(self) -> None:
        """Forget the norms, after somebody has written to weights through ``.data``."""
        self.norms = self._seen = None

    def take(
        self,
        sae: TopKTrainingSAE,
        optimizer: SparseAdam,
        made: TrainStepInput,
        autocast: AbstractContextManager[object],
    ) -> tuple[TrainStepOutput, Tensor, Tensor]:
        """Make a step, up to that of the optimizer.

        Args:
            sae: that ``takes_fused`` is true for.
            optimizer: of its parameters.
            made: what SAELens's own step would give to the SAE.
            autocast: what the forward pass runs in.

        Returns:
            What SAELens's own step gives; on how many tokens each feature fired; and the norm of all gradients.
        """
        with torch.no_grad():
            norms = self._current_norms(sae)
            with autocast:
                x = sae.process_sae_in(made.sae_in).contiguous()
                encoder = encoder_of(sae, norms)
                best = encode_top_k(x, encoder, sae.activation_fn.k)
            target, decoder = made.sae_in.to(sae.W_dec.dtype).contiguous(), (sae.W_dec.detach(), sae.b_dec.detach())
            decoded = Decoded(*decode_tokens(*best, norms, *decoder, target, encoder.magnitude))
            entries = FusedEntries.of(decoded, x, self._all_features(sae))
            squares, d_input = gradient_squares(*entries.parts(), encoder.rows)
            reaching = d_input.sum(dim=0) if sae.cfg.apply_b_dec_to_input else torch.zeros_like(decoder[1])
            d_b_dec, norm, divisor = clip(squares, decoded.d_out.sum(dim=0), reaching, 1.0)
        params = (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec)
        optimizer.row_updates.append(FusedUpdate(params, entries, d_b_dec, divisor, norms))
        optimizer.step()
        self._seen = (sae.W_dec.data_ptr(), optimizer.moved_versions.get(sae.W_dec))
        optimizer.zero_grad()
        return self._output(sae, made, best, decoded), entries.firings(), norm

    def _output(self, sae: TopKTrainingSAE, made: TrainStepInput, best: TopK, decoded: Decoded) -> TrainStepOutput:
        loss = decoded.errors.mean()
        if self._none is None:
            self._none = torch.zeros_like(loss)
        n_tokens, k = best.indices.shape
        if self._tokens is None or self._tokens.numel() != n_tokens * k:
            self._tokens = torch.arange(n_tokens, device=loss.device).repeat_interleave(k)
        shape = (n_tokens, sae.cfg.d_sae)
        # One tensor of indices for both; entries that do not count are zeros in it.
        acts = as_coo(Entries(self._tokens, best.indices.flatten(), decoded.acts.flatten()), shape)
        hidden = torch.sparse_coo_tensor(acts._indices(), decoded.values.flatten(), shape, check_invariants=False)
        return TrainStepOutput(
            sae_in=made.sae_in,
            sae_out=decoded.out,
            feature_acts=acts,
            hidden_pre=hidden,
            loss=loss,
            losses={"mse_loss": loss, "auxiliary_reconstruction_loss": self._none},
        )

    def _all_features(self, sae: TopKTrainingSAE) -> Tensor:
        n = sae.cfg.d_sae + 1
        if self._features is None or self._features.numel() != n or self._features.device != sae.W_dec.device:
            self._features = torch.arange(n, dtype=torch.int32, device=sae.W_dec.device)
        return self._features

    def _current_norms(self, sae: TopKTrainingSAE) -> Tensor | None:
        """Norms of the decoder rows, if the SAE ranks by them; those of the last step, where nobody has written since.

        What was written through ``.data`` shows in no version: norms are taken anew in turn, those of all rows within
        32 steps. A kernel gives each row the same bits, whichever others it is asked for with.
        """
        if not sae.cfg.rescale_acts_by_decoder_norm:
            return None
        W_dec, features = sae.W_dec.detach(), self._all_features(sae)
        now = (W_dec.data_ptr(), W_dec._version)
        if self.norms is None or self._seen != now:
            self.norms, self._seen = W_dec.new_empty(W_dec.shape[0]), now
            renew_norms_(self.norms, W_dec, features)
            return self.norms
        size = -(-W_dec.shape[0] // _NORM_STRIPES)
        first = self._stripe * size
        self._stripe = (self._stripe + 1) % _NORM_STRIPES
        if first < W_dec.shape[0]:
            size = min(size, W_dec.shape[0] - first)
            renew_norms_(
                self.norms.narrow(0, first, size), W_dec.narrow(0, first, size), features.narrow(0, first, size + 1)
            )
        return self.norms


def takes_fused(sae: AnyTrainingSAE, optimizer: Optimizer, made: TrainStepInput) -> bool:
    """Whether a step of an SAE on the sparse path can be made by ``FusedSteps``."""
    return (
        sae.W_dec.device.type == _DEVICE
        and type(sae) in (TopKTrainingSAE, AbsTopKTrainingSAE)
        and type(optimizer) is SparseAdam
        and _is_served(optimizer)
        and (made.dead_neuron_mask is None or sae.cfg.aux_loss_coefficient == 0)
        and all(param.dtype == torch.float32 for param in sae.parameters())
        and sae.W_dec.is_contiguous()
        and len(made.sae_in) > 0
        and sae.cfg.d_in <= MAX_WIDTH
        and sae.activation_fn.k <= MAX_K
        and is_squared_error(sae, made.sae_in)
    )


def _is_served(optimizer: SparseAdam) -> bool:
    """Whether all parameters move alike, by the options that there are kernels for."""
    groups, same = optimizer.param_groups, ("lr", "betas", "eps", "silent_moments")
    # The counts lie on the CPU, whatever the parameters do.
    steps = {float(optimizer.state[param].get("step", 0)) for group in groups for param in group["params"]}
    return len(steps) == 1 and all(
        all(group.get(option, value) == value for option, value in _OPTIONS.items())
        and all(group[name] == groups[0][name] for name in same)
        and not isinstance(group["lr"], Tensor)
        for group in groups
    )
