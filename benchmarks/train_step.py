"""What a training step costs, against its floor, stock SAELens and EleutherAI's sparsify.

    python -m benchmarks.train_step                          # random activations, the sizes of the README
    python -m benchmarks.train_step --activations smollm2    # a real model's attention output (the committed run)
    python -m benchmarks.train_step --d-sae 131072 --sides floor ours

The floor is one encoder product with bias (``addmm``) and one ``topk`` of its result. All sides start from the same
weights and see the same batches, their repetitions interleave, medians are compared. Memory is measured in a process
of its own for each side: the peak above what it held before its first step, less the optimizer's moments.
sparsify takes part where it is installed (``pip install --no-deps eai-sparsify natsort schedulefree``).
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import importlib.util
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from sae_lens import SAETrainer, TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from torch import Tensor
from tqdm import tqdm

from benchmarks.ablation import activations
from saelens_asi import ActiveSubspaceInit, RunningMoments, Spectrum, initialize_
from saelens_asi.evaluation.tables import markdown_table
from saelens_asi.plugin import topk_pass as sparse_topk
from saelens_asi.sparse import kernels
from saelens_asi.sparse.gradients import TopKGradients
from saelens_asi.sparse.rows import Activations
from saelens_asi.sparse.screens import AdaptiveScreen, Whole

RESULTS = Path(__file__).parent / "results"
LR = 3e-4
Step = Callable[[Tensor], object]


def batches(args: argparse.Namespace) -> list[Tensor]:
    if args.activations == "smollm2":
        data = activations(300_000, 80_000)[0][: 16 * args.batch]
    else:
        generator = torch.Generator().manual_seed(0)
        scales = torch.linspace(0, -4, args.d_in).exp()  # a decaying spectrum around a mean, as attention outputs have
        data = torch.randn(16 * args.batch, args.d_in, generator=generator) * scales + scales.flip(0)
    return [batch.to(args.device) for batch in data.split(args.batch) if len(batch) == args.batch]


def make_trainer(args: argparse.Namespace, data: list[Tensor], **flags: Any) -> SAETrainer:
    """A trainer as SAELens makes it, around weights from Active Subspace Initialization (or SAELens's own)."""
    torch.manual_seed(0)
    d_in = data[0].shape[1]
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=d_in, d_sae=args.d_sae, k=args.k, device=args.device, **flags))
    if getattr(args, "initialize", True):
        moments = RunningMoments.zeros(d_in)
        moments.update_(torch.cat(data[:4]).cpu())
        initialize_(sae, ActiveSubspaceInit(), Spectrum.from_moments(moments), data[0][:1024])
    cfg = SAETrainerConfig(
        total_training_samples=10**9,
        train_batch_size_samples=args.batch,
        lr=LR,
        lr_end=LR,
        lr_warm_up_steps=10,
        device=args.device,
        autocast=args.autocast,
    )
    return SAETrainer(cfg, sae, iter(()))


def floor(args: argparse.Namespace, data: list[Tensor]) -> Step:
    trainer = make_trainer(args, data)
    W_enc, b_enc = trainer.sae.W_enc.detach(), trainer.sae.b_enc.detach()

    def step(x: Tensor) -> None:
        with torch.no_grad(), torch.autocast(args.device, torch.bfloat16, enabled=args.autocast):
            torch.addmm(b_enc, x, W_enc).topk(args.k, dim=1, sorted=False)

    return step


def stock(args: argparse.Namespace, data: list[Tensor]) -> Step:
    return make_trainer(args, data).step


def ours(args: argparse.Namespace, data: list[Tensor]) -> Step:
    return make_trainer(args, data, optimizer="sparse_adam").step


