"""What the plan's figures are fitted on beside the sweeps of the claims: pilots and SAEs at every hook that is cached.

    OMP_NUM_THREADS=1 python -m benchmarks.plan_sweep            # goes on; in as many shells as there are cores
    OMP_NUM_THREADS=1 python -m benchmarks.plan_sweep --list     # what is missing

Rounds: the pilots of all hooks, then one size after the other, so that what is there is always even over the hooks.
Hooks whose activations are not on the disk are left out, unless --read has the models read them first.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.claims import sources
from benchmarks.claims.records import append, is_among, lines, taken
from benchmarks.claims.sources import BY_HOOK, BY_HOOK_ASIDE, MAIN, Source
from benchmarks.claims.train import of_spectrum, processor, streamed_spectrum
from saelens_asi.evaluation.run import evaluate
from saelens_asi.initialization import AUTO_TOKENS_PER_DIMENSION
from saelens_asi.planning.make import PilotSizes
from saelens_asi.planning.pilots import rate_quantiles, run_pilot
from saelens_asi.planning.recipe import recommended
from saelens_asi.spectra.spectrum import Spectrum
from saelens_asi.sweep.run import SweepTraining, measured, train_cell

RESULTS = Path(__file__).parent / "results" / "plan"
PILOTS, CELLS, VARIANCES = (RESULTS / f"{name}.jsonl" for name in ("pilots", "cells", "variances"))

# One more text; small, since a pilot takes 41 thousand activations.
OWN = (Source("smollm2", "bible", ("blocks.15.hook_attn_out", "blocks.15.hook_mlp_out"), 110_000, 20_000),)
PILOT_SIZES = ((4096, 32), (8192, 32), (4096, 64))

# Features, active ones, tokens; (8,192, 32, 200,000) is among the claims' cells at every hook of BY_HOOK.
ROUNDS = ((2048, 16, 100_000), (8192, 16, 200_000), (4096, 32, 300_000), (16384, 64, 100_000))
LONG = ((2048, 32, 1_000_000), (4096, 64, 500_000), (4096, 32, 2_000_000))
ELSEWHERE = (8192, 32, 200_000)
HELD_OUT = 20_000


def place_of(source: Source, hook: str) -> dict[str, Any]:
    """What names a hook in the results."""
    return {"model": source.model, "text": source.text, "hook": hook}


@dataclass(frozen=True)
class Work:
    """One training: a pilot where ``tokens`` is 0."""

    source: Source
    hook: str
    d_sae: int
    k: int
    tokens: int = 0

    def key(self) -> dict[str, Any]:
        own = {"d_sae": self.d_sae, "k": self.k, **({"tokens": self.tokens} if self.tokens else {})}
        moments = recommended(self.d_sae, self.k).silent_moments
        return {**place_of(self.source, self.hook), **own, "silent_moments": moments}

    @property
    def path(self) -> Path:
        return CELLS if self.tokens else PILOTS


def places() -> list[tuple[Source, str]]:
    """Sources and hooks, each hook once."""
    found: dict[tuple[str, str, str], tuple[Source, str]] = {}
    for source in (MAIN, *BY_HOOK, *BY_HOOK_ASIDE, *OWN):
        for hook in source.hooks:
            found.setdefault((source.model, source.text, hook), (source, hook))
    return list(found.values())


def work() -> Iterator[Work]:
    """All of it, in order."""
    yield from (Work(*place, *size) for place in places() for size in PILOT_SIZES)
    for i, size in enumerate(ROUNDS):
        yield from (Work(*place, *size) for place in places())
        if i == 0:
            yield from (Work(source, hook, *ELSEWHERE) for source in OWN for hook in source.hooks)
        if i == 2:
            yield from (Work(*places()[0], *size) for size in LONG)


def is_cached(source: Source) -> bool:
    """Whether both splits are whole on the disk."""
    states = [source.folder(split) / "cache.json" for split in ("training", "held_out")]
    return all(path.exists() and json.loads(path.read_text()).get("complete") for path in states)


@lru_cache(maxsize=1)
def activations(source: Source, hook: str) -> tuple[Tensor, Tensor]:
    """Activations to train on, and ``HELD_OUT`` spread evenly over the held-out ones."""
    train, held_out = sources.activations(source, hook)
    every = math.ceil(len(held_out) / HELD_OUT)
    return train, held_out[::every][:HELD_OUT].float()


@lru_cache(maxsize=1)
def spectrum_of(source: Source, hook: str) -> tuple[Spectrum, Path]:
    """From 32 activations for each dimension, spread evenly; and its file."""
    train, _ = activations(source, hook)
    spectrum = streamed_spectrum(evenly(train, AUTO_TOKENS_PER_DIMENSION * train.shape[1]))
    folder = Path(tempfile.gettempdir()) / "plan_sweep_spectra"
    folder.mkdir(exist_ok=True)
    return spectrum, spectrum.save(folder / f"{source.model}_{source.text}_{hook}.safetensors")


def facts(source: Source, hook: str) -> dict[str, float]:
    spectrum, _ = spectrum_of(source, hook)
    return {**of_spectrum(spectrum), "variance_in_32": spectrum.variance_explained(32)}


def evenly(activations: Tensor, n: int) -> Tensor:
    """``n`` of them spread evenly, or all where they are fewer."""
    return activations[:: max(1, len(activations) // n)][:n]


@lru_cache(maxsize=1)
def variance_as_read(source: Source, hook: str) -> float:
    """E|x - E x|^2 of as many activations as a plan reads."""
    train, _ = activations(source, hook)
    return streamed_spectrum(evenly(train, PilotSizes().n_activations)).total_variance


def variances(source: Source, hook: str) -> dict[str, Any]:
    """Of all activations to train on; and of the held-out ones, by the number of them that errors are measured on."""
    train, some = activations(source, hook)
    _, whole = sources.activations(source, hook)
    parts = {len(one): one for one in (whole, some)}
    return {
        **place_of(source, hook),
        "variance": streamed_spectrum(train).total_variance,
        "held_out": [[n, streamed_spectrum(one).total_variance] for n, one in parts.items()],
    }


def done(one: Work) -> bool:
    return is_among(lines(one.path) if one.path.exists() else (), one.key())


def measure(one: Work) -> dict[str, Any]:
    train, held_out = activations(one.source, one.hook)
    _, spectrum = spectrum_of(one.source, one.hook)
    if not one.tokens:
        part, known = evenly(held_out, PilotSizes().held_out), variance_as_read(one.source, one.hook)
        return run_pilot(train, part, one.d_sae, one.k, spectrum=spectrum, variance=known).to_dict()
    training = SweepTraining(training_tokens=one.tokens, batch_size=1024)
    cell = recommended(one.d_sae, one.k, spectrum)
    trainer, record = train_cell(cell, training, train)
    found = evaluate(trainer.sae, activations=held_out, ranks=False, progress=False)
    return {
        **{name: value for name, value in cell.to_dict().items() if name != "spectrum"},
        **measured(found, trainer, training),
        "rate_quantiles": rate_quantiles(found.firing_counts),
        **record,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="name what is missing at cached hooks, and train nothing")
    parser.add_argument("--read", action="store_true", help="have the models read what is not cached first")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.read:
        for source in dict.fromkeys(source for source, _ in places()):
            sources.activations(source, source.hooks[0])
    for source, hook in places():
        known = lines(VARIANCES) if VARIANCES.exists() else []
        if is_cached(source) and not args.list and not is_among(known, place_of(source, hook)):
            append(VARIANCES, variances(source, hook))
    for one in work():
        with taken(one.key()) as mine:
            if not mine or done(one) or not is_cached(one.source):
                continue
            if args.list:
                print(one)
                continue
            row = {**one.key(), **facts(one.source, one.hook), **measure(one), "processor": processor()}
            append(one.path, row)
        print(
            one.key(),
            f"NMSE {row['nmse']:.4f}, dead {row['dead_fraction']:.2%}, {row['cpu_seconds']:.3g} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
