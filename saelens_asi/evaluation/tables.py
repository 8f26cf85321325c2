"""Markdown tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tabulate import DataRow, TableFormat, tabulate  # type: ignore[import-untyped]

_ROW = DataRow("| ", " | ", " |")


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]], n_left: int) -> str:
    """Cells as they are, without padding; the first ``n_left`` columns lie to the left, the others to the right."""
    rule = "|" + "---|" * n_left + "---:|" * (len(columns) - n_left)
    # tabulate's own Markdown formats pad every cell, so that one new row would change all lines of a committed page.
    style = TableFormat(None, lambda widths, alignments: rule, None, None, _ROW, _ROW, padding=0, with_header_hide=None)
    return tabulate(rows, columns, style, disable_numparse=True, stralign=None)
