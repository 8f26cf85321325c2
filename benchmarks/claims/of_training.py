"""Claims about dictionaries that start in the active subspace, and about SparseAdam."""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter

from benchmarks.claims import plan, predictions
from benchmarks.claims.evidence import Claim, ResultFiles
from benchmarks.claims.of_factorial import by_seed
from benchmarks.claims.statistics import Pair, interval, verdict
from saelens_asi.sweep import fit_power_law
from saelens_asi.sweep.cells import METHOD_TITLES, SweepRow
from saelens_asi.sweep.results import best_rates, grouped, mean_of, spread

OURS = "asi_sparse_adam"
SWEEPS = "make claims"

# The norm of the lowest initial error where BatchTopK selects over 1,024 tokens, instead of at every token.
_NORM_OF_BATCH = 0.31


def active_against_random(e: ResultFiles) -> Claim:
    cells = grouped(e.sweeps["d_init"], itemgetter("subspace", "d_init"))
    best = {
        subspace: min((rows for (s, _), rows in cells.items() if s == subspace), key=lambda rows: mean_of(rows, "nmse"))
        for subspace in ("active", "random", "full")
    }
    text = "; ".join(
        f"{subspace}{f' ({d_init} dimensions)' if (d_init := rows[0]['d_init']) else ''}: NMSE "
        f"{spread(rows, 'nmse', '{:.3f}')}, dead {spread(rows, 'dead_fraction', '{:.1%}')}"
        for subspace, rows in best.items()
    )
    sizes = [d_init for subspace, d_init in cells if subspace == "random"]
    pairs = [e.pair(cells["active", d], cells["random", d]) for d in sizes]
    helped = e.pair(best["random"], best["full"]).holds
    return Claim(
        "The active subspace helps, a random one of the same size does not (each at its best d_init; centre, norm and "
        "SparseAdam are the same for all)",
        "random subspaces do not help",
        f"{text}; active below random at {sum(pair.holds for pair in pairs)} of {len(pairs)} sizes; the best random "
        f"one is {'below' if helped else 'not below'} all of d",
        verdict([*pairs, not helped]),
        seeds(best["active"]),
        SWEEPS,
    )


def plateau(e: ResultFiles) -> Claim:
    rows = [row for row in e.sweeps["d_init"] if row["subspace"] == "active"]
    by_size = dict(sorted(grouped(rows, itemgetter("d_init")).items()))
    errors = {d: mean_of(some, "nmse") for d, some in by_size.items()}
    low = min(errors.values())
    near = [d for d, error in errors.items() if error <= 1.05 * low]
    alive = [d for d, some in by_size.items() if mean_of(some, "dead_fraction") < 0.05]
    return Claim(
        "d_init has a wide plateau",
        "6 % to 50 % of d",
        f"error within 5 % of the lowest: {min(near) / 576:.0%} to {max(near) / 576:.0%} of d; under 5 % dead: "
        f"{min(alive) / 576:.0%} to {max(alive) / 576:.0%} (of {', '.join(f'{d / 576:.0%}' for d in errors)})",
        verdict(max(sizes) >= 7 * min(sizes) for sizes in (near, alive)),
        seeds(rows),
        SWEEPS,
    )


def equal_size(e: ResultFiles) -> Claim:
    rows = {method: e.cells("d_sae", method=method, d_sae=8192) for method in ("topk", "auxk", "asi", OURS)}
    rows |= {method: e.cells("paper", method=method, d_sae=8192) for method in ("asi_paper", "asi_paper_sparse_adam")}
    text = "; ".join(
        f"{METHOD_TITLES[method]}: {spread(group, 'nmse', '{:.3f}')}, {spread(group, 'dead_fraction', '{:.1%}')} dead"
        for method, group in rows.items()
    )
    return Claim(
        "ASI beats TopK, and AuxK, at equal size (NMSE, d_sae = 8,192): the paper's recipe and ours against both",
        "beats TopK; AuxK slightly",
        text,
        verdict(e.pair(rows[ours], rows[other]) for ours in ("asi_paper", "asi") for other in ("topk", "auxk")),
        seeds(*rows.values()),
        SWEEPS,
    )


def frontier(e: ResultFiles) -> Claim:
    levels = sorted({row["k"] for row in e.sweeps["frontier"]})
    pairs, parts, groups = [], [], []
    for k in levels:
        cells = {m: e.cells("frontier", method=m, k=k) for m in ("topk", "auxk", OURS)}
        groups += cells.values()
        pairs += [e.pair(cells[OURS], cells[m]) for m in ("topk", "auxk")]
        free = best_rates(row for row in e.sweeps["frontier"] if (row["method"], row["k"]) == (OURS, k))
        parts.append(
            f"k = {k}: {brief(cells[OURS])}, and {brief(free)} at the rate of the lowest error, against "
            f"{brief(cells['topk'])}, and {brief(cells['auxk'])}"
        )
    return Claim(
        "...along the sparsity-reconstruction frontier (NMSE of ASI + SparseAdam against TopK and AuxK)",
        "holds for all k shown",
        "; ".join(parts),
        verdict(pairs),
        seeds(*groups),
        SWEEPS,
    )


