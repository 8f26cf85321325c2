"""Trains what the plan names and the results lack; any number of processes may do so at a time.

    OMP_NUM_THREADS=1 python -m benchmarks.claims.train pilot d_init     # in as many shells as there are cores
    python -m benchmarks.claims.train factorial --device cuda            # several shells share one GPU well

Each finished SAE is one line of benchmarks/results/claims/<part>.jsonl at once. The same command goes on where it
stopped. SAELens's Adam takes torch's fused form: the same update, in a seventh of the time on a CPU.
"""

from __future__ import annotations

import argparse
import functools
import platform
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from sae_lens import TrainingSAE
from sae_lens.training import sae_trainer
from torch import Tensor

from benchmarks.claims.plan import PARTS, Item, items
from benchmarks.claims.records import digest_of, is_among, keep, read, taken
from benchmarks.claims.rivals import RIVALS, train_rival
from benchmarks.claims.sources import CACHE, MODEL_TITLES, activations
from saelens_asi.evaluation.run import evaluate
from saelens_asi.spectra.moments import RunningMoments
from saelens_asi.spectra.spectrum import Spectrum
from saelens_asi.sweep.run import MEASURED, measure, train_cell

# Of the tokens, where the error is measured on the way, on as many held-out activations.
CURVE, CURVE_TOKENS = (0.0625, 0.125, 0.25, 0.5, 0.75), 30_000
LEAST_FOR_A_CURVE = 1_000_000


@cache
def processor(device: str = "cpu") -> str:
    """The name of what trains."""
    if device != "cpu":
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


@cache
def of_activations(source: Any, hook: str) -> dict[str, float]:
    """What the spectrum of a hook says: rank, and how long the mean is against the deviation (gamma)."""
    train, _ = activations(source, hook)
    return of_spectrum(streamed_spectrum(train[:100_000]))


def streamed_spectrum(activations: Tensor) -> Spectrum:
    """Of (n, d_in) activations that lie on the disk, a part at a time."""
    moments = RunningMoments.zeros(activations.shape[1])
    for part in activations.split(8192):
        moments.update_(part.float())
    return Spectrum.from_moments(moments)


def of_spectrum(spectrum: Spectrum) -> dict[str, float]:
    return {
        "d_in": spectrum.d,
        "effective_rank": spectrum.effective_rank,
        "gamma": spectrum.gamma,
        **{f"dimension_{share}": spectrum.intrinsic_dimension(share) for share in (0.5, 0.9, 0.99)},
    }


@cache
def on_device(source: Any, hook: str, device: str) -> tuple[Tensor, Tensor]:
    """Activations to train and to evaluate on; on a GPU they lie whole."""
    training_set, held_out = activations(source, hook)
    return (training_set, held_out) if device == "cpu" else (training_set.to(device), held_out.to(device))


def train(item: Item, device: str = "cpu") -> tuple[TrainingSAE, dict[str, Any]]:
    """Train and measure one SAE."""
    training_set, held_out = on_device(item.source, item.hook, device)
    training = replace(item.training, device=device)
    marks = {round(share * item.training.steps) * item.batch for share in CURVE}
    curve: list[tuple[int, float, float]] = []

    def watch(n_tokens: int, sae: TrainingSAE) -> None:
        if item.tokens >= LEAST_FOR_A_CURVE and n_tokens in marks:
            found = evaluate(sae, activations=held_out[:CURVE_TOKENS].float(), ranks=False, progress=False)
            curve.append((n_tokens, found.nmse, found.dead_fraction))

    if item.contender in RIVALS:
        sae, record = train_rival(item.contender, item.cell, training, training_set, watch)
        found = evaluate(sae, activations=held_out.float(), ranks=False, progress=False)
        measured: dict[str, Any] = {name: getattr(found, name) for name in MEASURED}
    else:
        trainer, record = train_cell(item.cell, training, training_set, watch)
        sae, measured = trainer.sae, dict(measure(trainer, training, held_out))
    return sae, {**measured, **record, **({"curve": curve} if curve else {})}


def sae_folder(item: Item) -> Path:
    name = item.contender.replace(", ", "_").replace(" ", "-")
    return (
        CACHE
        / "saes"
        / f"{item.part}_{item.model}_{item.text}_{name}_{item.cell.d_sae}_{item.cell.seed}_{digest_of(item.key())}"
    )


def asked(parts: Sequence[str], model: str | None, contenders: Sequence[str] | None) -> list[Item]:
    """Items of the plan: of one model, and of some contenders in their order, where these are given."""
    found = [item for item in items(parts) if model in (None, item.model)]
    if contenders is None:
        return found
    return [item for name in contenders for item in found if item.contender == name]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=list(PARTS))
    parser.add_argument("--list", action="store_true", help="name what is missing and train nothing")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model", choices=list(MODEL_TITLES), help="of this one alone")
    parser.add_argument("--contender", nargs="+", help="these alone, in this order")
    parser.add_argument("--saes", action="store_true", help="also train again, without a new line, what lies nowhere")
    args = parser.parse_args()
    torch.set_num_threads(1)
    sae_trainer.Adam = functools.partial(torch.optim.Adam, fused=True)
    for item in asked(args.parts, args.model, args.contender):
        with taken(item.key()) as mine:
            is_known = is_among(read(item.part), item.key())
            if not mine or (is_known and not (args.saes and item.save and not sae_folder(item).exists())):
                continue
            if args.list:
                print(item)
                continue
            sae, measured = train(item, args.device)
            if item.save:
                sae.cfg.metadata.hook_name = item.hook
                sae.save_inference_model(str(sae_folder(item)))
            if is_known:
                continue
            of_hook = of_activations(item.source, item.hook)
            keep(item.part, {**item.key(), **of_hook, **measured, "processor": processor(args.device)})
            print(
                f"{item.part}: {item.model} {item.text} {item.hook} {item.contender} d_sae {item.cell.d_sae} "
                f"lr {item.cell.lr:g} d_init {item.cell.d_init} seed {item.cell.seed}: NMSE {measured['nmse']:.4f}, "
                f"dead {measured['dead_fraction']:.2%}, {measured['cpu_seconds']} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
