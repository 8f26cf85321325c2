"""Dead features, error, sparsity and loss of any SAEs that SAELens loads, on text.

SAES are folders that SAELens wrote (a folder of such folders stands for all of them), or pretrained ones: release,
release/sae_id, release/pattern with *, or owner/repository/path on the hub. Writes results.json, results.md, firing
counts and figures. Interrupted, the same command continues with the SAEs that are missing. SAEs that cannot be loaded
or evaluated are left out and named with the reason; the command then ends with an error, after the others. With
--saebench, sae-bench's own core metrics stand beside ours, in saebench.json, saebench.md and files of its own; they
are measured anew each time.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import simple_parsing
from datasets import Dataset, concatenate_datasets
from sae_lens.constants import SAE_CFG_FILENAME
from sae_lens.load_model import load_model as load_hooked_transformer

from saelens_asi import plots
from saelens_asi.activations.loading import EMBEDDED_DATASET, EMBEDDED_MODEL
from saelens_asi.activations.models import embedded_name
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
from saelens_asi.evaluation.run import evaluate_each, none_left
from saelens_asi.evaluation.saebench import SAEBenchCore, check_sae_bench, comparison_table, sae_bench_core
from saelens_asi.evaluation.saes import SAESource, find_saes, read_cfg
from saelens_asi.history import TRAINING_HISTORY, Record, read_history
from saelens_asi.plots import evaluation as evaluation_plots
from saelens_asi.resume import write_json

logger = logging.getLogger(__name__)

_HELD_OUT_SHARE = 4  # training documents for each held-out one, as load_documents cuts them
_CONTEXT_SIZE = 256

_T = TypeVar("_T")

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
        saebench: run the core metrics of the package sae-bench too, on the same text.
    """

    saes: tuple[str, ...] = simple_parsing.field(positional=True, metavar="SAES")
    hooks: tuple[str, ...] = ()
    all_text: bool = simple_parsing.field(default=False, action="store_true")
    saes_per_pass: int = 16
    saebench: bool = simple_parsing.field(default=False, action="store_true")
    out: Path = Path("evaluation_output")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.saes_per_pass < 1:
            raise ValueError(f"--saes-per-pass {self.saes_per_pass} must be at least 1")
        if self.saebench and self.loss_tokens < 1:
            raise ValueError("--saebench compares predictions too: give --loss-tokens of at least 1")


def run(flags: EvaluateFlags) -> dict[str, SAEEvaluation]:
    """Do what the flags ask for; returns the results by name.

    Raises:
        ValueError: where an SAE was left out, when the results of the others are written; and for bad input.
    """
    left_out = _LeftOut()
    if flags.saebench:
        check_sae_bench()
    # SAELens hints at settings for the model, which _load_model follows.
    with warnings.catch_warnings():
        if not flags.model:
            warnings.filterwarnings("ignore", message=r"\s*This SAE has non-empty model_from_pretrained_kwargs")
        sources = {source.name: source for source in find_saes(flags.saes)}
        results, opened = _measure(flags, sources, left_out)
        chosen = {name: results.evaluations[name] for name in sources if name not in left_out.reasons}
        written = _write(flags.out, chosen, sources, left_out.reasons)
        print(f"\n{(flags.out / 'results.md').read_text()}")
        if flags.saebench:
            written += _beside_sae_bench(flags, opened, chosen, sources, left_out)
    print("Written:")
    for path in (results.path, results.counts_path, *written):
        print(f"  {path}")
    if left_out.reasons:
        raise ValueError(
            f"{len(left_out.reasons)} of {len(sources)} SAEs are left out of {flags.out}: "
            + "; ".join(left_out.reasons.values())
        )
    return chosen


class _LeftOut:
    """SAEs that cannot be loaded or evaluated, by name, and why; each is logged when it is found."""

    def __init__(self) -> None:
        self.reasons: dict[str, str] = {}

    def add(self, name: str, reason: object) -> None:
        self.reasons[name] = f"SAES: {reason}"
        logger.warning("Left out: %s", self.reasons[name])

    def each(self, sources: Iterable[SAESource], function: Callable[[SAESource], _T]) -> dict[str, _T]:
        """The function's value by the names of the SAEs for which it raises no ValueError."""
        values = {}
        for source in sources:
            try:
                values[source.name] = function(source)
            except ValueError as error:
                self.add(source.name, error)
        return values


class _Opened(NamedTuple):
    """What the SAEs are evaluated on, loaded when it is first asked for.

    Attributes:
        how: settings that a result depends on.
    """

    model: Callable[[], Any]
    documents: Callable[[], Dataset]
    how: dict[str, Any]


def _measure(
    flags: EvaluateFlags, sources: Mapping[str, SAESource], left_out: _LeftOut
) -> tuple[EvaluationFolder, _Opened]:
    """Evaluate the SAEs that the folder does not hold yet, some at a time, each group kept when it is done."""
    metadata = left_out.each(sources.values(), _folder_metadata)
    first = _first_metadata([sources[name] for name in metadata], flags.device, left_out)
    name = flags.model or _model_name(first.get("model_name"))
    processing = {} if flags.model else _processing(first)
    if not flags.model:
        _check_same_model(name, processing, metadata)
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
    usable = [one for one in sources.values() if one.name not in left_out.reasons]
    missing = [one for one in usable if one not in results]
    if len(missing) < len(usable):
        print(f"{len(usable) - len(missing)} of {len(sources)} SAEs are in {results.path} already", flush=True)
    opened = _Opened(model, cache(lambda: _documents(flags, how["dataset"])), how)
    for start in range(0, len(missing), flags.saes_per_pass):
        group = missing[start : start + flags.saes_per_pass]
        saes = left_out.each(group, lambda one: one.load(flags.device))
        if not saes:
            continue
        if not flags.model:
            _check_same_model(name, processing, {key: sae.cfg.metadata.to_dict() for key, sae in saes.items()})
        found = evaluate_each(
            saes, opened.model(), opened.documents(), hook_name=how["hook_name"], n_tokens=flags.n_tokens,
            loss_tokens=flags.loss_tokens, batch_size=flags.batch_size, context_size=how["context_size"],
        )  # fmt: skip
        for key, reason in found.left_out.items():
            left_out.add(key, reason)
        if found.records:
            results.add(found.records, [one for one in group if one.name in found.records])
    if len(left_out.reasons) == len(sources):
        raise ValueError(none_left(left_out.reasons))
    return results, opened


