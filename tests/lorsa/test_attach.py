"""A Lorsa in place of a layer: the same computation, in every way a model is run, and nothing left behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from saelens_asi.lorsa import Lorsa, LorsaConfig, attached, lorsa_loss_recovered, read_attention, replaced
from tests.helpers import tiny_attention

MODELS = ("hooked", "hooked, rotary", "bridge", "bridge, gpt2")


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    made: dict[str, Any] = {}

    def get(name: str) -> Any:
        if name not in made:
            made[name] = {
                "hooked": lambda: tiny_attention.hooked("learned"),
                "hooked, rotary": lambda: tiny_attention.hooked("grouped queries"),
                "bridge": lambda: tiny_attention.bridged("llama", tmp_path_factory.mktemp("llama")),
                "bridge, gpt2": lambda: tiny_attention.bridged("gpt2", tmp_path_factory.mktemp("gpt2")),
            }[name]()
        return made[name]

    return get


@pytest.fixture(scope="module")
def sliding(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """Models with a window of 5."""
    return cache(lambda variant: tiny_attention.bridged(variant, tmp_path_factory.mktemp(variant.split(",")[0])))


def small(model: Any, layer: int = 1, **settings: Any) -> Lorsa:
    lorsa = Lorsa.from_attention(model, layer, n_ov_heads=32, k=3, **settings)
    with torch.no_grad():
        lorsa.b_D += 0.5
    return lorsa


def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens, return_type="logits")


def attn_out(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    name = "blocks.1.hook_attn_out"
    with torch.no_grad():
        return model.run_with_cache(tokens, names_filter=[name])[1][name]


@pytest.mark.parametrize("name", MODELS)
def test_the_layer_itself_as_a_lorsa_changes_nothing(name: str, build: Callable[[str], Any]) -> None:
    model, tokens = build(name), tiny_attention.tokens()
    expected = logits(model, tokens)
    with attached(Lorsa.exact(read_attention(model, 1)), model, 1):
        torch.testing.assert_close(logits(model, tokens), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_run_with_cache_shows_the_lorsas_output(name: str, build: Callable[[str], Any]) -> None:
    model, tokens = build(name), tiny_attention.tokens()
    lorsa, own = small(model), attn_out(model, tokens)
    read: dict[str, torch.Tensor] = {}

    def note(x: torch.Tensor, y: torch.Tensor, allowed: Any) -> torch.Tensor:
        read["x"] = x
        return y

    with replaced(model, 1, note):
        torch.testing.assert_close(attn_out(model, tokens), own, rtol=0, atol=0)
    with attached(lorsa, model, 1):
        seen = attn_out(model, tokens)
    with torch.no_grad():
        torch.testing.assert_close(seen[:, 1:], lorsa(read["x"])[:, 1:])
    assert torch.equal(seen[:, 0], own[:, 0])  # the first position is left as it is
    assert not torch.allclose(seen[:, 1:], own[:, 1:])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("error", [False, True], ids=["exit", "error"])
def test_detached_the_model_is_bit_identical(name: str, error: bool, build: Callable[[str], Any]) -> None:
    model, tokens = build(name), tiny_attention.tokens()
    before = logits(model, tokens)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    if error:
        with pytest.raises(IndexError), attached(small(model), model, 1):
            logits(model, tokens + tiny_attention.tiny.N_WORDS)  # no such tokens
    else:
        with attached(small(model), model, 1):
            assert not torch.equal(logits(model, tokens), before)
    assert torch.equal(logits(model, tokens), before)
    assert hooks == sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@contextmanager
def cache_that_reaches_a_bridge(model: Any) -> Iterator[None]:
    """Hands a bridge's attention the key-value cache under the name that TransformerLens reads.

    transformers 5.24 calls it ``cache``; TransformerLens 3.9 looks for ``past_key_values`` alone and leaves the cache
    empty, so that the stock model's own generation with a cache differs from that without.
    """

    def renamed(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if "cache" in kwargs:
            kwargs = {**kwargs, "past_key_values": kwargs["cache"]}
        return args, kwargs

    handles = [block.attn.register_forward_pre_hook(renamed, with_kwargs=True) for block in model.blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("name", MODELS)
def test_generation_with_a_key_value_cache_equals_generation_without(name: str, build: Callable[[str], Any]) -> None:
    model, tokens = build(name), tiny_attention.tokens(1, 6)
    settings = {"max_new_tokens": 8, "do_sample": False, "verbose": False, "stop_at_eos": False}
    settings["return_type"] = "tokens"
    plain = model.generate(tokens, **settings)
    # Inside, so that the Lorsa sees the cache under the name that transformers gives it.
    with attached(small(model, 1), model, 1), cache_that_reaches_a_bridge(model):
        cached = model.generate(tokens, use_past_kv_cache=True, **settings)
        step = tokens
        for _ in range(8):
            step = torch.cat([step, logits(model, step)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(cached, step)
    assert cached.shape == plain.shape == (1, 14)
    assert torch.equal(model.generate(tokens, **settings), plain)


@pytest.mark.parametrize(("variant", "layer"), [("mistral, window", 1), ("gemma2", 0), ("gemma2", 1)])
@pytest.mark.parametrize("n_prompt", [2, 4, 5, 6, 9])  # the window holds 5
def test_generation_goes_on_past_a_sliding_window(variant: str, layer: int, n_prompt: int, sliding: Any) -> None:
    model, prompt = sliding(variant), tiny_attention.tokens(2, n_prompt)
    settings = {"max_new_tokens": 12, "do_sample": False, "verbose": False, "stop_at_eos": False}
    with attached(small(model, layer), model, layer), cache_that_reaches_a_bridge(model):
        cached = model.generate(prompt, use_past_kv_cache=True, return_type="tokens", **settings)
        step = prompt
        for _ in range(12):
            step = torch.cat([step, logits(model, step)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(cached, step)


@pytest.mark.parametrize(("variant", "layer"), [("mistral, window", 1), ("gemma2", 0), ("gemma2", 1)])
@pytest.mark.parametrize("piece", [1, 2, 3, 7])
@pytest.mark.parametrize("padding", [0, 3])
def test_pieces_into_a_cache_past_a_sliding_window_equal_one_pass(
    variant: str, layer: int, piece: int, padding: int, sliding: Any
) -> None:
    model, n = sliding(variant), 18
    tokens = torch.cat([torch.full((2, padding), 2), tiny_attention.tokens(2, n)], dim=1)
    mask = torch.cat([torch.zeros(2, padding), torch.ones(2, n)], dim=1).long()
    lorsa, hf = small(model, layer, skip_positions=2), model.original_model
    with attached(lorsa, model, layer), cache_that_reaches_a_bridge(model), torch.no_grad():
        whole = hf(tokens, attention_mask=mask, use_cache=False).logits
        cache, pieces = DynamicCache(config=hf.config), []
        for part in tokens.split(piece, dim=1):
            seen = cache.get_seq_length() + part.shape[1]
            out = hf(part, attention_mask=mask[:, :seen], past_key_values=cache, use_cache=True)
            pieces.append(out.logits)
    torch.testing.assert_close(torch.cat(pieces, dim=1)[:, padding:], whole[:, padding:], rtol=1e-4, atol=1e-4)


def test_more_skipped_positions_than_the_window_holds_are_refused(sliding: Any) -> None:
    model = sliding("mistral, window")
    with (
        attached(small(model, skip_positions=5), model, 1),
        pytest.raises(ValueError, match="skip_positions=5 reaches"),
    ):
        model(tiny_attention.tokens())


@pytest.mark.parametrize("name", ["bridge", "bridge, gpt2"])
def test_a_stock_bridge_generates_the_same_with_a_cache_that_reaches_it(name: str, build: Callable[[str], Any]) -> None:
    model, tokens = build(name), tiny_attention.tokens(1, 6)
    settings = {"max_new_tokens": 8, "do_sample": False, "verbose": False, "stop_at_eos": False}
    settings["return_type"] = "tokens"
    with cache_that_reaches_a_bridge(model):
        cached = model.generate(tokens, use_past_kv_cache=True, **settings)
    assert torch.equal(cached, model.generate(tokens, use_past_kv_cache=False, **settings))


def test_a_cache_filled_before_is_refused(build: Callable[[str], Any]) -> None:
    from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

    model, tokens = build("hooked"), tiny_attention.tokens(1, 8)
    cache = TransformerLensKeyValueCache.init_cache(model.cfg, "cpu", 1)
    model(tokens[:, :5], past_kv_cache=cache)
    with attached(small(model), model, 1), pytest.raises(ValueError, match="5 positions from before"):
        model(tokens[:, 5:], past_kv_cache=cache)


@pytest.mark.parametrize("name", ["bridge", "bridge, gpt2"])
def test_a_cache_that_the_layer_does_not_fill_is_refused_when_it_comes_again(
    name: str, build: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokens = build(name), tiny_attention.tokens(1, 6)
    settings = {"max_new_tokens": 2, "do_sample": False, "verbose": False, "stop_at_eos": False}
    monkeypatch.setattr(model.blocks[1].attn, "_update_kv_cache", lambda k, v, **_: (k, v))
    with attached(small(model), model, 1), cache_that_reaches_a_bridge(model):
        logits(model, tokens)  # a single pass is right, with or without a cache
        model.generate(tokens, use_past_kv_cache=False, **settings)
        with pytest.raises(ValueError, match="use_past_kv_cache=False"):
            model.generate(tokens, use_past_kv_cache=True, **settings)


@pytest.mark.parametrize("skip", [0, 1, 2])
def test_padding_on_the_left_does_not_matter(skip: int, build: Callable[[str], Any]) -> None:
    for name in ("hooked, rotary", "bridge"):
        model, tokens = build(name), tiny_attention.tokens(1, 9)
        padded = torch.cat([torch.full((1, 3), 2), tokens], dim=1)
        mask = torch.tensor([[0, 0, 0] + [1] * 9])
        lorsa = small(model, skip_positions=skip)
        with attached(lorsa, model, 1), torch.no_grad():
            alone = model(tokens, return_type="logits")
            together = model(padded, attention_mask=mask, return_type="logits")[:, 3:]
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def test_hooks_of_the_lorsa_fire_while_it_is_attached(build: Callable[[str], Any]) -> None:
    model, tokens = build("bridge"), tiny_attention.tokens()
    lorsa, seen = small(model), {}
    with attached(lorsa, model, 1), lorsa.hooks(features=lambda z: seen.__setitem__("z", z)):
        with_hook = logits(model, tokens)
    with attached(lorsa, model, 1):
        torch.testing.assert_close(logits(model, tokens), with_hook)
    assert seen["z"].shape == (3, tiny_attention.N_CTX, 32)
    assert ((seen["z"] != 0).sum(-1) <= 3).all()


def test_loss_recovered_is_all_for_the_layer_itself_and_none_for_zeros(build: Callable[[str], Any]) -> None:
    for name in ("hooked", "bridge"):
        model = build(name)
        exact = Lorsa.exact(read_attention(model, 1)).with_config(skip_positions=1)
        loss = lorsa_loss_recovered(model, exact, 1, tiny_attention.tokens(), batch_size=2)
        assert loss.n_tokens == 3 * (tiny_attention.N_CTX - 1)
        assert loss.kl_recovered == pytest.approx(1, abs=1e-4)
        assert loss.kl_zero > 0.01
        with torch.no_grad():
            exact.W_O.zero_()
            exact.b_D.zero_()
        nothing = lorsa_loss_recovered(model, exact, 1, tiny_attention.tokens(), batch_size=2)
        assert nothing.reconstructed == pytest.approx(nothing.zero)
        assert nothing.clean == pytest.approx(loss.clean)


def test_bad_input_is_refused_with_a_reason(build: Callable[[str], Any], tmp_path: Path) -> None:
    model = build("hooked")
    narrow = Lorsa(LorsaConfig(d_model=8, n_qk_heads=2, n_ov_heads=4, d_qk=4, k=1, n_ctx=64))
    with pytest.raises(ValueError, match="d_model=8, but the model has 16"), attached(narrow, model, 1):
        pass
    with pytest.raises(ValueError, match="layers 0 to 1"), attached(small(model), model, 5):
        pass
    short = small(model, n_ctx=8)
    with attached(short, model, 1), pytest.raises(ValueError, match="24 positions exceeds n_ctx=8"):
        logits(model, tiny_attention.tokens())
    with pytest.raises(ValueError, match="must be \\(batch, n_positions, d_model=16\\)"):
        small(model)(torch.zeros(1, 4, 8))
