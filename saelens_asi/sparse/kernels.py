"""Where compiled loops stand in for torch's operations: on a CPU, in float32 and float64, where numba is.

``pip install "saelens_asi[fast]"`` installs it. Without it, and for all other tensors, torch's operations give the same
results up to rounding. A result does not depend on the number of threads.

``kernels_take`` says whether there is an implementation for some tensors; each kernel is a function below, which checks
its arguments and calls that implementation. Loops see memory without bounds, so nothing reaches them but through here.
Outputs are tensors that the caller gives: they are written, and what was in them does not matter unless said.
"""

from __future__ import annotations

import importlib.util
import itertools
import logging
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float32, Int8, Int32, Int64
from torch import Tensor

logger = logging.getLogger(__name__)

enabled = True
"""Set to False to have torch's operations everywhere."""

# Parts that a thread takes at a time: many enough that threads end together where rows cost unequally.
_PARTS_PER_THREAD = 8

_Argument = tuple[Tensor, torch.dtype, tuple[int, ...]]


@cache
def load_kernels() -> ModuleType | None:
    """The module of numba's kernels, compiled or read from numba's cache; None without a numba that works."""
    if importlib.util.find_spec("numba") is None:
        return None
    logger.info("loading kernels; numba compiles them once, in about half a minute, and keeps them on disk")
    start = time.perf_counter()
    try:
        module = importlib.import_module("saelens_asi.sparse.numba_kernels")
    except Exception as error:  # numba refuses some versions of numpy, and a home without a place for its cache
        logger.warning("numba cannot be used (%s): training steps take torch's operations", error)
        return None
    logger.info("loaded kernels in %.1f s", time.perf_counter() - start)
    return module


def kernels_take(*tensors: Tensor) -> bool:
    """Whether kernels are available for these: on a CPU, contiguous, of one dtype, float32 or float64."""
    first = tensors[0].dtype
    if first not in (torch.float32, torch.float64):
        return False
    fitting = all(t.dtype == first and t.device.type == "cpu" and t.is_contiguous() for t in tensors)
    return fitting and enabled and load_kernels() is not None


def row_lengths(table: Float[Tensor, "n d"], norms: Float[Tensor, " n"]) -> None:
    """The Euclidean norms of the rows of ``table`` go to ``norms``."""
    (n, d), dtype = table.shape, table.dtype
    _check("row_lengths", table=(table, dtype, (n, d)), norms=(norms, dtype, (n,)))
    _run_rows(_compiled().row_lengths, n, (table, norms))
    _mark_written(norms)


def adam_rows(
    param: Float[Tensor, "n d"],
    exp_avg: Float[Tensor, "n d"],
    exp_avg_sq: Float[Tensor, "n d"],
    grad: Float[Tensor, "n_rows d"],
    rows: Int64[Tensor, " n_rows"],
    norms: Float[Tensor, " n"] | None,
    step_size: Float[Tensor, " n_rows"],
    root_scale: Float[Tensor, " n_rows"],
    eps: Float[Tensor, " n_rows"],
    kept: tuple[Float[Tensor, " n_rows"], Float[Tensor, " n_rows"]],
    *,
    grad_shares: tuple[float, float],
    grad_scale: float,
) -> None:
    """Adam in place for ``rows`` of the first three tensors, whose gradient is ``grad_scale * grad``.

    Of either moment the share ``kept`` stays, to which ``grad_shares`` of the gradient and of its square are added. The
    update is ``step_size * exp_avg / (sqrt(exp_avg_sq) * root_scale + eps)``: the first two carry the bias corrections.
    The new norms of these rows go to ``norms``, where given. Rows must not repeat, which is not looked at here.
    """
    (n, d), n_rows, dtype = param.shape, rows.numel(), param.dtype
    norms = param.new_empty(0) if norms is None else norms
    _check(
        "adam_rows",
        param=(param, dtype, (n, d)),
        exp_avg=(exp_avg, dtype, (n, d)),
        exp_avg_sq=(exp_avg_sq, dtype, (n, d)),
        grad=(grad, dtype, (n_rows, d)),
        rows=(rows, torch.int64, (n_rows,)),
        norms=(norms, dtype, (n if norms.numel() else 0,)),
        step_size=(step_size, dtype, (n_rows,)),
        root_scale=(root_scale, dtype, (n_rows,)),
        eps=(eps, dtype, (n_rows,)),
        kept1=(kept[0], dtype, (n_rows,)),
        kept2=(kept[1], dtype, (n_rows,)),
    )
    _check_indices("adam_rows", n, rows=rows)
    tensors = (param, exp_avg, exp_avg_sq, grad, rows, norms, step_size, root_scale, eps, *kept)
    _run_rows(_compiled().adam_rows, n_rows, tensors, numbers=(*grad_shares, grad_scale))
    _mark_written(param, exp_avg, exp_avg_sq, norms)


