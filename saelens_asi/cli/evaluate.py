"""Dead features, error, sparsity and loss of any SAEs that SAELens loads, on text.

SAES are folders that SAELens wrote (a folder of such folders stands for all of them), or pretrained ones: release,
release/sae_id, release/pattern with *, or owner/repository/path on the hub. Writes results.json, results.md, firing
counts and figures. Interrupted, the same command continues with the SAEs that are missing.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import simple_parsing
from datasets import Dataset, concatenate_datasets
from sae_lens.load_model import load_model as load_hooked_transformer

from saelens_asi import plots
from saelens_asi.activations.loading import EMBEDDED_DATASET, EMBEDDED_MODEL, MODEL_NAME
from saelens_asi.cli.common import Command
from saelens_asi.cli.flags import (
    DTYPES,
    DeviceFlag,
    DtypeFlag,
    HookFlags,
    LossFlag,
    OutFlag,
    OwnSourceFlags,
    PassFlags,
    one_hook,
    open_model,
    open_text,
)
from saelens_asi.evaluation.metrics import SAEEvaluation
from saelens_asi.evaluation.results import EvaluationFolder, evaluation_rows, evaluation_table, write_csv
from saelens_asi.evaluation.run import evaluate
from saelens_asi.evaluation.saes import SAESource, find_saes
from saelens_asi.history import TRAINING_HISTORY, read_history
from saelens_asi.plots import evaluation as evaluation_plots

_HELD_OUT_SHARE = 4  # training documents for each held-out one, as load_documents cuts them
_CONTEXT_SIZE = 256

# What HookedTransformer.from_pretrained can do to weights; a model that is loaded as it is knows none of it.
_PROCESSING = (
    "fold_ln",
    "center_writing_weights",
    "center_unembed",
    "fold_value_biases",
    "refactor_factored_attn_matrices",
)


@dataclass(frozen=True, kw_only=True)
class EvaluateFlags(OutFlag, DtypeFlag, DeviceFlag, LossFlag, PassFlags, HookFlags, OwnSourceFlags):
    """Flags of ``saelens-asi evaluate``.

    Attributes:
        saes: folders, releases or ids.
        all_text: read all documents, not only every fifth, which demo, sweep and lorsa hold out.
        saes_per_pass: SAEs in memory at a time.
    """

    saes: tuple[str, ...] = simple_parsing.field(positional=True, metavar="SAES")
    hooks: tuple[str, ...] = ()
    all_text: bool = simple_parsing.field(default=False, action="store_true")
    saes_per_pass: int = 16
    out: Path = Path("evaluation_output")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.saes_per_pass < 1:
            raise ValueError(f"--saes-per-pass {self.saes_per_pass} must be at least 1")


def run(flags: EvaluateFlags) -> dict[str, SAEEvaluation]:
    """Do what the flags ask for; returns the results by name."""
    # SAELens hints at settings for the model, which _load_model follows.
    with warnings.catch_warnings():
        if not flags.model:
            warnings.filterwarnings("ignore", message=r"\s*This SAE has non-empty model_from_pretrained_kwargs")
        sources = {source.name: source for source in find_saes(flags.saes)}
        results = _measure(flags, sources)
    chosen = {name: results.evaluations[name] for name in sources}
    written = _write(flags.out, chosen, sources)
    print(f"\n{(flags.out / 'results.md').read_text()}\nWritten:")
    for path in (results.path, results.counts_path, *written):
        print(f"  {path}")
    return chosen


def _measure(flags: EvaluateFlags, sources: Mapping[str, SAESource]) -> EvaluationFolder:
    """Evaluate the SAEs that the folder does not hold yet, some at a time, each group kept when it is done."""
    first = _metadata(next(iter(sources.values())), flags.device)
    name = flags.model or _model_name(first.get("model_name"))
    processing = {} if flags.model else _processing(first)
    if not flags.model:
        _check_same_model(name, processing, {key: _folder_metadata(one) for key, one in sources.items()})
    model = cache(lambda: _load_model(name, processing, flags))
    how = {
        "model": name,
        "dataset": flags.dataset or first.get("dataset_path") or EMBEDDED_DATASET,
        "context_size": flags.context_size or first.get("context_size") or _CONTEXT_SIZE,
        **{key: getattr(flags, key) for key in ("n_tokens", "loss_tokens", "all_text")},
        "hook_name": one_hook(flags.hooks, flags.layers, lambda: model().cfg.n_layers) if flags.hooks else None,
        "dtype": flags.dtype,
    }
    results = EvaluationFolder(flags.out, how)
    missing = [one for one in sources.values() if one not in results]
    if len(missing) < len(sources):
        print(f"{len(sources) - len(missing)} of {len(sources)} SAEs are in {results.path} already", flush=True)
    if not missing:
        return results
    print(f"Loading {name} and {how['dataset']}", flush=True)
    text = _documents(flags, how["dataset"])
    for start in range(0, len(missing), flags.saes_per_pass):
        group = missing[start : start + flags.saes_per_pass]
        saes = {one.name: one.load(flags.device) for one in group}
        if not flags.model:
            _check_same_model(name, processing, {key: sae.cfg.metadata.to_dict() for key, sae in saes.items()})
        records = evaluate(
            saes, model(), text, hook_name=how["hook_name"], n_tokens=flags.n_tokens,
            loss_tokens=flags.loss_tokens, batch_size=flags.batch_size, context_size=how["context_size"],
        )  # fmt: skip
        results.add(records, group)
    return results


def _folder_metadata(source: SAESource) -> dict[str, Any]:
    """What a folder's config says of its training; nothing for an SAE on the hub."""
    if source.folder is None:
        return {}
    cfg = json.loads((source.folder / "cfg.json").read_text())
    return cfg.get("metadata") or cfg


