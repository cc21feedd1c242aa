"""What a grid will cost before it is started: parameters, tokens, FLOPs, memory and time of every cell.

On slices that are not here too: which mesh each cell gets there, whether it fits, hours and money.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from gqa_jax import costs, hardware
from gqa_jax.errors import ConfigError
from gqa_jax.formatting import context, counted, duration, figure, short, si
from gqa_jax.hardware import Price
from gqa_jax.planning import planner
from launch import fit, state
from launch.cells import Cell
from launch.fit import Fit
from launch.tables import ROWS, Column, Table


@dataclass(frozen=True)
class Plan:
    """The numbers, and what a terminal shows of them."""

    frame: pd.DataFrame
    tables: list[Table]
    sentences: list[str]  # where times, memory and prices are from


def of_cells(frame: pd.DataFrame, flops_per_second: float | None, source: str, title: str, rows: bool = False) -> Plan:
    """The plan of `table`, whose rate is from this source; a row per cell, of many per size unless `rows`."""
    said = "time: not known before a cell has finished here; --flops_per_second X estimates it"
    if flops_per_second:
        said = f"time: training FLOPs at {si(flops_per_second)}FLOP/s ({source}), one cell after another"
    view = screen(frame, title) if rows or len(frame) <= ROWS else sizes_screen(frame, title)
    return Plan(frame, [view], [said])


def of_slices(
    frame: pd.DataFrame, fits: Sequence[Fit], prices: Mapping[str, Price], efficiency: float | None, title: str
) -> Plan:
    """The plan of `table` on slices: its frame is `on_slices`."""
    frame, memory = on_slices(frame, fits, prices, efficiency), memory_is(fits)
    sentences = [hours_are(fits, efficiency), *([] if memory is None else [f"GiB: {memory}"]), f"USD: {origins(fits, prices)}"]
    return Plan(frame, slices_screen(frame, title), sentences)


def explained(fits: Sequence[Fit]) -> Plan:
    """Where a step's time goes: its frame is `explanation`. Raises ConfigError where no mesh suits."""
    return Plan(explanation(fits), [_explained(one) for one in fits], [hours_are(fits, None)])


def table(cells: Sequence[Cell], states: Sequence[state.CellState], flops_per_second: float | None) -> pd.DataFrame:
    """One row per cell: `Cell.describe`, memory by the paper's formula in bytes, estimated seconds, and its state.

    `seconds` is train_flops over the rate; empty when no rate is known.
    """
    rows = []
    for cell, now in zip(cells, states, strict=True):
        row: dict[str, Any] = cell.describe()
        row["train_bytes"] = costs.train_memory(
            cell.config.model,
            cell.config.micro_batch * cell.config.context_length,
            "exact",
            dtype=cell.config.model.param_dtype,
            activation_dtype=cell.config.model.dtype,
        )
        row["seconds"] = row["train_flops"] / flops_per_second if flops_per_second else None
        row["state"] = now.state
        rows.append(row)
    return pd.DataFrame(rows).astype({"seconds": "Float64"})


def measured_rate(cells: Sequence[Cell], states: Sequence[state.CellState]) -> float | None:
    """FLOP/s that the finished cells reached (median), None when there are none."""
    rates = [
        now.tokens_per_second * cell.train_flops / cell.config.train_tokens
        for cell, now in zip(cells, states, strict=True)
        if now.state == "done" and now.tokens_per_second
    ]
    return float(pd.Series(rates).median()) if rates else None


def screen(frame: pd.DataFrame, title: str) -> Table:
    """The plan, with totals. Narrow: cells, time and state stay."""
    total = frame["seconds"].sum() if frame["seconds"].notna().all() else None
    columns = [
        Column("cell", lambda row: row.cell, "left", 0, total=counted(len(frame), "cell")),
        Column("L x d", lambda row: f"{row.n_layers} x {row.d_model}", rank=2),
        Column("N", lambda row: short(row.params_non_embedding), rank=3),
        Column("tokens", lambda row: short(row.tokens), rank=5, total=short(frame["tokens"].sum())),
        Column("FLOPs", lambda row: si(row.train_flops), rank=1, total=si(frame["train_flops"].sum())),
        Column("memory", lambda row: f"{si(row.train_bytes)}B", rank=4),
        Column("time", lambda row: _known(row.seconds, duration), rank=0, total="" if total is None else duration(total)),
        Column("state", lambda row: row.state, "left", 0),
    ]
    notes = ["L x d: layers x width; N: parameters without embeddings; FLOPs: of the training"]
    return Table.of(frame, columns, "plan", title, notes, elsewhere="--format csv")


