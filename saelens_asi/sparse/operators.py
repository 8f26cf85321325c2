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

logger = logging.getLogger(__name__)

_Result = TypeVar("_Result")


class Operator(NamedTuple):
    """What stands behind a name in ``torch.ops.saelens_asi``: the twin, and how many kernels it starts at most."""

    twin: Callable[..., Any]
    n_launches: int


OPERATORS: dict[str, Operator] = {}
"""All operators by name."""


@cache
def load_triton_kernels() -> ModuleType | None:
    """Triton's kernels; None without a Triton that works."""
    if importlib.util.find_spec("triton") is None:
        return None
    try:
        return importlib.import_module("saelens_asi.sparse.triton_kernels")
    except Exception as error:
        logger.warning("Triton cannot be used (%s): training steps take torch's operations", error)
        return None


def operator(
    schema: str, mutates: Sequence[str] = (), n_launches: int = 1
) -> Callable[[Callable[..., _Result]], Callable[..., _Result]]:
    """Make a twin an operator of its name.

    Args:
        schema: in torch's notation.
        mutates: arguments that are written.
        n_launches: kernels that it starts on a GPU, at most.
    """

    def declare(twin: Callable[..., _Result]) -> Callable[..., _Result]:
        name = twin.__name__

        def run(*args: Any) -> Any:
            first = args[0][0] if isinstance(args[0], list) else args[0]
            kernels = load_triton_kernels() if first.is_cuda else None
            return (twin if kernels is None else getattr(kernels, name))(*args)

        declared = torch.library.custom_op(f"saelens_asi::{name}", run, mutates_args=mutates, schema=schema)
        declared.register_fake(twin)
        OPERATORS[name] = Operator(twin, n_launches)
        return cast("Callable[..., _Result]", declared)

    return declare
