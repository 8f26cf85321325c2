"""What the README shows runs, and what it names exists."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from saelens_asi import ActiveSubspaceInit

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_python_snippets_run(snippet: str) -> None:
    exec(compile(snippet, "README.md", "exec"), {})


def test_the_table_of_settings_has_every_setting_with_its_default() -> None:
    for field in fields(ActiveSubspaceInit):
        default = f'"{field.default}"' if isinstance(field.default, str) else str(field.default)
        assert f"| `{field.name}` | `{default}` |" in README


def test_linked_files_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`?make (\w+)`?", README):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
