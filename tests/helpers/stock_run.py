"""A stock training of every architecture with fixed seeds and paths, below the current folder.

Run as ``python -m tests.helpers.stock_run [saelens_asi]``: with the argument the plugin is imported, but not asked for.
Prints one JSON line with losses, trainer classes and config signatures.
"""

from __future__ import annotations

import importlib
import inspect
import json
import sys

import torch
from sae_lens import LoggingConfig
from sae_lens.registry import get_sae_training_class
from sae_lens.training.sae_trainer import SAETrainer

from tests.helpers import tiny


def main() -> None:
    torch.set_num_threads(1)
    for name in sys.argv[1:]:
        importlib.import_module(name)
    report: dict[str, dict[str, object]] = {}
    model, dataset = tiny.hooked_transformer(), tiny.tokens()
    stock_fit = SAETrainer.fit
    for architecture in tiny.ARCHITECTURES:
        losses: list[float] = []
        classes: list[str] = []

        def fit(self: SAETrainer, losses: list[float] = losses, classes: list[str] = classes) -> object:
            classes.extend([f"{type(self).__module__}.{type(self).__qualname__}", type(self.optimizer).__name__])
            step = self.step

            def recorded_step(batch: torch.Tensor) -> object:
                output = step(batch)
                losses.append(output.loss.item())
                return output

            self.step = recorded_step
            return stock_fit(self)

        SAETrainer.fit = fit
        torch.manual_seed(1)
        sae = tiny.sae_config(architecture, normalize_activations="expected_average_only_in")
        logger = LoggingConfig(log_to_wandb=False, wandb_id="run")
        changes = {"output_path": f"{architecture}/output", "checkpoint_path": architecture, "n_checkpoints": 1}
        cfg = tiny.runner_config(sae, ".", logger=logger, save_final_checkpoint=True, **changes)
        tiny.run(cfg, model, dataset)
        SAETrainer.fit = stock_fit
        parameters = inspect.signature(get_sae_training_class(architecture)[1]).parameters.values()
        report[architecture] = {
            "losses": losses,
            "classes": classes,
            "parameters": [[p.name, p.kind.name] for p in parameters],
            "keys": sorted(sae.to_dict()),
            "metadata": json.loads(json.dumps(sae.to_dict()["metadata"])),
        }
    print("\n" + json.dumps({"plugin_imported": "saelens_asi" in sys.modules, "report": report}))


if __name__ == "__main__":
    main()