def sparsify(args: argparse.Namespace, data: list[Tensor]) -> Step:
    """Its coder and its training step without normalization of the decoder, which would only add to the work."""
    from sparsify.config import SparseCoderConfig
    from sparsify.sparse_coder import SparseCoder

    initial = make_trainer(args, data).sae
    cfg = SparseCoderConfig(num_latents=args.d_sae, k=args.k, normalize_decoder=False)
    coder = SparseCoder(initial.cfg.d_in, cfg, device=args.device)
    with torch.no_grad():
        coder.encoder.weight.copy_(initial.W_enc.t())
        coder.W_dec.copy_(initial.W_dec)
        coder.b_dec.copy_(initial.b_dec)
    optimizer = torch.optim.Adam(coder.parameters(), lr=LR)

    def step(x: Tensor) -> None:
        coder(x).fvu.backward()
        torch.nn.utils.clip_grad_norm_(coder.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


SIDES: dict[str, Callable[[argparse.Namespace, list[Tensor]], Step]] = {
    "floor": floor,
    "stock": stock,
    "sparsify": sparsify,
    "ours": ours,
}


def synchronize(args: argparse.Namespace) -> None:
    if args.device == "cuda":
        torch.cuda.synchronize()


def measure_times(args: argparse.Namespace, data: list[Tensor]) -> dict[str, list[float]]:
    """Seconds of each step, by side; repetitions interleave."""
    steps = {side: SIDES[side](args, data) for side in args.sides}
    times: dict[str, list[float]] = {side: [] for side in steps}
    supply = itertools.cycle(data)
    for i in tqdm(range(args.warm_up + args.repeats), desc="all sides in turn", unit="round", disable=None):
        x = next(supply)
        for side, step in steps.items():
            synchronize(args)
            start = time.perf_counter()
            step(x)
            synchronize(args)
            if i >= args.warm_up:
                times[side].append(time.perf_counter() - start)
    return times


def measure_memory(args: argparse.Namespace, data: list[Tensor]) -> int:
    """Bytes that this process's only side needs at its peak, above parameters, moments and data."""
    (side,) = args.sides
    step = SIDES[side](args, data)
    moments = 0 if side == "floor" else 2 * 2 * args.d_sae * data[0].shape[1] * 4
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        before = _status("VmRSS")
    for x in data[:3]:
        step(x)
    peak = torch.cuda.max_memory_allocated() if args.device == "cuda" else _status("VmHWM")
    return peak - before - moments


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def parts_of_a_step(args: argparse.Namespace, data: list[Tensor]) -> dict[str, float]:
    """Median seconds of the parts of our step; what is not listed there is the last but one entry.

    A stop of the machine falls into one part of one repetition, and no median sees it.
    """
    gc.collect()  # of trainers that were measured before
    trainer = make_trainer(args, data, optimizer="sparse_adam")
    parts = (
        (sparse_topk, "_encode", "encoder and top-k"),
        (AdaptiveScreen, "rows_changed", "screen of the rows that moved"),
        (Activations, "decode", "decoding"),
        (sparse_topk, "topk_gradients", "gradients of the rows"),
        (sparse_topk, "_losses_and_gradients", "losses and their gradients"),
        (TopKGradients, "row_square", "norm for clipping"),
        (trainer.optimizer, "step", "SparseAdam"),
        (trainer, "_train_step", "whole step"),
    )
    totals: dict[str, float] = defaultdict(float)
    runs: dict[str, list[float]] = defaultdict(list)
    with ExitStack() as stack:
        for owner, name, part in parts:
            call = _timed(args, getattr(owner, name), part, totals)
            stack.enter_context(mock.patch.object(owner, name, call))
        rounds = tqdm(range(args.warm_up + args.repeats), desc="parts of our step", unit="step", disable=None)
        for i, x in zip(rounds, itertools.cycle(data), strict=False):
            totals.clear()
            trainer.step(x)
            if i >= args.warm_up:
                whole = totals.pop("whole step")
                rest = whole - sum(totals.values())
                for part, seconds in {**totals, "everything else": rest, "whole step": whole}.items():
                    runs[part].append(seconds)
    return {part: statistics.median(seconds) for part, seconds in runs.items()}


def _timed(
    args: argparse.Namespace, function: Callable[..., Any], part: str, totals: dict[str, float]
) -> Callable[..., Any]:
    """The function, and the seconds of its calls added up in ``totals``."""

    def call(*positional: Any, **named: Any) -> Any:
        synchronize(args)
        start = time.perf_counter()
        result = function(*positional, **named)
        synchronize(args)
        totals[part] += time.perf_counter() - start
        return result

    return call


# Read by MKL, oneDNN, torch and numba, each for itself: with these a processor counts as a lesser one.
_INSTRUCTIONS = ("MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "NUMBA_CPU_NAME")


def machine() -> dict[str, Any]:
    """The processor, what it can do, how much of it was used, and versions."""
    cpu = dict(
        reversed([(key.strip(), value.strip()) for key, _, value in (line.partition(":") for line in _cpu_info())])
    )
    family = f" (family {cpu['cpu family']}, model {cpu['model']})" if "cpu family" in cpu else ""
    model = cpu.get("model name", "unknown") + family
    can = [flag for flag in ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8") if flag in cpu.get("flags", "")]
    numba = importlib.metadata.version("numba") if kernels.enabled and kernels.load_kernels() else None
    described = {"numba": numba, "cpu": model, "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    described |= {"vector": torch.backends.cpu.get_cpu_capability(), "instructions": can, "torch": torch.__version__}
    described |= {name: os.environ[name] for name in _INSTRUCTIONS if name in os.environ}
    if torch.cuda.is_available():
        described["gpu"] = torch.cuda.get_device_name()
    return {**described, "system": platform.system(), "python": platform.python_version()}


def _cpu_info() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def report(result: dict[str, Any]) -> str:
    medians = {side: statistics.median(seconds) for side, seconds in result["seconds"].items()}
    sizes = ", ".join(f"{name} = {result[name]:,}" for name in ("d_in", "d_sae", "k", "batch"))
    cells = []
    for side, seconds in medians.items():
        ratio = f"{seconds / medians['floor']:.2f}" if "floor" in medians else ""
        memory = result["bytes"].get(side)
        cells.append((side, f"{seconds:.3f}", ratio, "" if memory is None else f"{memory / 2**30:.2f}"))
    sections = [
        f"{sizes}; {result['activations']} activations",
        markdown_table(["side", "s a step", "x floor", "GiB"], cells, align="llll"),
    ]
    for kind, of in (("parts", "our step"), ("parts_without_screen", "our step with the whole product")):
        whole = result[kind].get("whole step", 1.0)
        cells = [(part, f"{seconds:.3f}", f"{seconds / whole:.1%}") for part, seconds in result[kind].items()]
        sections.append(markdown_table([f"part of {of}", "s", "share"], cells, align="lll"))
    return "\n\n".join(sections)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d-in", type=int, default=576, help="width of random activations (default: 576)")
    parser.add_argument("--d-sae", type=int, default=32_768)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--activations", choices=["random", "smollm2"], default="random")
    parser.add_argument("--sides", nargs="+", choices=list(SIDES), default=list(SIDES))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--autocast", action="store_true", help="bfloat16 products, as SAELens's autocast has them")
    parser.add_argument("--no-kernels", action="store_true", help="torch's operations alone, as without numba")
    parser.add_argument("--out", type=Path, help="where to write the result (default: benchmarks/results)")
    parser.add_argument("--memory-of-one-side", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if importlib.util.find_spec("sparsify") is None:
        args.sides = [side for side in args.sides if side != "sparsify"]
    kernels.enabled = not args.no_kernels
    data = batches(args)
    if args.memory_of_one_side:
        print(measure_memory(args, data))
        return
    result = {
        **{name: getattr(args, name) for name in ("d_sae", "k", "batch", "activations", "device", "autocast")},
        "d_in": data[0].shape[1],
        "machine": machine(),
        "bytes": {
            side: _memory_in_a_process_of_its_own(side)
            for side in tqdm(args.sides, desc="memory of each side", unit="process", disable=None)
        },
        "seconds": measure_times(args, data),
        "parts": parts_of_a_step(args, data) if "ours" in args.sides else {},
    }
    with mock.patch.object(
        AdaptiveScreen, "_approximations", lambda self, x, encoder: iter([(Whole.of(encoder), 0.0)])
    ):
        result["parts_without_screen"] = parts_of_a_step(args, data) if "ours" in args.sides else {}
    name = f"train_step_{args.activations}_{args.d_sae}{'_autocast' if args.autocast else ''}_{args.device}"
    name += f"{'_torch' if args.no_kernels else ''}.json"
    path = args.out or RESULTS / name
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(report(result))
    print(f"\nwrote {path}")


def _memory_in_a_process_of_its_own(side: str) -> int:
    command = [sys.executable, "-m", "benchmarks.train_step", *sys.argv[1:], "--sides", side]
    done = subprocess.run([*command, "--memory-of-one-side"], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


if __name__ == "__main__":
    main()
