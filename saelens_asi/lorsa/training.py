"""Train a Lorsa on sequences: from the first step or from a checkpoint, to the finished Lorsa."""

from __future__ import annotations

from pathlib import Path

from tqdm.auto import tqdm

from saelens_asi.interrupts import Interrupts
from saelens_asi.lorsa.attention import attention_module
from saelens_asi.lorsa.config import LorsaTraining
from saelens_asi.lorsa.model import Lorsa
from saelens_asi.lorsa.run import TrainingRun
from saelens_asi.lorsa.sequences import ModelSequences, Sequences


def train_lorsa(
    lorsa: Lorsa,
    data: Sequences,
    settings: LorsaTraining,
    out: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
    overwrite: bool = False,
) -> list[dict[str, float]]:
    """Train in place on mean squared error to the layer's output; returns the history.

    With ``out``, a run can be stopped at any moment and resumed to the same bits: weights, moments, history (apart from
    ``seconds``), torch's global generators and the place in the data. Checkpoints are whole or not there, and the
    newest two stay. One is written every ``checkpoint_minutes``, every ``checkpoint_every`` steps, at the end, and when
    the run stops early: on SIGINT or SIGTERM after the step that is under way, after which the signal does what it
    would have done (KeyboardInterrupt, SystemExit(143), the program's own handler); on any other exception, of the last
    whole step. A checkpoint that cannot be written, on a full disk, leaves the one before, and the run goes on.

    Sequences with a number that is not finite are left out and counted.

    Args:
        lorsa: initialized.
        data: sequences; each epoch goes through all of them in an order of its own.
        settings: of the run.
        out: folder for the history (``history.jsonl``, a line every ``log_every`` steps), checkpoints, and at the end
            the Lorsa itself; nothing is written when None.
        resume: go on from the newest whole checkpoint in ``out``, bit-exactly; begin where there is none. A finished
            run is returned as it is.
        progress: show a progress bar.
        overwrite: replace the run that ``out`` holds.

    Returns:
        One record a line of the history: step, positions seen, those of them that were left out, loss, normalized MSE
        of the batch (against its own variance), l0, share of dead features, learning rate, k, seconds.

    Raises:
        ValueError: before training, for sequences that do not fit the Lorsa, a folder that cannot be written, is too
            small, is being written by another run or holds one (neither ``resume`` nor ``overwrite`` set), for a
            checkpoint of another Lorsa, other settings or other data, and in one of several processes of torchrun.
        FloatingPointError: for a loss, gradient or weights that are not finite, or too many such activations; names the
            last good checkpoint.
    """
    _check(lorsa, data, settings)
    if resume and overwrite:
        raise ValueError("resume and overwrite exclude each other: set one of them")
    if out is None and (settings.checkpoint_every or resume or overwrite):
        raise ValueError("checkpoint_every, resume and overwrite need out=, the folder of the run")
    run, signals = TrainingRun(lorsa, settings, data, None if out is None else Path(out)), Interrupts()
    with signals.held_back(), run.folder_held():
        run.prepare(resume, overwrite)
        if not run.is_finished:
            _train(run, signals, progress)
    return run.history.records


def _train(run: TrainingRun, signals: Interrupts, progress: bool) -> None:
    run.begin()
    steps = range(run.done, run.settings.steps)
    bar = tqdm(steps, initial=run.done, total=run.settings.steps, disable=not progress, desc="Lorsa")
    try:
        for _ in bar:
            signals.deliver()
            record = run.advance()
            if record is not None:
                bar.set_postfix(nmse=f"{record['nmse']:.3f}", dead=f"{record['dead_fraction']:.1%}")
            run.checkpoint_if_due()
        run.finish()
    except BaseException as error:
        run.rescue(error)
        raise


def _check(lorsa: Lorsa, data: Sequences, settings: LorsaTraining) -> None:
    if data.n_positions > lorsa.cfg.n_ctx:
        raise ValueError(f"sequences of {data.n_positions} positions exceed n_ctx={lorsa.cfg.n_ctx} of the Lorsa")
    if data.n_positions <= lorsa.cfg.skip_positions:
        raise ValueError(f"sequences of {data.n_positions} positions have none beyond the skipped ones")
    if data.n_sequences < settings.batch_size:
        raise ValueError(f"batch_size={settings.batch_size} exceeds the {data.n_sequences} sequences there are")
    if settings.k_start is not None and not lorsa.cfg.k <= settings.k_start <= lorsa.cfg.n_ov_heads:
        raise ValueError(f"k_start={settings.k_start} must lie between k={lorsa.cfg.k} and {lorsa.cfg.n_ov_heads}")
    if isinstance(data, ModelSequences):
        attention_module(data.model, data.layer)  # raises for a layer that is not there
