"""The sweeps behind the claims: every cell that `make claims` trains.

    python -m benchmarks.claims.grid           # train what is missing (hours on two cores)
    python -m benchmarks.claims.grid --list    # the commands alone

Each sweep goes on where it stopped, and is done at once where its results are there; to measure anew, remove
benchmarks/results/claims/*/cells.jsonl first.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from benchmarks.claims.evidence import RESULTS
from benchmarks.claims.sources import CACHE, MAIN_HOOK
from saelens_asi.sweep import Cell, grid

HOOK = MAIN_HOOK["smollm2"]
COMPARED = ("asi_sparse_adam", "topk", "auxk")

Axes = Mapping[str, Sequence[float | str]]


@dataclass(frozen=True)
class Sweep:
    """One call of ``saelens-asi sweep``; several may share a folder.

    Attributes:
        folder: of the results, below benchmarks/results/claims.
        axes: of the grid, by the names of a ``Cell``.
        methods: of ``saelens_asi.sweep.METHODS``; the command's default unless told.
        hooks: full names.
        sizes: in tokens: of the caches, and of the window after which a feature is dead for the auxiliary loss.
        save_saes: keep the SAEs, for ``benchmarks.claims.saes``.
    """

    folder: str
    axes: Axes
    methods: Sequence[str] = ()
    hooks: Sequence[str] = (HOOK,)
    sizes: Mapping[str, int] = field(default_factory=dict)
    save_saes: bool = False

    def cells(self) -> list[Cell]:
        return grid(self.all_axes, self.methods)

    @property
    def all_axes(self) -> Axes:
        """With moments of silent features that stay, as they did by default when the committed cells were trained."""
        return {**self.axes, "silent_moments": ["keep"]}

    def arguments(self) -> list[str]:
        """Of ``saelens-asi sweep``."""
        words = ["--cache", str(CACHE), "--hooks", *self.hooks, "--out", str(RESULTS / "claims" / self.folder)]
        words += ["--methods", *self.methods] if self.methods else []
        for name, values in self.all_axes.items():
            words += [_flag(name), *map(str, values)]
        for name, size in self.sizes.items():
            words += [_flag(name), str(size)]
        return [*words, *(["--save-saes"] if self.save_saes else [])]


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _size(
    d_sae: int | Sequence[int], methods: Sequence[str], save_saes: bool = False, **axes: Sequence[float | str]
) -> Sweep:
    """A sweep of the comparison by size."""
    sizes = [d_sae] if isinstance(d_sae, int) else d_sae
    return Sweep("d_sae", {"d_sae": sizes, **axes}, methods, save_saes=save_saes)


SWEEPS: tuple[Sweep, ...] = (
    _size(8192, (*COMPARED, "asi"), save_saes=True, seed=[0, 1, 2]),
    _size(8192, (*COMPARED, "asi"), save_saes=True, lr=[0.002, 0.004]),
    _size(8192, ["topk"], lr=[0.008]),
    _size(8192, ["topk"], lr=[0.004], seed=[1, 2]),
    _size(8192, ["asi_sparse_adam"], lr=[0.002], seed=[1, 2]),
    _size(8192, ["auxk"], lr=[0.002], seed=[1, 2]),
    _size([4096, 16384, 32768], COMPARED),
    _size(65536, ["asi_sparse_adam"], save_saes=True, lr=[0.001, 0.0005, 0.0003, 0.0002]),
    _size(65536, ["asi_sparse_adam"], lr=[0.0005], seed=[1]),
    _size([16384, 32768], ["asi_sparse_adam"], lr=[0.0005]),
    _size(131072, ["asi_sparse_adam"], lr=[0.0003], seed=[0, 1]),
    _size(65536, ["asi"], lr=[0.0003]),
    _size([65536, 131072], ["topk", "auxk"]),
    _size(65536, ["topk"], lr=[0.0005, 0.002]),
    _size([4096, 16384, 32768, 65536, 131072], ["topk"], lr=[0.004]),
    _size([4096, 65536], ["auxk"], lr=[0.002]),
    _size(65536, ["auxk"], norm=["decoder_init_norm"], aux_loss_coefficient=[1.0]),
    Sweep(
        "d_init",
        {"d_sae": [8192], "subspace": ["active", "random"], "d_init": [16, 32, 64, 128, 256], "seed": [0, 1]},
    ),
    Sweep("d_init", {"d_sae": [8192], "subspace": ["full"], "seed": [0, 1]}),
    Sweep("frontier", {"d_sae": [8192], "k": [8, 64], "lr": [0.001, 0.002, 0.004], "seed": [0, 1]}, COMPARED),
    Sweep("frontier", {"d_sae": [8192], "k": [64], "lr": [0.008]}, ["topk"]),
    Sweep("frontier", {"d_sae": [8192], "k": [64], "lr": [0.003]}),
    Sweep("paper", {"d_sae": [8192, 32768]}, ["asi_paper_sparse_adam", "asi_paper"]),
    Sweep(
        "architectures",
        {
            "d_sae": [8192],
            "architecture": ["batchtopk", "matryoshka_batchtopk"],
            "lr": [0.001, 0.002],
            "seed": [0, 1],
        },
        ["asi_sparse_adam", "auxk"],
    ),
    Sweep("architectures", {"d_sae": [8192], "architecture": ["batchtopk"], "aux_loss_coefficient": [0.03125]}),
    Sweep("architectures", {"d_sae": [8192], "architecture": ["batchtopk"], "norm": [0.31]}),
    Sweep("aux", {"d_sae": [32768], "lr": [0.0005], "aux_loss_coefficient": [0.0, 0.03125, 1.0], "seed": [0, 1]}),
    Sweep(
        "aux_late",
        {"d_sae": [32768], "lr": [0.0005], "aux_loss_coefficient": [0.03125, 1.0], "seed": [0, 1]},
        sizes={"dead_after_tokens": 150_000},
    ),
    Sweep(
        "hooks",
        {"d_sae": [4096], "seed": [0, 1]},
        ["topk"],
        hooks=[
            f"blocks.{layer}.hook_{kind}"
            for kind in ("attn_out", "mlp_out", "resid_post")
            for layer in (3, 9, 15, 21, 27)
        ],
        sizes={"cached_tokens": 120_000, "held_out_tokens": 40_000},
        save_saes=True,
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="print the commands and train nothing")
    args = parser.parse_args()
    for sweep in SWEEPS:
        command = ["saelens-asi", "sweep", *sweep.arguments()]
        print(shlex.join(command), flush=True)
        if not args.list:
            # A process each, as from a shell: what one sweep holds in memory is gone before the next begins.
            code = subprocess.run([sys.executable, "-m", "saelens_asi", *command[1:]]).returncode
            if code:
                raise SystemExit(code)


if __name__ == "__main__":
    main()
