"""What a pass over a model's activations costs, and how exact its eigenvalues are.

    python -m benchmarks.spectra [--out FILE] [--repeats 5]

SmolLM2-135M, all 30 layers x 4 hooks in one pass, against the model's own forward pass over the same tokens, the two in
turn; and the accumulation alone against its matrix products alone: the same panels, on chunks that are already centred
and in float64. Medians of the pass, the fastest of many repeats of the accumulation (milliseconds, which other work on
the machine disturbs). Goals: 1.5 and 1.3.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saelens_asi import RunningMoments, activation_spectra
from saelens_asi.activations.loading import EMBEDDED_MODEL, load_model
from saelens_asi.activations.texts import world_english_bible
from saelens_asi.activations.tokens import token_batches
from saelens_asi.spectra.moments import _CHUNK, _panels

HOOKS = [f"blocks.*.{name}" for name in ("hook_attn_out", "hook_mlp_out", "hook_resid_post", "attn.hook_z")]
WINDOWS, CONTEXT = 8, 256


def in_turn(repeats: int, *functions: Callable[[], object]) -> list[list[float]]:
    """Seconds of each function, called in turn, after one call each that does not count."""
    times: list[list[float]] = [[] for _ in functions]
    for repeat in range(repeats + 1):
        for function, seconds in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            if repeat:
                seconds.append(time.perf_counter() - start)
    return times


def pass_against_forward(repeats: int) -> dict[str, Any]:
    model = load_model(EMBEDDED_MODEL)
    training, _ = world_english_bible()
    tokens, _ = next(iter(token_batches(model, training, WINDOWS, CONTEXT)))

    @torch.no_grad()
    def forward() -> Tensor:
        return model(tokens, return_type="logits")

    def spectra() -> None:
        activation_spectra(model, tokens, HOOKS, batch_size=WINDOWS, progress=False)

    def one_hook() -> None:
        activation_spectra(model, tokens, ["blocks.15.hook_attn_out"], batch_size=WINDOWS, progress=False)

    own, ours, one = in_turn(repeats, forward, spectra, one_hook)
    ratios = [a / b for a, b in zip(ours, own, strict=True)]
    return {
        "n_tokens": tokens.numel(),
        "hooks": 4 * model.cfg.n_layers,
        "forward_seconds": statistics.median(own),
        "pass_seconds": statistics.median(ours),
        "pass_to_forward": statistics.median(ratios),
        "pass_to_forward_range": [min(ratios), max(ratios)],
        "layer_15_alone_to_forward": statistics.median(a / b for a, b in zip(one, own, strict=True)),
    }


def accumulation_against_products(d: int, n: int, repeats: int) -> dict[str, Any]:
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(0)) + 1
    moments = RunningMoments.zeros(d)
    centred = [(chunk - x.mean(dim=0)).double() for chunk in x.split(_CHUNK)]
    scatter = torch.zeros(d, d, dtype=torch.float64)

    def products() -> None:
        for values in centred:
            for start, stop in _panels(d):
                scatter[start:stop, start:].addmm_(values[:, start:stop].T, values[:, start:])

    def whole_products() -> None:
        for values in centred:
            scatter.addmm_(values.T, values)

    ours, floor, whole = in_turn(repeats, lambda: moments.update_(x), products, whole_products)
    return {
        "d": d,
        "n_tokens": n,
        "update_ms": 1000 * min(ours),
        "products_ms": 1000 * min(floor),
        "update_to_products": min(ours) / min(floor),
        "update_to_whole_products": min(ours) / min(whole),
    }


def eigenvalue_error(d: int, n: int, mean: float, dtype: torch.dtype) -> dict[str, Any]:
    """Largest error of an eigenvalue over the largest of them, against two passes over the values in float64."""
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(n, d, generator=generator) * torch.logspace(0, -2, d) + mean).to(dtype)
    moments = RunningMoments.zeros(d)
    for batch in x.split(2048):
        moments.update_(batch)
    centred = x.double() - x.double().mean(dim=0)
    expected = torch.linalg.eigvalsh(centred.T @ centred)
    error = (torch.linalg.eigvalsh(moments.scatter) - expected).abs().max() / expected[-1]
    return {"d": d, "n_tokens": n, "mean_to_deviation": mean, "dtype": str(dtype), "error": float(error)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    results = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "accumulation": [accumulation_against_products(d, 2048, n * args.repeats) for d, n in ((576, 20), (2048, 3))],
        "eigenvalues": [
            eigenvalue_error(576, 20_000, mean, dtype)
            for mean in (0.0, 1000.0)
            for dtype in (torch.float32, torch.bfloat16)
        ],
        "pass": pass_against_forward(args.repeats),
    }
    text = json.dumps(results, indent=1)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
