"""Two runs of a stock SAELens pipeline on one hook, without and with the plugin's flags, compared on held-out text."""

from __future__ import annotations

import json
import logging
import shutil
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from sae_lens import (
    SAE,
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    LoggingConfig,
    TopKTrainingSAEConfig,
)

from saelens_asi import plots
from saelens_asi.activations.hooks import hook_points
from saelens_asi.activations.models import MODELS
from saelens_asi.cli.common import Command
from saelens_asi.cli.flags import (
    DeviceFlag,
    HeldOutFlag,
    HookFlags,
    LossFlag,
    OutFlag,
    SourceFlags,
    one_hook,
    open_model,
    open_text,
)
from saelens_asi.evaluation.metrics import SAEEvaluation
from saelens_asi.evaluation.run import evaluate_each
from saelens_asi.evaluation.tables import markdown_table
from saelens_asi.initialization import AUTO_TOKENS_PER_DIMENSION, METADATA_KEY
from saelens_asi.plugin.stock_cache import StockCache, read_all, stock_cache
from saelens_asi.resume import is_unfinished, one_writer
from saelens_asi.spectra.moments import RunningMoments
from saelens_asi.spectra.spectrum import Spectrum

_RUNS: dict[str, dict[str, Any]] = {
    "stock": {},
    "with the flag": {"initializer": "active_subspace", "optimizer": "sparse_adam"},
}
_COLUMNS = {
    "dead_percent": "dead features (%)",
    "nmse": "normalized MSE",
    "l0": "L0",
    "ce_recovered_percent": "CE recovered (%)",
    "kl_recovered_percent": "KL recovered (%)",
    "seconds_per_1k_tokens": "s per 1k tokens",
}


# SAELens's cached activations, below ``--out``.
_ACTIVATIONS = "activations"


@dataclass(frozen=True, kw_only=True)
class DemoSettings(OutFlag, DeviceFlag, LossFlag, HeldOutFlag, HookFlags, SourceFlags):
    """Settings of the demo; each is a flag of ``saelens-asi demo``. The default model and text come from PyPI packages.

    Attributes:
        d_sae: features of both SAEs.
        k: features active on a token.
        training_tokens: that each SAE is trained on.
        lr: learning rate.
    """

    d_sae: int = 8192
    k: int = 32
    training_tokens: int = 81_920
    lr: float = 3e-4
    out: Path = Path("demo_output")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss_tokens < 1:
            raise ValueError(f"--loss-tokens {self.loss_tokens} must be at least 1: the demo compares predictions")


def run_demo(settings: DemoSettings) -> dict[str, dict[str, float]]:
    """Train both SAEs, evaluate them, and write SAEs, table and figures to ``settings.out``; returns the table."""
    with one_writer(settings.out, "--out"):
        _remove_unfinished(settings.out)
        print(f"Loading {settings.model} and {settings.dataset}", flush=True)
        model = open_model(settings.model, settings.device)
        n_tokens = max(settings.training_tokens, 4 * settings.held_out_tokens)
        training, held_out = open_text(settings.dataset, n_tokens, columns=("text",))
        hook_name = one_hook(settings.hooks, settings.layers, lambda: model.cfg.n_layers)
        d_in = _width(model, hook_name)
        configs = {
            name: runner_config(settings, hook_name, d_in, flags, settings.out / folder_name(name))
            for name, flags in _RUNS.items()
        }
        cache = _activations(configs["stock"], model, training)
        seconds = {name: _train(name, cfg, model, training) for name, cfg in configs.items()}
        saes = {name: SAE.load_from_disk(settings.out / folder_name(name), device=settings.device) for name in _RUNS}

        print("\nEvaluating on held-out text", flush=True)
        found = evaluate_each(
            saes, model, held_out, hook_name=hook_name, n_tokens=settings.held_out_tokens,
            loss_tokens=settings.loss_tokens, context_size=settings.context_size, ranks=False,
        )  # fmt: skip
        if found.left_out:
            raise ValueError("; ".join(found.left_out.values()))
        records = found.records
        rows = {name: _row(records[name], 1000 * seconds[name] / settings.training_tokens) for name in saes}
        written = _write(settings, hook_name, rows, saes, records, _spectrum(configs["stock"], model, training))
        _say(rows, written, cache, next(iter(records.values())).n_tokens)
        return rows


