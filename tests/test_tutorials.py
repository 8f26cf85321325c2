"""Every tutorial runs, small, as a script and cell by cell; and its notebook is what its script makes."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from tests.helpers import tiny

FOLDER = Path(__file__).parent.parent / "tutorials"
_SPEC = importlib.util.spec_from_file_location("notebooks", FOLDER / "notebooks.py")
notebooks = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(notebooks)
SCRIPTS = notebooks.scripts()

# What each tutorial must have printed and written, on the tiny model.
PRINTED = {
    "one_flag": ["stock          dead ", "with the flag  dead ", "variance_explained: 0.9"],
    "why_features_die": [
        "| why | dead features |",
        "as it comes                     dead ",
        "and inside the active subspace  dead ",
    ],
    "spectral_analysis": ["blocks.1.hook_attn_out", "1000 + 250 = 1250 tokens"],
    "lorsa": [
        "layer 1: 4 query heads, 2 key-value heads",
        "tied per head  dead ",
        "with the Lorsa in:",
        "most of it from",
    ],
}
WRITTEN = {
    "one_flag": ["firing_rates.png", "with_the_flag/cfg.json"],
    "why_features_die": ["autopsy.png"],
    "spectral_analysis": ["singular_values.png", "decomposition.png", "attn_out.safetensors"],
    "lorsa": ["feature.png"],
}


def test_there_are_tutorials() -> None:
    assert {path.stem for path in SCRIPTS} == PRINTED.keys() == WRITTEN.keys()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_the_notebook_is_made_from_the_script(script: Path) -> None:
    """Where this fails: python tutorials/notebooks.py."""
    assert script.with_suffix(".ipynb").read_text() == notebooks.notebook(script)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_the_notebook_holds_every_line_of_the_script(script: Path) -> None:
    document = json.loads(script.with_suffix(".ipynb").read_text())
    code = ["".join(cell["source"]) for cell in document["cells"] if cell["cell_type"] == "code"]
    text = ["".join(cell["source"]) for cell in document["cells"] if cell["cell_type"] == "markdown"]
    lines = [line for line in script.read_text().split("\n") if line and not line.startswith("# %%")]
    kept = "\n".join(code).split("\n") + [f"# {line}".rstrip() for part in text for line in part.split("\n")]
    assert sorted(line for line in kept if line) == sorted(lines)


@pytest.mark.filterwarnings("ignore:.*tokens are few")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_the_notebook_runs_on_a_tiny_model(
    script: Path,
    llama_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    tiny.save_text(data, 40, 80)
    settings = {"MODEL": llama_folder, "DATASET": data, "TOKENS": 1000, "CONTEXT": 16, "OUT": tmp_path / "out"}
    for name, value in settings.items():
        monkeypatch.setenv(f"TUTORIAL_{name}", str(value))
    namespace: dict[str, object] = {}
    for cell in json.loads(script.with_suffix(".ipynb").read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{script.stem}: {cell['id']}", "exec"), namespace)
    printed = capsys.readouterr().out
    assert all(text in printed for text in PRINTED[script.stem])
    assert all((tmp_path / "out" / name).stat().st_size > 1000 for name in WRITTEN[script.stem])