def half_size(e: ResultFiles) -> Claim:
    sizes = sorted({row["d_sae"] for row in e.sweeps["d_sae"] if row["method"] == "auxk"})
    pairs, parts, groups = [], [], []
    for size in sizes:
        if 2 * size in sizes:
            cells = e.cells("d_sae", method=OURS, d_sae=size)
            larger = {m: e.cells("d_sae", method=m, d_sae=2 * size) for m in ("topk", "auxk")}
            groups += [cells, *larger.values()]
            ours, double = mean_of(cells, "nmse"), {m: mean_of(rows, "nmse") for m, rows in larger.items()}
            pairs += [e.pair(cells, rows) for rows in larger.values()]
            parts.append(f"{size:,}: {ours:.3f} against {double['topk']:.3f} and {double['auxk']:.3f} at {2 * size:,}")
    return Claim(
        "ASI matches AuxK with half the features (NMSE of ASI + SparseAdam against TopK and AuxK at twice its size)",
        "from expansion 32 on",
        "; ".join(parts),
        verdict(pairs),
        seeds(*groups),
        SWEEPS,
    )


def largest(e: ResultFiles) -> Claim:
    size = max(row["d_sae"] for row in e.sweeps["d_sae"] if row["method"] == OURS)
    ours = e.cells("d_sae", method=OURS, d_sae=size)
    return Claim(
        "ASI + SparseAdam: below 1 % dead at the largest size",
        "below 1 % of 1M features (expansion 256), from 87 %",
        f"{size:,} features (expansion {size / 576:.0f}): {dead_of(ours)}",
        verdict([mean_of(ours, "dead_fraction") < 0.01]),
        seeds(ours),
        SWEEPS,
    )


def goal(e: ResultFiles) -> Claim:
    size = 65_536
    ours, stock = (e.cells("d_sae", d_sae=size, **how) for how in ({"method": OURS}, {"norm": "decoder_init_norm"}))
    others = {(m, s): e.cells("d_sae", method=m, d_sae=s) for s in (size, 2 * size) for m in ("topk", "auxk")}
    seconds = e.steps["seconds"]
    text = [
        f"{METHOD_TITLES[m]} {s:,}: {mean_of(rows, 'nmse'):.3f}, {mean_of(rows, 'dead_fraction'):.1%} dead, "
        f"{seconds[f'{m} {s}']:.2f} s a step"
        for (m, s), rows in others.items()
    ]
    error, step, finished = mean_of(ours, "nmse"), seconds[f"{OURS} {size}"], e.evaluations["finished"]
    return Claim(
        f"At expansion {size / 576:.0f}: under 1 % dead where SAELens's own settings leave most features dead, a lower "
        "error than TopK and AuxK at the same and at twice the size, in less time",
        "ours (goal)",
        f"ASI + SparseAdam {size:,}: {error:.3f}, {dead_of(ours)}, "
        f"{finished['dead_fraction']:.2%} of the finished SAE on all {finished['n_tokens']:,} tokens of the text, "
        f"{step:.2f} s a step; SAELens's settings: {mean_of(stock, 'nmse'):.3f}, {dead_of(stock)}; {'; '.join(text)}",
        verdict(
            [
                mean_of(ours, "dead_fraction") < 0.01,
                finished["dead_fraction"] < 0.01,
                *(e.pair(ours, rows) for rows in others.values()),
                *(step < seconds[f"{m} {s}"] for m, s in others),
            ]
        ),
        seeds(ours),
        SWEEPS,
    )


def sparse_adam_at_scale(e: ResultFiles) -> Claim:
    large = [row for row in e.sweeps["d_sae"] if row["method"] == "asi"]
    size = max(row["d_sae"] for row in large)
    (rate,) = {row["lr"] for row in large if row["d_sae"] == size}
    pair = [e.cells("d_sae", method=method, d_sae=size, lr=rate) for method in ("asi", OURS)]
    paper_size = max(row["d_sae"] for row in e.sweeps["paper"])
    paper = [e.cells("paper", method=m, d_sae=paper_size) for m in ("asi_paper", "asi_paper_sparse_adam")]
    text = [
        f"{name}: {mean_of(a, 'dead_fraction'):.1%} dead to {mean_of(b, 'dead_fraction'):.1%}, "
        f"NMSE {mean_of(a, 'nmse'):.4f} to {mean_of(b, 'nmse'):.4f}"
        for name, (a, b) in ((f"our defaults, {size:,}", pair), (f"the paper's start, {paper_size:,}", paper))
    ]
    return Claim(
        "SparseAdam in place of Adam revives features, and lowers the error at scale (at equal learning rates)",
        "87 % to below 1 % at 1M features; lowest error",
        "; ".join(text),
        verdict(e.pair(b, a, measure) for a, b in (pair, paper) for measure in ("dead_fraction", "nmse")),
        seeds(*pair, *paper),
        SWEEPS,
    )


