"""Training steps on the sparse path, with SparseAdam or Adam; or the reason why they are SAELens's own."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple

import torch
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from sae_lens.saes.topk_sae import TopKTrainingSAE
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from saelens_asi.activations.sae_state import feature_row_groups
from saelens_asi.plugin.fields import FLAGS, AnyTrainingSAE
from saelens_asi.plugin.fused_steps import FusedSteps, takes_fused
from saelens_asi.plugin.topk_pass import SparsePass, dense_path_reason, encoder_of, is_topk, sparse_pass
from saelens_asi.sparse.kernels import load_kernels
from saelens_asi.sparse.rows import RowGradient, Workspace, row_norms, shared_workspace, update_row_norms_
from saelens_asi.sparse.screens import AdaptiveScreen
from saelens_asi.sparse.topk import Encoder
from saelens_asi.sparse_adam import SparseAdam

logger = logging.getLogger(__name__)

_MAX_GRAD_NORM = 1.0  # SAELens's own, which is no setting there either

# Of the decoder rows one part in so many is compared in each step with the norms that are kept of them.
_NORM_STRIPES = 32


class SparseStep(NamedTuple):
    """A step that was taken.

    Attributes:
        output: as SAELens's own step gives it, see ``SparsePass``.
        firings: (n_features,) int64, on how many tokens of the batch each feature of this process fired.
        gradient_norm: of all parameters, before clipping; a tensor without dimensions.
    """

    output: TrainStepOutput
    firings: Tensor
    gradient_norm: Tensor


class SparseSteps:
    """The steps of a run that cost what their active features cost; with Adam, all but the optimizer's part.

    What it keeps from step to step: the screen, the norms of the decoder rows, an encoder whose rows lie together in
    memory, and buffers, which it shares with the other runs of its thread.
    """

    def __init__(self) -> None:
        self.screen: AdaptiveScreen | None = None
        self.decoder_norms: Tensor | None = None
        self._decoder_seen: tuple[int, int | None] | None = None  # address and version that the norms are of
        self._stripe = 0
        self._fused = FusedSteps()
        self._workspace: Workspace | None = None
        self._laid_out: _FeatureLayout | None = None
        self._reason_given: str | None = None

    def take(
        self,
        sae: AnyTrainingSAE,
        optimizer: Optimizer,
        sae_in: Tensor,
        step_input: Callable[[], TrainStepInput],
        autocast: AbstractContextManager[object],
        replaced: str | None = None,
    ) -> SparseStep | str:
        """Make one step; or give the reason, without a step, why it has to be SAELens's own.

        The counterpart of ``SAETrainer._train_step`` up to the optimizer's step; counters and schedules are the
        trainer's.

        Args:
            sae: whose weights are moved.
            optimizer: of its parameters.
            sae_in: (batch, d_in), scaled.
            step_input: makes what SAELens's own step would give to the SAE.
            autocast: what the forward pass runs in.
            replaced: what of SAELens's own step somebody else has replaced, if anything.
        """
        if type(optimizer) not in (SparseAdam, Adam):
            return f"no sparse step for {type(optimizer).__name__}"
        reason = self.dense_path_reason(sae, sae_in, replaced)
        if reason is None or isinstance(optimizer, SparseAdam):
            self._lay_out_by_feature(sae, optimizer)
        if reason is not None:
            self.invalidate()
            return reason
        sae.train()
        made = step_input()
        if isinstance(optimizer, SparseAdam) and takes_fused(sae, optimizer, made):
            return SparseStep(*self._fused.take(sae, optimizer, made, autocast))
        if isinstance(optimizer, SparseAdam):
            self.screen = self.screen or AdaptiveScreen()
        self._workspace = workspace = shared_workspace()
        with autocast:
            encoder = encoder_of(sae, self.current_decoder_norms(sae))
            done = sparse_pass(sae, made, encoder, workspace, self.screen)
        return SparseStep(done.output, done.firings, self._move_rows(sae, optimizer, encoder, done, workspace))

    def dense_path_reason(self, sae: AnyTrainingSAE, sae_in: Tensor, replaced: str | None) -> str | None:
        """Why this step is SAELens's own. Said once for an SAE of the TopK family, which could do better."""
        if not is_topk(sae):
            return "only TopK architectures are sparse"
        reason = dense_path_reason(sae, sae_in) or replaced
        if reason is not None and reason != self._reason_given:
            logger.warning("training steps take SAELens's dense path: %s", reason)
            self._reason_given = reason
        return reason

    @torch.no_grad()
    def _move_rows(
        self, sae: TopKTrainingSAE, optimizer: Optimizer, encoder: Encoder, done: SparsePass, workspace: Workspace
    ) -> Tensor:
        """Clip the gradients, move the rows that have one, and bring their norms up to date; returns their norm."""
        by_row = {sae.W_enc: done.gradients.W_enc, sae.b_enc: done.gradients.b_enc, sae.W_dec: done.gradients.W_dec}
        gradient_norm = done.gradient_norm
        divisor = ((gradient_norm + 1e-6) / _MAX_GRAD_NORM).clamp(min=1.0)
        divisor = divisor.to(torch.promote_types(sae.W_dec.dtype, torch.float32))
        sae.b_dec.grad = done.gradients.b_dec / divisor
        if isinstance(optimizer, SparseAdam):
            for param, gradient in by_row.items():
                optimizer.row_gradients[param] = gradient._replace(divisor=divisor)
            if encoder.scale is not None:
                optimizer.row_norms[sae.W_dec] = encoder.scale
        else:
            _spread(sae, by_row, divisor, workspace)
        optimizer.step()
        if isinstance(optimizer, SparseAdam):
            # Right after the optimizer's own move: what a hook of its step has written since counts as written.
            self._decoder_seen = (sae.W_dec.data_ptr(), optimizer.moved_versions.get(sae.W_dec))
        optimizer.zero_grad()
        if self.screen is None:  # Adam has moved every row
            self.decoder_norms = None
        else:
            # Rows, bias and norms are moved in place: the encoder shows them as they are now.
            self.screen.rows_changed(encoder, done.gradients.W_enc.rows)
        return gradient_norm

    def current_decoder_norms(self, sae: TopKTrainingSAE) -> Tensor | None:
        """Norms of the decoder rows: those of the last step, unless someone else has written to the decoder since.

        That shows in the version of the tensor. What is written through ``.data`` shows in no version: ``invalidate``
        is there to say it, and a part of the rows that moves on with each step, compared with its norms, finds it
        within 32 steps otherwise.
        """
        if not sae.cfg.rescale_acts_by_decoder_norm:
            return None
        W_dec = sae.W_dec.detach()
        now = (W_dec.data_ptr(), W_dec._version)
        if self.decoder_norms is None or self._decoder_seen != now or not self._next_stripe_fits(W_dec):
            self.decoder_norms, self._decoder_seen = row_norms(W_dec), now
        return self.decoder_norms

    def _next_stripe_fits(self, W_dec: Tensor) -> bool:
        """Whether the norms of some rows are those that are kept; of other rows each time."""
        if self.decoder_norms is None or self.decoder_norms.shape[0] != W_dec.shape[0]:
            return False
        size = -(-W_dec.shape[0] // _NORM_STRIPES)
        rows = slice(self._stripe * size, (self._stripe + 1) * size)
        self._stripe = (self._stripe + 1) % _NORM_STRIPES
        found, kept = row_norms(W_dec[rows]), self.decoder_norms[rows]
        # On a CPU a row's norm has the same bits among whichever others; elsewhere the order of the sum may differ.
        return (
            torch.equal(found, kept) if found.device.type == "cpu" else torch.allclose(found, kept, rtol=1e-5, atol=0)
        )

    @contextmanager
    def rows_written(self, sae: TopKTrainingSAE, rows: Tensor) -> Iterator[None]:
        """Within it some rows of encoder and decoder are written, and nothing else: what is kept of them is renewed."""
        W_dec = sae.W_dec.detach()
        is_known = self.decoder_norms is None or self._decoder_seen == (W_dec.data_ptr(), W_dec._version)
        if self.screen is not None:
            is_known &= self.screen.knows(encoder_of(sae, self.decoder_norms))
        yield
        self._fused.invalidate()
        if not is_known:  # somebody else has written before
            self.invalidate()
            return
        if self.decoder_norms is not None:
            update_row_norms_(self.decoder_norms, W_dec, rows)
            self._decoder_seen = (W_dec.data_ptr(), sae.W_dec._version)
        if self.screen is not None:
            self.screen.rows_changed(encoder_of(sae, self.decoder_norms), rows)

    def invalidate(self) -> None:
        """Forget what is kept of the weights, after somebody has written to them through ``.data``."""
        self.decoder_norms = self.screen = self._decoder_seen = None
        self._fused.invalidate()

    def _lay_out_by_feature(self, sae: nn.Module, optimizer: Optimizer) -> None:
        W_enc = dict(sae.named_parameters(recurse=False, remove_duplicate=False)).get("W_enc")
        if W_enc is None or W_enc.ndim != 2:
            return
        if self._laid_out is None:
            self._laid_out = _FeatureLayout(sae)
        self._laid_out.apply_(W_enc, optimizer)

    def finish(self) -> None:
        """Leave the SAE as SAELens made it: an ordinary layout in memory, and no hook. A further step starts anew."""
        self.invalidate()
        self._workspace = None
        if self._laid_out is not None:
            self._laid_out.undo_()
            self._laid_out = None


def _spread(
    sae: TopKTrainingSAE, by_row: Mapping[nn.Parameter, RowGradient], divisor: Tensor, workspace: Workspace
) -> None:
    """Whole gradients for an optimizer that moves every row; they last until the next step of any SAE."""
    for i, (param, (rows, values, _)) in enumerate(by_row.items()):
        row_dim = int(param is sae.W_enc)
        whole = workspace.take(f"whole gradient {i}", param.movedim(row_dim, 0).shape, param).zero_()
        whole.index_copy_(0, rows, values.to(whole.dtype) / divisor)
        param.grad = whole.movedim(0, row_dim)


class _FeatureLayout:
    """``W_enc`` and its moments with what belongs to a feature side by side in memory; shapes stay as they are.

    Files are written from contiguous copies, which a hook of ``state_dict`` makes.
    """

    def __init__(self, sae: nn.Module) -> None:
        self._sae = sae
        self._hook = sae.register_state_dict_post_hook(_contiguous_state)

    def apply_(self, W_enc: nn.Parameter, optimizer: Optimizer) -> None:
        # Looked at in every step: a loaded optimizer state, or SAELens's own step, brings back the ordinary layout.
        for tensor in (W_enc, *(optimizer.state[W_enc].get(key) for key in ("exp_avg", "exp_avg_sq"))):
            if tensor is not None and not tensor.detach().t().is_contiguous():
                tensor.data = tensor.data.t().contiguous().t()

    def undo_(self) -> None:
        self._hook.remove()
        W_enc = self._sae.get_parameter("W_enc")
        W_enc.data = W_enc.data.contiguous()


def _contiguous_state(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, metadata: object) -> None:
    state_dict[f"{prefix}W_enc"] = state_dict[f"{prefix}W_enc"].contiguous()


def make_optimizer(cfg: SAETrainerConfig, sae: AnyTrainingSAE) -> SparseAdam:
    """The optimizer of a run with ``optimizer="sparse_adam"``, at SAELens's settings for its own."""
    if torch.device(cfg.device).type == "cpu":
        load_kernels()  # here rather than in the first step: the first time, they are compiled
    return SparseAdam(
        [{**group} for group in feature_row_groups(sae)],
        lr=cfg.lr,
        betas=(cfg.adam_beta1, cfg.adam_beta2),
        silent_moments=sae.cfg.silent_moments,
    )


def check_moments(sae: AnyTrainingSAE) -> None:
    """Raise ValueError where the optimizer has no choice in what becomes of the moments of silent features."""
    default = FLAGS["silent_moments"]
    if sae.cfg.silent_moments != default and sae.cfg.optimizer != "sparse_adam":
        raise ValueError(
            f"silent_moments={sae.cfg.silent_moments!r} is of optimizer='sparse_adam', and optimizer="
            f"{sae.cfg.optimizer!r} moves every feature in every step: set optimizer='sparse_adam', or "
            f"silent_moments={default!r}, the default"
        )
