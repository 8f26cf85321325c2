"""Tests on a TransformerBridge of TransformerLens 4, beside a sae-lens that cannot be imported with it.

``python -m tests.helpers.transformer_lens_4 tests/spectra -k bridge``: arguments are those of pytest. sae-lens finds
empty stand-ins for what TransformerLens 4 has removed, and ours is told of the newest release that it allows. What
passes needs nothing of what was removed; a test that makes a HookedTransformer fails, and says so.
"""

from __future__ import annotations

import importlib.metadata
import sys
from types import ModuleType
from typing import Any

import pytest


class Removed:
    """Stands for a class that TransformerLens 4 has no more."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("TransformerLens 4 has no HookedTransformer")


def stand_in() -> None:
    """To be called before anything imports sae-lens."""
    import transformer_lens
    import transformer_lens.utilities
    from transformer_lens import HookedRootModule

    _module("HookedTransformer", HookedTransformer=Removed, HookedRootModule=HookedRootModule, Loss=Any, Output=Any)
    for name in ("components", "components.mlps"):
        _module(name)
    _module("components.mlps.can_be_used_as_mlp", CanBeUsedAsMLP=Removed)
    sys.modules["transformer_lens.utils"] = transformer_lens.utilities
    vars(transformer_lens).update(HookedTransformer=Removed, HookedTransformerConfig=Removed)
    stock = importlib.metadata.version
    importlib.metadata.version = lambda name: "3.9.0" if name == "transformer-lens" else stock(name)


def _module(name: str, **contents: Any) -> None:
    module = ModuleType(f"transformer_lens.{name}")
    vars(module).update(contents)
    sys.modules[module.__name__] = module


if __name__ == "__main__":
    stand_in()
    sys.exit(pytest.main(sys.argv[1:]))
