from __future__ import annotations

import pytest
import torch
from datasets import Dataset

from saelens_asi.activations.tokens import token_batches

IDS = torch.arange(3, 33).reshape(5, 6)


def all_windows(model, data, batch_size=2, context_size=6):
    return [(tokens.tolist(), mask.tolist()) for tokens, mask in token_batches(model, data, batch_size, context_size)]


def test_a_tensor_is_taken_as_it_is():
    batches = list(token_batches(None, IDS, 2, 4))
    assert [len(tokens) for tokens, _ in batches] == [2, 2, 1]
    assert torch.equal(torch.cat([tokens for tokens, _ in batches]), IDS)
    assert all(mask.all() for _, mask in batches)
    assert next(iter(token_batches(None, IDS[0], 2, 4)))[0].shape == (1, 6)


@pytest.mark.parametrize("column", ["tokens", "input_ids"])
def test_tokenized_rows_are_windows_cut_at_the_context(column):
    data = Dataset.from_dict({column: IDS.tolist()})
    assert all_windows(None, data, 2, 4) == all_windows(None, IDS[:, :4], 2)


def test_rows_of_other_lengths_keep_their_order_and_never_share_a_batch():
    rows = [{"tokens": list(range(3, 3 + n))} for n in (4, 4, 4, 2, 4)]
    batches = list(token_batches(None, rows, 2, 6))
    assert [tuple(tokens.shape) for tokens, _ in batches] == [(2, 4), (1, 4), (1, 2), (1, 4)]


def test_padding_is_masked():
    rows = [{"input_ids": [3, 4, 2, 2], "attention_mask": [1, 1, 0, 0]}]
    assert all_windows(None, rows) == [([[3, 4, 2, 2]], [[True, True, False, False]])]


def test_text_is_packed_with_bos_in_front_and_between_documents(model):
    rows = [{"text": "w3 w4 w5 w6"}, {"text": ""}, {"text": "w7 w8 w9 w10 w11"}]
    assert all_windows(model, rows, context_size=5) == [
        ([[0, 3, 4, 5, 6], [0, 7, 8, 9, 10]], [[True] * 5] * 2),
    ]


def test_text_becomes_the_windows_that_saelens_trains_on(model):
    from sae_lens.training.activations_store import ActivationsStore

    from tests.helpers import tiny

    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 60, (20,), generator=generator).tolist()
    data = Dataset.from_list([{"text": " ".join(f"w{3 + (i * n) % 60}" for i in range(n))} for n in lengths])
    cfg = tiny.runner_config(tiny.sae_config(), ".", is_dataset_tokenized=False)
    store = ActivationsStore.from_config(model, cfg, override_dataset=data)
    expected = store.get_batch_tokens(8)
    ours = torch.cat([tokens for tokens, _ in token_batches(model, data, 4, tiny.CONTEXT)])
    assert torch.equal(ours[:8], expected)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (torch.zeros(2, 3), "must be .* ids, got .*float32"),
        (torch.zeros(2, 3, 4, dtype=torch.long), r"got \(2, 3, 4\)"),
        ([{"words": "a"}], r"columns \['words'\]"),
        (["a text"], r"columns \[\]"),
    ],
)
def test_data_of_another_form_is_refused(model, data, message):
    with pytest.raises(ValueError, match=message):
        list(token_batches(model, data, 2, 4))


def test_text_needs_a_tokenizer():
    with pytest.raises(ValueError, match="needs a model with a tokenizer"):
        list(token_batches(object(), [{"text": "a"}], 2, 4))


def test_no_data_gives_no_batches(model):
    assert list(token_batches(model, [], 2, 4)) == []


@pytest.mark.parametrize(("batch_size", "context_size"), [(0, 4), (2, 1)])
def test_sizes_that_cannot_be_are_refused(batch_size, context_size):
    with pytest.raises(ValueError, match=f"batch_size={batch_size} .* context_size={context_size}"):
        token_batches(None, IDS, batch_size, context_size)
