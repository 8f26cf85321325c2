"""EleutherAI's sparsify as a rival: its own coder, optimizer, loss and learning rate, on the data of a sweep."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
from torch import Tensor

from benchmarks.claims.rival_trainers import Run
from saelens_asi.sweep.run import Watch, _batches, _StopWatch

INSTALL = "pip install --no-deps eai-sparsify==1.3.3 natsort schedulefree"

# The defaults of sparsify/trainer.py, where they are written into the code: of the schedule-free momentum, and of the
# Multi-TopK loss.
_MOMENTUM = 0.95
_MULTI_TOPK_WEIGHT = 1 / 8
# The rate of a cell that stands for sparsify's own.
_OWN_LR = 1e-3


def sparsify_lr(d_sae: int, lr: float = _OWN_LR) -> float:
    """sparsify's own for Signum, 5e-3 at 16,384 features and by the root of their number, times lr / 1e-3."""
    return lr / _OWN_LR * 5e-3 / math.sqrt(d_sae / 2**14)


def train_sparsify(run: Run, watch: Watch | None) -> tuple[TopKTrainingSAE, dict[str, float]]:
    """Train a ``SparseCoder`` as ``sparsify.Trainer`` does by default, with ``multi_topk=True``.

    https://github.com/EleutherAI/sparsify, PyPI eai-sparsify 1.3.3. That is: encoder as ``nn.Linear`` makes it, decoder
    its rows at norm 1, which is restored before each step; decoder bias the mean of the first batch; loss the fraction
    of variance unexplained plus an eighth of that with 4 k features; Signum, which is sign descent with schedule-free
    momentum 0.95. Being schedule-free it has no warm-up and no decay, and so has none here. Its fused encoder has no
    gradient for what is not among the k features: the Multi-TopK loss trains the decoder alone, in this version.

    Of the cell, ``d_sae``, ``k``, ``seed`` and ``lr`` (see ``sparsify_lr``) count.
    """
    cell, training = run.cell, run.training
    if cell.architecture != "topk":
        raise ValueError(f"architecture={cell.architecture!r}: sparsify's Multi-TopK is a 'topk'")
    torch.manual_seed(cell.seed)
    coder, optimizer = _coder_and_optimizer(run)
    stop = _StopWatch()
    stop.go_on()
    for step, batch in zip(range(training.steps), _batches(run.activations, training), strict=False):
        x = batch.to(training.device)
        if step == 0:
            coder.b_dec.data = x.mean(0)
        elif watch:
            stop.halt()
            with _settled(optimizer):
                watch(step * training.batch_size, as_saelens(coder))
            stop.go_on()
        coder.set_decoder_norm_to_unit_norm()
        out = coder(x)
        (out.fvu + _MULTI_TOPK_WEIGHT * out.multi_topk_fvu).backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
    seconds = {name: round(value, 1) for name, value in stop.halt().items()}
    with _settled(optimizer):
        return as_saelens(coder), seconds


def _coder_and_optimizer(run: Run) -> tuple[Any, Any]:
    if run.training.device == "cpu":
        os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # whose kernels it would take on a CPU too, where there is Triton
    try:
        from schedulefree import ScheduleFreeWrapper
        from sparsify.config import SparseCoderConfig
        from sparsify.sign_sgd import SignSGD
        from sparsify.sparse_coder import SparseCoder
    except ImportError as error:
        raise ImportError(f"this rival needs sparsify ({error}): {INSTALL}") from error
    cell, d_in = run.cell, run.activations.shape[1]
    config = SparseCoderConfig(num_latents=cell.d_sae, k=cell.k, multi_topk=True)
    coder = SparseCoder(d_in, config, run.training.device, torch.float32)
    signs = SignSGD(coder.parameters(), lr=sparsify_lr(cell.d_sae, cell.lr))
    optimizer = ScheduleFreeWrapper(signs, momentum=_MOMENTUM)
    optimizer.train()
    return coder, optimizer


@contextmanager
def _settled(optimizer: Any) -> Iterator[None]:
    """With the weights that a schedule-free optimizer gives out, its averages, in place of those that it trains at."""
    optimizer.eval()
    try:
        yield
    finally:
        optimizer.train()


@torch.no_grad()
def as_saelens(coder: Any) -> TopKTrainingSAE:
    """The same function as an SAE of SAELens; a copy."""
    d_in, k, device = coder.d_in, coder.cfg.k, str(coder.device)
    config = TopKTrainingSAEConfig(
        d_in=d_in,
        d_sae=coder.num_latents,
        k=k,
        device=device,
        rescale_acts_by_decoder_norm=False,  # which features are active goes by the encoder alone
        aux_loss_coefficient=0.0,
    )
    sae = TopKTrainingSAE(config)
    weights: dict[str, Tensor] = {
        "W_enc": coder.encoder.weight.t(),
        "b_enc": coder.encoder.bias,
        "W_dec": coder.W_dec,
        "b_dec": coder.b_dec,
    }
    for name, values in weights.items():
        getattr(sae, name).copy_(values)
    return sae
