"""What will go wrong at a hook, and what to do about it."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from saelens_asi.planning.model import Anchor, predict_stock_dead, tokens_to_tell
from saelens_asi.spectra.spectrum import Spectrum

# Of the length of the mean over the deviation; of the effective rank over the width.
LONG_MEAN, LOW_RANK = 0.5, 0.65

# In the mean, of a feature in training: below, dictionaries are mostly what they began as.
ENOUGH_FIRINGS = 100

# Of the variance, in the thousandth of the tokens that are farthest from the mean.
MASSIVE = 0.1


def in_few_tokens(activations: Float[Tensor, "n d_in"]) -> float:
    """Share of the variance that a thousandth of the tokens hold, those farthest from the mean."""
    squares = (activations - activations.mean(dim=0)).square().sum(dim=1).double()
    return float(squares.topk(max(1, len(squares) // 1000)).values.sum() / squares.sum())


def warnings_for(
    spectrum: Spectrum,
    anchor: Anchor,
    sizes: Sequence[tuple[int, int, int]],
    counted_on: int,
    activations: Float[Tensor, "n d_in"],
) -> list[str]:
    """Sentences, the most important first."""
    found = []
    share = spectrum.effective_rank / spectrum.d
    if spectrum.gamma >= LONG_MEAN or share <= LOW_RANK:
        stock = predict_stock_dead(spectrum.gamma, share)
        lost = f"plain TopK would leave {stock.low:.0%} to {stock.high:.0%} of 8,192 features dead here"
        if spectrum.gamma >= LONG_MEAN:
            found.append(
                f"gamma = {spectrum.gamma:.2f}: the mean is long against the deviation, and {lost}. The settings "
                'centre on it (center="mean", the default of ActiveSubspaceInit).'
            )
        if share <= LOW_RANK:
            found.append(
                f"The effective rank is {share:.0%} of the width: features that start anywhere in it see little. The "
                "settings start them in the active subspace."
            )
    short = sorted({size for size, k, tokens in sizes if tokens * k / size < ENOUGH_FIRINGS})
    if short:
        found.append(
            f"Too few tokens for d_sae = {', '.join(f'{size:,}' for size in short)} in some rows: a feature fires "
            f"fewer than {ENOUGH_FIRINGS} times in training (tokens x k / d_sae), and stays close to where it began."
        )
    unseen = [(size, k) for size, k, _ in sizes if tokens_to_tell(anchor.spread, size, k) > counted_on]
    if unseen:
        size, k = min(unseen, key=lambda one: one[0] / one[1])
        needed = tokens_to_tell(anchor.spread, size, k)
        found.append(
            f"{counted_on:,} tokens are too few to call a feature dead from {size:,} features at k = {k} on: the "
            f"rarest hundredth of the living fire less than 3 times on them. Count on {needed:,.0f} or more."
        )
    if (massive := in_few_tokens(activations)) > MASSIVE:
        found.append(
            f"A thousandth of the tokens hold {massive:.0%} of the variance (massive activations, arXiv 2402.17762): "
            "an error on few tokens depends on how many of these are among them. Measure on many, compare on the same."
        )
    if not anchor.measured:
        found.append(
            "A spectrum says nothing of how sparse the activations are: error and dead share are guesses from other "
            "hooks. Give the model and text, or activations, for pilots on them."
        )
    return found
