"""Which SAE can I afford: error, dead features, hours and memory by size, before a run, from a minute of timing.

Writes plan.md, plan.json and plan.png. Short trainings at small sizes say what steps cost on this machine and what
error this hook allows; a model that was fitted on sweeps carries both to other sizes.

    saelens-asi plan --model gpt2 --dataset NeelNanda/pile-10k --hooks attn_out --budget-hours 12 --memory 24GiB
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from saelens_asi import plots
from saelens_asi.cli.common import Command
from saelens_asi.cli.flags import (
    DTYPES,
    DeviceFlag,
    DtypeFlag,
    HookFlags,
    OutFlag,
    SourceFlags,
    one_hook,
    open_model,
    open_text,
)
from saelens_asi.planning import Plan, plan
from saelens_asi.planning.make import D_SAE, K, PilotSizes
from saelens_asi.planning.memory import parse_bytes


@dataclass(frozen=True, kw_only=True)
class PlanFlags(OutFlag, DeviceFlag, DtypeFlag, HookFlags, SourceFlags):
    """Flags of ``saelens-asi plan``.

    Attributes:
        d_sae: numbers of features.
        k: numbers of features active on a token.
        tokens: to train on; without it those that the hours reach and a tenth of them, or 300,000 to 10 million.
        budget_hours: that a run may take.
        memory: that it may take, such as 24GiB.
        counted_on: tokens that dead features are counted on.
        batch_size: windows in a forward pass.
    """

    d_sae: tuple[int, ...] = D_SAE
    k: tuple[int, ...] = K
    tokens: tuple[int, ...] = ()
    budget_hours: float | None = None
    memory: str | None = None
    counted_on: int = 1_000_000
    batch_size: int = 32
    out: Path = Path("plan_output")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.memory is not None:
            parse_bytes(self.memory)


def run(flags: PlanFlags, pilots: PilotSizes | None = None) -> Plan:
    """Do what the flags ask for."""
    pilots = pilots or PilotSizes()
    model = open_model(flags.model, flags.device, DTYPES[flags.dtype])
    hook = one_hook(flags.hooks, flags.layers, lambda: model.cfg.n_layers)
    text, _ = open_text(flags.dataset, pilots.n_activations)
    made = plan(
        model, text, hook,
        d_sae=flags.d_sae, k=flags.k, tokens=flags.tokens or None,
        budget_hours=flags.budget_hours, memory=flags.memory, counted_on=flags.counted_on,
        context_size=flags.context_size, batch_size=flags.batch_size, device=flags.device, pilots=pilots,
    )  # fmt: skip
    made = replace(made, model=flags.model, dataset=flags.dataset)
    write(made, flags.out)
    return made


def write(made: Plan, out: Path) -> None:
    """The page, the same as JSON, and the figure."""
    out.mkdir(parents=True, exist_ok=True)
    figure = plots.save(plots.plan_figure(made), out / "plan.png")
    page = out / "plan.md"
    page.write_text(f"# Plan\n\n{made}\n\n![error against hours]({figure.name})\n\n## All sizes\n\n{made.table()}\n")
    data = made.save(out / "plan.json")
    print(f"\n{made}\n\nWritten:")
    print("\n".join(f"  {path}" for path in (page, data, figure)))


COMMAND = Command(
    name="plan",
    about=__doc__ or "",
    run=run,
    settings=(PlanFlags,),
    resume=lambda flags: "a plan keeps nothing on the way, the same command starts again",
)


def main(args: Sequence[str]) -> None:
    COMMAND.main(args)
