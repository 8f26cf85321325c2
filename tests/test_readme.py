"""What the README shows runs, and what it names exists."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from saelens_asi import ActiveSubspaceInit

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SNIPPETS = [
    pytest.param(snippet, id=f"{page.name} {i}")
    for page in PAGES
    for i, snippet in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL))
]


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_python_snippets_run(snippet: str) -> None:
    exec(compile(snippet, "snippet", "exec"), {})


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 120


def test_the_table_of_settings_has_every_setting_with_its_default() -> None:
    for field in fields(ActiveSubspaceInit):
        default = f'"{field.default}"' if isinstance(field.default, str) else str(field.default)
        assert f"| `{field.name}` | `{default}` |" in (ROOT / "docs/problems/settings.md").read_text()


def test_linked_files_exist() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            if not target.startswith("http"):
                # Pages of results lie beside their numbers; the site has them in a folder of its own.
                own = ROOT / "benchmarks" / "results" if "/results/" in target else page.parent
                found = own / Path(target).name if "/results/" in target else own / target
                assert found.exists(), f"{page.name}: {target}"


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    named = [target for page in PAGES for target in re.findall(r"`make (\w+)`", page.read_text())]
    for target in [*named, *re.findall(r"^make (\w+)", README, flags=re.MULTILINE)]:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
