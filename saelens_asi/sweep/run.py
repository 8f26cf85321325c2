"""A sweep: each cell trained by SAELens's own trainer on cached activations, evaluated, and kept when it is done."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from sae_lens import SAE, SAETrainer, TrainingSAE
from sae_lens.config import SAETrainerConfig
from sae_lens.registry import get_sae_training_class
from safetensors import SafetensorError
from torch import Tensor
from tqdm.auto import tqdm

from saelens_asi.evaluation.metrics import SAEEvaluation
from saelens_asi.evaluation.run import evaluate
from saelens_asi.initialization import METADATA_KEY
from saelens_asi.interrupts import signals_held_back
from saelens_asi.resume import MANIFEST, damage, folder_written_whole, one_writer, remove_unfinished
from saelens_asi.spectra.moments import RunningMoments
from saelens_asi.spectra.spectrum import Spectrum
from saelens_asi.sweep.cells import Cell, SweepRow, SweepStore

logger = logging.getLogger(__name__)

ARCHITECTURES = ("topk", "abstopk", "batchtopk", "matryoshka_batchtopk")

# What of the initialization's provenance goes into a row.
_PROVENANCE = {"d_init": "d_init_used", "norm": "initial_norm", "initial_nmse": "initial_nmse"}
# Share of the steps, at the end, in which the weights hardly move any more.
_LAST_SHARE = 0.4
MEASURED = ("n_tokens", "dead_fraction", "nmse", "l0")


@dataclass(frozen=True)
class SweepTraining:
    """What all cells of a sweep share.

    Attributes:
        training_tokens: activations each SAE is trained on; those that are cached come round again where they end.
        batch_size: activations in a step.
        warm_up: share of the steps in which the learning rate rises.
        decay: share of the steps, at the end, in which it falls to zero.
        dead_after_tokens: a feature counts as dead for the auxiliary loss when it was silent for so many tokens.
            SAELens counts 1,000 steps by default, more than a short run has.
        device: where SAEs are trained.
        data_seed: of the order of the activations.
    """

    training_tokens: int = 300_000
    batch_size: int = 1024
    warm_up: float = 0.07
    decay: float = 0.2
    dead_after_tokens: int = 30_000
    device: str = "cpu"
    data_seed: int = 0

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.training_tokens < self.batch_size:
            raise ValueError(
                f"training_tokens={self.training_tokens} must fill one batch of batch_size={self.batch_size} at least"
            )

    @property
    def steps(self) -> int:
        return self.training_tokens // self.batch_size

    def to_dict(self) -> dict[str, float | str]:
        return asdict(self)


# Called with the tokens trained on so far and the SAE as it is then.
Watch = Callable[[int, TrainingSAE], None]


def train_cell(
    cell: Cell,
    training: SweepTraining,
    activations: Tensor,
    watch: Watch | None = None,
    *,
    prepare: Callable[[SAETrainer], None] | None = None,
    checkpoints: str | Path | None = None,
) -> tuple[SAETrainer, dict[str, float]]:
    """Train the SAE of ``cell`` on (n, d_in) activations. Returns its trainer, seconds, and what initialized it.

    ``watch`` is called before each step but the first; its time is not counted. ``prepare`` is called
    with the trainer before it starts. With a folder for ``checkpoints``, a cell that uses the plugin is saved there as
    any run is, and the same call goes on from the newest, to the same bits; its seconds are those of the last call.

    Raises:
        ValueError: for an architecture outside the TopK family, or settings that do not fit the activations.
    """
    d_in, initializer = activations.shape[1], cell.initializer_settings()
    torch.manual_seed(cell.seed)
    sae = _untrained(cell, d_in, training.device)
    if checkpoints is not None:
        sae.cfg.resume, sae.cfg.keep_checkpoints = "latest", 1
    n_estimate = 0 if initializer is None else initializer.tokens_for(d_in)
    stop = _StopWatch()
    trainer: SAETrainer

    def between_steps() -> None:
        # Batches are asked for before the first step too, by the estimate.
        if watch and trainer.n_training_samples:
            watch(trainer.n_training_samples, sae)

    batches = _CachedBatches(activations, training, n_estimate, stop.outside(between_steps))
    trainer = SAETrainer(_trainer_config(cell, training, checkpoints), sae, batches)
    if prepare:
        prepare(trainer)
    stop.go_on()
    trainer.fit()
    return trainer, training_record(sae, stop)


def training_record(sae: TrainingSAE, stop: _StopWatch) -> dict[str, float]:
    """Seconds of a training that has just ended, and what initialized the SAE."""
    provenance = sae.cfg.metadata.get(METADATA_KEY) or {}
    return {
        **{name: round(value, 1) for name, value in stop.halt().items()},
        **{name: provenance[key] for key, name in _PROVENANCE.items() if key in provenance},
    }


class _StopWatch:
    """Seconds on the clock and of the processor, but for breaks."""

    def __init__(self) -> None:
        self._seconds = self._cpu_seconds = 0.0

    def go_on(self) -> None:
        self._seconds -= time.perf_counter()
        self._cpu_seconds -= time.process_time()

    def halt(self) -> dict[str, float]:
        self._seconds += time.perf_counter()
        self._cpu_seconds += time.process_time()
        return {"seconds": self._seconds, "cpu_seconds": self._cpu_seconds}

    def outside(self, act: Callable[[], None]) -> Callable[[], None]:
        """The same, as a break."""

        def acting() -> None:
            self.halt()
            act()
            self.go_on()

        return acting


def _untrained(cell: Cell, d_in: int, device: str) -> TrainingSAE:
    if cell.architecture not in ARCHITECTURES:
        raise ValueError(f"architecture={cell.architecture!r} must be one of {ARCHITECTURES}: they share k")
    sae_class, config_class = get_sae_training_class(cell.architecture)
    settings = {
        "d_in": d_in,
        "d_sae": cell.d_sae,
        "k": cell.k,
        "device": device,
        "initializer": cell.initializer_settings() or "default",
        "optimizer": cell.optimizer,
        "aux_loss_coefficient": cell.aux_loss_coefficient,
        "revive": cell.revive,
    }
    if cell.silent_moments is not None:
        settings["silent_moments"] = cell.silent_moments
    if cell.architecture == "matryoshka_batchtopk":
        settings["matryoshka_widths"] = [cell.d_sae // 8, cell.d_sae // 2, cell.d_sae]
    return sae_class(config_class(**settings))


def _trainer_config(cell: Cell, training: SweepTraining, checkpoints: str | Path | None = None) -> SAETrainerConfig:
    return SAETrainerConfig(
        checkpoint_path=None if checkpoints is None else str(checkpoints),
        total_training_samples=training.steps * training.batch_size,
        train_batch_size_samples=training.batch_size,
        lr=cell.lr,
        lr_end=cell.lr / 10,
        lr_warm_up_steps=round(training.warm_up * training.steps),
        lr_decay_steps=round(training.decay * training.steps),
        dead_feature_window=max(1, training.dead_after_tokens // training.batch_size),
        device=training.device,
    )


def run_cell(
    cell: Cell, training: SweepTraining, activations: Tensor, held_out: Tensor
) -> tuple[TrainingSAE, dict[str, float]]:
    """Train the SAE of ``cell`` and ``measure`` it on (n, d_in) held-out activations."""
    trainer, record = train_cell(cell, training, activations)
    return trainer.sae, {**measure(trainer, training, held_out), **record}


def measure(trainer: SAETrainer, training: SweepTraining, held_out: Tensor) -> dict[str, float]:
    """Error, dead features and L0 of a finished SAE on (n, d_in) held-out activations."""
    found = evaluate(trainer.sae, activations=held_out.float(), ranks=False, progress=False)
    return measured(found, trainer, training)


def measured(evaluation: SAEEvaluation, trainer: SAETrainer, training: SweepTraining) -> dict[str, float]:
    """What a row keeps of the evaluation of a finished SAE.

    Beside features that fire on none of these (``dead_fraction``), it counts those that were silent at the end of
    training too (``silent_fraction``, of ``silent_tokens`` in all): more tokens, at no cost.
    """
    return {
        **{name: getattr(evaluation, name) for name in MEASURED},
        "silent_fraction": float(silent_features(evaluation, trainer, training).double().mean()),
        "silent_tokens": evaluation.n_tokens + _last_steps(training) * training.batch_size,
    }


def silent_features(evaluation: SAEEvaluation, trainer: SAETrainer, training: SweepTraining) -> Tensor:
    """(d_sae,) flags, on the CPU: which features fired neither in the evaluation nor in the last steps of training."""
    since = trainer.n_forward_passes_since_fired.cpu()
    return (evaluation.firing_counts == 0) & (since >= _last_steps(training))


def _last_steps(training: SweepTraining) -> int:
    return round(_LAST_SHARE * training.steps)


class _CachedBatches(Iterator[Tensor]):
    """What a cell is trained on, without end; the estimate reads the same activations before."""

    def __init__(
        self, activations: Tensor, training: SweepTraining, n_estimate: int, before_each: Callable[[], None]
    ) -> None:
        self._batches = _batches(activations, training)
        self._of_estimate = _batches(activations, training, n_estimate)
        self._before_each = before_each
        self._n_given = 0

    def __next__(self) -> Tensor:
        self._before_each()
        self._n_given += 1
        return next(self._batches)

    def state_dict(self) -> dict[str, int]:
        return {"n_given": self._n_given}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        for _ in range(state["n_given"] - self._n_given):
            next(self._batches)
        self._n_given = state["n_given"]

    def second_look(self) -> Iterator[Tensor]:
        """As ``plugin.stream.LooksTwice`` has it; where few are cached, they come round again, as in training."""
        return itertools.chain(self._of_estimate, self)


def _batches(activations: Tensor, training: SweepTraining, n: int | None = None) -> Iterator[Tensor]:
    """Batches in one fixed order: of the first ``n`` activations, or without end."""
    generator = torch.Generator().manual_seed(training.data_seed)
    order = torch.randperm(len(activations), generator=generator)
    left = order[:0]
    for part in itertools.repeat(order) if n is None else [order[:n]]:
        *full, left = torch.cat([left, part]).split(training.batch_size)
        for rows in full:
            yield activations[rows].float()
    yield activations[left].float()


def run_sweep(
    cells: Sequence[Cell],
    training: SweepTraining,
    activations: Mapping[str, tuple[Tensor, Tensor]],
    out: str | Path,
    *,
    source: Mapping[str, object] | None = None,
    save_saes: bool = False,
) -> list[SweepRow]:
    """Train and evaluate each cell on each hook, where ``out`` does not hold it yet; returns their rows.

    Each finished cell is a line of ``out/cells.jsonl`` at once; a sweep that is interrupted, by SIGKILL too, or asked
    for more cells, goes on from there, to the same results. A cell that fails is named, and the others go on.

    Args:
        cells: of ``grid``.
        training: what all cells share.
        activations: from hook names to (n, d_in) activations to train on, and to evaluate on.
        out: folder.
        source: what the activations come from (model, dataset), kept beside the results.
        save_saes: keep each SAE as a SAELens folder in ``out/saes``; one that is not there whole is trained again.

    Raises:
        ValueError: for a folder whose cells were made with other settings or activations, that another run writes to,
            or that is damaged; after all cells, where some failed.
        OSError: where the disk is full. The cells that are finished stay.
    """
    out = Path(out)
    with one_writer(out, "out"):
        _remove_unfinished(out)
        store = SweepStore(out, {"training": training.to_dict(), **(source or {})})
        store.check(activations)
        rows, failures = [], []
        with tqdm(total=len(activations) * len(cells), desc="Sweep", unit="cell") as bar:
            for hook_name, (train, held_out) in activations.items():
                spectrum: dict[str, float] = {}
                for cell in cells:
                    row, folder = store.find(cell, hook_name), sae_folder(out, cell, hook_name)
                    if row is None or (save_saes and not _is_saved(folder)):
                        spectrum = spectrum or _rank(held_out)
                        try:
                            sae, results = run_cell(cell, training, train, held_out)
                        except (ValueError, RuntimeError) as error:
                            failures.append(f"{describe(cell)}: {error}")
                            logger.error("this cell failed, the sweep goes on: %s", failures[-1])
                            continue
                        with signals_held_back():
                            if save_saes:
                                _save(sae, folder, hook_name)
                            row = row or store.add(cell, {"hook_name": hook_name, **spectrum, **results})
                        tqdm.write(_line(cell, row))
                    rows.append(row)
                    bar.update()
    if failures:
        raise ValueError("\n".join([f"{len(failures)} cells failed, the others are kept:", *failures]))
    return rows


def _save(sae: TrainingSAE, folder: Path, hook_name: str) -> None:
    """Write the folder of a finished SAE, whole or not at all."""
    sae.cfg.metadata.hook_name = hook_name
    try:
        with folder_written_whole(folder, {}) as unfinished:
            sae.save_inference_model(str(unfinished))
    except (OSError, SafetensorError) as error:
        number = error.errno if isinstance(error, OSError) else None
        message = f"the SAE cannot be written to {folder} ({error}): what is finished stays, the same sweep goes on"
        raise OSError(number, message) from error


def _is_saved(folder: Path) -> bool:
    """Whether a folder is that of a finished SAE; one of an earlier version, without a manifest, has to load."""
    if (folder / MANIFEST).exists():
        return damage(folder) is None
    try:
        SAE.load_from_disk(folder)
    except Exception:  # whatever a torn file makes of loading
        return False
    return True


def _remove_unfinished(out: Path) -> None:
    """What runs left that were killed while they wrote; nobody else writes here now."""
    for path in out.glob("*.json*.tmp"):
        path.unlink()
    for folder in (out / "saes").glob("*/"):
        remove_unfinished(folder)


def sae_folder(out: str | Path, cell: Cell, hook_name: str) -> Path:
    """Where ``save_saes`` keeps the SAE of a cell."""
    return Path(out) / "saes" / hook_name / describe(cell).replace(" ", "_")


def _rank(held_out: Tensor) -> dict[str, float]:
    spectrum = Spectrum.from_moments(RunningMoments.zeros(held_out.shape[1]).update_(held_out.float()))
    return {"d_in": spectrum.d, "effective_rank": spectrum.effective_rank}


def _line(cell: Cell, row: SweepRow) -> str:
    measured = f"dead {row['dead_fraction']:.2%}, NMSE {row['nmse']:.4f}, {row['seconds']} s"
    return f"{row['hook_name']} {describe(cell)}: {measured}"


def describe(cell: Cell) -> str:
    """The settings in which a cell differs from the default one."""
    default, own = asdict(Cell()), asdict(cell)
    changed = [f"{name}={value}" for name, value in own.items() if value != default.get(name) and value is not None]
    return " ".join(changed) or "defaults"
