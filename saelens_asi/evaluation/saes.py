"""SAEs as they are used in inference: found in folders and on the hub, loaded, and applied to vectors."""

from __future__ import annotations

import difflib
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE, TrainingSAE
from sae_lens.constants import (
    ACTIVATION_SCALER_CFG_FILENAME,
    SAE_CFG_FILENAME,
    SAE_WEIGHTS_FILENAME,
    TRAINER_STATE_FILENAME,
)
from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory
from sae_lens.training.activation_scaler import ActivationScaler

from saelens_asi.activations.sae_state import SCALED_OUTSIDE
from saelens_asi.resume import checksum, is_unfinished, tensor_metadata

logger = logging.getLogger(__name__)


@torch.no_grad()
def inference_form(sae: SAE) -> SAE:
    """The SAE as SAELens would save it for inference, where that is another architecture; otherwise itself.

    BatchTopK and its Matryoshka variant become JumpReLU with the threshold of their training: while they train, what
    fires on a token depends on the other tokens of the batch.
    """
    if not isinstance(sae, TrainingSAE):
        return sae
    try:
        cfg_class = sae.cfg.get_inference_config_class()
    except KeyError:  # an architecture registered for training alone
        return sae
    if cfg_class.architecture() == sae.cfg.architecture():
        return sae
    values = sae.cfg.get_inference_sae_cfg_dict()
    state = {name: value.detach().clone() for name, value in sae.state_dict().items()}
    sae.process_state_dict_for_saving_inference(state)
    inference_sae = SAE.from_dict({**values, "device": "meta"})
    inference_sae.load_state_dict(state, assign=True)
    return inference_sae.to(device=str(sae.device))


@torch.no_grad()
def check_weights(sae: SAE) -> None:
    """Raise ValueError, with the weights' names, where they are not finite. An infinite threshold never fires."""
    bad = {
        name: int((weights.isnan() if name == "threshold" else ~weights.isfinite()).sum())
        for name, weights in sae.state_dict().items()
        if weights.is_floating_point()
    }
    named = ", ".join(f"{count:,} of {name}" for name, count in bad.items() if count)
    if named:
        raise ValueError(f"weights are NaN or infinite ({named}): train it again, or take an earlier checkpoint")


def check_sae(sae: SAE, name: str) -> None:
    """Raise ValueError for what is no SAE of single activations, and for weights or a k that cannot be used.

    Warns of a scale that is not part of the weights.
    """
    which = repr(name) if name else "this"
    architecture = sae.cfg.architecture()
    if hasattr(sae.cfg, "d_out"):
        raise ValueError(f"{which} is a {architecture}: it predicts another hook than it reads; give SAEs only")
    if architecture == "temporal":
        raise ValueError(f"{which} is a temporal SAE, which encodes whole sequences: give SAEs of single activations")
    k = getattr(sae.cfg, "k", None)
    if k is not None and not 0 < k <= sae.cfg.d_sae:
        raise ValueError(f"{which} has k={k}, which must be from 1 to its d_sae={sae.cfg.d_sae}: correct its cfg.json")
    try:
        check_weights(sae)
    except ValueError as error:
        raise ValueError(f"{repr(name) if name else 'sae'}: {error}") from None
    mode = sae.cfg.normalize_activations
    if mode in SCALED_OUTSIDE:
        logger.warning(
            "%s was trained with normalize_activations=%r, and its weights do not hold that scale yet: they see raw "
            "activations. Fold it first (sae.fold_activation_norm_scaling_factor), or load a finished SAE",
            which, mode,
        )  # fmt: skip


def warn_of_other_windows(sae: SAE, name: str, data: object, exclude_positions: Sequence[int]) -> None:
    """Warn where an SAE was trained on other positions, or without the BOS in front of every window of text."""
    which, metadata = repr(name) if name else "this SAE", sae.cfg.metadata
    if metadata.prepend_bos is False and "text" in (getattr(data, "column_names", None) or ()):
        logger.warning(
            "%s was trained with prepend_bos=False, but text is packed with BOS in front of every window: give token "
            "ids to evaluate it without", which,
        )  # fmt: skip
    positions, window = tuple(metadata.seqpos_slice or (None,)), range(metadata.context_size or 1024)
    if window[slice(*positions)] != window and not exclude_positions:
        logger.warning(
            "%s was trained with seqpos_slice=%s, but is evaluated on all positions: leave the others out with "
            "exclude_positions", which, positions,
        )  # fmt: skip


