"""Which hooks of a model are low-rank, why, and what it means for a sparse autoencoder on them.

Writes a table (CSV, JSON), one spectrum file a hook, figures, and report.md. Interrupted, the same command continues.
Under torchrun the processes share the pass over the text, which then begins anew after an interruption.
"""

from __future__ import annotations

import json
import logging
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypedDict

import torch
from datasets import Dataset
from torch import Tensor

from saelens_asi import plots
from saelens_asi.activations.fingerprint import (
    Fingerprints,
    check_fingerprints,
    data_fingerprint,
    fingerprints,
    sealed,
    unsealed,
)
from saelens_asi.activations.hooks import layer_hooks, resolve_hook_names, split_name
from saelens_asi.activations.replacement import Predictions
from saelens_asi.activations.tokens import token_batches
from saelens_asi.cli.common import Command
from saelens_asi.cli.flags import (
    DTYPES,
    DeviceFlag,
    DtypeFlag,
    HookFlags,
    LossFlag,
    OutFlag,
    PassFlags,
    SourceFlags,
    SpecialTokensFlag,
    layer_numbers,
    open_model,
    open_text,
)
from saelens_asi.evaluation.tables import markdown_table
from saelens_asi.initialization import AUTO_VARIANCE_SHARE
from saelens_asi.plots import spectra as spectrum_plots
from saelens_asi.plugin.launch import processes
from saelens_asi.resume import differences, write_json
from saelens_asi.sparse.shards import Group
from saelens_asi.spectra.attention import AttentionDecomposition, decompose_attention_output
from saelens_asi.spectra.components import ComponentLosses, loss_recovered
from saelens_asi.spectra.findings import SpectrumRow, findings, table_rows, write_table
from saelens_asi.spectra.hook_spectra import activation_spectra
from saelens_asi.spectra.spectrum import Spectrum

logger = logging.getLogger(__name__)

# Of settings.json and losses.json: the model and the data that they tell of.
_MADE_OF = "fingerprints"

# Numbers of components at which the loss is measured, as shares of the width.
_SHARES = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
_LOSS_BATCH = 4


_COLUMNS = {
    "hook": "hook",
    "width": "width",
    "effective_rank_share": "effective rank / width",
    "dimension_90": "dims for 90 %",
    "dimension_99_share": "dims for 99 % / width",
    "above_5_percent": "above 5 % of largest",
    "mean_to_deviation": "gamma (mean / deviation)",
}


class _Excluded(TypedDict):
    """Tokens that do not count, as the functions of spectra take them."""

    exclude_special_tokens: bool
    exclude_positions: list[int]


class _Reading(_Excluded):
    """How text is read, as the functions of spectra take it."""

    batch_size: int
    context_size: int


@dataclass(frozen=True, kw_only=True)
class SpectrumFlags(OutFlag, DtypeFlag, DeviceFlag, LossFlag, SpecialTokensFlag, PassFlags, HookFlags, SourceFlags):
    """Flags of ``saelens-asi spectrum``.

    Attributes:
        exclude_positions: positions of each window to leave out.
        detail_layer: layer of the loss and decomposition figures; without it the middle one.
    """

    hooks: tuple[str, ...] = ("attn_out", "mlp_out", "resid_post", "hook_z")
    layers: tuple[str, ...] = ("all",)
    context_size: int = 256
    exclude_positions: tuple[int, ...] = ()
    detail_layer: int | None = None
    out: Path = Path("spectrum_output")

    @property
    def excluded(self) -> _Excluded:
        return {
            "exclude_special_tokens": not self.keep_special_tokens,
            "exclude_positions": list(self.exclude_positions),
        }

    @property
    def reading(self) -> _Reading:
        return {"batch_size": self.batch_size, "context_size": self.context_size, **self.excluded}


