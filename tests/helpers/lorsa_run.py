"""A run of a Lorsa on a tiny GPT-2 with dropout, to be killed at any moment.

    python -m tests.helpers.lorsa_run FOLDER

goes on from what FOLDER holds, and ends with code 0 when the run is finished. ``outcome`` tells what it ended with.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from saelens_asi.lorsa import (
    Lorsa,
    LorsaInit,
    LorsaTraining,
    ModelSequences,
    batches,
    initialize_lorsa_,
    read_attention,
    read_history,
    train_lorsa,
)
from saelens_asi.lorsa.checkpoints import last_checkpoint
from tests.helpers import tiny_attention

LAYER, STEPS = 1, 300


def run(folder: Path) -> None:
    """Train, or go on, until the run is finished."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        model: Any = tiny_attention.bridged("gpt2", Path(place))
    lorsa = Lorsa.from_attention(model, LAYER, n_ov_heads=64, k=4, activation="batch_topk")
    data = ModelSequences(model, LAYER, tiny_attention.tokens(64))
    start = LorsaInit(d_init=4, n_tokens=64 * (tiny_attention.N_CTX - 1))
    initialize_lorsa_(lorsa, read_attention(model, LAYER), batches(data, 8), start)
    model.train()  # its dropout draws from torch's global generator
    torch.manual_seed(3)
    settings = LorsaTraining(
        steps=STEPS, lr=1e-3, log_every=5, checkpoint_every=10, k_start=12, k_warm_up_steps=200, dead_after=2000
    )
    train_lorsa(lorsa, data, settings, out=folder, resume=True, progress=False)


def outcome(folder: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """Weights, moments, counts of silent positions and generators of a finished run; its history without seconds."""
    last = last_checkpoint(folder)
    if last is None or last.name != f"step_{STEPS:08d}":
        raise ValueError(f"the run in {folder} is not finished")
    tensors = {**load_file(last / "run.safetensors"), **load_file(folder / "lorsa_weights.safetensors")}
    return tensors, [{name: value for name, value in r.items() if name != "seconds"} for r in read_history(folder)]


def digest(folder: Path) -> str:
    """Of the outcome: equal for equal bits."""
    tensors, history = outcome(folder)
    whole = hashlib.sha256(json.dumps(history).encode())
    for name, tensor in sorted(tensors.items()):
        whole.update(name.encode() + tensor.numpy().tobytes())
    return whole.hexdigest()


if __name__ == "__main__":
    run(Path(sys.argv[1]))
