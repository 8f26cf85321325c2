"""What a training run holds, on the way and on the disk: arithmetic, with two constants that were measured.

Everything is in bytes, of float32 weights. A test compares it with the peaks of real runs.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass

from saelens_asi.initialization.norm import MAX_DENSE_VALUES, NORM_SAMPLE

FLOAT, GIB = 4, 2**30

# Of a process that has imported torch and SAELens and compiled the kernels, before it holds anything.
PROCESS = int(0.665 * GIB)

# Scores of a step that are held at a time, candidates among them, and the allocator's leftovers.
SCRATCH = int(0.10 * GIB)

# Of SAELens's own step: (batch x d_sae) matrices at its peak (benchmarks/results/train_step_smollm2_32768_cpu.json).
_STOCK_MATRICES = 7


@dataclass(frozen=True)
class Memory:
    """The peak of a run, in parts, and its files; bytes.

    Attributes:
        process: interpreter, torch, SAELens, compiled kernels.
        weights: of the SAE.
        moments: two of each weight.
        gradients: of the rows that fire in a batch; of all rows for SAELens's own step.
        screens: approximate copies of the encoder, where steps are screened.
        scratch: scores and candidates of a step, or of the initialization where that is more.
        store: activations that wait to be trained on, and those of the language model's batch.
        model: weights of the language model.
        checkpoint: files of one checkpoint: weights and moments.
        sae: files of the finished SAE.
    """

    process: int
    weights: int
    moments: int
    gradients: int
    screens: int
    scratch: int
    store: int
    model: int
    checkpoint: int
    sae: int

    @property
    def peak(self) -> int:
        """Of the process, with everything in one memory."""
        parts = (self.process, self.weights, self.moments, self.gradients, self.screens, self.scratch)
        return sum(parts) + self.store + self.model

    @property
    def disk(self) -> int:
        """Two checkpoints, of which the older goes when the newer is whole, and the SAE."""
        return 2 * self.checkpoint + self.sae

    def to_dict(self) -> dict[str, int]:
        return {**asdict(self), "peak": self.peak, "disk": self.disk}


def weight_bytes(d_in: int, d_sae: int) -> int:
    """Encoder, decoder and their biases."""
    return FLOAT * (2 * d_in * d_sae + d_sae + d_in)


def store_bytes(d_in: int, batch: int, context_size: int = 128, prompts: int = 32) -> int:
    """SAELens's buffer, half of which stays: as large as a batch at least, and twice while it is mixed."""
    return 3 * FLOAT * d_in * max(2 * batch, prompts * context_size)


def run_memory(
    d_in: int,
    d_sae: int,
    k: int,
    batch: int,
    *,
    store: int = 0,
    model: int = 0,
    stock: bool = False,
    screened: bool = True,
) -> Memory:
    """Memory of a run of the TopK family with ``optimizer="sparse_adam"``, or of SAELens's own step.

    Args:
        d_in: width of the activations.
        d_sae: features.
        k: active on a token.
        batch: tokens in a step.
        store: bytes of the activations that wait, see ``store_bytes``.
        model: bytes of the language model.
        stock: SAELens's own step with Adam.
        screened: whether compiled kernels screen the scores (on a CPU, with numba).
    """
    weights = weight_bytes(d_in, d_sae)
    rows = d_sae if stock else min(d_sae, batch * k)
    entries = batch * k * 8 * 8  # features, tokens, scores and their orders
    dense = min(MAX_DENSE_VALUES, NORM_SAMPLE * d_sae) * FLOAT
    at_start = 2 * dense - 2 * weights  # the moments come later
    scratch = max(SCRATCH + entries, at_start)
    if stock:
        scratch = _STOCK_MATRICES * FLOAT * batch * d_sae
    return Memory(
        process=PROCESS,
        weights=weights,
        moments=2 * weights,
        gradients=2 * FLOAT * d_in * rows,
        screens=d_in * d_sae + 4 * FLOAT * d_sae if screened and not stock else 0,
        scratch=scratch,
        store=store,
        model=model,
        checkpoint=3 * weights,
        sae=weights,
    )


_UNITS = {
    "B": 1,
    **{f"{prefix}IB": 2 ** (10 * power) for power, prefix in enumerate("KMGT", 1)},
    **{f"{prefix}B": 10 ** (3 * power) for power, prefix in enumerate("KMGT", 1)},
}


def parse_bytes(text: str | int | float) -> int:
    """Bytes of ``"24GiB"``, ``"24 GB"``, or a number of bytes. Raises ValueError for anything else."""
    if isinstance(text, int | float) and not isinstance(text, bool):
        amount, unit = float(text), "B"
    else:
        found = re.fullmatch(r"\s*([\d.]+)\s*([a-zA-Z]*)\s*", str(text))
        amount, unit = (float(found[1]), (found[2] or "B").upper()) if found and found[1].count(".") < 2 else (0.0, "")
        unit = {"G": "GIB", "M": "MIB", "K": "KIB", "T": "TIB"}.get(unit, unit)
    if unit not in _UNITS or amount <= 0:
        raise ValueError(f"memory={text!r} is no amount of memory: give bytes, or a text such as '24GiB'")
    return int(amount * _UNITS[unit])
