"""One definition of a table, at any width and in every format."""

import io
import json
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from launch import tables
from launch.tables import Column, Table

LONG = "a text that is so long that it must wrap where a terminal is as narrow as this one"
FRAME = pd.DataFrame(
    {
        "heads": ["(8,1)", "(d/d_h,8)"],
        "n": [2.08e9, np.nan],
        "low": [1.9e9, np.inf],
        "cost": [57_600.25, 81_000.5],
        "why": ["it is 1.8x above", LONG],
    }
)
COLUMNS = [
    Column("heads", lambda row: row.heads, "left", 0),
    Column("N*", lambda row: "" if np.isnan(row.n) else f"{row.n / 1e9:.2f}B", rank=2),
    Column("95%", lambda row: f"{row.low / 1e9:.2f}B to more", "range", 4, name="95% of N*"),
    Column("cost of\nserving", lambda row: f"{row.cost:,.0f}", rank=0, total="138,601"),
    Column("empty", lambda row: "", rank=0),
    Column("notes", lambda row: row.why, "text", 3),
]


def made(**options):
    return Table.of(FRAME, COLUMNS, "some", "Caption & more.", ["A note."], **options)


def printed(table, width):
    out = io.StringIO()
    Console(file=out, width=width).print(table)
    return [line.rstrip() for line in out.getvalue().splitlines()]


class TestScreen:
    def test_at_its_full_width_nothing_is_missing(self):
        lines = printed(made(), 140)
        assert lines[0] == "Caption & more."
        assert lines[-1] == "A note."
        text = "\n".join(lines)
        assert "not shown" not in text
        assert LONG in text
        assert "empty" not in text
        assert "138,601" in text

    def test_columns_leave_by_rank_and_are_named_with_the_width_that_shows_them(self):
        table = made(elsewhere="--format json")
        needed = 9 + 2 + 5 + 2 + 13 + 2 + 7 + 2 + tables.NARROWEST_TEXT
        assert "not shown" not in "\n".join(printed(table, needed))
        assert "not shown at this width: 95% of N*; widen to 66 columns or --format json" in " ".join(
            printed(table, needed - 1)
        )
        narrow = printed(table, 40)
        assert narrow[1].split() == ["cost", "of"]
        assert narrow[2].split() == ["heads", "N*", "serving"]
        assert "not shown at this width: 95% of N*, notes;" in " ".join(narrow)

    @pytest.mark.parametrize("width", [18, 20, 26, 40, 60, 80, 140])
    def test_what_has_rank_0_neither_shrinks_nor_wraps(self, width):
        text = "\n".join(printed(made(), width))
        for cell in ("(8,1)", "(d/d_h,8)", "57,600", "81,000", "serving"):
            assert cell in text
        assert "…" not in text

    @pytest.mark.parametrize("width", range(18, 120, 7))
    def test_no_line_is_wider_than_the_terminal(self, width):
        assert max(map(len, printed(made(), width))) <= width

    def test_shorter_texts_are_taken_before_a_column_leaves(self):
        columns = [
            Column("x", lambda row: row.heads, "left", 0),
            Column("y", lambda row: "a long text", rank=1, brief=lambda row: "t"),
        ]
        table = Table.of(FRAME, columns, "x", "")
        assert "a long text" in "\n".join(printed(table, 22))
        lines = printed(table, 21)
        assert "a long text" not in "\n".join(lines)
        assert lines[-1].split() == ["(d/d_h,8)", "t"]
        assert "not shown" not in "\n".join(lines)
        assert "not shown at this width: y; widen to 22 columns" in " ".join(printed(table, 11))

    def test_markup_in_a_cell_is_text(self):
        table = Table.of(FRAME.head(1), [Column("x", lambda row: "[red]x[/]", rank=0)], "x", "[bold]")
        assert printed(table, 40)[-1] == "[red]x[/]"

    def test_a_table_of_texts_alone_keeps_its_first_column(self):
        columns = (Column("loss", str, "left", 0), Column("8K", str, "left"), Column("128K", str, "left"))
        table = Table("map", "Map.", columns, (("2.6", "(8,1) 99%", "(8,1) 98%"),))
        assert printed(table, 16)[1].split() == ["loss", "8K"]


class TestFormats:
    def test_csv_and_json_have_the_values(self):
        table = made()
        assert pd.read_csv(io.StringIO(table.text("csv"))).equals(FRAME)
        rows = json.loads(table.text("json"))
        assert rows[0] == {"heads": "(8,1)", "n": 2.08e9, "low": 1.9e9, "cost": 57_600.25, "why": "it is 1.8x above"}
        assert (rows[1]["n"], rows[1]["low"]) == (None, None)
        other = made(values=pd.DataFrame({"x": pd.array([1, pd.NA], "Int64")}))
        assert json.loads(other.text("json")) == [{"x": 1}, {"x": None}]

    def test_texts_alone_have_no_values(self):
        with pytest.raises(ValueError, match="table map has texts alone"):
            Table("map", "Map.", (Column("loss", str),), (("2.6",),)).text("csv")

    def test_markdown(self):
        assert made().text("markdown").splitlines()[:6] == [
            "Caption & more.",
            "",
            "| heads | N* | 95% | cost of serving | notes |",
            "| --- | ---: | --- | ---: | --- |",
            "| (8,1) | 2.08B | 1.90B to more | 57,600 | it is 1.8x above |",
            f"| (d/d_h,8) |  | infB to more | 81,000 | {LONG} |",
        ]

    def test_latex_is_ascii_and_escaped(self):
        text = made().text("latex")
        assert text.isascii()
        assert r"\caption{Caption \& more.}" in text
        assert r"(d/d\_h,8) & " in text
        assert r"\begin{tabular}{lrlrl}" in text
        assert r"95\%" in text

    def test_html_is_well_formed_and_says_what_headings_are_of(self):
        class Read(HTMLParser):
            def __init__(self):
                super().__init__()
                self.open, self.scopes, self.data = [], [], []

            def handle_starttag(self, tag, attrs):
                self.open.append(tag)
                self.scopes += [value for name, value in attrs if name == "scope"]

            def handle_endtag(self, tag):
                assert self.open.pop() == tag

            def handle_data(self, data):
                self.data.append(data)

        text = made(strong=lambda row: row.heads == "(8,1)").text("html")
        read = Read()
        read.feed(text)
        assert read.open == []
        assert read.scopes == ["col"] * 5 + ["row"] * 3
        assert "Caption &amp; more." in text
        assert "<b>57,600</b>" in text
        assert "<b>81,000</b>" not in text
        assert "<p>A note.</p>" in text
