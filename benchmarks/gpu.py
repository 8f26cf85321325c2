"""A training step on a GPU: first whether it is right, then what it costs against a floor, SAELens and sparsify.

    make gpu                                     # or: python -m benchmarks.gpu
    python -m benchmarks.gpu --d-sae 32768 --d-in 576 --precision bf16

The checks compare every kernel with its twin, and steps on the GPU with those on the CPU. The floor is one encoder
product with bias (``addmm``) and one ``topk`` of its result, both in bfloat16. Sizes that the card has no memory for
are said and not tried. Cells are written as they are measured, and a second call goes on with those that are missing.
sparsify takes part where it is installed, with its Triton kernels where Triton is.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import itertools
import json
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks import train_step
from benchmarks.train_step import RESULTS, Step, machine, make_trainer
from saelens_asi.evaluation.tables import markdown_table
from saelens_asi.sparse import fused_step, fused_topk
from saelens_asi.sparse.fused_step import AdamNumbers, Decoded, FusedEntries
from saelens_asi.sparse.operators import OPERATORS, load_triton_kernels
from saelens_asi.sparse.topk import Encoder

D_SAE, D_IN = (32_768, 131_072, 1_048_576), (576, 4096)
PRECISIONS = ("float32", "tf32", "bf16")
SIDES = ("floor", "stock", "sparsify", "ours")
NO_GPU = 3  # exit code


@contextmanager
def precision(name: str) -> Iterator[bool]:
    """Products in TF32 or not; the value says whether autocast is on."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
    try:
        yield name == "bf16"
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def needed_bytes(side: str, d_sae: int, d_in: int, batch: int) -> int:
    """Memory that a side is expected to take at its peak; for the floor, scores and what topk copies of them."""
    weights, scores = 2 * d_sae * d_in, batch * d_sae
    numbers = {
        "floor": 1.5 * weights + 1.5 * scores,
        "stock": 4 * weights + 6 * scores,
        "sparsify": 5 * weights + 2 * scores,
        "ours": 3.3 * weights + 2**28,
    }
    return int(4 * numbers[side])


def floor(args: argparse.Namespace, data: list[Tensor]) -> Step:
    W_enc = torch.randn(data[0].shape[1], args.d_sae, device=args.device, dtype=torch.bfloat16)
    b_enc = torch.zeros(args.d_sae, device=args.device, dtype=torch.bfloat16)

    def step(x: Tensor) -> None:
        torch.addmm(b_enc, x.bfloat16(), W_enc).topk(args.k, dim=1, sorted=False)

    return step


def ours(args: argparse.Namespace, data: list[Tensor]) -> Step:
    trainer = make_trainer(args, data, optimizer="sparse_adam")
    trainer.pace.settle()  # the sparse step, also where SAELens's own would be chosen
    return trainer.step


MAKERS: dict[str, Callable[[argparse.Namespace, list[Tensor]], Step]] = {
    **train_step.SIDES,
    "floor": floor,
    "ours": ours,
}


def measure(args: argparse.Namespace, side: str) -> dict[str, Any]:
    """Seconds of a step, and the peak of what torch has allocated."""
    data = train_step.batches(args)
    on_gpu = args.device == "cuda"
    if on_gpu:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    step, supply, seconds = MAKERS[side](args, data), itertools.cycle(data), []
    for i in range(args.warm_up + args.repeats):
        train_step.synchronize(args)
        start = time.perf_counter()
        for _ in range(args.steps):
            step(next(supply))
        train_step.synchronize(args)
        if i >= args.warm_up:
            seconds.append((time.perf_counter() - start) / args.steps)
    found = {"seconds": seconds, "bytes": torch.cuda.max_memory_allocated() if on_gpu else 0}
    return {**found, "parts": parts_of_step(step, supply, args.steps)} if side == "ours" and on_gpu else found


# Parts of our step by the kernels that they are made of; "other" is what torch has beside these.
PARTS = {
    **{"_group_maxima": "first product", "_group_scores": "second product", "_select_top_k": "selection"},
    **{"_decode_tokens": "decode", "_sum_tiles": "gradients", "_gradient_squares": "gradients", "_clip": "gradients"},
    **{"_move_rows": "Adam", "_move_vector": "Adam", "_renew_norms": "Adam", "Sort": "sorting", "sort": "sorting"},
}


