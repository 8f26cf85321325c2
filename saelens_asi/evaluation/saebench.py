"""SAEBench's own core metrics (sae-bench, arXiv 2503.09532) of an SAE, beside ours of the same tokens.

Its metrics run as they are, on windows that are handed to them: no hub is asked for a model or a text. What it calls by
a name of ours and counts in another way is counted here a second time as it does (``counted_alike``), by this package's
own code, so that both numbers can be held against each other.
"""

from __future__ import annotations

import importlib
import logging
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from sae_lens import SAE
from torch import Tensor
from torch.nn.functional import kl_div, nll_loss

from saelens_asi.activations.hooks import HookedModel, device_of, hook_points, keep_mask, logits_at, special_token_ids
from saelens_asi.activations.reader import TextPass
from saelens_asi.activations.replacement import log_probabilities, ratio, replacements_at
from saelens_asi.activations.tokens import TokenData, token_batches
from saelens_asi.evaluation.loss import Place, reconstructing, zeroing
from saelens_asi.evaluation.metrics import RunningReconstruction, SAEEvaluation
from saelens_asi.evaluation.reconstruction import measure_
from saelens_asi.evaluation.run import place_of
from saelens_asi.evaluation.saes import inference_form, on_flat_vectors
from saelens_asi.evaluation.tables import markdown_table

logger = logging.getLogger(__name__)

SAE_BENCH = "0.6.0"
INSTALL = f"pip install --no-deps sae-bench=={SAE_BENCH}"

# Logits of a batch of windows: sae-bench holds about ten tensors of that size.
_MAX_LOGITS = 2**26

# By name of a measure: where sae-bench has it, and how its count differs from ours.
MEASURES: dict[str, tuple[str, str, str]] = {
    "explained variance": (
        "reconstruction_quality",
        "explained_variance",
        "sae-bench's is not centred: 1 - E|x - x_hat|^2 / (E|x|^2 - (E|x|^2 / d)^2); ours takes E|x - E x|^2, over all "
        "tokens at once",
    ),
    "MSE": (
        "reconstruction_quality",
        "mse",
        "sae-bench divides the squared error of a token by the number of tokens in its batch, so that it falls with "
        "the batch; ours is normalized, a share of E|x - E x|^2",
    ),
    "L0": ("sparsity", "l0", "the same"),
    "live features": (
        "misc_metrics",
        "frac_alive",
        "the same share, over whole batches of windows; sae-bench counts positive activations alone",
    ),
    "CE recovered": (
        "model_performance_preservation",
        "ce_loss_score",
        "sae-bench's ablation zeroes BOS and other special tokens too, and it counts what follows them not, but what "
        "they follow; ours leaves special tokens alone",
    ),
    "KL recovered": (
        "model_behavior_preservation",
        "kl_div_score",
        "as with CE; and sae-bench counts the last position of each window too",
    ),
}


@dataclass(frozen=True)
class SAEBenchCore:
    """What sae-bench says of an SAE, and what we do of the same tokens.

    Attributes:
        metrics: sae-bench's own, by category and name; None for what is not finite.
        counted_alike: ours, by the names of ``MEASURES``, counted as sae-bench counts; None where nothing is left to
            take a share of.
        n_tokens: tokens in the windows that error and firings were counted on, special ones included.
        n_loss_tokens: the same of those that predictions were compared on.
        batch_size: windows in a batch; means of batches are sae-bench's unit.
    """

    metrics: dict[str, dict[str, float | None]]
    counted_alike: dict[str, float | None]
    n_tokens: int
    n_loss_tokens: int
    batch_size: int

    def value(self, measure: str) -> float | None:
        """Sae-bench's number for a measure of ``MEASURES``; None where it has none."""
        category, name, _ = MEASURES[measure]
        return self.metrics.get(category, {}).get(name)

    def to_dict(self, ours: SAEEvaluation) -> dict[str, Any]:
        """Everything, with our evaluation's numbers beside, as strict JSON."""
        own = _ours(ours)
        measures = {
            measure: {
                "sae_bench": self.value(measure),
                "ours_counted_alike": self.counted_alike.get(measure),
                "ours": own.get(measure),
                "difference": MEASURES[measure][2],
            }
            for measure in MEASURES
        }
        counts = {"n_tokens": self.n_tokens, "n_loss_tokens": self.n_loss_tokens, "batch_size": self.batch_size}
        return {"measures": measures, "sae_bench_core": self.metrics, **counts}


