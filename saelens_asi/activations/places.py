"""Where models and text that come without a hub are found, and kept."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path


def cache_dir() -> Path:
    """Where dequantized models are kept: ``$SAELENS_ASI_CACHE``, or ``~/.cache/saelens_asi``."""
    return Path(os.environ.get("SAELENS_ASI_CACHE", Path.home() / ".cache" / "saelens_asi"))


def package_folder(module: str, install: str) -> Path:
    """Folder of an installed package. Raises ImportError with the command that installs it."""
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"a model or text without a hub needs the package {module}: {install}")
    return Path(next(iter(spec.submodule_search_locations)))
