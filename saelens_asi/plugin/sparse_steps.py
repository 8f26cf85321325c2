"""Training steps on the sparse path where the SAE allows it, and SAELens's own otherwise; SparseAdam, and Adam."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from sae_lens.training.optim import get_lr_scheduler
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor, nn
from torch.optim import Adam

from saelens_asi.plugin.topk_pass import SparsePass, dense_path_reason, encoder_of, is_topk, sparse_pass
from saelens_asi.sparse.kernels import load_kernels
from saelens_asi.sparse.rows import RowGradient, Workspace, row_norms
from saelens_asi.sparse.screens import AdaptiveScreen
from saelens_asi.sparse_adam import SparseAdam

logger = logging.getLogger(__name__)

_MAX_GRAD_NORM = 1.0  # SAELens's own, which is no setting there either


class SparseTrainer(SAETrainer[Any, Any]):
    """A SAELens trainer whose steps cost what their active features cost; with Adam, all but the optimizer's part."""

    _workspace: Workspace | None = None
    _decoder_norms: Tensor | None = None
    _screen: AdaptiveScreen | None = None
    _reason_given: str | None = None
    _layout_hook: Any = None
    _dense_gradients: dict[Tensor, Tensor]
    gradient_norm: Tensor | None = None  # of the last step on the sparse path, before clipping

    def use_sparse_adam(self) -> None:
        """Replace the optimizer that SAELens built, and the schedule that moves its learning rate."""
        cfg = self.cfg
        betas = (cfg.adam_beta1, cfg.adam_beta2)
        if torch.device(cfg.device).type == "cpu":
            load_kernels()  # here rather than in the first step: the first time, they are compiled
        self.optimizer = SparseAdam(feature_row_groups(self.sae), lr=cfg.lr, betas=betas)
        self.lr_scheduler = get_lr_scheduler(
            cfg.lr_scheduler_name,
            lr=cfg.lr,
            optimizer=self.optimizer,
            warm_up_steps=cfg.lr_warm_up_steps,
            decay_steps=cfg.lr_decay_steps,
            training_steps=cfg.total_training_steps,
            lr_end=cfg.lr_end,
            num_cycles=cfg.n_restart_cycles,
        )

    def _train_step(self, sae: Any, sae_in: Tensor) -> TrainStepOutput:
        if type(self.optimizer) not in (SparseAdam, Adam):
            return super()._train_step(sae, sae_in)
        reason = self._dense_path_reason(sae, sae_in)
        if reason is None or isinstance(self.optimizer, SparseAdam):
            self._lay_out_by_feature()
        if reason is not None:
            self._decoder_norms = self._screen = None
            return super()._train_step(sae, sae_in)
        return self._sparse_step(sae, sae_in)

    def _dense_path_reason(self, sae: Any, sae_in: Tensor) -> str | None:
        """Why this step is SAELens's own. Said once for an SAE of the TopK family, which could do better."""
        if not is_topk(sae):
            return "only TopK architectures are sparse"
        reason = dense_path_reason(sae, sae_in)
        if reason is None and super()._train_step.__func__ is not SAETrainer._train_step:  # type: ignore[attr-defined]
            reason = f"{type(self).__name__} has a _train_step of its own"
        if reason is not None and reason != self._reason_given:
            logger.warning("training steps take SAELens's dense path: %s", reason)
            self._reason_given = reason
        return reason

    def _sparse_step(self, sae: Any, sae_in: Tensor) -> TrainStepOutput:
        """The counterpart of ``SAETrainer._train_step``, line by line."""
        if self._workspace is None:
            self._workspace, self._dense_gradients = Workspace(), {}
        if isinstance(self.optimizer, SparseAdam):
            self._screen = self._screen or AdaptiveScreen()
        sae.train()
        with self.autocast_if_enabled:
            step_input = TrainStepInput(
                sae_in=sae_in,
                dead_neuron_mask=self.dead_neurons,
                coefficients=self.get_coefficients(),
                n_training_steps=self.n_training_steps,
                is_logging_step=self._is_logging_step(),
            )
            norms = self._current_decoder_norms(sae)
            done = sparse_pass(sae, step_input, norms, self._workspace, self._screen)
        self._count_firings(done.firings)
        self._apply(sae, done)
        self.lr_scheduler.step()
        for scheduler in self.coefficient_schedulers.values():
            scheduler.step()
        return done.output

    @torch.no_grad()
    def _count_firings(self, firings: Tensor) -> None:
        self.n_forward_passes_since_fired += 1
        self.n_forward_passes_since_fired[firings > 0] = 0
        self.act_freq_scores += firings
        self.n_frac_active_samples += self.cfg.train_batch_size_samples

    @torch.no_grad()
    def _apply(self, sae: Any, done: SparsePass) -> None:
        """Clip the gradients, move the rows that have one, and bring their norms up to date."""
        by_row = {sae.W_enc: done.gradients.W_enc, sae.b_enc: done.gradients.b_enc, sae.W_dec: done.gradients.W_dec}
        self.gradient_norm = done.gradients.norm()
        divisor = ((self.gradient_norm + 1e-6) / _MAX_GRAD_NORM).clamp(min=1.0).float()
        sae.b_dec.grad = done.gradients.b_dec / divisor
        if isinstance(self.optimizer, SparseAdam):
            for param, gradient in by_row.items():
                self.optimizer.row_gradients[param] = gradient._replace(divisor=divisor)
            if self._decoder_norms is not None:
                self.optimizer.row_norms[sae.W_dec] = self._decoder_norms
        else:
            self._spread(by_row, divisor)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self._screen is None:  # Adam has moved every row
            self._decoder_norms = None
            return
        self._screen.rows_changed(encoder_of(sae, self._decoder_norms), done.gradients.W_enc.rows)

    def _spread(self, by_row: Mapping[Tensor, RowGradient], divisor: Tensor) -> None:
        """Whole gradients for an optimizer that moves every row."""
        for param, (rows, values, _) in by_row.items():
            whole = self._dense_gradients.get(param)
            whole = self._dense_gradients[param] = torch.zeros_like(param) if whole is None else whole.zero_()
            whole.movedim(int(param is self.sae.W_enc), 0).index_copy_(0, rows, values.to(whole.dtype) / divisor)
            param.grad = whole

    def _current_decoder_norms(self, sae: Any) -> Tensor | None:
        """Norms of the decoder rows: those of the last step, unless someone else has written to the decoder since."""
        if not sae.cfg.rescale_acts_by_decoder_norm:
            return None
        W_dec = sae.W_dec.detach()
        sample = slice(None, None, max(1, W_dec.shape[0] // 64))
        known = self._decoder_norms
        if known is None or not torch.allclose(known[sample], row_norms(W_dec[sample]), rtol=1e-5, atol=0):
            self._decoder_norms = row_norms(W_dec)
        return self._decoder_norms

    def _lay_out_by_feature(self) -> None:
        """Keep ``W_enc`` and its moments so that what belongs to a feature lies together; shapes stay as they are.

        Files are written from contiguous copies, which a hook of ``state_dict`` makes.
        """
        W_enc = self.sae._parameters.get("W_enc")
        if W_enc is None or W_enc.ndim != 2:
            return
        for tensor in (W_enc, *(self.optimizer.state[W_enc].get(key) for key in ("exp_avg", "exp_avg_sq"))):
            if tensor is not None and not tensor.t().is_contiguous():
                tensor.data = tensor.data.t().contiguous().t()
        if self._layout_hook is None:
            self._layout_hook = self.sae.register_state_dict_post_hook(_contiguous_state)

    def finish_sparse_steps(self) -> None:
        """Leave the SAE as SAELens made it: an ordinary layout in memory, and no hook."""
        self._workspace = self._decoder_norms = self._screen = None
        self._dense_gradients = {}
        if self._layout_hook is not None:
            self._layout_hook.remove()
            self._layout_hook = None
            self.sae.W_enc.data = self.sae.W_enc.data.contiguous()

    def set_final_sae_metadata(self) -> None:
        super().set_final_sae_metadata()
        self.finish_sparse_steps()


def feature_row_groups(sae: Any) -> list[dict[str, Any]]:
    """Parameter groups for ``SparseAdam``: every parameter with the dimension along which its features lie.

    SAELens names the large ones: ``W_dec`` (d_sae, d_in), ``W_enc`` (d_in, d_sae), ``b_dec`` (d_in,). Any other
    parameter is split along the one dimension that has the size d_sae; without one it is updated as a whole.
    """
    d_sae = sae.cfg.d_sae
    known = {"W_dec": 0, "W_enc": 1, "b_dec": None}
    by_dim: dict[int | None, list[nn.Parameter]] = {}
    for name, param in sae.named_parameters():
        dims = [dim for dim, size in enumerate(param.shape) if size == d_sae]
        row_dim = known[name] if name in known else dims[0] if len(dims) == 1 else None
        by_dim.setdefault(row_dim, []).append(param)
    return [{"params": params, "row_dim": row_dim} for row_dim, params in by_dim.items()]


def _contiguous_state(module: Any, state_dict: dict[str, Any], prefix: str, metadata: Mapping[str, Any]) -> None:
    state_dict[f"{prefix}W_enc"] = state_dict[f"{prefix}W_enc"].contiguous()
