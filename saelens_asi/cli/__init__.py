"""Command line: ``saelens-asi COMMAND``; with flags alone the command is ``train``."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence

_USAGE = """\
usage: saelens-asi {train,demo,spectrum,evaluate,autopsy,sweep,lorsa} [flags]
       python -m saelens_asi [flags of train]

  train     SAELens's own command line, with --initializer and --optimizer:
            saelens-asi train --architecture topk ... --initializer active_subspace --optimizer sparse_adam
  demo      train with and without the flags on a real model, and compare
  spectrum  which hooks of a model are low-rank, why, and what it means for an SAE:
            saelens-asi spectrum --model gpt2 --dataset NeelNanda/pile-10k --hooks attn_out mlp_out --out folder
  evaluate  dead features, error and loss of any SAEs that SAELens loads:
            saelens-asi evaluate folder_of_saes --n-tokens 1000000 --out folder
  autopsy   why features of an SAE are dead, and what to change:
            saelens-asi autopsy FOLDER [--checkpoint FOLDER] [--model gpt2] [--dataset NeelNanda/pile-10k]
  sweep     many SAEs on one hook, over sizes, settings and seeds, and the paper's figures from them:
            saelens-asi sweep --methods topk auxk asi_sparse_adam --d-sae 4096 16384 --out folder
  lorsa     train or evaluate a sparse replacement of an attention layer:
            saelens-asi lorsa train --model gpt2 --dataset NeelNanda/pile-10k --n-ov-heads 6144 --steps 500 --out folder

saelens-asi COMMAND --help lists the flags of a command."""


def train(args: Sequence[str]) -> None:
    """SAELens's own command line. A flag with a bad value ends in one line, not in a traceback."""
    from sae_lens.llm_sae_training_runner import LanguageModelSAETrainingRunner, _parse_cfg_args

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        cfg = _parse_cfg_args(list(args))
    except (argparse.ArgumentError, ValueError) as error:
        print(f"saelens-asi train: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    LanguageModelSAETrainingRunner(cfg=cfg).run()


def demo(args: Sequence[str]) -> None:
    from saelens_asi.cli.demo import main as run

    run(args)


def spectrum(args: Sequence[str]) -> None:
    from saelens_asi.cli.spectrum import main as run

    run(args)


def evaluate(args: Sequence[str]) -> None:
    from saelens_asi.cli.evaluate import main as run

    run(args)


def autopsy(args: Sequence[str]) -> None:
    from saelens_asi.cli.autopsy import main as run

    run(args)


def sweep(args: Sequence[str]) -> None:
    from saelens_asi.cli.sweep import main as run

    run(args)


def lorsa(args: Sequence[str]) -> None:
    from saelens_asi.cli.lorsa import main as run

    run(args)


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "train": train,
    "demo": demo,
    "spectrum": spectrum,
    "evaluate": evaluate,
    "autopsy": autopsy,
    "sweep": sweep,
    "lorsa": lorsa,
}


def main(args: Sequence[str] | None = None) -> None:
    args = list(sys.argv[1:] if args is None else args)
    if args and args[0] in COMMANDS:
        COMMANDS[args[0]](args[1:])
    elif args and args[0].startswith("--") and args[0] != "--help":
        train(args)
    elif not args or args[0] in ("-h", "--help"):
        print(_USAGE)
    else:
        print(f"saelens-asi: unknown command {args[0]!r}\n{_USAGE}", file=sys.stderr)
        raise SystemExit(2)
