"""How an answer is served, and what it takes for granted; answers on several devices side by side. For a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table

from gqa_jax import formatting
from gqa_jax.formatting import probability, short
from gqa_jax.laws import Heads
from gqa_jax.search.answer import Answer
from gqa_jax.search.devices import Comparison
from gqa_jax.search.roofline import Layout
from launch.studies import Fitted

#: What most of a phase goes to (`gqa_jax.search.roofline.Phase.limit`), in words.
LIMITS = {
    "matmul": "products with parameters",
    "attention": "attention",
    "weights": "reading parameters",
    "cache": "reading the cache",
    "exchange": "exchanges between devices",
    "layers": "starting kernels",
}
NO_SHARE = 5e-4  # of a cost: less is called nothing


def said(found: Answer) -> list[str]:
    """Sentences: the layout and the load, what they take, prices, what costs rest on. None where no device is asked about."""
    row, serving = found.candidates.iloc[0], found.objective.get("serving")
    if serving is None or "layout" not in row.index or pd.isna(row["layout"]):
        return []
    layout = Layout.parse(row["layout"])
    count = serving["n_devices"]
    devices = f"{count} x {serving['device']}" + (f", {layout.describe()}" if count > 1 else "")
    share = serving["decode_share"]
    requests = "1 request at a time" if row["batch"] == 1 else f"{row['batch']:,.0f} requests at once"
    memory, limit = formatting.gb(row["memory_bytes"]), formatting.gb(serving["memory_bytes"])
    lines = [
        f"served on {devices}: {requests}, {share:.1%} of their tokens generated"
        + (", prompts read by other devices" if serving["disaggregated"] else ""),
        f"memory {memory} of the {limit} that a server fills of each device",
        _times(row),
    ]
    if pd.notna(row["usd_per_million_input"]) or pd.notna(row["usd_per_million_output"]):
        lines.append(_money(row, serving))
    lines += replication(found)
    lines.append(f"of the peaks are reached: {efficiency(serving['efficiency'])}")
    if found.objective.get("training_mfu") is not None:
        lines.append(f"training at {found.objective['training_mfu']:.0%} of the peak in bfloat16")
    return lines


def _times(row: Mapping[str, Any]) -> str:
    parts = []
    if pd.notna(row["ttft"]):
        parts.append(f"first token after {seconds(row['ttft'])} ({LIMITS[row['prefill_limit']]})")
    if pd.notna(row["tpot"]):
        parts.append(f"{seconds(row['tpot'])} a token ({LIMITS[row['decode_limit']]})")
    return ", then ".join(parts) + f"; {seconds(row['request_seconds'])} a request"


def _money(row: Mapping[str, Any], serving: Mapping[str, Any]) -> str:
    kinds = [(row["usd_per_million_input"], "input"), (row["usd_per_million_output"], "output")]
    told = " and ".join(f"${formatting.three(value)} a million {name} tokens" for value, name in kinds if pd.notna(value))
    return f"{told}, at ${serving['usd_per_hour']:.2f} an hour of a device ({serving['price']})"


def seconds(value: float) -> str:
    """A time in seconds or milliseconds, three digits: 1.27 s, 1.98 ms."""
    return f"{formatting.three(1e3 * value)} ms" if value < 0.1 else f"{formatting.three(value)} s"


def replication(found: Answer) -> list[str]:
    """What it costs that devices hold the same key/value heads, where some do: a sentence, or none."""
    costs = {}
    for row in found.candidates.to_dict("records"):
        heads = Heads(None if pd.isna(row["n_heads"]) else int(row["n_heads"]), int(row["n_kv_heads"]))
        over = 1 if pd.isna(row["layout"]) else Layout.parse(row["layout"]).heads
        if 0 < heads.n_kv_heads < over and pd.notna(row["replication"]):
            costs[heads] = row["replication"]
    if not costs:
        return []
    told = ", ".join(f"{heads} {'nothing' if cost < NO_SHARE else f'{cost:.1%}'}" for heads, cost in costs.items())
    return [f"fewer key/value heads than devices that divide the heads, so that several hold the same: costs {told} here"]


def efficiency(given: Mapping[str, Any]) -> str:
    """The five numbers and where they are from."""
    if given["bound"]:
        return given["source"]
    return (
        f"matrices {given['matmul']:.0%}, attention {given['attention']:.0%} of its kernels' rate, bandwidth for parameters "
        f"{given['weights_bandwidth']:.0%} and for the cache {given['cache_bandwidth']:.0%}, "
        f"links {given['exchange']:.0%}, {1e6 * given['layer_seconds']:.3g} us a layer: {given['source']}"
    )


def print_comparison(found: Comparison, one: Fitted, console: Console) -> None:
    """The answers by device, cheapest first, and the ways of serving that are neither dearer nor slower than another."""
    first = next(iter(found.answers.values()))
    unit = f", {first.objective['unit']}" if first.objective["unit"] else ""
    console.print(
        f"loss {first.loss:g} served at {first.context_served:,} tokens, laws of runs trained at {one.context:,}; "
        f"{_load(first)}",
        highlight=False,
    )
    view = Table(title="The answer on each", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in ("device", "heads", "N*", f"cost{unit}", "P", "$/M in", "$/M out", "at once", "first", "a token", "limit"):
        view.add_column(name, justify="left" if name in ("device", "limit") else "right", no_wrap=True)
    for row in found.table.to_dict("records"):
        name = f"{row['n_devices']} x {row['device']}"
        if pd.isna(row["cost"]):
            console.print(f"{name}: {row['note']}", highlight=False, soft_wrap=True)
            continue
        view.add_row(
            name, _heads(row), short(row["n_params"]), formatting.three(row["cost"]),
            "" if pd.isna(row["probability"]) else probability(row["probability"]),
            *(_optional(row[key], formatting.three) for key in ("usd_per_million_input", "usd_per_million_output")),
            f"{row['batch']:,.0f}", *(_optional(row[key], seconds) for key in ("ttft", "tpot")), _slowest(row),
        )  # fmt: skip
    console.print(view)
    if len(found.front):
        view = Table(
            title="Money against time: no other way of these is both cheaper and faster (fitted laws, powers of two at once)",
            title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False,
        )  # fmt: skip
        for name in ("a request", "$/M tokens", "device", "at once", "heads", "N*", "layout", "first", "a token", "limit"):
            view.add_column(name, justify="left" if name in ("device", "limit") else "right", no_wrap=True)
        for row in found.front.to_dict("records"):
            view.add_row(
                seconds(row["request_seconds"]), formatting.three(row["usd_per_million"]),
                f"{row['n_devices']} x {row['device']}",
                f"{row['batch']:,.0f}", _heads(row), short(row["n_params"]), row["layout"],
                *(_optional(row[key], seconds) for key in ("ttft", "tpot")), _slowest(row),
            )  # fmt: skip
        console.print(view)
    for row in found.table.to_dict("records"):
        hour = "" if pd.isna(row["usd_per_hour"]) else f"${row['usd_per_hour']:.2f} an hour, "
        console.print(f"{row['device']}: {hour}{row['price']}", highlight=False, soft_wrap=True)
    if found.vendors is not None:
        console.print(f"[yellow]warning:[/] {found.vendors}", highlight=False)
    for source in dict.fromkeys(efficiency(answer.objective["serving"]["efficiency"]) for answer in found.answers.values()):
        console.print(f"of the peaks are reached: {source}", highlight=False, soft_wrap=True)
    by_warning: dict[str, list[str]] = {}
    for name, answer in found.answers.items():
        for warning in answer.warnings:
            by_warning.setdefault(warning, []).append(name)
    for warning, names in by_warning.items():
        where = "" if len(names) == len(found.answers) else f"{', '.join(names)}: "
        console.print(f"[yellow]warning:[/] {where}{warning}", highlight=False)


def _load(found: Answer) -> str:
    """What is asked of every device alike."""
    serving = found.objective["serving"]
    limits = [f"{name} {seconds(serving[name])} at most" for name in ("ttft", "tpot") if serving[name] is not None]
    return ", ".join([f"{serving['decode_share']:.1%} of the tokens of a request generated", *limits])


def _slowest(row: Mapping[str, Any]) -> str:
    """What the phase that takes most of a request is limited by."""
    generated = row["request_seconds"] - (0.0 if pd.isna(row["ttft"]) else row["ttft"])
    reads = pd.notna(row["ttft"]) and row["ttft"] > generated
    return LIMITS[row["prefill_limit"] if reads else row["decode_limit"]]


def _heads(row: Mapping[str, Any]) -> str:
    return str(Heads(None if pd.isna(row["n_heads"]) else int(row["n_heads"]), int(row["n_kv_heads"])))


def _optional(value: float, text) -> str:
    return "" if pd.isna(value) else text(value)
