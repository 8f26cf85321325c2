"""Model cards: what a person who meets an SAE on the hub wants to know, from the files in its folder."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from saelens_asi.activations.models import HUB_NAME, hub_name
from saelens_asi.evaluation.metrics import SAEEvaluation
from saelens_asi.evaluation.saes import read_cfg
from saelens_asi.evaluation.tables import markdown_table
from saelens_asi.history import TRAINING_HISTORY, Record, read_history
from saelens_asi.initialization import METADATA_KEY
from saelens_asi.resume import written_whole

CARD, FIGURE = "README.md", "saelens_asi_card.png"

# What stands in a card until it is uploaded.
REPOSITORY, SAE_ID = "<owner/repository>", "<sae id>"

_MARK = re.compile(r"<!-- Written by saelens-asi card, ([0-9a-f]{16})\. [^\n]*-->\n")
_PAPER = "https://arxiv.org/abs/2508.16929"


@dataclass(frozen=True)
class CardFacts:
    """What a card tells.

    Attributes:
        cfg: of cfg.json.
        history: records of the training; none where there was no file.
        evaluation: on text that the SAE was not trained on; None where there is none.
        evaluated_on: settings of the evaluation.
        base_model: name of the model on the hub; None where it is not known.
        license: as the hub writes it; None where the user has not said.
    """

    cfg: Mapping[str, Any]
    history: Sequence[Record] = ()
    evaluation: SAEEvaluation | None = None
    evaluated_on: Mapping[str, Any] = field(default_factory=dict)
    base_model: str | None = None
    license: str | None = None

    @property
    def metadata(self) -> Mapping[str, Any]:
        found = self.cfg.get("metadata")
        return found if isinstance(found, Mapping) else self.cfg

    @property
    def provenance(self) -> Mapping[str, Any]:
        """The record of the Active Subspace Initialization; empty where there was none."""
        return self.metadata.get(METADATA_KEY) or {}


def read_facts(folder: Path, base_model: str | None = None, license: str | None = None) -> CardFacts:
    """What the folder of an SAE says of itself, but for evaluations.

    Raises:
        ValueError: for a folder without a readable cfg.json, and for a history that is damaged.
    """
    cfg = read_cfg(folder)
    history = read_history(folder) if (folder / TRAINING_HISTORY).exists() else []
    facts = CardFacts(cfg, history, license=license)
    return CardFacts(cfg, history, base_model=base_model or hub_name(facts.metadata.get("model_name")), license=license)


def check_writable(folder: Path, force: bool = False) -> None:
    """Raise ValueError where a README.md stands that is not as ``write_card`` wrote it; ``force`` allows it."""
    path = folder / CARD
    if not force and path.exists() and not is_own(path.read_text()):
        raise ValueError(f"{path} was not written by saelens-asi card, or was changed since: --force writes over it")


def is_own(text: str) -> bool:
    """Whether a README.md is a card of ours that nobody has changed."""
    mark = _MARK.search(text)
    return mark is not None and mark[1] == _checksum(text[: mark.start()] + text[mark.end() :])


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_card(folder: Path, facts: CardFacts, *, figure: bool, force: bool = False) -> Path:
    """Write README.md, whole or not at all.

    Args:
        folder: of the SAE.
        facts: what it tells.
        figure: whether ``FIGURE`` lies beside it.
        force: write over a README.md that is not ours.

    Raises:
        ValueError: for a README.md that is not ours.
    """
    check_writable(folder, force)
    front, body = front_matter(facts), card_body(facts, figure)
    checksum = _checksum(front + body)
    mark = f"<!-- Written by saelens-asi card, {checksum}. Once changed by hand, it is not written over. -->\n"
    with written_whole(folder / CARD) as unfinished:
        unfinished.write_text(front + mark + body)
    return folder / CARD


def front_matter(facts: CardFacts) -> str:
    """The YAML block that the hub reads, between its rules."""
    dataset = facts.metadata.get("dataset_path")
    own = ["active-subspace-initialization"] if facts.provenance else []
    data = ModelCardData(
        library_name="saelens",
        license=facts.license,
        base_model=facts.base_model,
        datasets=[dataset] if isinstance(dataset, str) and HUB_NAME.fullmatch(dataset) else None,
        tags=["saelens", "sparse-autoencoder", "mechanistic-interpretability", str(facts.cfg["architecture"]), *own],
    )
    return f"---\n{data.to_yaml().strip()}\n---\n"


def card_body(facts: CardFacts, figure: bool) -> str:
    """Everything below the front matter."""
    cfg, metadata = facts.cfg, facts.metadata
    hook, model = metadata.get("hook_name") or "an unnamed hook", facts.base_model or metadata.get("model_name")
    k = f", k = {cfg['k']}" if cfg.get("k") else ""
    on_hub = f"[{model}](https://huggingface.co/{model})" if facts.base_model else f"{model or 'an unnamed model'}"
    parts = [
        f"# {cfg['d_sae']:,} features of {hook}" + (f" of {str(model).split('/')[-1]}" if model else ""),
        f"A sparse autoencoder ({cfg['architecture']}{k}) that takes the {cfg['d_in']:,}-dimensional activations at "
        f"`{hook}` of {on_hub} apart into {cfg['d_sae']:,} features, trained with "
        "[SAELens](https://github.com/decoderesearch/SAELens)"
        + (" and `saelens_asi`." if facts.provenance or facts.history else "."),
    ]
    if figure:
        parts.append(f"![how it was trained, and how often its features fire]({FIGURE})")
    parts += [_metrics(facts), _loading(hook), _provenance(facts)]
    if facts.provenance:
        parts.append(
            "## Cite\n\nWang, Ge, Shu, He, Qiu, *Dimensional Collapse in Transformer Attention Outputs: A Challenge "
            f"for Sparse Dictionary Learning*, [arXiv 2508.16929]({_PAPER})."
        )
    return "\n\n".join(["", *filter(None, parts)]).removeprefix("\n") + "\n"


def _metrics(facts: CardFacts) -> str:
    found = facts.evaluation
    if found is None:
        return ""
    rows = {
        "dead features": f"{100 * found.dead_fraction:.3g} % ({found.n_dead:,} of {found.d_sae:,})",
        "normalized MSE": f"{found.nmse:.4g}",
        "explained variance": f"{found.explained_variance:.4g}",
        "L0": f"{found.l0:.4g}",
    }
    if found.loss is not None:
        shares = found.loss.to_dict()
        for name, key in (("cross-entropy recovered", "recovered"), ("KL divergence recovered", "kl_recovered")):
            rows[name] = "-" if shares[key] is None else f"{shares[key]:.4g}"
    on = facts.evaluated_on
    text = f" of {on['dataset']}" if on.get("dataset") else ""
    # Whether the SAE was trained on them, only its user knows.
    which = "" if on.get("all_text") else " (the documents that saelens-asi's own commands hold out)"
    lines = [
        "## Metrics",
        "",
        markdown_table(["measure", "value"], [[key, value] for key, value in rows.items()], align="lr"),
        "",
        f"On {found.n_tokens:,} tokens{text}{which}, special tokens left out (`saelens-asi evaluate`). Dead: fires "
        "on none of them. Normalized MSE: E|x - x_hat|^2 / E|x - E x|^2; explained variance is 1 less that.",
    ]
    if found.loss is not None:
        lines[-1] += (
            f" Recovered, over {found.loss.n_tokens:,} predictions: 0 is the hook set to zero, 1 the model as it is; "
            "cross-entropy can pass 1 where the hook's own output raises the loss."
        )
    return "\n".join(lines)


def _loading(hook: str) -> str:
    return "\n".join(
        [
            "## Load",
            "",
            "```python",
            "from sae_lens import SAE",
            "",
            f'sae = SAE.from_pretrained("{REPOSITORY}", "{SAE_ID}")  # or, from a folder: SAE.load_from_disk("folder")',
            f"features = sae.encode(activations)  # (..., d_in) at {hook} -> (..., d_sae)",
            "```",
            "",
            "`pip install sae-lens` is enough: nothing of `saelens_asi` is needed to load or use it.",
        ]
    )


def _provenance(facts: CardFacts) -> str:
    """What is known of how it was made, one line a fact, with the name of the config's own field."""
    cfg, metadata, own = facts.cfg, facts.metadata, facts.provenance
    details = metadata.get("training_architecture_details") or {}
    trained = facts.history[-1] if facts.history else {}
    rows = {
        "text": metadata.get("dataset_path"),
        "tokens trained on": trained.get("n_tokens"),
        "context size": metadata.get("context_size"),
        "BOS in front": metadata.get("prepend_bos"),
        "special tokens left out": metadata.get("exclude_special_tokens"),
        "activations normalized": cfg.get("normalize_activations"),
        "trained as": metadata.get("training_architecture"),
        "optimizer": details.get("optimizer"),
        "moments of silent features": details.get("silent_moments"),
        "initializer": "Active Subspace Initialization" if own else None,
        "directions of the start (d_init)": own.get("d_init"),
        "share of variance in them": own.get("variance_explained"),
        "effective rank of the activations": own.get("effective_rank"),
        "length of the mean over the deviation": own.get("mean_to_deviation"),
        "length of the rows at the start": own.get("norm"),
        "normalized MSE at the start": own.get("initial_nmse"),
        "tokens behind the initialization": own.get("n_tokens"),
        "normalized MSE of the last batch": trained.get("nmse"),
        "never fired in training": trained.get("never_fired"),
        "features revived": metadata.get("n_revived_features"),
        "tokens skipped": metadata.get("n_skipped_tokens"),
        "sae-lens": metadata.get("sae_lens_training_version") or metadata.get("sae_lens_version"),
        "saelens_asi": own.get("saelens_asi_version"),
    }
    cells = [[name, _plain(value)] for name, value in rows.items() if value is not None]
    table = markdown_table(["", ""], cells, align="ll")
    return f"## Provenance\n\n{table}\n\nAll settings are in `cfg.json`, those of the run in `runner_cfg.json`."


def _plain(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    text = f"{value:.4g}" if isinstance(value, float) else " ".join(str(value).split())
    return text.replace("|", "\\|")
