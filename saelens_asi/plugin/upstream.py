"""What this plugin relies on in the packages it extends, checked once at import; and their known failures."""

from __future__ import annotations

import inspect
from dataclasses import fields
from importlib.metadata import version

from packaging.specifiers import SpecifierSet
from sae_lens.saes.sae import TrainingSAEConfig
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from sae_lens.training.sae_trainer import SAETrainer

REQUIREMENTS = {"torch": ">=2.6", "sae-lens": ">=6.52,<7", "transformer-lens": ">=2.16.1,<4"}

_TRAINER_PARAMETERS = {"cfg", "sae", "data_provider", "evaluator", "save_checkpoint_fn"}
_PATCHED = {
    TrainingSAEConfig: ("to_dict", "get_training_architecture_details", "add_training_info_to_metadata"),
    SAETrainer: (
        *("fit", "step", "load_trainer_state", "save_checkpoint", "set_final_sae_metadata"),
        *("_train_step", "_is_logging_step", "get_coefficients"),
    ),
    MultiSAETrainer: ("fit", "load_checkpoint", "_estimate_scaling_factors"),
}


def check_upstream() -> None:
    """Raise ImportError when an installed package is not one that this plugin was made for."""
    for package, bounds in REQUIREMENTS.items():
        installed = version(package)
        if not SpecifierSet(bounds).contains(installed, prereleases=True):
            raise ImportError(
                f"saelens_asi needs {package}{bounds}, found {installed}: pip install '{package}{bounds}'"
            )
    moved = [
        f"{owner.__name__}.{name}" for owner, names in _PATCHED.items() for name in names if not hasattr(owner, name)
    ]
    if not inspect.signature(SAETrainer.__init__).parameters.keys() >= _TRAINER_PARAMETERS:
        moved.append("SAETrainer.__init__")
    own = {"initializer", "optimizer"} & {field.name for field in fields(TrainingSAEConfig)}
    moved += [f"TrainingSAEConfig.{name} (SAELens has this field itself now)" for name in sorted(own)]
    if moved:
        raise ImportError(
            f"saelens_asi does not fit sae-lens {version('sae-lens')}: {', '.join(moved)} changed. Install a newer "
            "saelens_asi, or sae-lens==6.54.12"
        )
