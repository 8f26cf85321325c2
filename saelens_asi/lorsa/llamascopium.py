"""Lorsas that llamascopium (the authors' own code) saved."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saelens_asi.lorsa.config import Llama3Scaling, LorsaConfig, RotaryPositions, read_json_object
from saelens_asi.lorsa.model import Lorsa
from saelens_asi.resume import load_tensors

WEIGHTS, CONFIG = "sae_weights.safetensors", "config.json"

_NORM_PREFIX = "dataset_average_activation_norm."

# Values that a Lorsa has a counterpart for, and what llamascopium takes where its config does not say.
_SUPPORTED: dict[str, tuple[str | int, ...]] = {
    "sae_type": ("lorsa",),
    "act_fn": ("topk",),
    "norm_activation": ("dataset-wise", "inference"),
    "positional_embedding_type": ("rotary", "none"),
    "rotary_scale": (1,),
}
_DEFAULTS = {"norm_activation": "dataset-wise", "positional_embedding_type": "rotary", "rotary_scale": 1}

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


def is_llamascopium(folder: Path) -> bool:
    """Whether a folder has the files that llamascopium's ``save_pretrained`` writes."""
    return all((folder / name).exists() for name in (CONFIG, WEIGHTS))


def import_llamascopium(folder: str | Path) -> Lorsa:
    """Read a Lorsa that llamascopium (OpenMOSS Language-Model-SAEs) saved with ``save_pretrained``.

    The activation norm "dataset-wise" (input times sqrt(d_model) / norm_in, output times norm_out / sqrt(d_model)) and
    the selection by decoder norm are folded into the weights: the result reads and writes plain activations. Its rows
    of W_O then have norm 1, where selection was by decoder norm.

    Raises:
        ValueError: for settings, weights or values that have no counterpart, are unknown, not finite, or missing, and
            for files that are damaged.
    """
    folder = Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} holds no file {name}, which a llamascopium folder has")
    cfg = read_json_object(folder / CONFIG)
    tensors = {name: tensor.float() for name, tensor in load_tensors(folder / WEIGHTS).items()}
    norms = {name[len(_NORM_PREFIX) :]: _number(tensors.pop(name)) for name in list(tensors) if _NORM_PREFIX in name}
    tensors = {name: t for name, t in tensors.items() if name not in ("mask", "IGNORE", "rotary_sin", "rotary_cos")}
    _check_supported(cfg, folder / CONFIG)
    matrices = {name for name, tensor in tensors.items() if tensor.ndim == 2}
    if not {"W_V", "W_O"} <= matrices or "W_Q" not in tensors:
        raise ValueError(f"{folder / WEIGHTS} lacks W_Q, or matrices W_V and W_O; its tensors are {sorted(tensors)}")
    lorsa = _make(cfg, tensors["W_V"].shape[0], folder / CONFIG)
    renamed = {"ln_q.w": "q_norm", "ln_k.w": "k_norm"}
    tensors = {renamed.get(name, name): tensor for name, tensor in tensors.items()}
    if not cfg.get("use_decoder_bias", True):
        tensors["b_D"] = torch.zeros(lorsa.cfg.d_model)
    missing = sorted(dict(lorsa.named_parameters()).keys() - tensors.keys())
    if missing:
        raise ValueError(f"{folder / WEIGHTS} lacks {missing}")
    _fold(tensors, cfg, norms)
    tensors |= {name: buffer for name, buffer in lorsa.named_buffers() if name in ("mean_read", "threshold")}
    lorsa.load_weights_(tensors, folder / WEIGHTS)
    lorsa.provenance = {"imported_from": "llamascopium", "config": cfg}
    return lorsa.eval()


def _number(tensor: Tensor) -> float:
    return float(tensor) if tensor.numel() == 1 else math.nan


def _make(cfg: Mapping[str, Any], n_ov_heads: int, path: Path) -> Lorsa:
    try:
        return Lorsa(_convert_config(cfg, n_ov_heads))
    except KeyError as error:
        raise ValueError(f"{path} does not set {error}") from None
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} does not describe a Lorsa: {error}") from None


def _check_supported(cfg: Mapping[str, Any], path: Path) -> None:
    unknown = sorted(set(cfg) - _KNOWN - _WITHOUT_EFFECT)
    if unknown:
        raise ValueError(f"{path} has settings that this import does not know: {unknown}")
    for name, values in _SUPPORTED.items():
        value = cfg.get(name, _DEFAULTS.get(name))
        if value not in values:
            raise ValueError(f"{path} has {name}={value!r}; this import takes {values}")
    if cfg.get("use_post_qk_ln", False) and cfg.get("normalization_type") != "RMS":
        raise ValueError(f"normalization_type={cfg.get('normalization_type')!r} is not 'RMS', the only one known")


def _rotary(cfg: Mapping[str, Any]) -> RotaryPositions | None:
    if cfg.get("positional_embedding_type", _DEFAULTS["positional_embedding_type"]) != "rotary":
        return None
    scaling = None
    if cfg.get("use_NTK_by_parts_rope", False):
        scaling = Llama3Scaling(
            factor=cfg.get("NTK_by_parts_factor", 1.0),
            low_freq_factor=cfg.get("NTK_by_parts_low_freq_factor", 1.0),
            high_freq_factor=cfg.get("NTK_by_parts_high_freq_factor", 1.0),
            original_context=cfg.get("old_context_len", 2048),
        )
    return RotaryPositions(
        dim=cfg["rotary_dim"],
        base=float(cfg.get("rotary_base", 10_000)),
        adjacent_pairs=cfg.get("rotary_adjacent_pairs", True),
        llama3=scaling,
    )


def _convert_config(cfg: Mapping[str, Any], n_ov_heads: int) -> LorsaConfig:
    rotary = _rotary(cfg)
    return LorsaConfig(
        d_model=cfg["d_model"],
        n_qk_heads=cfg["n_qk_heads"],
        n_ov_heads=n_ov_heads,
        d_qk=cfg["d_qk_head"],
        k=cfg["top_k"],
        n_ctx=cfg["n_ctx"],
        positions="none" if rotary is None else "rotary",
        rotary=rotary,
        attn_scale=cfg.get("attn_scale"),
        qk_norm=cfg.get("use_post_qk_ln", False),
        qk_norm_eps=cfg.get("eps", 1e-6),
    )


def _fold(tensors: dict[str, Tensor], cfg: Mapping[str, Any], norms: dict[str, float]) -> None:
    """Put activation norms and the selection by decoder norm into the weights."""
    if cfg.get("norm_activation", _DEFAULTS["norm_activation"]) == "dataset-wise":
        hooks = [str(cfg.get("hook_point_in")), str(cfg.get("hook_point_out"))]
        missing = [hook for hook in hooks if not 0 < norms.get(hook, 0.0) < math.inf]
        if missing:
            raise ValueError(
                f"norm_activation='dataset-wise' needs the average norms at {hooks}; the weights hold {norms}"
            )
        root = math.sqrt(cfg["d_model"])
        for name in ("W_Q", "W_K", "W_V"):
            tensors[name] = tensors[name] * (root / norms[hooks[0]])
        for name in ("W_O", "b_D"):
            tensors[name] = tensors[name] * (norms[hooks[1]] / root)
    if cfg.get("sparsity_include_decoder_norm", True):
        norm = tensors["W_O"].norm(dim=1)
        tensors["W_O"] = tensors["W_O"] / norm[:, None]
        tensors["W_V"] = tensors["W_V"] * norm[:, None]
        tensors["b_V"] = tensors["b_V"] * norm