def sizes_screen(frame: pd.DataFrame, title: str) -> Table:
    """The plan by size and context, with totals. Narrow: sizes, cells, time and what is done stay."""
    total = frame["seconds"].sum() if frame["seconds"].notna().all() else None
    groups = frame.assign(done=frame["state"].isin(state.FINAL)).groupby(["n_layers", "d_model", "context"], sort=False)
    sizes = groups.agg(
        size=("size", "first"),
        cells=("cell", "count"),
        least_params=("params_non_embedding", "min"),
        most_params=("params_non_embedding", "max"),
        least_bytes=("train_bytes", "min"),
        most_bytes=("train_bytes", "max"),
        tokens=("tokens", "sum"),
        train_flops=("train_flops", "sum"),
        seconds=("seconds", "sum"),
        done=("done", "sum"),
    ).reset_index()
    if total is None:
        sizes["seconds"] = None

    def between(name: str, text: Callable[[float], str]) -> Callable[[Any], str]:
        return lambda row: " to ".join(dict.fromkeys(text(getattr(row, f"{end}_{name}")) for end in ("least", "most")))

    columns = [
        Column("size", lambda row: row.size or "", "left", 0),
        Column("L x d", lambda row: f"{row.n_layers} x {row.d_model}", "left", 2 if frame["size"].all() else 0),
        Column("context", lambda row: context(row.context), rank=0),
        Column("cells", lambda row: f"{row.cells:,}", rank=0, total=f"{len(frame):,}"),
        Column("N", between("params", short), rank=3),
        Column("tokens", lambda row: short(row.tokens), rank=5, total=short(frame["tokens"].sum())),
        Column("FLOPs", lambda row: si(row.train_flops), rank=1, total=si(frame["train_flops"].sum())),
        Column("memory", between("bytes", lambda n: f"{si(n)}B"), rank=4),
        Column("time", lambda row: _known(row.seconds, duration), rank=0, total="" if total is None else duration(total)),
        Column("done", lambda row: f"{row.done:,}" if row.done else "", rank=0),
    ]
    notes = [
        "L x d: layers x width; N: parameters without embeddings, memory: of a cell; tokens, FLOPs, time: of all these cells",
        "a row per cell: --rows",
    ]
    return Table.of(sizes, columns, "plan", title, notes, values=frame, elsewhere="--format csv")


def on_slices(frame: pd.DataFrame, fits: Sequence[Fit], prices: Mapping[str, Price], efficiency: float | None) -> pd.DataFrame:
    """One row per cell and slice: the columns of `table`, and

    topology; fits; mesh, remat, accumulation_steps, context_attention: the execution chosen, or what comes closest;
    batch_per_device: sequences of a micro-batch; bytes_arguments, bytes_temporary: of a device, of bytes_limit that a program
    may use; flops: of a step, all devices; collective_bytes: received per device and step; hours_at_least: of the run, every
    phase at its roofline; hours: as expected, or at `efficiency` of the roofline where that is given, else at the share that
    was measured on the chip where one was; limited_by; chip_hours and price_usd of `hours`; check: compiled or estimate;
    choice: cheapest, fastest among the slices given; would_fit: where it does not. Empty: not known, or it does not fit.
    """
    about = frame.set_index("cell")
    rows = []
    for one in fits:
        config, chosen = one.cell.config, one.chosen
        row: dict[str, Any] = {"cell": one.cell.name, "topology": one.slice.name, "fits": one.fits}
        if chosen is not None:
            execution = chosen.execution
            row |= {
                "mesh": str(execution.mesh),
                "remat": execution.remat,
                "accumulation_steps": execution.accumulation_steps,
                "context_attention": execution.context_attention if execution.mesh.context > 1 else None,
                "batch_per_device": config.batch_size // execution.accumulation_steps // execution.mesh.sequences,
                "bytes_arguments": chosen.bytes_arguments,
                "bytes_temporary": chosen.bytes_temporary,
                "flops": chosen.flops,
                "collective_bytes": sum(chosen.collective_bytes.values()),
                "check": "estimate",
            }
        row["bytes_limit"] = one.slice.chip.memory_bytes
        if one.check is not None:
            row |= {
                "bytes_arguments": one.check.bytes_arguments,
                "bytes_temporary": one.check.bytes_temporary,
                "check": "compiled",
            }
        if one.fits:
            hours = fit.expected_seconds(one, efficiency) / 3600
            price = prices.get(one.slice.chip.name)
            row |= {
                "hours_at_least": config.n_steps * chosen.seconds_step / 3600,
                "hours": hours,
                "limited_by": chosen.limited_by,
                "chip_hours": hours * one.slice.n_chips,
                "price_usd": None if price is None else hours * one.slice.n_chips * price.usd_per_hour,
            }
        else:
            row["would_fit"] = fit.advice(one)
        rows.append(row)
    found = pd.DataFrame(rows).reindex(columns=["cell", *COLUMNS]).astype(COLUMNS)
    found["choice"] = _choices(found)
    return about.reset_index().merge(found, on="cell", validate="one_to_many")


