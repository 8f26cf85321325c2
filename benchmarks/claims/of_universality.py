"""The paper's figure 1 on both model families and three kinds of text: ranks of every layer, and claims about them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.claims.evidence import Claim, Record, ResultFiles
from benchmarks.claims.sources import MODEL_TITLES, TEXT_TITLES
from benchmarks.claims.statistics import Pair, verdict
from benchmarks.claims.universality import BEFORE_NORM, MODELS, PART, TEXTS
from saelens_asi.evaluation.tables import markdown_table

COMMAND = "make claims"
KINDS = ("attn_out", "mlp_out", "resid_post", "hook_z")
ATTENTION_BEFORE, MLP_BEFORE = BEFORE_NORM.values()


@dataclass(frozen=True)
class Measured:
    """All layers of one model on one text.

    Attributes:
        model: as ``load_model`` names it.
        text: as ``load_documents`` names it.
        rows: of the results file, one a hook.
    """

    model: str
    text: str
    rows: Sequence[Record]

    def by_layer(self, kind: str, column: str = "effective_rank_share") -> dict[int, float]:
        return {row["layer"]: row[column] for row in self.rows if row["kind"] == kind}

    def mean(self, kind: str, column: str = "effective_rank_share") -> float:
        values = self.by_layer(kind, column).values()
        return sum(values) / len(values)

    @property
    def kinds(self) -> list[str]:
        known = {row["kind"] for row in self.rows}
        return [kind for kind in (*KINDS, *BEFORE_NORM.values()) if kind in known]

    @property
    def written_by_attention(self) -> str:
        """The kind that W_O writes: before the norm where one follows."""
        return ATTENTION_BEFORE if ATTENTION_BEFORE in self.kinds else "attn_out"


def passes(e: ResultFiles) -> list[Measured]:
    """Those that are whole, in the order of models and texts."""
    rows = e.parts.get(PART, [])
    found = []
    for model in MODELS:
        for text in TEXTS:
            own = [row for row in rows if (row["model"], row["text"]) == (model, text)]
            if any(row["last"] for row in own):
                found.append(Measured(model, text, own))
    if not found:
        raise ValueError(f"results/claims/{PART}.jsonl holds no whole pass: run python -m benchmarks.claims.{PART}")
    return found


def by_model(e: ResultFiles) -> dict[str, list[Measured]]:
    found = passes(e)
    return {model: own for model in MODELS if (own := [one for one in found if one.model == model])}


def _over_texts(own: Sequence[Measured], kind: str, column: str = "effective_rank_share") -> float:
    return sum(one.mean(kind, column) for one in own) / len(own)


def _pairs(own: Sequence[Measured], lower: str, others: Sequence[str]) -> Iterator[Pair]:
    for one in own:
        for kind in others:
            yield Pair(one.by_layer(lower), one.by_layer(kind))


def collapse_everywhere(e: ResultFiles) -> Claim:
    """Order of the kinds, and the paper's levels."""
    conditions: list[Pair | bool] = []
    parts = []
    for model, own in by_model(e).items():
        order = list(_pairs(own, "attn_out", ("mlp_out", "resid_post")))
        shares = {kind: _over_texts(own, kind) for kind in ("attn_out", "mlp_out", "resid_post")}
        conditions += [*order, shares["attn_out"] < 0.65, min(shares["mlp_out"], shares["resid_post"]) > 0.85]
        parts.append(
            f"{MODEL_TITLES[model]}: {', '.join(f'{kind} {share:.0%}' for kind, share in shares.items())}, attn_out "
            f"the lower in {sum(pair.holds for pair in order)} of {len(order)} pairs of kind and text"
        )
    return Claim(
        f"...{_read_so_far(e)}: effective rank / d, layer by layer",
        "attn_out 60 %, mlp_out and resid_post 90 %; Llama, Qwen, Gemma-2, Pythia; web text, code, Chinese",
        "; ".join(parts),
        verdict(conditions),
        _layers(e),
        COMMAND,
    )


def output_weights_everywhere(e: ResultFiles) -> Claim:
    conditions, parts = [], []
    for model, own in by_model(e).items():
        written = own[0].written_by_attention
        pairs = list(_pairs(own, written, ("hook_z",)))
        conditions += pairs
        layers = [(one.by_layer(written)[layer], z) for one in own for layer, z in one.by_layer("hook_z").items()]
        parts.append(
            f"{MODEL_TITLES[model]}: Z {_over_texts(own, 'hook_z'):.0%} of its width, O "
            f"{_over_texts(own, written):.0%} of d, O below Z in {sum(o < z for o, z in layers)} of "
            f"{len(layers)} layers"
        )
    return Claim(
        f"...{_read_so_far(e)}",
        "the tail of O falls through W_O",
        "; ".join(parts),
        verdict(conditions),
        _layers(e),
        COMMAND,
    )


def _read_so_far(e: ResultFiles) -> str:
    found = len(passes(e))
    planned = len(MODELS) * len(TEXTS)
    if found == planned:
        return "in both families and on all three texts"
    return f"in the {found} of {planned} pairs of model and text that are read so far"


