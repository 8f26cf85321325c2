"""Checkpoints of a run: when they are due, that they are whole, which stay, and which one a resume goes on from."""

from __future__ import annotations

import json
import logging
import pickle
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sae_lens.constants import SAE_CFG_FILENAME
from safetensors import SafetensorError

from saelens_asi.plugin.fields import FLAGS
from saelens_asi.plugin.launch import is_loss
from saelens_asi.resume import (
    DISK_ERRORS,
    MANIFEST,
    CheckpointClock,
    ElsewhereError,
    damage,
    differences,
    folder_written_whole,
    read_manifest,
    remove_unfinished,
)
from saelens_asi.sparse.shards import ALONE, Group

logger = logging.getLogger(__name__)

LATEST = "latest"

Reason = Literal["interval", "interrupt", "failure", "asked for"]

# Of an SAE's config: of another machine, of the weights' start, or of how the run is kept. A resume may change them.
_FREE = {
    *("metadata", "device", "initializer", "sae_lens_version", "sae_lens_training_version", "decoder_init_norm"),
    *("checkpoint_minutes", "keep_checkpoints", "checkpoint_buffer", "max_skipped_fraction", "resume"),
    *("batch_shards", "revive"),
}
# Of its metadata: what the activations are.
_DATA_METADATA = ("hook_name", "hook_head_index", "model_name", "dataset_path", "context_size", "prepend_bos")


@dataclass(frozen=True)
class KeepSettings:
    """How a run is kept: the plugin's fields of that name."""

    checkpoint_minutes: float
    keep_checkpoints: int
    checkpoint_buffer: float

    @classmethod
    def of(cls, cfg: Any) -> KeepSettings:
        return cls(cfg.checkpoint_minutes, cfg.keep_checkpoints, cfg.checkpoint_buffer)

    @property
    def buffer_bytes(self) -> float:
        return self.checkpoint_buffer * 2**30


class Keeper:
    """The checkpoints in one folder.

    Args:
        settings: how often, how many.
        folder: of the run's checkpoints.
        facts: what a manifest tells of the run, the settings that a resume has to share among it.
        group: of the processes that write a checkpoint together; the first of them removes others, and says what is
            written.
    """

    def __init__(
        self, settings: KeepSettings, folder: Path, facts: Callable[[], Mapping[str, Any]], group: Group = ALONE
    ) -> None:
        self.folder, self.settings, self._facts, self._group = folder, settings, facts, group
        self.clock = CheckpointClock(settings.checkpoint_minutes)
        self.last_good: Path | None = None

    def is_due(self, name: str) -> bool:
        """Whether a checkpoint by time is due, that would have this name."""
        return self.last_good != self.folder / name and self.clock.is_due()

    @contextmanager
    def writing(self, name: str, reason: Reason) -> Iterator[Path]:
        """A temporary folder that becomes the checkpoint ``name``; those that need not stay are removed after it."""
        path = self.folder / name
        if self._group.is_first:
            remove_unfinished(self.folder)
        facts = {**self._facts(), "reason": reason, "written": time.time()}
        with self.clock.timed(), folder_written_whole(path, facts, self._group) as unfinished:
            yield unfinished
        self.last_good = path
        if self._group.is_first:
            logger.info("wrote checkpoint %s in %.1f s (%s)", path, self.clock.seconds_of_last, reason)
            self._remove_old()

    def save_or_warn(self, save: Callable[[], None]) -> None:
        """Save a checkpoint that the run can go on without: a disk that is full ends no training."""
        try:
            save()
        except DISK_ERRORS as error:
            if is_loss(error) or (isinstance(error, ElsewhereError) and not error.of_disk):
                raise  # that process's run ends, and with it all
            if not self._group.is_first:
                return
            kept = f"the last good one is {self.last_good}" if self.last_good else "there is none yet"
            logger.warning("no checkpoint was written (%s): %s; the run goes on, and tries again later", error, kept)

    def _remove_old(self) -> None:
        run = self._facts().get("run")
        mine = [
            (manifest["written"], path)
            for path, manifest in _checkpoints(self.folder)
            if manifest.get("run") == run and manifest.get("reason") != "asked for"
        ]
        for _, path in sorted(mine)[: -self.settings.keep_checkpoints]:
            shutil.rmtree(path, ignore_errors=True)


