"""Lorsas that llamascopium (the authors' own code) saved."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saelens_asi.lorsa.config import Llama3Scaling, LorsaConfig, RotaryPositions
from saelens_asi.lorsa.io import LLAMASCOPIUM_CONFIG, LLAMASCOPIUM_WEIGHTS, check_shapes
from saelens_asi.lorsa.model import Lorsa
from saelens_asi.resume import load_tensors

_NORM_PREFIX = "dataset_average_activation_norm."

# Settings of a llamascopium config that change nothing here: device placement, names, training-time choices.
_WITHOUT_EFFECT = {
    "device",
    "dtype",
    "sae_type",
    "expansion_factor",
    "hook_point_in",
    "hook_point_out",
    "use_triton_kernel",
    "sparsity_threshold_for_triton_spmm_kernel",
    "jumprelu_threshold_window",
}
_KNOWN = {
    "d_model",
    "use_decoder_bias",
    "act_fn",
    "norm_activation",
    "sparsity_include_decoder_norm",
    "top_k",
    "n_qk_heads",
    "d_qk_head",
    "positional_embedding_type",
    "rotary_dim",
    "rotary_base",
    "rotary_adjacent_pairs",
    "rotary_scale",
    "use_NTK_by_parts_rope",
    "NTK_by_parts_factor",
    "NTK_by_parts_low_freq_factor",
    "NTK_by_parts_high_freq_factor",
    "old_context_len",
    "n_ctx",
    "attn_scale",
    "use_post_qk_ln",
    "normalization_type",
    "eps",
}


def import_llamascopium(folder: str | Path) -> Lorsa:
    """Read a Lorsa that llamascopium (OpenMOSS Language-Model-SAEs) saved with ``save_pretrained``.

    The activation norm "dataset-wise" (input times sqrt(d_model) / norm_in, output times norm_out / sqrt(d_model)) and
    the selection by decoder norm are folded into the weights: the result reads and writes plain activations. Its rows
    of W_O then have norm 1, where selection was by decoder norm.

    Raises:
        ValueError: for settings, weights or values that have no counterpart, or are unknown.
    """
    folder = Path(folder)
    for name in (LLAMASCOPIUM_CONFIG, LLAMASCOPIUM_WEIGHTS):
        if not (folder / name).exists():
            raise ValueError(f"{folder} holds no {name}, which a llamascopium folder has")
    theirs = json.loads((folder / LLAMASCOPIUM_CONFIG).read_text())
    tensors = {name: tensor.float() for name, tensor in load_tensors(folder / LLAMASCOPIUM_WEIGHTS).items()}
    norms = {name[len(_NORM_PREFIX) :]: float(tensors.pop(name)) for name in list(tensors) if _NORM_PREFIX in name}
    tensors = {name: t for name, t in tensors.items() if name not in ("mask", "IGNORE", "rotary_sin", "rotary_cos")}
    lorsa = Lorsa(_convert_config(theirs, tensors, folder))
    renamed = {"ln_q.w": "q_norm", "ln_k.w": "k_norm"}
    tensors = {renamed.get(name, name): tensor for name, tensor in tensors.items()}
    if not theirs.get("use_decoder_bias", True):
        tensors["b_D"] = torch.zeros(lorsa.cfg.d_model)
    _fold(tensors, theirs, norms)
    tensors |= {name: buffer for name, buffer in lorsa.named_buffers() if name in ("mean_read", "threshold")}
    check_shapes(lorsa, tensors, folder / LLAMASCOPIUM_WEIGHTS)
    lorsa.load_state_dict(tensors)
    lorsa.provenance = {"imported_from": "llamascopium", "config": theirs}
    return lorsa.eval()


def _convert_config(theirs: dict[str, Any], tensors: dict[str, Tensor], folder: Path) -> LorsaConfig:
    unknown = sorted(set(theirs) - _KNOWN - _WITHOUT_EFFECT)
    if unknown:
        raise ValueError(f"{folder / LLAMASCOPIUM_CONFIG} has settings that this import does not know: {unknown}")
    supported: dict[str, tuple[Any, ...]] = {
        "sae_type": ("lorsa",),
        "act_fn": ("topk",),
        "norm_activation": ("dataset-wise", "inference"),
        "positional_embedding_type": ("rotary", "none"),
        "rotary_scale": (1,),
    }
    defaults = {"norm_activation": "dataset-wise", "positional_embedding_type": "rotary", "rotary_scale": 1}
    for name, values in supported.items():
        found = theirs.get(name, defaults.get(name))
        if found not in values:
            raise ValueError(f"{folder / LLAMASCOPIUM_CONFIG} has {name}={found!r}; this import takes {values}")
    qk_norm = theirs.get("use_post_qk_ln", False)
    if qk_norm and theirs.get("normalization_type") != "RMS":
        raise ValueError(f"normalization_type={theirs.get('normalization_type')!r} is not 'RMS', the only one known")
    if "W_V" not in tensors or "W_Q" not in tensors:
        raise ValueError(f"{folder / LLAMASCOPIUM_WEIGHTS} has no W_V and W_Q; its tensors are {sorted(tensors)}")
    rotary = None
    if theirs.get("positional_embedding_type", "rotary") == "rotary":
        scaling = None
        if theirs.get("use_NTK_by_parts_rope", False):
            scaling = Llama3Scaling(
                factor=theirs.get("NTK_by_parts_factor", 1.0),
                low_freq_factor=theirs.get("NTK_by_parts_low_freq_factor", 1.0),
                high_freq_factor=theirs.get("NTK_by_parts_high_freq_factor", 1.0),
                original_context=theirs.get("old_context_len", 2048),
            )
        rotary = RotaryPositions(
            dim=theirs["rotary_dim"],
            base=float(theirs.get("rotary_base", 10_000)),
            adjacent_pairs=theirs.get("rotary_adjacent_pairs", True),
            llama3=scaling,
        )
    return LorsaConfig(
        d_model=theirs["d_model"],
        n_qk_heads=theirs["n_qk_heads"],
        n_ov_heads=tensors["W_V"].shape[0],
        d_qk=theirs["d_qk_head"],
        k=theirs["top_k"],
        n_ctx=theirs["n_ctx"],
        positions="none" if rotary is None else "rotary",
        rotary=rotary,
        attn_scale=theirs.get("attn_scale"),
        qk_norm=qk_norm,
        qk_norm_eps=theirs.get("eps", 1e-6),
    )


def _fold(tensors: dict[str, Tensor], theirs: dict[str, Any], norms: dict[str, float]) -> None:
    """Put activation norms and the selection by decoder norm into the weights."""
    if theirs.get("norm_activation", "dataset-wise") == "dataset-wise":
        hooks = [str(theirs.get("hook_point_in")), str(theirs.get("hook_point_out"))]
        missing = [hook for hook in hooks if not norms.get(hook, 0.0) > 0]
        if missing:
            raise ValueError(
                f"norm_activation='dataset-wise' needs the average norms at {hooks}; the weights hold {norms}"
            )
        root = math.sqrt(theirs["d_model"])
        for name in ("W_Q", "W_K", "W_V"):
            tensors[name] = tensors[name] * (root / norms[hooks[0]])
        for name in ("W_O", "b_D"):
            tensors[name] = tensors[name] * (norms[hooks[1]] / root)
    if theirs.get("sparsity_include_decoder_norm", True):
        norm = tensors["W_O"].norm(dim=1)
        tensors["W_O"] = tensors["W_O"] / norm[:, None]
        tensors["W_V"] = tensors["W_V"] * norm[:, None]
        tensors["b_V"] = tensors["b_V"] * norm