def _layers(e: ResultFiles) -> str:
    found = by_model(e)
    counts = {len(own[0].by_layer("attn_out")) for own in found.values()}
    texts = {len(own) for own in found.values()}
    return f"{' and '.join(map(str, sorted(counts)))} layers, {' to '.join(map(str, sorted(texts)))} texts"


def table(e: ResultFiles) -> list[str]:
    """Mean and range over layers, by model, kind and text; what 99 % of the variance takes, and gamma, over texts."""
    lines = []
    for model, own in by_model(e).items():
        texts = {one.text: one for one in own}
        for kind in own[0].kinds:
            lines.append(
                (
                    MODEL_TITLES[model],
                    kind,
                    *(_range(texts[text].by_layer(kind)) if text in texts else "" for text in TEXTS),
                    f"{sum(_over(one, kind, 'dimension_99') for one in own) / len(own):.0%}",
                    f"{_over_texts(own, kind, 'mean_to_deviation'):.2f}",
                )
            )
    header = ["model", "kind", *(TEXT_TITLES[text] for text in TEXTS), "dimensions for 99 %", "gamma"]
    return [markdown_table(header, lines, align="llrrrrr"), ""]


def _range(values: Mapping[int, float]) -> str:
    """Mean over layers, and the range."""
    return f"{sum(values.values()) / len(values):.0%} ({min(values.values()):.0%} to {max(values.values()):.0%})"


def _over(one: Measured, kind: str, column: str) -> float:
    """The mean over layers of a count of dimensions, as a share of the width."""
    own = [row for row in one.rows if row["kind"] == kind]
    return sum(row[column] / row["width"] for row in own) / len(own)


def findings(e: ResultFiles) -> str:
    """What goes with the paper and what against it, and how good the numbers are, in sentences."""
    found = by_model(e)
    rows = [row for own in found.values() for one in own for row in one.rows]
    shifts = [row["effective_rank_shift"] for row in rows if row["effective_rank_shift"] is not None]
    sentences = []
    for model, own in found.items():
        attention = _over_texts(own, "attn_out")
        others = {kind: _over_texts(own, kind) for kind in ("mlp_out", "resid_post")}
        below = [
            f"{kind} in {sum(a < one.by_layer(kind)[n] for one in own for n, a in one.by_layer('attn_out').items())}"
            for kind in others
        ]
        n = sum(len(one.by_layer("attn_out")) for one in own)
        spread = max(max(one.mean(kind) for one in own) - min(one.mean(kind) for one in own) for kind in own[0].kinds)
        sentences.append(
            f"**{MODEL_TITLES[model]}**: attention outputs {attention:.0%} of d, "
            f"{' and '.join(f'{kind} {share:.0%}' for kind, share in others.items())} where the paper has 60 % and "
            f"90 %; the attention output lies below {' and below '.join(below)} of {n} layers (all texts together); "
            f"the mean over layers of a kind differs by up to {100 * spread:.0f} points of a hundred between texts."
            f"{_before_the_norm(own)}"
        )
    tokens = " to ".join(f"{n:,}" for n in sorted({row["n_tokens"] for row in rows}))
    return (
        f"{' '.join(sentences)} From {tokens} tokens of a text; samples of this size lower the effective rank by "
        f"{-max(shifts):.1%} to {-min(shifts):.1%}.{_against_longer(e)}"
    )


def _before_the_norm(own: Sequence[Measured]) -> str:
    if ATTENTION_BEFORE not in own[0].kinds:
        return ""
    attention, mlp = (_over_texts(own, kind) for kind in (ATTENTION_BEFORE, MLP_BEFORE))
    return (
        f" Before the norms it is {attention:.0%} and {mlp:.0%}: their weights take the rest, and low rank is there no "
        "mark of attention alone."
    )


def _against_longer(e: ResultFiles) -> str:
    """What the pass of `make spectra` says of the same model and text: more tokens, and in float32."""
    longer = {row["hook"]: row for row in e.spectra}
    same = [row for one in passes(e) if (one.model, one.text) == ("smollm2", "bible") for row in one.rows]
    if not same:
        return ""
    off = {row["hook"]: row["effective_rank"] / longer[row["hook"]]["effective_rank"] - 1 for row in same}
    near = sum(abs(one) < 0.03 for one in off.values())
    far = max(same, key=lambda row: abs(off[row["hook"]]))
    other = longer[far["hook"]]
    return (
        f" Beside {other['n_tokens']:,} tokens in float32 (`make spectra`; SmolLM2 on the Bible) {near} of {len(off)} "
        f"hooks are within 3 %. The farthest off, {far['hook']}, is {off[far['hook']]:+.0%}: one direction holds "
        f"{far['first_component_variance_share']:.0%} of its variance here and "
        f"{other['first_component_variance_share']:.0%} there."
    )


CLAIMS = (collapse_everywhere, output_weights_everywhere)
