"""The map that the explorer of a page reads: the answers to many questions, computed beforehand.

A question is a loss, a context served, a cost and a device. Losses are evenly spaced in ln(loss - E), contexts are powers of
two; the nearest of them, or one more, is what the page was asked. Between the points the page interpolates (explorer.js): sizes
and costs in logarithms, probabilities and regrets as they are. It knows no law and no cost.
"""

from __future__ import annotations

import base64
import copy
import dataclasses
import math
import shlex
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from gqa_jax import costs, formatting
from gqa_jax.laws import LLAMA3, Heads
from gqa_jax.plots import style
from gqa_jax.search import candidates, objectives, optimum
from gqa_jax.search.objectives import Objective
from gqa_jax.search.roofline import Layout, RooflineServing
from gqa_jax.search.words import in_words
from launch.report import words

DRAWS = 1000
FEW, FEWER_DRAWS = 12, 400  # head configurations
LOSSES = 25
CONTEXTS = tuple(2**k for k in range(10, 21))  # tokens: 1K to 1M
DEVICES = ("h100", "h200", "v5e")  # the GPU that most have, one with more memory and bandwidth, the cheapest TPU
COUNTED = ("z", "flops", "memory")  # costs that are counted
TIMED = ("latency", "price")  # costs that are of devices
MARGIN = 0.02  # nats per token that the least loss stays above the highest E
LEAST_KEPT = 1e-6  # of the cost of a baseline that is infinite in some draws
STEP = 0.005  # of a cost: what one request more or less may change before it is said

_OF_COUNTING = ("convention", "flops", "lam", "alpha", "beta")
_OF_BYTES = ("param_dtype", "cache_dtype")
_OF_A_PRICE = ("usd_per_hour", "prices")  # of one device
_OF_SERVING = ("n_devices", "parallelism", "batch", "decode_share", "ttft", "tpot", "disaggregated", "efficiency", *_OF_BYTES)
OPTIONS = (*_OF_COUNTING, "tokens", "served_tokens", "training_mfu", "device", *_OF_SERVING, *_OF_A_PRICE)

#: Numbers of every H, all but the last four as logarithms. What is kept is a share of the cost of the baseline: 1 - saving.
FIELDS = (
    "n_params", "n_params_low", "n_params_high", "n_layers", "ratio", "cost", "cost_low", "cost_high", "kept", "kept_low",
    "kept_high", "probability", "expected_regret",
)  # fmt: skip
LINEAR = ("probability", "expected_regret")
#: The same of those that are served, and columns of words.
SERVED = ("batch", "ttft", "tpot", "usd_per_million_input", "usd_per_million_output")
CODED = ("layout", "prefill_limit", "decode_limit")
_LARGEST_LEVEL = 2**24 - 1


@dataclass(frozen=True)
class Goal:
    """A cost that can be chosen, and what asks for it on the command line."""

    objective: Objective
    flags: tuple[str, ...]

    @property
    def device(self) -> str | None:
        serving = getattr(self.objective, "serving", None)
        return None if serving is None else serving.chip.name


@dataclass(frozen=True)
class AnswerMap:
    """Every head configuration for every goal, context and loss."""

    goals: Mapping[str, Goal]  # the first is what was asked
    losses: tuple[float, ...]  # nats per token, increasing
    contexts: tuple[int, ...]  # tokens, increasing
    rows: pd.DataFrame  # of `optimum.optimum_map`; column objective: the name of the goal
    draws: int = DRAWS  # of the laws, that the rows are from


