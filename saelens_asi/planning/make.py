"""From a model and text, or activations, or a spectrum, to a plan."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saelens_asi.activations.hooks import HookedModel
from saelens_asi.activations.models import MODELS, embedded_name
from saelens_asi.activations.reader import HookActivations
from saelens_asi.activations.tokens import TokenData
from saelens_asi.initialization import AUTO_TOKENS_PER_DIMENSION
from saelens_asi.planning.advice import warnings_for
from saelens_asi.planning.cost import StepCost, step_cost
from saelens_asi.planning.memory import parse_bytes
from saelens_asi.planning.model import Anchor, anchor_terms, fitted, spread_of_silence, total
from saelens_asi.planning.pilots import BATCH, HELD_OUT, STEPS, Pilot, run_pilot
from saelens_asi.planning.record import Plan, check_size
from saelens_asi.spectra.moments import RunningMoments
from saelens_asi.spectra.spectrum import Spectrum

D_SAE, K, TOKENS = (4096, 8192, 16384, 32768, 65536, 131072), (16, 32, 64), (300_000, 1_000_000, 10_000_000)

# Sizes of the pilots: the second and the third differ from the first in one thing each. The last is for its time alone.
PILOT_D_SAE, PILOT_K = (4096, 8192), (32, 64)
TIMED_D_SAE, TIMED_STEPS = 32768, 24

# Of the tokens that a budget reaches, for each size.
_SHARES = (0.1, 1.0)


@dataclass(frozen=True)
class PilotSizes:
    """What is trained for a plan. The figures of error and dead features are fitted on the defaults.

    Attributes:
        d_sae: of the first pilot, and of the second.
        k: of the first two, and of the third.
        steps: of each.
        batch: tokens in a step.
        held_out: activations that they are measured on.
        timed_d_sae: of one more, which is timed alone; 0 leaves it out.
    """

    d_sae: tuple[int, int] = PILOT_D_SAE
    k: tuple[int, int] = PILOT_K
    steps: int = STEPS
    batch: int = BATCH
    held_out: int = HELD_OUT
    timed_d_sae: int = TIMED_D_SAE

    def __post_init__(self) -> None:
        if self.d_sae[0] == self.d_sae[1] or self.k[0] == self.k[1]:
            raise ValueError(f"pilots of d_sae={self.d_sae} and k={self.k}: give two different values of each")
        for d_sae in self.d_sae:
            check_size(d_sae, max(self.k), self.steps * self.batch, self.batch)

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        return (self.d_sae[0], self.k[0]), (self.d_sae[1], self.k[0]), (self.d_sae[0], self.k[1])

    @property
    def n_activations(self) -> int:
        return self.steps * self.batch + self.held_out


@dataclass(frozen=True)
class _Source:
    """Activations, and where they come from."""

    activations: Tensor
    spectrum: Spectrum
    hook: str
    model: str
    seconds: float = 0.0
    n_bytes: int = 0
    measured: bool = True


def plan(
    source: HookedModel | Spectrum | Tensor,
    dataset: TokenData | None = None,
    hook: str | None = None,
    *,
    d_sae: Sequence[int] = D_SAE,
    k: Sequence[int] = K,
    tokens: Sequence[int] | None = None,
    budget_hours: float | None = None,
    memory: str | float | None = None,
    counted_on: int = 1_000_000,
    context_size: int = 128,
    batch_size: int = 32,
    device: str = "cpu",
    pilots: PilotSizes | None = None,
    progress: bool = True,
) -> Plan:
    """Which SAEs can be afforded at a hook, and what each will give: error, dead features, hours, memory, disk.

    It reads some ten thousand activations, trains for a minute or so at small sizes with SAELens's trainer and the
    recommended settings (TopK, active subspace, SparseAdam), and carries what that gives to other sizes by a model that
    was fitted on sweeps (``benchmarks/results/plan.md`` has its errors on hooks, models and texts it had not seen).
    Hours are those of this machine, as busy as it is now.

    Args:
        source: a language model, with ``dataset`` and ``hook``; or (n, d_in) activations, 49,152 or more of them; or a
            ``Spectrum``, with whose mean and covariance activations are drawn: times hold, error and dead features are
            guesses then, with intervals to match.
        dataset: token ids or rows of a dataset, as ``activation_spectra`` takes them.
        hook: name or alias as in ``model.hook_dict``; for activations and spectra a name for the settings.
        d_sae: numbers of features.
        k: numbers of features active on a token.
        tokens: to train on; without it those that ``budget_hours`` reaches and a tenth of them, or 300,000 to 10
            million.
        budget_hours: that a run may take.
        memory: that it may take: bytes, or a text such as ``"24GiB"``.
        counted_on: tokens that dead features are counted on.
        context_size: tokens in a window.
        batch_size: windows in a forward pass.
        device: where SAEs are trained.
        pilots: what is trained for the plan; for tests and models of another order of size.
        progress: show progress bars.

    Raises:
        ValueError: for a hook that does not exist, settings that no SAE can have, or activations that are too few.
    """
    limit, pilots = None if memory is None else parse_bytes(memory), pilots or PilotSizes()
    _check(d_sae, k, tokens, budget_hours, counted_on, pilots)
    read = _read(source, dataset, hook, pilots, context_size, batch_size, progress)
    done = _train(read, pilots, device)
    timed, cost = done[: len(pilots.sizes)], step_cost(done)
    anchor = _anchor(timed, read)
    sizes = sizes_within(d_sae, k, tokens, budget_hours, cost, read.seconds)
    return Plan(
        hook=read.hook,
        model=read.model,
        d_in=read.spectrum.d,
        effective_rank=read.spectrum.effective_rank,
        gamma=read.spectrum.gamma,
        batch=pilots.batch,
        budget_hours=budget_hours,
        memory=limit,
        counted_on=counted_on,
        model_seconds=read.seconds,
        model_bytes=read.n_bytes,
        pilots=done,
        anchor=anchor,
        cost=cost,
        sizes=sizes,
        measured=read.measured,
        warnings=warnings_for(read.spectrum, anchor, sizes, counted_on, read.activations),
    )


def _check(
    d_sae: Sequence[int],
    k: Sequence[int],
    tokens: Sequence[int] | None,
    budget_hours: float | None,
    counted_on: int,
    pilots: PilotSizes,
) -> None:
    for name, values in (("d_sae", d_sae), ("k", k), ("tokens", tokens)):
        if values is not None and not len(values):
            raise ValueError(f"{name} is empty: give at least one value, or leave it out")
    for size in d_sae:
        for active in k:
            check_size(size, active, min(tokens or (pilots.batch,)), pilots.batch)
    if budget_hours is not None and not budget_hours > 0:
        raise ValueError(f"budget_hours={budget_hours} must be more than 0, or None for any")
    if counted_on < 1:
        raise ValueError(f"counted_on={counted_on} must be at least 1")


def _read(
    source: Any,
    dataset: TokenData | None,
    hook: str | None,
    pilots: PilotSizes,
    context_size: int,
    batch_size: int,
    progress: bool,
) -> _Source:
    if isinstance(source, Spectrum):
        drawn = _draw(source, pilots.n_activations)
        return _Source(drawn, source, hook or "activations", "model", measured=False)
    if isinstance(source, Tensor):
        return _Source(_enough(source, pilots), _spectrum(source), hook or "activations", "model")
    if not hasattr(source, "hook_dict"):
        raise ValueError(f"source is a {type(source).__name__}: give a model, activations, or a Spectrum")
    if dataset is None or hook is None:
        missing = "dataset" if dataset is None else "hook"
        raise ValueError(f"{missing}=None: a plan for a model needs text and the hook to read: give {missing}")
    found = HookActivations(
        source, dataset, hook, max(pilots.n_activations, AUTO_TOKENS_PER_DIMENSION),
        batch_size=batch_size, context_size=context_size, progress=progress,
    )  # fmt: skip
    batches, marks = [], [time.perf_counter()]
    for batch in found:
        batches.append(batch.detach().float().cpu())
        marks.append(time.perf_counter())
    activations = torch.cat(batches)
    # The first batch warms up.
    seconds = (marks[-1] - marks[min(1, len(marks) - 2)]) / max(
        1, len(activations) - len(batches[0]) * (len(batches) > 1)
    )
    name = getattr(source.cfg, "model_name", None) or "model"
    known = embedded_name(Path(name).name)  # the folder of its copy is of this machine
    name = known if known in MODELS else name
    n_bytes = sum(one.numel() * one.element_size() for one in source.parameters())
    return _Source(_enough(activations, pilots), _spectrum(activations), found.hook_name, name, seconds, n_bytes)


def _enough(activations: Tensor, pilots: PilotSizes) -> Tensor:
    if activations.ndim != 2:
        raise ValueError(f"activations of shape {tuple(activations.shape)} are no vectors: give (n, d_in)")
    if len(activations) < 2 * pilots.held_out:
        raise ValueError(
            f"{len(activations):,} activations are too few: the pilots measure on {pilots.held_out:,} and train on as "
            f"many at least; give {pilots.n_activations:,}"
        )
    return activations


def _spectrum(activations: Tensor) -> Spectrum:
    return Spectrum.from_moments(RunningMoments.zeros(activations.shape[1]).update_(activations))


def _draw(spectrum: Spectrum, n: int) -> Tensor:
    """(n, d) Gaussian vectors with this mean and covariance."""
    generator = torch.Generator().manual_seed(0)
    directions = spectrum.principal_directions(spectrum.d) * spectrum.variances.sqrt()
    factors = directions.float().cpu().T.contiguous()
    normal = torch.randn(n, spectrum.d, generator=generator)
    return normal @ factors + spectrum.mean.float().cpu()


def _train(read: _Source, pilots: PilotSizes, device: str) -> list[Pilot]:
    order = torch.randperm(len(read.activations), generator=torch.Generator().manual_seed(0))
    held_out, train = (read.activations[part] for part in order.tensor_split([pilots.held_out]))
    shared: dict[str, Any] = {"batch": pilots.batch, "device": device, "variance": read.spectrum.total_variance}
    with tempfile.TemporaryDirectory() as folder:
        known = read.spectrum.save(Path(folder) / "spectrum.safetensors")
        found = [
            run_pilot(train, held_out, *size, steps=pilots.steps, spectrum=known, **shared) for size in pilots.sizes
        ]
        if pilots.timed_d_sae:
            size, steps = (pilots.timed_d_sae, pilots.k[0]), min(TIMED_STEPS, pilots.steps)
            found.append(run_pilot(train, held_out[:1024], *size, steps=steps, spectrum=known, **shared))
    return found


def _spread(pilot: Pilot) -> float:
    return spread_of_silence(pilot.n_tokens, pilot.dead_fraction, pilot.d_sae, pilot.k)


def anchor_of(pilots: Sequence[Pilot], rank_share: float, gamma: float) -> Anchor:
    """What three pilots say: the first, one with other d_sae, one with other k."""
    first, wider, denser = pilots
    by_tokens = math.log(first.nmse / first.nmse_at_quarter) / math.log(4)
    by_k = math.log(denser.nmse / first.nmse) / math.log(denser.k / first.k)
    return Anchor(
        d_sae=first.d_sae,
        k=first.k,
        tokens=first.tokens,
        nmse=first.nmse,
        slope_k=min(0.0, by_k),
        slope_tokens=min(0.0, by_tokens),
        spread=sum(_spread(pilot) for pilot in (first, wider)) / 2,
        rank_share=rank_share,
        gamma=gamma,
    )


def _anchor(pilots: Sequence[Pilot], read: _Source) -> Anchor:
    spectrum, model = read.spectrum, fitted()
    rank_share = spectrum.effective_rank / spectrum.d
    if read.measured:
        return anchor_of(pilots, rank_share, spectrum.gamma)
    terms = anchor_terms(rank_share, 1 - spectrum.variance_explained(32), spectrum.gamma)
    first = pilots[0]
    return Anchor(
        first.d_sae, first.k, first.tokens, math.exp(total(model.from_spectrum, terms)),
        rank_share=rank_share, gamma=spectrum.gamma, measured=False, **model.means,
    )  # fmt: skip


def sizes_within(
    d_sae: Sequence[int],
    k: Sequence[int],
    tokens: Sequence[int] | None,
    budget_hours: float | None,
    cost: StepCost,
    model_seconds: float,
) -> list[tuple[int, int, int]]:
    """Of the rows."""
    found = []
    for size in d_sae:
        for active in k:
            if tokens is None and budget_hours is not None:
                reach = cost.tokens(size, active, budget_hours, model_seconds)
                each = [_rounded_down(share * reach) for share in _SHARES]
            else:
                each = list(TOKENS if tokens is None else tokens)
            found += [(size, active, n) for n in each if n >= STEPS * cost.batch or tokens is not None]
    if not found:
        raise ValueError(
            f"budget_hours={budget_hours} ends before {STEPS} steps at any size: give more hours, or a smaller d_sae"
        )
    return found


def _rounded_down(n: float) -> int:
    """To two digits."""
    if n < 10:
        return int(n)
    unit = 10 ** (int(math.log10(n)) - 1)
    return int(n // unit * unit)
