"""Scaling laws with their uncertainty, in float64.

    laws = gqa_jax.laws.fit_by_heads(gqa_jax.load_results("runs/paper"))     # L(N; H) = (a / N)^b + E, one E for all H
    laws[Heads(8, 1)].solve(2.615), laws.size_interval(Heads(8, 1), 2.615), laws.intervals(), laws.draws()

`by_heads` is what the search rests on: `heads`, `law`, `runs`, `fitting`, `block`, `by_heads`, `posterior` and `head_law` are
read for an answer. The others stand beside them, and none of these imports one of those when it is imported itself.
"""

from __future__ import annotations

import importlib
from typing import Any

from gqa_jax.laws.by_heads import LawsByHeads, fit_by_heads
from gqa_jax.laws.heads import LLAMA3, MHA, Heads
from gqa_jax.laws.law import PowerLaw
from gqa_jax.laws.posterior import Draws

#: Leaves: the module of this package, and what it offers under the package's own name. A law is added here.
FURTHER = {
    "external": ("load_table",),  # runs of any trainer
    "joint": ("JointLaw", "fit_joint"),  # one law in N, n_h and n_kv
    "loss_nd": ("LossND", "LossNDByHeads", "fit_loss_nd", "fit_loss_nd_by_heads"),  # L against N and D
    "query_heads": ("LawsByQueryHeads", "QueryHeadsLaw", "fit_query_heads"),  # L against n_h
    "trends": ("PowerTrend", "fit_power"),  # y = a x^b
}
_MODULES = {name: module for module, names in FURTHER.items() for name in names}

__all__ = ["LLAMA3", "MHA", "Draws", "Heads", "LawsByHeads", "PowerLaw", "fit_by_heads", *_MODULES]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
