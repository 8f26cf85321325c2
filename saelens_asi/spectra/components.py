"""Why activations are low-rank, and what it costs the model to keep their top components only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from saelens_asi.activations.hooks import HookedModel, Writer, keep_mask, special_token_ids
from saelens_asi.activations.replacement import Predictions, ratio, replacement_losses
from saelens_asi.spectra.hook_spectra import activation_spectra
from saelens_asi.spectra.spectrum import Spectrum


@dataclass(frozen=True)
class ComponentLosses:
    """Predictions of a model that sees only the top principal components of one hook, in nats a token.

    Attributes:
        hook_name: whose activations are replaced.
        clean: the model as it is.
        zero: activations set to zero.
        mean: activations set to their mean, which is the projection on no component at all.
        components: from a number of components to the predictions with it.
        n_tokens: next tokens predicted.
    """

    hook_name: str
    clean: Predictions
    zero: Predictions
    mean: Predictions
    components: Mapping[int, Predictions]
    n_tokens: int

    def recovered(self, k: int, baseline: str = "zero") -> float:
        """(L_baseline - L_k) / (L_baseline - L_clean) of the cross-entropies; baseline ``"zero"`` or ``"mean"``.

        With ``"zero"`` this is the fraction of arXiv 2508.16929 v1, section 4.2. It can pass 1, or lose its meaning:
        where the ablation lowers the loss on this text, the denominator is negative. ``kl_recovered`` cannot.
        """
        worst = self.baseline(baseline).cross_entropy
        return ratio(worst - self.components[k].cross_entropy, worst - self.clean.cross_entropy)

    def kl_recovered(self, k: int, baseline: str = "zero") -> float:
        """1 - KL_k / KL_baseline: 1 where the predictions are those of the model as it is."""
        return 1 - ratio(self.components[k].kl, self.baseline(baseline).kl)

    def components_needed(self, share: float = 0.95, baseline: str = "zero", measure: str = "kl") -> int | None:
        """Smallest measured number of components from which on ``share`` is recovered; None where none does.

        Args:
            share: of the loss or of the divergence.
            baseline: ``"zero"`` or ``"mean"``.
            measure: ``"kl"`` or ``"cross_entropy"``.
        """
        recovered = {"kl": self.kl_recovered, "cross_entropy": self.recovered}.get(measure)
        if recovered is None:
            raise ValueError(f"measure={measure!r} must be 'kl' or 'cross_entropy'")
        smallest = None
        for k in sorted(self.components, reverse=True):
            if not recovered(k, baseline) >= share:
                break
            smallest = k
        return smallest

    def baseline(self, name: str) -> Predictions:
        """Predictions with the hook zero-ablated (``"zero"``) or mean-ablated (``"mean"``)."""
        if name not in ("zero", "mean"):
            raise ValueError(f"baseline={name!r} must be 'zero' or 'mean'")
        return self.zero if name == "zero" else self.mean

    def warning(self) -> str | None:
        """Says which ablation lowers the cross-entropy, so that its fractions mean nothing; None where none does."""
        helpful = [name for name in ("zero", "mean") if self.baseline(name).cross_entropy <= self.clean.cross_entropy]
        if not helpful:
            return None
        losses = ", ".join(f"{name} {getattr(self, name).cross_entropy:.4f}" for name in ("clean", *helpful))
        return (
            f"{self.hook_name}: {' and '.join(helpful)} ablation lowers the cross-entropy on this text ({losses}), so "
            "its fraction of recovered cross-entropy means nothing; read the divergence instead"
        )


def loss_recovered(
    model: HookedModel,
    tokens: Int[Tensor, "n_windows n_positions"],
    hook_name: str,
    n_components: Iterable[int],
    *,
    spectrum: Spectrum | None = None,
    batch_size: int = 4,
    exclude_special_tokens: bool | Sequence[int] = True,
    exclude_positions: Sequence[int] = (),
    progress: bool = True,
) -> ComponentLosses:
    """How much of a model's predictions the top principal components of a hook carry (arXiv 2508.16929 v1, sec. 4.2).

    Activations are replaced by their projection on the top k components around their mean. Special tokens and
    excluded positions keep theirs, and predictions at or of them do not count.

    Args:
        model: a HookedTransformer or TransformerBridge.
        tokens: (n_windows, n_positions) token ids.
        hook_name: name or alias of one hook.
        n_components: the numbers k to measure; each costs a forward pass over ``tokens``.
        spectrum: of this hook, better from other text than ``tokens``; from ``tokens`` unless given.
        batch_size: windows in a forward pass.
        exclude_special_tokens: as in ``activation_spectra``.
        exclude_positions: as in ``activation_spectra``.
        progress: show a progress bar.
    """
    if spectrum is None:
        (spectrum,) = activation_spectra(
            model,
            tokens,
            [hook_name],
            batch_size=batch_size,
            exclude_special_tokens=exclude_special_tokens,
            exclude_positions=exclude_positions,
            progress=False,
        ).values()
    numbers = sorted(set(n_components))
    outside = [k for k in numbers if not 1 <= k <= spectrum.d]
    if outside or not numbers:
        raise ValueError(f"n_components={outside or numbers} must be one or more numbers between 1 and d={spectrum.d}")
    keep = keep_mask(tokens, special_token_ids(model, exclude_special_tokens), exclude_positions)
    predicted = keep[:, :-1] & keep[:, 1:]
    functions: dict[str, Writer] = {"zero": torch.zeros_like, "mean": _projection(spectrum, 0)}
    functions |= {str(k): _projection(spectrum, k) for k in numbers}
    losses = replacement_losses(
        model,
        tokens,
        hook_name,
        functions,
        replaced=keep,
        predicted=predicted,
        batch_size=batch_size,
        progress="Loss by components" if progress else None,
    )
    return ComponentLosses(
        hook_name,
        clean=losses["clean"],
        zero=losses["zero"],
        mean=losses["mean"],
        components={k: losses[str(k)] for k in numbers},
        n_tokens=int(predicted.sum()),
    )


def _projection(spectrum: Spectrum, k: int) -> Writer:
    """Projection of (n, d) vectors on the top ``k`` components around the mean, in float32."""
    mean = spectrum.mean.float()
    basis = spectrum.principal_directions(k).float() if k else torch.zeros(spectrum.d, 0)

    def project(vectors: Tensor) -> Tensor:
        if vectors.shape[1] != spectrum.d:
            raise ValueError(f"the spectrum has width {spectrum.d}, but the hook has width {vectors.shape[1]}")
        center, directions = mean.to(vectors.device), basis.to(vectors.device)
        return center + (vectors.float() - center) @ directions @ directions.T

    return project
