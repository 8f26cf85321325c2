"""Every notebook runs, small, in a real kernel and shows its figures; what is committed is its source, executed."""

from __future__ import annotations

import ast
import base64
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jupyter_client
import nbformat
import pytest

from tests.helpers import tiny

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "tutorials"


def _module(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


notebooks = _module(FOLDER / "notebooks.py")
site = _module(ROOT / "docs" / "_notebooks.py")
SCRIPTS = notebooks.scripts()
each = pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)

# For the tiny model, instead of what the second cell of code says; names that a notebook does not have are left out.
SMALL = {
    "HOOK": tiny.ATTN_OUT,
    "N_TOKENS": 1024,
    "CONTEXT": 16,
    "BATCH": 32,
    "D_SAE": 64,
    "K": 4,
    "STEPS": 110,
    "FEATURES_PER_HEAD": 16,
    "SIZES": (32, 64),
    "ACTIVE": (2, 4),
    "BUDGET_HOURS": 0.1,
    "MEMORY": "8GiB",
    "PILOTS": {"d_sae": (32, 64), "k": (2, 4), "steps": 20, "batch": 32, "held_out": 128, "timed_d_sae": 0},
}

# What each notebook must have printed on the tiny model, and how many figures it must have shown.
PRINTED = {
    "one_flag": ["stock          dead ", "with the flag  dead ", "variance_explained: 0.9"],
    "why_features_die": ["| why | dead features |", "stock      dead ", "+ subspace dead "],
    "revive": ["revived so far", "with revive      dead ", "the initializer  dead "],
    "spectral_analysis": [tiny.ATTN_OUT, "of the variance lies in", "components of 16"],
    "what_can_i_afford": ["pilot:     32 features, k = 2", "| d_sae |", "sae=TopKTrainingSAEConfig(", "10 million"],
    "lorsa": [
        "layer 1: 4 query heads, 2 key-value heads",
        "tied per head  dead ",
        "with the Lorsa in:",
        "most of it from",
    ],
}
FIGURES = {
    "one_flag": 1,
    "why_features_die": 2,
    "revive": 2,
    "spectral_analysis": 3,
    "what_can_i_afford": 1,
    "lorsa": 1,
}


@pytest.fixture(scope="module")
def kernel() -> Iterator[Any]:
    """One kernel for all notebooks, since most of the time of each would be that of its imports."""
    manager = jupyter_client.KernelManager(kernel_name="python3")
    manager.start_kernel()
    yield manager
    manager.shutdown_kernel(now=True)


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_text(tmp_path_factory.mktemp("text"), 40, 80)


def code_cells(document: Any) -> list[Any]:
    return [cell for cell in document.cells if cell.cell_type == "code"]


def images(document: Any) -> list[str]:
    data = [output.get("data", {}) for cell in code_cells(document) for output in cell.outputs]
    return [one["image/png"] for one in data if "image/png" in one]


def printed(document: Any) -> str:
    return "".join(output.get("text", "") for cell in code_cells(document) for output in cell.outputs)


def parameters(document: Any) -> Any:
    (cell,) = [cell for cell in document.cells if notebooks.PARAMETERS in cell.metadata.get("tags", [])]
    return cell


def assigned(source: str) -> set[str]:
    """Names that the top level of a cell sets."""
    statements = [one for one in ast.parse(source).body if isinstance(one, ast.Assign)]
    targets = [name for one in statements for target in one.targets for name in ast.walk(target)]
    return {name.id for name in targets if isinstance(name, ast.Name)}


def test_there_are_notebooks() -> None:
    assert {path.stem for path in SCRIPTS} == PRINTED.keys() == FIGURES.keys()
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == PRINTED.keys()


@each
def test_the_notebook_runs_in_a_kernel_and_shows_its_figures(
    script: Path, llama_folder: Path, text_folder: Path, kernel: Any
) -> None:
    """With other values in the cell that names model, text and hook, and nothing else changed."""
    made = notebooks.notebook(script)
    cell = parameters(made)
    small = {**SMALL, "MODEL": str(llama_folder), "DATASET": str(text_folder)}
    own = assigned(cell.source)
    assert own <= small.keys()
    cell.source += "\n" + "\n".join(f"{name} = {small[name]!r}" for name in sorted(own))
    # Samples as small as these are warned of; and the notebook before this one has left its names.
    made.cells.insert(0, nbformat.v4.new_code_cell("%reset -f\nimport warnings\nwarnings.simplefilter('ignore')"))
    done = notebooks.executed(made, km=kernel, timeout=120)
    assert notebooks.complaints(done) == ""
    assert [text for text in PRINTED[script.stem] if text not in printed(done)] == []
    assert len(images(done)) == FIGURES[script.stem]


@each
def test_the_committed_notebook_is_its_source_executed(script: Path) -> None:
    """Where this fails: make notebooks."""
    committed, source = nbformat.read(script.with_suffix(".ipynb"), as_version=4), notebooks.notebook(script)
    nbformat.validate(committed)
    assert [(one.cell_type, one.source) for one in committed.cells] == [
        (one.cell_type, one.source) for one in source.cells
    ]
    assert [one.execution_count for one in code_cells(committed)] == list(range(1, len(code_cells(committed)) + 1))
    assert len(images(committed)) == FIGURES[script.stem]


@each
def test_the_committed_notebook_can_be_shown(script: Path) -> None:
    path = script.with_suffix(".ipynb")
    assert path.stat().st_size < 400_000
    shown = printed(nbformat.read(path, as_version=4))
    assert shown
    assert notebooks.complaints(nbformat.read(path, as_version=4)) == ""
    # Folders of a machine, hosts, progress, warnings.
    assert re.findall(r"/home|/tmp|/root|/work|https?:|Warning|\d%\||\x1b", shown) == []


@each
def test_the_notebook_is_short_and_begins_with_what_a_reader_changes(script: Path) -> None:
    made = notebooks.notebook(script)
    assert len(made.cells) < 25
    install, chosen, *later = code_cells(made)
    assert 'find_spec("google.colab")' in install.source
    assert "%pip install" in install.source
    assert "%matplotlib inline" in install.source
    assert chosen == parameters(made)
    assert {"MODEL", "DATASET", "HOOK"} <= assigned(chosen.source)
    assert not any({"MODEL", "DATASET", "HOOK"} & assigned(re.sub(r"(?m)^\s*%.*$", "", one.source)) for one in later)


@each
def test_the_site_shows_what_the_committed_notebook_shows(script: Path) -> None:
    document = nbformat.read(script.with_suffix(".ipynb"), as_version=4)
    text, shown = site.page(script.with_suffix(".ipynb"))
    assert [cell.source for cell in document.cells if cell.source not in text] == []
    assert [base64.b64encode(image) for image in shown.values()] == [
        "".join(image.split()).encode() for image in images(document)
    ]
    assert all(f"]({name})" in text for name in shown)
    assert "<Figure" not in text


def test_the_readme_and_the_site_name_every_notebook() -> None:
    for page in ("README.md", "docs/index.md"):
        text = (ROOT / page).read_text()
        assert [path.stem for path in SCRIPTS if f"tutorials/{path.stem}.ipynb" not in text] == [], page