def power_law(e: ResultFiles) -> Claim:
    laws = {}
    for method in ("topk", "auxk", OURS):
        rows = e.cells("d_sae", method=method)
        laws[method] = fit_power_law([row["d_sae"] for row in rows], [row["nmse"] for row in rows])
    return Claim(
        "The error falls with d_sae as a power law",
        "a straight line from 16k to 1M",
        "; ".join(
            f"{METHOD_TITLES[method]}: exponent {law.exponent:.3f}, residual {law.residual:.1%}"
            for method, law in laws.items()
        )
        + " (a fixed number of tokens for all sizes)",
        verdict(law.exponent < -0.02 and law.residual < 0.05 for law in laws.values()),
        f"{len({row['d_sae'] for row in rows})} sizes",
        SWEEPS,
    )


def downstream(e: ResultFiles) -> Claim:
    rows = e.parts[predictions.PART]
    of = {name: by_seed(rows, name, "kl_recovered") for name in plan.PREDICTING}
    ours = of[plan.OURS]
    parts = [f"{name}: {interval(list(values.values())).written('{:.2%}')}" for name, values in of.items()]
    return Claim(
        "ASI keeps more of the model's predictions (share of the divergence that zero ablation makes)",
        "lower downstream loss than TopK",
        f"{'; '.join(parts)} (kernel documentation, {rows[0]['tokens']:,} tokens of training, {rows[0]['n_tokens']:,} "
        "predicted)",
        verdict(Pair(ours, theirs, higher=True) for name, theirs in of.items() if name != plan.OURS),
        str(len(ours)),
        SWEEPS,
    )


# L0 that differ by more cannot be compared by their errors.
_EQUAL_L0 = 0.02


def architectures(e: ResultFiles) -> Claim:
    parts, conditions, groups = [], [], []
    for name in sorted({row["architecture"] for row in e.sweeps["architectures"]}):
        ours, other = (e.cells("architectures", architecture=name, method=m) for m in (OURS, "auxk"))
        groups += [ours, other]
        levels = mean_of(ours, "l0"), mean_of(other, "l0")
        conditions += [e.pair(ours, other, "dead_fraction"), abs(levels[0] / levels[1] - 1) < _EQUAL_L0]
        parts.append(f"{name}: {brief(ours)} at L0 {levels[0]:.1f}, against {brief(other)} at {levels[1]:.1f}")
    short = e.cells("architectures", norm=_NORM_OF_BATCH)
    parts.append(
        f"batchtopk at the norm that fits the batch ({_NORM_OF_BATCH}; long tokens take most of it at first): "
        f"{brief(short)}"
    )
    return Claim(
        "ASI does not depend on the architecture (ASI + SparseAdam against AuxK: fewer dead features, at equal L0)",
        "holds for others than TopK",
        "; ".join(parts) + "; errors at these L0 cannot be compared",
        verdict(conditions),
        seeds(*groups),
        SWEEPS,
    )


def auxiliary_loss(e: ResultFiles) -> Claim:
    none = e.cells("aux", aux_loss_coefficient=0.0)
    weights = sorted({row["aux_loss_coefficient"] for row in e.sweeps["aux_late"]})
    early, late = ([e.cells(name, aux_loss_coefficient=w) for w in weights] for name in ("aux", "aux_late"))
    parts = [f"none: {brief(none)}"]
    for name, groups in (("aux", early), ("aux_late", late)):
        window = e.shared[name]["training"]["dead_after_tokens"]
        parts += [
            f"coefficient {weight:.3g}, window of {window:,} tokens: {brief(rows)}"
            for weight, rows in zip(weights, groups, strict=True)
        ]
    return Claim(
        f"ASI + SparseAdam needs no auxiliary loss ({none[0]['d_sae']:,} features): with a short dead_feature_window "
        "it kills features that are rare, with a long one it does nothing",
        "ours",
        "; ".join(parts),
        verdict(
            [
                *(not e.pair(rows, none).holds for rows in (*early, *late)),
                *(e.pair(none, rows, "dead_fraction") for rows in early),
                *(mean_of(rows, "dead_fraction") < 1.5 * mean_of(none, "dead_fraction") for rows in late),
            ]
        ),
        seeds(none, *early, *late),
        SWEEPS,
    )


def brief(rows: Sequence[SweepRow]) -> str:
    return f"{mean_of(rows, 'nmse'):.4f} ({mean_of(rows, 'dead_fraction'):.1%} dead)"


def dead_of(rows: Sequence[SweepRow]) -> str:
    """Dead features by held-out tokens, and by these and the last activations of training."""
    dead, silent = mean_of(rows, "dead_fraction"), mean_of(rows, "silent_fraction")
    return f"{dead:.2%} dead on {rows[0]['n_tokens']:,} tokens, {silent:.2%} on {rows[0]['silent_tokens']:,}"


def seeds(*groups: Sequence[SweepRow]) -> str:
    """How many seeds each group has."""
    counts = [len({row["seed"] for row in rows}) for rows in groups]
    return str(min(counts)) if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"


CLAIMS = (
    active_against_random,
    plateau,
    equal_size,
    frontier,
    half_size,
    goal,
    largest,
    sparse_adam_at_scale,
    power_law,
    downstream,
    architectures,
    auxiliary_loss,
)