def of(
    laws: Any,
    objective: Objective,
    losses: Sequence[float],
    contexts: Sequence[int],
    *,
    aspect: Any = None,
    heads: Sequence[Heads] | None = None,
    convention: Any = "figures",
    options: Mapping[str, Any] | None = None,
    devices: Sequence[str] | None = None,
    draws: int | None = None,
) -> AnswerMap:
    """The map of these laws.

    Args:
      laws: `gqa_jax.laws.LawsByHeads`.
      objective: what was asked; it is a goal of the map, and others are served as it is.
      losses, contexts: the points, in any order.
      aspect, heads: of `optimum.search`.
      draws: of `optimum.search`; default: DRAWS, and fewer where there are more heads than FEW, which take longer.
      convention: of costs that are counted, where `options` has none.
      options: of the command line that asked, by name: what is given there holds for other costs too, as far as it can.
      devices: that latency and price are worked out for, beside the one that was asked; default: DEVICES.
    """
    goals = goals_of(objective, convention, options or {}, devices)
    losses, contexts = tuple(sorted(map(float, losses))), tuple(sorted(map(int, contexts)))
    named = {name: goal.objective for name, goal in goals.items()}
    if draws is None:
        draws = DRAWS if len(heads or laws) <= FEW else FEWER_DRAWS
    rows = optimum.optimum_map(
        by_law(laws), losses, contexts, named, aspect=aspect, heads=heads, convention=convention, draws=draws, guesses=True
    )
    return AnswerMap(goals, losses, contexts, rows, draws)


def by_law(laws: Any) -> Any:
    """The same laws without their runs: savings are against what a law says at every loss, not against a run at some."""
    found = copy.copy(laws)
    found.rows = None
    return found


def goals_of(
    objective: Objective, convention: Any, options: Mapping[str, Any], devices: Sequence[str] | None = None
) -> dict[str, Goal]:
    """The costs and devices of a map by their names, what was asked first."""
    own = getattr(objective, "serving", None)
    asked = Goal(objective, _flags(objective.name, ({} if own is None else {"device": own.chip.name}) | {**options}))
    found = {_name(asked): asked}

    def add(goal: Goal) -> None:
        found.setdefault(_name(goal), goal)

    for cost in COUNTED:
        given = {name: options[name] for name in _OF_COUNTING if name in options and name in objectives.settings(cost)}
        if objective.name in ("z", "memory") and cost != "flops":
            given |= {name: options[name] for name in _OF_BYTES if name in options}
        counted = "exact" if any(name in given for name in _OF_BYTES) else convention
        add(Goal(objectives.make(cost, **{"convention": counted} | given), _flags(cost, given)))
    for device in dict.fromkeys((*([own.chip.name] if own else ()), *(DEVICES if devices is None else devices))):
        given = {name: options[name] for name in _OF_SERVING if name in options} | {"device": device}
        if own is not None and own.chip.name == device:
            serving, given = own, given | {name: options[name] for name in (*_OF_A_PRICE, "device") if name in options}
        else:
            if not _of_any_device(given.get("efficiency")):
                given.pop("efficiency", None)
            try:
                serving = _elsewhere(own, device, given)
            except ValueError:  # so many of it have no links
                continue
        for cost in TIMED:
            if cost == "latency" or serving.has_price:
                kind = objectives.Latency if cost == "latency" else objectives.Price
                add(Goal(kind(serving), _flags(cost, given)))
    return found


def _elsewhere(own: RooflineServing | None, device: str, given: Mapping[str, Any]) -> RooflineServing:
    """Served on another device as on one's own."""
    if own is None:
        return RooflineServing(device, **{name: value for name, value in given.items() if name != "device"})
    asked = {name: given.get(name) for name in ("efficiency", "param_dtype", "cache_dtype")}
    return dataclasses.replace(own, device=device, **asked, usd_per_hour=None, price=None)


def _of_any_device(efficiency: Any) -> bool:
    """Whether an option --efficiency is no file, which was measured on one."""
    try:
        return efficiency == "bound" or float(efficiency) > 0
    except (TypeError, ValueError):
        return False


def _name(goal: Goal) -> str:
    return "@".join(filter(None, (goal.objective.name, goal.device)))


def _flags(cost: str, options: Mapping[str, Any]) -> tuple[str, ...]:
    """Words of a command line that ask for a cost with these options."""
    said = ["--cost", cost]
    for name in OPTIONS:
        if options.get(name) is not None:
            said += [f"--{name}"] if options[name] is True else [f"--{name}", shlex.quote(f"{options[name]}")]
    return tuple(said)


