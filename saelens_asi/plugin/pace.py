"""Which of two ways to make a step is quicker on an accelerator, found out in the first steps of a run."""

from __future__ import annotations

import json
import logging
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from saelens_asi.plugin.fields import AnyTrainingSAE
from saelens_asi.resume import write_json

logger = logging.getLogger(__name__)

PACE = "pace.json"

# Steps of each way: of the first two, which compile and allocate, the time does not count.
_UNCOUNTED, _COUNTED = 2, 3


def synchronized_clock(device: torch.device) -> float:
    """Seconds, once the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class Pace:
    """Lets the two ways of a step take turns at first, and from then on the quicker one alone.

    On a CPU nothing is measured, and the sparse step is taken: a run and its resume end with the same bits. On an
    accelerator the choice is part of a checkpoint, and so they do from the choice on.

    Attributes:
        sparse_is_quicker: None as long as it is not known.
    """

    def __init__(self, clock: Callable[[torch.device], float] = synchronized_clock) -> None:
        self.sparse_is_quicker: bool | None = None
        self._clock = clock
        self._seconds: dict[bool, list[float]] = {True: [], False: []}

    @contextmanager
    def of_step(self, device: torch.device, other_fits: Callable[[], bool]) -> Iterator[bool]:
        """Within it a step is made: a sparse one where the value is true, and otherwise SAELens's own.

        Args:
            device: of the step.
            other_fits: whether the device has memory for SAELens's own step; asked before the first one.
        """
        if device.type == "cpu" or self.sparse_is_quicker is not None:
            yield self.sparse_is_quicker is not False
            return
        if not self._seconds[True] and not other_fits():
            self.settle()
            yield True
            return
        sparse = len(self._seconds[True]) <= len(self._seconds[False])
        start = self._clock(device)
        yield sparse
        if self.sparse_is_quicker is None:
            self._seconds[sparse].append(self._clock(device) - start)
            self._choose(device)

    def settle(self) -> None:
        """There is nothing to choose: the sparse step is to be taken wherever it can be."""
        self.sparse_is_quicker = True

    def _choose(self, device: torch.device) -> None:
        if len(self._seconds[False]) < _UNCOUNTED + _COUNTED:
            return
        ours, stock = (statistics.median(self._seconds[sparse][_UNCOUNTED:]) for sparse in (True, False))
        self.sparse_is_quicker = ours <= stock
        chosen = "the sparse path" if self.sparse_is_quicker else "SAELens's dense path"
        logger.log(
            logging.INFO if self.sparse_is_quicker else logging.WARNING,
            "training steps take %s: %.4g s a step on the sparse path, %.4g s on SAELens's own (%s)",
            *(chosen, ours, stock, device),
        )

    def save(self, folder: Path) -> None:
        """Write the choice, if there is one."""
        if self.sparse_is_quicker is not None:
            write_json(folder / PACE, {"sparse_is_quicker": self.sparse_is_quicker})

    def load(self, folder: Path) -> None:
        """Take over the choice of a checkpoint, so that a resumed run goes the same way."""
        if (folder / PACE).exists():
            self.sparse_is_quicker = json.loads((folder / PACE).read_text())["sparse_is_quicker"]


def dense_step_fits(sae: AnyTrainingSAE, n_tokens: int) -> bool:
    """Whether a GPU has memory for SAELens's own step: scores of all features several times over, whole gradients."""
    if not torch.cuda.is_available():
        return True
    d_sae, d_in = sae.cfg.d_sae, sae.cfg.d_in
    needed = 4 * (8 * n_tokens * d_sae + 6 * d_sae * d_in)
    free, _ = torch.cuda.mem_get_info(sae.W_dec.device)
    cached = torch.cuda.memory_reserved(sae.W_dec.device) - torch.cuda.memory_allocated(sae.W_dec.device)
    return needed <= free + cached
