"""SAELens's training configs under their own names, with the plugin's fields visible to type checkers.

At run time these are SAELens's own classes: import them from here or from ``sae_lens``, it makes no difference.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import sae_lens

__all__ = [
    "AbsTopKTrainingSAEConfig",
    "BatchTopKTrainingSAEConfig",
    "GatedTrainingSAEConfig",
    "JumpReLUTrainingSAEConfig",
    "MatchingPursuitTrainingSAEConfig",
    "MatryoshkaBatchTopKTrainingSAEConfig",
    "StandardTrainingSAEConfig",
    "TopKTrainingSAEConfig",
]

if TYPE_CHECKING:
    from dataclasses import dataclass
    from typing import Literal

    from saelens_asi.initialization import ActiveSubspaceInit

    @dataclass(kw_only=True)
    class _Fields:
        initializer: Literal["default", "active_subspace"] | ActiveSubspaceInit = "default"
        optimizer: Literal["adam", "sparse_adam"] = "adam"
        silent_moments: Literal["keep", "decay"] = "decay"
        revive: Literal["off", "auto"] = "off"
        checkpoint_minutes: float = 10.0
        keep_checkpoints: int = 2
        checkpoint_buffer: float = 8.0
        max_skipped_fraction: float = 0.01
        resume: str | None = None
        batch_shards: int = 1

    @dataclass(kw_only=True)
    class AbsTopKTrainingSAEConfig(_Fields, sae_lens.AbsTopKTrainingSAEConfig): ...

    @dataclass(kw_only=True)
    class BatchTopKTrainingSAEConfig(_Fields, sae_lens.BatchTopKTrainingSAEConfig): ...

    @dataclass(kw_only=True)
    class GatedTrainingSAEConfig(_Fields, sae_lens.GatedTrainingSAEConfig): ...

    @dataclass(kw_only=True)
    class JumpReLUTrainingSAEConfig(_Fields, sae_lens.JumpReLUTrainingSAEConfig): ...

    @dataclass(kw_only=True)
    class MatchingPursuitTrainingSAEConfig(_Fields, sae_lens.MatchingPursuitTrainingSAEConfig): ...

    @dataclass(kw_only=True)
    class MatryoshkaBatchTopKTrainingSAEConfig(_Fields, sae_lens.MatryoshkaBatchTopKTrainingSAEConfig): ...

    @dataclass(kw_only=True)
    class StandardTrainingSAEConfig(_Fields, sae_lens.StandardTrainingSAEConfig): ...

    @dataclass(kw_only=True)
    class TopKTrainingSAEConfig(_Fields, sae_lens.TopKTrainingSAEConfig): ...

else:
    AbsTopKTrainingSAEConfig = sae_lens.AbsTopKTrainingSAEConfig
    BatchTopKTrainingSAEConfig = sae_lens.BatchTopKTrainingSAEConfig
    GatedTrainingSAEConfig = sae_lens.GatedTrainingSAEConfig
    JumpReLUTrainingSAEConfig = sae_lens.JumpReLUTrainingSAEConfig
    MatchingPursuitTrainingSAEConfig = sae_lens.MatchingPursuitTrainingSAEConfig
    MatryoshkaBatchTopKTrainingSAEConfig = sae_lens.MatryoshkaBatchTopKTrainingSAEConfig
    StandardTrainingSAEConfig = sae_lens.StandardTrainingSAEConfig
    TopKTrainingSAEConfig = sae_lens.TopKTrainingSAEConfig
