"""Spectra of both model families on three kinds of text: every layer's attention, MLP and residual stream.

    OMP_NUM_THREADS=1 python -m benchmarks.claims.universality            # half an hour on one core
    OMP_NUM_THREADS=1 python -m benchmarks.claims.universality --list

One pass a model and text, which goes on where it stopped; what stays is one line a hook in
results/claims/universality.jsonl. Models run in bfloat16, over windows of 256 tokens, BOS left out.

In Gemma-3 a norm with weights follows the output of attention and of the MLP, before it is added to the residual
stream: ``hook_attn_out`` is behind it, as SAEs read it, and ``attn.hook_out``, which W_O writes, before it.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.claims.records import is_among, keep, read, taken
from benchmarks.claims.sources import CACHE, KINDS
from saelens_asi.activations.hooks import HookedModel, resolve_hook_names
from saelens_asi.activations.loading import load_documents, load_model
from saelens_asi.spectra.findings import table_rows
from saelens_asi.spectra.hook_spectra import activation_spectra
from saelens_asi.spectra.spectrum import Spectrum

PART = "universality"
N_TOKENS, CONTEXT, BATCH = 20_000, 256, 8
SHIFT_EVERY = 9
MODELS, TEXTS = ("smollm2", "gemma3-270m"), ("bible", "linux-doc", "python")
# Of models with a norm behind attention and MLP: what is before it, and how the page calls it.
BEFORE_NORM = {"attn.hook_out": "attn_out before the norm", "mlp.hook_out": "mlp_out before the norm"}


@dataclass(frozen=True)
class Pass:
    """One model over one text."""

    model: str
    text: str

    @property
    def key(self) -> dict[str, Any]:
        return {"model": self.model, "text": self.text, "n_tokens": N_TOKENS, "context": CONTEXT, "dtype": "bfloat16"}

    @property
    def checkpoint(self) -> Path:
        return CACHE / PART / f"{self.model}_{self.text}_{N_TOKENS}.safetensors"

    @property
    def is_done(self) -> bool:
        """Whether a line of every hook is there, from as many tokens at least: the last to be written tells."""
        place = {"model": self.model, "text": self.text, "last": True}
        return any(is_among([row], place) and row["n_tokens"] >= N_TOKENS for row in read(PART))


# In turn, so that the first three of them hold both models and all texts.
PASSES = tuple(Pass(MODELS[i % 2], TEXTS[i % 3]) for i in range(1, 7))


def hook_names(model: HookedModel) -> list[str]:
    """The four kinds at every layer; where a norm follows attention and MLP, what is before it too."""
    names = {f"blocks.{layer}.{kind}": None for layer in range(model.cfg.n_layers) for kind in KINDS}
    resolve_hook_names(names, model.hook_dict)  # or a misspelt one would be found late
    for layer in range(model.cfg.n_layers):
        for kind, behind in zip(BEFORE_NORM, ("hook_attn_out", "hook_mlp_out"), strict=True):
            before = f"blocks.{layer}.{kind}"
            if model.hook_dict.get(before) not in (None, model.hook_dict[f"blocks.{layer}.{behind}"]):
                names[before] = None
    return list(names)


def measure(one: Pass, model: HookedModel) -> dict[str, Spectrum]:
    """Spectra of all hooks; an interrupted pass goes on from its checkpoint."""
    training, _ = load_documents(one.text, N_TOKENS)
    one.checkpoint.parent.mkdir(parents=True, exist_ok=True)
    return activation_spectra(
        model, training, hook_names(model), N_TOKENS, batch_size=BATCH, context_size=CONTEXT, checkpoint=one.checkpoint,
        checkpoint_seconds=120,
    )  # fmt: skip


def write(one: Pass, spectra: Mapping[str, Spectrum]) -> None:
    """A line for each hook that has none.

    ``effective_rank_shift`` says what the sample's size does to the rank; it costs more than the pass, and so stands at
    some layers alone.
    """
    done = read(PART)
    rows = table_rows(spectra)
    for row in rows:
        key = {**one.key, "hook": row["hook"]}
        if not is_among(done, key):
            kind = BEFORE_NORM.get(row["hook"].split(".", 2)[2], row["kind"])
            shift = None if row["layer"] % SHIFT_EVERY else spectra[row["hook"]].effective_rank_shift
            keep(PART, {**row, **key, "kind": kind, "effective_rank_shift": shift, "last": row is rows[-1]})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="name the passes that are missing and run none")
    args = parser.parse_args()
    torch.set_num_threads(1)
    load = functools.cache(lambda name: load_model(name, dtype=torch.bfloat16))
    for one in PASSES:
        with taken({**one.key, "part": PART}) as mine:
            if not mine or one.is_done:
                continue
            print(f"{one.model} on {one.text}", flush=True)
            if not args.list:
                write(one, measure(one, load(one.model)))
                one.checkpoint.unlink()


if __name__ == "__main__":
    main()
