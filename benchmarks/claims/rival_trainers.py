"""Rivals that are SAELens's own trainer with something done around its steps: data, schedule and clock of a sweep."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from sae_lens import SAETrainer, TrainingSAE
from torch import Tensor

from saelens_asi import SparseAdam
from saelens_asi.sweep.cells import Cell
from saelens_asi.sweep.run import (
    SweepTraining,
    Watch,
    _batches,
    _StopWatch,
    _trainer_config,
    _untrained,
    training_record,
)

# Of SAELens's own default, which a short run does not have.
_MAX_ESTIMATE_BATCHES = 1000


@dataclass(frozen=True)
class Run:
    """What a rival is trained on.

    Attributes:
        cell: with the changes of the rival.
        training: what all cells share.
        activations: (n, d_in), raw.
        setting: the rival's own knob.
    """

    cell: Cell
    training: SweepTraining
    activations: Tensor
    setting: float


class Method:
    """What is done around the steps of a trainer; by itself nothing, which is ``train_cell``.

    Attributes:
        normalization: of SAELens, ``normalize_activations``.
    """

    normalization = "none"

    def __init__(self, trainer: SAETrainer[Any, Any], run: Run) -> None:
        self.trainer, self.run = trainer, run
        self.sae = trainer.sae

    def between(self, step: int) -> None:
        """Called when ``step`` steps are done, the weights initialised: before each step, and after the last."""

    def as_it_is(self) -> AbstractContextManager[TrainingSAE[Any]]:
        """The SAE of raw activations, with k features, that the run would give if it ended between these steps."""
        return contextlib.nullcontext(self.sae)


def train_with(method_class: type[Method], run: Run, watch: Watch | None) -> tuple[TrainingSAE[Any], dict[str, float]]:
    """The counterpart of ``train_cell``; what the method does counts as its time, what ``watch`` does not."""
    cell, training, activations = run.cell, run.training, run.activations
    torch.manual_seed(cell.seed)
    sae = _untrained(cell, activations.shape[1], training.device)
    sae.cfg.normalize_activations = method_class.normalization
    n_estimate = _n_estimate_batches(run) if sae.cfg.normalize_activations == "covariance_whitening" else 0
    config = replace(_trainer_config(cell, training), n_batches_for_norm_estimate=n_estimate)
    stop = _StopWatch()

    def batches() -> Iterator[Tensor]:
        for step, batch in enumerate(_batches(activations, training)):
            method.between(step)
            if step and watch:
                stop.halt()
                with method.as_it_is() as seen:
                    watch(step * training.batch_size, seen)
                stop.go_on()
            yield batch

    # Estimates read the same activations that training reads next.
    settings = cell.initializer_settings()
    n_subspace = 0 if settings is None else settings.tokens_for(activations.shape[1])
    estimates = (
        itertools.islice(_batches(activations, training), n_estimate),
        _batches(activations, training, n_subspace) if n_subspace else (),
    )
    trainer = SAETrainer(config, sae, itertools.chain(*estimates, batches()))
    method = method_class(trainer, run)
    stop.go_on()
    trainer.fit()
    method.between(training.steps)
    return trainer.sae, training_record(trainer.sae, stop)


def _n_estimate_batches(run: Run) -> int:
    return max(1, min(_MAX_ESTIMATE_BATCHES, len(run.activations) // run.training.batch_size))


class Whitening(Method):
    """SAELens's ``normalize_activations="covariance_whitening"`` (arXiv 2511.13981).

    Mean and covariance are estimated by SAELens on all activations there are, 1,000 batches at most as by its default.
    It trains on whitened activations, and so on their squared error; at the end it folds the whitening into the
    weights. What is watched is a copy that is folded alike.
    """

    normalization = "covariance_whitening"

    @contextlib.contextmanager
    def as_it_is(self) -> Iterator[TrainingSAE[Any]]:
        yield folded(self.sae, self.trainer)


def folded(sae: TrainingSAE[Any], trainer: SAETrainer[Any, Any]) -> TrainingSAE[Any]:
    """A copy of an SAE of whitened activations that takes raw ones."""
    whitening = trainer.activation_scaler.whitening
    if whitening is None:
        raise ValueError("nothing is whitened: the estimate comes with the trainer's fit()")
    raw = copy.deepcopy(sae)
    with torch.no_grad():
        raw.fold_activation_whitening(whitening.mean, whitening.matrix, whitening.inverse_matrix)
    return raw


class Aligned(Method):
    """Aligned Training (arXiv 2605.18629): <encoder row, decoder row> = 1 for each feature.

    Of the paper its abstract alone was at hand, and no code: a reparameterization that "enforces a geometric constraint
    between the encoder and decoder such that their inner product equals one for every feature". Here it is the one that
    changes least: the encoder row e is the point of a free row v that meets the constraint and lies nearest to it,
    e = v + (1 - <v, d>) d / |d|^2 with the decoder row d. Gradients go through it, and v starts from e in each step.
    The SAE starts with tied rows of norm 1, which meet it as they are.
    """

    def __init__(self, trainer: SAETrainer[Any, Any], run: Run) -> None:
        super().__init__(trainer, run)
        trainer.optimizer.register_step_pre_hook(lambda *_: align_gradients_(self.sae))

    def between(self, step: int) -> None:
        align_(self.sae)


@torch.no_grad()
def align_(sae: TrainingSAE[Any]) -> None:
    """Move each encoder row along its decoder row until their inner product is 1."""
    missing = 1 - torch.linalg.vecdot(sae.W_enc.t(), sae.W_dec)
    sae.W_enc.t().addcmul_(sae.W_dec, (missing / _squares(sae.W_dec)).unsqueeze(1))


@torch.no_grad()
def align_gradients_(sae: TrainingSAE[Any]) -> None:
    """From gradients by rows that are aligned to those by the free rows behind, and by decoder rows through both.

    At v = e the derivative of e by v is 1 - d d^T / |d|^2, and by d it is -d e^T / |d|^2, transposed.
    """
    encoder, decoder = sae.W_enc.t(), sae.W_dec
    if sae.W_enc.grad is None or decoder.grad is None:
        raise ValueError("no gradients to align: this needs an optimizer of whole gradients, as optimizer='adam'")
    along = (torch.linalg.vecdot(sae.W_enc.grad.t(), decoder) / _squares(decoder)).unsqueeze(1)
    sae.W_enc.grad.t().addcmul_(decoder, along, value=-1)
    decoder.grad.addcmul_(encoder, along, value=-1)


def _squares(rows: Tensor) -> Tensor:
    return rows.square().sum(dim=1).clamp(min=torch.finfo(rows.dtype).tiny)


class KAnnealing(Method):
    """k falls from the width of the activations to the cell's, as ``k_anneal_steps`` has it in dictionary_learning.

    https://github.com/saprmarks/dictionary_learning, ``trainers/top_k.py``, ``update_annealed_k``: in step t of
    ``k_anneal_steps``, S, k is the whole part of d_in (1 - t/S) + k t/S. There the very first step has the last k
    already, since k is set after a step; here it has d_in. By default it is off there; S is a share of the run here,
    the setting. What is watched has the cell's k.
    """

    def between(self, step: int) -> None:
        self.sae.activation_fn.k = self.k_of(step)

    def k_of(self, step: int) -> int:
        cell, training = self.run.cell, self.run.training
        last = max(1, round(self.run.setting * training.steps))
        done = min(step, last) / last
        return int(min(self.sae.cfg.d_in, cell.d_sae) * (1 - done) + cell.k * done)

    @contextlib.contextmanager
    def as_it_is(self) -> Iterator[TrainingSAE[Any]]:
        k, self.sae.activation_fn.k = self.sae.activation_fn.k, self.run.cell.k
        try:
            yield self.sae
        finally:
            self.sae.activation_fn.k = k


class AuthorsSparseAdam(Method):
    """SparseAdam as released by the authors of arXiv 2508.16929.

    https://github.com/OpenMOSS/Language-Model-SAEs, ``src/llamascopium/optim.py``: the moments of silent entries decay
    by their beta each step, eps is added before the bias correction, which counts the steps of the whole parameter.
    Theirs looks at entries, ours at rows: the two differ where an active row has an entry of gradient exactly 0, and in
    a step in which a whole parameter has no other, which theirs does not count.
    Clipping stays SAELens's; theirs divides the norm by the root of the number of entries that are not zero.
    """

    def __init__(self, trainer: SAETrainer[Any, Any], run: Run) -> None:
        super().__init__(trainer, run)
        use_authors_options_(trainer.optimizer)


def use_authors_options_(optimizer: torch.optim.Optimizer) -> None:
    if not isinstance(optimizer, SparseAdam):
        raise ValueError(f"{type(optimizer).__name__} is no SparseAdam: set optimizer='sparse_adam' in the cell")
    for group in optimizer.param_groups:
        group.update(silent_moments="decay", eps_placement="sparse_adam", bias_correction="global")


# When Resampling looks for dead features, as shares of a run; Bricken et al. do at 25,000, 50,000, 75,000 and 100,000
# steps of theirs, which go on for as long again.
RESAMPLED_AT = (1 / 8, 1 / 4, 3 / 8, 1 / 2)
# Inputs that take the place of dead features are drawn from so many (there 819,200), or more where more are dead.
_N_CANDIDATES = 16_384
_CHUNK = 1024


class Resampling(Method):
    """Dead features begin anew as inputs that are reconstructed badly, as in Bricken et al. 2023.

    Towards Monosemanticity, appendix, "Neuron resampling" (and ``trainers/standard.py`` in dictionary_learning): at
    fixed steps, here ``RESAMPLED_AT``, features that were silent for the last half of the stretch before are given
    inputs, drawn with probability proportional to the square of their loss: of 16,384 candidates, or, where more
    features are dead, of as many as these, which are then all taken. The decoder row becomes the direction of
    the input, the encoder row the same at 0.2 times (the setting) the mean norm of live encoder rows, the encoder's
    bias 0, and both moments of them all 0. Learning rate and step count of Adam go on.

    What differs there follows from the SAE: the loss is the squared error alone, without an L1 term; an input is taken
    relative to the decoder bias, as the encoder takes it; and decoder rows, which have norm 1 there, get the mean norm
    of the live ones. A short encoder row, which any ReLU lets in, has to be among the k highest scores here; longer
    rows are let in, and push out more than they are (2,048 features, centre at zeros: 52 % dead at 0.2, 71 % at 0.5,
    81 % at 1.0).
    """

    def __init__(self, trainer: SAETrainer[Any, Any], run: Run) -> None:
        super().__init__(trainer, run)
        self._generator = torch.Generator().manual_seed(run.cell.seed)
        steps = sorted({round(share * run.training.steps) for share in RESAMPLED_AT} - {0})
        self._stretches = dict(
            zip(steps, (now - before for before, now in itertools.pairwise([0, *steps])), strict=True)
        )
        self.n_resampled = 0

    def between(self, step: int) -> None:
        stretch = self._stretches.get(step)
        if stretch is not None:
            silent = self.trainer.n_forward_passes_since_fired
            self.n_resampled += self.resample_(silent >= max(1, stretch // 2))

    @torch.no_grad()
    def resample_(self, is_dead: Tensor) -> int:
        """Give inputs to dead features, as many as there are inputs for; returns to how many."""
        dead = is_dead.nonzero().squeeze(1)
        inputs = self._badly_reconstructed(len(dead))
        dead = dead[: len(inputs)]
        if len(dead) == 0:
            return 0
        sae, live = self.sae, ~is_dead if not bool(is_dead.all()) else is_dead
        encoder_norm = sae.W_enc.norm(dim=0)[live].mean()
        decoder_norm = sae.W_dec.norm(dim=1)[live].mean()
        directions = torch.nn.functional.normalize(inputs - sae.b_dec, dim=1)
        sae.W_dec[dead] = directions * decoder_norm
        sae.W_enc[:, dead] = directions.t() * encoder_norm * self.run.setting
        sae.b_enc[dead] = 0.0
        reset_moments_(self.trainer.optimizer, {sae.W_enc: 1, sae.b_enc: 0, sae.W_dec: 0}, dead)
        self.trainer.n_forward_passes_since_fired[dead] = 0
        return len(dead)

    def _badly_reconstructed(self, n: int) -> Tensor:
        """``n`` different inputs, or as many as have an error, by the square of their squared error.

        Of as many candidates as are wanted all are taken, and it does not matter what their errors are.
        """
        data, device = self.run.activations, self.sae.W_dec.device
        drawn = torch.randperm(len(data), generator=self._generator)[: max(n, _N_CANDIDATES)] if n else torch.arange(0)
        if len(drawn) <= n:
            return data[drawn].float().to(device)
        losses = []
        for rows in torch.split(drawn, _CHUNK):
            x = data[rows].float().to(device)
            # A sparse product: with many features a dense one takes most of the time.
            reconstruction = self.sae.decode(self.sae.encode(x).to_sparse())
            losses.append((x - reconstruction).square().sum(dim=1).cpu())
        chances = torch.cat(losses).double().square()
        n = min(n, int(chances.count_nonzero()))
        chosen = drawn[torch.multinomial(chances, n, generator=self._generator)] if n else drawn[:0]
        return data[chosen].float().to(device)


def reset_moments_(optimizer: torch.optim.Optimizer, feature_dims: dict[Tensor, int], features: Tensor) -> None:
    """Set both moments of some features to 0; a parameter without a state yet has none."""
    for param, dim in feature_dims.items():
        for name in ("exp_avg", "exp_avg_sq"):
            moment = optimizer.state[param].get(name) if param in optimizer.state else None
            if moment is not None:
                moment.index_fill_(dim, features, 0.0)
