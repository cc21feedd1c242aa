"""One definition of a table: for a terminal of any width, as CSV, JSON, Markdown, LaTeX and HTML.

    table = Table.of(frame, [Column("heads", ..., "left", rank=0), Column("N*", ..., rank=2)], "candidates", "Caption.")
    console.print(table)        # as wide as the console; what does not fit leaves by rank, and is named
    table.text("latex")

CSV and JSON have the frame's own values, the others the texts of its columns.
"""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.table import Table as Screen
from rich.text import Text

if TYPE_CHECKING:
    import pandas as pd

FORMATS = ("table", "csv", "json", "markdown", "latex", "html")
ROWS = 60  # cells above which a terminal shows a grid by size: a row each would not be read
GAP = 2  # blanks between columns of a terminal
NARROWEST_TEXT = 24  # of a column whose cells may wrap


class Column(NamedTuple):
    """A column: its heading, the function from a row (a named tuple of the frame) to a cell's text, and its place.

    side: right, left, range (an interval, beside what it is of), or text (left, and the only one that wraps).
    rank: 0 stays at any width; of the others the highest leaves first, of equals the last.
    brief: a shorter text, taken in all columns that have one before any column leaves.
    name: what it is called where it is not shown; default: the heading, whose lines are of a terminal alone.
    total: of a last line.
    """

    heading: str
    text: Callable[[Any], str]
    side: str = "right"
    rank: int = 1
    brief: Callable[[Any], str] | None = None
    name: str = ""
    total: str = ""


