"""Lorsas on disk: safetensors with a JSON config and provenance; read back for the same config only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from saelens_asi.activations.fingerprint import sealed, unsealed
from saelens_asi.initialization import package_version
from saelens_asi.lorsa.config import LorsaConfig, read_json_object
from saelens_asi.lorsa.llamascopium import is_llamascopium
from saelens_asi.lorsa.model import Lorsa
from saelens_asi.resume import checksum, load_tensors, save_tensors, write_json, written_whole
from saelens_asi.sparse.finite import all_finite

FILE_FORMAT = "saelens_asi.lorsa.v1"
WEIGHTS, CONFIG = "lorsa_weights.safetensors", "lorsa.json"


def save_lorsa(lorsa: Lorsa, folder: str | Path) -> Path:
    """Write ``lorsa_weights.safetensors`` and ``lorsa.json`` (config and provenance); returns the folder.

    Both are written before either takes its place: a disk that is full leaves what was there.

    Raises:
        ValueError: for weights that are not finite, or a provenance that strict JSON has no word for.
    """
    folder = Path(folder)
    tensors = lorsa.state_dict()
    not_finite = sorted(name for name, tensor in tensors.items() if not all_finite([tensor]))
    if not_finite:
        raise ValueError(f"{folder} is not written: {not_finite} of this Lorsa hold numbers that are not finite")
    record = {
        "format": FILE_FORMAT,
        "saelens_asi_version": package_version(),
        "config": lorsa.cfg.to_dict(),
        "provenance": lorsa.provenance,
    }
    json.dumps(record, allow_nan=False)  # what cannot be written is refused before a file changes
    with written_whole(folder / WEIGHTS) as weights, written_whole(folder / CONFIG) as config:
        save_tensors(weights, tensors, metadata={"format": FILE_FORMAT})
        write_json(config, sealed({**record, "weights_xxh3_128": checksum(weights)}), indent=2)
    return folder


def load_lorsa(folder: str | Path, device: str | torch.device = "cpu") -> Lorsa:
    """Read a folder that ``save_lorsa`` wrote, for evaluation, into memory of torch's own.

    Raises:
        ValueError: for a folder that holds something else, files that are damaged or from two different saves, and
            weights that do not fit their config or are not finite.
    """
    folder = Path(folder)
    if not (folder / CONFIG).exists():
        other = " (it looks like a llamascopium folder: use import_llamascopium)" if is_llamascopium(folder) else ""
        raise ValueError(f"{folder} holds no {CONFIG}{other}")
    record = _read_record(folder / CONFIG)
    if record.get("format") != FILE_FORMAT:
        raise ValueError(f"{folder / CONFIG} has format {record.get('format')!r}, expected {FILE_FORMAT!r}")
    config, provenance = record.get("config"), record.get("provenance")
    if not isinstance(config, dict) or not isinstance(provenance, dict):
        raise ValueError(f"{folder / CONFIG} holds no config and provenance of a Lorsa")
    try:
        lorsa = Lorsa(LorsaConfig.from_dict(config))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder / CONFIG} does not describe a Lorsa: {error}") from None
    if not (folder / WEIGHTS).is_file():
        raise ValueError(f"{folder} holds no file {WEIGHTS}")
    expected = record.get("weights_xxh3_128")  # earlier versions wrote none
    if expected is not None and checksum(folder / WEIGHTS) != expected:
        raise ValueError(f"{folder / WEIGHTS} is damaged, or was not saved with its {CONFIG}: the checksum differs")
    lorsa.load_weights_(load_tensors(folder / WEIGHTS), folder / WEIGHTS)
    lorsa.provenance = provenance
    return lorsa.to(device).eval()


def _read_record(path: Path) -> dict[str, Any]:
    values = read_json_object(path)
    try:
        return unsealed(values)
    except ValueError as error:
        raise ValueError(f"{path} is damaged, or was edited: {error}") from None
