"""Lorsas on disk: safetensors with a JSON config and provenance; read back for the same config only."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from saelens_asi.initialization import package_version
from saelens_asi.lorsa.config import LorsaConfig
from saelens_asi.lorsa.model import Lorsa
from saelens_asi.resume import load_tensors, save_tensors, write_json

FILE_FORMAT = "saelens_asi.lorsa.v1"
WEIGHTS, CONFIG = "lorsa_weights.safetensors", "lorsa.json"

LLAMASCOPIUM_WEIGHTS, LLAMASCOPIUM_CONFIG = "sae_weights.safetensors", "config.json"


def save_lorsa(lorsa: Lorsa, folder: str | Path) -> Path:
    """Write ``lorsa_weights.safetensors`` and ``lorsa.json`` (config and provenance); returns the folder."""
    folder = Path(folder)
    record = {
        "format": FILE_FORMAT,
        "saelens_asi_version": package_version(),
        "config": lorsa.cfg.to_dict(),
        "provenance": lorsa.provenance,
    }
    json.dumps(record, allow_nan=False)  # what cannot be written is refused before a file changes
    save_tensors(folder / WEIGHTS, lorsa.state_dict(), metadata={"format": FILE_FORMAT})
    write_json(folder / CONFIG, record, indent=2)
    return folder


def load_lorsa(folder: str | Path, device: str | torch.device = "cpu") -> Lorsa:
    """Read a folder that ``save_lorsa`` wrote. Raises ValueError when it holds something else."""
    folder = Path(folder)
    if not (folder / CONFIG).exists():
        other = " (it looks like a llamascopium folder: use import_llamascopium)" if _is_llamascopium(folder) else ""
        raise ValueError(f"{folder} holds no {CONFIG}{other}")
    record = json.loads((folder / CONFIG).read_text())
    if record.get("format") != FILE_FORMAT:
        raise ValueError(f"{folder / CONFIG} has format {record.get('format')!r}, expected {FILE_FORMAT!r}")
    lorsa = Lorsa(LorsaConfig.from_dict(record["config"]))
    tensors = load_tensors(folder / WEIGHTS)
    check_shapes(lorsa, tensors, folder / WEIGHTS)
    lorsa.load_state_dict(tensors)
    lorsa.provenance = record["provenance"]
    return lorsa.to(device).eval()


def _is_llamascopium(folder: Path) -> bool:
    return (folder / LLAMASCOPIUM_CONFIG).exists() and (folder / LLAMASCOPIUM_WEIGHTS).exists()


def check_shapes(lorsa: Lorsa, tensors: dict[str, Tensor], path: Path) -> None:
    """Raise ValueError unless ``tensors``, read from ``path``, have the names and shapes of the Lorsa's state."""
    expected = {name: tuple(tensor.shape) for name, tensor in lorsa.state_dict().items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if shapes != expected:
        names = sorted(name for name in expected.keys() | shapes.keys() if expected.get(name) != shapes.get(name))
        described = "; ".join(f"{name}: {shapes.get(name)} instead of {expected.get(name)}" for name in names)
        raise ValueError(f"{path} does not fit its config: {described}")