def parts_of_step(step: Step, supply: Iterator[Tensor], n_steps: int) -> dict[str, float]:
    """Seconds of a step that the device spends in each of its parts."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(n_steps):
            step(next(supply))
        torch.cuda.synchronize()
    return by_part([(event.key, event.self_device_time_total / 1e6 / n_steps) for event in profile.key_averages()])


def by_part(kernels: list[tuple[str, float]]) -> dict[str, float]:
    """Add up the seconds of kernels by ``PARTS``."""
    found: dict[str, float] = {}
    for kernel, seconds in kernels:
        part = next((part for name, part in PARTS.items() if name in kernel), "other")
        found[part] = found.get(part, 0.0) + seconds
    return found


def check_kernels(device: str, d_in: int = 576, d_sae: int = 9000, k: int = 32, n: int = 512) -> dict[str, float]:
    """The largest difference of each operator from its twin, relative to the largest number; selections are exact."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    W_enc, W_dec, b_enc, b_dec, x = (
        random(d_sae, d_in),
        random(d_sae, d_in),
        random(d_sae),
        random(d_in),
        random(n, d_in),
    )
    b_enc[11] += 1000  # fires on every token
    norms = W_dec.norm(dim=1)
    found = check_selection(x, Encoder(W_enc, b_enc, norms), k)
    best = fused_topk.encode_top_k(x, Encoder(W_enc, b_enc, norms), k)
    arguments = (*best, norms, W_dec, b_dec, x, False)
    found["decode_tokens"] = _difference("decode_tokens", *arguments)
    decoded = Decoded(*fused_step.decode_tokens(*arguments))
    entries = FusedEntries.of(decoded, x, torch.arange(d_sae + 1, dtype=torch.int32, device=device))
    owners = decoded.owners.flatten().sort(stable=True).values
    found["sum_tiles"] = _difference("sum_tiles", owners, *entries.parts()[1:6], d_sae)
    parts = fused_step.gradient_squares(*entries.parts(), W_enc)
    twins = OPERATORS["gradient_squares"].twin(*entries.parts(), W_enc)
    found["gradient_squares"] = max(_relative(a.sum(0), b.sum(0)) for a, b in zip(parts, twins, strict=True))
    found["clip"] = _difference("clip", parts[0], decoded.d_out.sum(0), parts[1].sum(0), 1.0)
    numbers = list(AdamNumbers.of(1e-3, 0.9, 0.999, 1e-8, 5.0))
    params = [W_enc, b_enc, W_dec]
    moments = [0.1 * random(*p.shape) for p in params] + [0.1 * random(*p.shape).abs() for p in params]
    divisor = torch.tensor(2.0, device=device)
    last_steps = [torch.randint(0, 5, (d_sae,), dtype=torch.int32, device=device) for _ in params]
    found["move_rows_"] = max(
        _difference("move_rows_", [*params, *moments], decaying, *entries.parts(), divisor, numbers, 5)
        for decaying in ([], last_steps)
    )
    found["move_vector_"] = _difference("move_vector_", b_dec, random(d_in), random(d_in).abs(), random(d_in), numbers)
    found["renew_norms_"] = _difference("renew_norms_", torch.zeros_like(norms), W_dec, entries.starts)
    x[[0, 5], 3] = torch.nan
    found["keep_finite_rows"] = _difference("keep_finite_rows", x)
    return found


def check_selection(x: Tensor, encoder: Encoder, k: int) -> dict[str, float]:
    """Of the products by themselves, in all precisions: that the second has the bits of the first is exact."""
    found: dict[str, float] = {}
    group = fused_topk.group_size(encoder.rows.shape[0], k)
    for name in PRECISIONS:
        with precision(name) as is_half:
            features = (x.bfloat16() if is_half else x, encoder.rows, encoder.bias, encoder.scale)
            maxima = torch.ops.saelens_asi.group_maxima(*features, group, False)
            _, groups = torch.ops.saelens_asi.select_top_k(maxima, None, k, False)
            owners, order = torch.sort(groups.flatten().int())
            scores = torch.ops.saelens_asi.group_scores(*features, owners, order, group, False)
            same = torch.equal(scores.unflatten(1, (k, group)).amax(dim=2), maxima.gather(1, groups))
            found[f"both products have the same bits in {name}"] = 0.0 if same else float("inf")
            if name == "float32":
                found["group_maxima"] = _difference("group_maxima", *features, group, False)
                found["group_scores"] = _difference("group_scores", *features, owners, order, group, False)
                found["select_top_k"] = max(
                    _difference("select_top_k", maxima, None, k, False),
                    _difference("select_top_k", scores, groups, k, True),
                )
    return found


