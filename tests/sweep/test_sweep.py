"""Sweeps: grids, cells that are kept, interruption, the rows' truth, and the figures."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE, SAETrainer

from saelens_asi import cli
from saelens_asi.cli.sweep import write_report
from saelens_asi.evaluation.run import evaluate
from saelens_asi.plots import sweep_figures
from saelens_asi.resume import one_writer
from saelens_asi.sweep import (
    METHODS,
    Cell,
    SweepTraining,
    fit_power_law,
    read_sweep,
    run,
    run_sweep,
    sweep_table,
    train_cell,
)
from saelens_asi.sweep.cells import cell_of, grid
from saelens_asi.sweep.results import best_rates
from saelens_asi.sweep.run import ARCHITECTURES, run_cell
from tests.helpers import tiny
from tests.helpers.damage import assert_survives_kills

TRAINING = SweepTraining(training_tokens=320, batch_size=32, dead_after_tokens=64)
SIZES: dict[str, Any] = {"d_sae": 48, "k": 4}


HOOK = "blocks.0.hook_attn_out"


@pytest.fixture(scope="module")
def data() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    x = tiny.activations(600) + 1
    return {HOOK: (x[:400], x[400:])}


@pytest.fixture(scope="module")
def train(data) -> torch.Tensor:
    return data[HOOK][0]


def test_a_grid_holds_every_combination_once():
    cells = grid({"d_sae": [32, 64], "k": [2, 4], "seed": [0, 1]}, ["topk", "asi"])
    assert len(cells) == len(set(cells)) == 16
    assert {cell.method for cell in cells} == {"topk", "asi"}


def test_settings_without_effect_make_no_cells_of_their_own():
    assert len(grid({"d_init": [8, 16, 32]}, ["stock", "topk", "asi"])) == 1 + 1 + 3
    assert Cell(initializer="default", subspace="random", d_init=9) == Cell(initializer="default")


@pytest.mark.parametrize("method", METHODS)
def test_a_cell_knows_its_method_at_any_size(method):
    (cell,) = grid({"d_sae": [99], "k": [7], "seed": [3], "lr": [0.5]}, [method])
    assert cell.method == method


def test_a_cell_of_no_method_is_other():
    assert Cell(subspace="random").method == Cell(d_init=17).method == "other"


@pytest.mark.parametrize(
    ("axes", "methods", "message"),
    [
        ({"depth": [1]}, [], "no setting"),
        ({}, ["best"], "method 'best' must be one of"),
        ({"k": []}, [], "axis 'k' has no values"),
        ({"k": [0]}, [], "k=0 must be"),
        ({"optimizer": ["sgd"]}, [], "optimizer='sgd'"),
        ({"initializer": ["kaiming"]}, [], "initializer='kaiming'"),
        ({"subspace": ["dead"]}, [], "subspace='dead'"),
        ({"d_init": [0]}, [], "d_init=0"),
    ],
)
def test_bad_axes_are_named(axes, methods, message):
    with pytest.raises(ValueError, match=message):
        grid(axes, methods)


def test_an_architecture_without_k_is_refused(train):
    with pytest.raises(ValueError, match="architecture='jumprelu' must be one of"):
        train_cell(Cell(architecture="jumprelu"), TRAINING, train)


def test_training_must_fill_a_batch():
    with pytest.raises(ValueError, match="must fill one batch"):
        SweepTraining(training_tokens=10, batch_size=11)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_trains(architecture, train):
    trainer, took = train_cell(Cell(architecture=architecture, **SIZES), TRAINING, train)
    assert trainer.sae.cfg.architecture() == architecture
    assert took["d_init_used"] >= 1
    assert took["seconds"] >= 0


@pytest.mark.parametrize(("architecture", "d_init"), [("topk", 16), ("batchtopk", 32), ("matryoshka_batchtopk", 32)])
def test_features_of_a_batch_start_in_a_quarter(architecture, d_init):
    x = torch.randn(512, 128, generator=torch.Generator().manual_seed(0))
    _, took = train_cell(Cell(architecture=architecture, **SIZES), TRAINING, x)
    assert took["d_init_used"] == d_init


@pytest.mark.parametrize("n_cached", [600, 300])
def test_the_estimate_reads_a_cache_a_second_time(n_cached, caplog):
    """It says nothing of activations that are used up, and training has the bits of a stream read once."""
    activations, cell = tiny.activations(n_cached) + 1, Cell(initializer="active_subspace", **SIZES)
    trainer, _ = train_cell(cell, TRAINING, activations)
    assert "no second look" not in caplog.text
    assert trainer.sae.cfg.metadata["active_subspace_init"]["n_tokens_taken_from_training"] == 0

    torch.manual_seed(cell.seed)
    sae = run._untrained(cell, tiny.D_MODEL, "cpu")
    n = cell.initializer_settings().tokens_for(tiny.D_MODEL)
    once = chain(run._batches(activations, TRAINING, n), run._batches(activations, TRAINING))
    SAETrainer(run._trainer_config(cell, TRAINING), sae, once).fit()
    assert "no second look" in caplog.text
    for name, param in sae.named_parameters():
        assert torch.equal(param, trainer.sae.get_parameter(name)), name


def test_rows_tell_what_was_measured(data, tmp_path):
    cells = grid({"d_sae": [48], "k": [4], "seed": [0, 1]}, ["stock", "auxk", "asi_sparse_adam"])
    rows = run_sweep(cells, TRAINING, data, tmp_path, save_saes=True)
    assert rows == read_sweep(tmp_path)
    for cell, row in zip(cells, rows, strict=True):
        folder = run.sae_folder(tmp_path, cell, HOOK)
        again = evaluate(SAE.load_from_disk(folder), activations=data[HOOK][1].split(50), progress=False)
        assert row["nmse"] == pytest.approx(again.nmse, rel=1e-5)
        assert (row["dead_fraction"], row["l0"]) == (again.dead_fraction, again.l0)
        assert row["method"] == cell.method
        assert row["silent_fraction"] <= row["dead_fraction"]
        assert row["silent_tokens"] == 200 + 4 * 32
        assert (row["n_tokens"], row["hook_name"], row["d_in"]) == (200, HOOK, tiny.D_MODEL)
    by_method = {row["method"]: row for row in rows}
    assert by_method["asi_sparse_adam"]["nmse"] < by_method["stock"]["nmse"]


def test_an_sae_that_is_asked_for_later_is_trained_again_and_its_row_stays(data, tmp_path):
    cells = grid({"d_sae": [48], "k": [4]})
    rows = run_sweep(cells, TRAINING, data, tmp_path)
    folder = run.sae_folder(tmp_path, cells[0], HOOK)
    assert not folder.exists()
    assert run_sweep(cells, TRAINING, data, tmp_path, save_saes=True) == rows == read_sweep(tmp_path)
    again = evaluate(SAE.load_from_disk(folder), activations=data[HOOK][1], progress=False)
    assert again.nmse == pytest.approx(rows[0]["nmse"], rel=1e-5)


def test_cells_see_the_same_data_and_repeat(train):
    first, second = (train_cell(Cell(**SIZES, optimizer="adam"), TRAINING, train)[0].sae for _ in range(2))
    assert torch.equal(first.W_dec, second.W_dec)


def test_data_comes_round_again_where_it_ends(train):
    training = SweepTraining(training_tokens=1000, batch_size=300)
    trainer, _ = train_cell(Cell(initializer="default", optimizer="adam", **SIZES), training, train[:250])
    assert torch.isfinite(trainer.sae.W_dec).all()


def test_a_long_cell_goes_on_from_its_checkpoint_to_the_same_bits(train, tmp_path):
    def stop(n_tokens: int, _: object) -> None:
        if n_tokens == 160:
            raise KeyError("stopped")

    cell = Cell(**SIZES)
    with pytest.raises(KeyError, match="stopped"):
        train_cell(cell, TRAINING, train, stop, checkpoints=tmp_path)
    seen: list[int] = []
    trainer, _ = train_cell(cell, TRAINING, train, lambda n_tokens, _: seen.append(n_tokens), checkpoints=tmp_path)
    whole, _ = train_cell(cell, TRAINING, train)
    assert min(seen) == 160
    for name, weights in whole.sae.state_dict().items():
        assert torch.equal(weights, trainer.sae.state_dict()[name]), name


def test_an_interrupted_sweep_keeps_its_cells_and_goes_on(data, tmp_path, monkeypatch):
    cells = grid({"seed": [0, 1, 2], "d_sae": [48], "k": [4]})
    stock, trained = run.run_cell, []

    def interrupted(cell: Cell, *rest: Any) -> Any:
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append(cell)
        return stock(cell, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(run, "run_cell", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_sweep(cells, TRAINING, data, tmp_path)
    before = read_sweep(tmp_path)
    assert [row["seed"] for row in before] == [0, 1]
    with (tmp_path / "cells.jsonl").open("a") as file:
        file.write('{"d_sae": 48, "see')  # as a crash leaves it
    rows = run_sweep(cells, TRAINING, data, tmp_path)
    assert rows[:2] == before
    assert [json.loads(line)["seed"] for line in (tmp_path / "cells.jsonl").read_text().splitlines()] == [0, 1, 2]


def test_a_cell_that_fails_is_named_and_the_others_are_kept(data, tmp_path):
    cells = grid({"d_init": [4, 1000], "d_sae": [48], "k": [4]})
    with pytest.raises(ValueError, match=r"1 cells failed.*\n.*d_init=1000 exceeds d_in=16"):
        run_sweep(cells, TRAINING, data, tmp_path)
    assert [row["d_init"] for row in read_sweep(tmp_path)] == [4]


def test_hooks_have_cells_of_their_own(data, tmp_path):
    twice = {**data, "blocks.1.hook_mlp_out": data[HOOK]}
    cells = grid({"d_sae": [48], "k": [4]})
    run_sweep(cells, TRAINING, data, tmp_path)
    rows = run_sweep(cells, TRAINING, twice, tmp_path)
    assert [row["hook_name"] for row in rows] == list(twice)
    assert rows[0]["nmse"] == rows[1]["nmse"]
    assert rows[0]["effective_rank"] == rows[1]["effective_rank"] < tiny.D_MODEL


def test_a_folder_of_another_sweep_is_refused(data, tmp_path):
    cells = grid({"d_sae": [48], "k": [4]})
    run_sweep(cells, TRAINING, data, tmp_path, source={"model": "a"})
    with pytest.raises(ValueError, match="model was 'a' and is 'b'"):
        run_sweep(cells, TRAINING, data, tmp_path, source={"model": "b"})


def _row(**changes: Any) -> dict[str, Any]:
    cell = Cell(**{name: value for name, value in changes.items() if name in Cell.__dataclass_fields__})
    measured = {"nmse": 0.5, "dead_fraction": 0.1, "l0": float(cell.k), "seconds": 1.0, "cpu_seconds": 2.0}
    return {**cell.to_dict(), "hook_name": HOOK, "method": cell.method, **measured, "d_init_used": 8, **changes}


def test_figures_show_what_the_rows_vary_in():
    sizes = [_row(d_sae=size, nmse=size**-0.2) for size in (100, 200, 400)]
    assert sweep_figures(sizes).keys() == {"scaling.png"}
    levels = [_row(k=k, nmse=1 / k) for k in (8, 16)]
    assert sweep_figures(levels).keys() == {"frontier.png"}
    dims = [_row(d_init=d, d_init_used=d, subspace=s) for d in (8, 16) for s in ("active", "random")]
    figures = sweep_figures(dims)
    assert figures.keys() == {"d_init.png"}
    assert [line.get_label() for line in figures["d_init.png"].axes[0].lines] == ["active subspace", "random subspace"]
    assert sweep_figures([_row()]) == {}


def test_figures_name_their_source_and_magnify_nothing():
    dims = [
        _row(d_init=d, d_init_used=d, subspace=s, nmse=0.5 + d / 1000) for d in (8, 16) for s in ("active", "random")
    ]
    levels = [_row(k=k, nmse=1 / k) for k in (8, 16)]
    for rows in (dims, levels):
        (figure,) = sweep_figures(rows, "a model, a text").values()
        assert figure.axes[0].get_ylim()[0] == 0
        assert figure.get_suptitle() == f"a model, a text: {HOOK}"
    (figure,) = sweep_figures([_row(d_sae=size, nmse=0.21 + size / 1e5) for size in (100, 200, 400)]).values()
    assert figure.axes[0].get_ylim() == figure.axes[2].get_ylim() == (0.1, 1)
    assert figure.get_suptitle() == HOOK


def test_two_sizes_make_no_power_law():
    for n, law in ((2, False), (3, True)):
        (figure,) = sweep_figures([_row(d_sae=100 * 2**i, nmse=0.5**i) for i in range(n)]).values()
        assert len(figure.axes[0].lines) == 1 + law
        assert ("d_sae$" in figure.axes[0].lines[-1].get_label()) == law


def test_a_rate_is_chosen_for_each_setting_by_its_mean_error():
    rows = [
        _row(lr=lr, seed=seed, nmse=nmse) for lr, seed, nmse in ((1, 0, 0.1), (1, 1, 0.9), (2, 0, 0.4), (2, 1, 0.4))
    ]
    assert best_rates(rows) == rows[2:]


def test_the_table_joins_seeds():
    rows = [_row(seed=0, nmse=0.2), _row(seed=1, nmse=0.4), _row(d_sae=64, k=32, nmse=0.1)]
    lines = sweep_table(rows).splitlines()
    assert "0.3000 (0.2000 to 0.4000)" in lines[-2]
    assert "| 2 |" in lines[-2]
    assert "| 64 |" in lines[-1]
    assert "lr = 0.001" in lines[0]


def test_a_power_law_is_found_again():
    law = fit_power_law([1, 2, 4, 8], [3 * x**-0.25 for x in (1, 2, 4, 8)])
    assert (law.scale, law.exponent) == (pytest.approx(3), pytest.approx(-0.25))
    assert law.residual == pytest.approx(0, abs=1e-12)
    with pytest.raises(ValueError, match="two different"):
        fit_power_law([1, 1], [2, 3])


def _command(llama_folder: Path, text_folder: Path, out: Path, *flags: str) -> None:
    sizes = (
        "--context-size 16 --cached-tokens 400 --held-out-tokens 100 --training-tokens 320 --batch-size 32 --layers 1"
    )
    cli.main(["sweep", "--model", str(llama_folder), "--dataset", str(text_folder), "--out", str(out),
              *sizes.split(), *flags])  # fmt: skip


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_text(tmp_path_factory.mktemp("dataset"), 60, 100)


def test_the_command_writes_cells_table_and_figures_and_continues(llama_folder, text_folder, tmp_path, capsys):
    flags = ["--methods", "topk", "asi_sparse_adam", "--k", "4", "--d-sae"]
    _command(llama_folder, text_folder, tmp_path, *flags, "32", "64")
    assert [(row["method"], row["d_sae"]) for row in read_sweep(tmp_path)] == [
        (method, size) for size in (32, 64) for method in ("topk", "asi_sparse_adam")
    ]
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")
    assert "| TopK | 32 |" in (tmp_path / "results.md").read_text()
    assert {row["hook_name"] for row in read_sweep(tmp_path)} == {"blocks.1.hook_attn_out"}
    assert json.loads((tmp_path / "sweep.json").read_text())["held_out_tokens"] == 100
    before = (tmp_path / "cells.jsonl").read_text()
    _command(llama_folder, text_folder, tmp_path, *flags, "32", "64", "96")
    assert (tmp_path / "cells.jsonl").read_text().startswith(before)
    assert len(read_sweep(tmp_path)) == 6
    assert str(tmp_path / "results.md") in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--k", "0"], "k=0 must be"),
        (["--hooks", "attention"], "hook 'attention' must be one of"),
        (["--hooks", "blocks.9.hook_attn_out", "--k", "4"], "blocks.9.hook_attn_out"),
        (["--d-init", "900", "--k", "4", "--d-sae", "32"], "d_init=900 exceeds d_in=16"),
    ],
)
def test_bad_flags_end_in_one_message(flags, message, llama_folder, text_folder, tmp_path, capsys):
    with pytest.raises(SystemExit):
        _command(llama_folder, text_folder, tmp_path, *flags)
    assert message in capsys.readouterr().err


def test_nothing_is_written_where_there_are_no_cells(tmp_path):
    assert write_report(tmp_path) == []


@pytest.mark.parametrize(
    "cell",
    [Cell(), Cell(silent_moments="keep"), Cell(revive="auto"), Cell(optimizer="adam"), Cell(subspace="full", k=8)],
)
def test_a_row_tells_its_cell_and_a_folder_goes_on_with_it(cell, tmp_path):
    others = [Cell(), Cell(silent_moments="keep"), Cell(revive="auto"), Cell(optimizer="adam")]
    store = run.SweepStore(tmp_path, {"a": 1})
    row = store.add(cell, {"hook_name": HOOK})
    assert cell_of(row) == cell
    assert run.SweepStore(tmp_path, {"a": 1}).find(cell, HOOK) == row
    assert all(store.find(other, HOOK) is None for other in others if other != cell)
    assert len({run.describe(one) for one in others}) == len(others)


def test_a_table_of_one_cell_names_all_of_its_settings():
    lines = sweep_table([_row()]).splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("| hook_name | architecture | method |")
    assert lines[1] == "|" + "---|" * 14 + "---:|" * 6


def test_a_crash_while_a_cut_line_is_dropped_loses_no_cell(data, tmp_path, monkeypatch):
    store = run.SweepStore(tmp_path, {"a": 1})
    store.add(Cell(), {"hook_name": HOOK})
    before = (tmp_path / "cells.jsonl").read_text() + '{"cut'
    (tmp_path / "cells.jsonl").write_text(before)
    stock = Path.replace

    def full_disk(self: Path, target: Path) -> Path:
        if target.name == "cells.jsonl":
            raise OSError("no space")
        return stock(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full_disk)
        with pytest.raises(OSError, match="no space"):
            run.SweepStore(tmp_path, {"a": 1})
    assert (tmp_path / "cells.jsonl").read_text() == before
    assert len(run.SweepStore(tmp_path, {"a": 1}).rows) == 1


CELLS = grid({"seed": [0, 1], "d_sae": [48], "k": [4]})


def test_a_save_that_was_killed_is_no_finished_sae(data, tmp_path):
    rows = run_sweep(CELLS, TRAINING, data, tmp_path, save_saes=True)
    folder = run.sae_folder(tmp_path, CELLS[0], HOOK)
    (folder / "sae_weights.safetensors").write_bytes((folder / "sae_weights.safetensors").read_bytes()[:900])
    leftover = folder.with_name(f".{folder.name}.1.tmp")
    leftover.mkdir()
    assert run_sweep(CELLS, TRAINING, data, tmp_path, save_saes=True) == rows
    assert SAE.load_from_disk(folder).cfg.d_sae == 48
    assert not leftover.exists()


def test_a_damaged_line_is_named_and_a_torn_last_one_is_trained_anew(data, tmp_path):
    run_sweep(CELLS, TRAINING, data, tmp_path)
    path = tmp_path / "cells.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    assert [row["seed"] for row in read_sweep(tmp_path)] == [0]
    assert [row["seed"] for row in run_sweep(CELLS, TRAINING, data, tmp_path)] == [0, 1]
    for damaged in (b"?" + whole[1:], whole.replace(b'"nmse": 0.', b'"nmse": 1.', 1)):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"cells\.jsonl, line 1 is damaged: delete that line"):
            run_sweep(CELLS, TRAINING, data, tmp_path)


def test_other_activations_are_refused_and_a_folder_of_an_earlier_version_goes_on(data, tmp_path, caplog):
    run_sweep(CELLS, TRAINING, data, tmp_path)
    train, held_out = data[HOOK]
    with pytest.raises(ValueError, match=r"training was '.*' and is '.*give those activations, or another folder"):
        run_sweep(CELLS, TRAINING, {HOOK: (train * 2, held_out)}, tmp_path)
    shared = json.loads((tmp_path / "sweep.json").read_text())
    (tmp_path / "sweep.json").write_text(json.dumps({"training": shared["training"]}))
    run_sweep(CELLS, TRAINING, data, tmp_path)
    assert "earlier version" in caplog.text


def test_one_run_writes_a_sweep(data, tmp_path):
    with one_writer(tmp_path, "out"), pytest.raises(ValueError, match="is being written by process"):
        run_sweep(CELLS, TRAINING, data, tmp_path)


def test_a_full_disk_leaves_no_half_line(tmp_path, monkeypatch):
    store = run.SweepStore(tmp_path, {"a": 1})
    store.add(Cell(), {"hook_name": HOOK})
    before = store.path.read_bytes()

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(OSError, match=r"cells\.jsonl cannot be written"):
            store.add(Cell(seed=1), {"hook_name": HOOK})
    assert store.path.read_bytes() == before
    assert store.rows == read_sweep(tmp_path)


def test_killed_at_any_moment_it_ends_with_the_same_results(tmp_path):
    assert_survives_kills("sweep", tmp_path)


def test_a_watcher_sees_the_sae_between_steps_and_changes_nothing(train):
    seen: list[tuple[int, torch.Tensor]] = []
    watched, _ = train_cell(Cell(**SIZES), TRAINING, train, lambda n, sae: seen.append((n, sae.W_dec.detach().clone())))
    alone, _ = train_cell(Cell(**SIZES), TRAINING, train)
    assert [n for n, _ in seen] == [TRAINING.batch_size * step for step in range(1, TRAINING.steps)]
    assert not torch.equal(seen[0][1], seen[-1][1])
    assert torch.equal(watched.sae.W_dec, alone.sae.W_dec)


def test_activations_in_16_bits_are_trained_on_as_float32(data):
    train, held_out = (part.half() for part in data[HOOK])
    halved = run_cell(Cell(**SIZES), TRAINING, train, held_out)
    whole = run_cell(Cell(**SIZES), TRAINING, train.float(), held_out.float())
    assert halved[0].W_dec.dtype == torch.float32
    assert torch.equal(halved[0].W_dec, whole[0].W_dec)
    assert halved[1]["nmse"] == whole[1]["nmse"]