@dataclass(frozen=True)
class SAESource:
    """Where an SAE comes from: a folder, or a release of SAELens's list with an id."""

    name: str
    folder: Path | None = None
    release: str = ""
    sae_id: str = ""

    def identity(self) -> dict[str, str | int]:
        """What tells this SAE from another one under the same name, as plain values; where files miss, of those left.

        A cfg.json is told by its content: with another k or threshold the same weights are another SAE.
        """
        if self.folder is None:
            return {"release": self.release, "sae_id": self.sae_id}
        own: dict[str, str | int] = {"folder": str(self.folder.resolve())}
        weights, cfg = self.folder / SAE_WEIGHTS_FILENAME, self.folder / SAE_CFG_FILENAME
        if weights.exists():
            own |= {"bytes": weights.stat().st_size, "modified_ns": weights.stat().st_mtime_ns}
        return own | ({"cfg": checksum(cfg)} if cfg.is_file() else {})

    def load(self, device: str = "cpu", dtype: str | None = None) -> SAE:
        """The SAE, ready for inference, normalization folded into its weights.

        Raises:
            ValueError: where it cannot be loaded, or holds weights that are not finite; names its file or folder.
        """
        place = self.folder or "/".join(filter(None, (self.release, self.sae_id)))
        if self.folder is not None:
            read_cfg(self.folder)
            _check_readable(self.folder / SAE_WEIGHTS_FILENAME)
        try:
            # To the CPU first: what goes wrong with the device is not the files' fault.
            sae = self._on_cpu(dtype)
            check_weights(sae)
        except MemoryError:
            raise
        except Exception as error:  # whatever SAELens meets in a config or in tensors that it does not expect
            own = isinstance(error, ValueError | OSError)
            what = str(error) if own else f"{type(error).__name__}: {error}"
            raise ValueError(f"{place} cannot be loaded: {' '.join(what.split())}") from None
        return sae.to(device=device)

    def _on_cpu(self, dtype: str | None) -> SAE:
        if self.folder is None:
            return SAE.from_pretrained(self.release, self.sae_id, device="cpu", dtype=dtype or "float32")
        if not (self.folder / TRAINER_STATE_FILENAME).exists():
            return SAE.load_from_disk(self.folder, dtype=dtype)
        sae = TrainingSAE.load_from_disk(self.folder, dtype=dtype)
        scaler = ActivationScaler()
        if (self.folder / ACTIVATION_SCALER_CFG_FILENAME).exists():
            scaler = _scaler(self.folder / ACTIVATION_SCALER_CFG_FILENAME)
        if scaler.scaling_factor is not None:
            sae.fold_activation_norm_scaling_factor(scaler.scaling_factor)
        if scaler.whitening is not None:
            whitening = scaler.whitening
            sae.fold_activation_whitening(whitening.mean, whitening.matrix, whitening.inverse_matrix)
        return inference_form(sae)


def read_cfg(folder: Path) -> dict[str, Any]:
    """What the cfg.json of an SAE's folder holds. Raises ValueError, with its path, where that is no JSON object."""
    return _json_object(folder / SAE_CFG_FILENAME)


def _json_object(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise ValueError(f"{path} is missing")
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read, or is damaged: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} is damaged: it holds no JSON object")
    return values


def _check_readable(path: Path) -> None:
    if not path.exists():
        raise ValueError(f"{path} is missing")
    tensor_metadata(path)


