"""Pages of the site that lie elsewhere: result files, which their benchmarks write beside the numbers."""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

RESULTS = Path("benchmarks/results")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    root = Path(config.config_file_path).parent
    for page in sorted((root / RESULTS).glob("*.md")):
        files.append(File.generated(config, f"results/{page.name}", abs_src_path=str(page)))
    for image in sorted((root / RESULTS).glob("*.png")):
        files.append(File.generated(config, f"results/{image.name}", abs_src_path=str(image)))
    return files


# Links to files of the repository that are no pages.
_OUTSIDE = re.compile(r"\[([^\]]*)\]\((?:\.\./)*((?:benchmarks|tests|tutorials)/[^)]+|[\w.]+\.(?:csv|jsonl?|py))\)")


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    if page.file.src_uri.startswith("results/"):
        markdown = markdown.replace("](../../docs/", "](../")
    return _OUTSIDE.sub(lambda found: f"{found[1]} (`{found[2]}`)", markdown)
