"""Rows of attention's benchmark as a CSV file, tables on the screen and a picture."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gqa_jax import formatting

FIELDS = (
    "date", "device", "versions", "command",
    "pass", "batch", "length", "n_heads", "n_kv_heads", "head_dim", "dtype", "implementation", "status", "reason",
    "turns", "iterations", "median_s", "q25_s", "q75_s", "backward_by_difference_s", "baseline", "ratio",
    "tflops", "matmul_tflops", "gb_s", "copy_gb_s", "percent_of_ceiling", "percent_of_peak", "temp_bytes", "relative_error",
)  # fmt: skip

CEILING = "ceiling: matmul, or copy"

# Okabe and Ito's colours; marker and line style differ too, so that ten lines can be told apart without colour.
_STYLES = [
    ("#0072B2", "o", "-"),
    ("#D55E00", "s", "--"),
    ("#009E73", "^", "-."),
    ("#CC79A7", "D", ":"),
    ("#E69F00", "v", (0, (5, 1, 1, 1))),
    ("#56B4E9", "P", (0, (3, 1))),
    ("#000000", "X", (0, (1, 1))),
    ("#0072B2", "<", (0, (8, 2))),
    ("#D55E00", ">", (0, (1, 3))),
    ("#009E73", "*", (0, (6, 1, 1, 1, 1, 1))),
    ("#CC79A7", "h", "-"),
    ("#E69F00", "d", "--"),
]


def write_csv(rows: Sequence[Mapping], constant: Mapping[str, str], path: Path) -> None:
    """`constant` holds the columns that are the same in every row. What was not measured is an empty cell."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows({**constant, **row} for row in rows)


def print_tables(rows: Sequence[Mapping], console: Console) -> None:
    """A table for each pass, heads and head size; below it, why some have no figures."""
    for _, group in groupby(rows, lambda row: (row["pass"], row["n_heads"], row["n_kv_heads"], row["head_dim"])):
        group = [row for row in group if row["status"] not in ("refused", "left out")]
        if not group:
            continue
        console.print(_table(group))
        for row in group:
            if row["reason"]:
                console.print(Text(f"{_length(row)} {row['implementation']}: {row['reason']}", style="dim"))
        console.print()


def print_refused(rows: Sequence[Mapping], console: Console) -> None:
    """What could not run and why, a line for each reason."""
    counts = Counter((row["reason"], row["implementation"]) for row in rows if row["status"] == "refused")
    of = Counter(row["implementation"] for row in rows)
    for reason, group in groupby(sorted(counts), lambda pair: pair[0]):
        names = [name if counts[reason, name] == of[name] else f"{name} ({counts[reason, name]} of {of[name]} cases)"
                 for _, name in group]  # fmt: skip
        console.print(Text(f"not run: {', '.join(names)}: {reason}"))


def print_left_out(rows: Sequence[Mapping], console: Console) -> None:
    """What there was no time for, a line for each pass, heads and head size; names where others of the case were measured."""
    rows = [row for row in rows if row["status"] != "refused"]
    for (direction, n, k, h), group in groupby(rows, lambda x: (x["pass"], x["n_heads"], x["n_kv_heads"], x["head_dim"])):
        missing = []
        for length, case in groupby(group, _length):
            case = list(case)
            names = [row["implementation"] for row in case if row["status"] == "left out"]
            if names:
                missing.append(length if len(names) == len(case) else f"{length} ({', '.join(names)})")
        if missing:
            console.print(Text(f"left out for want of time: {direction}, {n}/{k} heads of {h}: {', '.join(missing)}"))


def _table(rows: Sequence[Mapping]) -> Table:
    first = rows[0]
    decode = first["pass"] == "decode"
    title = f"{first['pass']}, {first['n_heads']}/{first['n_kv_heads']} heads of {first['head_dim']}, {first['dtype']}"
    unit, scale = _unit(rows)
    table = Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0)
    )
    table.add_column("S x batch" if decode else "T x batch", justify="right", no_wrap=True)
    table.add_column("implementation", no_wrap=True)
    for heading in ("ms", "IQR %", "ratio", unit, "% of copy" if decode else "% of matmul", "temp MiB"):
        table.add_column(heading, justify="right", no_wrap=True)
    for _, group in groupby(rows, lambda row: row["length"]):
        for i, row in enumerate(group):
            label = "" if i else f"{formatting.context(row['length'])} x {row['batch']}"
            table.add_row(label, row["implementation"], *_cells(row, scale))
        table.add_section()
    return table