def _scaler(path: Path) -> ActivationScaler:
    """The scaler of a checkpoint. Raises ValueError, with its path, where it cannot be read."""
    values, scaler = _json_object(path), ActivationScaler()
    try:
        scaler.load(path)
    except Exception as error:  # a value that is missing, or tensors that are damaged
        raise ValueError(f"{path}, or the whitening beside it, is damaged: {type(error).__name__}: {error}") from None
    if values.get("has_whitening") and scaler.whitening is None:
        raise ValueError(f"{path} tells of a whitening, whose file is missing beside it")
    return scaler


def find_saes(names: Sequence[str]) -> list[SAESource]:
    """SAEs by what a person writes: a folder, a folder of folders, ``release``, ``release/sae_id`` (``*`` allowed).

    Names are unique: ids, or paths below the folders given.

    Raises:
        ValueError: for a name that leads to none, with the nearest releases.
    """
    sources = [one for name in names for one in (_in_folder(Path(name)) if Path(name).is_dir() else _on_hub(name))]
    if len({source.name for source in sources}) < len(sources):
        sources = [replace(one, name=str(one.folder or f"{one.release}/{one.sae_id}")) for one in sources]
    return list({source.name: source for source in sources}.values())


def _in_folder(root: Path) -> list[SAESource]:
    weights = {path.parent for path in root.rglob(SAE_WEIGHTS_FILENAME)}
    # An SAE whose weights are lost is one that cannot be loaded, not one that nobody asked for.
    alone = {path.parent for path in root.rglob(SAE_CFG_FILENAME) if path.parent not in weights and _is_of_sae(path)}
    whole = (one for one in weights | alone if not any(map(is_unfinished, one.relative_to(root).parts)))
    folders = sorted(whole, key=_natural)
    if not folders:
        raise ValueError(
            f"{root} holds no SAE: nowhere below it are {SAE_CFG_FILENAME} and {SAE_WEIGHTS_FILENAME}, which "
            "SAELens saves"
        )
    return [SAESource(root.resolve().name if path == root else str(path.relative_to(root)), path) for path in folders]


def _is_of_sae(path: Path) -> bool:
    try:
        return {"architecture", "d_sae"} <= _json_object(path).keys()
    except ValueError:
        return False


def _natural(path: Path) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in str(path).replace("/", ".").split(".")]


def _on_hub(name: str) -> list[SAESource]:
    directory = get_pretrained_saes_directory()
    releases = [one for one in directory if name == one or name.startswith(f"{one}/")]
    if releases:
        release = max(releases, key=len)
        ids, pattern = list(directory[release].saes_map), name[len(release) + 1 :]
        matches = [one for one in ids if not pattern or one == pattern or fnmatchcase(one, pattern)]
        if not matches:
            near = difflib.get_close_matches(pattern, ids, n=3, cutoff=0) or ids[:3]
            raise ValueError(
                f"release {release!r} has no SAE {pattern!r}; did you mean {' or '.join(map(repr, near))}?"
            )
        return [SAESource(one, None, release, one) for one in matches]
    repository, sae_id = "/".join(name.split("/")[:2]), "/".join(name.split("/")[2:])
    if sae_id and not Path(name).is_absolute() and not name.startswith("."):
        return [SAESource(sae_id, None, repository, sae_id)]
    near = difflib.get_close_matches(name, directory, n=3)
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else "."
    raise ValueError(
        f"{name!r} is no folder here and no release of SAELens's pretrained SAEs{hint} Give a folder, release/sae_id, "
        "or owner/repository/path on the hub"
    )


@contextmanager
def on_flat_vectors(sae: SAE) -> Iterator[SAE]:
    """An SAE as it encodes (n, d_in) vectors in inference: no training mode, heads laid side by side.

    SAELens's SAEs for ``hook_z`` otherwise expect a dimension of heads. What was set is put back.
    """
    was_training, had_heads = getattr(sae, "training", False), getattr(sae, "hook_z_reshaping_mode", False)
    if was_training:
        sae.eval()
    if had_heads:
        sae.turn_off_forward_pass_hook_z_reshaping()
    try:
        yield sae
    finally:
        if had_heads:
            sae.turn_on_forward_pass_hook_z_reshaping()
        if was_training:
            sae.train()