def _remove_unfinished(out: Path) -> None:
    """Activations of a demo that was killed while it computed them; nobody else writes here now."""
    for folder in out.glob(f".{_ACTIVATIONS}.*"):
        if is_unfinished(folder.name):
            shutil.rmtree(folder)


def _activations(cfg: LanguageModelSAERunnerConfig[Any], model: Any, text: Dataset) -> StockCache:
    """What both runs train on: computed once, and kept for the next demo."""
    start = time.perf_counter()
    print(f"\nActivations of {cfg.hook_name}, once for both runs and for the next demo", flush=True)
    with _without_hints():
        cache = stock_cache(cfg, model, text, n_estimate=AUTO_TOKENS_PER_DIMENSION * cfg.sae.d_in)
    if cache.replaced is not None:
        print(f"Those in {cache.folder} were not taken: {cache.replaced}")
    done = f"computed in {time.perf_counter() - start:.0f} s" if cache.is_new else "found"
    print(f"{cache.n_tokens:,} tokens, {cache.n_bytes / 1e6:,.1f} MB in {cache.folder}: {done}", flush=True)
    return cache


def _say(rows: Mapping[str, Mapping[str, float]], written: Sequence[Path], cache: StockCache, n_tokens: int) -> None:
    figure, *others = written
    print(f"\nFigure: {figure}\n\n{table(rows)}\n")
    print(
        f"Dead: fires on none of {n_tokens:,} held-out tokens. CE and KL recovered: 0 is the hook set to zero, 100 the"
    )
    print("model as it is; CE can pass 100 where the layer's own output raises the loss on this text. Seconds: without")
    print("the model's, whose activations both runs share.")
    print("Written too:")
    print("\n".join(f"  {path}" for path in others))
    print(
        f"  {cache.folder} ({cache.n_bytes / 1e6:,.1f} MB of activations: the next demo starts there; delete at will)"
    )


def _spectrum(cfg: LanguageModelSAERunnerConfig[Any], model: Any, text: Dataset) -> Spectrum:
    """Of what both were trained on."""
    moments = RunningMoments.zeros(cfg.sae.d_in)
    with _without_hints():
        for batch in read_all(cfg, model, text):
            moments.update_(batch)
    return Spectrum.from_moments(moments)


@contextmanager
def _without_hints() -> Iterator[None]:
    """SAELens's hints at choices that the demo made on purpose (its data, its model) are left out."""
    logger = logging.getLogger("sae_lens")
    before = logger.level
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="sae_lens")
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(before)


def _train(name: str, cfg: LanguageModelSAERunnerConfig[Any], model: Any, text: Dataset) -> float:
    """SAELens's own runner, from its making to what it saves; returns seconds."""
    flags = _RUNS[name]
    print(f"\nTraining {cfg.sae.d_sae:,} TopK features on {cfg.hook_name}, {name}: {flags or 'no flags'}")
    if not flags:
        n_steps = cfg.training_tokens // cfg.train_batch_size_tokens
        print(f"SAELens moves its bar every 100 steps; there are {n_steps:,}", flush=True)
    start = time.perf_counter()
    torch.manual_seed(0)
    with _without_hints():
        LanguageModelSAETrainingRunner(cfg, override_model=model, override_dataset=text).run()
    return time.perf_counter() - start


def _row(record: SAEEvaluation, seconds_per_1k_tokens: float) -> dict[str, float]:
    if record.loss is None:
        raise ValueError("the held-out text holds no window to compare predictions on: give more, or another --dataset")
    return {
        "seconds_per_1k_tokens": seconds_per_1k_tokens,
        "dead_percent": 100 * record.dead_fraction,
        "nmse": record.nmse,
        "l0": record.l0,
        "ce_recovered_percent": 100 * record.loss.recovered,
        "kl_recovered_percent": 100 * record.loss.kl_recovered,
    }


