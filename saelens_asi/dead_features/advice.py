"""What to change so that features live: one sentence a cause, naming settings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from sae_lens import SAEConfig

from saelens_asi.dead_features.record import VERDICT_TITLES, Autopsy, Verdict

# Measured: with a window of 30 d_sae / k tokens the loss shortened the rows of a sixth of 32,768 features until they
# were dead; with five times that window, of none (docs/claims.md).
_LONGER_WINDOW = (
    "if it had an auxiliary loss, raise dead_feature_window: the loss pulls at features that are rare, not dead, and "
    "shortens their rows"
)
_CHANGES = {"outside": "the subspace", "mean": "the centre", "norm": "the norm", "bias": "the bias"}


def advise(record: Autopsy, cfg: SAEConfig, started: Mapping[str, object] | None) -> tuple[str, ...]:
    """Sentences that name settings, one a cause, most frequent first.

    Args:
        record: of the autopsy.
        cfg: the SAE's config.
        started: what an active-subspace initialization left in the SAE's metadata; None where there is none.
    """
    if not len(record.dead):
        return (f"No feature is dead on {record.n_tokens:,} tokens: there is nothing to change.",)
    return tuple(
        f"{VERDICT_TITLES[verdict].capitalize()} ({count / len(record.dead):.1%} of the dead): "
        f"{_remedy(verdict, record, cfg, started)}."
        for verdict, count in record.counts.items()
    )


def _remedy(verdict: Verdict, record: Autopsy, cfg: SAEConfig, started: Mapping[str, object] | None) -> str:
    dead, table = record.having(verdict), record.features
    moved = (
        "these weights started inside the active subspace, so it happened in training: lower lr, use "
        f'optimizer="sparse_adam", and {_LONGER_WINDOW}'
    )
    if verdict == "outside":
        share = f"{float(table.outside[dead].median()):.0%} of their squared length does nothing (median)"
        return f"{share}; " + (moved if started else 'start inside, with initializer="active_subspace"')
    if verdict == "mean":
        what = f"gamma is {record.gamma_seen:.2f} where the encoder sees it"
        if started and started.get("center") == "mean":
            return f"{what}; the decoder bias started at the mean and left it, or the text is another: lower lr"
        return f'{what}; put the decoder bias at the mean, with initializer=ActiveSubspaceInit(center="mean")'
    if verdict == "norm":
        live = table.norm[table.fires > 0]
        sizes = f"{float(table.norm[dead].median()):.3g} against {float(live.median()):.3g} for live ones (medians)"
        return f"{sizes}; " + (moved if started else 'use initializer=ActiveSubspaceInit(norm="least_squares")')
    if verdict == "bias":
        settings = [
            name for name in ("l1_coefficient", "l0_coefficient", "jumprelu_init_threshold") if hasattr(cfg, name)
        ]
        return f"lower {', '.join([*settings, 'lr'])}, or warm up longer (lr_warm_up_steps)"
    if verdict == "starved":
        return _how_to_see(record)
    if verdict == "momentum":
        drift = record.evidence.drift[record.mask("momentum")]
        return (
            f"they moved by {float(drift.median()):.0%} of their length while silent (median), and would fire had they "
            'stayed; use optimizer="sparse_adam"'
        )
    if verdict == "several":
        mask = record.mask(verdict)
        shares = {cause: float(needs[mask].double().mean()) for cause, needs in record.evidence.needs.items()}
        needed = ", ".join(f"{_CHANGES[cause]} {share:.0%}" for cause, share in shares.items() if share >= 0.005)
        at_once = 'initializer="active_subspace" sets subspace, centre and norm at once'
        return (
            f"no single change revives them, all together do (not to be left out: {needed}); "
            f"{moved if started else at_once}"
        )
    if verdict == "undecided":
        return _how_to_decide(record)
    return {
        "broken": "look for overflow in training: lower lr, and leave autocast off",
        "duplicate": "to revive them adds nothing; lower d_sae, or let them learn the error (aux_loss_coefficient)",
        "unexplained": "no change that was tried revives them; raise k, or "
        + (_LONGER_WINDOW if started else "set aux_loss_coefficient"),
    }[verdict]


def _how_to_see(record: Autopsy) -> str:
    starved = record.mask("starved")
    if float((record.evidence.expected_margin[starved] > 0).float().mean()) >= 0.5:
        return f"{record.settings.more_tokens:g} times the tokens would show most of them firing: read more of them"
    missing = round(float(record.evidence.tokens_missing[starved].max()))
    return f"they fired in training: {missing:,} more tokens would tell whether they still do"


def _how_to_decide(record: Autopsy) -> str:
    undecided = record.mask("undecided")
    causes = Counter(cause for cause, is_one in zip(record.if_dead, undecided.tolist(), strict=True) if is_one)
    listed = ", ".join(f"{VERDICT_TITLES[cause]} {count:,}" for cause, count in causes.most_common())
    missing = float(record.evidence.tokens_missing[undecided].max())
    return (
        f"read {round(missing):,} more tokens, give the checkpoint (optimizer_state) or the rates of training "
        f"(firing_rates), or raise dead_rate; if they are dead, then: {listed}"
    )
