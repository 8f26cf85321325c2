"""Markdown tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tabulate import DataRow, TableFormat, tabulate

_ROW = DataRow("|", "|", "|")


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]], align: str) -> str:
    """Cells as they are, one space around each; ``align`` has a letter for each column, ``l`` or ``r``."""
    rule = "|" + "".join("---:|" if letter == "r" else "---|" for letter in align)
    # tabulate's own Markdown formats pad every cell to the widest, so that one new row would change all lines of a
    # committed page.
    style = TableFormat(None, lambda widths, alignments: rule, None, None, _ROW, _ROW, padding=0, with_header_hide=None)
    return tabulate(map(_spaced, rows), _spaced(columns), style, disable_numparse=True, stralign=None)


def _spaced(cells: Sequence[str]) -> list[str]:
    return [f" {cell} " if cell else " " for cell in cells]
