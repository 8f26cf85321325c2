"""Var(O e) = Var(Z v/|v|) |v|^2, with O = Z W_O checked on the data."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformer_lens import HookedTransformer, HookedTransformerConfig

from saelens_asi import activation_spectra, decompose_attention_output
from saelens_asi.spectra.attention import decompose_variance
from tests.helpers import tiny
from tests.helpers.reference import gaussian, maths, orthogonal

TOKENS = torch.tensor(tiny.tokens(40)["tokens"])


@maths
@given(st.integers(0, 2**31), st.integers(1, 4), st.integers(1, 4), st.integers(1, 7))
def test_the_parts_are_those_of_the_activations(seed, n_heads, d_head, d_model):
    z = gaussian(seed, 50, n_heads * d_head) + 3
    weight = gaussian(seed + 1, n_heads * d_head, d_model)
    e = orthogonal(seed + 2, d_model)
    parts = decompose_variance(torch.cov(z.T).reshape(z.shape[1], -1), weight, n_heads, e)
    v = weight @ e
    torch.testing.assert_close(parts.variance, (z @ weight @ e).var(dim=0))
    torch.testing.assert_close(parts.z_variance, (z @ (v / v.norm(dim=0))).var(dim=0))
    torch.testing.assert_close(parts.w_norm_squared, v.norm(dim=0).square())
    torch.testing.assert_close(parts.variance, parts.z_variance * parts.w_norm_squared)
    torch.testing.assert_close(parts.head_share.sum(dim=1), torch.ones(d_model, dtype=torch.float64))
    torch.testing.assert_close(parts.head_w_norm_squared.sum(dim=1), parts.w_norm_squared)
    for h in range(n_heads):
        rows = slice(h * d_head, (h + 1) * d_head)
        output = z[:, rows] @ weight[rows] @ e
        torch.testing.assert_close(parts.head_variance[:, h], output.var(dim=0))
        torch.testing.assert_close(parts.head_z_variance[:, h], (z[:, rows] @ v[rows] / v[rows].norm(dim=0)).var(dim=0))
        centred = (z @ weight @ e) - (z @ weight @ e).mean(dim=0)
        share = (output * centred).sum(dim=0) / centred.square().sum(dim=0)
        torch.testing.assert_close(parts.head_share[:, h], share)


def test_isotropic_z_leaves_everything_to_the_weights():
    weight = torch.diag(torch.tensor([3.0, 2.0, 0.0], dtype=torch.float64))
    parts = decompose_variance(torch.eye(3), weight, 3, torch.eye(3))
    assert parts.z_variance.tolist() == [1, 1, 0]
    assert parts.w_norm_squared.tolist() == [9, 4, 0]
    assert parts.head_share.tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 0]]


@pytest.mark.parametrize("kind", ["model", "bridge", "hooked_llama"])
def test_the_variances_are_those_of_the_attention_output(kind, request):
    """On a model with biases and z of another width, and with grouped queries, for both kinds."""
    model = request.getfixturevalue(kind)
    if kind == "model":
        model.blocks[1].attn.b_O.data.fill_(0.7)
    parts = decompose_attention_output(model, TOKENS, -1, batch_size=7)
    (spectrum,) = activation_spectra(model, TOKENS, ["blocks.1.hook_attn_out"], progress=False).values()
    assert (parts.layer, parts.output, parts.note) == (1, "blocks.1.hook_attn_out", "")
    assert parts.n_tokens == TOKENS.numel()
    assert parts.identity_error < 1e-5
    tolerance = 1e-5 * float(spectrum.variances[0])
    torch.testing.assert_close(parts.variance, spectrum.variances, rtol=0, atol=tolerance)
    assert parts.head_share.shape == (16, model.cfg.n_heads)
    assert not any(point.fwd_hooks for point in model.hook_dict.values())
    if kind == "model":
        model.blocks[1].attn.b_O.data.zero_()


def test_both_kinds_of_model_agree(bridge, hooked_llama):
    one, other = (decompose_attention_output(model, TOKENS, 0, 500, k=4) for model in (bridge, hooked_llama))
    assert one.n_tokens == other.n_tokens == 500
    for key in ("variance", "z_variance", "w_norm_squared", "head_share"):
        torch.testing.assert_close(getattr(one, key), getattr(other, key), rtol=1e-3, atol=1e-4)


def gemma_2_hooked():
    cfg = HookedTransformerConfig(
        n_layers=2, d_model=16, n_ctx=16, n_heads=4, d_head=4, n_key_value_heads=2, d_mlp=24, d_vocab=tiny.N_WORDS,
        act_fn="gelu_pytorch_tanh", normalization_type="RMS", use_normalization_before_and_after=True, gated_mlp=True,
        positional_embedding_type="rotary", initializer_range=0.4, seed=0, device="cpu",
    )  # fmt: skip
    return HookedTransformer(cfg, tokenizer=tiny.tokenizer())


def gemma_2_bridge(folder):
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import Gemma2Config, Gemma2ForCausalLM

    cfg = Gemma2Config(
        vocab_size=tiny.N_WORDS, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=4, max_position_embeddings=64, initializer_range=0.4,
    )  # fmt: skip
    Gemma2ForCausalLM(cfg).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return TransformerBridge.boot_transformers(str(folder), device="cpu", dtype=torch.float32)


@pytest.mark.parametrize("kind", ["hooked", "bridge"])
def test_behind_a_post_norm_the_attentions_own_output_is_decomposed(kind, tmp_path):
    model = gemma_2_hooked() if kind == "hooked" else gemma_2_bridge(tmp_path)
    with torch.no_grad():
        for block in model.blocks:  # a post-norm that does something
            block.ln1_post.w.copy_(torch.linspace(0.2, 3, 16)) if kind == "hooked" else None
    parts = decompose_attention_output(model, TOKENS, 1)
    assert parts.output == "blocks.1.attn"
    assert "blocks.1.hook_attn_out is not Z W_O + b_O (relative error" in parts.note
    assert parts.identity_error < 1e-5
    _, cache = model.run_with_cache(TOKENS)
    z = cache["blocks.1.attn.hook_z"].flatten(0, 1).flatten(1).double()
    output = z @ model.blocks[1].attn.W_O.reshape(16, 16).double()
    expected = torch.linalg.eigvalsh(torch.cov(output.T)).flip(0)
    torch.testing.assert_close(parts.variance, expected, rtol=1e-4, atol=1e-6)


def test_an_output_that_is_something_else_altogether_is_refused(bridge):
    def double(x, hook):
        return 2 * x

    bridge.add_hook("blocks.0.attn.hook_out", double)
    try:
        with pytest.raises(ValueError, match=r"layer 0 is not Z W_O \+ b_O .* blocks\.0\.hook_attn_out, allowed"):
            decompose_attention_output(bridge, TOKENS, 0)
    finally:
        bridge.reset_hooks()


@pytest.mark.parametrize("layer", [2, -3])
def test_a_layer_that_is_not_there_is_refused(bridge, layer):
    with pytest.raises(ValueError, match=f"layer={layer} must lie between 0 and 1"):
        decompose_attention_output(bridge, TOKENS, layer)
