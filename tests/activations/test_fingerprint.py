"""What models and data are known by: the same for the same, another for what was changed."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from saelens_asi.activations.fingerprint import (
    check_fingerprints,
    content_checksum,
    data_fingerprint,
    model_fingerprint,
    sealed,
    unsealed,
)
from tests.helpers import tiny

TEXT = [{"text": f"w{i} w3"} for i in range(3, 40)]


def test_every_layer_counts(model: Any) -> None:
    seen = {model_fingerprint(model)}
    for name, _ in model.named_parameters():
        other = copy.deepcopy(model)
        with torch.no_grad():
            other.get_parameter(name).add_(1e-4)
        seen.add(model_fingerprint(other))
    assert len(seen) == 1 + len(list(model.named_parameters()))


def test_a_merged_matrix_of_rank_one_counts(model: Any) -> None:
    other = copy.deepcopy(model)
    with torch.no_grad():
        weight = other.blocks[1].mlp.W_in
        weight += 1e-3 * torch.randn(weight.shape[0], 1) @ torch.randn(1, weight.shape[1])
    assert model_fingerprint(other) != model_fingerprint(model)


def test_names_shapes_and_dtypes_count() -> None:
    def of(**parameters: torch.Tensor) -> str:
        return model_fingerprint(torch.nn.ParameterDict(parameters))

    x = torch.arange(6.0)
    assert len({of(a=x), of(b=x), of(a=x.reshape(2, 3)), of(a=x.double()), of(a=x.bfloat16())}) == 5


def test_a_column_in_a_wide_matrix_is_seen_wherever_it_is() -> None:
    """A sample at equal steps would lie in one column."""
    for column in range(0, 4096, 101):
        one, other = torch.zeros(4096, 4096), torch.zeros(4096, 4096)
        other[:, column : column + 64] = 1
        names = [model_fingerprint(torch.nn.ParameterDict({"w": w})) for w in (one, other)]
        assert names[0] != names[1]


def test_weights_of_quantized_models_lie_in_buffers() -> None:
    def of(value: int) -> str:
        module = torch.nn.Module()
        module.register_buffer("qweight", torch.full((8, 8), value, dtype=torch.int32))
        return model_fingerprint(module)

    assert of(1) != of(2)


def test_it_is_the_same_in_another_process_with_other_threads(model: Any, python: Any, tmp_path: Path) -> None:
    code = (
        "import torch; torch.set_num_threads(2); from tests.helpers import tiny;"
        "from saelens_asi.activations.fingerprint import data_fingerprint, model_fingerprint;"
        "print(model_fingerprint(tiny.hooked_transformer())); print(data_fingerprint(tiny.tokens()))"
    )
    found = python("-c", code, cwd=tmp_path).splitlines()[-2:]
    assert found == [model_fingerprint(model), data_fingerprint(tiny.tokens())]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_the_same_on_another_device(model: Any, dtype: torch.dtype) -> None:
    other = copy.deepcopy(model).to(dtype)
    assert model_fingerprint(copy.deepcopy(other).cuda()) == model_fingerprint(other)


def test_memory_that_is_not_contiguous_makes_no_difference() -> None:
    x = torch.randn(50, 70)
    one, other = torch.nn.ParameterDict({"w": x}), torch.nn.ParameterDict({"w": x.T.contiguous().T})
    assert not other["w"].is_contiguous()
    assert model_fingerprint(one) == model_fingerprint(other)


@pytest.mark.parametrize(
    ("kind", "form"),
    [("tokens", "tensor"), *itertools.product(["tokens", "text"], ["list", "dataset", "torch", "stream"])],
)
def test_data_of_every_form_is_told_apart_and_not_consumed(kind: str, form: str) -> None:
    def data(change: int) -> Any:
        rows = [dict(row) for row in (tiny.tokens(40) if kind == "tokens" else TEXT)]
        if kind == "tokens":
            rows[change]["tokens"] = [3, *rows[change]["tokens"][1:-1], 4]
        else:
            rows[change]["text"] += " w4"
        dataset = Dataset.from_list(rows)
        if form == "tensor":
            return torch.tensor(dataset["tokens"])
        streamed = dataset.to_iterable_dataset()
        return {"list": rows, "dataset": dataset, "torch": dataset.with_format("torch"), "stream": streamed}[form]

    one = data(5)
    assert data_fingerprint(one) == data_fingerprint(one) == data_fingerprint(data(5)) is not None
    assert data_fingerprint(one) != data_fingerprint(data(6))
    assert len(list(one)) == len(list(data(5)))


def test_lengths_and_masks_count() -> None:
    rows = tiny.tokens(200).to_list()
    masked = [{**row, "attention_mask": [1] * 15 + [0]} for row in rows]
    assert len({data_fingerprint(rows), data_fingerprint(rows[:-1]), data_fingerprint(masked)}) == 3


def test_an_iterator_is_left_alone() -> None:
    iterator = iter(TEXT)
    assert data_fingerprint(iterator) is None
    assert len(list(iterator)) == len(TEXT)


def test_sides_that_are_known_are_compared(caplog: pytest.LogCaptureFixture) -> None:
    kept = check_fingerprints({"model": "a", "data": None}, {"model": None, "data": "b"}, "file", "way out")
    assert kept == {"model": "a", "data": "b"}
    with pytest.raises(ValueError, match=r"file was made from something else \(model was 'a' and is 'b'\): way out"):
        check_fingerprints({"model": "a"}, {"model": "b", "data": "c"}, "file", "way out")
    assert not caplog.text
    assert check_fingerprints(None, {"model": "b"}, "file", "way out") == {"model": "b"}
    assert "file was written by an earlier version" in caplog.text


def test_checksums_cover_names_shapes_dtypes_bytes_and_text() -> None:
    x = torch.arange(4.0)
    sums = {
        content_checksum({"x": x}),
        content_checksum({"x": x}, "text"),
        content_checksum({"y": x}),
        content_checksum({"x": x.reshape(2, 2)}),
        content_checksum({"x": x.view(torch.int32)}),
        content_checksum({"x": x + 1}),
    }
    assert len(sums) == 6


def test_a_seal_breaks_with_what_it_covers() -> None:
    values = {"a": [1, 2.5, None], "b": {"c": "d"}}
    assert unsealed(sealed(values)) == unsealed(values) == values
    with pytest.raises(ValueError, match="checksum"):
        unsealed({**sealed(values), "a": [1, 2.5]})
    with pytest.raises(ValueError, match="no JSON object"):
        unsealed([1])