def check_sae_bench() -> str:
    """The version of sae-bench that is installed.

    Raises:
        ImportError: where it, or something that it imports, is missing; with the command that installs it.
    """
    try:
        _core()
    except ImportError as error:
        raise ImportError(
            f"sae-bench's core metrics cannot be imported ({error}): {INSTALL} (without --no-deps it takes older numpy "
            "and datasets in place of yours)"
        ) from error
    try:
        found = version("sae-bench")
    except PackageNotFoundError:
        found = "of unknown version"
    if found != SAE_BENCH:
        logger.warning("sae-bench is %s here, and was compared with ours as %s", found, SAE_BENCH)
    return found


def _core() -> Any:
    # The other modules of the package take datasets and models from the hub.
    return importlib.import_module("sae_bench.evals.core.main")


@torch.no_grad()
def sae_bench_core(
    load: Callable[[], SAE[Any]],
    model: HookedModel,
    data: TokenData,
    *,
    name: str,
    model_name: str,
    hook_name: str | None = None,
    n_tokens: int,
    loss_tokens: int = 4096,
    batch_size: int = 8,
    context_size: int = 256,
    result_path: Path | None = None,
) -> SAEBenchCore:
    """Sae-bench's core metrics of one SAE, and ours counted in the same way.

    Time and memory are sae-bench's: it makes all d_sae activations of a batch, and all logits three times.

    Args:
        load: makes the SAE; called twice, since sae-bench folds the decoder's norms into what it gets.
        model: a HookedTransformer or TransformerBridge.
        data: token ids or rows of a dataset, as in ``asi.evaluate``.
        name: of the SAE, in sae-bench's result file.
        model_name: the same of the model.
        hook_name: where the activations are read; that of the SAE's own metadata unless told.
        n_tokens: at least so many tokens in whole windows for error and firings, where the data hold them.
        loss_tokens: the same for predictions.
        batch_size: windows in a forward pass, fewer where the model's vocabulary is large.
        context_size: length of the windows that text is packed into.
        result_path: where sae-bench's own result file goes; None for nowhere.

    Raises:
        ImportError: where sae-bench is not installed.
        ValueError: for an SAE that sae-bench cannot measure, and for data that fill no window.
    """
    check_sae_bench()
    sae = load()
    place = place_of(sae, name, model, hook_name)
    words = int(getattr(model.cfg, "d_vocab", 0)) or 2**16
    batch_size = max(1, min(batch_size, _MAX_LOGITS // (context_size * words)))
    windows = _whole_windows(model, data, batch_size, context_size, max(n_tokens, loss_tokens))
    batch_size = min(batch_size, len(windows))
    counted, predicted = (_batches(windows, batch_size, n) for n in (n_tokens, loss_tokens))
    text = _Text(counted, predicted, batch_size, special_token_ids(model, True))
    metrics = _sae_benchs_own(load(), model, place, text, name, model_name, result_path)
    form = inference_form(sae)
    with on_flat_vectors(form):
        alike = _alike_of_activations(form, model, place, text) | _alike_of_predictions(form, model, place, text)
    return SAEBenchCore(
        metrics=metrics,
        counted_alike={measure: _finite(value) for measure, value in alike.items()},
        n_tokens=counted.numel(),
        n_loss_tokens=predicted.numel(),
        batch_size=batch_size,
    )


class _Text(NamedTuple):
    """(n_windows, n_positions) ids on which error and firings are counted, and predictions compared, in batches of one
    size; and the special ids among them."""

    counted: Tensor
    predicted: Tensor
    batch_size: int
    ignored: Tensor


def _whole_windows(model: HookedModel, data: TokenData, batch_size: int, context_size: int, n_tokens: int) -> Tensor:
    """(n_windows, n_positions) ids of the first windows of one length without padding, which sae-bench would count."""
    found: list[Tensor] = []
    for tokens, is_text in token_batches(model, data, batch_size, context_size):
        found += [
            window
            for window, whole in zip(tokens, is_text.all(dim=1).tolist(), strict=True)
            if whole and (not found or len(window) == len(found[0]))
        ]
        # As many again as fill the last batch.
        if found and len(found) * len(found[0]) >= n_tokens + batch_size * len(found[0]):
            break
    if not found:
        raise ValueError("the data fill no window for sae-bench: give more text, or a smaller context_size")
    return torch.stack(found)


def _batches(windows: Tensor, batch_size: int, n_tokens: int) -> Tensor:
    """The windows of as many whole batches as hold ``n_tokens``, or as there are; at least one."""
    needed = math.ceil(n_tokens / (batch_size * windows.shape[1]))
    return windows[: batch_size * max(1, min(needed, len(windows) // batch_size))]


class _Windows:
    """What sae-bench's core metrics ask of SAELens's ActivationsStore: batches of tokens."""

    def __init__(self, text: _Text, device: torch.device | str) -> None:
        self.store_batch_size_prompts, self.context_size = text.batch_size, text.counted.shape[1]
        self._parts = [text.predicted.to(device), text.counted.to(device)]
        self._at = 0

    def get_batch_tokens(self, batch_size: int) -> Tensor:
        batch = self._parts[0][self._at : self._at + batch_size]
        self._at += batch_size
        return batch

    def reset_input_dataset(self) -> None:
        """From the predictions' windows to those of the error."""
        self._parts.pop(0)
        self._at = 0


def _sae_benchs_own(
    sae: SAE[Any],
    model: HookedModel,
    place: Place,
    text: _Text,
    name: str,
    model_name: str,
    result_path: Path | None,
) -> dict[str, dict[str, float | None]]:
    core = _core()
    metadata = sae.cfg.metadata
    metadata.hook_name, metadata.model_name = place.hook_name, model_name
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Decoder weights are not normalized")
        try:
            sae.fold_W_dec_norm()  # as it does with each SAE that it loads itself
        except NotImplementedError:
            logger.info("%s: decoder rows keep their norms, on which sae-bench's l1 depends", name)
        core.general_utils.load_and_format_sae(name, sae, str(sae.device))
    config = core.CoreEvalConfig(
        model_name=model_name,
        llm_dtype=str(getattr(model.cfg, "dtype", torch.float32)).removeprefix("torch."),
        batch_size_prompts=text.batch_size,
        n_eval_reconstruction_batches=len(text.predicted) // text.batch_size,
        n_eval_sparsity_variance_batches=len(text.counted) // text.batch_size,
        context_size=text.counted.shape[1],
        dataset="windows of saelens-asi evaluate",
        exclude_special_tokens_from_reconstruction=True,
        **{f"compute_{kind}": True for kind in _KINDS},
    )
    store = _Windows(text, device_of(model))
    try:
        scalars, features = core.run_evals(sae, store, model, config, ignore_tokens=set(text.ignored.tolist()))
        metrics = {**scalars, "misc_metrics": core.calculate_misc_metrics(features)}
    except Exception as error:  # whatever it meets in an architecture or a model that it does not expect
        what = " ".join(str(error).split())[:300]
        raise ValueError(f"{name}: sae-bench cannot measure it: {type(error).__name__}: {what}") from error
    if result_path is not None:
        _save(core, config, sae, metrics, features, name, result_path)
    return {kind: {key: _finite(value) for key, value in values.items()} for kind, values in metrics.items()}


_KINDS = (
    *("kl", "ce_loss", "l2_norms", "sparsity_metrics", "variance_metrics"),
    *("featurewise_density_statistics", "featurewise_weight_based_metrics"),
)


def _save(
    core: Any, config: Any, sae: SAE[Any], metrics: Mapping[str, Any], features: Any, name: str, path: Path
) -> None:
    """Sae-bench's own result file, as its graphs read it; it writes -1 for what is not finite."""
    path.parent.mkdir(parents=True, exist_ok=True)
    result = {"eval_cfg": config, "metrics": metrics, "feature_metrics": features, "sae_set": "local", "sae_id": name}
    from sae_bench.sae_bench_utils import get_eval_uuid, get_sae_lens_version

    core.save_single_eval_result(
        core.replace_nans_with_negative_one(result),
        get_eval_uuid(), get_sae_lens_version(), f"sae-bench {check_sae_bench()}", str(path), sae,
    )  # fmt: skip


def _finite(value: Any) -> float | None:
    return float(value) if math.isfinite(value) else None


def _alike_of_activations(sae: SAE[Any], model: HookedModel, place: Place, text: _Text) -> dict[str, float]:
    """Error and firings from our own running sums, batch by batch."""
    batches: list[RunningReconstruction] = []

    def read(vectors: Tensor) -> None:
        x = vectors[:, place.columns(sae.cfg.d_in, vectors.shape[1])]
        batches.append(measure_(RunningReconstruction.zeros(sae.cfg.d_sae, sae.cfg.d_in), sae, x))

    reading = TextPass(
        model, text.counted, hook_points(model, [place.hook_name]), batch_size=text.batch_size,
        context_size=text.counted.shape[1], exclude_special_tokens=text.ignored.tolist(),
    )  # fmt: skip
    for _ in reading.read({place.hook_name: read}, description="As sae-bench", progress=False):
        pass
    n = sum(one.n_tokens for one in batches)
    errors = [float(one.error) / one.n_tokens for one in batches]
    squares = [float(one.deviation) / one.n_tokens + float(one.mean.square().sum()) for one in batches]
    error, square = sum(errors) / len(batches), sum(squares) / len(batches)
    counts = torch.stack([one.firing_counts.cpu() for one in batches]).sum(dim=0)
    return {
        "explained variance": 1 - ratio(error, square - (square / sae.cfg.d_in) ** 2),
        "MSE": sum(errors) / n,
        "L0": int(counts.sum()) / n,
        "live features": int((counts > 0).sum()) / len(counts),
    }


def _alike_of_predictions(sae: SAE[Any], model: HookedModel, place: Place, text: _Text) -> dict[str, float]:
    """Shares of cross-entropy and divergence recovered, window by window: hook zeroed everywhere, SAE where it counts.

    Counted are all positions that hold no special token: for the cross-entropy but the last, which has no next token.
    """
    windows, keep = text.predicted, keep_mask(text.predicted, text.ignored)
    everywhere = torch.ones_like(keep)
    changed = {
        **replacements_at(model, place.hook_name, {"zero": zeroing(sae, place)}, everywhere),
        **replacements_at(model, place.hook_name, {"sae": reconstructing(sae, place)}, keep),
    }
    device = device_of(model)
    entropies = dict.fromkeys(("clean", *changed), 0.0)
    divergences = dict.fromkeys(changed, 0.0)
    for i in range(len(windows)):
        one, batch, where = slice(i, i + 1), windows[i : i + 1].to(device), keep[i : i + 1].to(device)
        targets = torch.cat([batch[:, 1:], torch.full_like(batch[:, :1], _NO_TARGET)], dim=1)[where]
        clean = torch.cat(list(log_probabilities(logits_at(model, batch, where))))
        entropies["clean"] += _entropy(clean, targets)
        for name, logits in changed.items():
            own = torch.cat(list(log_probabilities(logits(batch, one, where))))
            entropies[name] += _entropy(own, targets)
            divergences[name] += float(kl_div(own, clean, log_target=True, reduction="sum"))
    return {
        "CE recovered": ratio(entropies["zero"] - entropies["sae"], entropies["zero"] - entropies["clean"]),
        "KL recovered": 1 - ratio(divergences["sae"], divergences["zero"]),
    }


_NO_TARGET = -100


def _entropy(log_probabilities: Tensor, targets: Tensor) -> float:
    return float(nll_loss(log_probabilities, targets, ignore_index=_NO_TARGET, reduction="sum"))


def _ours(result: SAEEvaluation) -> dict[str, float | None]:
    loss = result.loss.to_dict() if result.loss else {}
    return {
        "explained variance": result.explained_variance,
        "MSE": result.nmse,
        "L0": result.l0,
        "live features": 1 - result.dead_fraction,
        "CE recovered": loss.get("recovered"),
        "KL recovered": loss.get("kl_recovered"),
    }


def comparison_table(found: Mapping[str, SAEBenchCore], ours: Mapping[str, SAEEvaluation]) -> str:
    """Markdown: the measures of each SAE, and under the table how sae-bench's differ from ours."""
    rows = [
        [name, measure, *map(_cell, (one.value(measure), one.counted_alike.get(measure), _ours(ours[name])[measure]))]
        for name, one in found.items()
        for measure in MEASURES
    ]
    columns = ["SAE", "measure", "sae-bench", "ours, counted as sae-bench does", "ours"]
    notes = [
        f"- {measure}: {difference}." for measure, (_, _, difference) in MEASURES.items() if difference != "the same"
    ]
    return "\n".join([markdown_table(columns, rows, align="llrrr"), "", "How they are counted:", "", *notes])


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