def _copied(value: Any) -> Any:
    if isinstance(value, list):
        return [_copied(one) for one in value]
    return value.clone() if isinstance(value, Tensor) else value


def _difference(name: str, *arguments: Any) -> float:
    results = []
    for function in (getattr(torch.ops.saelens_asi, name), OPERATORS[name].twin):
        own = [_copied(argument) for argument in arguments]
        out = function(*own)
        written = [tensor for one in own for tensor in (one if isinstance(one, list) else [one])]
        results.append([t for t in (*(out if isinstance(out, tuple) else (out,)), *written) if isinstance(t, Tensor)])
    return max(_relative(kernel, twin) for kernel, twin in zip(*results, strict=True))


def _relative(found: Tensor, expected: Tensor) -> float:
    if not expected.is_floating_point():
        return 0.0 if torch.equal(found, expected) else float("inf")
    if not torch.equal(found.isnan(), expected.isnan()):
        return float("inf")
    difference, size = (found - expected).nan_to_num().abs().max(), expected.nan_to_num().abs().max()
    return float(difference / size.clamp(min=1e-30))


def check_steps(args: argparse.Namespace, n_steps: int = 5) -> dict[str, float]:
    """How weights move in steps on the device against the CPU, in float32; and whether two runs give the same bits."""
    runs = []
    for device in ("cpu", args.device, args.device):
        own = argparse.Namespace(**{**vars(args), "device": device, "autocast": False})
        data = train_step.batches(own)
        trainer = make_trainer(own, data, optimizer="sparse_adam", aux_loss_coefficient=0.0)
        initial = runs[0][0] if runs else {name: p.detach().clone() for name, p in trainer.sae.named_parameters()}
        trainer.sae.load_state_dict(initial)
        trainer.pace.settle()
        with precision("float32"):
            outputs = [trainer.step(batch) for batch in data[:n_steps]]
        weights = {name: param.detach().cpu() for name, param in trainer.sae.named_parameters()}
        runs.append((initial, weights, [float(output.loss) for output in outputs]))
    (initial, cpu, losses), (_, first, own_losses), (_, second, _) = runs
    # By lengths: a gradient of nothing but rounding moves its weight one way or the other, as far as any.
    moves = {name: (first[name] - initial[name], cpu[name] - initial[name]) for name in cpu}
    found = {f"moves of {name}": float((a - b).norm() / b.norm()) for name, (a, b) in moves.items()}
    found["losses"] = max(abs(a / b - 1) for a, b in zip(own_losses, losses, strict=True))
    same = all(torch.equal(first[name], second[name]) for name in first)
    return {**found, "two runs give the same bits": 0.0 if same else float("inf")}


# Largest relative difference of float32 sums in another order; and of Adam's steps with near-zero gradients.
TOLERANCE, TOLERANCE_OF_MOVES = 1e-3, 2e-2


def cells(args: argparse.Namespace) -> list[tuple[int, int, str, str]]:
    """Size, precision and side of each cell; the floor has one precision."""
    sides = [s for s in args.sides if s != "sparsify" or importlib.util.find_spec("sparsify") is not None]
    grid = itertools.product(args.d_sae, args.d_in, args.precision, sides)
    return [
        (d_sae, d_in, name if side != "floor" else "bf16", side)
        for d_sae, d_in, name, side in grid
        if side != "floor" or name == args.precision[0]
    ]


def key_of(d_sae: int, d_in: int, name: str, side: str) -> str:
    return f"{d_sae} {d_in} {name} {side}"


def run_cell(args: argparse.Namespace, cell: tuple[int, int, str, str], available: int) -> dict[str, Any]:
    """The cell's measurement, or why there is none."""
    d_sae, d_in, name, side = cell
    needed = needed_bytes(side, d_sae, d_in, args.batch)
    if needed > available:
        return {"skipped": f"needs about {needed / 2**30:.0f} GiB of {available / 2**30:.0f}"}
    with precision(name) as autocast:
        own = argparse.Namespace(**{**vars(args), "d_sae": d_sae, "d_in": d_in, "autocast": autocast})
        try:
            return measure(own, side)
        except torch.OutOfMemoryError as error:
            return {"skipped": f"out of memory: {str(error).splitlines()[0][:80]}"}


