"""A tiny model, its tokens, and configs for SAELens. It does not import saelens_asi: stock runs use it too."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from sae_lens import (
    CacheActivationsRunnerConfig,
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    LoggingConfig,
)
from sae_lens.config import SAETrainerConfig
from sae_lens.registry import get_sae_training_class
from sae_lens.training.sae_trainer import SAETrainer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

N_WORDS = 64
CONTEXT = 16
D_MODEL = 16
HOOK_Z_WIDTH = 12  # n_heads * d_head, on purpose not d_model
ATTN_OUT = "blocks.1.hook_attn_out"
BATCH = 32

ARCHITECTURES = (
    "standard",
    "gated",
    "topk",
    "abstopk",
    "jumprelu",
    "batchtopk",
    "matryoshka_batchtopk",
    "matching_pursuit",
)


def tokenizer() -> PreTrainedTokenizerFast:
    vocab = {"<bos>": 0, "<eos>": 1, "<pad>": 2, **{f"w{i}": i for i in range(3, N_WORDS)}}
    words = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    special = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<pad>"}
    # transformer_lens asks for both of these, and loads a tokenizer from the hub where the second is missing
    own = {"name_or_path": "tiny", "add_bos_token": True}
    return PreTrainedTokenizerFast(tokenizer_object=words, **special, **own)


def hooked_transformer() -> HookedTransformer:
    cfg = HookedTransformerConfig(
        n_layers=2,
        d_model=D_MODEL,
        n_ctx=CONTEXT,
        n_heads=3,
        d_head=4,
        d_mlp=24,
        d_vocab=N_WORDS,
        act_fn="gelu",
        initializer_range=0.4,
        seed=0,
        device="cpu",
    )
    with torch.random.fork_rng():
        return HookedTransformer(cfg, tokenizer=tokenizer())


def save_llama(folder: Path) -> Path:
    """A tiny Llama with grouped-query attention, with its tokenizer, as a folder of transformers."""
    cfg = LlamaConfig(
        vocab_size=N_WORDS,
        hidden_size=D_MODEL,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.4,
        bos_token_id=0,
        eos_token_id=1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(cfg).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def tokens(n_rows: int = 256) -> Dataset:
    """Sequences in which a word says much about the next one."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(3, N_WORDS, (n_rows, 1), generator=generator)
    while rows.shape[1] < CONTEXT:
        noise = torch.randint(0, 5, (n_rows, 1), generator=generator)
        rows = torch.cat([rows, 3 + (rows[:, -1:] * 3 + noise) % (N_WORDS - 3)], dim=1)
    return Dataset.from_dict({"tokens": rows.tolist()})


def save_text(folder: Path, n_documents: int, n_words: int) -> Path:
    """A folder that Hugging Face's ``load_dataset`` reads: documents of random words, in a column ``text``."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(3, N_WORDS, (n_documents, n_words), generator=generator).tolist()
    rows = (json.dumps({"text": " ".join(f"w{i}" for i in row)}) + "\n" for row in words)
    (folder / "train.jsonl").write_text("".join(rows))
    return folder


def sae_config(architecture: str = "topk", d_in: int = D_MODEL, d_sae: int = 48, **settings: Any) -> Any:
    config_class = get_sae_training_class(architecture)[1]
    own: dict[str, Any] = {}
    if architecture.endswith("topk"):
        own["k"] = 4
    if architecture == "matryoshka_batchtopk":
        own["matryoshka_widths"] = [d_sae // 3, d_sae]
    if architecture == "matching_pursuit":
        own["max_iterations"] = 4
    return config_class(**{"d_in": d_in, "d_sae": d_sae, **own, **settings})


def runner_config(sae: Any, folder: Path | str, **changes: Any) -> LanguageModelSAERunnerConfig[Any]:
    settings: dict[str, Any] = {
        "sae": sae,
        "model_name": "tiny",
        "hook_name": ATTN_OUT,
        "dataset_path": "tiny",
        "is_dataset_tokenized": True,
        "streaming": False,
        "context_size": CONTEXT,
        "n_batches_in_buffer": 16,
        "store_batch_size_prompts": 8,
        "train_batch_size_tokens": BATCH,
        "training_tokens": 10 * BATCH,
        "lr": 1e-3,
        "device": "cpu",
        "n_batches_for_norm_estimate": 4,
        "checkpoint_path": None,
        "output_path": str(Path(folder) / "output"),
        "logger": LoggingConfig(log_to_wandb=False),
        "verbose": False,
    }
    return LanguageModelSAERunnerConfig(**{**settings, **changes})


def cache_config(folder: Path | str) -> CacheActivationsRunnerConfig:
    """For SAELens's runner that writes activations to disk: 128 sequences at ``ATTN_OUT``."""
    return CacheActivationsRunnerConfig(
        dataset_path="tiny",
        model_name="tiny",
        model_batch_size=8,
        hook_name=ATTN_OUT,
        d_in=D_MODEL,
        training_tokens=128 * CONTEXT,
        context_size=CONTEXT,
        new_cached_activations_path=str(folder),
        buffer_size_gb=8 * 4 * D_MODEL * CONTEXT * 8 / 1e9,
        device="cpu",
        streaming=False,
        shuffle=False,
    )


def run(cfg: LanguageModelSAERunnerConfig[Any], model: Any, dataset: Dataset, **overrides: Any) -> Any:
    return LanguageModelSAETrainingRunner(cfg, override_dataset=dataset, override_model=model, **overrides).run()


def activations(n: int, d_active: int = 5, noise: float = 0.02, seed: int = 0) -> torch.Tensor:
    """(n, D_MODEL) vectors around a mean that is not zero, nearly all of whose variance lies in ``d_active`` dims."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.linspace(3, 1, d_active)
    basis = torch.linalg.qr(torch.randn(D_MODEL, d_active, generator=torch.Generator().manual_seed(99)))[0]
    x = torch.randn(n, d_active, generator=generator) * scales @ basis.T
    return x + 1 + noise * torch.randn(n, D_MODEL, generator=generator)


def batches(seed: int = 0, **settings: Any) -> Iterator[torch.Tensor]:
    """Endless batches of ``activations``."""
    while True:
        yield activations(BATCH, seed=seed, **settings)
        seed += 1


def training_sae(architecture: str = "topk", **settings: Any) -> Any:
    return get_sae_training_class(architecture)[0](sae_config(architecture, **settings))


def trainer(
    architecture: str = "topk",
    provider: Any = None,
    n_steps: int = 10,
    trainer_class: type[Any] = SAETrainer,
    **settings: Any,
) -> Any:
    """A trainer made by hand; ``settings`` are those of the trainer's config, all others those of the SAE's."""
    names = {field.name for field in fields(SAETrainerConfig)} - {"device"}
    own = {name: settings.pop(name) for name in names & settings.keys()}
    defaults = {"lr": 1e-3, "lr_end": 1e-4, "n_batches_for_norm_estimate": 4}
    steps = {"total_training_samples": n_steps * BATCH, "train_batch_size_samples": BATCH}
    cfg = SAETrainerConfig(**{**defaults, **steps, **own})
    return trainer_class(cfg, training_sae(architecture, **settings), provider or batches())
