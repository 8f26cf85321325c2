"""Operators of torch with two implementations: a kernel of Triton's on a GPU, and torch's operations elsewhere.

The second is a function, the twin of the kernel of its name, and stands where the operator is declared. Both give the
same results up to the rounding of sums. A twin reads no number back, so it also says which shapes come out.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Sequence
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

_Result = TypeVar("_Result")


class Operator(NamedTuple):
    """What stands behind a name in ``torch.ops.saelens_asi``: the twin, and how many kernels a call starts on a GPU."""

    twin: Callable[..., Any]
    n_launches: Callable[..., int]


OPERATORS: dict[str, Operator] = {}
"""All operators by name."""


@cache
def load_triton_kernels() -> ModuleType | None:
    """Triton's kernels; None without a Triton that works."""
    if importlib.util.find_spec("triton") is None:
        return None
    try:
        kernels = importlib.import_module("saelens_asi.sparse.triton_kernels")
        if torch.cuda.is_available():  # Triton asks for a compiler of C when the first kernel is started
            kernels.note_(*(torch.zeros(n, dtype=torch.int64, device="cuda") for n in (2, (), 1)))
        return kernels
    except Exception as error:
        logger.warning("Triton cannot be used (%s): training steps take torch's operations", error)
        return None


def kernels_for(tensor: Tensor) -> ModuleType | None:
    """What works on a tensor and those beside it: kernels on a GPU, and otherwise the twins."""
    return load_triton_kernels() if tensor.is_cuda else None


def _shapes(twin: Callable[..., Any], args: Sequence[Any]) -> Any:
    """What a twin gives, without numbers: on the meta device, since slices on any other ask for the device itself."""
    device = next(arg.device for arg in args if isinstance(arg, Tensor))
    made = twin(*(arg.to("meta") if isinstance(arg, Tensor) else arg for arg in args))
    if isinstance(made, Tensor):
        return torch.empty_like(made, device=device)
    return tuple(torch.empty_like(out, device=device) for out in made)


def operator(
    schema: str, mutates: Sequence[str] = (), n_launches: Callable[..., int] = lambda *args: 1
) -> Callable[[Callable[..., _Result]], Callable[..., _Result]]:
    """Make a twin an operator of its name.

    Args:
        schema: in torch's notation.
        mutates: arguments that are written.
        n_launches: kernels that a call with some arguments starts on a GPU.
    """

    def declare(twin: Callable[..., _Result]) -> Callable[..., _Result]:
        name = twin.__name__

        def run(*args: Any) -> Any:
            first = args[0][0] if isinstance(args[0], list) else args[0]
            kernels = kernels_for(first)
            if kernels is None:
                return twin(*args)
            # Triton starts kernels on the current device, wherever their arguments are.
            with torch.cuda.device_of(first):  # type: ignore[no-untyped-call]
                return getattr(kernels, name)(*args)

        declared = torch.library.custom_op(f"saelens_asi::{name}", run, mutates_args=mutates, schema=schema)
        declared.register_fake(lambda *args: None if mutates else _shapes(twin, args))
        OPERATORS[name] = Operator(twin, n_launches)
        return cast("Callable[..., _Result]", declared)

    return declare
