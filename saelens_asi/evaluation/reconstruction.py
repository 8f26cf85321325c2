"""What an SAE makes of vectors: of the product with all features only those are decoded that fire."""

from __future__ import annotations

from collections.abc import Callable

import torch
from sae_lens import SAE
from sae_lens.saes.abstopk_sae import AbsTopK, AbsTopKSAE, AbsTopKTrainingSAE
from sae_lens.saes.jumprelu_sae import JumpReLUSAE
from sae_lens.saes.topk_sae import TopK, TopKSAE, TopKTrainingSAE
from torch import Tensor, nn
from torch.nn.functional import embedding_bag

from saelens_asi.activations.sae_state import has_hooks, replaced_methods, stock_methods
from saelens_asi.evaluation.metrics import RunningReconstruction
from saelens_asi.sparse.topk import top_k

# Vectors (n, d_in) to their reconstructions (n, d_in), and how often each feature fired on them (d_sae,).
Reconstruct = Callable[[Tensor], tuple[Tensor, Tensor]]

_METHODS = ("encode", "encode_with_hidden_pre", "decode", "process_sae_in")
_FAMILY = (TopKSAE, AbsTopKSAE, TopKTrainingSAE, AbsTopKTrainingSAE)
_STOCK = stock_methods((*_FAMILY, JumpReLUSAE), _METHODS)

# Values of a dense (tokens x d_sae) activation matrix made at a time.
_MAX_DENSE_VALUES = 2**25

# Share of the features that fire, from which on the product with all decoder rows is as fast as the sum of theirs. (Of
# 5 % the sum takes half as long, on a core with AVX-512.)
_DENSE_SHARE = 0.1


@torch.no_grad()
def measure_(running: RunningReconstruction, sae: SAE, x: Tensor) -> RunningReconstruction:
    """Add vectors (n, d_in) and what a SAELens SAE makes of them; each is encoded once."""
    reconstruct = sparse_reconstruction(sae) or (lambda chunk: _dense_reconstruction(sae, chunk))
    for chunk in x.to(sae.device).split(chunk_size(sae)):
        running.update_(chunk, *reconstruct(chunk))
    return running


def _dense_reconstruction(sae: SAE, x: Tensor) -> tuple[Tensor, Tensor]:
    acts = sae.encode(x)
    acts = acts.to_dense() if acts.is_sparse else acts
    return sae.decode(acts), (acts != 0).sum(dim=0)


def chunk_size(sae: SAE) -> int:
    """As many tokens at a time as memory should hold activations of."""
    return max(1, _MAX_DENSE_VALUES // sae.cfg.d_sae)


def sparse_reconstruction(sae: SAE) -> Reconstruct | None:
    """What ``sae.decode(sae.encode(x))`` and its non-zero activations are; None but for stock TopK, AbsTopK, JumpReLU.

    Pre-activations are SAELens's, to the bit, and so is what fires, but for which of equal ones TopK takes. Then only
    the features that fire are counted and decoded: over (n, d_sae) there is one product and a pass that compares.
    """
    if type(sae) not in _STOCK or sae.dtype.itemsize < 4:
        return None
    if replaced_methods(sae, _STOCK) or any(has_hooks(module, backward=False) for module in sae.modules()):
        return None
    if type(sae) is JumpReLUSAE:
        return _of_jumprelu(sae) if type(sae.activation_fn) is nn.ReLU else None
    return _of_topk(sae) if type(sae.activation_fn) in (TopK, AbsTopK) else None


def _scores(sae: SAE, x: Tensor) -> Tensor:
    return sae.process_sae_in(x) @ sae.W_enc + sae.b_enc


def _finished(sae: SAE, output: Tensor) -> Tensor:
    return sae.reshape_fn_out(sae.run_time_activation_norm_fn_out(output + sae.b_dec), sae.d_head)


def _of_topk(sae: SAE) -> Reconstruct:
    norms = sae.W_dec.norm(dim=-1) if sae.cfg.rescale_acts_by_decoder_norm else None
    by_magnitude = type(sae.activation_fn) is AbsTopK

    def reconstruct(x: Tensor) -> tuple[Tensor, Tensor]:
        scores = _scores(sae, x)
        if norms is not None:
            scores = scores * norms
        selected = top_k(scores.abs() if by_magnitude else scores, sae.activation_fn.k)
        values = scores.gather(1, selected.indices) if by_magnitude else selected.scores.relu()
        firings = torch.bincount(selected.indices[values != 0], minlength=sae.cfg.d_sae)
        if norms is not None:
            values = values / norms[selected.indices]
        output = embedding_bag(selected.indices, sae.W_dec, mode="sum", per_sample_weights=values)
        return _finished(sae, output), firings

    return reconstruct


def _of_jumprelu(sae: SAE) -> Reconstruct:
    threshold = sae.threshold.clamp(min=0)  # of ReLU

    def reconstruct(x: Tensor) -> tuple[Tensor, Tensor]:
        scores = _scores(sae, x)
        fires = (scores <= threshold).logical_not_()  # NaN too, as in SAELens
        tokens, features = fires.nonzero(as_tuple=True)
        firings = torch.bincount(features, minlength=sae.cfg.d_sae)
        if len(features) > _DENSE_SHARE * fires.numel():
            return sae.decode(scores.mul_(fires)), firings
        starts = torch.bincount(tokens, minlength=len(x)).cumsum(0).roll(1)
        starts[0] = 0
        output = embedding_bag(features, sae.W_dec, starts, mode="sum", per_sample_weights=scores[tokens, features])
        return _finished(sae, output), firings

    return reconstruct
