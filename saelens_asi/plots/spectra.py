"""Figures of spectral analysis. Every function returns a matplotlib Figure and touches no global state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from torch import Tensor

from saelens_asi.plots.style import COLORS, make_axes
from saelens_asi.spectra.attention import AttentionDecomposition
from saelens_asi.spectra.components import ComponentLosses
from saelens_asi.spectra.findings import SpectrumRow
from saelens_asi.spectra.spectrum import Spectrum

KIND_COLORS = {
    "attn_out": "#1f6feb",
    "mlp_out": "#d9822b",
    "resid_post": "#2e9e6b",
    "hook_z": "#a04fb5",
}
_OTHER_COLORS = ("#c2405a", "#5b6b7b", "#8a6d1d")
_HEAD_BINS = 24


def kind_color(kind: str, kinds: Sequence[str]) -> str:
    others = [name for name in kinds if name not in KIND_COLORS]
    return KIND_COLORS.get(kind) or _OTHER_COLORS[others.index(kind) % len(_OTHER_COLORS)]


def ranks_across_layers(rows: Sequence[SpectrumRow]) -> Figure:
    """Two ranks as shares of the width, one line a kind of hook; ``rows`` as in ``spectra.findings.table_rows``."""
    figure, axes = make_axes(10.5, 3.8, columns=2)
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    panels = {
        "Effective rank / width": [row["effective_rank_share"] for row in rows],
        "Dimensions for 99 % of variance": [row["dimension_99_share"] for row in rows],
    }
    for axis, (title, ranks) in zip(axes, panels.items(), strict=True):
        for kind in kinds:
            pairs = zip(rows, ranks, strict=True)
            points = sorted((row["layer"], rank) for row, rank in pairs if row["kind"] == kind)
            layers, shares = zip(*points, strict=True)
            axis.plot(layers, shares, marker="o", markersize=3.5, color=kind_color(kind, kinds), label=kind)
        axis.set_title(title)
        axis.set_xlabel("layer")
        axis.set_ylim(0, 1)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes[0].legend(frameon=False, loc="lower left", ncols=2)
    return figure


def relative_singular_values(spectra: Mapping[str, Spectrum], title: str) -> Figure:
    """Singular values over the largest, by kind of hook; the paper counts those above 5 %."""
    figure, (axis,) = make_axes(6.4, 4.2)
    kinds = list(spectra)
    for kind, spectrum in spectra.items():
        share = [(i + 1) / spectrum.d for i in range(spectrum.d)]
        values = spectrum.relative_singular_values.clamp(min=1e-8).tolist()
        label = f"{kind}: {spectrum.components_above(0.05)} of {spectrum.d} above 5 %"
        axis.semilogy(share, values, color=kind_color(kind, kinds), label=label)
    axis.axhline(0.05, color="black", linestyle=":", linewidth=0.8)
    axis.set_xlabel("principal component / width")
    axis.set_ylabel("singular value / largest")
    axis.set_xlim(0, 1)
    axis.set_ylim(bottom=1e-3)
    axis.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axis.legend(frameon=False)
    axis.set_title(title)
    return figure


def loss_by_components(losses: Mapping[str, ComponentLosses], widths: Mapping[str, int], title: str) -> Figure:
    """What the top components recover, of the divergence and of the cross-entropy, by kind of hook."""
    figure, axes = make_axes(10.5, 3.8, columns=2)
    kinds = list(losses)
    for kind, loss in losses.items():
        shares = [k / widths[kind] for k in loss.components]
        color = kind_color(kind, kinds)
        for baseline, style in (("zero", "-"), ("mean", "--")):
            label = kind if baseline == "zero" else None
            divergence = [loss.kl_recovered(k, baseline) for k in loss.components]
            axes[0].plot(shares, divergence, style, color=color, label=label, marker="o", markersize=2.5)
            if loss.baseline(baseline).cross_entropy > loss.clean.cross_entropy:
                entropy = [loss.recovered(k, baseline) for k in loss.components]
                axes[1].plot(shares, entropy, style, color=color, marker="o", markersize=2.5)
    axes[0].plot([], [], "-", color="grey", label="against zero ablation")
    axes[0].plot([], [], "--", color="grey", label="against mean ablation")
    axes[0].legend(frameon=False, loc="lower right", fontsize=8)
    skipped = [
        f"{kind}: {baseline} ablation lowers the loss"
        for kind, loss in losses.items()
        for baseline in ("zero", "mean")
        if loss.baseline(baseline).cross_entropy <= loss.clean.cross_entropy
    ]
    if skipped:
        note = "\n".join(["not drawn:", *skipped])
        axes[1].annotate(note, (0.97, 0.05), xycoords="axes fraction", ha="right", fontsize=8)
    for axis, name in zip(axes, ("divergence from the clean model", "cross-entropy"), strict=True):
        axis.axhline(0.95, color="black", linestyle=":", linewidth=0.8)
        axis.set_title(f"Recovered {name}", fontsize=10)
        axis.set_xlabel("components kept / width")
        axis.set_xlim(0, 1)
        axis.set_ylim(*_limits(axis))
        axis.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    figure.suptitle(title, fontsize=11)
    return figure


def _limits(axis: Axes) -> tuple[float, float]:
    """From the data, but never so wide that the way from 0 to 1 cannot be read."""
    low, high = axis.get_ylim()
    return max(min(low, -0.05), -0.5), min(max(high, 1.05), 1.5)


def attention_decomposition(parts: AttentionDecomposition) -> Figure:
    """Singular values of O and their two factors, and which heads write each principal direction."""
    figure, (left, right) = make_axes(10.5, 4.0, columns=2)
    d = parts.variance.shape[0]
    curves = {
        "O: attention output": (parts.variance.sqrt(), "black", 1.8),
        "Z: attended values": (parts.z_variance.sqrt(), KIND_COLORS["hook_z"], 1.2),
        "W_O: output weights": (parts.w_norm_squared.sqrt(), KIND_COLORS["mlp_out"], 1.2),
    }
    for label, (values, color, width) in curves.items():
        left.semilogy(range(1, d + 1), (values / values[0]).tolist(), color=color, linewidth=width, label=label)
    left.set_title("Each factor along O's principal directions")
    left.set_ylabel("standard deviation or norm / first")
    left.set_ylim(bottom=1e-4)
    left.legend(frameon=False, loc="lower left")
    n_heads = parts.head_share.shape[1]
    edges = [i * d // min(_HEAD_BINS, d) for i in range(min(_HEAD_BINS, d) + 1)]
    bins = [parts.head_share[a:b].mean(dim=0).tolist() for a, b in pairwise(edges)]
    limit = max(abs(value) for column in bins for value in column)
    image = right.pcolormesh(
        [edge + 0.5 for edge in edges],
        [h - 0.5 for h in range(n_heads + 1)],
        list(zip(*bins, strict=True)),
        cmap="RdBu_r",
        norm=TwoSlopeNorm(0, -limit, limit),
    )
    figure.colorbar(image, ax=right, format=PercentFormatter(1.0, decimals=0), label="share of the variance of O")
    right.set_title("Who writes them")
    right.set_ylabel("head")
    right.yaxis.set_major_locator(MaxNLocator(integer=True))
    right.grid(visible=False)
    for axis in (left, right):
        axis.set_xlabel("principal directions of O")
        axis.set_xlim(1, d)
    figure.suptitle(f"Layer {parts.layer}: Var(O e) = Var(Z v/|v|) |v|², v = W_O e", fontsize=11)
    return figure


def subspace_energy(spectrum: Spectrum, decoders: Mapping[str, Tensor], d_init: int) -> Figure:
    """The activations' singular values, and how much of each decoder lies along each principal direction.

    Args:
        spectrum: of the activations.
        decoders: from a run's name to its W_dec (d_sae, d_in).
        d_init: dimension of the subspace that decoder rows started in.
    """
    figure, (left, right) = make_axes(10.5, 3.8, columns=2)
    s = spectrum.singular_values
    index = range(1, spectrum.d + 1)
    left.semilogy(index, (s / s[0]).numpy(), color="black")
    left.axhline(0.05, color="black", linestyle=":", linewidth=0.8)
    left.annotate("5 %", (spectrum.d, 0.05), ha="right", va="bottom", fontsize=8)
    left.set_ylabel("singular value / largest")
    left.set_title(f"Effective rank {spectrum.effective_rank:.0f} of {spectrum.d}")
    basis = spectrum.principal_directions(spectrum.d).float()
    for i, (name, decoder) in enumerate(decoders.items()):
        rows = decoder.detach().float()
        rows = rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-12)
        energy = (rows @ basis).square().mean(dim=0)
        right.plot(index, energy.cumsum(0).numpy(), color=COLORS[i % len(COLORS)], label=name)
    variance = spectrum.variances.cumsum(0) / spectrum.variances.sum()
    right.plot(index, variance.numpy(), color="black", linestyle="--", linewidth=1, label="activations")
    right.set_ylabel("share of squared norm")
    right.set_title("What lies inside the top directions")
    right.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    right.set_ylim(0, 1.02)
    for axis in (left, right):
        axis.axvspan(0, d_init, color=COLORS[1], alpha=0.08, linewidth=0)
        axis.set_xlabel("principal directions of the activations")
        axis.set_xlim(0, spectrum.d)
    right.legend(frameon=False, loc="lower right")
    return figure
