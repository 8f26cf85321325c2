"""Command line: ``saelens-asi lorsa train`` and ``saelens-asi lorsa evaluate``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from saelens_asi.activations.loading import EMBEDDED_DATASET, EMBEDDED_MODEL, load_documents, load_model
from saelens_asi.lorsa.attach import lorsa_loss_recovered
from saelens_asi.lorsa.attention import read_attention
from saelens_asi.lorsa.initialization import LorsaInit, initialize_lorsa_
from saelens_asi.lorsa.io import load_lorsa
from saelens_asi.lorsa.metrics import lorsa_metrics
from saelens_asi.lorsa.model import Lorsa
from saelens_asi.lorsa.sequences import CachedSequences, ModelSequences, Sequences, batches, token_windows
from saelens_asi.lorsa.training import LorsaTraining, train_lorsa


def train(args: argparse.Namespace) -> None:
    """Make, initialize, train, save and evaluate a Lorsa."""
    model, training_text, held_out_text = _model_and_text(args)
    layer = len(model.blocks) // 2 if args.layer is None else args.layer
    context = args.context_size
    lorsa = Lorsa.from_attention(
        model,
        layer,
        n_ov_heads=args.n_ov_heads,
        k=args.k,
        n_qk_heads=args.n_qk_heads,
        activation=args.activation,
        skip_positions=args.skip_positions,
        n_ctx=context if args.n_ctx is None else args.n_ctx,
    )
    settings = LorsaTraining(**_given(args, LorsaTraining, ""))
    initialization = LorsaInit(**_given(args, LorsaInit, "init_"))
    tokens = token_windows(training_text, model.tokenizer, context, args.n_sequences)
    data: Sequences = ModelSequences(model, layer, tokens)
    if args.cache:
        data = CachedSequences.collect(model, layer, tokens)
    done = initialize_lorsa_(lorsa, read_attention(model, layer), batches(data, settings.batch_size), initialization)
    print(f"initialized: d_init {done.d_init}, normalized MSE {done.initial_nmse:.3f} on {done.n_tokens} positions")
    train_lorsa(lorsa, data, settings, out=args.out, resume=args.resume)
    _report(model, lorsa, layer, held_out_text, args)
    print(f"written: {args.out}")


def evaluate(args: argparse.Namespace) -> None:
    """Measure a saved Lorsa on held-out text."""
    lorsa = load_lorsa(args.lorsa, args.device)
    layer = lorsa.provenance.get("layer") if args.layer is None else args.layer
    if layer is None:
        raise ValueError("this Lorsa does not say which layer it is for: give --layer")
    model, _, held_out_text = _model_and_text(args)
    _report(model, lorsa, layer, held_out_text, args)


def _report(model: Any, lorsa: Lorsa, layer: int, text: Any, args: argparse.Namespace) -> None:
    tokens = token_windows(text, model.tokenizer, min(args.context_size, lorsa.cfg.n_ctx), args.held_out_sequences)
    metrics = lorsa_metrics(lorsa, batches(ModelSequences(model, layer, tokens), 8))
    loss = lorsa_loss_recovered(model, lorsa, layer, tokens[: args.loss_sequences])
    found = metrics.to_dict() | {
        "ce_clean": loss.clean,
        "ce_attached": loss.reconstructed,
        "ce_zero": loss.zero,
        "ce_recovered": loss.recovered,
        "kl_recovered": loss.kl_recovered,
    }
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "metrics.json").write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))


def _model_and_text(args: argparse.Namespace) -> tuple[Any, Any, Any]:
    n_tokens = args.context_size * getattr(args, "n_sequences", args.held_out_sequences)
    return load_model(args.model, args.device), *load_documents(args.dataset, n_tokens)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="saelens-asi lorsa", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    formatter = argparse.ArgumentDefaultsHelpFormatter
    training = commands.add_parser("train", help=train.__doc__, formatter_class=formatter)
    evaluation = commands.add_parser("evaluate", help=evaluate.__doc__, formatter_class=formatter)
    for command in (training, evaluation):
        command.add_argument("--model", default=EMBEDDED_MODEL, help="name on the hub, folder, or the embedded model")
        command.add_argument(
            "--dataset", default=EMBEDDED_DATASET, help="name on the hub, folder, or the embedded text"
        )
        command.add_argument("--layer", type=int, help="index of the block; the middle one, or the Lorsa's own")
        command.add_argument("--device", default="cpu", help="of the model and the Lorsa")
        command.add_argument("--context-size", type=int, default=128, help="positions of a window")
        command.add_argument("--held-out-sequences", type=int, default=128, help="windows of held-out text")
        command.add_argument("--loss-sequences", type=int, default=32, help="of these, for the model's loss")
    evaluation.add_argument("lorsa", type=Path, help="folder of a saved Lorsa")
    evaluation.add_argument("--out", type=Path, help="folder for metrics.json")
    training.add_argument("--out", type=Path, required=True, help="folder of the run")
    training.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")
    training.add_argument("--n-ov-heads", type=int, required=True, help="features")
    training.add_argument("--k", type=int, default=64, help="features active at a position")
    training.add_argument("--n-qk-heads", type=int, help="a multiple of the layer's query heads")
    training.add_argument("--activation", default="topk", help="topk or batch_topk")
    training.add_argument("--skip-positions", type=int, default=1, help="first positions to read but not reconstruct")
    training.add_argument("--n-ctx", type=int, help="longest context of the Lorsa; --context-size by default")
    training.add_argument("--n-sequences", type=int, default=1024, help="windows of training text")
    training.add_argument("--cache", action="store_true", help="run the model once and hold its activations in memory")
    _add_fields(training.add_argument_group("training (LorsaTraining)"), LorsaTraining, "")
    _add_fields(training.add_argument_group("initialization (LorsaInit)"), LorsaInit, "init_")
    return parser


def _add_fields(group: Any, settings: type, prefix: str) -> None:
    """One flag for each field of a settings dataclass; values are JSON, or plain words."""
    for field in fields(settings):
        flag = f"--{prefix}{field.name}".replace("_", "-")
        if field.default is MISSING:
            group.add_argument(flag, type=_value, required=True, help=" ")
        else:
            group.add_argument(flag, type=_value, default=field.default, help=" ")


def _value(text: str) -> Any:
    try:
        return json.loads(text.lower() if text in ("True", "False") else text)
    except json.JSONDecodeError:
        return None if text == "None" else text


def _given(args: argparse.Namespace, settings: type, prefix: str) -> dict[str, Any]:
    return {field.name: getattr(args, prefix + field.name) for field in fields(settings)}


def main(args: Sequence[str]) -> None:
    """Run a command. A flag with a bad value ends in one line, not in a traceback."""
    parsed = _parser().parse_args(list(args))
    try:
        {"train": train, "evaluate": evaluate}[parsed.command](parsed)
    except (ValueError, TypeError) as error:
        print(f"saelens-asi lorsa {parsed.command}: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