COLUMNS = {
    "topology": "str", "fits": "boolean", "mesh": "str", "remat": "str", "accumulation_steps": "Int64",
    "context_attention": "str", "batch_per_device": "Int64", "bytes_arguments": "Float64", "bytes_temporary": "Float64",
    "bytes_limit": "Float64", "flops": "Float64", "collective_bytes": "Float64", "hours_at_least": "Float64",
    "hours": "Float64", "limited_by": "str", "chip_hours": "Float64", "price_usd": "Float64", "check": "str", "choice": "str",
    "would_fit": "str",
}  # fmt: skip


def _choices(found: pd.DataFrame) -> pd.Series:
    """ "cheapest", "fastest", both or nothing, for each row."""
    choice = pd.Series("", index=found.index)
    for name, column in (("cheapest", "price_usd"), ("fastest", "hours")):
        best = found[found[column].notna()].groupby("cell")[column].idxmin()
        choice[best] = (choice[best] + " " + name).str.strip()
    return choice.replace("", None)


def totals(frame: pd.DataFrame) -> pd.DataFrame:
    """Sums by slice and by choice: cells that fit, hours one after another, chip-hours, US dollars; empty where a part is."""
    groups = [(name, frame[frame["topology"] == name]) for name in frame["topology"].unique()]
    if len(groups) > 1:
        groups += [(name, frame[frame["choice"].str.contains(name, na=False)]) for name in ("cheapest", "fastest")]
    return pd.DataFrame(
        {
            "where": name,
            "cells": int(rows["fits"].sum()),
            **{column: rows.loc[rows["fits"], column].sum(skipna=False) for column in ("hours", "chip_hours", "price_usd")},
        }
        for name, rows in groups
    )


def slices_screen(frame: pd.DataFrame, title: str) -> list[Table]:
    """The best row of each cell, and the totals. Narrow: cells, slices, hours and money stay."""
    several = len(frame) > len(frame.drop_duplicates("cell"))
    best = frame[frame["choice"].notna()].drop_duplicates("cell") if several else frame
    best = pd.concat([best, frame[~frame["cell"].isin(best["cell"])].drop_duplicates("cell")]).sort_index()
    columns = [
        Column("cell", lambda row: row.cell, "left", 0),
        Column("topology", lambda row: row.topology, "left", 0),
        Column("mesh", lambda row: _known(row.mesh, str), "left", 5),
        Column("remat", lambda row: _known(row.remat, str), "left", 7),
        Column("batch", lambda row: _known(row.batch_per_device, lambda n: f"{row.accumulation_steps} x {n}"), rank=6),
        Column("GiB", lambda row: _known(row.bytes_arguments + row.bytes_temporary, _gib), rank=2),
        Column("of", lambda row: _known(row.bytes_limit, _gib), rank=3, name="GiB of the device"),
        Column("hours\nat least", lambda row: _known(row.hours_at_least, figure) if row.fits else "", rank=4),
        Column("hours\nexpected", lambda row: _known(row.hours, figure) if row.fits else "does not fit", rank=0),
        Column("limited by", lambda row: _known(row.limited_by, str), "left", 8),
        Column("USD", lambda row: _known(row.price_usd, figure), rank=0),
        Column("check", lambda row: _known(row.check, str), "left", 9),
    ]
    advice = [f"{row.cell} on {row.topology}: fits: {row.would_fit}" for row in best.itertuples() if not row.fits]
    view = Table.of(best, columns, "slices", title, advice, values=frame, elsewhere="--format csv")
    cells = frame["cell"].nunique()
    sums = [
        Column("where", lambda row: row.where, "left", 0),
        Column("cells that fit", lambda row: f"{row.cells} of {cells}", rank=0),
        Column("hours", lambda row: _known(row.hours, figure), rank=0),
        Column("chip-hours", lambda row: _known(row.chip_hours, figure), rank=1),
        Column("USD", lambda row: _known(row.price_usd, figure), rank=0),
    ]
    return [view, Table.of(totals(frame), sums, "totals", "The whole grid, one cell after another")]


