"""What the explorer in the page computes with: laws, draws, conventions and devices as JSON."""

from __future__ import annotations

import base64
import dataclasses
import math
from typing import Any

import numpy as np

from gqa_jax import costs, formatting, hardware
from gqa_jax.hardware import CHIPS, Chip
from gqa_jax.laws import Draws, bends
from gqa_jax.search import objectives, optimum, roofline
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
    serving = getattr(study.objective, "serving", None) or Serving(DEVICE)
    priced = serving if serving.has_price else Serving(DEVICE)
    kinds = [objectives.make(cost) for cost in ("z", "flops", "memory")]
    kinds += [objectives.Latency(serving), objectives.Price(priced)]
    return {
        "heads": [{**one._asdict(), "label": words.label(one, laws.head_dim)} for one in known.heads],
        "n_candidates": known.n_candidates,
        "baseline": known.baseline,
        "largest_regret": formatting.LARGEST_REGRET,
        "point": {"entropy": _numbers(known.entropy_H), "log_a": _numbers(known.log_a_H), "b": _numbers(known.b_H)},
        "draws": None if known.draws is None else _draws(known.draws),
        "trained": [_numbers(sizes) for sizes in known.trained_Hx2],
        "aspect": {"params": list(study.aspect.params), "ratio": list(study.aspect.ratio)},
        "context_trained": int(laws.context),
        "head_dim": float(laws.head_dim),
        "vocab_size": float(laws.vocab_size),
        "shape_convention": dataclasses.asdict(costs.named_convention(laws.size_convention)),
        "serving": Serving(DEVICE).describe(),  # of a limit of memory
        "conventions": conventions,
        "flops_rules": {rule: objectives.Flops(flops=rule).label for rule in ("per_token", "half_T", "full_T")},
        "devices": _devices(serving),
        "layouts": _layouts(serving),
        "dtype_bytes": costs.DTYPE_BYTES,
        "cache_bytes": {name: float(roofline.cache_value_bytes(name, laws.head_dim)) for name in costs.DTYPE_BYTES},
        "objectives": {kind.name: kind.describe() for kind in kinds} | {asked["cost"]: asked},
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


def _devices(serving: Serving) -> dict[str, dict[str, Any]]:
    """Those that the explorer offers: with a price, and as many of them joined as share a model; and the one asked for."""
    chips = {name: chip for name, chip in CHIPS.items() if chip.price is not None} | {serving.chip.name: serving.chip}
    found = {name: _device(chip, serving.n_devices) for name, chip in chips.items()}
    return {name: one for name, one in found.items() if one is not None}


def _device(chip: Chip, n_devices: int) -> dict[str, Any] | None:
    """Numbers of a device that a `Serving` on it is described by, some by dtype; None where so many have no links."""
    try:
        described = Serving(chip, n_devices).describe()
    except ValueError:
        return None
    fields = (
        "device", "bfloat16_flops", "memory_bandwidth", "interconnect", "collective_seconds", "memory_bytes", "attention_share",
        "usd_per_hour", "price",
    )  # fmt: skip
    own = {field: described[field] for field in fields}
    by_dtype = {
        "peaks": {dtype: chip.peak(dtype) for dtype in costs.DTYPE_BYTES},
        "efficiencies": {dtype: hardware.default_efficiency(chip, dtype)._asdict() for dtype in costs.DTYPE_BYTES},
    }
    return own | by_dtype | {"training_mfu": hardware.trained_mfu(chip)}


def _layouts(serving: Serving) -> list[str]:
    """Layouts that the explorer offers: the two with a name, and the one asked for."""
    own = serving.parallelism if isinstance(serving.parallelism, str) else str(serving.parallelism)
    return list(dict.fromkeys((roofline.BEST, roofline.TENSOR, own)))


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