def loss_range(laws: Any, asked: Sequence[float]) -> tuple[float, float]:
    """Least and largest loss of a map, whole thousandths: from a quarter nearer to E than the runs came to their highest."""
    entropy = max(float(law.entropy) for law in laws.values())
    measured = [float(x) for law in laws.values() for x in law.loss]
    reached, highest = (min(measured), max(measured)) if measured else (min(asked), max(asked))
    low = min(max(entropy + MARGIN, reached - 0.25 * (reached - entropy)), *asked)
    return math.floor(1000 * low) / 1000, math.ceil(1000 * max(highest, *asked)) / 1000


def losses_of(laws: Any, asked: Sequence[float]) -> list[float]:
    """LOSSES losses, evenly spaced in ln(loss - E); the nearest to each that was asked gives way to it."""
    low, high = loss_range(laws, asked)
    below = below_all(laws, low)
    points = below + np.exp(np.linspace(np.log(low - below), np.log(high - below), LOSSES))
    points[0], points[-1] = low, high
    for loss in asked:
        points[np.abs(points - loss).argmin()] = loss
    return points.tolist()


def contexts_of(asked: Sequence[int]) -> list[int]:
    """Those of every map, and those that were asked."""
    return sorted({*CONTEXTS, *map(int, asked)})


def below_all(laws: Any, low: float) -> float:
    """E, or what is below it where the least loss of a map is: losses count from there."""
    return min(max(float(law.entropy) for law in laws.values()), low - MARGIN / 2)


# ------------------------------------------------------------------------------------------------------------- as JSON


def packed(found: AnswerMap, laws: Any) -> dict[str, Any]:
    """The map as JSON: points, head configurations, and of every goal what it is and one compressed text of all its numbers.

    Numbers are three bytes each, evenly spaced between the least and the largest of their field and goal (of logarithms, but
    for LINEAR), so within 1e-6: the low bytes of all first, of differences from loss to loss, context after context. Codes are
    a byte each. Compressed as zlib does, in base64.
    """
    rows = found.rows.assign(
        h=[Heads.of(row.n_heads, row.n_kv_heads) for row in found.rows[["n_heads", "n_kv_heads"]].itertuples(index=False)]
    )
    heads = sorted(rows["h"].unique(), key=lambda one: (one.n_heads or math.inf, one.n_kv_heads))
    order = {one: i for i, one in enumerate(heads)}
    shape = len(found.contexts), len(found.losses), len(heads)
    goals = {}
    for name, goal in found.goals.items():
        own = rows[rows["objective"] == name]
        place = np.searchsorted(found.contexts, own["context_served"]), np.searchsorted(found.losses, own["loss"])
        goals[name] = _packed(goal, own, (*place, own["h"].map(order).to_numpy()), shape)
    return {
        "heads": [_about(one, laws) for one in heads],
        "losses": list(found.losses),
        "contexts": list(found.contexts),
        "below": below_all(laws, found.losses[0]),
        "goals": goals,
        "halo": style.HALO,
        "largest_regret": formatting.LARGEST_REGRET,
        "far": candidates.FAR,
    }


def _about(one: Heads, laws: Any) -> dict[str, Any]:
    """How a page names and draws an H, and the sizes that it was trained at."""
    sizes, look = (laws[one].params if one in laws else ()), style.head_look(one)
    return {
        "label": words.label(one, laws.head_dim),
        "words": in_words(one, laws.head_dim),
        "color": look.color,
        "dash": [] if isinstance(look.line, str) else list(look.line[1]),
        "trained": [float(min(sizes)), float(max(sizes))] if len(sizes) else None,
        "is_baseline": one == LLAMA3,
    }


