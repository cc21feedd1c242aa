"""A table as text: for the page, and as Markdown and LaTeX."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pandas as pd

from launch.report import words


class Column(NamedTuple):
    """A column: its heading, the function from a row (a named tuple of the frame) to a cell's text; right, left or range."""

    heading: str
    text: Callable[[Any], str]
    side: str = "right"


@dataclass(frozen=True)
class Table:
    """Headings, rows of text, and a caption that says what they are. `name` is the stem of its files."""

    name: str
    caption: str
    headings: tuple[str, ...]
    sides: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, frame: pd.DataFrame, columns: Sequence[Column], name: str, caption: str, notes: Sequence[str] = ()) -> Table:
        """The rows of `frame` by `columns`; those that are empty in every row are left out."""
        rows = [tuple(column.text(row) for column in columns) for row in frame.itertuples(index=False)]
        kept = [i for i, _ in enumerate(columns) if not rows or any(row[i] for row in rows)]
        return cls(
            name,
            caption,
            tuple(columns[i].heading for i in kept),
            tuple(columns[i].side for i in kept),
            tuple(tuple(row[i] for i in kept) for row in rows),
            tuple(notes),
        )

    def markdown(self) -> str:
        """A pipe table below its caption."""
        rule = ["---:" if side == "right" else "---" for side in self.sides]
        lines = [self.headings, rule, *self.rows]
        text = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
        return "\n\n".join([self.caption, text, *self.notes]) + "\n"

    def latex(self) -> str:
        """A table for the package booktabs, in ASCII."""
        sides = "".join("r" if side == "right" else "l" for side in self.sides)
        lines = [
            r"\begin{table}",
            r"  \centering",
            rf"  \caption{{{_tex(self.caption)}}}",
            rf"  \label{{tab:{self.name}}}",
            rf"  \begin{{tabular}}{{{sides}}}",
            r"    \toprule",
            f"    {_tex_row(self.headings)}",
            r"    \midrule",
            *(f"    {_tex_row(row)}" for row in self.rows),
            r"    \bottomrule",
            r"  \end{tabular}",
            *(rf"  \par\smallskip\footnotesize {_tex(note)}" for note in self.notes),
            r"\end{table}",
        ]
        return "\n".join(lines) + "\n"


def _tex_row(cells: Sequence[str]) -> str:
    return " & ".join(map(_tex, cells)) + r" \\"


_TEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "#": r"\#",
    "%": r"\%",
    "_": r"\_",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"$<$",
    ">": r"$>$",
    "±": r"$\pm$",
    "²": "$^2$",
    "·": r"$\cdot$",
    "λ": r"$\lambda$",
    words.MINUS: "$-$",
    words.TIMES: r"$\times$",
}


def _tex(text: str) -> str:
    return "".join(_TEX.get(character, character) for character in text)
