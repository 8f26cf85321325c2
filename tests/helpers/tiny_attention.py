"""Tiny models whose attention differs in positions, heads, norms and masks, for the tests of Lorsa."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.model_bridge import TransformerBridge
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from tests.helpers import tiny

D_MODEL, D_HEAD, N_CTX = 16, 8, 24

_ROTARY = {"positional_embedding_type": "rotary", "rotary_dim": 8, "rotary_base": 100, "rotary_adjacent_pairs": False}

# What each variant adds to a HookedTransformer with two heads and learned positions.
HOOKED: dict[str, dict[str, Any]] = {
    "learned": {},
    "rotary": _ROTARY,
    "rotary, adjacent pairs, partial": {**_ROTARY, "rotary_adjacent_pairs": True, "rotary_dim": 4},
    "rotary, Llama 3": {
        **_ROTARY,
        "use_NTK_by_parts_rope": True,
        "NTK_by_parts_factor": 4.0,
        "NTK_by_parts_low_freq_factor": 1.0,
        "NTK_by_parts_high_freq_factor": 4.0,
        "NTK_original_ctx_len": 64,
    },
    "grouped queries": {**_ROTARY, "n_heads": 4, "n_key_value_heads": 2},
    "QK-norm": {**_ROTARY, "use_qk_norm": True},
    "soft cap": {**_ROTARY, "attn_scores_soft_cap": 2.0},
    "window": {**_ROTARY, "use_local_attn": True, "attn_types": ["local", "local"], "window_size": 5},
    "unscaled": {"use_attn_scale": False},
    "layer-scaled": {"scale_attn_by_inverse_layer_idx": True},
    "norm after": {"use_normalization_before_and_after": True, "normalization_type": "RMS"},
}

_HF = {"vocab_size": tiny.N_WORDS, "hidden_size": D_MODEL, "num_hidden_layers": 2, "num_attention_heads": 2}
_LLAMA = {**_HF, "intermediate_size": 24, "max_position_embeddings": 64, "head_dim": D_HEAD, "initializer_range": 0.4}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

# From the name of a variant to the model type of transformers and its settings.
BRIDGED: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {**_LLAMA, "num_attention_heads": 4, "num_key_value_heads": 2}),
    "llama 3": ("llama", {**_LLAMA, "num_key_value_heads": 2, "rope_parameters": _LLAMA3_ROPE}),
    "gpt2": (
        "gpt2",
        {"vocab_size": tiny.N_WORDS, "n_embd": D_MODEL, "n_layer": 2, "n_head": 2, "n_positions": 64}
        | {"initializer_range": 0.4},
    ),
    "gpt_neox": ("gpt_neox", {**_LLAMA, "rotary_pct": 0.5, "use_parallel_residual": True}),
    "qwen3": ("qwen3", {**_LLAMA, "num_key_value_heads": 1}),
    "mistral, window": ("mistral", {**_LLAMA, "num_key_value_heads": 1, "sliding_window": 5}),
    "gemma2": (
        "gemma2",
        {**_LLAMA, "num_key_value_heads": 1, "sliding_window": 5, "attn_logit_softcapping": 2.0}
        | {"query_pre_attn_scalar": 8},
    ),
}


def hooked(variant: str, **changes: Any) -> HookedTransformer:
    settings: dict[str, Any] = {
        "n_layers": 2,
        "d_model": D_MODEL,
        "n_ctx": 64,
        "n_heads": 2,
        "d_head": D_HEAD,
        "d_mlp": 24,
        "d_vocab": tiny.N_WORDS,
        "act_fn": "gelu",
        "normalization_type": "LN",
        "initializer_range": 0.4,
        "seed": 0,
        "device": "cpu",
        **HOOKED[variant],
        **changes,
    }
    with torch.random.fork_rng():
        model = HookedTransformer(HookedTransformerConfig(**settings), tokenizer=tiny.tokenizer())
        randomize(model)
    return model.eval()


def bridged(variant: str, folder: Path, **changes: Any) -> TransformerBridge:
    kind, settings = BRIDGED[variant]
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**{**settings, **special, **changes}))
        randomize(model)
        model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return TransformerBridge.boot_transformers(str(folder), device="cpu", dtype=torch.float32)


def randomize(model: torch.nn.Module) -> None:
    """Give biases and norms values that a mistake would show."""
    generator = torch.Generator().manual_seed(1)
    for name, param in model.named_parameters():
        if param.ndim == 1 or "b_" in name.split(".")[-1]:
            param.data += 0.3 * torch.randn(param.shape, generator=generator)


def tokens(n: int = 3, n_positions: int = N_CTX) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    rows = torch.randint(3, tiny.N_WORDS, (n, n_positions), generator=generator)
    rows[:, 0] = 0
    return rows
