"""Pages of the site from the executed notebooks of ``tutorials/``: their text, code, what was printed, and figures."""

from __future__ import annotations

import base64
import re
from pathlib import Path

import nbformat
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

NOTEBOOKS = Path("tutorials")
_LINK = re.compile(r"\]\((?:\.\./)*tutorials/(\w+)\.ipynb\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    root = Path(config.config_file_path).parent
    for path in sorted((root / NOTEBOOKS).glob("*.ipynb")):
        text, images = page(path)
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=text))
        for name, content in images.items():
            files.append(File.generated(config, f"notebooks/{name}", content=content))
    return files


# Before the hook that takes links to files of the repository away.
def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    up = "../" * page.file.src_uri.count("/")
    return _LINK.sub(rf"]({up}notebooks/\1.md)", markdown)


def page(path: Path) -> tuple[str, dict[str, bytes]]:
    """A notebook as Markdown, and the images that it shows, by the names under which they lie beside it."""
    parts: list[str] = []
    images: dict[str, bytes] = {}
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "markdown":
            parts.append(cell.source)
            continue
        parts.append(f"```python\n{cell.source}\n```")
        for output in cell.outputs:
            data = output.get("data", {})
            if "image/png" in data:
                name = f"{path.stem}_{len(images)}.png"
                images[name] = base64.b64decode(data["image/png"])
                parts.append(f"![what this cell shows]({name})")
            else:
                printed = output.get("text") or data.get("text/plain", "")
                # Longer than the fences of a table or a snippet that was printed.
                parts.append(f"`````text\n{printed.rstrip()}\n`````")
    title, *rest = parts
    origin = f"This page is the notebook `{NOTEBOOKS / path.name}` of the repository, as it was run."
    return "\n\n".join([title, origin, *rest]) + "\n", images
