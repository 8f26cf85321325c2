"""What a feature of a Lorsa does: where it is most active, where that comes from, and why it looked there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from saelens_asi.lorsa.model import Lorsa
from saelens_asi.lorsa.sequences import Sequences


@dataclass(frozen=True)
class FeatureContext:
    """One position at which a feature is active.

    Attributes:
        feature: index of the OV head.
        sequence: index in the data.
        position: in the sequence.
        activation: of the feature.
    """

    feature: int
    sequence: int
    position: int
    activation: float


@dataclass(frozen=True)
class FeatureReading:
    """One pre-activation of a feature, taken apart.

    Attributes:
        context: which feature, sequence and position, and its activation there (0 where it was not selected).
        pre_activation: the sum of ``contributions``.
        contributions: (position + 1,) pattern times value of each source position.
        pattern: (position + 1,) attention of the feature's QK head.
        values: (position + 1,) w_v . x plus its bias.
        head: index of the QK head.
        query: (d_qk,) of the position, rotated.
        keys: (position + 1, d_qk) of the source positions, rotated.
        scores: (position + 1,) query . key / scale, soft-capped where the layer does.
    """

    context: FeatureContext
    pre_activation: float
    contributions: Tensor
    pattern: Tensor
    values: Tensor
    head: int
    query: Tensor
    keys: Tensor
    scores: Tensor

    @property
    def top_source(self) -> int:
        """The source position that contributes most."""
        return int(self.contributions.argmax())


@torch.no_grad()
def top_contexts(
    lorsa: Lorsa, data: Sequences, features: Sequence[int], n: int = 10, batch_size: int = 8
) -> dict[int, list[FeatureContext]]:
    """The ``n`` positions of the data at which each feature is most active, strongest first.

    Raises ValueError for a feature that does not exist.
    """
    for feature in features:
        _check_feature(lorsa, feature)
    index_of_features = torch.tensor(sorted(set(features)), device=lorsa.W_V.device)
    best: dict[int, list[FeatureContext]] = {int(feature): [] for feature in index_of_features}
    for index in torch.arange(data.n_sequences).split(batch_size):
        x = data.batch(index)[0].to(lorsa.W_V)
        encoded = lorsa.encode(x)
        active = torch.isin(encoded.features, index_of_features) & (encoded.values != 0)
        rows, values = encoded.rows[active].tolist(), encoded.values[active].tolist()
        for feature, row, value in zip(encoded.features[active].tolist(), rows, values, strict=True):
            sequence, position = divmod(row, x.shape[1])
            if position >= lorsa.cfg.skip_positions:
                best[feature].append(FeatureContext(feature, int(index[sequence]), position, value))
        for feature, contexts in best.items():
            best[feature] = sorted(contexts, key=lambda context: -context.activation)[:n]
    return best


@torch.no_grad()
def firing_rates(lorsa: Lorsa, data: Sequences, batch_size: int = 8) -> Tensor:
    """(n_ov_heads,) share of positions at which each feature fires."""
    counts = torch.zeros(lorsa.cfg.n_ov_heads, dtype=torch.int64, device=lorsa.W_V.device)
    for index in torch.arange(data.n_sequences).split(batch_size):
        _, features, fired = lorsa.reconstruct(data.batch(index)[0].to(lorsa.W_V))
        counts += torch.bincount(features[fired], minlength=lorsa.cfg.n_ov_heads)
    return (counts.double() / (data.n_sequences * (data.n_positions - lorsa.cfg.skip_positions))).float().cpu()


@torch.no_grad()
def read_feature(lorsa: Lorsa, data: Sequences, feature: int, sequence: int, position: int) -> FeatureReading:
    """Take one activation apart into its sources and its QK pair.

    Raises ValueError for a feature, sequence or position that does not exist.
    """
    _check_feature(lorsa, feature)
    for name, value, size in (("sequence", sequence, data.n_sequences), ("position", position, data.n_positions)):
        if not 0 <= value < size:
            raise ValueError(f"{name}={value} does not exist: the data has {size}")
    x = data.batch(torch.tensor([sequence]))[0].to(lorsa.W_V)[:, : position + 1]
    head = feature // lorsa.cfg.group_size
    q, k = lorsa.queries_and_keys(x, n_new=1)
    rule = lorsa.scores(1, position + 1)
    pattern = rule.pattern(q[:, head : head + 1], k[:, head : head + 1])[0, 0, 0]
    scores = (k[0, head] @ q[0, head, 0]) / rule.scale
    if rule.soft_cap is not None:
        scores = rule.soft_cap * torch.tanh(scores / rule.soft_cap)
    values = x[0] @ lorsa.W_V[feature] + lorsa.value_bias()[feature]
    encoded = lorsa.encode(x, n_new=1)
    activation = float(encoded.values[encoded.features == feature].sum())
    return FeatureReading(
        context=FeatureContext(feature, sequence, position, activation),
        pre_activation=float((pattern * values).sum()),
        contributions=(pattern * values).cpu(),
        pattern=pattern.cpu(),
        values=values.cpu(),
        head=head,
        query=q[0, head, 0].cpu(),
        keys=k[0, head].cpu(),
        scores=scores.cpu(),
    )


def words_of(tokens: Tensor, decode: Callable[[list[int]], str]) -> list[str]:
    """One string for each token id, for ``plot_reading``; ``decode`` is the tokenizer's."""
    return [decode([token]) for token in tokens.tolist()]


def _check_feature(lorsa: Lorsa, feature: int) -> None:
    if not 0 <= feature < lorsa.cfg.n_ov_heads:
        raise ValueError(f"feature={feature} does not exist: this Lorsa has features 0 to {lorsa.cfg.n_ov_heads - 1}")
