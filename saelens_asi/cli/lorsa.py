"""Train a sparse replacement of an attention layer (Lorsa), or evaluate a saved one."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import simple_parsing
from datasets import Dataset

from saelens_asi.cli.common import Command
from saelens_asi.cli.flags import (
    DeviceFlag,
    HeldOutFlag,
    LossFlag,
    OutFlag,
    SourceFlags,
    check_folder,
    open_model,
    open_text,
)
from saelens_asi.lorsa.attach import lorsa_loss_recovered
from saelens_asi.lorsa.attention import read_attention
from saelens_asi.lorsa.config import LorsaTraining
from saelens_asi.lorsa.initialization import LorsaInit, initialize_lorsa_
from saelens_asi.lorsa.io import load_lorsa
from saelens_asi.lorsa.metrics import lorsa_metrics
from saelens_asi.lorsa.model import Lorsa
from saelens_asi.lorsa.run_folder import check_unused
from saelens_asi.lorsa.sequences import CachedSequences, ModelSequences, Sequences, batches, token_windows
from saelens_asi.lorsa.training import train_lorsa
from saelens_asi.resume import written_whole


@dataclass(frozen=True, kw_only=True)
class _EvaluationFlags(DeviceFlag, LossFlag, HeldOutFlag, SourceFlags):
    """What training and evaluation of a Lorsa share.

    Attributes:
        layer: index of the block; without it the Lorsa's own, or the middle one.
    """

    layer: int | None = None
    held_out_tokens: int = 16_384

    def n_windows(self, n_tokens: int) -> int:
        """Whole windows that hold so many tokens."""
        return -(-n_tokens // self.context_size)


@dataclass(frozen=True, kw_only=True)
class LorsaTrainFlags(_EvaluationFlags, OutFlag):
    """Flags of ``saelens-asi lorsa train``, beside those of LorsaTraining and LorsaInit.

    Attributes:
        n_ov_heads: features.
        k: features active at a position.
        n_qk_heads: attention patterns, a multiple of the layer's query heads; without it as many.
        activation: topk, or batch_topk.
        skip_positions: first positions of a window that are read but not reconstructed.
        n_ctx: longest context of the Lorsa; without it --context-size.
        n_sequences: windows of training text.
        cache_activations: run the model once, and hold its activations in memory.
        resume: go on from the newest whole checkpoint in OUT, to the same bits; begin where there is none.
        overwrite: replace the run that OUT holds.
    """

    n_ov_heads: int
    k: int = 64
    n_qk_heads: int | None = None
    activation: Literal["topk", "batch_topk"] = "topk"
    skip_positions: int = 1
    n_ctx: int | None = None
    n_sequences: int = 1024
    cache_activations: bool = simple_parsing.field(default=False, action="store_true")
    resume: bool = simple_parsing.field(default=False, action="store_true")
    overwrite: bool = simple_parsing.field(default=False, action="store_true")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.resume and self.overwrite:
            raise ValueError("--resume and --overwrite exclude each other: give one of them")


@dataclass(frozen=True, kw_only=True)
class LorsaEvaluateFlags(_EvaluationFlags):
    """Flags of ``saelens-asi lorsa evaluate``.

    Attributes:
        lorsa: folder of a saved Lorsa.
        out: folder for everything that is written; without it nothing is.
    """

    lorsa: str = simple_parsing.field(positional=True, metavar="LORSA")
    out: Path | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.out is not None:
            check_folder(self.out)


def train(flags: LorsaTrainFlags, settings: LorsaTraining, initialization: LorsaInit) -> None:
    """Make, initialize, train, save and evaluate a Lorsa."""
    context = flags.context_size
    if not flags.resume and not flags.overwrite:
        check_unused(flags.out)  # before the model is loaded
    model = open_model(flags.model, flags.device)
    training_text, held_out_text = open_text(flags.dataset, context * flags.n_sequences)
    layer = len(model.blocks) // 2 if flags.layer is None else flags.layer
    lorsa = Lorsa.from_attention(
        model,
        layer,
        n_ov_heads=flags.n_ov_heads,
        k=flags.k,
        n_qk_heads=flags.n_qk_heads,
        activation=flags.activation,
        skip_positions=flags.skip_positions,
        n_ctx=context if flags.n_ctx is None else flags.n_ctx,
    )
    tokens = token_windows(training_text, model.tokenizer, context, flags.n_sequences)
    data: Sequences = ModelSequences(model, layer, tokens)
    if flags.cache_activations:
        data = CachedSequences.collect(model, layer, tokens)
    done = initialize_lorsa_(lorsa, read_attention(model, layer), batches(data, settings.batch_size), initialization)
    print(f"initialized: d_init {done.d_init}, normalized MSE {done.initial_nmse:.3f} on {done.n_tokens} positions")
    train_lorsa(lorsa, data, settings, out=flags.out, resume=flags.resume, overwrite=flags.overwrite)
    _report(model, lorsa, layer, held_out_text, flags, flags.out)
    print(f"written: {flags.out}")


def evaluate(flags: LorsaEvaluateFlags) -> None:
    """Measure a saved Lorsa on held-out text."""
    lorsa = load_lorsa(flags.lorsa, flags.device)
    layer = lorsa.provenance.get("layer") if flags.layer is None else flags.layer
    if layer is None:
        raise ValueError("this Lorsa does not say which layer it is for: give --layer")
    model = open_model(flags.model, flags.device)
    _, held_out_text = open_text(flags.dataset, flags.context_size * flags.n_windows(flags.held_out_tokens))
    _report(model, lorsa, layer, held_out_text, flags, flags.out)


def _report(model: Any, lorsa: Lorsa, layer: int, text: Dataset, flags: _EvaluationFlags, out: Path | None) -> None:
    """Print, and write to ``out``, what the Lorsa does on held-out text, in whole windows."""
    context, n_windows = min(flags.context_size, lorsa.cfg.n_ctx), flags.n_windows(flags.held_out_tokens)
    tokens = token_windows(text, model.tokenizer, context, n_windows)
    measured = lorsa_metrics(lorsa, batches(ModelSequences(model, layer, tokens), 8)).to_dict()
    if flags.loss_tokens:
        loss = lorsa_loss_recovered(model, lorsa, layer, tokens[: flags.n_windows(flags.loss_tokens)])
        measured |= {
            "ce_clean": loss.clean,
            "ce_attached": loss.reconstructed,
            "ce_zero": loss.zero,
            "ce_recovered": loss.recovered,
            "kl_recovered": loss.kl_recovered,
        }
    if out is not None:
        with written_whole(out / "metrics.json") as unfinished:
            unfinished.write_text(json.dumps(measured, indent=2) + "\n")
    print(json.dumps(measured, indent=2))


def _how_to_resume(flags: LorsaTrainFlags, settings: LorsaTraining, initialization: LorsaInit) -> str:
    way = "the same command with --resume" if not flags.overwrite else "the same command, --resume for --overwrite,"
    return f"{way} continues from {flags.out}"


COMMANDS = {
    "train": Command(
        name="lorsa train",
        about=train.__doc__ or "",
        run=train,
        settings=(LorsaTrainFlags, LorsaTraining, LorsaInit),
        prefixes={LorsaInit: "init_"},
        resume=_how_to_resume,
    ),
    "evaluate": Command(
        name="lorsa evaluate",
        about=evaluate.__doc__ or "",
        run=evaluate,
        settings=(LorsaEvaluateFlags,),
        resume=lambda flags: "an evaluation keeps nothing on the way, the same command starts again",
    ),
}


def main(args: Sequence[str]) -> None:
    """``saelens-asi lorsa train`` and ``saelens-asi lorsa evaluate``."""
    if args and args[0] in COMMANDS:
        COMMANDS[args[0]].main(args[1:])
    elif args and args[0] in ("-h", "--help"):
        print(f"usage: saelens-asi lorsa {{{','.join(COMMANDS)}}} [flags]\n\n{__doc__}\n")
        print("\n".join(f"  {name:9} {command.about}" for name, command in COMMANDS.items()))
    else:
        given = f"{args[0]!r} is no command" if args else "a command is missing"
        print(f"saelens-asi lorsa: error: {given}: give one of {', '.join(COMMANDS)}", file=sys.stderr)
        raise SystemExit(2)
