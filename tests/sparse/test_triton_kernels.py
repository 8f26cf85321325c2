"""Triton's kernels without a GPU: in its interpreter against their twins and float64, and compiled for two cards.

The interpreter has to be chosen before Triton is imported: those tests run in a process of their own, which the first
test here starts.
"""

from __future__ import annotations

import itertools
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from saelens_asi.sparse import finite, fused_step, fused_topk, operators
from saelens_asi.sparse.fused_step import Decoded, FusedEntries, FusedUpdate
from saelens_asi.sparse.operators import OPERATORS
from saelens_asi.sparse.topk import Encoder
from saelens_asi.sparse_adam import AdamSettings

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not IS_INTERPRETED, reason="runs in the interpreter's process")
compiled = pytest.mark.skipif(IS_INTERPRETED, reason="runs where Triton compiles")


@compiled
def test_kernels_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:]
    assert " passed" in done.stdout


@pytest.fixture
def by_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels also for tensors on a CPU, as only the interpreter takes them."""
    monkeypatch.setattr(operators, "kernels_for", lambda tensor: operators.load_triton_kernels())


def _copied(value: Any) -> Any:
    if isinstance(value, list):
        return [_copied(one) for one in value]
    return value.clone() if isinstance(value, Tensor) else value


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _both(name: str, *args: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Results, and arguments as they are afterwards, of a kernel and of its twin."""
    found = []
    for function in (getattr(operators.load_triton_kernels(), name), OPERATORS[name].twin):
        own = _copied(list(args))
        result = function(*own)
        found.append(list(_tensors([() if result is None else result, own])))
    return found[0], found[1]


def _agree(name: str, *args: Any, rtol: float = 1e-4, atol: float = 1e-5) -> None:
    for kernel, twin in zip(*_both(name, *args), strict=True):
        torch.testing.assert_close(
            kernel, twin, rtol=rtol, atol=atol, equal_nan=True, msg=lambda text: f"{name}: {text}"
        )


SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "random": lambda x: x,
    "ties": lambda x: x.round(),
    "all equal": lambda x: torch.ones_like(x),
    "zeros of both signs": lambda x: torch.where(x > 0, 0.0, -0.0),
    "negative": lambda x: -x.abs() - 1,
    "not a number": lambda x: x.masked_fill(x > 2.5, torch.nan),
    "negative not a number": lambda x: (-x.masked_fill(x > 2.5, torch.nan)).copysign(torch.tensor(-1.0)),
    "infinite": lambda x: x.masked_fill(x > 2.5, torch.inf).masked_fill(x < 0, -torch.inf),
}


@interpreted
@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize(("n", "k"), [(7, 7), (300, 1), (2100, 600)])
def test_the_same_numbers_are_selected(scores, n, k):
    x = SCORES[scores](torch.randn(2, n))
    for magnitude in (False, True):
        _agree("select_top_k", x, None, k, magnitude, rtol=0, atol=0)


