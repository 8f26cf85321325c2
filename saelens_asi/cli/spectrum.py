"""Which hooks of a model are low-rank, why, and what it means for a sparse autoencoder on them.

Writes a table (CSV, JSON), one spectrum file a hook, figures, and report.html. Interrupted, the same command continues.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saelens_asi import plots
from saelens_asi.activations.hooks import SHORT_NAMES, layer_hooks, parse_layers, resolve_hook_names
from saelens_asi.activations.loading import EMBEDDED_DATASET, EMBEDDED_MODEL, load_documents, load_model
from saelens_asi.activations.replacement import Predictions
from saelens_asi.activations.tokens import token_batches
from saelens_asi.plots import spectra as spectrum_plots
from saelens_asi.spectra import findings as report
from saelens_asi.spectra.attention import AttentionDecomposition, decompose_attention_output
from saelens_asi.spectra.components import ComponentLosses, loss_recovered
from saelens_asi.spectra.hook_spectra import activation_spectra
from saelens_asi.spectra.spectrum import Spectrum

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Numbers of components at which the loss is measured, as shares of the width.
_SHARES = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
_LOSS_BATCH = 4


def parser() -> argparse.ArgumentParser:
    parse = argparse.ArgumentParser(
        prog="saelens-asi spectrum", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parse.add_argument
    add("--model", default=EMBEDDED_MODEL, help="name on the hub, local folder, or smollm2 (default)")
    add("--dataset", default=EMBEDDED_DATASET, help="of text or tokens: name, local folder, or bible (default)")
    add("--hooks", nargs="+", default=["attn_out", "mlp_out", "resid_post", "hook_z"],
        help=f"{', '.join(SHORT_NAMES)}, or full names; default: attn_out mlp_out resid_post hook_z")  # fmt: skip
    add("--layers", nargs="+", default=["all"], help="all (default), or numbers and ranges: 0 10-15")
    add("--n-tokens", type=int, default=1_000_000, help="activations of each hook; default: 1000000")
    add("--out", type=Path, default=Path("spectrum_output"), help="folder; default: spectrum_output")
    add("--context-size", type=int, default=256, help="tokens in a window; default: 256")
    add("--batch-size", type=int, default=8, help="windows in a forward pass; default: 8")
    add("--keep-special-tokens", action="store_true", help="count BOS, EOS and padding too")
    add("--exclude-positions", type=int, nargs="*", default=[], help="positions of each window to leave out")
    add("--detail-layer", type=int, help="layer of the loss and decomposition figures; default: the middle one")
    add("--loss-tokens", type=int, default=4096, help="held-out tokens for the loss; 0 leaves it out; default: 4096")
    add("--device", default="cpu")
    add("--dtype", choices=list(_DTYPES), default="float32", help="of the model")
    return parse


def run(settings: argparse.Namespace, command: str) -> list[report.Row]:
    """Do what the flags ask for; returns the rows of the table."""
    out: Path = settings.out
    model = load_model(settings.model, settings.device, _DTYPES[settings.dtype])
    layers = parse_layers(settings.layers, model.cfg.n_layers)
    names = resolve_hook_names(layer_hooks(settings.hooks, layers), model.hook_dict)
    detail = layers[len(layers) // 2] if settings.detail_layer is None else settings.detail_layer
    if not 0 <= detail < model.cfg.n_layers:
        raise ValueError(f"--detail-layer {detail}: this model has layers 0 to {model.cfg.n_layers - 1}")
    training, held_out = load_documents(settings.dataset, settings.n_tokens)
    exclude: dict[str, Any] = {
        "exclude_special_tokens": not settings.keep_special_tokens,
        "exclude_positions": settings.exclude_positions,
    }
    windows: dict[str, Any] = {"batch_size": settings.batch_size, "context_size": settings.context_size}
    spectra, files = _spectra(model, training, names, settings, {**windows, **exclude})
    rows = report.table_rows(spectra)
    written = report.write_table(rows, out)

    at_layer = {kind: name for name in names for layer, kind in [report.split_name(name)] if layer == detail}
    figures = {"ranks.png": spectrum_plots.ranks_across_layers(rows)}
    if at_layer:
        chosen = {kind: spectra[name] for kind, name in at_layer.items()}
        figures["singular_values.png"] = spectrum_plots.relative_singular_values(chosen, f"Layer {detail}")
    losses = _losses(model, held_out, {k: n for k, n in at_layer.items() if k != "hook_z"}, spectra, settings, exclude)
    if losses:
        widths = {kind: spectra[name].d for kind, name in at_layer.items()}
        title = f"Layer {detail}: what the top principal components recover"
        figures["loss_recovered.png"] = spectrum_plots.loss_by_components(losses, widths, title)
    parts = None
    if {"attn_out", "hook_z"} & at_layer.keys():
        parts = _decomposition(model, training, detail, spectra, settings, {**windows, **exclude})
        figures["decomposition.png"] = spectrum_plots.attention_decomposition(parts)

    paths = [plots.save(figure, out / name) for name, figure in figures.items()]
    said = report.findings(rows, losses, parts)
    what_now = report.advice(rows, {name: str(path) for name, path in files.items()})
    page = report.html_page(f"Spectra of {settings.model}", command, said, what_now, paths, rows)
    (out / "report.html").write_text(page)
    print("\n".join(["", *(f"- {sentence}" for sentence in said), "", what_now, "", "Written:"]))
    for path in (out / "report.html", *written, *paths):
        print(f"  {path}")
    print(f"  {out / 'spectra'} ({len(files)} files)")
    return rows


def _spectra(
    model: Any, data: Any, names: Sequence[str], settings: argparse.Namespace, how: dict[str, Any]
) -> tuple[dict[str, Spectrum], dict[str, Path]]:
    """Spectra and their files: those of a finished pass with these settings where they are there, or a pass."""
    folder = settings.out / "spectra"
    files = {name: folder / f"{name}.safetensors" for name in names}
    own = {"model": settings.model, "dataset": settings.dataset, "dtype": settings.dtype}
    asked = json.dumps({**own, "hooks": list(names), "n_tokens": settings.n_tokens, **how}, indent=1) + "\n"
    done = folder / "settings.json"
    if done.exists() and done.read_text() == asked:
        print(f"The spectra are in {folder} already: delete {done} to measure them again", flush=True)
        return {name: Spectrum.load(path) for name, path in files.items()}, files
    checkpoint = settings.out / "pass.safetensors"
    spectra = activation_spectra(model, data, names, settings.n_tokens, checkpoint=checkpoint, **how)
    for name, spectrum in spectra.items():
        spectrum.save(files[name])
    done.write_text(asked)
    checkpoint.unlink(missing_ok=True)
    return spectra, files


def _losses(
    model: Any,
    held_out: Any,
    hooks: dict[str, str],
    spectra: dict[str, Spectrum],
    settings: argparse.Namespace,
    exclude: dict[str, Any],
) -> dict[str, ComponentLosses]:
    """Loss by components for each hook, kept in losses.json as they come: a second run measures the missing ones."""
    if not settings.loss_tokens or not hooks:
        return {}
    n_windows = -(-settings.loss_tokens // settings.context_size)
    tokens = _first_windows(model, held_out, n_windows, settings.context_size)
    path = settings.out / "losses.json"
    key = json.dumps([settings.model, settings.dataset, settings.n_tokens, settings.dtype, list(tokens.shape), exclude])
    kept = json.loads(path.read_text()) if path.exists() else {}
    kept = kept if kept.get("key") == key else {"key": key}
    losses = {}
    for kind, name in hooks.items():
        if name not in kept:
            print(f"Loss by components of {name}", flush=True)
            numbers = sorted({max(1, round(share * spectra[name].d)) for share in _SHARES})
            loss = loss_recovered(
                model, tokens, name, numbers, spectrum=spectra[name], batch_size=_LOSS_BATCH, **exclude
            )
            kept[name] = {**vars(loss), "components": {str(k): p for k, p in loss.components.items()}}
            path.write_text(json.dumps(kept, indent=1) + "\n")
        values = json.loads(json.dumps(kept[name]))
        components = {int(k): Predictions(*p) for k, p in values["components"].items()}
        ends = {end: Predictions(*values[end]) for end in ("clean", "zero", "mean")}
        losses[kind] = ComponentLosses(name, **ends, components=components, n_tokens=values["n_tokens"])
    return losses


def _first_windows(model: Any, documents: Any, n_windows: int, context_size: int) -> Tensor:
    tokens = [batch for batch, _ in islice(token_batches(model, documents, 1, context_size), n_windows)]
    if not tokens:
        raise ValueError("the held-out documents fill no window: give more text, or --loss-tokens 0")
    return torch.cat([window for window in tokens if window.shape == tokens[0].shape])


def _decomposition(
    model: Any, data: Any, layer: int, spectra: dict[str, Spectrum], settings: argparse.Namespace, how: dict[str, Any]
) -> AttentionDecomposition:
    width = max(spectrum.d for spectrum in spectra.values())
    n_tokens = min(settings.n_tokens, 32 * width)
    print(f"Decomposition of layer {layer}'s attention output", flush=True)
    return decompose_attention_output(model, data, layer, n_tokens, **how)


def main(args: Sequence[str]) -> None:
    """``saelens-asi spectrum``. A flag with a bad value ends in one line, not in a traceback."""
    settings = parser().parse_args(args)
    try:
        run(settings, shlex.join(["saelens-asi", "spectrum", *args]))
    except ValueError as error:
        print(f"saelens-asi spectrum: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print(f"\ninterrupted: the same command continues from {settings.out}", file=sys.stderr)
        raise SystemExit(130) from None
