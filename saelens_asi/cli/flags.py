"""Flags that several commands have, each declared once, and what they stand for: models, text, hooks, devices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import simple_parsing
import torch
from datasets import Dataset

from saelens_asi.activations.hooks import layer_hooks, parse_layers
from saelens_asi.activations.loading import EMBEDDED_DATASET, EMBEDDED_MODEL, load_documents, load_model
from saelens_asi.plugin.preflight import device_problem

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class _Checked:
    """The end of the chain of checks."""

    def __post_init__(self) -> None: ...


@dataclass(frozen=True, kw_only=True)
class OutFlag(_Checked):
    """Where to.

    Attributes:
        out: folder for everything that is written.
    """

    out: Path

    def __post_init__(self) -> None:
        super().__post_init__()
        check_folder(self.out)


@dataclass(frozen=True, kw_only=True)
class DeviceFlag(_Checked):
    """Where it runs.

    Attributes:
        device: where the model runs, and what reads its activations: cpu, cuda, cuda:1, mps.
    """

    device: str = "cpu"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_device(self.device)


@dataclass(frozen=True, kw_only=True)
class SourceFlags:
    """Model and text.

    Attributes:
        model: name on the hub, local folder, or smollm2 or gemma3-270m.
        dataset: of text or tokens: name on the hub, local folder, or bible, linux-doc or python.
        context_size: tokens in a window.
    """

    model: str = EMBEDDED_MODEL
    dataset: str = EMBEDDED_DATASET
    context_size: int = 128


@dataclass(frozen=True, kw_only=True)
class OwnSourceFlags:
    """Model and text, by default those that an SAE names.

    Attributes:
        model: name on the hub, local folder, smollm2 or gemma3-270m; without it, what the SAE was trained on, or
            smollm2.
        dataset: of text or tokens: name on the hub, local folder, bible, linux-doc or python; without it, that of the
            SAE, or bible.
        context_size: tokens in a window; without it, as the SAE was trained, or 256.
    """

    model: str | None = None
    dataset: str | None = None
    context_size: int | None = None


@dataclass(frozen=True, kw_only=True)
class HookFlags:
    """Which activations.

    Attributes:
        hooks: where activations are read: attn_out, mlp_out, resid_pre, resid_mid, resid_post, hook_z in --layers, or
            full names such as blocks.0.hook_attn_out.
        layers: of the short names: numbers, ranges such as 10-15, all, or middle.
    """

    hooks: tuple[str, ...] = ("attn_out",)
    layers: tuple[str, ...] = ("middle",)


@dataclass(frozen=True, kw_only=True)
class PassFlags:
    """How much text, and how it is read.

    Attributes:
        n_tokens: activations read of each hook, and, of an SAE, the number by which dead features are counted.
        batch_size: windows in a forward pass.
    """

    n_tokens: int = 1_000_000
    batch_size: int = 8


@dataclass(frozen=True, kw_only=True)
class DtypeFlag:
    """Precision of the model.

    Attributes:
        dtype: of the model.
    """

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"


@dataclass(frozen=True, kw_only=True)
class SpecialTokensFlag:
    """Tokens that are none of the text's.

    Attributes:
        keep_special_tokens: count BOS, EOS and padding too.
    """

    keep_special_tokens: bool = simple_parsing.field(default=False, action="store_true")


@dataclass(frozen=True, kw_only=True)
class HeldOutFlag:
    """Text to evaluate on.

    Attributes:
        held_out_tokens: of text that nothing is trained on, to evaluate on.
    """

    held_out_tokens: int = 40_000


@dataclass(frozen=True, kw_only=True)
class LossFlag:
    """Text to compare predictions on.

    Attributes:
        loss_tokens: in whole windows, on which the model's predictions are compared; 0 leaves it out.
    """

    loss_tokens: int = 4096


def check_folder(out: Path) -> None:
    """Raise ValueError where a file is in the way, before anything is measured."""
    for path in (out, *out.parents):
        if path.exists():
            if not path.is_dir():
                raise ValueError(f"--out {str(out)!r}: {str(path)!r} is a file, give a folder")
            return


def check_device(device: str) -> None:
    """Raise ValueError for a device that torch does not know, or that is not here."""
    problem = device_problem(device)
    if problem is not None:
        raise ValueError(f"--device {device!r} cannot be used: {problem}")


def layer_numbers(layers: Sequence[str], n_layers: int) -> list[int]:
    """Layers of ``--layers``, sorted. Raises ValueError for one that is not there."""
    return parse_layers([str(n_layers // 2)] if list(layers) == ["middle"] else layers, n_layers)


def hook_names(hooks: Sequence[str], layers: Sequence[str], n_layers: Callable[[], int]) -> list[str]:
    """Full names of ``--hooks`` in ``--layers``; ``n_layers`` of the model is asked for only where a name is short."""
    if all("." in hook for hook in hooks):
        return list(hooks)
    return layer_hooks(hooks, layer_numbers(layers, n_layers()))


def one_hook(hooks: Sequence[str], layers: Sequence[str], n_layers: Callable[[], int]) -> str:
    """The full name of the one hook that a command reads. Raises ValueError for several."""
    names = hook_names(hooks, layers, n_layers)
    if len(names) != 1 or "*" in names[0]:
        raise ValueError(f"--hooks {' '.join(hooks)} names {', '.join(names)}: this command reads one hook, name one")
    return names[0]


def open_model(name: str, device: str, dtype: torch.dtype = torch.float32) -> Any:
    """The model of ``--model``, as ``load_model`` makes it. Raises ValueError, with the name, where there is none."""
    try:
        return load_model(name, device, dtype)
    except (OSError, ValueError) as error:
        raise ValueError(f"--model {name!r} cannot be loaded: {error}") from error


def open_text(name: str, n_tokens: int, **columns: tuple[str, ...]) -> tuple[Dataset, Dataset]:
    """Training and held-out documents of ``--dataset``, as ``load_documents`` cuts them.

    Raises:
        ValueError: with the name, where there is no such dataset.
    """
    try:
        return load_documents(name, n_tokens, **columns)
    except OSError as error:
        raise ValueError(f"--dataset {name!r} cannot be loaded: {error}") from error
