"""What Active Subspace Initialization is asked to do."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeGuard

INITIALIZER_NAME = "active_subspace"

# Tokens for each dimension of d_in, where none are asked for.
AUTO_TOKENS_PER_DIMENSION = 32

_SUBSPACES = ("active", "random", "full")
_CENTERS = ("mean", "zeros")
_NAMED_NORMS = ("least_squares", "decoder_init_norm")


@dataclass(frozen=True, kw_only=True)
class ActiveSubspaceInit:
    """Settings of Active Subspace Initialization. Frozen and inert: nothing happens before training starts.

    Decoder rows start as random directions inside the top ``d_init`` principal directions of the mean-centred
    activations, all of one norm; the encoder starts as the decoder's transpose (arXiv 2508.16929). Three things are
    set apart, since each has its own effect: the subspace, the norm, and the centre.

    The defaults are those that measured best on a real model (benchmarks/results/ablation.md);
    ``ActiveSubspaceInit.paper()`` is the paper's own recipe.

    Attributes:
        d_init: dimension of the subspace: an int, a fraction of d_in in (0, 1] given as a float, or ``"auto"``: an
            eighth of d_in, and up to a quarter for large dictionaries and for BatchTopK (``auto_d_init``).
        n_tokens: activation vectors used for the estimate, or ``"auto"``: 32 for each dimension of d_in. They are
            streamed, so memory does not grow with them.
        norm: norm of the decoder rows: ``"least_squares"`` (closed form for the lowest initial reconstruction error;
            for BatchTopK, for that with k features at every token), a positive number, or ``"decoder_init_norm"``
            (SAELens's own setting of that name).
        center: decoder bias at the ``"mean"`` of the activations, or ``"zeros"``.
        subspace: ``"active"``; or the controls ``"random"`` (same dimension) and ``"full"`` (all of d_in).
        seed: of the random directions. They have their own generator: no other randomness is touched.
        spectrum: path of a file written by ``Spectrum.save`` for the raw activations of the same hook. The subspace
            and the mean are then taken from it, and only a small sample of activations is read, for the norm.
    """

    d_init: int | float | Literal["auto"] = "auto"
    n_tokens: int | Literal["auto"] = "auto"
    norm: float | Literal["least_squares", "decoder_init_norm"] = "least_squares"
    center: Literal["mean", "zeros"] = "mean"
    subspace: Literal["active", "random", "full"] = "active"
    seed: int = 0
    spectrum: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.spectrum, Path):
            object.__setattr__(self, "spectrum", str(self.spectrum))
        if self.spectrum is not None and not isinstance(self.spectrum, str):
            raise ValueError(f"spectrum={self.spectrum!r} must be the path of a spectrum file; save the spectrum first")
        _check_d_init(self.d_init)
        _check_choice("center", self.center, _CENTERS)
        _check_choice("subspace", self.subspace, _SUBSPACES)
        if self.n_tokens != "auto" and not (is_int(self.n_tokens) and self.n_tokens >= 2):
            raise ValueError(f"n_tokens={self.n_tokens!r} must be an integer of at least 2, or 'auto'")
        if not is_int(self.seed):
            raise ValueError(f"seed={self.seed!r} must be an integer")
        if self.norm not in _NAMED_NORMS and not (_is_real(self.norm) and 0 < self.norm < math.inf):
            raise ValueError(f"norm={self.norm!r} must be a positive number, or one of {_NAMED_NORMS}")
        if is_int(self.d_init) and is_int(self.n_tokens):
            self._check_enough_tokens(self.d_init, self.n_tokens)

    def _check_enough_tokens(self, d_init: int, n_tokens: int) -> None:
        if self.subspace == "active" and self.spectrum is None and n_tokens <= d_init:
            raise ValueError(
                f"n_tokens={n_tokens} is too few for d_init={d_init}: n centred vectors span at most n - 1 dimensions; "
                f"give at least {d_init + 1} tokens ({AUTO_TOKENS_PER_DIMENSION} for each dimension of d_in is better)"
            )

    @classmethod
    def paper(cls, **changes: Any) -> ActiveSubspaceInit:
        """The paper's recipe: d_init = 768 / 4096 = 18.75 % of d_in, zero decoder bias, error-minimising norm."""
        return cls(**{"d_init": 0.1875, "center": "zeros", "norm": "least_squares", **changes})

    def check_width(self, d_in: int) -> None:
        """Raise ValueError when these settings cannot fit activations of width ``d_in``."""
        if is_int(self.d_init) and self.d_init > d_in:
            raise ValueError(
                f"d_init={self.d_init} exceeds d_in={d_in}: give an int of at most {d_in}, a fraction such as "
                "0.2, or 'auto'"
            )
        if isinstance(self.d_init, float) and round(self.d_init * d_in) < 1:
            raise ValueError(f"d_init={self.d_init} of d_in={d_in} is less than one dimension: give a larger fraction")
        if isinstance(self.d_init, float):
            self._check_enough_tokens(round(self.d_init * d_in), self.tokens_for(d_in))

    def tokens_for(self, d_in: int) -> int:
        """Number of activation vectors for the estimate at width ``d_in``."""
        return AUTO_TOKENS_PER_DIMENSION * d_in if self.n_tokens == "auto" else int(self.n_tokens)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ActiveSubspaceInit:
        """Inverse of ``to_dict``. Raises ValueError for a setting that does not exist."""
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(f"ActiveSubspaceInit has no setting {unknown}; its settings are {known}")
        return cls(**values)


def is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_real(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_choice(setting: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{setting}={value!r} must be one of {choices}")


def _check_d_init(d_init: object) -> None:
    if d_init == "auto":
        return
    if not _is_real(d_init):
        raise ValueError(f"d_init={d_init!r} must be an int, a fraction of d_in in (0, 1], or 'auto'")
    if is_int(d_init):
        if d_init < 1:
            raise ValueError(f"d_init={d_init} must be at least 1, a fraction of d_in in (0, 1], or 'auto'")
    elif not 0 < d_init <= 1:
        raise ValueError(f"d_init={d_init} as a fraction of d_in must lie in (0, 1]; for a dimension give an int")


# Activations that the least-squares norm is fitted on; the norm moves by less than 1 % beyond it.
