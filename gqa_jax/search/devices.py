"""The same question on several devices: which heads are the cheapest on each, and money against time on all of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from gqa_jax.hardware import prices
from gqa_jax.laws import Heads, PowerLaw
from gqa_jax.search import candidates, optimum
from gqa_jax.search.answer import Answer, records
from gqa_jax.search.objectives import Objective
from gqa_jax.search.roofline import RooflineServing
from gqa_jax.search.serving import Price

COLUMNS = (
    "device", "n_devices", "n_heads", "n_kv_heads", "n_params", "n_layers", "d_model", "ratio", "layout", "batch", "cost",
    "cost_low", "cost_high", "probability", "usd_per_million", "usd_per_million_input", "usd_per_million_output", "ttft",
    "tpot", "request_seconds", "prefill_limit", "decode_limit", "memory_bytes", "usd_per_hour", "price", "note",
)  # fmt: skip
FRONT = (
    "device", "n_devices", "batch", "n_heads", "n_kv_heads", "n_params", "layout", "usd_per_million", "request_seconds", "ttft",
    "tpot", "prefill_limit", "decode_limit",
)  # fmt: skip
_LARGEST_BATCH = 2**16


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Answers by device.

    `table`: a row per device, columns COLUMNS, cheapest first; a device that can't serve it has a note alone.
    `front`: the ways of serving of which none is both cheaper and faster, columns FRONT, fastest first, by the fitted laws.
    """

    answers: dict[str, Answer]
    table: pd.DataFrame
    front: pd.DataFrame
    vendors: str | None  # what to say where prices of several vendors are compared

    def to_dict(self) -> dict[str, Any]:
        """For JSON: both tables, and every answer."""
        answers = {name: answer.to_dict() for name, answer in self.answers.items()}
        return {"devices": records(self.table), "front": records(self.front), "answers": answers}


def compare(
    laws: Mapping[Heads, PowerLaw], loss: float, context_served: int, goals: Sequence[Objective], **options: Any
) -> Comparison:
    """The answers of `optimum.search` for objectives that differ in their devices.

    Args:
      laws, loss, context_served, options: of `optimum.search`.
      goals: objectives of one kind that have a `serving`, each of another device.

    Raises:
      ValueError: a device twice, or no device that can serve it.
    """
    named = {goal.serving.chip.name: goal for goal in goals}
    if len(named) < len(goals):
        raise ValueError(f"devices {', '.join(goal.serving.chip.name for goal in goals)}: each once")
    answers, rows = {}, []
    for name, goal in named.items():
        row: dict[str, Any] = {"device": name, "n_devices": goal.serving.n_devices, "price": goal.serving.origin}
        row["usd_per_hour"] = goal.serving.usd if goal.serving.has_price else None
        try:
            answers[name] = optimum.search(laws, loss, context_served, goal, **options)
        except ValueError as error:
            rows.append(row | {"note": str(error)})
            continue
        best = answers[name].candidates.iloc[0]
        shared = {column: best[column] for column in COLUMNS if column in best.index and column not in row}
        rows.append(row | shared | {"usd_per_million": _usd(best, goal.serving)})
    if not answers:
        raise ValueError("; ".join(f"{row['device']}: {row['note']}" for row in rows))
    table = pd.DataFrame(rows).reindex(columns=list(COLUMNS)).sort_values("cost", kind="stable", ignore_index=True)
    reached = [goal for name, goal in named.items() if name in answers]
    ways = front(laws, loss, context_served, [goal.serving for goal in reached], **options)
    listed = {name: goal.serving.listed for name, goal in named.items() if goal.serving.listed is not None}
    return Comparison(answers, table, ways, prices.compared(named, listed))


def front(
    laws: Mapping[Heads, PowerLaw], loss: float, context_served: int, servings: Sequence[RooflineServing], **options: Any
) -> pd.DataFrame:
    """Money against time: for every device and number of requests (powers of two) the cheapest heads by the fitted laws.

    For a number of requests these are the fastest too: a replica is paid for as long as it takes. Only those of which none
    costs less and takes less time per request; columns FRONT, fastest first. Time limits of the servings hold. Devices without
    a price are left out.
    """
    known = candidates.coefficients(laws, draws=0, heads=options.get("heads"), compared=None)
    table = candidates.Table.of(laws, loss, candidates.rule_of(laws, options.get("aspect")), known)
    limit, found = options.get("memory_limit"), []
    for serving in servings:
        batch = 1
        while serving.has_price and batch <= _LARGEST_BATCH:
            if _allowed(serving, batch):
                asked = candidates.CostAt(Price(dataclasses.replace(serving, batch=batch)), context_served, limit)
                settled = table.settled(asked)
                cost_H, n_H, shape_H = table.typical(settled)
                if not np.isfinite(cost_H).any():
                    break  # with more requests memory and time only grow
                i = int(np.nanargmin(cost_H))
                served = settled.objective.served(shape_H, context_served).columns()
                about = {"device": serving.chip.name, "n_devices": serving.n_devices, "usd_per_million": cost_H[i]}
                own = table.heads[i]._asdict() | {"n_params": n_H[i]} | {name: values[i] for name, values in served.items()}
                found.append({name: own[name] for name in FRONT if name in own} | about)
            batch *= 2
    frame = pd.DataFrame(found).reindex(columns=list(FRONT))
    frame = frame.sort_values(["request_seconds", "usd_per_million"], kind="stable", ignore_index=True)
    cheaper = frame["usd_per_million"] < frame["usd_per_million"].cummin().shift(fill_value=np.inf)
    return frame[cheaper].reset_index(drop=True)


def _allowed(serving: RooflineServing, batch: int) -> bool:
    """Whether so many requests can be divided as a given layout says."""
    return isinstance(serving.parallelism, str) or bool(np.all(np.asarray(serving.parallelism.sequences) <= batch))


def _usd(row: pd.Series, serving: RooflineServing) -> float:
    """US dollars per million tokens of requests, prompt and generated alike."""
    share = serving.decode_share
    parts = [(1 - share, row["usd_per_million_input"]), (share, row["usd_per_million_output"])]
    return float(sum(part * value for part, value in parts if part > 0))
