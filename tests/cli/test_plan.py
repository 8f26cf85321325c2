"""saelens-asi plan on a tiny model: page, JSON and figure; errors in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from saelens_asi import cli
from saelens_asi.cli import plan as command
from saelens_asi.planning import PilotSizes
from tests.helpers import tiny

PILOTS = PilotSizes(d_sae=(48, 96), k=(4, 8), steps=10, batch=32, held_out=128, timed_d_sae=0)


@pytest.fixture
def arguments(llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(command, "PilotSizes", lambda: PILOTS)
    (tmp_path / "data").mkdir()
    data = tiny.save_text(tmp_path / "data", 60, 100)
    words = ["plan", "--model", str(llama_folder), "--dataset", str(data), "--hooks", tiny.ATTN_OUT]
    return [*words, "--context-size", "16", "--d-sae", "48", "96", "--k", "4", "--out", str(tmp_path / "out")]


def test_it_writes_a_page_the_same_as_json_and_a_figure(arguments, tmp_path, capsys):
    cli.main([*arguments, "--budget-hours", "0.5", "--memory", "24GiB"])
    printed, out = capsys.readouterr().out, tmp_path / "out"
    read = json.loads((out / "plan.json").read_text())
    assert {row["d_sae"] for row in read["rows"]} == {48, 96}
    assert all(row["fits"] for row in read["rows"])
    assert read["settings"]["model_name"] == arguments[2]
    assert read["settings"]["dataset_path"] == arguments[4]
    assert "The largest that fits: 96 features" in printed
    assert "LanguageModelSAERunnerConfig(" in (out / "plan.md").read_text()
    assert (out / "plan.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--memory", "much"], "memory='much' is no amount of memory"),
        (["--budget-hours", "-1"], "budget_hours=-1.0 must be more than 0"),
        (["--k", "500"], "k=500 must be at least 1, and at most d_sae=48"),
    ],
)
def test_bad_input_ends_in_one_line(arguments, flags, message, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([*arguments, *flags])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
