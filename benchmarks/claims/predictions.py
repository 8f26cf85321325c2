"""What the model still predicts with SAEs of the comparison in place of a hook, seed by seed.

    OMP_NUM_THREADS=1 python -m benchmarks.claims.train predictions     # trains them
    python -m benchmarks.claims.predictions

One line an SAE in results/claims/kl.jsonl: cross-entropies and divergences from the model as it is, in nats a token, on
text that nothing was trained on. All that have no line yet share one pass.
"""

from __future__ import annotations

import argparse

from sae_lens import SAE

from benchmarks.claims.plan import items
from benchmarks.claims.records import is_among, keep, read
from benchmarks.claims.train import sae_folder
from saelens_asi import evaluate
from saelens_asi.activations.loading import load_documents, load_model

PART = "kl"
CONTEXT, LOSS_TOKENS = 128, 20_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    done = read(PART)
    missing = [one for one in items(["predictions"]) if not is_among(done, one.key()) and sae_folder(one).exists()]
    saes = {str(i): SAE.load_from_disk(sae_folder(one)) for i, one in enumerate(missing)}
    if not saes:
        print("nothing to do: every SAE that `python -m benchmarks.claims.train predictions` saved has its line")
        return
    first = missing[0]
    _, held_out = load_documents(first.text, first.tokens)
    found = evaluate(
        saes, load_model(first.model), held_out, n_tokens=LOSS_TOKENS, loss_tokens=LOSS_TOKENS, ranks=False,
        context_size=CONTEXT,
    )  # fmt: skip
    for i, one in enumerate(missing):
        losses = found[str(i)].loss.to_dict()
        keep(PART, {**one.key(), **losses})
        print(f"{one.contender}, seed {one.cell.seed}: {losses['kl_recovered']:.2%} of the divergence recovered")


if __name__ == "__main__":
    main()