def feature_gradients(
    d_decoded: Float[Tensor, "n_rows d_in"],
    x: Float[Tensor, "n_tokens d_in"],
    W_dec: Float[Tensor, "d_sae d_in"],
    active: Int64[Tensor, " n_active"],
    starts: Int64[Tensor, " n_active_and_1"],
    rows: Int64[Tensor, " n_entries"],
    values: Float[Tensor, " n_entries"],
    *,
    d_encoder: Float[Tensor, "n_active d_in"],
    d_decoder: Float[Tensor, "n_active d_in"],
    d_bias: Float[Tensor, " n_active"],
    squares: Float[Tensor, " n_active"],
) -> None:
    """Gradients of the active features, of which feature ``active[i]`` has entries ``starts[i]`` to ``starts[i + 1]``.

    Entry e is in row ``rows[e]`` of ``d_decoded`` with ``values[e]``, and its gradient d is the product of that row and
    the feature's of ``W_dec``. ``d_decoder[i]`` sums ``values * d_decoded``, ``d_encoder[i]`` sums ``d * x`` (row i
    reads token i modulo n_tokens), ``d_bias[i]`` sums d, and ``squares[i]`` is the squared length of all three.
    """
    (n_tokens, d_in), dtype, n_active, n_entries = x.shape, x.dtype, active.numel(), rows.numel()
    _check(
        "feature_gradients",
        d_decoded=(d_decoded, dtype, (d_decoded.shape[0], d_in)),
        x=(x, dtype, (n_tokens, d_in)),
        W_dec=(W_dec, dtype, (W_dec.shape[0], d_in)),
        active=(active, torch.int64, (n_active,)),
        starts=(starts, torch.int64, (n_active + 1,)),
        rows=(rows, torch.int64, (n_entries,)),
        values=(values, dtype, (n_entries,)),
        d_encoder=(d_encoder, dtype, (n_active, d_in)),
        d_decoder=(d_decoder, dtype, (n_active, d_in)),
        d_bias=(d_bias, dtype, (n_active,)),
        squares=(squares, dtype, (n_active,)),
    )
    _check_indices("feature_gradients", W_dec.shape[0], active=active)
    _check_indices("feature_gradients", d_decoded.shape[0] if n_tokens else 0, rows=rows)
    _check_starts("feature_gradients", n_entries, starts=starts)
    outputs = (d_encoder, d_decoder, d_bias, squares)
    _run_rows(_compiled().feature_gradients, n_active, (d_decoded, x, W_dec, active, starts, rows, values, *outputs))
    _mark_written(*outputs)


def squared_errors_(
    decoded: Float[Tensor, "n_tokens d_in"],
    bias: Float[Tensor, " d_in"],
    target: Float[Tensor, "n_tokens d_in"],
    *,
    gradient: Float[Tensor, "n_tokens d_in"],
    errors: Float[Tensor, " n_tokens"],
    scale: float,
) -> None:
    """``bias`` is added to ``decoded`` in place; its squared distance from ``target`` goes to ``errors``, and ``scale``
    times the difference to ``gradient``.
    """
    (n_tokens, d_in), dtype = decoded.shape, decoded.dtype
    _check(
        "squared_errors_",
        decoded=(decoded, dtype, (n_tokens, d_in)),
        bias=(bias, dtype, (d_in,)),
        target=(target, dtype, (n_tokens, d_in)),
        gradient=(gradient, dtype, (n_tokens, d_in)),
        errors=(errors, dtype, (n_tokens,)),
    )
    _run_rows(_compiled().squared_errors, n_tokens, (decoded, bias, target, gradient, errors), numbers=(scale,))
    _mark_written(decoded, gradient, errors)


