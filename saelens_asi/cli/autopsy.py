"""Why features of an SAE are dead, by measurement, and what to change.

Writes autopsy.json, autopsy.md and autopsy.png. Model, text and hook are those that the SAE names, unless given.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import simple_parsing
import torch
from sae_lens import SAE, TrainingSAE
from sae_lens.constants import ACTIVATION_SCALER_CFG_FILENAME
from sae_lens.registry import get_sae_training_class
from sae_lens.training.activation_scaler import ActivationScaler
from torch import Tensor

from saelens_asi import plots
from saelens_asi.activations.loading import EMBEDDED_DATASET, EMBEDDED_MODEL
from saelens_asi.activations.models import embedded_name
from saelens_asi.activations.reader import HookActivations
from saelens_asi.cli.common import Command
from saelens_asi.cli.flags import (
    DeviceFlag,
    HookFlags,
    OutFlag,
    OwnSourceFlags,
    PassFlags,
    SpecialTokensFlag,
    one_hook,
    open_model,
    open_text,
)
from saelens_asi.dead_features.examine import autopsy
from saelens_asi.dead_features.firings import SPARSITY
from saelens_asi.dead_features.momentum import TRAINER_STATE
from saelens_asi.dead_features.record import Autopsy, AutopsySettings
from saelens_asi.evaluation.saes import find_saes, read_cfg
from saelens_asi.plots.autopsy import autopsy_figure

_CONTEXT_SIZE = 256


@dataclass(frozen=True, kw_only=True)
class AutopsyFlags(OutFlag, DeviceFlag, SpecialTokensFlag, PassFlags, HookFlags, OwnSourceFlags):
    """Flags of ``saelens-asi autopsy``.

    Attributes:
        sae: folder of an SAE or of a SAELens checkpoint, or release/sae_id on the hub.
        checkpoint: a SAELens checkpoint to read instead: it holds the optimizer's state too.
        n_sample: tokens on which changed features are tried.
        dead_rate: a feature that fires on a smaller share of tokens is dead; to exclude a rate takes 3 / rate silent
            tokens, read here or counted in training.
    """

    sae: str = simple_parsing.field(positional=True, metavar="SAE")
    checkpoint: Path | None = None
    hooks: tuple[str, ...] = ()
    n_tokens: int = 100_000
    n_sample: int = AutopsySettings().n_sample
    dead_rate: float = AutopsySettings().dead_rate
    out: Path = Path("autopsy_output")

    @property
    def source(self) -> str:
        return self.sae if self.checkpoint is None else str(self.checkpoint)


def load_sae(name: str, device: str = "cpu") -> SAE[Any] | TrainingSAE[Any]:
    """One SAE of a folder or of the hub; of a checkpoint the training SAE, to which the optimizer's state belongs.

    Raises:
        ValueError: for a name that leads to none, or to several, and for damaged files.
    """
    folder = Path(name)
    if (folder / TRAINER_STATE).exists():
        architecture = read_cfg(folder).get("architecture", "standard")
        with _named(folder):
            training_class: type[TrainingSAE[Any]] = get_sae_training_class(architecture)[0]
            return training_class.load_from_disk(folder, device=device)
    sources = find_saes([name])
    if len(sources) > 1:
        raise ValueError(f"{name} holds {len(sources)} SAEs: name one of them, such as {sources[0].name!r}")
    return sources[0].load(device)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Whatever SAELens meets in damaged files becomes a ValueError that names them."""
    try:
        yield
    except Exception as error:
        what = " ".join(str(error).split())[:300]
        raise ValueError(f"{path} cannot be loaded, or is damaged: {type(error).__name__}: {what}") from None


class _Scaled:
    """Activations as a SAELens trainer scales them before its SAE sees them."""

    def __init__(self, activations: HookActivations, scaler: ActivationScaler) -> None:
        self.activations, self.scaler, self.n_tokens = activations, scaler, activations.n_tokens

    def __iter__(self) -> Iterator[Tensor]:
        return map(self.scaler, self.activations)


def run(flags: AutopsyFlags) -> Autopsy:
    """Do what the flags ask for."""
    sae = load_sae(flags.source, flags.device)
    own = sae.cfg.metadata
    if not flags.hooks and own.hook_name is None:
        raise ValueError("the SAE names no hook: give --hooks")
    model_name = flags.model or embedded_name(own.model_name) or EMBEDDED_MODEL
    model = open_model(model_name, flags.device)
    hook = one_hook(flags.hooks, flags.layers, lambda: model.cfg.n_layers) if flags.hooks else own.hook_name
    print(f"{flags.source}: {sae.cfg.architecture()}, {sae.cfg.d_sae:,} features on {hook} of {model_name}", flush=True)
    text, _ = open_text(flags.dataset or own.dataset_path or EMBEDDED_DATASET, flags.n_tokens)
    activations = HookActivations(
        model, text, hook, flags.n_tokens,
        batch_size=flags.batch_size,
        context_size=flags.context_size or own.context_size or _CONTEXT_SIZE,
        exclude_special_tokens=not flags.keep_special_tokens,
        progress=False,  # the autopsy shows its own
    )  # fmt: skip
    source = Path(flags.source)
    has_state, has_rates = ((source / name).exists() for name in (TRAINER_STATE, SPARSITY))
    with torch.no_grad():
        record = autopsy(
            sae, _as_trained(activations, source),
            optimizer_state=source if has_state else None,
            firing_rates=source if has_rates and not has_state else None,
            n_sample=flags.n_sample, dead_rate=flags.dead_rate,
        )  # fmt: skip
    _write(record, flags.out, flags.source, f"{hook}, {model_name}")
    return record


def _as_trained(activations: HookActivations, source: Path) -> Iterable[Tensor]:
    """The activations at the scale of the trainer that wrote ``source``, where it kept one."""
    path = source / ACTIVATION_SCALER_CFG_FILENAME
    if not path.exists():
        return activations
    scaler = ActivationScaler()
    with _named(path):
        scaler.load(path)
    return _Scaled(activations, scaler)


def _write(record: Autopsy, out: Path, source: str, place: str) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "autopsy.json").write_text(json.dumps(record.to_dict(), allow_nan=False) + "\n")
    (out / "autopsy.md").write_text(f"# Autopsy of {source}\n\n{record.summary()}\n")
    figure = plots.save(autopsy_figure(record, place), out / "autopsy.png")
    print(f"\n{record}\n\nWritten:")
    print("\n".join(f"  {path}" for path in (out / "autopsy.json", out / "autopsy.md", figure)))


COMMAND = Command(
    name="autopsy",
    about=__doc__ or "",
    run=run,
    settings=(AutopsyFlags,),
    resume=lambda flags: "an autopsy keeps nothing on the way, the same command starts again",
)


def main(args: Sequence[str]) -> None:
    COMMAND.main(args)
