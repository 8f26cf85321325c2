"""Names, aliases and patterns of hooks; reading and replacing activations without a trace."""

from __future__ import annotations

import pytest
import torch

from saelens_asi.activations.hooks import (
    as_vectors,
    hook_points,
    keep_mask,
    layer_hooks,
    logits_with,
    read_activations,
    resolve_hook_names,
    special_token_ids,
)
from tests.helpers import tiny

KNOWN = [f"blocks.{i}.{rest}" for i in (0, 1, 2, 10) for rest in ("hook_attn_out", "attn.hook_z", "attn.hook_q")]
TOKENS = torch.tensor(tiny.tokens(4)["tokens"])


@pytest.fixture(params=["hooked", "bridge"])
def any_model(request: pytest.FixtureRequest):
    model = request.getfixturevalue("model" if request.param == "hooked" else "bridge")
    model(TOKENS)  # a bridge adds hooks of its own in its first forward pass
    return model


def n_hooks(model) -> int:
    """All forward hooks; a bridge has some of its own."""
    modules = {id(module): module for module in model.modules()}
    points = {id(point): point for point in model.hook_dict.values()}
    return sum(len(module._forward_hooks) for module in {**modules, **points}.values())


def test_a_pattern_expands_in_the_order_of_the_layers():
    expected = [f"blocks.{i}.hook_attn_out" for i in (0, 1, 2, 10)]
    assert resolve_hook_names("blocks.*.hook_attn_out", reversed(KNOWN)) == expected


def test_a_star_stays_between_its_dots():
    assert resolve_hook_names(["blocks.1.*"], KNOWN) == ["blocks.1.hook_attn_out"]
    assert resolve_hook_names(["blocks.1.attn.hook_*"], KNOWN) == ["blocks.1.attn.hook_q", "blocks.1.attn.hook_z"]
    assert resolve_hook_names(["*locks.1*.attn.hook_z"], KNOWN) == ["blocks.1.attn.hook_z", "blocks.10.attn.hook_z"]


def test_names_come_once_and_in_the_order_asked_for():
    names = ["blocks.10.attn.hook_z", "blocks.*.attn.hook_z", "blocks.0.attn.hook_z"]
    assert resolve_hook_names(names, KNOWN) == [f"blocks.{i}.attn.hook_z" for i in (10, 0, 1, 2)]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("blocks.1.hook_attn_outt", "did you mean 'blocks.1.hook_attn_out'"),
        ("blocks.*.nothing", r"called 'blocks\.\*\.nothing'"),
        ("xyz", "see model.hook_dict"),
    ],
)
def test_a_name_that_is_not_there_is_refused_with_the_nearest(name, message):
    with pytest.raises(ValueError, match=message):
        resolve_hook_names(["blocks.0.attn.hook_z", name], KNOWN)


def test_no_name_at_all_is_refused():
    with pytest.raises(ValueError, match="hook_names is empty"):
        resolve_hook_names([], KNOWN)


def test_short_names_become_full_ones():
    assert layer_hooks(["attn_out", "hook_z", "embed.hook_out"], [0, 2]) == [
        "blocks.0.hook_attn_out",
        "blocks.2.hook_attn_out",
        "blocks.0.attn.hook_z",
        "blocks.2.attn.hook_z",
        "embed.hook_out",
    ]
    with pytest.raises(ValueError, match="'attnout' must be one of"):
        layer_hooks(["attnout"], [0])


def test_aliases_lead_to_one_point(bridge):
    points = hook_points(bridge, ["blocks.0.hook_attn_out", "blocks.0.attn.hook_out"])
    assert len(points) == 2
    assert len({id(point) for point in points.values()}) == 1


def test_a_model_without_hook_points_is_refused():
    with pytest.raises(ValueError, match="Linear has no hook points"):
        hook_points(torch.nn.Linear(1, 1), ["blocks.0.hook_attn_out"])


def test_what_is_read_is_what_the_model_caches(any_model):
    names = ["blocks.0.hook_attn_out", "blocks.1.attn.hook_z", "blocks.1.hook_resid_post"]
    before = n_hooks(any_model)
    read = {}
    points = hook_points(any_model, names)
    read_activations(any_model, TOKENS, points, {name: lambda x, name=name: read.update({name: x}) for name in names})
    _, cache = any_model.run_with_cache(TOKENS)
    for name in names:
        torch.testing.assert_close(read[name], cache[name])
    assert n_hooks(any_model) == before


def test_the_forward_stops_after_the_last_hook_that_is_needed(any_model):
    """Nothing behind it runs: neither the layer's own MLP, nor the next layer, nor the unembedding."""
    ran = []
    watched = {name: any_model.hook_dict[name] for name in ("blocks.0.hook_mlp_out", "blocks.1.hook_resid_pre")}
    handles = [point.register_forward_hook(lambda *_, name=name: ran.append(name)) for name, point in watched.items()]
    points = hook_points(any_model, ["blocks.0.hook_attn_out", "blocks.0.attn.hook_z"])
    try:
        read_activations(any_model, TOKENS, points, dict.fromkeys(points, lambda x: None))
        assert ran == []
        any_model(TOKENS)
        assert ran == list(watched)
    finally:
        for handle in handles:
            handle.remove()


