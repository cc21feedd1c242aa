"""What the explorer in the page computes with: laws, draws, conventions and devices as JSON."""

from __future__ import annotations

import base64
import dataclasses
import math
from typing import Any

import numpy as np

from gqa_jax import costs, formatting
from gqa_jax.hardware import CHIPS
from gqa_jax.laws import Draws, bends
from gqa_jax.search import objectives, optimum
from gqa_jax.search.roofline import Serving
from launch.report import words
from launch.report.findings import Study

DRAWS = 1000
CONTEXTS = (1024, 1024 * 1024)  # of the slider, tokens
COSTS = ("z", "flops", "memory", "latency", "price")
DEVICE = "h100"
_MARGIN = 0.02  # nats per token that the slider stays above the highest E


def payload(study: Study) -> dict[str, Any]:
    """Everything that a page needs to search by itself, ready for `json.dumps`; what is not known is null.

    Draws are little-endian float64, draw after draw, in base64: the page computes with the bits that Python does. A
    kind of bend is a place in the list `kinds`.
    """
    laws, question = study.laws, study.questions[0]
    known = optimum.coefficients(laws, DRAWS)
    asked = study.objective.describe()
    conventions = {name: dataclasses.asdict(rule) for name, rule in costs.CONVENTIONS.items()}
    own = asked.get("convention")
    named = next((name for name, rule in conventions.items() if own and rule | {"flops": own["flops"]} == own), None)
    if own and named is None:
        conventions[named := "own"] = own
    kinds = {
        cost: objectives.make(cost, device=DEVICE) if cost in ("latency", "price") else objectives.make(cost) for cost in COSTS
    }
    return {
        "heads": [{**one._asdict(), "label": words.label(one, laws.head_dim)} for one in known.heads],
        "n_candidates": known.n_candidates,
        "baseline": known.baseline,
        "largest_regret": formatting.LARGEST_REGRET,
        "point": {"entropy": _numbers(known.entropy_H), "log_a": _numbers(known.log_a_H), "b": _numbers(known.b_H)},
        "draws": None if known.draws is None else _draws(known.draws),
        "trained": [_numbers(sizes) for sizes in known.trained_Hx2],
        "aspect": {"params": list(study.aspect.params), "ratio": list(study.aspect.ratio)},
        "head_dim": float(laws.head_dim),
        "vocab_size": float(laws.vocab_size),
        "shape_convention": dataclasses.asdict(costs.named_convention(laws.size_convention)),
        "serving": Serving(DEVICE).describe(),
        "conventions": conventions,
        "flops_rules": {rule: objectives.Flops(flops=rule).label for rule in ("per_token", "half_T", "full_T")},
        "devices": {name: _device(name) for name, chip in CHIPS.items() if chip.price is not None},
        "dtype_bytes": costs.DTYPE_BYTES,
        "objectives": {name: kind.describe() for name, kind in kinds.items()} | {asked["cost"]: asked},
        "ranges": {"context": list(CONTEXTS), "loss": _loss_range(study)},
        "defaults": {
            "context": int(question.context_served),
            "loss": float(question.loss),
            "cost": asked["cost"],
            "convention": named or "figures",
            **_dtypes(study.objective),
        },
    }


def _draws(draws: Draws) -> dict[str, Any]:
    """Draws of all heads; of E once, where they share it; of bends, which they share, if there are any."""
    shared = (draws.entropy_SxH == draws.entropy_SxH[:, :1]).all()
    entropy = draws.entropy_SxH[:, :1] if shared else draws.entropy_SxH
    matrices = {"entropy": entropy, "log_a": draws.log_a_SxH, "b": draws.b_SxH}
    bent = None
    if draws.bends is not None:
        columns = {"kind": draws.bends.kind_S, "amount": draws.bends.amount_S, "place": draws.bends.place_S}
        bent = {"kinds": list(bends.NAMES), "center": float(draws.bends.center), "reach": float(draws.bends.reach)}
        bent |= {name: _base64(column) for name, column in columns.items()}
    return {"count": len(draws.b_SxH), "bends": bent} | {name: _base64(matrix) for name, matrix in matrices.items()}


def _base64(matrix: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(matrix, "<f8").tobytes()).decode()


def _numbers(values: np.ndarray) -> list[float | None]:
    return [float(value) if np.isfinite(value) else None for value in values]


def _device(name: str) -> dict[str, Any]:
    """Numbers of a device that a `Serving` on it is described by."""
    described = Serving(name).describe()
    fields = ("device", "peak_flops", "memory_bandwidth", "interconnect", "memory_bytes", "usd_per_hour", "price")
    return {field: described[field] for field in fields}


def _dtypes(objective: Any) -> dict[str, str]:
    """Precisions of an objective that has them, bfloat16 where it does not say."""
    part = getattr(objective, "serving", objective)
    return {name: getattr(part, name, None) or "bfloat16" for name in ("param_dtype", "cache_dtype")}


def _loss_range(study: Study) -> list[float]:
    """Losses of the slider, whole thousandths: from a quarter nearer to E than the runs came to the highest of theirs."""
    laws = study.laws.values()
    entropy = max(float(law.entropy) for law in laws)
    reached = min(float(law.loss.min()) for law in laws)
    asked = [float(question.loss) for question in study.questions]
    low = min(max(entropy + _MARGIN, reached - 0.25 * (reached - entropy)), *asked)
    high = max(max(float(law.loss.max()) for law in laws), *asked)
    return [math.floor(1000 * low) / 1000, math.ceil(1000 * high) / 1000]