def _metadata(source: SAESource, device: str) -> dict[str, Any]:
    return _folder_metadata(source) or source.load(device).cfg.metadata.to_dict()


def _model_name(name: str | None) -> str:
    return EMBEDDED_MODEL if name in (None, "", MODEL_NAME) else name  # type: ignore[return-value]


def _processing(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """How a HookedTransformer's weights were changed for the training of an SAE; mostly not at all."""
    given = metadata.get("model_from_pretrained_kwargs") or {}
    return {name: True for name in _PROCESSING if given.get(name)}


def _load_model(name: str, processing: Mapping[str, Any], flags: EvaluateFlags) -> Any:
    """The model as the SAEs saw it: SAELens's own loading where weights were changed."""
    dtype = DTYPES[flags.dtype]
    if not processing:
        return open_model(name, flags.device, dtype)
    return load_hooked_transformer("HookedTransformer", name, flags.device, {**processing, "dtype": dtype})


def _check_same_model(model: str, processing: Mapping[str, Any], metadata: Mapping[str, Mapping[str, Any]]) -> None:
    known = {name: one for name, one in metadata.items() if one.get("model_name")}
    for name, one in known.items():
        own = (_model_name(one["model_name"]), _processing(one))
        if own != (model, processing):
            pair = (own, (model, processing))
            first, second = (f"{named!r} {dict(changes) or ''}".strip() for named, changes in pair)
            raise ValueError(
                f"the SAEs belong to several models ({name!r} to {first}, others to {second}): evaluate them "
                "apart, or name one with --model"
            )


def _documents(flags: EvaluateFlags, dataset: str) -> Dataset:
    n_tokens = flags.n_tokens + flags.loss_tokens
    if flags.all_text:
        return concatenate_datasets(open_text(dataset, n_tokens)[::-1])
    return open_text(dataset, _HELD_OUT_SHARE * n_tokens)[1]


def _write(out: Path, results: dict[str, SAEEvaluation], sources: Mapping[str, SAESource]) -> list[Path]:
    """Table and figures of these results."""
    rows = evaluation_rows(results)
    n_tokens = {result.n_tokens for result in results.values()}
    lines = [
        evaluation_table(rows),
        "",
        f"Dead: fires on none of the {' / '.join(f'{n:,}' for n in sorted(n_tokens))} tokens. Explained variance: 1 - "
        "normalized MSE. CE and KL recovered: 0 is the hook set to zero, 100 the model as it is; CE can pass 100, or "
        "lose its meaning, where the hook's own output raises the loss on this text.",
    ]
    (out / "results.md").write_text("\n".join(lines) + "\n")
    if len(results) <= len(plots.COLORS):
        rates = {name: result.firing_rates for name, result in results.items()}
        figures = {"firing_rates.png": plots.firing_rates(rates, max(n_tokens))}
    else:
        figures = {"firing_rates.png": evaluation_plots.firing_rate_map(results)}
    written = [out / "results.md"]
    if len({row["hook"] for row in rows}) > 1:
        figures["dead_against_rank.png"] = evaluation_plots.dead_against_rank(results)
        write_csv(rows, out / "dead_against_rank.csv")
        written.append(out / "dead_against_rank.csv")
    folders = {name: source.folder for name, source in sources.items() if source.folder is not None}
    histories = {name: read_history(folder) for name, folder in folders.items() if (folder / TRAINING_HISTORY).exists()}
    if 0 < len(histories) <= len(plots.COLORS):
        figures["training_history.png"] = plots.training_history(histories)
    return written + [plots.save(figure, out / name) for name, figure in figures.items()]


COMMAND = Command(
    name="evaluate",
    about=__doc__ or "",
    run=run,
    settings=(EvaluateFlags,),
    resume=lambda flags: f"the same command continues from {flags.out}",
)


def main(args: Sequence[str]) -> None:
    COMMAND.main(args)