@dataclass(frozen=True)
class Table:
    """Columns, rows of their texts, and a caption that says what they are. `name` is the stem of its files."""

    name: str
    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()
    briefs: tuple[tuple[str, ...], ...] = ()  # rows of shorter texts
    strong: frozenset[int] = frozenset()  # rows that stand out
    frame: pd.DataFrame | None = None  # the values
    elsewhere: str = ""  # where all columns are, for who has a narrow terminal: "--format json"

    @classmethod
    def of(
        cls,
        frame: pd.DataFrame,
        columns: Sequence[Column],
        name: str,
        caption: str,
        notes: Sequence[str] = (),
        *,
        strong: Callable[[Any], bool] | None = None,
        values: pd.DataFrame | None = None,
        elsewhere: str = "",
    ) -> Table:
        """The rows of `frame` by `columns`; those that are empty in every row are left out.

        strong: of a row, whether it stands out. values: of CSV and JSON, where these are not the frame's.
        """
        given = list(frame.itertuples(index=False))
        rows = [tuple(column.text(row) for column in columns) for row in given]
        kept = [i for i, _ in enumerate(columns) if not rows or any(row[i] for row in rows)]
        chosen = tuple(columns[i] for i in kept)
        briefs = tuple(tuple((column.brief or column.text)(row) for column in chosen) for row in given)
        return cls(
            name,
            caption,
            chosen,
            tuple(tuple(row[i] for i in kept) for row in rows),
            tuple(notes),
            briefs if any(column.brief for column in chosen) else (),
            frozenset(i for i, row in enumerate(given) if strong is not None and strong(row)),
            frame if values is None else values,
            elsewhere,
        )

    @property
    def headings(self) -> tuple[str, ...]:
        return tuple(column.heading for column in self.columns)

    @property
    def totals(self) -> tuple[str, ...]:
        """Of a last line; empty: there is none."""
        totals = tuple(column.total for column in self.columns)
        return totals if any(totals) else ()

    def text(self, form: str) -> str:
        """In one of FORMATS but a table. Raises KeyError for another, ValueError for values that it does not have."""
        return {"csv": self.csv, "json": self.json, "markdown": self.markdown, "latex": self.latex, "html": self.html}[form]()

    # For a terminal

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        yield self.screen(options.max_width)

    def screen(self, width: int) -> Group:
        """For a terminal of that width: caption, table, what is not shown, notes. Columns of rank 0 are there at any width."""
        rows, shown = self._fitting(width)
        view = Screen(
            box=box.SIMPLE_HEAD,
            show_edge=False,
            pad_edge=False,
            padding=(0, GAP - 1, 0, 0),  # and a blank of the box
            show_footer=bool(self.totals),
        )
        widths = self._widths(rows)
        for i in shown:
            column, wraps = self.columns[i], self.columns[i].side == "text"
            view.add_column(
                Text(column.heading),
                Text(column.total) if self.totals else "",
                justify="right" if column.side == "right" else "left",
                vertical="bottom" if not wraps else "top",
                no_wrap=not wraps,
                min_width=None if wraps else widths[i],
            )
        for number, row in enumerate(rows):
            view.add_row(*(Text(row[i]) for i in shown), style="bold" if number in self.strong else None)
        missing = [column.name or _one_line(column.heading) for i, column in enumerate(self.columns) if i not in shown]
        parts: list[RenderableType] = [Text(self.caption)] if self.caption else []
        parts.append(view)
        if missing:
            more = f" or {self.elsewhere}" if self.elsewhere else ""
            needed = self._needed(self.rows, range(len(self.columns)))
            parts.append(Text(f"not shown at this width: {', '.join(missing)}; widen to {needed} columns{more}", style="dim"))
        return Group(*parts, *(Text(note, style="dim") for note in self.notes))

    def _fitting(self, width: int) -> tuple[tuple[tuple[str, ...], ...], list[int]]:
        """The rows, or their shorter texts, and the columns of them that fit."""
        shown, rows = list(range(len(self.columns))), self.rows
        if self.briefs and self._needed(rows, shown) > width:
            rows = self.briefs
        while self._needed(rows, shown) > width and any(self.columns[i].rank for i in shown):
            shown.remove(max(shown, key=lambda i: (self.columns[i].rank, i)))
        return rows, shown

    def _widths(self, rows: Sequence[Sequence[str]]) -> list[int]:
        found = []
        for i, column in enumerate(self.columns):
            wraps = column.side == "text"
            cells = [*column.heading.split("\n"), column.total, *([] if wraps else [row[i] for row in rows])]
            found.append(max([*map(cell_len, cells), NARROWEST_TEXT if wraps else 0]))
        return found

    def _needed(self, rows: Sequence[Sequence[str]], shown: Sequence[int]) -> int:
        widths = self._widths(rows)
        return sum(widths[i] for i in shown) + GAP * (len(shown) - 1)

    # As data

    def csv(self) -> str:
        """The values, with a line of their names."""
        return self._values().to_csv(index=False)

    def json(self) -> str:
        """A list of rows; null where a value is missing or infinite."""
        from gqa_jax.search.answer import records  # imports pandas, which command lines without a frame need not wait for

        return json.dumps(records(self._values()), indent=1, allow_nan=False) + "\n"

    def _values(self) -> pd.DataFrame:
        if self.frame is None:
            raise ValueError(f"table {self.name} has texts alone")
        return self.frame

    # As a document

    @property
    def _lines(self) -> list[tuple[str, ...]]:
        return [*self.rows, *([self.totals] if self.totals else [])]

    @property
    def _heads(self) -> list[str]:
        return [_one_line(heading) for heading in self.headings]

    def markdown(self) -> str:
        """A pipe table below its caption."""
        rule = ["---:" if column.side == "right" else "---" for column in self.columns]
        lines = [self._heads, rule, *self._lines]
        text = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
        return "\n\n".join(filter(None, [self.caption, text, *self.notes])) + "\n"

    def latex(self) -> str:
        """A table for the package booktabs, in ASCII."""
        sides = "".join("r" if column.side == "right" else "l" for column in self.columns)
        lines = [
            r"\begin{table}",
            r"  \centering",
            rf"  \caption{{{_tex(self.caption)}}}",
            rf"  \label{{tab:{self.name}}}",
            rf"  \begin{{tabular}}{{{sides}}}",
            r"    \toprule",
            f"    {_tex_row(self._heads)}",
            r"    \midrule",
            *(f"    {_tex_row(row)}" for row in self._lines),
            r"    \bottomrule",
            r"  \end{tabular}",
            *(rf"  \par\smallskip\footnotesize {_tex(note)}" for note in self.notes),
            r"\end{table}",
        ]
        return "\n".join(lines) + "\n"

    def html(self) -> str:
        """A plain table whose headings say what they are of, and its notes."""

        def cells(row: Sequence[str], strong: bool = False) -> str:
            parts = []
            for i, (text, column) in enumerate(zip(row, self.columns, strict=True)):
                tag, scope = ("th", ' scope="row"') if i == self.row_heading else ("td", "")
                style = f' style="text-align: {"right" if column.side == "right" else "left"}"'
                shown = html.escape(text, quote=False)
                parts.append(f"<{tag}{scope}{style}>{f'<b>{shown}</b>' if strong and tag == 'td' else shown}</{tag}>")
            return f"<tr>{''.join(parts)}</tr>"

        heads = "".join(f'<th scope="col">{html.escape(heading, quote=False)}</th>' for heading in self._heads)
        lines = ["<table>"]
        if self.caption:
            lines.append(f'<caption style="text-align: left">{html.escape(self.caption, quote=False)}</caption>')
        lines += [f"<thead><tr>{heads}</tr></thead>", "<tbody>"]
        lines += [cells(row, number in self.strong) for number, row in enumerate(self.rows)]
        lines.append("</tbody>")
        if self.totals:
            lines += ["<tfoot>", cells(self.totals), "</tfoot>"]
        lines += ["</table>", *(f"<p>{html.escape(note, quote=False)}</p>" for note in self.notes)]
        return "\n".join(lines) + "\n"

    @property
    def row_heading(self) -> int:
        """The column that a row is known by: the first with a heading."""
        return next((i for i, heading in enumerate(self.headings) if heading), 0)


def _one_line(heading: str) -> str:
    return heading.replace("\n", " ")


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
    "\u2212": "$-$",
    "\u00d7": r"$\times$",
}


def _tex(text: str) -> str:
    return "".join(_TEX.get(character, character) for character in text)