def run(flags: SpectrumFlags, command: str = "saelens-asi spectrum") -> list[SpectrumRow]:
    """Do what the flags ask for; returns the rows of the table, which of several processes the first alone writes."""
    world = processes(1, flags.device).world
    model = open_model(flags.model, flags.device, DTYPES[flags.dtype])
    layers = layer_numbers(flags.layers, model.cfg.n_layers)
    names = resolve_hook_names(layer_hooks(flags.hooks, layers), model.hook_dict)
    detail = layers[len(layers) // 2] if flags.detail_layer is None else flags.detail_layer
    if not 0 <= detail < model.cfg.n_layers:
        raise ValueError(f"--detail-layer {detail}: this model has layers 0 to {model.cfg.n_layers - 1}")
    training, held_out = open_text(flags.dataset, flags.n_tokens)
    spectra, files = _spectra(model, training, names, flags, world)
    rows = table_rows(spectra)
    if not world.is_first:
        return rows
    written = write_table(rows, flags.out)

    at_layer = {kind: name for name in names for layer, kind in [split_name(name)] if layer == detail}
    losses = _losses(model, training, held_out, {k: n for k, n in at_layer.items() if k != "hook_z"}, spectra, flags)
    parts = None
    if {"attn_out", "hook_z"} & at_layer.keys():
        parts = _decomposition(model, training, detail, spectra, flags)
    chosen = {kind: spectra[name] for kind, name in at_layer.items()}
    figures = _figures(rows, detail, chosen, losses, parts, flags.out)

    sentences = findings(rows, losses, parts)
    what_now = advice(rows, {name: str(path) for name, path in files.items()})
    page = report(f"Spectra of {flags.model}", command, sentences, what_now, figures, rows)
    (flags.out / "report.md").write_text(page)
    print("\n".join(["", *(f"- {sentence}" for sentence in sentences), "", what_now, "", "Written:"]))
    for path in (flags.out / "report.md", *written, *figures):
        print(f"  {path}")
    print(f"  {flags.out / 'spectra'} ({len(files)} files)")
    return rows


def _figures(
    rows: list[SpectrumRow],
    layer: int,
    spectra: Mapping[str, Spectrum],
    losses: Mapping[str, ComponentLosses],
    parts: AttentionDecomposition | None,
    out: Path,
) -> list[Path]:
    """Save the figures: ranks of all hooks; the rest of ``layer``, whose ``spectra`` and ``losses`` are by kind."""
    figures = {"ranks.png": spectrum_plots.ranks_across_layers(rows)}
    if spectra:
        figures["singular_values.png"] = spectrum_plots.relative_singular_values(spectra, f"Layer {layer}")
    if losses:
        widths = {kind: spectrum.d for kind, spectrum in spectra.items()}
        title = f"Layer {layer}: what the top principal components recover"
        figures["loss_recovered.png"] = spectrum_plots.loss_by_components(losses, widths, title)
    if parts is not None:
        figures["decomposition.png"] = spectrum_plots.attention_decomposition(parts)
    return [plots.save(figure, out / name) for name, figure in figures.items()]


def _spectra(
    model: Any, data: Dataset, names: Sequence[str], flags: SpectrumFlags, world: Group
) -> tuple[dict[str, Spectrum], dict[str, Path]]:
    """Spectra and their files: those of a finished pass with these settings where they are there, or a pass."""
    folder = flags.out / "spectra"
    files = {name: folder / f"{name}.safetensors" for name in names}
    own = {"model": flags.model, "dataset": flags.dataset, "dtype": flags.dtype}
    settings = {**own, "hooks": list(names), "n_tokens": flags.n_tokens, **flags.reading}
    done, made_of = folder / "settings.json", fingerprints(model, data)
    spectra = _saved_spectra(files) if _of_this(done, settings, made_of) else None
    if all(world.gather_objects(spectra is not None)) and spectra is not None:
        if world.is_first:
            print(f"The spectra are in {folder} already: delete {done} to measure them again", flush=True)
        return spectra, files
    checkpoint = flags.out / "pass.safetensors" if world.size == 1 else None
    spectra = activation_spectra(model, data, names, flags.n_tokens, checkpoint=checkpoint, **flags.reading)
    if not world.is_first:
        return spectra, files
    # Or a kill between two of the files would leave some of this pass under the settings of the last one.
    done.unlink(missing_ok=True)
    for name, spectrum in spectra.items():
        spectrum.save(files[name])
    write_json(done, sealed({**settings, _MADE_OF: made_of}), indent=1)
    if checkpoint is not None:
        checkpoint.unlink(missing_ok=True)
    return spectra, files


def _saved_spectra(files: Mapping[str, Path]) -> dict[str, Spectrum] | None:
    """None, and why, where one of them cannot be read."""
    try:
        return {name: Spectrum.load(path) for name, path in files.items()}
    except (ValueError, FileNotFoundError) as error:
        logger.warning("the spectra are measured again: %s", error)
        return None


def _of_this(path: Path, settings: Mapping[str, Any], made_of: Fingerprints) -> bool:
    """Whether a file tells of these settings, model and data; says why where only the latter are others."""
    if not path.exists():
        return False
    try:
        saved = unsealed(json.loads(path.read_bytes()))
        known = saved.pop(_MADE_OF, None)
        if differences(saved, settings):
            return False
        check_fingerprints(known, made_of, path, "measured again")
    except (OSError, ValueError, AttributeError) as error:
        _no_folder(path)
        logger.warning("the spectra are measured again: %s", _about(path, error))
        return False
    return True


def _about(path: Path, error: Exception) -> str:
    """An error with the file that it comes from."""
    return str(error) if str(path) in str(error) else f"{path} is damaged: {error}"


def _no_folder(path: Path) -> None:
    if path.is_dir():
        raise ValueError(f"{path} is a folder, where a file is to be written: delete it, or set --out to another")


def _losses(
    model: Any,
    data: Dataset,
    held_out: Dataset,
    hooks: Mapping[str, str],
    spectra: Mapping[str, Spectrum],
    flags: SpectrumFlags,
) -> dict[str, ComponentLosses]:
    """Loss by components for each hook, saved in losses.json as they come: a second run measures the missing ones."""
    if not flags.loss_tokens or not hooks:
        return {}
    tokens = _first_windows(model, held_out, -(-flags.loss_tokens // flags.context_size), flags.context_size)
    path = flags.out / "losses.json"
    key = json.dumps([flags.model, flags.dataset, flags.n_tokens, flags.dtype, list(tokens.shape), flags.excluded])
    made_of = {**fingerprints(model, data), "held_out": data_fingerprint(tokens)}
    losses = _saved_losses(path, key, made_of)
    for name in hooks.values():
        if name not in losses:
            print(f"Loss by components of {name}", flush=True)
            numbers = sorted({max(1, round(share * spectra[name].d)) for share in _SHARES})
            losses[name] = loss_recovered(
                model, tokens, name, numbers, spectrum=spectra[name], batch_size=_LOSS_BATCH, **flags.excluded
            )
            values = {name: vars(loss) for name, loss in losses.items()}
            write_json(path, sealed({"key": key, _MADE_OF: made_of, **values}), indent=1)
    return {kind: losses[name] for kind, name in hooks.items()}


def _saved_losses(path: Path, key: str, made_of: Fingerprints) -> dict[str, ComponentLosses]:
    """By hook, those of this key, model and data. A damaged file is as good as none, with a warning."""
    _no_folder(path)
    if not path.exists():
        return {}
    try:
        saved = unsealed(json.loads(path.read_bytes()))
        known = saved.pop(_MADE_OF, None)
        if saved.pop("key") != key:
            return {}
        check_fingerprints(known, made_of, path, "measured again")
        return {name: _component_losses(name, values) for name, values in saved.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("the losses are measured again: %s", _about(path, error))
        return {}


def _component_losses(name: str, values: Mapping[str, Any]) -> ComponentLosses:
    components = {int(k): Predictions(*p) for k, p in values["components"].items()}
    ends = {end: Predictions(*values[end]) for end in ("clean", "zero", "mean")}
    return ComponentLosses(name, **ends, components=components, n_tokens=values["n_tokens"])


def _first_windows(model: Any, documents: Dataset, n_windows: int, context_size: int) -> Tensor:
    tokens = [batch for batch, _ in islice(token_batches(model, documents, 1, context_size), n_windows)]
    if not tokens:
        raise ValueError("the held-out documents fill no window: give more text, or --loss-tokens 0")
    return torch.cat([window for window in tokens if window.shape == tokens[0].shape])


def _decomposition(
    model: Any, data: Dataset, layer: int, spectra: Mapping[str, Spectrum], flags: SpectrumFlags
) -> AttentionDecomposition:
    width = max(spectrum.d for spectrum in spectra.values())
    n_tokens = min(flags.n_tokens, 32 * width)
    print(f"Decomposition of layer {layer}'s attention output", flush=True)
    return decompose_attention_output(model, data, layer, n_tokens, **flags.reading)


def advice(rows: Sequence[SpectrumRow], files: Mapping[str, str]) -> str:
    """What it means for an SAE on the lowest-rank hook; ``files`` leads from hooks to their spectrum files."""
    # Where one direction holds most of the variance, a share of the variance chooses no subspace.
    usual = [row for row in rows if row["first_component_variance_share"] <= 0.5] or rows
    row = min(usual, key=lambda row: row["effective_rank_share"])
    gamma = row["mean_to_deviation"]
    mean = "" if gamma is None else f" The mean is {gamma:.2f} times as long as the deviation (gamma)."
    return (
        f"An SAE on {row['hook']} that starts with random features spends them on {row['width']} dimensions, of which "
        f"{row['dimension_90']} hold {AUTO_VARIANCE_SHARE:.0%} of the variance.{mean} Start at the mean, and inside of "
        "what varies, from the file written here:\n\n"
        f'TopKTrainingSAEConfig(d_in={row["width"]}, ..., optimizer="sparse_adam",\n'
        f'    initializer=ActiveSubspaceInit(spectrum="{files[row["hook"]]}"))'
    )


def report(
    title: str,
    command: str,
    sentences: Sequence[str],
    what_now: str,
    figures: Sequence[Path],
    rows: Sequence[SpectrumRow],
) -> str:
    """A page in Markdown that stands beside its figures."""
    paragraph, _, code = what_now.partition("\n\n")
    table = markdown_table(
        list(_COLUMNS.values()),
        [[_cell(key, value) for key, value in _in_columns(row)] for row in rows],
        align="l" + "r" * (len(_COLUMNS) - 1),
    )
    return "\n\n".join(
        [
            f"# {title}",
            "\n".join(f"- {sentence}" for sentence in sentences),
            "## What it means for an SAE",
            paragraph,
            f"```python\n{code}\n```",
            "## Figures",
            *(f"![{path.stem}]({path.name})" for path in figures),
            "## All hooks",
            table,
            "## Command",
            f"```\n{command}\n```\n",
        ]
    )


def _in_columns(row: SpectrumRow) -> list[tuple[str, object]]:
    values = dict(row)
    return [(key, values[key]) for key in _COLUMNS]


def _cell(key: str, value: object) -> str:
    if key.endswith("_share"):
        return f"{value:.1%}"
    return f"{value:.3g}" if isinstance(value, float) else "-" if value is None else str(value)


COMMAND = Command(
    name="spectrum",
    about=__doc__ or "",
    run=run,
    settings=(SpectrumFlags,),
    resume=lambda flags: f"the same command continues from {flags.out}",
    takes_processes=True,
)


def main(args: Sequence[str]) -> None:
    command = shlex.join(["saelens-asi", "spectrum", *args])
    replace(COMMAND, run=partial(run, command=command)).main(args)
