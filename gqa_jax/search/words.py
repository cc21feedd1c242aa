"""An answer (`gqa_jax.search.answer.Answer`) in plain words, with everything that it takes for granted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from gqa_jax import costs, formatting
from gqa_jax.formatting import counted, probability, regret, saving, saving_between, size
from gqa_jax.laws import Heads
from gqa_jax.search import ranking, shape_rule

ASSUMED = " Assumed: "  # between the answer and what it takes for granted
FLOPS = {"per_token": "a token", "half_T": "T/2 tokens", "full_T": "T tokens"}  # that a rule counts the FLOPs of


def headline(answer: Any, also: Sequence[str] = ()) -> str:
    """The answer in plain words, and every assumption that moves it; `also`: assumptions that the answer does not have.

    An answer that is `far` from what was trained is called a guess, and has no probability.
    """
    said = [_what(answer) + _against(answer)]
    if not np.isnan(answer.far):
        said.insert(0, f"N* is {formatting.times(answer.far)} beyond the trained sizes, further than 10x: a guess.")
    more = ranking.above(answer.regret_of_runner_up, answer.expected_regret)
    if answer.runner_up is not None and not np.isnan(more):
        said.append(f"Next, {answer.runner_up} costs {regret(more)} more on average.")
    return " ".join(said) + f"{ASSUMED}{'; '.join([*assumptions(answer), *also])}."


def _what(answer: Any) -> str:
    """Heads, shape, size, and how sure: without the full stop."""
    model = (
        f"{answer.heads}, {in_words(answer.heads, answer.head_dim)}, in {layers(answer)} ({size(answer.n_params)} parameters)"
    )
    among = f"the cheapest of the {answer.n_candidates}"
    if answer.n_candidates == 1:
        every = len(answer.candidates)
        sure = "the only heads that are compared" if every == 1 else f"the only ones of the {every} that can be chosen"
    elif np.isnan(answer.probability):
        on_average = f"the least costly of the {answer.n_candidates} on average"
        sure = on_average if answer.noise_model else f"{among} by the fitted laws"
    else:
        sure = f"{among} with probability {probability(answer.probability)}"
        if answer.probability < answer.candidates["probability"].max():
            sure = f"the least costly choice on average, and {sure}"
    return f"{model}: for a loss of {answer.loss:.5g} at {answer.context_served:,} tokens of context {sure}"


def _against(answer: Any) -> str:
    """What it saves against the baseline, with the full stop."""
    if answer.baseline is None or np.isnan(answer.saving):
        return "."
    between, told = saving_between(*answer.saving_interval), saving(answer.saving)
    if told == "the same":
        return f"; it costs as much as {baseline_words(answer)}."
    parts = ""
    if answer.objective["cost"] == "z":
        parts = f": memory {saving(answer.saving_memory)}, FLOPs {saving(answer.saving_flops)}"
    return f", {told}{f' ({between})' if between else ''} than {baseline_words(answer)}{parts}."


def baseline_words(answer: Any) -> str:
    """Which model an answer is compared with: one that was measured, or what its law says at the loss asked for."""
    base = answer.baseline
    model = f"{base.label} in {layers(base)}"
    if base.measured:
        return f"the measured model of {model} (loss {base.loss:.4f})"
    return f"{model}, by the law{' and shaped as the trained sizes' if base.shape == 'trained' else ''}"


def layers(row: Any) -> str:
    """42 layers x 2400."""
    return shape_text(row).replace(" x ", " layers x ")


def shape_text(row: Any) -> str:
    """Layers x width, rounded: 42 x 2400, 3.4 x 54; empty where there is none."""
    if not np.isfinite(row.n_layers):
        return ""
    count = f"{row.n_layers:.0f}" if row.n_layers >= 9.95 else f"{row.n_layers:.2g}"
    return f"{count} x {row.d_model:.0f}"


def in_words(one: Heads, head_dim: float) -> str:
    """8 query heads and 1 key/value head; a query head per 64 of the width and 8 key/value heads."""
    query = f"a query head per {head_dim:g} of the width" if one.n_heads is None else counted(one.n_heads, "query head")
    if one.group is not None:
        return f"{query} and a key/value head for {'each' if one.group == 1 else f'every {one.group} of them'}"
    return f"{query} and {counted(one.n_kv_heads, 'key/value head')}"


# What is taken for granted


def assumptions(answer: Any) -> list[str]:
    """Every one that moves the answer, beside loss and context: cost, what it counts, shapes, serving, prices."""
    goal = answer.objective
    found = [_cost(goal)]
    if goal["cost"] in ("z", "flops", "memory", "train"):
        found += _counted(goal)
    training = goal.get("training") if goal["cost"] == "lifetime" else goal if goal["cost"] == "train" else None
    if training is not None:
        tokens = training["tokens"]
        each = (
            f"{training['tokens_per_param']:g} tokens per parameter" if tokens is None else f"{formatting.short(tokens)} tokens"
        )
        mfu = goal.get("training_mfu")
        found.append(f"trained on {each}{'' if mfu is None else f' at {mfu:.0%} of the peak'}")
    found.append(_shape(answer))
    if goal.get("serving"):
        from gqa_jax.search import serving_words  # a leaf: of costs of devices alone

        found += serving_words.assumed(answer)
    return found


def _cost(goal: Mapping[str, Any]) -> str:
    if goal["cost"] == "z":
        weights = f"{goal['lam']:g} M^{_power(goal['alpha'])} + {1 - goal['lam']:.3g} C^{_power(goal['beta'])}"
        return f"cost Z = {weights} of memory M and FLOPs C"
    return f"cost is the {goal['label']}"


def _power(exponent: float) -> str:
    """(1/3) of .3333; other numbers as they are."""
    return next((f"(1/{n})" for n in (2, 3, 4) if abs(exponent - 1 / n) < 1e-12), f"{exponent:g}")


def _counted(goal: Mapping[str, Any]) -> list[str]:
    """The convention by its name, what it counts, and bytes where they are counted."""
    rule = costs.Convention(**goal["convention"])
    like = [name for name, one in costs.CONVENTIONS.items() if _but_flops(one) == _but_flops(rule)]
    name = f"counted by the convention {like[0]}" if like else "counted by a convention of its own"
    parts = []
    if goal["cost"] in ("z", "flops"):
        parts.append(f"FLOPs of {FLOPS[rule.flops]}")
    if goal["cost"] in ("z", "memory"):
        parts.append(f"memory in {rule.memory}")
    parts.append(f"{'with' if rule.embedding else 'without'} embeddings")
    found = [f"{name} ({', '.join(parts)})"]
    if rule.memory == "bytes" and "param_bytes" in goal:
        found.append(f"{goal['param_bytes']:g} bytes a parameter and {goal['cache_bytes']:g} a cached value")
    return found


def _but_flops(rule: costs.Convention) -> tuple:
    return rule.ffn_matrices, rule.norms, rule.embedding, rule.memory


def _shape(answer: Any) -> str:
    """The rule of d/L, width over layers, and what it is here."""
    shape = answer.shape
    here = f"d/L (width over layers) {answer.ratio:.0f}"
    low, high = (f"{one:.0f}" for one in shape.bounds)
    if shape.rule == shape_rule.BEST:
        return f"{here}, the best of {low} to {high}"
    return f"{here}, {shape_rule.WORDS.get(shape.rule, 'as given')}"


def ratio_of_runs(shape: Any) -> str:
    """64; 9.3 to 16 by size."""
    low, high = shape.r0_of_sizes
    return f"{shape.r0:.3g}" if low == high else f"{low:.3g} to {high:.3g} by size"


def shown(answer: Any) -> pd.DataFrame:
    """`Answer.to_frame` as text for a notebook: a row per head configuration and the baseline, columns that have a number."""
    unit = answer.objective["unit"]

    def text(row: Any) -> dict[str, str]:
        heads = Heads.of(row.n_heads, row.n_kv_heads)
        cost = "" if np.isnan(row.cost) else formatting.amount(row.cost, unit)
        return {
            "": {"answer": "best", "baseline": "base"}.get(row.role, ""),
            "heads": str(heads),
            "layers x width": shape_text(row),
            "N*": size(row.n_params),
            "95% of N*": formatting.sizes(row.n_params_low, row.n_params_high),
            f"{answer.objective['label']}{f', {unit}' if unit else ''}": cost,
            "95% of the cost": formatting.interval(row.cost_low, row.cost_high, lambda one: formatting.amount(one, unit)),
            "cheapest (prob.)": "" if np.isnan(row.probability) else probability(row.probability),
            "expected regret": regret(row.expected_regret),
            "against base": "" if row.role == "baseline" else saving(row.saving),
        }

    frame = pd.DataFrame([text(row) for row in answer.to_frame().itertuples()])
    return frame[[name for name in frame if name == "" or (frame[name] != "").any()]]
