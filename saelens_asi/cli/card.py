"""A model card (README.md and a figure) into the folder of a saved SAE, as the model hub shows it.

Reads cfg.json, training_history.jsonl and the results of saelens-asi evaluate where they are there; --evaluate measures
first. A README.md that was not written by this command, or was changed since, is not written over without --force.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import simple_parsing

from saelens_asi import plots
from saelens_asi.cli import evaluate
from saelens_asi.cli.common import Command
from saelens_asi.cli.flags import DeviceFlag, LossFlag, OwnSourceFlags, PassFlags
from saelens_asi.evaluation.cards import FIGURE, CardFacts, check_writable, read_facts, write_card
from saelens_asi.evaluation.results import EvaluationFolder, saved_settings
from saelens_asi.evaluation.saes import SAESource, find_saes

logger = logging.getLogger(__name__)

# Where --evaluate writes, below the folder of the SAE; the upload leaves it out.
EVALUATION = "evaluation"


@dataclass(frozen=True, kw_only=True)
class CardFlags(DeviceFlag, LossFlag, PassFlags, OwnSourceFlags):
    """Flags of ``saelens-asi card``. Those of model and text are for --evaluate.

    Attributes:
        folder: of one SAE, as SAELens saves it.
        license: as the hub writes it, such as mit or apache-2.0; without it the card names none.
        base_model: name of the model on the hub; without it, what follows from the SAE's own config.
        results: a folder that saelens-asi evaluate wrote; without it, the SAE's own folder and the one that
            --evaluate writes below it.
        evaluate: measure first, on held-out text.
        force: write over a README.md that this command did not write.
    """

    folder: str = simple_parsing.field(positional=True, metavar="FOLDER")
    license: str | None = None
    base_model: str | None = None
    results: Path | None = None
    evaluate: bool = simple_parsing.field(default=False, action="store_true")
    force: bool = simple_parsing.field(default=False, action="store_true")
    n_tokens: int = 100_000

    @property
    def path(self) -> Path:
        return Path(self.folder)


def run(flags: CardFlags) -> Path:
    """Do what the flags ask for; returns the path of the card.

    Raises:
        ValueError: for a folder that holds no SAE, or several; for a README.md that is not ours; for bad results.
    """
    source = _source(flags.path)
    check_writable(flags.path, flags.force)
    if flags.evaluate:
        evaluate.run(
            evaluate.EvaluateFlags(
                saes=(flags.folder,), out=flags.path / EVALUATION, model=flags.model, dataset=flags.dataset,
                context_size=flags.context_size, n_tokens=flags.n_tokens, loss_tokens=flags.loss_tokens,
                batch_size=flags.batch_size, device=flags.device,
            )
        )  # fmt: skip
    facts = _with_results(read_facts(flags.path, flags.base_model, flags.license), source, flags)
    has_figure = bool(facts.history) or facts.evaluation is not None
    written = []
    if has_figure:
        written.append(plots.save(plots.card_figure(facts.history, facts.evaluation), flags.path / FIGURE))
    path = write_card(flags.path, facts, figure=has_figure, force=flags.force)
    print("Written:")
    for one in (path, *written):
        print(f"  {one}")
    return path


def _source(folder: Path) -> SAESource:
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder: give the folder of a saved SAE")
    found = find_saes([str(folder)])
    own = next((one for one in found if one.folder is not None and one.folder.resolve() == folder.resolve()), None)
    if own is None:
        raise ValueError(f"{folder} is not the folder of one SAE: below it are {', '.join(one.name for one in found)}")
    return own


def _with_results(facts: CardFacts, source: SAESource, flags: CardFlags) -> CardFacts:
    """The facts with the evaluation of this very SAE, where there is one."""
    own = (flags.path / EVALUATION, flags.path)
    seen = []
    for folder in own if flags.results is None else (flags.results,):
        settings = saved_settings(folder)
        if settings is None:
            continue
        seen.append(folder)
        found = EvaluationFolder(folder, settings).of(source)
        if found is not None:
            return replace(facts, evaluation=found, evaluated_on=settings)
    if flags.results is not None:
        raise ValueError(f"--results {str(flags.results)!r} holds no evaluation of {flags.folder} as it is now")
    if seen:
        logger.warning("what %s holds was measured on another SAE, and is not told: add --evaluate", seen[0])
    return facts


COMMAND = Command(
    name="card",
    about=__doc__ or "",
    run=run,
    settings=(CardFlags,),
    resume=lambda flags: "the same command starts again, and keeps what was measured",
)


def main(args: Sequence[str]) -> None:
    COMMAND.main(args)
