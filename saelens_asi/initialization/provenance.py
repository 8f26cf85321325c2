"""What a saved SAE tells of its initialization."""

from __future__ import annotations

import json
from importlib.metadata import version
from typing import Any

METADATA_KEY = "active_subspace_init"


def package_version() -> str:
    return version("saelens_asi")


def write_provenance(metadata: Any, record: dict[str, Any]) -> None:
    """Store ``record`` with the package version; ValueError where it is not strict JSON (NaN, infinity)."""
    record = {**record, "saelens_asi_version": package_version()}
    metadata[METADATA_KEY] = json.loads(json.dumps(record, allow_nan=False))
