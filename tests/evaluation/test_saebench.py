"""SAEBench's own core metrics, run by the real package, beside ours of the same tokens counted in its way."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE

import saelens_asi as asi
from saelens_asi import cli
from saelens_asi.evaluation import saebench
from saelens_asi.evaluation.saebench import MEASURES, SAEBenchCore, check_sae_bench, sae_bench_core
from tests.helpers import tiny

needs_sae_bench = pytest.mark.skipif(
    importlib.util.find_spec("sae_bench") is None, reason=f"needs sae-bench: {saebench.INSTALL}"
)

# Sums of float32 over tokens in sae-bench, of float64 here.
ROUNDING = 2e-5


def agree(found: SAEBenchCore, measure: str) -> bool:
    """Whether sae-bench's number is ours but for its rounding: of a share, that of the losses it is taken of."""
    slack = 0.0
    if measure in ("CE recovered", "KL recovered"):
        ce, kl = (found.metrics[MEASURES[name][0]] for name in ("CE recovered", "KL recovered"))
        of = {
            "CE recovered": ce["ce_loss_with_ablation"] - ce["ce_loss_without_sae"],
            "KL recovered": kl["kl_div_with_ablation"],
        }
        slack = 1e-6 * ce["ce_loss_without_sae"] / abs(of[measure])
    return found.value(measure) == pytest.approx(found.counted_alike[measure], rel=ROUNDING, abs=slack)


def saved(architecture: str, folder: Path, hook_name: str = tiny.ATTN_OUT, **settings: Any) -> Path:
    """A few training steps on activations of one hook, then as SAELens saves it."""
    sae = tiny.trainer(architecture, n_steps=4, **settings).fit()
    metadata = sae.cfg.metadata
    metadata.hook_name, metadata.model_name, metadata.context_size = hook_name, "tiny", tiny.CONTEXT
    sae.save_inference_model(folder)
    return folder


def compared(folder: Path, model: Any, **settings: Any) -> SAEBenchCore:
    how = {"n_tokens": 600, "loss_tokens": 200, "context_size": tiny.CONTEXT, "batch_size": 8, **settings}
    return sae_bench_core(
        lambda: SAE.load_from_disk(folder), model, with_special_tokens(), name="a/b", model_name="tiny", **how
    )


def with_special_tokens() -> torch.Tensor:
    """(64, CONTEXT) ids with BOS in front, and here and there between, so that batches hold unequally many others."""
    tokens = torch.tensor(tiny.tokens(64)["tokens"])
    tokens[:, 0] = 0
    tokens[torch.rand(tokens.shape, generator=torch.Generator().manual_seed(1)) < 0.1] = 0
    return tokens


@needs_sae_bench
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_its_numbers_are_ours_counted_as_it_counts(architecture: str, bridge: Any, tmp_path: Path) -> None:
    found = compared(saved(architecture, tmp_path), bridge)
    assert (found.n_tokens, found.n_loss_tokens, found.batch_size) == (640, 256, 8)
    for measure in MEASURES:
        # A negative activation of AbsTopK is none for sae-bench's density.
        if (architecture, measure) != ("abstopk", "live features"):
            assert agree(found, measure), measure


@needs_sae_bench
def test_both_kinds_of_model_give_its_numbers(hooked_llama: Any, bridge: Any, tmp_path: Path) -> None:
    folder = saved("topk", tmp_path)
    first, other = (compared(folder, model) for model in (hooked_llama, bridge))
    for measure in MEASURES:
        assert first.value(measure) == pytest.approx(other.value(measure), rel=1e-3)
        assert agree(first, measure), measure