def report(result: dict[str, Any]) -> str:
    """The checks, and a table of all cells."""
    worst = [f"{name}: {value:.1e}" for name, value in result["checks"].items()]
    rows = []
    parts = [
        f"{key}, ms: " + ", ".join(f"{part} {1e3 * seconds:.2f}" for part, seconds in cell["parts"].items())
        for key, cell in result["cells"].items()
        if "parts" in cell
    ]
    for key, cell in result["cells"].items():
        d_sae, d_in, name, side = key.split()
        if "skipped" in cell:
            rows.append((d_sae, d_in, name, side, cell["skipped"], "", "", ""))
            continue
        seconds = statistics.median(cell["seconds"])
        base = result["cells"].get(key_of(int(d_sae), int(d_in), "bf16", "floor"), {})
        ratio = f"{seconds / statistics.median(base['seconds']):.2f}" if "seconds" in base else ""
        tokens, memory = f"{result['batch'] / seconds:,.0f}", f"{cell['bytes'] / 2**30:.2f}"
        rows.append((d_sae, d_in, name, side, f"{1e3 * seconds:.2f}", tokens, memory, ratio))
    head = ["d_sae", "d_in", "precision", "side", "ms a step", "tokens a second", "GiB", "x floor"]
    machine_line = f"{result['machine'].get('gpu', 'no GPU')}; batch = {result['batch']:,}, k = {result['k']}"
    table = markdown_table(head, rows, align="r" * 8)
    return "\n\n".join([machine_line, "\n".join(worst), table, *(["\n".join(parts)] if parts else [])])


def failed(checks: dict[str, float]) -> list[str]:
    """Names of the checks whose difference is too large."""
    limits = {name: TOLERANCE_OF_MOVES if name.startswith("moves") else TOLERANCE for name in checks}
    return [name for name, value in checks.items() if not value <= limits[name]]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d-sae", type=int, nargs="+", default=list(D_SAE))
    parser.add_argument("--d-in", type=int, nargs="+", default=list(D_IN))
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=10, help="steps of a repetition, between two looks at the clock")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--warm-up", type=int, default=2, help="repetitions that do not count")
    parser.add_argument("--again", action="store_true", help="measure cells that are there already")
    parser.add_argument("--out", type=Path, help="where results go (default: benchmarks/results/gpu_NAME.json)")
    args = parser.parse_args(arguments)
    args.activations, args.initialize, args.device = "random", False, "cuda"
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    if not torch.cuda.is_available():
        print("no GPU here: torch.cuda.is_available() is False, so there is nothing to measure", file=sys.stderr)
        return NO_GPU
    name = re.sub(r"[^A-Za-z0-9]+", "_", torch.cuda.get_device_name()).strip("_")
    path = args.out or RESULTS / f"gpu_{name}.json"
    result: dict[str, Any] = {"machine": machine(), "batch": args.batch, "k": args.k, "cells": {}}
    result["machine"]["triton"] = load_triton_kernels() is not None
    if path.exists() and not args.again:
        before = json.loads(path.read_text())
        if all(before[fact] == result[fact] for fact in ("machine", "batch", "k")):
            result["cells"] = before["cells"]
    small = argparse.Namespace(**{**vars(args), "d_sae": 8192, "d_in": 576, "batch": 1024})
    result["checks"] = {**check_kernels(args.device), **check_steps(small)}
    path.write_text(json.dumps(result, indent=1) + "\n")
    if wrong := failed(result["checks"]):
        print(report(result))
        print(f"\nwrong on this GPU, so nothing is measured: {', '.join(wrong)}", file=sys.stderr)
        return 1
    missing = [cell for cell in cells(args) if key_of(*cell) not in result["cells"]]
    for cell in (progress := tqdm(missing)):
        progress.set_description(key_of(*cell))
        free, _ = torch.cuda.mem_get_info()
        result["cells"][key_of(*cell)] = run_cell(args, cell, free)
        path.write_text(json.dumps(result, indent=1) + "\n")
    print(report(result))
    print(f"\nwrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
