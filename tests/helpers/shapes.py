"""How annotations are checked while tests run: shapes by jaxtyping, types by beartype, an int where a float is due."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TypeVar

from beartype import BeartypeConf, BeartypeHintOverrides, beartype

Checked = TypeVar("Checked")

_SPARSE = Path(__file__).parents[2] / "saelens_asi" / "sparse"

# Not the kernels of numba and Triton: they compile functions, and not what wraps them.
_COMPILED = {"numba_kernels", "triton_kernels"}
CHECKED = [
    "saelens_asi.spectra",
    *sorted(f"saelens_asi.sparse.{path.stem}" for path in _SPARSE.glob("*.py") if path.stem not in _COMPILED),
]


def typechecked(checked: Checked) -> Checked:
    return beartype(checked, conf=_conf())


@cache
def _conf() -> BeartypeConf:
    # Not at the top: what checks annotations is there before the package. A model's blocks are no attributes of its
    # class, so that from Python 3.12 on it would be no instance of the protocol.
    from saelens_asi.activations.hooks import HookedModel

    return BeartypeConf(is_pep484_tower=True, hint_overrides=BeartypeHintOverrides({HookedModel: object}))
