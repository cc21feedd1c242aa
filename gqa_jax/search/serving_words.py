"""How an answer (`gqa_jax.search.answer.Answer`) is served, and what that takes for granted, in sentences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from gqa_jax import formatting
from gqa_jax.formatting import seconds, usd
from gqa_jax.laws import Heads
from gqa_jax.search.roofline import Layout

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
BATCHES = {"best": "as many as cost the least", "fits": "as many as fit"}
PRICED = ("price", "lifetime")  # costs that an hour of a device moves


def assumed(found: Any) -> list[str]:
    """What the cost of an answer takes for granted of its serving: layout, load, efficiencies, and prices where it has any."""
    row, serving = found.candidates.iloc[0], found.objective["serving"]
    layout, count = Layout.parse(row["layout"]), serving["n_devices"]
    requests = "1 request at a time" if row["batch"] == 1 else f"{row['batch']:,.0f} requests at once"
    if (how := BATCHES.get(serving["batch"])) is not None:
        requests += f" ({how})"
    lines = [
        f"served on {count} x {serving['device']}" + (f" ({layout.describe()})" if count > 1 else ""),
        requests,
        f"{serving['decode_share']:.0%} of their tokens generated",
        f"parameters of {serving['param_bytes']:g} bytes, cache in {serving['cache_dtype']}",
    ]
    if serving["disaggregated"]:
        lines.append("prompts read by other devices")
    lines += [
        f"{what} within {seconds(serving[key])}"
        for key, what in (("ttft", "the first token"), ("tpot", "each token"))
        if serving[key] is not None
    ]
    given = serving["efficiency"]
    if not serving.get("data_sheet", True):
        return [*lines, given["source"], *_price_of(found)]
    reached = f"{given['matmul']:.0%} of the peak in matrices, {given['cache_bandwidth']:.0%} of the bandwidth for the cache"
    lines.append(given["source"] if given["bound"] else f"{reached}: {given['source']}")
    return lines + _price_of(found)


def _price_of(found: Any) -> list[str]:
    serving = found.objective["serving"]
    if found.objective["cost"] not in PRICED:
        return []
    return [f"${serving['usd_per_hour']:.2f} an hour of a device ({serving['price']})"]


def said(found: Any) -> list[str]:
    """Sentences: what it takes and gives, prices, what costs rest on. None where no device is asked about."""
    row, serving = found.candidates.iloc[0], found.objective.get("serving")
    if serving is None or "layout" not in row.index or pd.isna(row["layout"]):
        return []
    memory, limit = formatting.gb(row["memory_bytes"]), formatting.gb(serving["memory_bytes"])
    lines = [f"memory {memory} of the {limit} that a server fills of each device", _times(row)]
    if pd.notna(row["usd_per_million_input"]) or pd.notna(row["usd_per_million_output"]):
        lines.append(_money(row, serving))
    lines += replication(found)
    given = serving["efficiency"]
    rates = serving.get("data_sheet", True)
    lines.append(f"of the peaks are reached: {efficiency(given)}" if rates else f"reached: {measured_rates(serving)}")
    if errors := given.get("errors"):
        lines.append(
            f"these numbers were measured within {min(errors):.0%} to {max(errors):.0%} (standard errors), drawn with the "
            "laws' coefficients: both are in the probabilities"
        )
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
    told = " and ".join(f"{usd(value)} a million {name} tokens" for value, name in kinds if pd.notna(value))
    return f"{told}, at ${serving['usd_per_hour']:.2f} an hour of a device ({serving['price']})"


def replication(found: Any) -> list[str]:
    """What it costs that devices hold the same key/value heads, where some do: a sentence, or none."""
    costs = {}
    for row in found.candidates.to_dict("records"):
        heads = Heads.of(row["n_heads"], row["n_kv_heads"])
        over = 1 if pd.isna(row["layout"]) else Layout.parse(row["layout"]).heads
        if 0 < heads.n_kv_heads < over and pd.notna(row["replication"]):
            costs[heads] = row["replication"]
    if not costs:
        return []
    told = ", ".join(f"{heads} {'nothing' if cost < NO_SHARE else f'{cost:.1%}'}" for heads, cost in costs.items())
    return [f"fewer key/value heads than devices that divide the heads, so that several hold the same: costs {told} here"]


def measured_rates(serving: Mapping[str, Any]) -> str:
    """The five numbers of a device that has no data sheet, as they were measured, and where they are from."""
    given, flops, memory = serving["efficiency"], serving["bfloat16_flops"] / 1e9, serving["memory_bandwidth"] / 1e9
    return (
        f"{given['matmul'] * flops:.3g} GFLOP/s in products with parameters, {given['attention'] * flops:.3g} in attention of "
        f"prompts, {given['weights_bandwidth'] * memory:.3g} GB/s of parameters and {given['cache_bandwidth'] * memory:.3g} of "
        f"caches, {1e6 * given['layer_seconds']:.3g} us a layer: {given['source']}"
    )


def efficiency(given: Mapping[str, Any]) -> str:
    """The five numbers and where they are from."""
    if given["bound"]:
        return given["source"]
    return (
        f"matrices {given['matmul']:.0%}, attention {given['attention']:.0%} of its kernels' rate, bandwidth for parameters "
        f"{given['weights_bandwidth']:.0%} and for the cache {given['cache_bandwidth']:.0%}, "
        f"links {given['exchange']:.0%}, {1e6 * given['layer_seconds']:.3g} us a layer: {given['source']}"
    )