def test_no_hook_is_left_behind_after_an_error_and_those_of_others_stay(any_model):
    seen, own = [], n_hooks(any_model)
    any_model.hook_dict["blocks.0.hook_attn_out"].add_hook(lambda x, hook: seen.append(x.shape))
    before = n_hooks(any_model)

    def fail(x):
        raise RuntimeError("stop here")

    try:
        points = hook_points(any_model, ["blocks.0.hook_attn_out", "blocks.1.attn.hook_z"])
        with pytest.raises(RuntimeError, match="stop here"):
            read_activations(any_model, TOKENS, points, dict.fromkeys(points, fail))
        with pytest.raises(RuntimeError, match="stop here"):
            logits_with(any_model, TOKENS, points["blocks.1.attn.hook_z"], fail)
        assert n_hooks(any_model) == before == own + 1
        any_model(TOKENS)
        assert len(seen) == 3
        assert len(any_model.hook_dict["blocks.0.hook_attn_out"].fwd_hooks) == 1
    finally:
        any_model.reset_hooks()


def test_a_hook_that_the_forward_does_not_reach_is_named(any_model):
    before = n_hooks(any_model)
    points = hook_points(any_model, ["blocks.0.attn.hook_result"])
    with pytest.raises(ValueError, match=r"does not reach \['blocks\.0\.attn\.hook_result'\].*set_use_attn_result"):
        read_activations(any_model, TOKENS, points, dict.fromkeys(points, lambda x: None))
    assert n_hooks(any_model) == before


def test_replaced_activations_change_the_logits_and_leave_no_hook(any_model):
    before = n_hooks(any_model)
    clean = any_model(TOKENS, return_type="logits")
    (point,) = hook_points(any_model, ["blocks.1.attn.hook_z"]).values()
    torch.testing.assert_close(logits_with(any_model, TOKENS, point, lambda x: x), clean.detach())
    assert not torch.allclose(logits_with(any_model, TOKENS, point, torch.zeros_like), clean, atol=1e-3)
    torch.testing.assert_close(logits_with(any_model, TOKENS), clean.detach())
    assert n_hooks(any_model) == before


def test_padding_in_front_does_not_change_what_is_read(any_model):
    """The mask of the text goes to the model too: tokens behind padding see the text alone."""
    plain, padded = {}, {}
    points = hook_points(any_model, ["blocks.1.hook_attn_out"])
    text = TOKENS[:, :10]
    read_activations(any_model, text, points, {"blocks.1.hook_attn_out": lambda x: plain.update(x=x)})
    tokens = torch.cat([torch.full((4, 6), 2), text], dim=1)
    is_text = torch.arange(16).expand(4, 16) >= 6
    read_activations(any_model, tokens, points, {"blocks.1.hook_attn_out": lambda x: padded.update(x=x)}, is_text)
    torch.testing.assert_close(padded["x"][:, 6:], plain["x"], rtol=1e-4, atol=1e-4)


def test_heads_lie_side_by_side_whether_split_or_not():
    z = torch.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    vectors = as_vectors(z, (2, 3), "z")
    assert vectors.shape == (6, 20)
    assert torch.equal(vectors, as_vectors(z.flatten(2), (2, 3), "z"))
    assert torch.equal(vectors[1], z[0, 1].flatten())


@pytest.mark.parametrize("shape", [(2, 4, 3, 3), (2, 3)])
def test_what_is_not_one_vector_a_token_is_refused(shape):
    with pytest.raises(ValueError, match=r"'pattern' holds .* for 2 windows of 3 tokens"):
        as_vectors(torch.zeros(shape), (2, 3), "pattern")


def test_special_tokens_are_those_that_saelens_leaves_out(model):
    assert sorted(special_token_ids(model, True).tolist()) == [0, 1, 2]  # <bos>, <eos>, <pad>
    assert special_token_ids(model, False).tolist() == []
    assert special_token_ids(model, [5, 7]).tolist() == [5, 7]
    with pytest.raises(ValueError, match="this model has none"):
        special_token_ids(object(), True)


def test_the_mask_leaves_out_tokens_and_positions():
    tokens = torch.tensor([[0, 5, 6, 7], [4, 1, 6, 2]])
    ids = torch.tensor([0, 1, 2])
    assert keep_mask(tokens, ids).tolist() == [[False, True, True, True], [True, False, True, False]]
    assert keep_mask(tokens, ids, [0, -2]).tolist() == [[False, True, False, True], [False, False, False, False]]
    with pytest.raises(ValueError, match=r"exclude_positions=\[4, -5\] lie outside windows of 4"):
        keep_mask(tokens, ids, [4, 0, -5])
