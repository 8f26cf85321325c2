"""saelens-asi evaluate from the command line to the figures: folders, releases, interruption, errors in one line."""

from __future__ import annotations

import csv
import importlib
import itertools
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sae_lens import SAE
from sae_lens.registry import get_sae_training_class
from safetensors.torch import load_file, save_file

import saelens_asi as asi
from saelens_asi import cli
from saelens_asi.activations.loading import load_documents
from saelens_asi.evaluation import saes as sae_sources
from saelens_asi.evaluation.results import rank_correlation
from saelens_asi.evaluation.saes import find_saes
from saelens_asi.plots import evaluation as evaluation_plots
from saelens_asi.plots.style import label_points, make_axes
from tests.helpers import tiny

command = importlib.import_module("saelens_asi.cli.evaluate")  # the package has a function of that name too

HOOKS = {
    "attn_out": "blocks.1.hook_attn_out",
    "mlp_out": "blocks.0.hook_mlp_out",
    "o_proj": "model.layers.0.self_attn.o_proj",
}


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_text(tmp_path_factory.mktemp("dataset"), 60, 100)


@pytest.fixture(scope="module")
def sae_folder(tmp_path_factory: pytest.TempPathFactory, llama_folder: Path, text_folder: Path) -> Path:
    """Three SAEs below a folder, as SAELens saves them; two of them know their model and text."""
    folder = tmp_path_factory.mktemp("saes")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for i, (name, hook) in enumerate(HOOKS.items()):
            sae = get_sae_training_class("standard")[0](tiny.sae_config("standard", d_sae=30 + i))
            sae.b_enc.data -= 0.1 * torch.rand(30 + i) * i
            metadata = sae.cfg.metadata
            metadata.hook_name, metadata.context_size = hook, 16
            if name != "o_proj":
                metadata.model_name, metadata.dataset_path = str(llama_folder), str(text_folder)
            sae.save_inference_model(folder / "run" / name)
    return folder


def evaluate(saes: Any, out: Path, *flags: str) -> None:
    cli.main(["evaluate", *map(str, saes), "--out", str(out), *["--n-tokens", "300", "--loss-tokens", "96"], *flags])


