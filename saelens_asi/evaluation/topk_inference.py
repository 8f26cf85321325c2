"""SAELens's TopK and AbsTopK SAEs without dense activations: the same features and reconstruction, in less time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from sae_lens.saes.abstopk_sae import AbsTopK, AbsTopKSAE, AbsTopKTrainingSAE
from sae_lens.saes.topk_sae import TopK, TopKSAE, TopKTrainingSAE
from torch import Tensor
from torch.nn.functional import embedding_bag

from saelens_asi.sparse.topk import top_k

# Vectors (n, d_in) to their reconstructions (n, d_in), and how often each feature fired on them (d_sae,).
Reconstruct = Callable[[Tensor], tuple[Tensor, Tensor]]

_METHODS = ("encode", "encode_with_hidden_pre", "decode", "process_sae_in")
_FAMILY = (TopKSAE, AbsTopKSAE, TopKTrainingSAE, AbsTopKTrainingSAE)
_STOCK = {cls: {name: getattr(cls, name, None) for name in _METHODS} for cls in _FAMILY}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def topk_reconstruction(sae: Any) -> Reconstruct | None:
    """What ``sae.decode(sae.encode(x))`` and its non-zero activations are; None where the SAE is not stock TopK.

    Pre-activations and their ranking are SAELens's, to the bit, but for which of equal ones is taken. Then only the k
    features of a token are counted and decoded: over (n, d_sae) there is one product and one pass that compares.
    """
    stock = _STOCK.get(type(sae))
    if stock is None or type(sae.activation_fn) not in (TopK, AbsTopK) or sae.dtype.itemsize < 4:
        return None
    if any(name in vars(sae) or getattr(type(sae), name, None) is not stock[name] for name in _METHODS):
        return None
    if any(getattr(module, name) for module in sae.modules() for name in _HOOKS):
        return None
    norms = sae.W_dec.norm(dim=-1) if sae.cfg.rescale_acts_by_decoder_norm else None
    by_magnitude = type(sae.activation_fn) is AbsTopK

    def reconstruct(x: Tensor) -> tuple[Tensor, Tensor]:
        scores = sae.process_sae_in(x) @ sae.W_enc + sae.b_enc
        if norms is not None:
            scores = scores * norms
        found = top_k(scores.abs() if by_magnitude else scores, sae.activation_fn.k)
        values = scores.gather(1, found.indices) if by_magnitude else found.scores.relu()
        firings = torch.bincount(found.indices[values != 0], minlength=sae.cfg.d_sae)
        if norms is not None:
            values = values / norms[found.indices]
        output = embedding_bag(found.indices, sae.W_dec, per_sample_weights=values, mode="sum") + sae.b_dec
        return sae.reshape_fn_out(sae.run_time_activation_norm_fn_out(output), sae.d_head), firings

    return reconstruct
