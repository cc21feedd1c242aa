"""The steps of first light, in order of value: a run that ends early loses the last ones. Imports no jax.

Every step works in three modes: on the device; as a rehearsal on a CPU, with interpreted kernels and tiny shapes; and compiled
only, ahead of time for a device that is not here. What differs between the first two is in `sizes`.
"""

from __future__ import annotations

from collections.abc import Iterable

from benchmarks.first_light.attention_steps import (
    attention_first_look,
    attention_rest,
    correctness,
    decoding,
    races,
    smoke,
)
from benchmarks.first_light.machine_steps import begin_readme, environment, readme
from benchmarks.first_light.supervisor import Step
from benchmarks.first_light.training_steps import resume, small_cells, training_first_look, training_rest

STEPS = (
    Step("0", "environment and ceilings", 30, environment),
    Step("1", "smoke", 40, smoke),
    Step("1b", "the README's road", 50, readme, beside="1", begin=begin_readme),
    Step("2", "attention, first look", 45, attention_first_look),
    Step("3", "training, first look", 140, training_first_look),
    Step("4", "resume", 45, resume),
    Step("5", "correctness", 65, correctness),
    Step("6", "races", 25, races),
    Step("7", "training, the rest", 45, training_rest),
    Step("8", "attention, the rest", 30, attention_rest),
    Step("9", "decoding", 20, decoding),
    Step("10", "small cells", 5, small_cells),
)


def chosen(names: Iterable[str] | None) -> list[Step]:
    """The steps of these names, in their order. Raises ValueError for an unknown one, with those that there are."""
    known = {step.name: step for step in STEPS}
    if names is None:
        return list(STEPS)
    wanted = list(names)
    if unknown := [name for name in wanted if name not in known]:
        raise ValueError(f"unknown step {unknown[0]!r}: there are {', '.join(known)}")
    return [step for step in STEPS if step.name in wanted]