@needs_sae_bench
@pytest.mark.parametrize("kind", ["hooked_llama", "bridge"])
def test_heads_side_by_side(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    folder = saved("topk", tmp_path, "blocks.1.attn.hook_z", reshape_activations="hook_z")
    found = compared(folder, request.getfixturevalue(kind))
    for measure in MEASURES:
        assert agree(found, measure), measure


@needs_sae_bench
def test_what_is_named_as_a_difference_is_one(bridge: Any, tmp_path: Path) -> None:
    folder = saved("topk", tmp_path)
    found = compared(folder, bridge)
    ours = asi.evaluate(
        SAE.load_from_disk(folder), bridge, with_special_tokens(), n_tokens=500, loss_tokens=256, progress=False
    )
    values = found.to_dict(ours)["measures"]
    for measure, (_, _, difference) in MEASURES.items():
        one = values[measure]
        same = one["ours"] == pytest.approx(one["sae_bench"], rel=1e-3)
        assert same == (difference == "the same" or measure == "live features"), measure
    # Activations whose mean is long: what is not centred looks better.
    assert values["explained variance"]["sae_bench"] > values["explained variance"]["ours"]


@needs_sae_bench
def test_an_sae_is_left_as_it_was_and_the_file_is_sae_benchs(bridge: Any, tmp_path: Path) -> None:
    folder = saved("topk", tmp_path / "sae")
    sae = SAE.load_from_disk(folder)
    before = {name: value.clone() for name, value in sae.state_dict().items()}
    compared(folder, bridge, result_path=tmp_path / "out" / "core.json")
    after = SAE.load_from_disk(folder).state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    written = json.loads((tmp_path / "out" / "core.json").read_text())
    assert written["eval_type_id"] == "core"
    assert written["sae_lens_id"] == "a/b"
    assert len(written["eval_result_details"]) == sae.cfg.d_sae
    assert written["eval_result_metrics"]["sparsity"]["l0"] == pytest.approx(4)


@needs_sae_bench
def test_data_that_fill_no_window_are_refused(bridge: Any, tmp_path: Path) -> None:
    folder = saved("topk", tmp_path)
    with pytest.raises(ValueError, match="fill no window for sae-bench"):
        sae_bench_core(
            lambda: SAE.load_from_disk(folder), bridge, [], name="", model_name="tiny", n_tokens=10, context_size=16
        )


@needs_sae_bench
def test_what_it_cannot_measure_is_named(bridge: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **kwargs: Any) -> None:
        raise AttributeError("no b_enc")

    monkeypatch.setattr(saebench._core(), "run_evals", fails)
    with pytest.raises(ValueError, match="a/b: sae-bench cannot measure it: AttributeError: no b_enc"):
        compared(saved("topk", tmp_path), bridge)


@needs_sae_bench
def test_the_command_puts_both_side_by_side(
    llama_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").mkdir()
    text = tiny.save_text(tmp_path / "text", 60, 100)
    for name in ("one", "two"):
        saved("topk", tmp_path / "saes" / name)
    args = [
        str(tmp_path / "saes"),
        "--model",
        str(llama_folder),
        "--dataset",
        str(text),
        "--out",
        str(tmp_path / "out"),
    ]
    cli.main(["evaluate", *args, "--n-tokens", "300", "--loss-tokens", "96", "--saebench"])
    written = json.loads((tmp_path / "out" / "saebench.json").read_text())
    ours = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    assert written["sae_bench"] == saebench.SAE_BENCH
    assert written["results"].keys() == ours.keys() == {"one", "two"}
    for name, one in written["results"].items():
        assert one["measures"]["explained variance"]["ours"] == ours[name]["explained_variance"]
        alike = one["measures"]["explained variance"]["ours_counted_alike"]
        assert one["measures"]["explained variance"]["sae_bench"] == pytest.approx(alike, rel=ROUNDING)
        assert (tmp_path / "out" / "saebench" / f"{name}_eval_results.json").exists()
    printed = capsys.readouterr().out
    assert (tmp_path / "out" / "saebench.md").read_text().strip() in printed
    assert "is not centred" in printed
    # Once more: what is evaluated already is read, and sae-bench runs on the same text.
    cli.main(["evaluate", *args, "--n-tokens", "300", "--loss-tokens", "96", "--saebench"])
    assert json.loads((tmp_path / "out" / "saebench.json").read_text()) == written


def test_where_it_is_not_installed_the_way_out_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def missing() -> None:
        raise ModuleNotFoundError("No module named 'sae_bench'")

    monkeypatch.setattr(saebench, "_core", missing)
    with pytest.raises(ImportError, match=re.escape(saebench.INSTALL)):
        check_sae_bench()
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["evaluate", str(tmp_path), "--saebench", "--out", str(tmp_path / "out")])
    assert exit_info.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "No module named 'sae_bench'" in line
    assert "pip install --no-deps sae-bench==0.6.0" in line
    with pytest.raises(SystemExit):
        cli.main(["evaluate", str(tmp_path), "--saebench", "--loss-tokens", "0"])
    assert "--saebench compares predictions too" in capsys.readouterr().err
