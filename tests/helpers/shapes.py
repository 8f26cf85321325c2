"""How annotations are checked while tests run: shapes by jaxtyping, types by beartype, an int where a float is due."""

from __future__ import annotations

from pathlib import Path

from beartype import BeartypeConf, beartype

_SPARSE = Path(__file__).parents[2] / "saelens_asi" / "sparse"

# Not numba's kernels: numba compiles functions, and not what wraps them.
CHECKED = [
    "saelens_asi.spectra",
    *sorted(f"saelens_asi.sparse.{path.stem}" for path in _SPARSE.glob("*.py") if path.stem != "numba_kernels"),
]

typechecked = beartype(conf=BeartypeConf(is_pep484_tower=True))