def sort_by_feature(
    features: Int64[Tensor, " n_entries"],
    row_starts: Int64[Tensor, " n_rows_and_1"],
    *,
    starts: Int64[Tensor, " n_features_and_2"],
    order: Int64[Tensor, " n_entries"],
    rows: Int64[Tensor, " n_entries"],
) -> None:
    """A stable sort: ``order`` and ``rows`` get position and row of each entry, feature after feature.

    ``starts``, zeros before, gets where each of the n_features begins, and the number of entries twice.
    """
    n_entries = features.numel()
    _check(
        "sort_by_feature",
        features=(features, torch.int64, (n_entries,)),
        row_starts=(row_starts, torch.int64, (row_starts.numel(),)),
        starts=(starts, torch.int64, (starts.numel(),)),
        order=(order, torch.int64, (n_entries,)),
        rows=(rows, torch.int64, (n_entries,)),
    )
    _check_indices("sort_by_feature", starts.numel() - 2, features=features)
    _check_starts("sort_by_feature", n_entries, row_starts=row_starts)
    _run_rows(_compiled().sort_by_feature, 1, (features, row_starts, starts, order, rows))
    _mark_written(starts, order, rows)


def quantize_rows(
    table: Float32[Tensor, "n d"],
    scale: Float32[Tensor, " n"],
    rows: Int64[Tensor, " n_rows"],
    *,
    codes: Int8[Tensor, "n d"],
    steps: Float32[Tensor, " n"],
    coded_lengths: Float32[Tensor, " n"],
    residual_lengths: Float32[Tensor, " n"],
    slack: float,
) -> None:
    """Some rows of ``scale * table``, rotated, as ``steps * codes``; their lengths so, and those of what they miss.

    The rotation is a Hadamard matrix over as many coordinates as the largest power of two in d has. ``slack`` times the
    length of a row is added to its ``residual_lengths``.
    """
    n, d = table.shape
    _check(
        "quantize_rows",
        table=(table, torch.float32, (n, d)),
        scale=(scale, torch.float32, (n,)),
        rows=(rows, torch.int64, (rows.numel(),)),
        codes=(codes, torch.int8, (n, d)),
        steps=(steps, torch.float32, (n,)),
        coded_lengths=(coded_lengths, torch.float32, (n,)),
        residual_lengths=(residual_lengths, torch.float32, (n,)),
    )
    tensors = (table, scale, rows, codes, steps, coded_lengths, residual_lengths)
    _run_rows(_compiled().quantize_rows, rows.numel(), tensors, sizes=(d & -d,), numbers=(slack,))


class Candidates(NamedTuple):
    """Features that may be among the k best of a token, as far as they are known.

    Attributes:
        best_likely: the k largest likely scores so far, smallest first; before, what scores have to exceed.
        cuts: what an upper bound has to exceed.
        n_found: number of candidates; capacity + 1 for a token that is given up, having more than there is room for.
        found: the candidates.
        upper: their upper bounds.
        likely: scores that they are likely to reach.
    """

    best_likely: Float32[Tensor, "n_tokens k"]
    cuts: Float32[Tensor, " n_tokens"]
    n_found: Int64[Tensor, " n_tokens"]
    found: Int32[Tensor, "n_tokens capacity"]
    upper: Float32[Tensor, "n_tokens capacity"]
    likely: Float32[Tensor, "n_tokens capacity"]

    def arguments(self) -> dict[str, _Argument]:
        """What they must be, for ``_check``."""
        (n_tokens, k), capacity, single = self.best_likely.shape, self.found.shape[1], torch.float32
        return {
            "best_likely": (self.best_likely, single, (n_tokens, k)),
            "cuts": (self.cuts, single, (n_tokens,)),
            "n_found": (self.n_found, torch.int64, (n_tokens,)),
            "found": (self.found, torch.int32, (n_tokens, capacity)),
            "upper": (self.upper, single, (n_tokens, capacity)),
            "likely": (self.likely, single, (n_tokens, capacity)),
        }


