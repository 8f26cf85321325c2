"""SAELens's upload to the hub, and the cards that it would leave behind.

``sae_lens.upload_saes_to_huggingface`` sends four files of each SAE (cfg.json, sae_weights.safetensors,
sparsity.safetensors, runner_cfg.json) and no README.md; where the repository has none, it writes a list of ids as one.
A README.md that is there before, it leaves alone: so cards go first.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCardData
from huggingface_hub.repocard import metadata_load
from sae_lens import SAE, upload_saes_to_huggingface
from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME

from saelens_asi.evaluation.cards import CARD, FIGURE, REPOSITORY, SAE_ID

logger = logging.getLogger(__name__)


def upload_saes(
    saes: Mapping[str, SAE[Any] | Path | str], repository: str, revision: str = "main", show_progress: bool = True
) -> None:
    """SAELens's ``upload_saes_to_huggingface``, with the README.md and the figure of each folder that has them.

    They are put beside the SAE, below its id. The repository's own README.md, where it has none, becomes the card of a
    single SAE, or a page that leads to those of several; one that is there already stays, as SAELens does it.

    Args:
        saes: folders by id, or SAEs in memory, which have no card.
        repository: owner/name on the hub; made where it does not exist.
        revision: branch.
        show_progress: SAELens's bar.

    Raises:
        ValueError: for an empty mapping.
        FileNotFoundError: for a folder without an SAE; nothing has been uploaded then.
    """
    folders = {sae_id: Path(one) for sae_id, one in saes.items() if not isinstance(one, SAE)}
    for folder in folders.values():
        for name in (SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME):
            if not (folder / name).exists():
                raise FileNotFoundError(f"{folder / name} is missing: give the folder of a saved SAE")
    cards = {sae_id: folder for sae_id, folder in folders.items() if (folder / CARD).exists()}
    if cards:
        api = HfApi()
        api.create_repo(repository, exist_ok=True)
        for sae_id, folder in cards.items():
            text = _filled((folder / CARD).read_text(), repository, sae_id)
            _upload(api, text.encode(), f"{sae_id}/{CARD}", repository, revision)
            if (folder / FIGURE).exists():
                _upload(api, (folder / FIGURE).read_bytes(), f"{sae_id}/{FIGURE}", repository, revision)
        if api.file_exists(repository, CARD, revision=revision):
            logger.info("%s has a %s already, which stays", repository, CARD)
        else:
            _upload(api, _front_page(cards, list(saes), repository).encode(), CARD, repository, revision)
    upload_saes_to_huggingface(dict(saes), repository, hf_revision=revision, show_progress=show_progress)


def _upload(api: HfApi, content: bytes, path: str, repository: str, revision: str) -> None:
    api.upload_file(
        path_or_fileobj=content, path_in_repo=path, repo_id=repository, revision=revision, commit_message=f"Add {path}"
    )


def _filled(text: str, repository: str, sae_id: str) -> str:
    return text.replace(REPOSITORY, repository).replace(SAE_ID, sae_id)


def _front_page(cards: Mapping[str, Path], ids: list[str], repository: str) -> str:
    """README.md of the repository: the one card with its figure below the id, or a page that leads to all."""
    if len(ids) == len(cards) == 1:
        ((sae_id, folder),) = cards.items()
        text = _filled((folder / CARD).read_text(), repository, sae_id)
        return text.replace(f"]({FIGURE})", f"]({sae_id}/{FIGURE})")
    entries = [metadata_load(folder / CARD) or {} for folder in cards.values()]
    licenses = {entry.get("license") for entry in entries}
    front = ModelCardData(
        library_name="saelens",
        license=licenses.pop() if len(licenses) == 1 else None,
        base_model=_together(entries, "base_model") or None,
        datasets=_together(entries, "datasets") or None,
        tags=_together(entries, "tags") or None,
    )
    lines = [f"- [{one}]({one}/{CARD})" if one in cards else f"- {one}" for one in ids]
    load = f'from sae_lens import SAE\n\nsae = SAE.from_pretrained("{repository}", "{ids[0]}")'
    parts = [f"---\n{front.to_yaml().strip()}\n---", "# SAEs for SAELens", "\n".join(lines), f"```python\n{load}\n```"]
    return "\n\n".join(parts) + "\n"


def _together(entries: list[dict[str, Any]], name: str) -> list[str]:
    """All values of a field, each once, in their order."""
    values = [entry.get(name) or [] for entry in entries]
    lists = [[value] if isinstance(value, str) else list(value) for value in values]
    return list(dict.fromkeys(one for values in lists for one in values))
