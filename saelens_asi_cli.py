"""``saelens-asi``: says what commands there are, and hands over to one of them.

It stands beside the package and not in it: importing any part of ``saelens_asi`` imports torch and SAELens, since that
is what registers the two flags, and ``--help`` should not wait for it.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.metadata import version

# From a command, which is a module of saelens_asi.cli, to what it does and how it is called.
COMMANDS = {
    "train": (
        "SAELens's own command line, with --initializer and --optimizer",
        "--architecture topk ... --initializer active_subspace --optimizer sparse_adam",
    ),
    "demo": ("train with and without the flags on a real model, and compare", ""),
    "spectrum": (
        "which hooks of a model are low-rank, why, and what it means for an SAE",
        "--model gpt2 --dataset NeelNanda/pile-10k --hooks attn_out mlp_out --out folder",
    ),
    "plan": (
        "which SAE a budget affords: error, dead features, hours and memory by size, before a run",
        "--model gpt2 --dataset NeelNanda/pile-10k --hooks attn_out --budget-hours 12 --memory 24GiB",
    ),
    "evaluate": (
        "dead features, error and loss of any SAEs that SAELens loads",
        "folder_of_saes --n-tokens 1000000 --out folder [--saebench]",
    ),
    "card": (
        "a model card into the folder of an SAE: figure, metrics, provenance, how to load",
        "FOLDER [--evaluate] [--license mit]",
    ),
    "autopsy": (
        "why features of an SAE are dead, and what to change",
        "FOLDER [--checkpoint FOLDER] [--model gpt2] [--dataset NeelNanda/pile-10k]",
    ),
    "sweep": (
        "many SAEs on one hook, over sizes, settings and seeds, and the paper's figures from them",
        "--methods topk auxk asi_sparse_adam --d-sae 4096 16384 --out folder",
    ),
    "lorsa": (
        "train or evaluate a sparse replacement of an attention layer",
        "train --model gpt2 --dataset NeelNanda/pile-10k --n-ov-heads 6144 --steps 500 --out folder",
    ),
}


def usage() -> str:
    """What ``--help`` shows."""
    lines = [
        f"usage: saelens-asi {{{','.join(COMMANDS)}}} [flags]",
        "       saelens-asi [flags of train]",
        "       saelens-asi --version",
        "",
    ]
    for name, (about, example) in COMMANDS.items():
        lines.append(f"  {name:9} {about}{':' if example else ''}")
        if example:
            lines.append(f"            saelens-asi {name} {example}")
    return "\n".join([*lines, "", "saelens-asi COMMAND --help lists the flags of a command."])


def main(args: Sequence[str] | None = None) -> None:
    """Run a command; with flags alone it is ``train``."""
    args = list(sys.argv[1:] if args is None else args)
    if not args or args[0] in ("-h", "--help"):
        print(usage())
    elif args[0] == "--version":
        print(f"saelens-asi {version('saelens_asi')}")
    elif args[0] in COMMANDS:
        importlib.import_module(f"saelens_asi.cli.{args[0]}").main(args[1:])
    elif args[0].startswith("-"):
        importlib.import_module("saelens_asi.cli.train").main(args)
    else:
        print(f"saelens-asi: error: {args[0]!r} is no command: give one of {', '.join(COMMANDS)}", file=sys.stderr)
        raise SystemExit(2)


if __name__ == "__main__":
    main()