def _packed(goal: Goal, rows: pd.DataFrame, place: tuple, shape: tuple[int, int, int]) -> dict[str, Any]:
    objective, serving = goal.objective, getattr(goal.objective, "serving", None)
    columns = {name: rows[name] for name in FIELDS if not name.startswith("kept")}
    columns |= {
        f"kept{end}": (1 - rows[f"saving{old}"]).clip(lower=LEAST_KEPT)
        for end, old in (("", ""), ("_low", "_high"), ("_high", "_low"))
    }
    coded: dict[str, list[str]] = {}
    bytes_ = []
    if serving is not None:
        columns |= {name: rows[name] for name in SERVED}
        for name in CODED:
            known = sorted(rows[name].dropna().unique())
            coded[name] = [_word(one) for one in known]
            codes = np.array([0 if words.missing(one) else 1 + known.index(one) for one in rows[name]])
            bytes_.append(_placed(codes, place, shape, np.uint8).tobytes())
        coded["steps"] = ["in steps"]
        bytes_.append(_placed(_moves_in_steps(serving, rows), place, shape, np.uint8).tobytes())
    fields, numbers = {}, []
    for name, values in columns.items():
        levels, fields[name] = _levels(values.to_numpy(np.float64), name not in LINEAR)
        numbers.append(_bytes(_placed(levels, place, shape, np.uint32)))
    return {
        "cost": objective.name,
        "device": goal.device,
        "label": objective.label,
        "unit": objective.unit,
        "flags": " ".join(goal.flags),
        "served": None if serving is None else _served(serving),
        "fields": fields,
        "coded": coded,
        "data": base64.b64encode(zlib.compress(b"".join(numbers + bytes_), 9)).decode(),
    }


def _served(serving: RooflineServing) -> dict[str, Any]:
    """What is said of how a model is served, beside what the map has of each."""
    return {
        "on": f"{serving.n_devices} {serving.chip.name}",
        "others": serving.disaggregated,
        "closing": " ".join(words.closing(serving.describe())),
    }


def _moves_in_steps(serving: RooflineServing, rows: pd.DataFrame) -> np.ndarray:
    """Where a request more or less at once moves the cost by more than STEP: between such points a map is not exact.

    Requests share the reading of parameters: its share of what is read, over the number of requests, is what one more changes.
    """
    if not isinstance(serving.batch, str):
        return np.zeros(len(rows), bool)
    parameters = costs.dtype_bytes(serving.param_dtype) * rows["n_params"].to_numpy(np.float64) / serving.n_devices
    with np.errstate(invalid="ignore"):
        share = np.minimum(1.0, parameters / rows["memory_bytes"].to_numpy(np.float64))
        return share / rows["batch"].to_numpy(np.float64) > STEP


def _levels(values: np.ndarray, log: bool) -> tuple[np.ndarray, dict[str, Any]]:
    """(levels, how a page reads them): a value, or its logarithm, is low + step (level - 2); 1 is infinite, 0 no number."""
    with np.errstate(divide="ignore", invalid="ignore"):
        scaled = np.log(values) if log else values
    known = np.isfinite(scaled)
    low, high = (float(scaled[known].min()), float(scaled[known].max())) if known.any() else (0.0, 0.0)
    step = (high - low) / (_LARGEST_LEVEL - 2) or 1.0
    levels = 2 + np.rint((np.where(known, scaled, low) - low) / step)
    return np.where(known, levels, np.where(scaled == np.inf, 1, 0)), {"low": low, "step": step, "log": log}


def _placed(values: np.ndarray, place: tuple, shape: tuple[int, int, int], dtype: type) -> np.ndarray:
    """Values of rows where they belong: context x loss x heads; 0 elsewhere."""
    placed_CxLxH = np.zeros(shape, dtype)
    placed_CxLxH[place] = values
    return placed_CxLxH


def _bytes(levels_CxLxH: np.ndarray) -> bytes:
    """Levels below 2^24, as `packed` says."""
    changes = np.diff(levels_CxLxH, axis=1, prepend=np.zeros_like(levels_CxLxH[:, :1])) & _LARGEST_LEVEL
    return b"".join((changes >> shift & 0xFF).astype(np.uint8).tobytes() for shift in (0, 8, 16))


def _word(value: str) -> str:
    """A limit in words, or how a layout divides."""
    return words.LIMITS.get(value) or Layout.parse(value).describe()