def _beside_sae_bench(
    flags: EvaluateFlags,
    opened: _Opened,
    ours: Mapping[str, SAEEvaluation],
    sources: Mapping[str, SAESource],
    left_out: _LeftOut,
) -> list[Path]:
    """Sae-bench's core metrics of the SAEs that were evaluated; those that it cannot measure are left out and named."""
    how, folder = opened.how, flags.out / "saebench"
    paths = {name: folder / f"{name.replace('/', '_')}_eval_results.json" for name in ours}

    def measured(source: SAESource) -> SAEBenchCore:
        print(f"sae-bench's core metrics of {source.name}", flush=True)
        return sae_bench_core(
            lambda: source.load(flags.device), opened.model(), opened.documents(),
            name=source.name, model_name=how["model"], hook_name=how["hook_name"], n_tokens=flags.n_tokens,
            loss_tokens=flags.loss_tokens, batch_size=flags.batch_size, context_size=how["context_size"],
            result_path=paths[source.name],
        )  # fmt: skip

    found = left_out.each([sources[name] for name in ours], measured)
    written = [flags.out / "saebench.json", flags.out / "saebench.md"]
    table = comparison_table(found, ours)
    results = {name: one.to_dict(ours[name]) for name, one in found.items()}
    write_json(written[0], {"settings": how, "sae_bench": check_sae_bench(), "results": results}, indent=1)
    written[1].write_text(table + "\n")
    print(f"\n{table}\n")
    return [*written, *(paths[name] for name in found)]


def _folder_metadata(source: SAESource) -> dict[str, Any]:
    """What a folder's config says of its training; nothing for an SAE on the hub.

    Raises:
        ValueError: for a config that cannot be read, with its path.
    """
    if source.folder is None:
        return {}
    cfg = read_cfg(source.folder)
    metadata = cfg.get("metadata") or cfg
    context_size = metadata.get("context_size") if isinstance(metadata, dict) else -1
    if context_size is not None and not (isinstance(context_size, int) and context_size > 0):
        raise ValueError(f"{source.folder / SAE_CFG_FILENAME} is damaged: metadata={metadata!r}")
    return metadata


def _first_metadata(sources: Iterable[SAESource], device: str, left_out: _LeftOut) -> dict[str, Any]:
    """Of the first SAE that can be loaded as far as it takes to know."""
    for source in sources:
        found = left_out.each([source], lambda one: _folder_metadata(one) or one.load(device).cfg.metadata.to_dict())
        if found:
            return found[source.name]
    raise ValueError(none_left(left_out.reasons))


def _model_name(name: str | None) -> str:
    return embedded_name(name) or EMBEDDED_MODEL


def _processing(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """How a HookedTransformer's weights were changed for the training of an SAE; mostly not at all."""
    given = metadata.get("model_from_pretrained_kwargs") or {}
    return {name: True for name in _PROCESSING if given.get(name)}


def _load_model(name: str, processing: Mapping[str, Any], flags: EvaluateFlags) -> Any:
    """The model as the SAEs saw it: SAELens's own loading where weights were changed."""
    print(f"Loading {name}", flush=True)
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
    print(f"Loading {dataset}", flush=True)
    n_tokens = flags.n_tokens + flags.loss_tokens
    if flags.all_text:
        return concatenate_datasets(open_text(dataset, n_tokens)[::-1])
    return open_text(dataset, _HELD_OUT_SHARE * n_tokens)[1]


def _write(
    out: Path, results: dict[str, SAEEvaluation], sources: Mapping[str, SAESource], left_out: Mapping[str, str]
) -> list[Path]:
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
    if left_out:
        lines += ["", "Left out:", "", *(f"- {name}: {reason}" for name, reason in left_out.items())]
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
    folders = {name: folder for name in results if (folder := sources[name].folder) is not None}
    histories = _histories({name: one for name, one in folders.items() if (one / TRAINING_HISTORY).exists()})
    if 0 < len(histories) <= len(plots.COLORS):
        figures["training_history.png"] = plots.training_history(histories)
    return written + [plots.save(figure, out / name) for name, figure in figures.items()]


def _histories(folders: Mapping[str, Path]) -> dict[str, list[Record]]:
    """Training histories by name; one that is damaged costs its curve, not the figures of the others."""
    histories = {}
    for name, folder in folders.items():
        try:
            histories[name] = read_history(folder)
        except (OSError, ValueError) as error:
            logger.warning("The training history of %s is not drawn: %s", name, error)
    return histories


COMMAND = Command(
    name="evaluate",
    about=__doc__ or "",
    run=run,
    settings=(EvaluateFlags,),
    resume=lambda flags: f"the same command continues from {flags.out}",
)


def main(args: Sequence[str]) -> None:
    COMMAND.main(args)