def _cells(row: Mapping, scale: float) -> list[str]:
    if row["status"] != "ok":
        return [row["status"], *[""] * 5]
    rate = row["gb_s"] if row["tflops"] is None else row["tflops"]
    return [
        formatting.figure(1e3 * row["median_s"]),
        f"{100 * (row['q75_s'] - row['q25_s']) / row['median_s']:.0f}",
        "" if row["ratio"] is None else f"{row['ratio']:.2f}",
        formatting.figure(scale * rate),
        f"{row['percent_of_ceiling']:.1f}",
        "" if row["temp_bytes"] is None else f"{row['temp_bytes'] / 2**20:,.1f}",
    ]


def _unit(rows: Sequence[Mapping]) -> tuple[str, float]:
    """GB/s of decoding; TFLOP/s, or GFLOP/s where nobody reaches one of those; and what to multiply a row's rate by."""
    if rows[0]["pass"] == "decode":
        return "GB/s", 1
    rates = [row["tflops"] for row in rows if row["status"] == "ok"]
    return ("GFLOP/s", 1e3) if rates and max(rates) < 1 else ("TFLOP/s", 1)


def _length(row: Mapping) -> str:
    return formatting.context(row["length"])


def picture(rows: Sequence[Mapping], title: str) -> Figure | None:
    """Rate against length: a row of panels for each pass, a column for heads and head size, a line for each implementation."""
    rows = [row for row in rows if row["status"] == "ok"]
    if not rows:
        return None
    passes = list(dict.fromkeys(row["pass"] for row in rows))
    heads = sorted({(row["n_heads"], row["n_kv_heads"], row["head_dim"]) for row in rows}, key=lambda x: (x[2], x[0], x[1]))
    names = list(dict.fromkeys(row["implementation"] for row in rows))
    styles = {name: _STYLES[i % len(_STYLES)] for i, name in enumerate(names)}
    size = (max(6.4, 3.1 * len(heads) + 0.6), 2.7 * len(passes) + 0.5 + 0.22 * -(-(len(names) + 1) // 5))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(passes), len(heads), squeeze=False, sharex=True, sharey="row")
    for panel_row, direction in zip(panels, passes, strict=True):
        unit, scale = _unit([row for row in rows if row["pass"] == direction])
        for ax, shape in zip(panel_row, heads, strict=True):
            here = [
                row
                for row in rows
                if row["pass"] == direction and (row["n_heads"], row["n_kv_heads"], row["head_dim"]) == shape
            ]
            _panel(ax, here, styles, scale)
            ax.set_title(f"{shape[0]}/{shape[1]} heads of {shape[2]}, {direction}", fontsize="small", loc="left")
        panel_row[0].set_ylim(bottom=0)  # of the row, and after all of it: a limit that is set no longer follows the data
        panel_row[0].set_ylabel(unit)
    for ax in panels[-1]:
        ax.set_xlabel("context, tokens")
    handles = {}
    for ax in panels.flat:
        handles |= {line.get_label(): line for line in ax.lines}
    order = [label for label in (*names, CEILING) if label in handles]
    figure.legend(
        [handles[label] for label in order], order,
        loc="outside lower center", ncols=min(5, len(order)), frameon=False, fontsize="small", handlelength=3.5,
    )  # fmt: skip
    figure.suptitle(title, fontsize="medium", x=0.01, ha="left")
    return figure


def _panel(ax, rows: Sequence[Mapping], styles: Mapping[str, tuple], scale: float) -> None:
    rate, ceiling = ("gb_s", "copy_gb_s") if rows and rows[0]["pass"] == "decode" else ("tflops", "matmul_tflops")
    for name, (color, marker, line) in styles.items():
        points = sorted((row["length"], scale * row[rate]) for row in rows if row["implementation"] == name)
        if points:
            ax.plot(
                *zip(*points, strict=True), color=color, marker=marker, linestyle=line, linewidth=1.3, markersize=5, label=name
            )
    lengths = sorted({row["length"] for row in rows})
    tops = [scale * next(row[ceiling] for row in rows if row["length"] == length) for length in lengths]
    if lengths:
        ax.plot(lengths, tops, color="0.45", linewidth=2.2, marker="_", label=CEILING)
        ax.set_xscale("log", base=2)
        ax.set_xticks(lengths, [formatting.context(length) for length in lengths])
        ax.xaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    ax.grid(True, which="major", linewidth=0.4, color="0.85")
    ax.spines[["top", "right"]].set_visible(False)
