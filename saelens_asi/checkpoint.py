"""The state of an interrupted pass over activations, in one file that is replaced as a whole."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file

from saelens_asi.moments import RunningMoments

FILE_FORMAT = "saelens_asi.pass.v1"


def save_pass(path: Path, moments: Mapping[str, RunningMoments], settings: Mapping[str, Any], place: Any) -> None:
    """Write moments, settings and place (plain values); a reader sees the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, running in moments.items():
        tensors[f"{name}/mean"] = running.mean.cpu().contiguous()
        tensors[f"{name}/scatter"] = running.scatter.cpu().contiguous()
    counts = {name: running.n_tokens for name, running in moments.items()}
    state = json.dumps({"settings": settings, "place": place, "n_tokens": counts})
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        save_file(tensors, unfinished, metadata={"format": FILE_FORMAT, "state": state})
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def load_pass(path: Path, settings: Mapping[str, Any]) -> tuple[dict[str, RunningMoments], Any]:
    """Moments and place of a pass with these settings.

    Raises:
        ValueError: for a file of something else, or of a pass with other settings.
    """
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        if metadata.get("format") != FILE_FORMAT:
            raise ValueError(f"{path} is not the checkpoint of a pass over activations: give another path")
        state = json.loads(metadata["state"])
        saved = state["settings"]
        now = json.loads(json.dumps(settings))
        other = sorted(key for key in saved.keys() | now.keys() if saved.get(key) != now.get(key))
        if other:
            differences = "; ".join(f"{key} was {saved.get(key)!r} and is {now.get(key)!r}" for key in other)
            raise ValueError(f"{path} belongs to a pass with other settings ({differences}): use those, or delete it")
        # A file's memory is not aligned as torch's is: what is added to it differs in the last bit on some processors.
        return {
            name: RunningMoments(n, file.get_tensor(f"{name}/mean").clone(), file.get_tensor(f"{name}/scatter").clone())
            for name, n in state["n_tokens"].items()
        }, state["place"]
