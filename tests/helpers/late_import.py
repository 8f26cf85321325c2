"""saelens_asi is imported after a third party's classes, configs, pickles and trainers exist.

Run as ``python -m tests.helpers.late_import``; it prints OK, or fails.
"""

from __future__ import annotations

import importlib
import pickle
import sys

import torch
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import TrainingSAEConfig
from sae_lens.training.sae_trainer import SAETrainer

from tests.helpers import third_party, tiny


def main() -> None:
    torch.set_num_threads(1)
    early = tiny.sae_config("third_party")
    pickled = pickle.dumps([early, tiny.sae_config("topk")])
    cfg = SAETrainerConfig(total_training_samples=64, train_batch_size_samples=32, lr_end=1e-4)
    trainer = SAETrainer(cfg, third_party.ThirdPartyTrainingSAE(early), iter(torch.randn(4, 32, tiny.D_MODEL)))
    assert "saelens_asi" not in sys.modules

    import saelens_asi

    patched = SAETrainer.__new__, TrainingSAEConfig.to_dict, TrainingSAEConfig.__init__
    saelens_asi.register()
    del sys.modules["saelens_asi"]
    importlib.import_module("saelens_asi").register()
    again = SAETrainer.__new__, TrainingSAEConfig.to_dict, TrainingSAEConfig.__init__
    assert all(a is b for a, b in zip(patched, again, strict=True)), "registered twice"

    config_class = third_party.ThirdPartyTrainingSAEConfig
    asking = config_class(d_in=16, d_sae=48, initializer="active_subspace", optimizer="sparse_adam", sharpness=0.25)
    assert (asking.initializer, asking.optimizer, asking.sharpness) == ("active_subspace", "sparse_adam", 0.25)
    assert repr(asking) == "ThirdParty(16, 48)", "a repr written by hand was replaced"
    assert asking != config_class(d_in=16, d_sae=48, sharpness=0.25), "eq does not see the fields"
    first, second = config_class(d_in=16, d_sae=48), config_class(d_in=16, d_sae=48)
    assert first.groups == [1, 2]
    assert first.groups is not second.groups, "a default factory is shared"

    for old in (early, *pickle.loads(pickled)):
        assert (old.initializer, old.optimizer) == ("default", "adam")
        assert not {"initializer", "optimizer"} & old.to_dict().keys()
        assert type(old).from_dict(old.to_dict()) == old
    assert early == pickle.loads(pickled)[0] == config_class(d_in=16, d_sae=48)

    trainer.fit()
    assert type(trainer) is SAETrainer
    assert trainer.n_training_steps == 2

    sae = third_party.ThirdPartyTrainingSAE(
        config_class(d_in=16, d_sae=48, initializer=saelens_asi.ActiveSubspaceInit(d_init=4, n_tokens=64))
    )
    trainer = SAETrainer(cfg, sae, iter(torch.randn(8, 32, tiny.D_MODEL)))
    assert type(trainer) is not SAETrainer
    trainer.fit()
    assert sae.cfg.metadata["active_subspace_init"]["d_init"] == 4
    print("OK")


if __name__ == "__main__":
    main()
