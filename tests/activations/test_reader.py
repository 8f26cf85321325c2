"""HookActivations: what the model computes at one hook, again and again, without special tokens."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from saelens_asi.activations.reader import HookActivations
from tests.helpers import tiny

HOOK = tiny.ATTN_OUT


def tokens() -> torch.Tensor:
    ids = torch.tensor(tiny.tokens(20)["tokens"])
    ids[:, 0] = 0  # <bos>
    return ids


def expected(model: Any, ids: torch.Tensor, hook: str = HOOK) -> torch.Tensor:
    _, cache = model.run_with_cache(ids, names_filter=hook)
    return cache[hook].flatten(2)[:, 1:].flatten(0, 1) if cache[hook].ndim == 4 else cache[hook][:, 1:].flatten(0, 1)


@pytest.mark.parametrize("cache", [False, True])
def test_every_iteration_gives_the_activations_without_special_tokens(model: Any, cache: bool) -> None:
    batches = HookActivations(model, tokens(), HOOK, batch_size=3, cache=cache, progress=False)
    for _ in range(2):
        torch.testing.assert_close(torch.cat(list(batches)), expected(model, tokens()))
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


def test_heads_lie_side_by_side(model: Any) -> None:
    hook = "blocks.1.attn.hook_z"
    found = torch.cat(list(HookActivations(model, tokens(), hook, progress=False)))
    torch.testing.assert_close(found, expected(model, tokens(), hook))
    assert found.shape[1] == tiny.HOOK_Z_WIDTH


def test_it_reads_exactly_so_many_tokens_and_a_half_read_iteration_is_not_kept(model: Any) -> None:
    batches = HookActivations(model, tokens(), HOOK, 100, batch_size=3, cache=True, progress=False)
    next(iter(batches))
    for _ in range(2):
        torch.testing.assert_close(torch.cat(list(batches)), expected(model, tokens())[:100])


def test_a_cached_iteration_does_not_run_the_model_again(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = HookActivations(model, tokens(), HOOK, cache=True, progress=False)
    first = torch.cat(list(batches))
    monkeypatch.setattr("saelens_asi.activations.reader.read_activations", None)
    assert torch.equal(torch.cat(list(batches)), first)


def test_data_that_ends_early_is_said(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        list(HookActivations(model, tokens(), HOOK, 10_000, progress=False))
    assert "ended after 300 of n_tokens=10000" in caplog.text


def test_bad_input_is_named(model: Any) -> None:
    for arguments, message in (
        ((tokens(), "blocks.9.hook_attn_out"), "no hook of this model"),
        ((tokens(), "blocks.*.hook_attn_out"), "stands for 2 hooks"),
        ((tokens(), HOOK, 0), "n_tokens=0"),
        ((iter([{"text": "w3"}]), HOOK), "read once only"),
    ):
        with pytest.raises(ValueError, match=message):
            HookActivations(model, *arguments)
    with pytest.raises(ValueError, match="no token that counts"):
        list(HookActivations(model, torch.zeros(2, 16, dtype=torch.long), HOOK, progress=False))