def gather_candidates(
    products: Float32[Tensor, "n_tokens n_features"] | Int32[Tensor, "n_tokens n_features"],
    token_terms: Float32[Tensor, "3 n_tokens"],
    feature_terms: Float32[Tensor, "4 d_sae"],
    candidates: Candidates,
    *,
    first: int,
    magnitude: bool,
    pad: float,
    doubt: float,
) -> None:
    """Look through features ``first`` on, whose products are given, for candidates; they are added to what was found.

    The score of a token with terms t and a feature with terms f is ``t0 * (f0 * product) + f1``, give or take
    ``t1 * f2 + t2 * f3 + pad``; with ``magnitude`` its absolute value counts. It is likely to reach the middle
    less the share ``doubt`` of that. Cuts follow from likely scores; ``best_of_candidates`` sees whether k scores reach
    them.
    """
    n_tokens, n_features = products.shape
    d_sae = feature_terms.shape[1]
    if first + n_features > d_sae:
        raise ValueError(f"gather_candidates: features {first} to {first + n_features} of {d_sae}")
    if len(candidates.cuts) != n_tokens:
        raise ValueError(f"gather_candidates: candidates of {len(candidates.cuts)} tokens, products of {n_tokens}")
    dtype = torch.int32 if products.dtype == torch.int32 else torch.float32
    _check(
        "gather_candidates",
        products=(products, dtype, (n_tokens, n_features)),
        token_terms=(token_terms, torch.float32, (3, n_tokens)),
        feature_terms=(feature_terms, torch.float32, (4, d_sae)),
        **candidates.arguments(),
    )
    tensors = (token_terms, feature_terms, products, *candidates)
    _run_rows(_compiled().gather_candidates, n_tokens, tensors, sizes=(first, int(magnitude)), numbers=(pad, 1 + doubt))


def best_of_candidates(
    x: Float32[Tensor, "n_tokens d_in"],
    encoder_rows: Float32[Tensor, "d_sae d_in"],
    bias: Float32[Tensor, " d_sae"],
    scale: Float32[Tensor, " d_sae"],
    candidates: Candidates,
    *,
    magnitude: bool,
    scores: Float32[Tensor, "n_tokens k"],
    indices: Int64[Tensor, "n_tokens k"],
    n_scored: Int64[Tensor, " n_tokens"],
) -> None:
    """The largest scores ``(x . row + bias) * scale`` of each token, exactly and by feature; of equal ones the first.

    Args:
        x: what the encoder reads.
        encoder_rows: of all features.
        bias: see above.
        scale: see above.
        candidates: as of ``gather_candidates``, after all features.
        magnitude: rank by absolute value; scores keep their sign.
        scores: before, what they have to exceed.
        indices: before, -1, which stays where fewer scores exceed that.
        n_scored: gets the number of exact scores that it took; -1 for a token that is given up, because candidates are
            too many, or k scores do not reach the cut.
    """
    (n_tokens, d_in), d_sae, k, single = x.shape, encoder_rows.shape[0], scores.shape[1], torch.float32
    _check(
        "best_of_candidates",
        x=(x, single, (n_tokens, d_in)),
        encoder_rows=(encoder_rows, single, (d_sae, d_in)),
        bias=(bias, single, (d_sae,)),
        scale=(scale, single, (d_sae,)),
        scores=(scores, single, (n_tokens, k)),
        indices=(indices, torch.int64, (n_tokens, k)),
        n_scored=(n_scored, torch.int64, (n_tokens,)),
        **candidates.arguments(),
    )
    _, *found = candidates
    tensors = (x, encoder_rows, bias, scale, *found, scores, indices, n_scored)
    _run_rows(_compiled().best_of_candidates, n_tokens, tensors, sizes=(int(magnitude),))


