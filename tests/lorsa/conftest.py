"""What the tests of training share."""

from __future__ import annotations

from typing import Any

import pytest

from saelens_asi.lorsa import CachedSequences
from tests.helpers import tiny_attention

LAYER = 1


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_attention.hooked("grouped queries")


@pytest.fixture(scope="module")
def data(model: Any) -> CachedSequences:
    return CachedSequences.collect(model, LAYER, tiny_attention.tokens(64))