@pytest.fixture(scope="module")
def finished(sae_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished")
    evaluate([sae_folder], out)
    return out


def test_it_writes_results_table_counts_and_figures(finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text())["results"]
    assert list(results) == ["run/attn_out", "run/mlp_out", "run/o_proj"]
    counts = load_file(finished / "firing_counts.safetensors")
    for i, (name, values) in enumerate(results.items()):
        assert values["n_tokens"] == 300
        assert values["d_sae"] == len(counts[name]) == 30 + i
        assert values["n_dead"] == int((counts[name] == 0).sum())
        assert values["loss"]["n_tokens"] > 0
    assert results["run/o_proj"]["hook_name"] == "blocks.0.attn.o.hook_out"
    table = (finished / "results.md").read_text()
    assert table.count("\n| run/") == 3
    assert "fires on none of the 300 tokens" in table
    with (finished / "dead_against_rank.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["layer"], row["kind"]) for row in rows] == [("1", "attn_out"), ("0", "mlp_out"), ("0", "attn_out")]
    for name in ("firing_rates.png", "dead_against_rank.png"):
        assert (finished / name).read_bytes().startswith(b"\x89PNG")
    assert not list(finished.glob("unfinished*"))


def test_its_numbers_are_those_of_the_function(
    finished: Path, sae_folder: Path, bridge: Any, text_folder: Path
) -> None:
    _, held_out = load_documents(str(text_folder), 4 * 396)
    sae = SAE.load_from_disk(sae_folder / "run" / "mlp_out")
    expected = asi.evaluate(sae, bridge, held_out, n_tokens=300, loss_tokens=96, context_size=16, progress=False)
    values = json.loads((finished / "results.json").read_text())["results"]["run/mlp_out"]
    del values["source"]
    assert torch.equal(load_file(finished / "firing_counts.safetensors")["run/mlp_out"], expected.firing_counts)
    assert values.pop("loss") == pytest.approx(expected.loss.to_dict(), rel=1e-5)
    for name, value in values.items():
        exact = expected.to_dict()[name]
        assert value == (pytest.approx(exact, rel=1e-6) if isinstance(exact, float) else exact), name


def test_a_second_run_measures_only_what_is_missing_or_changed(
    finished: Path,
    sae_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    saes, out = tmp_path / "saes", tmp_path / "out"
    shutil.copytree(sae_folder, saes)
    measured: list[list[str]] = []
    stock = command.evaluate_each

    def interrupted_after_two(found: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(list(found))
        return stock(found, *args, **kwargs)

    monkeypatch.setattr(command, "evaluate_each", interrupted_after_two)
    with pytest.raises(SystemExit) as exit_info:
        evaluate([saes], out, "--saes-per-pass", "1")
    assert exit_info.value.code == 130
    assert "the same command continues" in capsys.readouterr().err
    assert len(json.loads((out / "results.json").read_text())["results"]) == 2

    def counted(found: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        measured.append(list(found))
        return stock(found, *args, **kwargs)

    monkeypatch.setattr(command, "evaluate_each", counted)
    evaluate([saes], out, "--saes-per-pass", "1")
    assert measured == [["run/attn_out"], ["run/mlp_out"], ["run/o_proj"]]
    whole, parts = (json.loads((folder / "results.json").read_text())["results"] for folder in (finished, out))
    for name, values in whole.items():
        assert parts[name]["nmse"] == pytest.approx(values["nmse"])
        assert parts[name]["loss"] == pytest.approx(values["loss"], rel=1e-4)
        assert parts[name]["firing_rates"] == values["firing_rates"]
    evaluate([saes], out)
    assert len(measured) == 3
    SAE.load_from_disk(saes / "run" / "attn_out").save_model(saes / "run" / "attn_out")  # another file
    evaluate([saes], out)
    assert measured[3:] == [["run/attn_out"]]
    evaluate([saes], out, "--loss-tokens", "0")
    assert measured[4:] == [["run/attn_out", "run/mlp_out", "run/o_proj"]]


def test_one_folder_alone_and_all_text(sae_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate([sae_folder / "run" / "mlp_out"], tmp_path, "--all-text", "--loss-tokens", "0", "--n-tokens", "1000")
    values = json.loads((tmp_path / "results.json").read_text())["results"]["mlp_out"]
    assert (values["n_tokens"], values["loss"]) == (1000, None)
    assert not (tmp_path / "dead_against_rank.png").exists()
    printed = capsys.readouterr().out
    assert (tmp_path / "results.md").read_text().strip() in printed
    assert str(tmp_path / "firing_rates.png") in printed


def test_the_history_of_a_run_is_drawn(sae_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(sae_folder / "run" / "mlp_out", tmp_path / "sae")
    record = {"step": 1, "n_tokens": 32, "nmse": 0.5, "dead_fraction": 0.1, "l0": 4.0}
    (tmp_path / "sae" / "training_history.jsonl").write_text(json.dumps(record) + "\n")
    evaluate([tmp_path / "sae"], tmp_path / "out", "--loss-tokens", "0")
    assert (tmp_path / "out" / "training_history.png").exists()


def test_errors_end_in_one_line(sae_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(sae_folder, tmp_path / "mixed")
    path = tmp_path / "mixed" / "run" / "mlp_out" / "cfg.json"
    cfg = json.loads(path.read_text())
    cfg["metadata"]["model_name"] = "gpt2"
    path.write_text(json.dumps(cfg))
    (tmp_path / "empty").mkdir()
    for saes, flags, message in (
        (tmp_path / "empty", [], "holds no SAE"),
        ("gpt2-small-rez-jb", [], "did you mean 'gpt2-small-res-jb'"),
        ("gpt2-small-res-jb/blocks.99.hook_resid_pre", [], "has no SAE 'blocks.99.hook_resid_pre'"),
        (tmp_path / "mixed", [], "several models"),
        (sae_folder, ["--saes-per-pass", "0"], "--saes-per-pass 0 must be at least 1"),
        (sae_folder, ["--hooks", "blocks.7.hook_mlp_out"], "no hook of this model is called"),
    ):
        with pytest.raises(SystemExit) as exit_info:
            evaluate([saes], tmp_path / "out", *flags)
        assert exit_info.value.code == 2
        error = capsys.readouterr().err
        assert message in error
        assert "Traceback" not in error


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, sae_folder: Path) -> list[tuple[str, str]]:
    """A release whose ids lead to the folders; the pairs of release and id that were loaded."""
    loaded: list[tuple[str, str]] = []
    lookup = SimpleNamespace(saes_map=dict.fromkeys(["l1/attn_out", "l0/mlp_out", "l0/o_proj"], "path"))
    monkeypatch.setattr(sae_sources, "get_pretrained_saes_directory", lambda: {"tiny": lookup, "tiny-2": lookup})

    def from_pretrained(release: str, sae_id: str, device: str, dtype: str) -> Any:
        loaded.append((release, sae_id))
        return SAE.load_from_disk(sae_folder / "run" / Path(sae_id).name, device=device)

    monkeypatch.setattr(SAE, "from_pretrained", from_pretrained)
    return loaded


def test_releases_ids_and_patterns(hub: list[tuple[str, str]]) -> None:
    def found(*words: str) -> list[tuple[str, str, str]]:
        return [(one.name, one.release, one.sae_id) for one in find_saes(words)]

    assert [name for name, _, _ in found("tiny")] == ["l1/attn_out", "l0/mlp_out", "l0/o_proj"]
    assert found("tiny/l0/mlp_out") == [("l0/mlp_out", "tiny", "l0/mlp_out")]
    assert [name for name, _, _ in found("tiny/l0/*")] == ["l0/mlp_out", "l0/o_proj"]
    assert found("tiny-2/l0/mlp_out")[0][1] == "tiny-2"
    assert found("owner/repository/a/b") == [("a/b", "owner/repository", "a/b")]
    both = found("tiny/l0/mlp_out", "tiny-2/l0/mlp_out")
    assert [name for name, _, _ in both] == ["tiny/l0/mlp_out", "tiny-2/l0/mlp_out"]


def test_a_release_is_evaluated_from_its_name(hub: list[tuple[str, str]], finished: Path, tmp_path: Path) -> None:
    evaluate(["tiny"], tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    local = json.loads((finished / "results.json").read_text())["results"]
    for name, values in results.items():
        assert values["firing_rates"] == local[f"run/{Path(name).name}"]["firing_rates"]
    assert {sae_id for _, sae_id in hub} == set(results)


def test_a_model_whose_weights_were_changed_for_training_is_loaded_so(
    sae_folder: Path, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(sae_folder / "run" / "attn_out", tmp_path / "sae")
    path = tmp_path / "sae" / "cfg.json"
    cfg = json.loads(path.read_text())
    cfg["metadata"] |= {"model_name": "tiny", "model_from_pretrained_kwargs": {"center_writing_weights": True}}
    path.write_text(json.dumps(cfg))
    asked: list[Any] = []
    monkeypatch.setattr(command, "load_hooked_transformer", lambda *args: asked.append(args) or model)
    evaluate([tmp_path / "sae"], tmp_path / "out", "--loss-tokens", "0")
    kwargs = {"center_writing_weights": True, "dtype": torch.float32}
    assert asked == [("HookedTransformer", "tiny", "cpu", kwargs)]
    shutil.copytree(tmp_path / "sae", tmp_path / "both" / "centred")
    cfg["metadata"]["model_from_pretrained_kwargs"] = {"center_writing_weights": False}
    path.write_text(json.dumps(cfg))
    shutil.copytree(tmp_path / "sae", tmp_path / "both" / "plain")
    with pytest.raises(SystemExit):
        evaluate([tmp_path / "both"], tmp_path / "out")


def _record(rank: float, dead: float, hook: str) -> asi.SAEEvaluation:
    counts = torch.ones(100, dtype=torch.int64)
    counts[: round(100 * dead)] = 0
    return asi.SAEEvaluation(1000, dead, 0.3, 8.0, firing_counts=counts, d_in=64, hook_name=hook, effective_rank=rank)


def test_dead_against_rank_draws_every_record_and_says_the_correlation() -> None:
    records = {str(i): _record(10 + i, 0.9 - 0.1 * i, f"blocks.{i}.hook_attn_out") for i in range(4)}
    records["m"] = _record(50, 0.0, "blocks.2.hook_mlp_out")
    figure = evaluation_plots.dead_against_rank(records)
    (axis,) = figure.axes
    points = [tuple(point) for collection in axis.collections for point in collection.get_offsets().tolist()]
    expected = [(100 * r.effective_rank / 64, 100 * r.dead_fraction) for r in records.values()]
    torch.testing.assert_close(torch.tensor(sorted(points)), torch.tensor(sorted(expected)))
    assert "rank correlation -1.00 over 5 SAEs" in axis.get_title()
    assert [text.get_text() for text in axis.texts] == ["0", "1", "2", "3", "2"]
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["attn_out", "mlp_out"]


def test_groups_have_correlations_of_their_own() -> None:
    records = {f"a{i}": _record(10 + i, 0.9 - 0.1 * i, f"blocks.{i}.hook_attn_out") for i in range(4)}
    records |= {f"b{i}": _record(10 + i, 0.1 * i, f"blocks.{i}.hook_attn_out") for i in range(3)}
    figure = evaluation_plots.dead_against_rank(records, {name: name[0] for name in records})
    title = figure.axes[0].get_title()
    assert "a: rank correlation -1.00 over 4 SAEs" in title
    assert "b: rank correlation +1.00 over 3 SAEs" in title


def test_labels_cover_neither_each_other_nor_points() -> None:
    figure, (axis,) = make_axes(4, 3)
    points = [(0.5 + 0.012 * (i % 3), 0.5 + 0.02 * (i // 3)) for i in range(9)] + [(1.0, 1.0)]
    axis.scatter(*zip(*points, strict=True), s=20)
    axis.set(xlim=(0, 1), ylim=(0, 1))
    figure.draw_without_rendering()
    label_points(axis, points, [str(i) for i in range(10)], mark=4)
    figure.draw_without_rendering()
    boxes = [text.get_window_extent().shrunk(0.9, 0.6) for text in axis.texts]
    assert len(boxes) == 10
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    frame = axis.get_window_extent()
    assert all(frame.x0 <= box.x0 and box.x1 <= frame.x1 and box.y1 <= frame.y1 for box in boxes)


def test_rank_correlation_is_spearmans() -> None:
    correlation = rank_correlation
    assert correlation([1, 2, 3], [10, 1000, 1e6]) == pytest.approx(1)
    assert correlation([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    # With ties, by hand: ranks (1, 2.5, 2.5, 4) and (1, 3, 2, 4).
    assert correlation([1, 5, 5, 9], [0, 2, 1, 3]) == pytest.approx(4.5 / (4.5 * 5) ** 0.5)
    assert correlation([1, 2], [1, 2]) is None
    assert correlation([1, 1, 1], [1, 2, 3]) is None


def test_many_saes_are_drawn_as_a_map() -> None:
    records = {f"sae {i}": _record(10 + i, i / 10, f"blocks.{i}.hook_attn_out") for i in range(7)}
    figure = evaluation_plots.firing_rate_map(records)
    dead, alive = (axis.images[0].get_array() for axis in figure.axes[:2])
    assert dead[:, 0].tolist() == pytest.approx([i / 10 for i in range(7)])
    assert alive.sum(axis=1).tolist() == pytest.approx([1 - i / 10 for i in range(7)])


WEIGHTS, CFG = "sae_weights.safetensors", "cfg.json"


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _not_finite(path: Path) -> None:
    tensors = load_file(path)
    tensors["W_dec"][3, 2] = torch.nan
    tensors["b_enc"][:2] = -torch.inf
    save_file(tensors, path)


def _overflowing(path: Path) -> None:
    tensors = load_file(path)
    tensors["W_dec"].fill_(3e38)
    save_file(tensors, path)


def _other_width(path: Path) -> None:
    path.write_text(path.read_text().replace('"d_sae": 31', '"d_sae": 32'))


def _other_hook(path: Path) -> None:
    path.write_text(path.read_text().replace("hook_mlp_out", "hook_mlq_out"))


def _list(path: Path) -> None:
    path.write_text("[1, 2]")


@pytest.mark.parametrize(
    ("file", "harm", "reason"),
    [
        (WEIGHTS, _cut, "is not a safetensors file, or is damaged"),
        (WEIGHTS, Path.unlink, "is missing"),
        (WEIGHTS, _folder, "is not a safetensors file, or is damaged"),
        (WEIGHTS, _not_finite, "cannot be loaded: weights are NaN or infinite (1 of W_dec, 2 of b_enc)"),
        (WEIGHTS, _overflowing, "NaN or infinity"),
        (CFG, _cut, "cannot be read, or is damaged"),
        (CFG, Path.unlink, "is missing"),
        (CFG, _folder, "cannot be read, or is damaged"),
        (CFG, _list, "it holds no JSON object"),
        (CFG, _other_width, "size mismatch"),
        (CFG, _other_hook, "no hook of this model is called 'blocks.0.hook_mlq_out'"),
    ],
)
def test_a_bad_sae_is_named_and_the_others_are_evaluated(
    file: str,
    harm: Any,
    reason: str,
    sae_folder: Path,
    finished: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    shutil.copytree(sae_folder, tmp_path / "saes")
    harm(tmp_path / "saes" / "run" / "mlp_out" / file)
    with pytest.raises(SystemExit) as exit_info:
        evaluate([tmp_path / "saes"], tmp_path / "out")
    assert exit_info.value.code == 2
    printed = capsys.readouterr()
    assert "1 of 3 SAEs are left out" in printed.err
    assert "Traceback" not in printed.err
    results, whole = (json.loads((one / "results.json").read_text())["results"] for one in (tmp_path / "out", finished))
    assert list(results) == ["run/attn_out", "run/o_proj"]
    assert all(results[name]["nmse"] == pytest.approx(whole[name]["nmse"]) for name in results)
    table = (tmp_path / "out" / "results.md").read_text()
    assert table in printed.out
    (line,) = (line for line in table.splitlines() if line.startswith("- run/mlp_out: SAES: "))
    assert reason in line
    assert "mlp_out" in line.removeprefix("- run/mlp_out")
    assert any(reason in record.getMessage() for record in caplog.records)
    assert not any(record.exc_info for record in caplog.records)


def test_where_all_saes_are_bad_the_error_names_them(
    sae_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(sae_folder, tmp_path / "s")
    for name in HOOKS:
        _cut(tmp_path / "s" / "run" / name / WEIGHTS)
    flags = command.EvaluateFlags(saes=(str(tmp_path / "s"),), out=tmp_path / "out", n_tokens=300, loss_tokens=0)
    with pytest.raises(ValueError, match=r"none of run/attn_out, run/mlp_out, run/o_proj can be evaluated") as error:
        command.run(flags)
    for name in HOOKS:
        assert str(tmp_path / "s" / "run" / name / WEIGHTS) in str(error.value)
    with pytest.raises(SystemExit):
        evaluate([tmp_path / "s" / "run" / "mlp_out"], tmp_path / "out")
    assert f"SAES: {tmp_path / 's' / 'run' / 'mlp_out' / WEIGHTS} is not" in capsys.readouterr().err


def test_an_sae_that_is_mended_is_all_that_a_second_run_measures(sae_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(sae_folder, tmp_path / "saes")
    path = tmp_path / "saes" / "run" / "attn_out" / CFG  # the first: model and text come from the next one
    content = path.read_text()
    _cut(path)
    with pytest.raises(SystemExit):
        evaluate([tmp_path / "saes"], tmp_path / "out")
    before = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    path.write_text(content)
    evaluate([tmp_path / "saes"], tmp_path / "out")
    after = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    assert list(before) == ["run/mlp_out", "run/o_proj"]
    assert set(after) == {*before, "run/attn_out"}
    assert "Left out" not in (tmp_path / "out" / "results.md").read_text()


def test_a_damaged_history_costs_its_curve_alone(
    sae_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(sae_folder / "run" / "mlp_out", tmp_path / "sae")
    (tmp_path / "sae" / "training_history.jsonl").write_bytes(b"\xff\xfe{\n{}\n")
    evaluate([tmp_path / "sae"], tmp_path / "out", "--loss-tokens", "0")
    assert (tmp_path / "out" / "firing_rates.png").exists()
    assert "training history of sae is not drawn" in caplog.text


def test_the_unfinished_folder_of_a_checkpoint_is_no_sae(sae_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(sae_folder / "run" / "mlp_out", tmp_path / "saes" / "100")
    shutil.copytree(sae_folder / "run" / "mlp_out", tmp_path / "saes" / ".200.77.tmp")
    assert [one.name for one in find_saes([str(tmp_path / "saes")])] == ["100"]