def _compiled() -> ModuleType:
    """Numba's kernels for a caller that has asked ``kernels_take``."""
    module = load_kernels()
    if module is None:
        raise RuntimeError('kernels need numba: ask kernels_take first, or pip install "saelens_asi[fast]"')
    return module


def _check(kernel: str, **arguments: _Argument) -> None:
    """The one place where what a kernel gets is looked at: each tensor with the dtype and shape that it must have.

    Raises ValueError, which names the argument, for a tensor of another dtype, shape or device, or not contiguous.
    """
    for name, (tensor, dtype, shape) in arguments.items():
        fits = tensor.dtype == dtype and tensor.shape == shape and tensor.device.type == "cpu"
        if not (fits and tensor.is_contiguous()):
            layout = "" if tensor.is_contiguous() else ", not contiguous"
            raise ValueError(
                f"{kernel}: {name} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}{layout}; it must be "
                f"{dtype} {shape}, contiguous, on a CPU"
            )


def _check_indices(kernel: str, n: int, **arguments: Int64[Tensor, " m"]) -> None:
    """Raise ValueError, which names the argument and the entry, for an index that is not in 0 to ``n`` - 1."""
    for name, indices in arguments.items():
        if indices.numel() == 0:
            continue
        least, largest = (int(bound) for bound in indices.aminmax())
        if least < 0 or largest >= n:
            wrong = least if least < 0 else largest
            place = int((indices == wrong).nonzero()[0])
            raise ValueError(f"{kernel}: {name}[{place}] is {wrong}; it must lie in 0 to {n - 1}")


def _check_starts(kernel: str, n_entries: int, **arguments: Int64[Tensor, " m"]) -> None:
    """Raise ValueError, which names the argument, for bounds that do not ascend from 0 to ``n_entries``."""
    for name, starts in arguments.items():
        if starts.numel() == 0 or starts[0] != 0 or starts[-1] != n_entries or (starts[1:] < starts[:-1]).any():
            raise ValueError(f"{kernel}: {name} must ascend from 0 to the number of entries, {n_entries}")


def _mark_written(*outputs: Tensor) -> None:
    """Tell autograd what a kernel has written: what was saved for a backward pass before is then refused there."""
    for tensor in outputs:
        torch.autograd.graph.increment_version(tensor)


def _run_rows(
    kernel: Callable[..., None],
    n: int,
    tensors: Sequence[Tensor],
    *,
    sizes: Sequence[int] = (),
    numbers: Sequence[float] = (),
) -> None:
    """Call a kernel of ``numba_kernels`` for rows 0 to n, on as many threads as torch uses.

    Args:
        kernel: gets tensors as arrays, sizes, numbers in the dtype of the first tensor, and the rows of a part.
        n: rows of its output.
        tensors: arrays of the kernel.
        sizes: its whole numbers.
        numbers: its other numbers.
    """
    arrays = [tensor.detach().numpy() for tensor in tensors]
    to_dtype = arrays[0].dtype.type
    arguments: list[np.ndarray | np.generic | int] = [*arrays, *sizes, *(to_dtype(number) for number in numbers)]
    n_threads = torch.get_num_threads()
    n_parts = min(n, n_threads * _PARTS_PER_THREAD)
    if n_threads == 1 or n_parts <= 1:
        kernel(*arguments, 0, n)
        return
    bounds = [n * i // n_parts for i in range(n_parts + 1)]
    parts = iter(list(itertools.pairwise(bounds)))

    # Threads take parts as they get free. Which thread takes which does not matter to the bits: a part is all of a row.
    def work() -> None:
        for lo, hi in parts:
            kernel(*arguments, lo, hi)

    others = [_pool(n_threads - 1, os.getpid()).submit(work) for _ in range(n_threads - 1)]
    work()
    for other in others:
        other.result()


@cache
def _pool(n_threads: int, process: int) -> ThreadPoolExecutor:
    """Threads of this process; a fork has none of its parent's."""
    return ThreadPoolExecutor(n_threads, thread_name_prefix="saelens_asi")
