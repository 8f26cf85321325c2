"""``saelens-asi train``: SAELens's own command line, with ``--initializer`` and ``--optimizer``."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sae_lens import LanguageModelSAERunnerConfig
from sae_lens.constants import TRAINER_STATE_FILENAME

from saelens_asi.cli.common import ends_in_one_line, set_up_logging

PROGRAM = "saelens-asi train"


def parse(args: Sequence[str]) -> LanguageModelSAERunnerConfig[Any]:
    """SAELens's parser, under our name. Raises ValueError or argparse.ArgumentError for a flag that is wrong."""
    from sae_lens.llm_sae_training_runner import _parse_cfg_args

    errors = io.StringIO()
    with _program_called(PROGRAM), contextlib.redirect_stderr(errors):
        try:
            return _parse_cfg_args(list(args))
        except SystemExit as stop:
            if not stop.code:
                raise
    # argparse shows the usage, some hundred lines, and then what is wrong.
    raise ValueError(errors.getvalue().rpartition(f"{PROGRAM}: error: ")[2])


@contextlib.contextmanager
def _program_called(name: str) -> Iterator[None]:
    """argparse takes the name of the program from the command line; SAELens's parser has no other way in."""
    before = sys.argv
    sys.argv = [name, *before[1:]]
    try:
        yield
    finally:
        sys.argv = before


def how_to_resume(cfg: LanguageModelSAERunnerConfig[Any]) -> str:
    """The flag that continues from the last checkpoint, which SAELens writes when it is interrupted."""
    if cfg.checkpoint_path is None:
        return "no checkpoint was kept, give --checkpoint_path to be able to continue"
    states = sorted(Path(cfg.checkpoint_path).rglob(TRAINER_STATE_FILENAME), key=lambda path: path.stat().st_mtime)
    if not states:
        return f"no checkpoint is in {cfg.checkpoint_path} yet, the same command starts again"
    return f"the same command with --resume_from_checkpoint {states[-1].parent} continues"


def main(args: Sequence[str]) -> None:
    from sae_lens.llm_sae_training_runner import LanguageModelSAETrainingRunner

    set_up_logging(logging.INFO)
    parsed: list[LanguageModelSAERunnerConfig[Any]] = []
    with ends_in_one_line("train", lambda: how_to_resume(parsed[0]) if parsed else "nothing has been done yet"):
        parsed.append(parse(args))
        LanguageModelSAETrainingRunner(cfg=parsed[0]).run()
