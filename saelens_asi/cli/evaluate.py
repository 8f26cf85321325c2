"""Dead features, error, sparsity and loss of any SAEs that SAELens loads, on text.

SAES are folders that SAELens wrote (a folder of such folders stands for all of them), or pretrained ones: release,
release/sae_id, release/pattern with *, or owner/repository/path on the hub. Writes results.json, results.md, firing
counts and figures. Interrupted, the same command continues with the SAEs that are missing.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from sae_lens.load_model import load_model as load_hooked_transformer

from saelens_asi import plots
from saelens_asi.activations.loading import EMBEDDED_DATASET, EMBEDDED_MODEL, MODEL_NAME, load_documents, load_model
from saelens_asi.evaluation.metrics import SAEEvaluation
from saelens_asi.evaluation.results import EvaluationFolder, evaluation_rows, evaluation_table, write_csv
from saelens_asi.evaluation.run import evaluate
from saelens_asi.evaluation.saes import SAESource, find_saes
from saelens_asi.history import TRAINING_HISTORY, read_history
from saelens_asi.plots import evaluation as evaluation_plots

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
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


def parser() -> argparse.ArgumentParser:
    parse = argparse.ArgumentParser(
        prog="saelens-asi evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parse.add_argument
    add("saes", nargs="+", metavar="SAES", help="folders, releases or ids")
    add("--model", help="name on the hub, local folder, or smollm2; default: what the SAEs were trained on, or smollm2")
    add("--dataset", help="of text or tokens: name, local folder, or bible; default: that of the SAEs, or bible")
    add("--n-tokens", type=int, default=1_000_000, help="by which dead features are counted; default: 1000000")
    add("--loss-tokens", type=int, default=4096, help="on which predictions are compared; 0 for none; default: 4096")
    add(
        "--all-text",
        action="store_true",
        help="read all documents, not only every fifth, which demo and lorsa hold out",
    )
    add("--hook-name", help="for all SAEs, in place of what they say themselves")
    add("--context-size", type=int, help="tokens in a window; default: that of the SAEs, or 256")
    add("--batch-size", type=int, default=8, help="windows in a forward pass; default: 8")
    add("--saes-per-pass", type=int, default=16, help="SAEs in memory at a time; default: 16")
    add("--out", type=Path, default=Path("evaluation_output"), help="folder; default: evaluation_output")
    add("--device", default="cpu")
    add("--dtype", choices=list(_DTYPES), default="float32", help="of the model")
    return parse


def run(settings: argparse.Namespace) -> dict[str, SAEEvaluation]:
    """Do what the flags ask for; returns the results by name."""
    if settings.saes_per_pass < 1:
        raise ValueError(f"--saes-per-pass {settings.saes_per_pass} must be at least 1")
    sources = {source.name: source for source in find_saes(settings.saes)}
    first = _metadata(next(iter(sources.values())), settings.device)
    how = {
        "model": settings.model or _model_name(first.get("model_name")),
        "dataset": settings.dataset or first.get("dataset_path") or EMBEDDED_DATASET,
        "context_size": settings.context_size or first.get("context_size") or _CONTEXT_SIZE,
        **{key: getattr(settings, key) for key in ("n_tokens", "loss_tokens", "all_text", "hook_name", "dtype")},
    }
    processing = {} if settings.model else _processing(first)
    if not settings.model:
        _check_same_model(how["model"], processing, {name: _folder_metadata(one) for name, one in sources.items()})
    results = EvaluationFolder(settings.out, how)
    missing = [one for one in sources.values() if one not in results]
    if len(missing) < len(sources):
        print(f"{len(sources) - len(missing)} of {len(sources)} SAEs are in {results.path} already", flush=True)
    if missing:
        print(f"Loading {how['model']} and {how['dataset']}", flush=True)
        model = _load_model(how["model"], processing, settings)
        text = _documents(how)
        for start in range(0, len(missing), settings.saes_per_pass):
            group = missing[start : start + settings.saes_per_pass]
            saes = {one.name: one.load(settings.device) for one in group}
            if not settings.model:
                metadata = {name: sae.cfg.metadata.to_dict() for name, sae in saes.items()}
                _check_same_model(how["model"], processing, metadata)
            found = evaluate(
                saes, model, text, hook_name=settings.hook_name, n_tokens=settings.n_tokens,
                loss_tokens=settings.loss_tokens, batch_size=settings.batch_size, context_size=how["context_size"],
            )  # fmt: skip
            results.add(found, group)
    chosen = {name: results.evaluations[name] for name in sources}
    written = _write(settings.out, chosen, sources)
    print(f"\n{(settings.out / 'results.md').read_text()}\nWritten:")
    for path in (results.path, results.counts_path, *written):
        print(f"  {path}")
    return chosen


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


def _load_model(name: str, processing: Mapping[str, Any], settings: argparse.Namespace) -> Any:
    """The model as the SAEs saw it: SAELens's own loading where weights were changed."""
    dtype = _DTYPES[settings.dtype]
    if not processing:
        return load_model(name, settings.device, dtype)
    return load_hooked_transformer("HookedTransformer", name, settings.device, {**processing, "dtype": dtype})


def _check_same_model(model: str, processing: Mapping[str, Any], metadata: Mapping[str, Mapping[str, Any]]) -> None:
    known = {name: one for name, one in metadata.items() if one.get("model_name")}
    for name, one in known.items():
        found = (_model_name(one["model_name"]), _processing(one))
        if found != (model, processing):
            said = [f"{named!r} {dict(how) or ''}".strip() for named, how in (found, (model, processing))]
            raise ValueError(
                f"the SAEs belong to several models ({name!r} to {said[0]}, others to {said[1]}): evaluate them "
                "apart, or name one with --model"
            )


def _documents(how: Mapping[str, Any]) -> Any:
    from datasets import concatenate_datasets

    n_tokens = how["n_tokens"] + how["loss_tokens"]
    if how["all_text"]:
        return concatenate_datasets(load_documents(how["dataset"], n_tokens)[::-1])
    return load_documents(how["dataset"], _HELD_OUT_SHARE * n_tokens)[1]


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


def main(args: Sequence[str]) -> None:
    """``saelens-asi evaluate``. A flag with a bad value ends in one line, not in a traceback."""
    settings = parser().parse_args(args)
    # SAELens hints at settings for the model, which _load_model follows.
    if not settings.model:
        warnings.filterwarnings("ignore", message=r"\s*This SAE has non-empty model_from_pretrained_kwargs")
    try:
        run(settings)
    except (ValueError, OSError) as error:
        print(f"saelens-asi evaluate: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print(f"\ninterrupted: the same command continues from {settings.out}", file=sys.stderr)
        raise SystemExit(130) from None
