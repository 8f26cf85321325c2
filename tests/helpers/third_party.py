"""An architecture of somebody else's, registered with SAELens the documented way. It does not know saelens_asi."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from sae_lens import StandardSAE, StandardSAEConfig, StandardTrainingSAE, StandardTrainingSAEConfig
from sae_lens.registry import register_sae_class, register_sae_training_class

ARCHITECTURE = "third_party"


@dataclass
class ThirdPartySAEConfig(StandardSAEConfig):
    @classmethod
    def architecture(cls) -> str:
        return ARCHITECTURE


class ThirdPartySAE(StandardSAE):
    pass


@dataclass
class ThirdPartyTrainingSAEConfig(StandardTrainingSAEConfig):
    groups: list[int] = field(default_factory=lambda: [1, 2])
    sharpness: float = 0.5

    def __repr__(self) -> str:  # written by hand, so nobody may replace it
        return f"ThirdParty({self.d_in}, {self.d_sae})"

    @classmethod
    def architecture(cls) -> str:
        return ARCHITECTURE


class ThirdPartyTrainingSAE(StandardTrainingSAE):
    def calculate_aux_loss(self, *args: Any, **kwargs: Any) -> Any:
        losses = super().calculate_aux_loss(*args, **kwargs)
        return {name: loss * self.cfg.sharpness for name, loss in losses.items()}


register_sae_class(ARCHITECTURE, ThirdPartySAE, ThirdPartySAEConfig)
register_sae_training_class(ARCHITECTURE, ThirdPartyTrainingSAE, ThirdPartyTrainingSAEConfig)
