"""SmolLM2, and any saved Llama, as a HookedTransformer: for what is compared on both kinds of model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def load_hooked_transformer(folder: Path | str, device: str = "cpu") -> Any:
    """A saved Llama-architecture model as a HookedTransformer, weights unprocessed.

    ``HookedTransformer.from_pretrained`` only takes names it knows, so the configuration is built here.
    """
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_llama_weights
    from transformers import AutoModelForCausalLM, AutoTokenizer

    hf_model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    hf = hf_model.config
    if hf.model_type != "llama":
        raise ValueError(f"{folder} holds a model of type {hf.model_type!r}: only the Llama architecture is converted")
    d_head = hf.hidden_size // hf.num_attention_heads
    cfg = HookedTransformerConfig(
        model_name=Path(folder).name,
        original_architecture="LlamaForCausalLM",
        n_layers=hf.num_hidden_layers,
        d_model=hf.hidden_size,
        n_ctx=min(hf.max_position_embeddings, 2048),
        d_head=d_head,
        n_heads=hf.num_attention_heads,
        n_key_value_heads=hf.num_key_value_heads,
        d_mlp=hf.intermediate_size,
        d_vocab=hf.vocab_size,
        act_fn="silu",
        gated_mlp=True,
        normalization_type="RMS",
        final_rms=True,
        eps=hf.rms_norm_eps,
        positional_embedding_type="rotary",
        rotary_adjacent_pairs=False,
        rotary_dim=d_head,
        rotary_base=int(hf.rope_parameters["rope_theta"]),
        dtype=torch.float32,
        device=device,
        default_prepend_bos=False,
    )
    model = HookedTransformer(cfg, tokenizer=AutoTokenizer.from_pretrained(folder))
    model.load_state_dict(convert_llama_weights(hf_model, cfg), strict=False)
    return model.to(device).eval()