@interpreted
@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize("n", [160, 168])
def test_the_same_numbers_are_selected_of_groups_and_where_rows_are_ranked_in_parts(scores, n, monkeypatch):
    """Of more numbers than a program ranks, twice."""
    monkeypatch.setattr(fused_topk, "MAX_RANKED", 16)
    assert len(fused_topk.parts_of_selection(n, 5)) == 4
    x, groups = SCORES[scores](torch.randn(3, n)), torch.rand(3, 90).argsort(dim=1)[:, : n // 8].sort(dim=1).values
    for magnitude in (False, True):
        _agree("select_top_k", x, groups, 5, magnitude, rtol=0, atol=0)
        _agree("select_top_k", x, None, 1, magnitude, rtol=0, atol=0)


@compiled
@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize(("n", "k"), [(7, 7), (300, 1), (300, 20), (2000, 3)])
def test_a_selection_is_that_of_a_stable_sort(scores, n, k):
    """Of the twin; the value first, then the lower column."""
    x = SCORES[scores](torch.randn(3, n))
    best, columns = fused_topk.select_top_k(x, None, k, False)
    assert torch.equal(columns, _stable(x, k))
    torch.testing.assert_close(best, x.gather(1, columns), rtol=0, atol=0, equal_nan=True)


def _stable(x: Tensor, k: int) -> Tensor:
    order = x.nan_to_num(nan=torch.inf, posinf=torch.finfo(x.dtype).max, neginf=-torch.inf)
    return torch.sort(order, dim=1, descending=True, stable=True).indices[:, :k].sort(dim=1).values


@dataclass
class _Encoding:
    """Whole numbers, whose products have no rounding: what is selected is the same whatever adds them up."""

    d_in: int
    d_sae: int
    k: int
    magnitude: bool = False
    scale: bool = True
    dtype: torch.dtype = torch.float32
    n: int = 21

    def made(self) -> tuple[Tensor, Encoder]:
        x = torch.randint(-3, 4, (self.n, self.d_in)).float()
        rows, bias = torch.randint(-2, 3, (self.d_sae, self.d_in)).float(), torch.randint(-2, 3, (self.d_sae,)).float()
        rows[self.d_sae // 2 :: 3] = rows[1]  # repeated
        bias[self.d_sae // 2 :: 3] = bias[1]
        rows[0], bias[0] = 0.0, 0.0
        scale = torch.tensor([0.5, 1.0, 2.0])[torch.randint(0, 3, (self.d_sae,))] if self.scale else None
        return x, Encoder(rows, bias, scale, self.magnitude, self.dtype)


ENCODINGS: dict[str, dict[str, Any]] = {
    "width 40": {"d_in": 40, "d_sae": 530, "k": 5},
    "width 7, one feature": {"d_in": 7, "d_sae": 65, "k": 1},
    "magnitude": {"d_in": 40, "d_sae": 530, "k": 5, "magnitude": True},
    "no scale": {"d_in": 16, "d_sae": 200, "k": 3, "scale": False},
    "bfloat16": {"d_in": 33, "d_sae": 300, "k": 4, "dtype": torch.bfloat16},
    "float16": {"d_in": 16, "d_sae": 100, "k": 4, "dtype": torch.float16, "magnitude": True},
    "groups of 32": {"d_in": 8, "d_sae": 2100, "k": 2},
    "groups of 64": {"d_in": 8, "d_sae": 4110, "k": 1, "magnitude": True},
    "fewer groups than k": {"d_in": 8, "d_sae": 40, "k": 30},
    "all features": {"d_in": 8, "d_sae": 40, "k": 40},
    "one token": {"d_in": 8, "d_sae": 70, "k": 6, "n": 1},
}


def _check_selection(encoding: _Encoding, spoil: Callable[[Tensor, Encoder], None] | None = None) -> None:
    x, encoder = encoding.made()
    if spoil is not None:
        spoil(x, encoder)
    scores = (x.double() @ encoder.rows.double().t()).to(encoding.dtype).double() + encoder.bias
    scores = scores if encoder.scale is None else scores * encoder.scale
    best, features = fused_topk.encode_top_k(x, encoder, encoding.k)
    expected = _stable(scores.abs() if encoding.magnitude else scores, encoding.k)
    assert torch.equal(features, expected)
    torch.testing.assert_close(best.double(), scores.gather(1, expected), rtol=0, atol=0, equal_nan=True)


def _spoil_token(x: Tensor, encoder: Encoder) -> None:
    x[3, 5] = torch.nan


def _spoil_feature(x: Tensor, encoder: Encoder) -> None:
    encoder.rows[37, 2] = torch.nan
    encoder.bias[66] = -torch.inf


@compiled
@pytest.mark.parametrize("spoil", [None, _spoil_token, _spoil_feature])
@pytest.mark.parametrize("tile", [64, 2**13])
@pytest.mark.parametrize("name", ENCODINGS)
def test_twins_select_what_whole_scores_do(name, tile, spoil, monkeypatch):
    monkeypatch.setattr(fused_topk, "_TWIN_FEATURES", tile)
    encoding = _Encoding(**ENCODINGS[name])
    # torch's product in bfloat16 on a CPU reads past the end of a row of odd length.
    if spoil is None or (encoding.n > 3 and encoding.d_sae > 66 and encoding.d_in != 33):
        _check_selection(encoding, spoil)


@interpreted
@pytest.mark.usefixtures("by_kernels")
@pytest.mark.parametrize("name", ENCODINGS)
def test_kernels_select_what_whole_scores_do(name):
    _check_selection(_Encoding(**ENCODINGS[name]))


@interpreted
@pytest.mark.usefixtures("by_kernels")
@pytest.mark.parametrize("spoil", [_spoil_token, _spoil_feature])
@pytest.mark.parametrize("magnitude", [False, True])
def test_kernels_select_what_is_not_a_number_first(spoil, magnitude):
    _check_selection(_Encoding(d_in=8, d_sae=100, k=3, magnitude=magnitude), spoil)


@interpreted
@pytest.mark.parametrize("name", ["width 40", "magnitude", "no scale", "bfloat16", "groups of 64"])
def test_both_products_are_those_of_their_twins(name):
    """Also with numbers that are rounded."""
    encoding = _Encoding(**ENCODINGS[name])
    x, encoder = encoding.made()
    x = (x + torch.randn_like(x)).to(encoding.dtype)
    group = fused_topk.group_size(encoding.d_sae, encoding.k)
    features = (x, encoder.rows + torch.randn_like(encoder.rows), encoder.bias, encoder.scale)
    atol = 1e-4 if encoding.dtype == torch.float32 else 1.0  # two steps of bfloat16 at 64
    _agree("group_maxima", *features, group, encoding.magnitude, atol=atol)
    n_groups = -(-encoding.d_sae // group)
    groups = torch.stack([torch.randperm(n_groups)[: encoding.k].sort().values for _ in x]).int()
    groups[:, -1] = n_groups - 1  # the group that is not full, of all tokens
    owners, order = groups.flatten().sort()
    _agree("group_scores", *features, owners, order, group, encoding.magnitude, atol=atol)


@pytest.mark.parametrize(("d_sae", "k"), [(64, 1), (32_768, 32), (1_048_576, 32), (1_048_576, 1024), (2**24, 1024)])
def test_what_is_kept_of_a_token_is_little_and_ranked_in_few_launches(d_sae, k):
    group = fused_topk.group_size(d_sae, k)
    assert group in (16, 32, 64)
    n_groups = -(-d_sae // group)
    assert n_groups + k * group <= max(0.26 * d_sae, 16 * (k + 4))
    launches = [len(fused_topk.parts_of_selection(n, k)) for n in (n_groups, k * group)]
    assert sum(launches) <= (2 if k * d_sae <= 2**25 else 5)


@dataclass
class _Problem:
    """Weights, moments and a batch; feature 11 fires on every token, the features from ``d_sae - 9`` on never."""

    params: list[Tensor]
    moments: list[tuple[Tensor, Tensor]]
    norms: Tensor | None
    x: Tensor
    target: Tensor
    k: int
    magnitude: bool
    last_steps: list[Tensor | None] = field(default_factory=lambda: [None] * 4)

    def rows(self, which: int = 0) -> Tensor:
        return self.params[which].t() if which == 0 else self.params[which]

    def cloned(self, dtype: torch.dtype = torch.float32) -> _Problem:
        def copy(tensor: Tensor) -> Tensor:
            return tensor.clone(memory_format=torch.preserve_format).to(dtype)

        moments = [(copy(first), copy(second)) for first, second in self.moments]
        norms = None if self.norms is None else copy(self.norms)
        x, target = copy(self.x), copy(self.target)
        last_steps = [last_step if last_step is None else last_step.clone() for last_step in self.last_steps]
        return _Problem([copy(p) for p in self.params], moments, norms, x, target, self.k, self.magnitude, last_steps)


def _problem(
    d_in: int, d_sae: int, k: int, magnitude: bool = False, rescale: bool = True, n: int = 70, decay: bool = False
) -> _Problem:
    W_enc, W_dec, b_enc = torch.randn(d_sae, d_in) / d_in**0.5, torch.randn(d_sae, d_in), torch.randn(d_sae) * 0.1
    W_enc[3], b_enc[3], b_enc[5], W_dec[3] = W_enc[5], 20.0, 20.0, W_dec[5]  # repeated rows
    b_enc[11], W_enc[11] = 30.0, 0.0
    b_enc[-9:], W_enc[-9:] = (0.0 if magnitude else -1.0), 0.0
    params = [W_enc.t(), b_enc, W_dec, torch.randn(d_in)]
    moments = [(0.1 * torch.randn_like(p), 0.1 * torch.rand_like(p)) for p in params]
    norms = W_dec.norm(dim=1) if rescale else None
    x = torch.randn(n, d_in)
    last_steps = [torch.randint(0, int(STEP), (d_sae,), dtype=torch.int32) if decay else None for _ in range(3)]
    return _Problem(params, moments, norms, x, x + torch.randn(d_in), k, magnitude, [*last_steps, None])


SETTINGS, STEP = AdamSettings(1e-2, 0.9, 0.99, 1e-8), 3.0


def _fused(problem: _Problem) -> dict[str, Tensor]:
    """A step as ``FusedSteps`` makes it."""
    W_enc, b_enc, W_dec, b_dec = problem.params
    encoder = Encoder(W_enc.t(), b_enc, problem.norms, problem.magnitude)
    best = fused_topk.encode_top_k(problem.x, encoder, problem.k)
    decoded = Decoded(*fused_step.decode_tokens(*best, problem.norms, W_dec, b_dec, problem.target, problem.magnitude))
    features = torch.arange(len(b_enc) + 1, dtype=torch.int32)
    entries = FusedEntries.of(decoded, problem.x, features)
    squares, d_input = fused_step.gradient_squares(*entries.parts(), W_enc.t())
    d_b_dec, norm, divisor = fused_step.clip(squares, decoded.d_out.sum(0), d_input.sum(0), 1.0)
    FusedUpdate(problem.params, entries, d_b_dec, divisor, problem.norms).apply_(
        problem.moments, [SETTINGS] * 4, [STEP] * 4, problem.last_steps
    )
    facts = {"loss": decoded.errors.mean(), "norm": norm, "out": decoded.out, "firings": entries.firings()}
    names = ("W_enc", "b_enc", "W_dec", "b_dec")
    moved = {f"{name} {i}": m for name, pair in zip(names, problem.moments, strict=True) for i, m in enumerate(pair)}
    last = {f"{name} last": one for name, one in zip(names, problem.last_steps, strict=True) if one is not None}
    return {**facts, **dict(zip(names, problem.params, strict=True)), **moved, **last}


def _dense(problem: _Problem) -> dict[str, Tensor]:
    """The same step with whole matrices, by autograd."""
    params = [param.detach().requires_grad_() for param in problem.params]
    W_enc, b_enc, W_dec, b_dec = params
    reading = problem.x + (problem.params[3].detach() - b_dec)  # the encoder's input has b_dec taken off
    hidden = reading @ W_enc + b_enc
    ranked = hidden if problem.norms is None else hidden * problem.norms
    chosen = (ranked.abs() if problem.magnitude else ranked).topk(problem.k, dim=1).indices
    mask = torch.zeros_like(hidden).scatter(1, chosen, 1.0)
    acts = hidden * mask if problem.magnitude else (hidden * mask).relu()
    out = acts @ W_dec + b_dec
    loss = (out - problem.target).square().sum(dim=1).mean()
    gradients = torch.autograd.grad(loss, params)
    norm = torch.sqrt(sum(g.square().sum() for g in gradients))
    fired = acts.detach() != 0
    active = fired.any(dim=0)
    here = (active[None, :], active, active[:, None], torch.ones_like(b_dec, dtype=torch.bool))
    found = {"loss": loss.detach(), "norm": norm, "out": out.detach(), "firings": fired.sum(dim=0)}
    moments = list(problem.moments)
    for i, last_step in enumerate(problem.last_steps):
        if last_step is not None:
            silent = STEP - 1 - (last_step if i else last_step[None, :]).double()
            silent = silent[:, None] if i == 2 else silent
            moments[i] = (0.9**silent * moments[i][0], 0.99**silent * moments[i][1])
            found[f"{('W_enc', 'b_enc', 'W_dec')[i]} last"] = torch.where(active, int(STEP), last_step)
    named = zip(
        ("W_enc", "b_enc", "W_dec", "b_dec"),
        params,
        gradients,
        zip(problem.moments, moments, strict=True),
        here,
        strict=True,
    )
    for name, param, gradient, ((first, second), (m, v)), where in named:
        gradient = gradient / max(1.0, float(norm + 1e-6))
        m, v = 0.9 * m + 0.1 * gradient, 0.99 * v + 0.01 * gradient**2
        step = 1e-2 / (1 - 0.9**STEP) * m / (v.sqrt() / math.sqrt(1 - 0.99**STEP) + 1e-8)
        found[name] = torch.where(where, param.detach() - step, param.detach())
        found[f"{name} 0"], found[f"{name} 1"] = torch.where(where, m, first), torch.where(where, v, second)
    return found


PROBLEMS: dict[str, dict[str, Any]] = {
    "width 576": {"d_in": 576, "d_sae": 70, "k": 4},
    "width 40": {"d_in": 40, "d_sae": 150, "k": 5, "n": 140},
    "width 7, one feature": {"d_in": 7, "d_sae": 65, "k": 1},
    "magnitude": {"d_in": 16, "d_sae": 60, "k": 6, "magnitude": True},
    "no norms": {"d_in": 16, "d_sae": 60, "k": 6, "rescale": False},
    "a batch of one": {"d_in": 16, "d_sae": 60, "k": 6, "n": 1},
    "moments that decay": {"d_in": 40, "d_sae": 150, "k": 5, "decay": True},
}


def _check_step(problem: _Problem) -> None:
    expected, before = _dense(problem.cloned(torch.float64)), problem.cloned()
    found = _fused(problem)
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name].double(), value.double(), rtol=1e-4, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}"
        )
    silent = found["firings"] == 0
    assert silent[-9:].all()
    assert found["firings"][11] == len(problem.x)  # more entries than a tile
    for i, dim in ((0, 1), (1, 0), (2, 0)):
        for now, then in (
            (problem.params[i], before.params[i]),
            *zip(problem.moments[i], before.moments[i], strict=True),
        ):
            assert torch.equal(now.movedim(dim, 0)[silent], then.movedim(dim, 0)[silent])
    if problem.norms is not None:
        torch.testing.assert_close(problem.norms, problem.params[2].norm(dim=1))


@compiled
@pytest.mark.parametrize("name", PROBLEMS)
def test_a_step_of_twins_is_that_of_whole_matrices(name):
    _check_step(_problem(**PROBLEMS[name]))


@interpreted
@pytest.mark.usefixtures("by_kernels")
@pytest.mark.parametrize("name", ["width 40", "no norms", "a batch of one", "moments that decay"])
def test_a_step_of_kernels_is_that_of_whole_matrices(name):
    _check_step(_problem(**PROBLEMS[name]))


@interpreted
@pytest.mark.usefixtures("by_kernels")
def test_a_step_of_rows_that_are_moved_in_parts_is_that_of_whole_matrices(monkeypatch):
    monkeypatch.setattr(operators.load_triton_kernels(), "MAX_COLUMNS", 16)
    _check_step(_problem(d_in=40, d_sae=60, k=3, n=70))


@interpreted
@pytest.mark.parametrize("name", ["width 576", "width 7, one feature", "magnitude"])
def test_every_kernel_gives_what_its_twin_gives(name):
    """Also where a score is not a number, and is not positive."""
    problem = _problem(**PROBLEMS[name])
    W_enc, b_enc, W_dec, b_dec = problem.params
    best = fused_topk.encode_top_k(problem.x, Encoder(W_enc.t(), b_enc, problem.norms, problem.magnitude), problem.k)
    scores = best.scores.clone()
    scores[0, 0] = torch.nan
    _agree("decode_tokens", scores, best.indices, problem.norms, W_dec, b_dec, problem.target, problem.magnitude)
    _agree("decode_tokens", -best.scores, best.indices, None, W_dec, b_dec, problem.target, False)
    decoded = Decoded(*fused_step.decode_tokens(*best, problem.norms, W_dec, b_dec, problem.target, problem.magnitude))
    entries = FusedEntries.of(decoded, problem.x, torch.arange(len(b_enc) + 1, dtype=torch.int32))
    owners = decoded.owners.flatten().sort(stable=True).values
    _agree("sum_tiles", owners, *entries.parts()[1:6], len(b_enc))
    (squares, d_input, *_), (square, summed, *_) = _both("gradient_squares", *entries.parts(), W_enc.t())
    torch.testing.assert_close(squares.sum(), square[0])
    torch.testing.assert_close(d_input.sum(dim=0), summed[0], rtol=1e-4, atol=1e-5)
    for norm in (1.0, 1e9):
        _agree("clip", squares, decoded.d_out.sum(dim=0), summed[0], norm)
    _agree("clip", squares * torch.nan, decoded.d_out.sum(dim=0), summed[0], 1.0)


@interpreted
def test_a_vector_moves_and_norms_are_renewed_where_they_are_asked_for():
    n = 300
    numbers = list(fused_step.AdamNumbers.of(1e-2, 0.9, 0.99, 1e-8, 3.0))
    _agree("move_vector_", torch.randn(n), torch.randn(n), torch.rand(n), torch.randn(n), numbers)
    starts = torch.randint(0, 2, (n,)).cumsum(0)
    _agree("renew_norms_", torch.zeros(n - 1), torch.randn(n - 1, 40), starts)


@interpreted
@pytest.mark.parametrize("bad", [[0, 4, 5, 9, 17], list(range(1, 18)), list(range(18))])
def test_rows_are_replaced_in_batches_of_more_than_are_looked_at_together(bad, monkeypatch):
    monkeypatch.setattr(operators.load_triton_kernels(), "MAX_FLAGS", 4)
    x = torch.randn(18, 5)
    x[bad, 3] = torch.nan
    _agree("keep_finite_rows", x, rtol=0, atol=0)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [[], [0], [0, 2, 3], [0, 1, 2, 3, 4, 5, 6]])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_rows_that_are_not_finite_are_replaced_and_counted(dtype, bad, value):
    x = torch.randn(7, 1500).to(dtype)
    x[:, 7] = torch.finfo(dtype).max
    x[bad, 1400] = value
    _agree("keep_finite_rows", x, rtol=0, atol=0)
    good = finite.finite_rows(x)
    for loss in (torch.tensor(torch.finfo(dtype).max, dtype=dtype), torch.tensor(value)):
        _agree("note_", torch.tensor([2, 3]), loss, good)


def test_settings_of_one_step_that_differ_are_refused():
    problem = _problem(d_in=16, d_sae=100, k=6, n=150)
    decoded = Decoded(
        *fused_step.decode_tokens(
            torch.ones(150, 6), torch.zeros(150, 6).long(), None, *problem.params[2:], problem.target, False
        )
    )
    entries = FusedEntries.of(decoded, problem.x, torch.arange(101, dtype=torch.int32))
    update = FusedUpdate(problem.params, entries, problem.params[3], torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"settings .* of the parameters of one step differ"):
        update.apply_(problem.moments, [SETTINGS] * 3 + [SETTINGS._replace(lr=1.0)], [STEP] * 4, [None] * 4)
    last_steps = [torch.zeros(100, dtype=torch.int32), None, None, None]
    with pytest.raises(ValueError, match=r"of some parameters decay in silence, of others not: set one silent_moments"):
        update.apply_(problem.moments, [SETTINGS] * 4, [STEP] * 4, last_steps)
    update = FusedUpdate(
        [problem.params[0].contiguous(), *problem.params[1:]], entries, problem.params[3], torch.ones(())
    )
    with pytest.raises(ValueError, match="side by side"):
        update.apply_(problem.moments, [SETTINGS] * 4, [STEP] * 4, [None] * 4)


_FLAGS = {"K": 32, "MAGNITUDE": False, "HAS_SCALE": True, "HAS_GROUPS": True, "GROUP": 16, "TILE": 64, "WIDEN": False}
_FLAGS["DECAYS"] = False
_INT32 = {"n", "step", "n_rows", "n_groups", "n_tokens", "n_features", "n_entries", "width", "d_in", "d_sae"}
_FLOATS = {"factor", "max_norm", "step_size", "root_scale", "beta1", "one_less_beta1", "beta2", "one_less_beta2", "eps"}
_FLOATS |= {"log_beta1", "log_beta2"}
_POINTERS = {
    **{"features": "*i64", "best_columns": "*i64", "groups": "*i64", "starts": "*i64", "order": "*i64"},
    **{"counts": "*i64", "owners": "*i32", "good": "*i1", "norm": "*fp64"},
    **{"W_enc_last": "*i32", "b_enc_last": "*i32", "W_dec_last": "*i32"},
}

# Kernel, warps, sizes, and the most registers: two programs of 16 warps need at most 64.
_COMPILED: list[tuple[str, int, dict[str, Any], int]] = [
    ("_select_top_k", 1, {"BLOCK": 256, "PIECE": 256}, 96),
    ("_select_top_k", 8, {"HAS_GROUPS": False, "BLOCK": 2048, "PIECE": 1024}, 96),
    ("_select_top_k", 16, {"HAS_GROUPS": False, "BLOCK": 16384, "PIECE": 1024}, 128),
    ("_select_top_k", 16, {"K": 1024, "BLOCK": 16384, "PIECE": 1024, "MAGNITUDE": True}, 128),
    ("_decode_tokens", 4, {"K_BLOCK": 32, "BLOCK": 1024}, 64),
    ("_sum_tiles", 4, {"BLOCK": 1024}, 96),
    ("_sum_tiles", 16, {"BLOCK": 8192}, 128),
    ("_gradient_squares", 4, {"BLOCK": 1024}, 128),
    ("_gradient_squares", 16, {"BLOCK": 4096}, 128),
    ("_move_rows", 4, {"BLOCK": 1024}, 128),
    ("_move_rows", 16, {"BLOCK": 4096}, 128),
    ("_move_rows", 4, {"BLOCK": 1024, "DECAYS": True}, 128),
    ("_move_rows", 16, {"BLOCK": 4096, "DECAYS": True}, 128),
    ("_clip", 8, {"N": 2048, "BLOCK": 8192}, 128),
    ("_move_vector", 4, {"BLOCK": 256}, 64),
    ("_renew_norms", 16, {"BLOCK": 8192}, 64),
    ("_find_finite_rows", 4, {"BLOCK": 1024}, 64),
    ("_replace_bad_rows", 4, {"N": 2048, "BLOCK": 1024}, 128),
    ("_note", 4, {"N": 4096}, 64),
    ("_note", 16, {"N": 65536}, 128),
]


@compiled
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("name", "warps", "sizes", "registers"), _COMPILED)
def test_kernels_compile_and_fit_the_registers(name, warps, sizes, registers, capability):
    binary = _compile(name, capability, warps, {**_FLAGS, **sizes})
    used, spilled = _registers(binary.asm["ptx"], capability)
    assert used <= registers
    assert spilled == 0
    assert binary.metadata.shared <= 32 * 1024


