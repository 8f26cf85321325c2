"""How annotations are checked while tests run: shapes by jaxtyping, types by beartype, an int where a float is due."""

from __future__ import annotations

from beartype import BeartypeConf, beartype

CHECKED = ("saelens_asi.sparse", "saelens_asi.spectra")

typechecked = beartype(conf=BeartypeConf(is_pep484_tower=True))
