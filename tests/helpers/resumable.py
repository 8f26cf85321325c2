"""Work that is killed and goes on: ``python -m tests.helpers.resumable cache|spectrum|sweep FOLDER``.

Each call goes on from what is in the folder, and ends with 0 when all is done. It saves as often as it can, so that
signals come within writes too. ``digest`` tells results apart.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import torch

from tests.helpers import tiny

HOOKS = ["blocks.0.hook_attn_out", "blocks.1.attn.hook_z"]


def cache(folder: Path) -> None:
    from saelens_asi.activations import cache as module

    module._SAVE_SECONDS = 0
    how = {"batch_size": 2, "context_size": 16, "progress": False}
    module.cache_activations(folder, tiny.hooked_transformer(), tiny.tokens(), HOOKS, 4000, **how)


def spectrum(folder: Path) -> None:
    from saelens_asi.spectra import hook_spectra as module

    module._CHECKPOINT_PAUSE = 0
    how = {"batch_size": 2, "checkpoint": folder / "pass.safetensors", "checkpoint_seconds": 0, "progress": False}
    found = module.activation_spectra(tiny.hooked_transformer(), tiny.tokens(), HOOKS, 4000, **how)
    for name, one in found.items():
        one.save(folder / "done" / f"{name}.safetensors")


def sweep(folder: Path) -> None:
    from saelens_asi.sweep import SweepTraining, grid, run_sweep

    x = tiny.activations(600) + 1
    cells = grid({"d_sae": [48], "k": [4], "seed": [0, 1]}, ["stock", "asi_sparse_adam"])
    training = SweepTraining(training_tokens=640, batch_size=32, dead_after_tokens=64)
    run_sweep(cells, training, {HOOKS[0]: (x[:400], x[400:])}, folder, save_saes=True)


def digest(kind: str, folder: Path) -> str:
    """Of the results, without what a clock wrote."""
    whole = hashlib.sha256()
    if kind == "sweep":
        from saelens_asi.resume import load_tensors
        from saelens_asi.sweep import read_sweep

        rows = [{k: v for k, v in row.items() if not k.endswith("seconds")} for row in read_sweep(folder)]
        whole.update(json.dumps(sorted(rows, key=lambda row: (row["method"], row["seed"]))).encode())
        for path in sorted(folder.glob("saes/*/*/sae_weights.safetensors")):
            tensors = sorted(load_tensors(path).items())
            whole.update(str(path.relative_to(folder)).encode())
            whole.update(b"".join(name.encode() + tensor.numpy().tobytes() for name, tensor in tensors))
    elif kind == "spectrum":
        from saelens_asi.resume import load_tensors, tensor_metadata

        for path in sorted(folder.glob("done/*.safetensors")):
            # safetensors writes metadata in an order of its own, another one each time.
            about = json.dumps(tensor_metadata(path), sort_keys=True)
            tensors = sorted(load_tensors(path).items())
            whole.update(path.name.encode() + about.encode())
            whole.update(b"".join(name.encode() + tensor.numpy().tobytes() for name, tensor in tensors))
    else:
        for path in sorted(folder.glob("*.npy")):
            whole.update(path.name.encode() + path.read_bytes())
    return whole.hexdigest()


KINDS = {"cache": cache, "spectrum": spectrum, "sweep": sweep}


def main() -> None:
    torch.set_num_threads(1)
    if len(sys.argv) != 3 or sys.argv[1] not in KINDS:
        raise SystemExit(__doc__)
    print("started", flush=True)
    KINDS[sys.argv[1]](Path(sys.argv[2]))


if __name__ == "__main__":
    main()