_CARDS = {80: 163, 90: 227}  # KiB of shared memory
_DTYPES = {"half": "bf16", "tf32": "fp32", "ieee": "fp32"}
_INSTRUCTIONS = {(80, "half"): "k16", (90, "half"): "k16", (80, "tf32"): "k8", (90, "tf32"): "k8"}


@compiled
@pytest.mark.parametrize("capability", _CARDS)
@pytest.mark.parametrize("way", _DTYPES)
@pytest.mark.parametrize("group", [16, 64])
def test_products_compile_and_take_the_same_instructions(way, capability, group):
    """Both products add up in the same order: by instructions that take as many numbers along d_in."""
    tiles = operators.load_triton_kernels()._TILES[way]  # type: ignore[union-attr]
    assert len({tile.kwargs["BLOCK"] for tile in tiles}) == 1
    precision = "tf32" if way == "tf32" else "ieee"
    options = {**_FLAGS, "GROUP": group, "PRECISION": precision, "LAST": 2**31 - 1, "x": "*" + _DTYPES[way]}
    cells = [("_group_maxima", tile.num_warps, tile.num_stages, tile.kwargs) for tile in tiles]
    cells.append(("_group_scores", 4, 3, {"FEATURES": 64, "ENTRIES": 32, "BLOCK": tiles[0].kwargs["BLOCK"]}))
    taken = set()
    for is_even, (name, warps, stages, sizes) in itertools.product((True, False), cells):
        if (is_even, group) == (False, 64):
            continue
        binary = _compile(name, capability, warps, {**options, **sizes, "IS_EVEN": is_even}, num_stages=stages)
        used, spilled = _registers(binary.asm["ptx"], capability)
        assert (used <= 255, spilled) == (True, 0), (name, sizes, used, spilled)
        assert binary.metadata.shared <= 1024 * _CARDS[capability]
        taken.add(tuple(sorted(set(re.findall(r"mma(?:_async)?\.sync\.aligned\.m\d+n\d+(k\d+)", binary.asm["ptx"])))))
    assert taken == {(_INSTRUCTIONS[capability, way],) if way != "ieee" else ()}


