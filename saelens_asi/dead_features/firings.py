"""How often features fired in training: SAELens's counters, in a checkpoint or beside an SAE."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor

from saelens_asi.resume import load_tensors

SPARSITY = "sparsity.safetensors"  # SAELens's name for it

# SAELens adds this to a rate before it takes the logarithm.
_RATE_OFFSET = 1e-10


class Firings(NamedTuple):
    """How features fired in training, float64 on the CPU.

    Attributes:
        rates: (d_sae,) share of the tokens of SAELens's last window on which each fired.
        silent_tokens: (d_sae,) tokens since each last fired, at least; 0 where that is not known.
    """

    rates: Tensor
    silent_tokens: Tensor

    @classmethod
    def of_state(cls, state: Mapping[str, Any], n_steps: int) -> Firings | None:
        """From what is in a checkpoint's ``trainer_state.pt`` after ``n_steps``; None where it counted nothing."""
        fired, n_counted = state.get("act_freq_scores"), state.get("n_frac_active_samples")
        if not isinstance(fired, Tensor) or not n_counted:
            return None
        rates = fired.detach().cpu().double() / float(n_counted)
        silent = torch.where(rates > 0, 0.0, float(n_counted)).double()
        steps = state.get("n_forward_passes_since_fired")
        if isinstance(steps, Tensor) and steps.shape == silent.shape:
            batch = int(state.get("n_training_samples", 0)) // max(1, n_steps)
            silent = torch.maximum(silent, steps.cpu().double() * batch)
        return cls(rates, silent)

    @classmethod
    def of_rates(cls, rates: Tensor) -> Firings:
        """From (d_sae,) rates alone, whose number of tokens is not known.

        The lowest rate above 0 is at least one firing: what never fired was silent on as many tokens as that takes.
        """
        rates = rates.detach().cpu().double()
        if rates.ndim != 1 or not bool(((rates >= 0) & (rates <= 1.001)).all()):
            raise ValueError(
                f"firing_rates must be (d_sae,) shares of tokens in [0, 1], got a {tuple(rates.shape)} tensor"
            )
        fired = rates[rates > 0]
        n_counted = 1 / float(fired.min()) if len(fired) else 0.0
        return cls(rates, torch.where(rates > 0, 0.0, n_counted).double())


def read_firing_rates(source: str | Path) -> Tensor:
    """(d_sae,) rates of ``sparsity.safetensors``, the file or the folder that holds it; 0 where it tells nothing.

    Raises:
        ValueError: where there is none, or it is damaged.
    """
    path = Path(source)
    path = path / SPARSITY if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"firing_rates={str(source)!r} holds no {SPARSITY}: give the folder of an SAE that has one")
    try:
        logarithms = load_tensors(path)["sparsity"].double()
    except (SafetensorError, KeyError, OSError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"firing_rates: {path} is damaged, or is not SAELens's ({error!r}); remove it to do without"
        ) from None
    rates = 10**logarithms - _RATE_OFFSET
    return torch.where(rates > _RATE_OFFSET, rates, 0.0)  # 0/0, of a window that had just begun, is none
