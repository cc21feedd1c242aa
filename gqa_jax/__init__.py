"""Scaling-law studies of grouped-query attention at long context.

    study = gqa_jax.load_study("runs/quickstart")      # or a table of runs of any trainer, or the paper's: "paper"
    study.answer(loss=1.75, context="128K", cost="price", device="h200")

`load_study` gives the laws of a grid, of a table or of the paper, and answers. The rest are tables, pandas DataFrames:
`load_results` a grid's losses, `load_evaluations` those by source and position, `load_differences` those between runs,
`load_metrics` what runs logged, `load_costs` what serving costs; `load_table` is the loss table of runs of any trainer. Modules
are attributes, imported when they are asked for: `presets`, `laws`, `search`, `plots` and `hardware` need no jax.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from typing import Any

_FUNCTIONS = {  # name -> module; pandas is imported when one is asked for
    "load_costs": "results",
    "load_differences": "results",
    "load_evaluations": "results",
    "load_metrics": "results",
    "load_results": "results",
    "load_study": "search.study",
    "load_table": "laws.external",
}

_MODULES = {"invariance": "search.invariance", "presets": "search.presets"}  # known by these names too

__all__ = list(_FUNCTIONS)


@functools.cache
def _modules() -> tuple[str, ...]:
    return tuple(module.name for module in pkgutil.iter_modules(__path__))


def __getattr__(name: str) -> Any:
    if name in _FUNCTIONS:
        return getattr(importlib.import_module(f"{__name__}.{_FUNCTIONS[name]}"), name)
    if name in (*_modules(), *_MODULES):
        return importlib.import_module(f"{__name__}.{_MODULES.get(name, name)}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_modules(), *_MODULES, *(name for name in globals() if name.startswith("__"))])