@compiled
@pytest.mark.parametrize("name", ["_move_rows", "_gradient_squares", "_renew_norms"])
def test_rows_of_large_tables_have_offsets_of_64_bits(name):
    """d_sae * d_in may pass 2^31: nothing is multiplied in 32 bits."""
    code = _compile(name, 90, 4, {**_FLAGS, "BLOCK": 1024}).asm["ttir"]
    products = re.findall(r"arith\.muli .*(i\d+)>? loc|arith\.muli .* : (?:tensor<\d+x)?(i\d+)", code)
    assert products
    assert {first or second for first, second in products} == {"i64"}


def _compile(name: str, capability: int, warps: int, constants: dict[str, Any], **options: Any) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = operators.load_triton_kernels().kernels()[name]  # type: ignore[union-attr]
    signature, known = {}, {}
    for param in kernel.params:
        if param.name == "x":
            signature["x"] = constants.get("x", "*fp32")
        elif param.name in constants:
            signature[param.name], known[(param.num,)] = "constexpr", constants[param.name]
        elif param.name in _INT32 | _FLOATS:
            signature[param.name] = "i32" if param.name in _INT32 else "fp32"
        else:
            signature[param.name] = _POINTERS.get(param.name, "*fp32")
    aligned = {"d_in", "n"}
    attributes = {
        (param.num,): [["tt.divisibility", 16]]
        for param in kernel.params
        if signature[param.name].startswith("*") or (param.name in aligned and signature[param.name] == "i32")
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=known, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps, **options})


def _registers(ptx: str, capability: int) -> tuple[int, int]:
    """Registers of a thread, and bytes of them that are spilled."""
    import triton

    assembler = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    card = "sm_90a" if capability == 90 else f"sm_{capability}"
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [str(assembler), "-v", f"--gpu-name={card}", file.name, "-o", "/dev/null"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    used = re.search(r"Used (\d+) registers", said)
    spilled = re.search(r"(\d+) bytes spill stores", said)
    assert used is not None
    return int(used[1]), int(spilled[1]) if spilled else 0
