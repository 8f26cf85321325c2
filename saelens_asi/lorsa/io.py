"""Lorsas on disk: safetensors with a JSON config and provenance; read back for the same config only."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from saelens_asi.initialization import package_version
from saelens_asi.lorsa.config import LorsaConfig
from saelens_asi.lorsa.model import Lorsa

FILE_FORMAT = "saelens_asi.lorsa.v1"
WEIGHTS, CONFIG = "lorsa_weights.safetensors", "lorsa.json"

_THEIR_WEIGHTS, _THEIR_CONFIG = "sae_weights.safetensors", "config.json"


def save_lorsa(lorsa: Lorsa, folder: str | Path) -> Path:
    """Write ``lorsa_weights.safetensors`` and ``lorsa.json`` (config and provenance); returns the folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "format": FILE_FORMAT,
        "saelens_asi_version": package_version(),
        "config": lorsa.cfg.to_dict(),
        "provenance": lorsa.provenance,
    }
    text = json.dumps(record, indent=2, allow_nan=False)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in lorsa.state_dict().items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": FILE_FORMAT})
    (folder / CONFIG).write_text(text + "\n")
    return folder


def load_lorsa(folder: str | Path, device: str | torch.device = "cpu") -> Lorsa:
    """Read a folder that ``save_lorsa`` wrote. Raises ValueError when it holds something else."""
    folder = Path(folder)
    if not (folder / CONFIG).exists():
        other = " (it looks like a llamascopium folder: use import_llamascopium)" if _is_theirs(folder) else ""
        raise ValueError(f"{folder} holds no {CONFIG}{other}")
    record = json.loads((folder / CONFIG).read_text())
    if record.get("format") != FILE_FORMAT:
        raise ValueError(f"{folder / CONFIG} has format {record.get('format')!r}, expected {FILE_FORMAT!r}")
    lorsa = Lorsa(LorsaConfig.from_dict(record["config"]))
    tensors = load_file(folder / WEIGHTS)
    _check_shapes(lorsa, tensors, folder / WEIGHTS)
    lorsa.load_state_dict(tensors)
    lorsa.provenance = record["provenance"]
    return lorsa.to(device).eval()


def _is_theirs(folder: Path) -> bool:
    return (folder / _THEIR_CONFIG).exists() and (folder / _THEIR_WEIGHTS).exists()


def _check_shapes(lorsa: Lorsa, tensors: dict[str, Tensor], path: Path) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in lorsa.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != expected:
        names = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        described = "; ".join(f"{name}: {found.get(name)} instead of {expected.get(name)}" for name in names)
        raise ValueError(f"{path} does not fit its config: {described}")
