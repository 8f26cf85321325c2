"""The activations behind the evidence: of which model, text and hooks, and how many. Read once, kept on disk.

    python -m benchmarks.claims.sources            # cache what is missing (hours on two cores, 40 GB)
    python -m benchmarks.claims.sources --list

Models run in bfloat16, over windows of 128 tokens. The main source is kept in float16; hooks whose activations have
dimensions far larger than the rest are kept in float32.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from saelens_asi.activations.cache import cache_activations
from saelens_asi.activations.loading import load_documents, load_model

CACHE = Path(__file__).parent.parent.parent / "sweep_activations"
# What tables and figures call them.
MODEL_TITLES = {"smollm2": "SmolLM2-135M", "gemma3-270m": "Gemma-3 270M"}
TEXT_TITLES = {"bible": "Bible", "linux-doc": "kernel documentation", "python": "Python's library"}
KINDS = ("attn.hook_z", "hook_attn_out", "hook_mlp_out", "hook_resid_post")


def hooks(layers: Iterable[int], kinds: Iterable[str] = KINDS) -> tuple[str, ...]:
    return tuple(f"blocks.{layer}.{kind}" for layer in layers for kind in kinds)


@dataclass(frozen=True)
class Source:
    """One pass of a model over a text.

    Attributes:
        model: of ``load_model``.
        text: of ``load_documents``.
        hooks: full names.
        n_training: activations of each hook to train on.
        n_held_out: of documents that nothing is trained on.
        dtype: of the files.
    """

    model: str
    text: str
    hooks: tuple[str, ...]
    n_training: int
    n_held_out: int
    dtype: Literal["float32", "float16"] = "float32"

    def folder(self, split: str) -> Path:
        n = self.n_training if split == "training" else self.n_held_out
        layers = "_".join(dict.fromkeys(name.split(".")[1] for name in self.hooks))
        return CACHE / f"{self.model}_{self.text}_{len(self.hooks)}_hooks_{layers}_{n}_{split}"


MAIN_HOOK = {"smollm2": "blocks.15.hook_attn_out", "gemma3-270m": "blocks.9.hook_attn_out"}
# Layers that the rule for d_init was looked for on; it is tested on one layer and one text that were set aside.
LOOKED_AT = {"smollm2": (5, 15, 25), "gemma3-270m": (4, 9, 14)}
SET_ASIDE = {"smollm2": (20,), "gemma3-270m": (12,)}

MAIN = Source("smollm2", "linux-doc", (MAIN_HOOK["smollm2"],), 2_000_000, 200_000, "float16")
# What is trained longer: its first half is the main source's.
LONGER = replace(MAIN, n_training=4_000_000)
OTHERS = (
    Source("gemma3-270m", "linux-doc", (MAIN_HOOK["gemma3-270m"],), 500_000, 100_000, "float16"),
    Source("smollm2", "python", (MAIN_HOOK["smollm2"],), 500_000, 100_000, "float16"),
)
BY_HOOK = tuple(Source(model, "linux-doc", hooks(layers), 300_000, 60_000) for model, layers in LOOKED_AT.items())
BY_HOOK_ASIDE = tuple(Source(model, "python", hooks(layers), 300_000, 60_000) for model, layers in SET_ASIDE.items())
SOURCES = (MAIN, LONGER, *BY_HOOK, *OTHERS, *BY_HOOK_ASIDE)


def activations(source: Source, hook: str) -> tuple[Tensor, Tensor]:
    """(n, width) activations to train and to evaluate on, from the disk, or from the model where they are not there."""
    model = functools.cache(lambda: load_model(source.model, dtype=torch.bfloat16))
    texts = functools.cache(lambda: load_documents(source.text, source.n_training))
    splits = []
    for i, split in enumerate(("training", "held_out")):
        found = cache_activations(
            source.folder(split),
            model,
            functools.partial(lambda i: texts()[i], i),
            source.hooks,
            (source.n_training, source.n_held_out)[i],
            context_size=128,
            dtype=source.dtype,
            verify=False,
        )
        splits.append(found[hook])
    return splits[0], splits[1]


def find(model: str, text: str, hook: str, n_tokens: int = 1) -> Source:
    """The smallest source that holds so many activations of a hook, or the largest. Raises ValueError for none."""
    found = [s for s in SOURCES if (s.model, s.text) == (model, text) and hook in s.hooks]
    if not found:
        raise ValueError(f"no source holds activations of {hook} of {model} on {text}")
    enough = [source for source in found if source.n_training >= n_tokens]
    return min(enough or found, key=lambda source: source.n_training if enough else -source.n_training)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="name them and run nothing")
    args = parser.parse_args()
    for source in SOURCES:
        print(
            f"{source.model} on {source.text}: {', '.join(source.hooks)}; {source.n_training:,} activations", flush=True
        )
        if not args.list:
            activations(source, source.hooks[0])


if __name__ == "__main__":
    main()