def hours_are(fits: Sequence[Fit], efficiency: float | None) -> str:
    """What the hours on the chips of those slices are."""
    text = "hours at least: every phase at its roofline"
    if efficiency is not None:
        return f"{text}; expected: at {efficiency:g} of it (--efficiency)"
    words = []
    for name, chip in {one.slice.chip.name: one.slice.chip for one in fits}.items():
        if (measured := chip.measured) is not None:
            words.append(f"{name} at {measured.training:.0%} of it, as measured ({measured.case}, {measured.date})")
        else:
            known = hardware.calibration(chip)
            words.append(
                f"{name} as kernels add up, within {known.error:.0%} of {known.programs} compiled programs' static cost"
            )
    return f"{text}; expected: {'; '.join(words)}"


def memory_is(fits: Sequence[Fit]) -> str | None:
    """Which share of a GPU's memory a program may use; None where there are no GPUs."""
    names = dict.fromkeys(one.slice.chip.name for one in fits if one.slice.chip.gpu is not None)
    if not names:
        return None
    return (
        f"{', '.join(names)}: {hardware.ALLOCATOR_FRACTION:g} of the board, what JAX takes unless told otherwise; a run plans "
        f"with {hardware.FRACTION_VARIABLES[1]} where it is set on its machine"
    )


def explanation(fits: Sequence[Fit]) -> pd.DataFrame:
    """Where a step's time goes: a row for each slice, phase and part of a step.

    seconds_at_peak: the part alone at its peak; seconds_expected: what it adds to the step; at_least: seconds of the phase, its
    longest part, the others hidden behind it. Raises ConfigError where no mesh suits.
    """
    for one in fits:
        if one.chosen is None:
            raise ConfigError(f"{one.cell.name} on {one.slice.name}: {one.unsupported_reason}")
    columns = ["cell", "topology", "phase", "part", "seconds_at_peak", "seconds_expected", "at_least"]
    rows = (
        (one.cell.name, one.slice.name, phase.name, part, phase.at_peak[part], phase.expected[part], phase.bound)
        for one in fits
        for phase in one.chosen.phases
        for part in planner.PARTS
    )
    return pd.DataFrame(rows, columns=columns)


def _explained(one: Fit) -> Table:
    """`explanation` of one, in milliseconds. Narrow: phases, what is expected of them and at least stay."""
    rows, execution = explanation([one]), one.chosen.execution
    expected, peak = (
        rows.pivot_table(index="phase", columns="part", values=values, sort=False)
        for values in ("seconds_expected", "seconds_at_peak")
    )
    whole = expected.to_numpy().sum()
    frame = expected.assign(
        **{f"{part} at peak": peak[part] for part in planner.PARTS[:4]},
        expected=expected.sum(axis=1),
        at_least=rows.groupby("phase", sort=False)["at_least"].first(),
    )
    frame.loc["step"] = frame.sum()
    frame = frame.reset_index()
    names = list(frame.columns)

    def of(name: str) -> Callable[[Any], str]:
        return lambda row: figure(1e3 * row[names.index(name)]) if row[names.index(name)] else ""

    columns = [
        Column("phase", lambda row: row[0], "left", 0),
        *(Column(part, of(part), rank=2) for part in planner.PARTS),
        Column("expected", of("expected"), rank=0),
        Column("share", lambda row: f"{row[names.index('expected')] / whole:.0%}", rank=1),
        *(Column(f"{part}\nat peak", of(f"{part} at peak"), rank=3) for part in planner.PARTS[:4]),
        Column("at least", of("at_least"), rank=0),
    ]
    steps = execution.accumulation_steps
    title = (
        f"{one.cell.name} on {one.slice.name}: mesh {execution.mesh}, remat {execution.remat}, "
        f"{steps} x {one.cell.config.batch_size // steps} sequences; ms a step{'' if one.chosen.fits else ' (does not fit)'}"
    )
    return Table.of(frame, columns, "step", title, elsewhere="--format csv")


def origins(fits: Sequence[Fit], prices: Mapping[str, Price]) -> str:
    """Whose prices the chips of those slices have, where and since when."""
    named = {name: prices[name].origin if name in prices else "no price" for name in (one.slice.chip.name for one in fits)}
    return "; ".join(f"{name}: {origin}" for name, origin in named.items())


def write(frame: pd.DataFrame, path: str) -> None:
    """The table as .parquet or .csv."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    if path.endswith(".parquet"):
        frame.to_parquet(path, index=False)
    elif path.endswith(".csv"):
        frame.to_csv(path, index=False)
    else:
        raise ConfigError(f"--out {path}: must end in .parquet or .csv")


def _known(value: Any, text: Callable[[Any], str]) -> str:
    return "" if pd.isna(value) else text(value)


def _gib(value: float) -> str:
    return f"{value / 2**30:.2f}"
