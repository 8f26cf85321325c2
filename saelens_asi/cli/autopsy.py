"""Why features of an SAE are dead, by measurement, and what to change.

Writes autopsy.json, autopsy.md and autopsy.png. Model, text and hook are those that the SAE names, unless given.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from sae_lens.constants import ACTIVATION_SCALER_CFG_FILENAME, SAE_CFG_FILENAME
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.sae import TrainingSAE
from sae_lens.training.activation_scaler import ActivationScaler
from torch import Tensor

from saelens_asi import plots
from saelens_asi.activations.loading import EMBEDDED_DATASET, EMBEDDED_MODEL, MODEL_NAME, load_documents, load_model
from saelens_asi.activations.reader import HookActivations
from saelens_asi.dead_features.examine import autopsy
from saelens_asi.dead_features.momentum import TRAINER_STATE
from saelens_asi.dead_features.record import Autopsy, AutopsySettings
from saelens_asi.evaluation.saes import find_saes
from saelens_asi.plots.autopsy import autopsy_figure


def parser() -> argparse.ArgumentParser:
    defaults = AutopsySettings()
    parse = argparse.ArgumentParser(
        prog="saelens-asi autopsy", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parse.add_argument
    add("sae", help="folder of an SAE or of a SAELens checkpoint, or release/sae_id on the hub")
    add("--checkpoint", type=Path, help="a SAELens checkpoint to read instead: it holds the optimizer's state too")
    add("--model", help=f"name on the hub, local folder, or {EMBEDDED_MODEL}; default: the SAE's own")
    add("--dataset", help=f"of text or tokens: name, local folder, or {EMBEDDED_DATASET}; default: the SAE's own")
    add("--hook", help="name of the hook; default: the SAE's own")
    add("--n-tokens", type=int, default=100_000, help="a feature is dead that fires on none of them; default: 100000")
    add("--n-sample", type=int, default=defaults.n_sample,
        help=f"tokens on which changed features are tried; default: {defaults.n_sample}")  # fmt: skip
    add("--context-size", type=int, help="tokens in a window; default: the SAE's own, or 256")
    add("--batch-size", type=int, default=8, help="windows in a forward pass; default: 8")
    add("--keep-special-tokens", action="store_true", help="count BOS, EOS and padding too")
    add("--device", default="cpu")
    add("--out", type=Path, default=Path("autopsy_output"), help="folder; default: autopsy_output")
    return parse


def load_sae(name: str, device: str = "cpu") -> Any:
    """One SAE of a folder or of the hub; of a checkpoint the training SAE, to which the optimizer's state belongs.

    Raises:
        ValueError: for a name that leads to none, or to several.
    """
    folder = Path(name)
    if (folder / TRAINER_STATE).exists():
        architecture = json.loads((folder / SAE_CFG_FILENAME).read_text()).get("architecture", "standard")
        training_class: type[TrainingSAE[Any]] = get_sae_training_class(architecture)[0]
        return training_class.load_from_disk(folder, device=device)
    found = find_saes([name])
    if len(found) > 1:
        raise ValueError(f"{name} holds {len(found)} SAEs: name one of them, such as {found[0].name!r}")
    return found[0].load(device)


class _Scaled:
    """Activations as a SAELens trainer scales them before its SAE sees them."""

    def __init__(self, activations: HookActivations, scaler: ActivationScaler) -> None:
        self.activations, self.scaler, self.n_tokens = activations, scaler, activations.n_tokens

    def __iter__(self) -> Iterator[Tensor]:
        return map(self.scaler, self.activations)


def run(settings: argparse.Namespace) -> Autopsy:
    """Do what the flags ask for."""
    source = settings.sae if settings.checkpoint is None else str(settings.checkpoint)
    sae = load_sae(source, settings.device)
    own = sae.cfg.metadata
    hook = settings.hook or own.hook_name
    if hook is None:
        raise ValueError("the SAE names no hook: give --hook")
    model_name = settings.model or _embedded(own.model_name) or EMBEDDED_MODEL
    dataset = settings.dataset or own.dataset_path or EMBEDDED_DATASET
    print(f"{source}: {sae.cfg.architecture()}, {sae.cfg.d_sae:,} features on {hook} of {model_name}", flush=True)
    model = load_model(model_name, settings.device)
    text, _ = load_documents(dataset, settings.n_tokens)
    activations = HookActivations(
        model, text, hook, settings.n_tokens,
        batch_size=settings.batch_size,
        context_size=settings.context_size or own.context_size or 256,
        exclude_special_tokens=not settings.keep_special_tokens,
        progress=False,  # the autopsy shows its own
    )  # fmt: skip
    scaler_file = Path(source) / ACTIVATION_SCALER_CFG_FILENAME
    batches: Iterable[Tensor] = activations
    if scaler_file.exists():
        scaler = ActivationScaler()
        scaler.load(scaler_file)
        batches = _Scaled(activations, scaler)
    has_state = (Path(source) / TRAINER_STATE).exists()
    with torch.no_grad():
        found = autopsy(sae, batches, optimizer_state=source if has_state else None, n_sample=settings.n_sample)
    out: Path = settings.out
    out.mkdir(parents=True, exist_ok=True)
    (out / "autopsy.json").write_text(json.dumps(found.to_dict(), allow_nan=False) + "\n")
    (out / "autopsy.md").write_text(f"# Autopsy of {source}\n\n{found.summary()}\n")
    paths = [out / "autopsy.json", out / "autopsy.md"]
    paths.append(plots.save(autopsy_figure(found, f"{hook}, {model_name}"), out / "autopsy.png"))
    print(f"\n{found}\n\nWritten:")
    print("\n".join(f"  {path}" for path in paths))
    return found


def _embedded(name: str | None) -> str | None:
    """The embedded model under the name that is written into SAEs trained on it."""
    return EMBEDDED_MODEL if name == MODEL_NAME else name


def main(args: Sequence[str]) -> None:
    """``saelens-asi autopsy``. A bad argument ends in one line, not in a traceback."""
    settings = parser().parse_args(args)
    try:
        run(settings)
    except ValueError as error:
        print(f"saelens-asi autopsy: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
