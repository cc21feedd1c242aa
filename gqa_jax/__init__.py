"""Scaling-law studies of grouped-query attention at long context.

`gqa_jax.load_results(path)` gives a grid's loss table as a pandas DataFrame, `load_evaluations` the losses by source and
position, `load_differences` those between runs, `load_costs` what serving costs; `load_table(path)` the loss table of runs of
any trainer; everything else is in its module.
"""

from __future__ import annotations

from typing import Any

__all__ = ["load_costs", "load_differences", "load_evaluations", "load_results", "load_table"]


def __getattr__(name: str) -> Any:
    if name in __all__:  # pandas is imported when it is asked for
        from gqa_jax import external, results

        return getattr(external if name == "load_table" else results, name)
    raise AttributeError(f"module 'gqa_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