def _checkpoints(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    for path in sorted(folder.glob(f"*/{MANIFEST}")) + sorted(folder.glob(f".*/{MANIFEST}")):
        manifest = read_manifest(path.parent)
        if manifest is not None and isinstance(manifest.get("written"), int | float):
            yield path.parent, manifest


def find_latest(folders: list[Path], misfit: Callable[[Path], str], since: float = 0.0) -> Path | None:
    """The newest whole checkpoint in any of the folders that fits; None where there is no checkpoint at all.

    Args:
        folders: each may hold checkpoints.
        misfit: the difference between a checkpoint and this run, in words; empty where there is none.
        since: what was written before is left out; in seconds since 1970.

    Raises:
        ValueError: when there are whole checkpoints, and none fits.
    """
    found = {
        path: manifest
        for folder in dict.fromkeys(folders)
        for path, manifest in _checkpoints(folder)
        if manifest["written"] >= since
    }
    refused = []
    for path in sorted(found, key=lambda one: found[one]["written"], reverse=True):
        broken = damage(path)
        if broken is not None:
            logger.warning("checkpoint %s is passed over: %s", path, broken)
            continue
        difference = misfit(path)
        if not difference:
            return path
        refused.append(f"{path} ({difference})")
    if refused:
        raise ValueError(
            f"resume_from_checkpoint='latest': no checkpoint is of a run with these settings: "
            f"{'; '.join(refused[:3])}. Set them as they were, set checkpoint_path to another folder, or leave it out"
        )
    return None


def check_whole(path: Path) -> None:
    """Raise ValueError for a checkpoint that is not there, or damaged. SAELens's own have no manifest to check."""
    if not path.is_dir():
        raise ValueError(f"resume_from_checkpoint={str(path)!r} is no folder: give that of a checkpoint, or 'latest'")
    if (path / MANIFEST).exists():
        broken = damage(path)
        if broken is not None:
            raise ValueError(
                f"resume_from_checkpoint={str(path)!r} is damaged: {broken}. Give another checkpoint, or 'latest', "
                "which takes the newest whole one"
            )


def refuse_misfit(path: Path, difference: str) -> None:
    """Raise ValueError for a checkpoint that differs from the run that would go on from it."""
    if difference:
        raise ValueError(
            f"resume_from_checkpoint={str(path)!r} is of another run ({difference}): set these as they were, or leave "
            "resume_from_checkpoint out"
        )


def sae_misfit(path: Path, cfg: Any) -> str:
    """How the SAE of a checkpoint differs from the one that would go on from it, in words."""
    try:
        saved = json.loads((path / SAE_CFG_FILENAME).read_text())
        if not isinstance(saved, dict):
            raise ValueError("it is no JSON object")
    except (OSError, ValueError) as error:
        return f"{SAE_CFG_FILENAME} cannot be read: {error}"
    now = json.loads(json.dumps(cfg.to_dict()))
    then, today = saved.get("metadata") or {}, now.get("metadata") or {}
    both = {name for name in _DATA_METADATA if then.get(name) is not None and today.get(name) is not None}
    return differences(
        {**_compared(saved), **{name: then[name] for name in both}},
        {**_compared(now), **{name: today[name] for name in both}},
    )


def _compared(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of an SAE that training goes by; a flag at its default is not written, so it is filled in."""
    return {name: value for name, value in {**FLAGS, **values}.items() if name not in _FREE}


def run_misfit(path: Path, settings: Mapping[str, Any]) -> str:
    """How the settings of a checkpoint's run differ from these, in words; of those that both name."""
    manifest = read_manifest(path)
    saved = (manifest or {}).get("settings") or {}
    now = {name: value for name, value in settings.items() if name in saved}
    return differences({name: value for name, value in saved.items() if name in now}, now)


def how_to_resume(checkpoint: Path | None) -> str:
    if checkpoint is None:
        return "there is no checkpoint to resume from"
    return f"set resume_from_checkpoint={str(checkpoint)!r}, or 'latest', to go on from there"


@contextmanager
def said_of(checkpoint: Path) -> Iterator[None]:
    """Errors of the libraries that read a checkpoint, in one line that names it."""
    try:
        yield
    except (OSError, RuntimeError, KeyError, EOFError, SafetensorError, pickle.UnpicklingError) as error:
        raise ValueError(f"resume_from_checkpoint={str(checkpoint)!r} cannot be read: {error}") from error
