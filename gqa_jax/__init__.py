"""Scaling-law studies of grouped-query attention at long context.

    study = gqa_jax.load_study("runs/quickstart")      # or a table of runs of any trainer, or the paper's: "paper"
    study.answer(loss=1.75, context="128K", cost="price", device="h200")

`load_study` gives the laws of a grid, of a table or of the paper, and answers. The rest are tables, pandas DataFrames:
`load_results` a grid's losses, `load_evaluations` those by source and position, `load_differences` those between runs,
`load_metrics` what runs logged, `load_costs` what serving costs; `load_table` is the loss table of runs of any trainer.
`load_model` is the model of a finished run, or imported, to be called. Modules are attributes, imported when they are asked
for: `presets`, `laws`, `search`, `plots` and `hardware` need no jax.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gqa_jax.differences import load_differences
    from gqa_jax.inference.loaded import load_model
    from gqa_jax.laws.external import load_table
    from gqa_jax.results import load_costs, load_evaluations, load_metrics, load_results
    from gqa_jax.search import invariance as invariance
    from gqa_jax.search import presets as presets
    from gqa_jax.search.study import load_study

__all__ = [
    "load_costs", "load_differences", "load_evaluations", "load_metrics", "load_model", "load_results", "load_study",
    "load_table",
]  # fmt: skip

_ELSEWHERE = {
    "load_differences": "differences",
    "load_model": "inference.loaded",
    "load_study": "search.study",
    "load_table": "laws.external",
}  # fmt: skip (the other functions are of `results`)


@functools.cache
def _modules() -> dict[str, str]:
    """Where the modules are that are attributes."""
    known = {module.name: module.name for module in pkgutil.iter_modules(__path__)}
    return known | {"invariance": "search.invariance", "presets": "search.presets"}


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module(f"{__name__}.{_ELSEWHERE.get(name, 'results')}"), name)
    if name in _modules():
        return importlib.import_module(f"{__name__}.{_modules()[name]}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_modules(), *(name for name in globals() if name.startswith("__"))])
