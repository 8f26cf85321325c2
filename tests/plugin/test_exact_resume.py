"""A run that goes on from any of its checkpoints ends as the run that was never interrupted, to the bit."""

from __future__ import annotations

import shutil

import pytest

from saelens_asi.resume import MANIFEST
from tests.helpers import kept_run

N_STEPS = 40


@pytest.mark.parametrize("kind", kept_run.KINDS)
def test_every_checkpoint_leads_to_the_same_end(kind, tmp_path):
    whole = kept_run.train(kind, tmp_path, N_STEPS)
    assert "history of the run" in whole or kind.startswith("multi")
    paths = sorted((path.parent for path in (tmp_path / "checkpoints").glob(f"**/{MANIFEST}")), key=_samples)
    assert len(paths) == kept_run.N_CHECKPOINTS
    for path in reversed(paths[::4]):
        for later in paths:
            if _samples(later) > _samples(path):
                shutil.rmtree(later, ignore_errors=True)
        resumed = kept_run.train(kind, tmp_path, N_STEPS)
        assert kept_run.differences(whole, resumed) == []


def _samples(path) -> int:
    return int(path.name)
