"""Classes that text itself gives: testament and book, code or prose, what Python's tokenizer says of a token."""

from __future__ import annotations

import io
import keyword
import tokenize
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import Tensor

from benchmarks.claims.probes import Examples
from saelens_asi.activations.loading import load_documents
from saelens_asi.activations.texts import bible_chapters

OLD_BOOKS = 39
BOOKS = {"Genesis": 1, "Psalms": 19, "Isaiah": 23, "Jeremiah": 24, "Ezekiel": 26, "Acts": 44}
PYTHON_CLASSES = ("keyword", "identifier", "string", "comment", "number", "operator")


@dataclass(frozen=True, eq=False)
class Windows:
    """Pieces of documents, BOS in front of each.

    Attributes:
        tokens: (n, length) ids.
        documents: (n,) number of the document that each is from.
        spans: (n, length - 1, 2) first character of each token after BOS, and the one after its last, in the document.
    """

    tokens: Tensor
    documents: np.ndarray
    spans: np.ndarray

    @classmethod
    def cut(cls, texts: Mapping[int, str], tokenizer: Any, length: int, per_document: int, seed: int = 0) -> Windows:
        """At most ``per_document`` windows of each text, at random among those that follow one another in it.

        Texts that do not fill one are left out.

        Raises:
            ValueError: where none does.
        """
        rng, size = np.random.default_rng(seed), length - 1
        tokens, documents, spans = [], [], []
        for number, text in texts.items():
            encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            for i in sorted(rng.permutation(len(encoded.input_ids) // size)[:per_document].tolist()):
                place = slice(i * size, (i + 1) * size)
                tokens.append([tokenizer.bos_token_id, *encoded.input_ids[place]])
                spans.append(encoded.offset_mapping[place])
                documents.append(number)
        if not tokens:
            raise ValueError(f"none of {len(texts)} texts fills a window of length={length}: give longer ones")
        return cls(torch.tensor(tokens), np.array(documents), np.array(spans))

    def and_(self, other: Windows) -> Windows:
        """These, and then the others."""
        return Windows(
            torch.cat([self.tokens, other.tokens]),
            np.concatenate([self.documents, other.documents]),
            np.concatenate([self.spans, other.spans]),
        )

    def pooled(self, labels: Mapping[str, np.ndarray], first_row: int) -> Examples:
        """Each window is an example: the mean over its tokens without BOS.

        Args:
            labels: by task, (n,) whether each window is in the class.
            first_row: where the activations of these windows start among those of all.
        """
        n, length = self.tokens.shape
        rows = np.arange(n * length, dtype=np.int64).reshape(n, length)[:, 1:]
        members = np.repeat(np.arange(n), length - 1)
        weights = np.full(rows.size, 1 / (length - 1), dtype=np.float32)
        pooling = csr_array((weights, (members, rows.ravel())), shape=(n, n * length))
        return Examples(first_row, pooling, self.documents, {one: of.astype(np.int8) for one, of in labels.items()})

    def single_tokens(self, classes: np.ndarray, names: Sequence[str], first_row: int) -> Examples:
        """Each token of a class is an example, for the tasks that tell one class from all others.

        Args:
            classes: (n, length - 1) numbers of classes, from 1 in the order of ``names``; 0 for tokens of none.
            names: of the classes.
            first_row: where the activations of these windows start among those of all.
        """
        window, position = np.nonzero(classes)
        rows, n = window * self.tokens.shape[1] + position + 1, len(window)
        ones = np.ones(n, dtype=np.float32)
        pooling = csr_array((ones, (np.arange(n), rows)), shape=(n, self.tokens.numel()))
        found = classes[window, position]
        labels = {name: (found == number).astype(np.int8) for number, name in enumerate(names, 1)}
        return Examples(first_row, pooling, self.documents[window], labels)


def characters_of_python(text: str) -> np.ndarray | None:
    """(n_characters,) number in ``PYTHON_CLASSES``, from 1, of the token that each belongs to; 0 for none.

    None for what this interpreter's tokenizer does not read.
    """
    starts = np.cumsum([0, *(len(line) + 1 for line in text.split("\n"))])
    classes = np.zeros(len(text), dtype=np.int8)
    try:
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            number = _class_of(token)
            if number:
                first, end = (starts[row - 1] + column for row, column in (token.start, token.end))
                classes[first:end] = number
    except (tokenize.TokenError, SyntaxError):
        return None
    return classes


def _class_of(token: tokenize.TokenInfo) -> int:
    name = tokenize.tok_name[token.type]
    if name == "NAME":
        name = "keyword" if keyword.iskeyword(token.string) else "identifier"
    name = {"OP": "operator"}.get(name, "string" if name.startswith("FSTRING") else name.lower())
    return PYTHON_CLASSES.index(name) + 1 if name in PYTHON_CLASSES else 0


def classes_of_tokens(windows: Windows, texts: Mapping[int, str]) -> np.ndarray:
    """(n, length - 1) number of the class of the Python tokens that a model's token lies in; 0 where they are several.

    White space between them is of none, and does not count.
    """
    of_text = {number: characters_of_python(texts[number]) for number in np.unique(windows.documents)}
    classes = np.zeros(windows.spans.shape[:2], dtype=np.int8)
    for i, number in enumerate(windows.documents):
        characters = of_text[number]
        if characters is None:
            continue
        for j, (start, end) in enumerate(windows.spans[i]):
            present = np.unique(characters[start:end])
            present = present[present > 0]
            classes[i, j] = present[0] if len(present) == 1 else 0
    return classes


@dataclass(frozen=True)
class TextSizes:
    """How much text is probed.

    Attributes:
        length: tokens in a window, BOS with them.
        per_chapter: windows of a chapter of the Bible.
        other_chapters: of books that are not told apart, beside all chapters of those that are.
        per_file: windows of a document of code or documentation.
        n_files: documents of code, and of documentation.
    """

    length: int = 64
    per_chapter: int = 2
    other_chapters: int = 500
    per_file: int = 3
    n_files: int = 146


def probed_text(tokenizer: Any, sizes: TextSizes) -> tuple[Tensor, dict[str, Examples]]:
    """(n, length) ids of all windows, and what is told apart in them, by kind.

    Code and documentation are held-out documents. Of the Bible it is any chapter: its held-out ones are too few, and an
    SAE that was trained on it saw no class.
    """
    chapters = bible_chapters()
    told_apart = [one for one in chapters if one // 1000 in BOOKS.values()]
    others = np.random.default_rng(0).permutation(sorted(chapters.keys() - {*told_apart})).tolist()
    chosen = {one: chapters[one] for one in sorted([*told_apart, *others[: sizes.other_chapters]])}
    bible = Windows.cut(chosen, tokenizer, sizes.length, sizes.per_chapter)
    book = bible.documents // 1000
    files = {name: load_documents(name, 1)[1]["text"][: sizes.n_files] for name in ("python", "linux-doc")}
    sources = dict(enumerate(files["python"]))
    code = Windows.cut(sources, tokenizer, sizes.length, sizes.per_file)
    manual = dict(enumerate(files["linux-doc"], len(sources)))
    mixed = code.and_(Windows.cut(manual, tokenizer, sizes.length, sizes.per_file))
    first = bible.tokens.numel()
    return torch.cat([bible.tokens, mixed.tokens]), {
        "testament": bible.pooled({"New Testament": book > OLD_BOOKS}, 0),
        "book": bible.pooled({name: book == number for name, number in BOOKS.items()}, 0),
        "code or prose": mixed.pooled({"code": mixed.documents < len(sources)}, first),
        "Python token": code.single_tokens(classes_of_tokens(code, sources), PYTHON_CLASSES, first),
    }
