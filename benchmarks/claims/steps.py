"""What a step costs at the sizes of the claims: SAELens's TopK and AuxK at d_sae and twice that, against ours at d_sae.

    python -m benchmarks.claims.steps [--d-sae 65536] [--rounds 5]

Every contender does one step in turn; medians go to results/claims/steps.json. For AuxK half of the features are dead.
"""

from __future__ import annotations

import argparse
import json
import time
from statistics import median
from typing import Any

import torch
from sae_lens import SAETrainer, TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from tqdm.auto import tqdm

from benchmarks.claims.evidence import RESULTS
from saelens_asi import ActiveSubspaceInit

D_IN, K, BATCH = 576, 32, 1024


def trainer(d_sae: int, aux: float, x: torch.Tensor, **flags: Any) -> SAETrainer:
    """A trainer after its initialization, if it has one, with every second feature dead where there is an aux loss."""
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=D_IN, d_sae=d_sae, k=K, aux_loss_coefficient=aux, **flags))
    config = SAETrainerConfig(total_training_samples=BATCH, train_batch_size_samples=BATCH, lr=1e-3, lr_end=1e-4)
    made = SAETrainer(config, sae, iter(x.split(BATCH)))
    if flags:
        made._initialize_if_pending()
    if aux:
        made.n_forward_passes_since_fired[::2] = 10_000
    return made


def measure(d_sae: int, rounds: int) -> dict[str, float]:
    """Seconds a step of each contender."""
    torch.manual_seed(0)
    x = torch.randn(8 * BATCH, 280) @ torch.randn(280, D_IN) / 280**0.5  # of the rank that attention outputs have
    start = {"initializer": ActiveSubspaceInit(n_tokens=4 * BATCH), "optimizer": "sparse_adam"}
    contenders = {
        f"{name} {size}": trainer(size, aux, x)
        for size in (d_sae, 2 * d_sae)
        for name, aux in (("topk", 0.0), ("auxk", 1 / 32))
    }
    contenders[f"asi_sparse_adam {d_sae}"] = trainer(d_sae, 0.0, x, **start)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    batches = x.split(BATCH)
    for i in tqdm(range(rounds + 1), desc="Rounds"):
        for name, one in contenders.items():
            begin = time.perf_counter()
            one._train_step(sae=one.sae, sae_in=batches[i % len(batches)])
            seconds[name].append(time.perf_counter() - begin)
    return {name: median(values[1:]) for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d-sae", type=int, default=65_536)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    found = {name: round(value, 4) for name, value in measure(args.d_sae, args.rounds).items()}
    path = RESULTS / "claims" / "steps.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"batch": BATCH, "threads": torch.get_num_threads(), "seconds": found}, indent=1) + "\n")
    print("\n".join(f"{name}: {value:.3f} s" for name, value in found.items()), f"\nwritten: {path}", sep="\n")


if __name__ == "__main__":
    main()