def folder_name(run: str) -> str:
    return run.replace(" ", "_")


def runner_config(
    settings: DemoSettings, hook_name: str, d_in: int, flags: Mapping[str, Any], out: Path
) -> LanguageModelSAERunnerConfig[Any]:
    """An ordinary SAELens runner config; ``flags`` is the one difference between the two runs."""
    batch = 1024
    steps = settings.training_tokens // batch
    return LanguageModelSAERunnerConfig(
        sae=TopKTrainingSAEConfig(d_in=d_in, d_sae=settings.d_sae, k=settings.k, **flags),
        model_from_pretrained_kwargs={},
        use_cached_activations=True,
        cached_activations_path=str(settings.out / _ACTIVATIONS),
        model_name=MODELS[settings.model].name if settings.model in MODELS else settings.model,
        hook_name=hook_name,
        dataset_path=settings.dataset,
        is_dataset_tokenized=False,
        context_size=settings.context_size,
        training_tokens=steps * batch,
        train_batch_size_tokens=batch,
        store_batch_size_prompts=32,
        n_batches_in_buffer=64,
        exclude_special_tokens=True,
        lr=settings.lr,
        lr_warm_up_steps=min(20, steps // 4),
        lr_decay_steps=steps // 5,
        device=settings.device,
        checkpoint_path=None,
        output_path=str(out),
        logger=LoggingConfig(log_to_wandb=False),
        verbose=False,
    )


def _width(model: Any, hook_name: str) -> int:
    hook_points(model, hook_name)  # names the nearest where there is none of that name
    tokens = model.to_tokens("In the beginning", prepend_bos=False)
    _, cache = model.run_with_cache(tokens, names_filter=[hook_name], prepend_bos=False)
    return cache[hook_name][0, 0].numel()


def table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """The comparison as a Markdown table."""
    cells = [[name, *(f"{row[key]:#.3g}".rstrip(".") for key in _COLUMNS)] for name, row in rows.items()]
    return markdown_table(["run", *_COLUMNS.values()], cells, align="l" + "r" * len(_COLUMNS))


def _write(
    settings: DemoSettings,
    hook_name: str,
    rows: Mapping[str, Mapping[str, float]],
    saes: Mapping[str, SAE[Any]],
    records: Mapping[str, SAEEvaluation],
    spectrum: Spectrum,
) -> list[Path]:
    out = settings.out
    d_init = saes["with the flag"].cfg.metadata[METADATA_KEY]["d_init"]
    rates = {name: record.firing_rates for name, record in records.items()}
    decoders = {name: sae.W_dec.detach().cpu() for name, sae in saes.items()}
    panels = {key: title for key, title in _COLUMNS.items() if key in ("dead_percent", "nmse", "kl_recovered_percent")}
    figures = {
        "firing_rates.png": plots.firing_rates(rates, next(iter(records.values())).n_tokens),
        "comparison.png": plots.comparison_bars(rows, panels),
        "subspace.png": plots.subspace_energy(spectrum, decoders, d_init),
    }
    written = [plots.save(figure, out / name) for name, figure in figures.items()]
    written += [out / folder_name(name) for name in saes]
    record = {"settings": {**asdict(settings), "hook_name": hook_name}, "results": rows}
    for name, text in (
        ("results.md", table(rows) + "\n"),
        ("results.json", json.dumps(record, indent=2, default=str) + "\n"),
    ):
        (out / name).write_text(text)
        written.append(out / name)
    return written


COMMAND = Command(
    name="demo",
    about=__doc__ or "",
    run=run_demo,
    settings=(DemoSettings,),
    resume=lambda settings: "the same command starts again, from the activations where they were complete",
)


def main(args: Sequence[str]) -> None:
    COMMAND.main(args)
