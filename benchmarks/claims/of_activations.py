"""Claims about the activations, and what their rank does to dictionaries."""

from __future__ import annotations

from benchmarks.claims.evidence import Claim, ResultFiles
from benchmarks.claims.statistics import Pair, verdict
from saelens_asi.evaluation.results import rank_correlation
from saelens_asi.sweep.cells import SweepRow
from saelens_asi.sweep.results import mean_of

SPECTRA = "make spectra"


def low_rank(e: ResultFiles) -> Claim:
    shares = {k: e.spectrum_mean(k, "effective_rank_share") for k in ("attn_out", "mlp_out", "resid_post", "hook_z")}
    dims = {kind: e.spectrum_mean(kind, "dimension_99_share") for kind in shares}
    text = "; ".join(f"{kind} {shares[kind]:.0%} ({dims[kind]:.0%})" for kind in shares)
    by_layer = {kind: e.by_layer(kind, "effective_rank_share") for kind in shares}
    lower = [Pair(by_layer["attn_out"], by_layer[kind]) for kind in ("mlp_out", "resid_post", "hook_z")]
    return Claim(
        "Attention outputs are low-rank, MLP outputs and residual streams are not: effective rank / d "
        "(and share of the dimensions that hold 99 % of the variance)",
        "attn_out 60 %; mlp_out and resid_post 90 %",
        f"mean of 30 layers: {text}",
        verdict([*lower, shares["attn_out"] < 0.65, min(shares["mlp_out"], shares["resid_post"]) > 0.85]),
        "30 layers",
        SPECTRA,
    )


def decay(e: ResultFiles) -> Claim:
    above = {
        row["kind"]: row["above_5_percent"] / row["width"]
        for row in e.spectra
        if row["layer"] == 15 and row["kind"] != "hook_z"
    }
    return Claim(
        "Singular values above 5 % of the largest, share of d, middle layer: few in attention outputs",
        "attn_out 29 %, mlp_out 80 %, resid_post 96 %",
        ", ".join(f"{kind} {share:.0%}" for kind, share in above.items()),
        verdict([above["attn_out"] < above["mlp_out"], above["attn_out"] < above["resid_post"]]),
        "1 layer",
        SPECTRA,
    )


def components(e: ResultFiles) -> Claim:
    needed = {}
    for name, losses in e.losses.items():
        if name == "key":
            continue
        kl_zero = losses["zero"][1]
        enough = [int(k) for k, (_, kl) in losses["components"].items() if 1 - kl / kl_zero >= 0.95]
        needed[name.split("hook_")[1]] = min(enough) / 576
    return Claim(
        "Few components carry what the attention output does: share of d that recovers 95 % of the loss "
        "(here: of the divergence from the model's own predictions)",
        "attn_out 25 %, mlp_out 78 %, resid_post 86 %",
        ", ".join(f"{kind} {share:.0%}" for kind, share in needed.items()),
        verdict([needed["attn_out"] < 0.3, needed["attn_out"] < needed["mlp_out"], needed["resid_post"] > 0.8]),
        "1 layer",
        SPECTRA,
    )


def output_weights(e: ResultFiles) -> Claim:
    z, o = (e.by_layer(kind, "effective_rank_share") for kind in ("hook_z", "attn_out"))
    lower = sum(o[layer] < z[layer] for layer in o)
    return Claim(
        "It is W_O that makes them so: Z is of higher rank than O = Z W_O",
        "the tail of O falls through W_O",
        f"Z {sum(z.values()) / len(z):.0%} of d, O {sum(o.values()) / len(o):.0%}; O below Z in {lower} of {len(o)} "
        "layers",
        verdict([Pair(o, z)]),
        f"{len(o)} layers",
        SPECTRA,
    )


def by_seed(e: ResultFiles) -> list[list[SweepRow]]:
    """TopK over layers and kinds of hooks."""
    rows = e.cells("hooks")
    return [[row for row in rows if row["seed"] == seed] for seed in sorted({row["seed"] for row in rows})]


def repeated(e: ResultFiles) -> str:
    """How often the hooks' cells saw their activations."""
    shared = e.shared["hooks"]
    times = shared["training"]["training_tokens"] / shared["cached_tokens"]
    return f"{shared['cached_tokens']:,} tokens, {times:.1f} times over"


def dead_follows_rank(e: ResultFiles) -> Claim:
    groups = by_seed(e)
    rhos = [
        rank_correlation([row["effective_rank"] / row["d_in"] for row in rows], [row["dead_fraction"] for row in rows])
        for rows in groups
    ]
    by_kind = {
        kind: mean_of([row for rows in groups for row in rows if row["hook_name"].endswith(kind)], "dead_fraction")
        for kind in ("attn_out", "mlp_out", "resid_post")
    }
    return Claim(
        f"Dead features follow the rank: TopK (zeros as centre), d_sae = {groups[0][0]['d_sae']:,}, "
        f"{len(groups[0])} hooks",
        "published SAEs: low-rank activations have many dead features",
        f"rank correlation {', '.join(f'{rho:.2f}' for rho in rhos)}; mean dead "
        f"{', '.join(f'{kind} {share:.0%}' for kind, share in by_kind.items())} (trained on {repeated(e)})",
        verdict([max(rhos) < -0.5, by_kind["attn_out"] > max(by_kind["mlp_out"], by_kind["resid_post"])]),
        str(len(groups)),
        "make claims",
    )
