"""Lorsas on disk: safetensors with a JSON config and provenance; read back for the same config only."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from saelens_asi.initialization import package_version
from saelens_asi.lorsa.config import LorsaConfig
from saelens_asi.lorsa.llamascopium import is_llamascopium
from saelens_asi.lorsa.model import Lorsa
from saelens_asi.resume import load_tensors, save_tensors, write_json

FILE_FORMAT = "saelens_asi.lorsa.v1"
WEIGHTS, CONFIG = "lorsa_weights.safetensors", "lorsa.json"


def save_lorsa(lorsa: Lorsa, folder: str | Path) -> Path:
    """Write ``lorsa_weights.safetensors`` and ``lorsa.json`` (config and provenance); returns the folder.

    Each file is written whole. Raises ValueError for a provenance that strict JSON has no word for.
    """
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
    """Read a folder that ``save_lorsa`` wrote, for evaluation, into memory of torch's own.

    Raises:
        ValueError: for a folder that holds something else, or weights that do not fit their config.
    """
    folder = Path(folder)
    if not (folder / CONFIG).exists():
        other = " (it looks like a llamascopium folder: use import_llamascopium)" if is_llamascopium(folder) else ""
        raise ValueError(f"{folder} holds no {CONFIG}{other}")
    record = json.loads((folder / CONFIG).read_text())
    if record.get("format") != FILE_FORMAT:
        raise ValueError(f"{folder / CONFIG} has format {record.get('format')!r}, expected {FILE_FORMAT!r}")
    lorsa = Lorsa(LorsaConfig.from_dict(record["config"]))
    lorsa.load_weights_(load_tensors(folder / WEIGHTS), folder / WEIGHTS)
    lorsa.provenance = record["provenance"]
    return lorsa.to(device).eval()
