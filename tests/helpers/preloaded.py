"""What the server of ``processes`` imports once, for all processes that it forks."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["WANDB_MODE"] = "disabled"

import torch

torch.set_num_threads(1)

import saelens_asi  # noqa: E402, F401
from tests.helpers import tiny  # noqa: E402, F401
