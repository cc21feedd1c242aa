"""What is said of an answer: in plain words with what it takes for granted, and its tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console
from rich.markup import escape
from rich.text import Text

from gqa_jax import costs, formatting
from gqa_jax.formatting import amount, probability, regret, saving, saving_between, size
from gqa_jax.laws import Heads, LawsByHeads, PowerLaw
from gqa_jax.search.answer import Answer
from launch import grid_tables, serving_screens
from launch.studies import Fitted
from launch.tables import Column, Table

ASSUMED = " Assumed: "  # between the answer and what it takes for granted

#: Headings of costs (`Objective.name`), whose labels are too long for a table.
COSTS = {
    "z": "Z",
    "flops": "FLOPs",
    "memory": "memory",
    "latency": "a request",
    "throughput": "a token,\na device",
    "price": "a million\ntokens",
    "train": "training\nFLOPs",
    "lifetime": "training\nand serving",
}
_FLOPS = {"per_token": "a token", "half_T": "T/2 tokens", "full_T": "T tokens"}


def headline(answer: Answer, laws: Mapping[Heads, PowerLaw], also: Sequence[str] = ()) -> str:
    """The answer in plain words, and every assumption that moves it; `also`: assumptions that the answer does not have.

    An answer that is `far` from what was trained is called a guess, and has no probability.
    """
    said = [_what(answer, laws) + _against(answer)]
    if not np.isnan(answer.far):
        said.insert(0, f"N* is {formatting.times(answer.far)} beyond the trained sizes, further than 10x: a guess.")
    if answer.runner_up is not None and not np.isnan(more := answer.regret_of_runner_up - answer.expected_regret):
        said.append(f"Next, {answer.runner_up} costs {regret(more)} more on average.")
    return " ".join(said) + f"{ASSUMED}{'; '.join([*assumptions(answer, laws), *also])}."


def _what(answer: Answer, laws: Mapping[Heads, PowerLaw]) -> str:
    """Heads, shape, size, and how sure: without the full stop."""
    model = (
        f"{answer.heads}, {in_words(answer.heads, _head_dim(laws))}, in {layers(answer)} ({size(answer.n_params)} parameters)"
    )
    among = f"the cheapest of the {answer.n_candidates}"
    if answer.n_candidates == 1:
        sure = "the only heads that are compared"
    elif not np.isnan(answer.far) or np.isnan(answer.probability):
        sure = f"{among} by the fitted laws"
    else:
        sure = f"{among} with probability {probability(answer.probability)}"
        if answer.probability < answer.candidates["probability"].max():
            sure = f"the least costly choice on average, and {sure}"
    return f"{model}: for a loss of {answer.loss:.5g} at {answer.context_served:,} tokens of context {sure}"


def _against(answer: Answer) -> str:
    """What it saves against the baseline, with the full stop."""
    if answer.baseline is None or np.isnan(answer.saving):
        return "."
    between, told = saving_between(*answer.saving_interval), saving(answer.saving)
    if told == "the same":
        return f", and as much as {baseline_words(answer)}."
    return f", {told}{f' ({between})' if between else ''} than {baseline_words(answer)}."


def baseline_words(answer: Answer) -> str:
    """Which model an answer is compared with: one that was measured, or what its law says at the loss asked for."""
    base = answer.baseline
    model = f"{base.label} in {layers(base)}"
    return f"the measured model of {model} (loss {base.loss:.4f})" if base.measured else f"{model}, by the law"


def layers(row: Any) -> str:
    """42 layers x 2400."""
    return grid_tables.shape_text(row).replace(" x ", " layers x ")


def in_words(one: Heads, head_dim: float) -> str:
    """8 query heads and 1 key/value head; a query head per 64 of the width and 8 key/value heads."""

    def counted(count: int, noun: str) -> str:
        return f"{count} {noun}{'' if count == 1 else 's'}"

    query = f"a query head per {head_dim:g} of the width" if one.n_heads is None else counted(one.n_heads, "query head")
    if one.group is not None:
        return f"{query} and a key/value head for {'each' if one.group == 1 else f'every {one.group} of them'}"
    return f"{query} and {counted(one.n_kv_heads, 'key/value head')}"


# What is taken for granted


def assumptions(answer: Answer, laws: Mapping[Heads, PowerLaw]) -> list[str]:
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
        found += serving_screens.assumed(answer)
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
        parts.append(f"FLOPs of {_FLOPS[rule.flops]}")
    if goal["cost"] in ("z", "memory"):
        parts.append(f"memory in {rule.memory}")
    parts.append(f"{'with' if rule.embedding else 'without'} embeddings")
    found = [f"{name} ({', '.join(parts)})"]
    if rule.memory == "bytes" and "param_bytes" in goal:
        found.append(f"{goal['param_bytes']:g} bytes a parameter and {goal['cache_bytes']:g} a cached value")
    return found


def _but_flops(rule: costs.Convention) -> tuple:
    return rule.ffn_matrices, rule.norms, rule.embedding, rule.memory


def _shape(answer: Answer) -> str:
    """The rule of d/L, width over layers, and what it is here."""
    shape = answer.shape
    here = f"d/L (width over layers) {answer.ratio:.0f}"
    low, high = (f"{one:.0f}" for one in shape.bounds)
    told = {
        "best": f"{here}, the best of {low} to {high}",
        "paper": f"{here}, as in the paper's tables",
        "trained": f"{here}, as between the trained sizes",
    }
    return told.get(shape.rule, f"{here}, as given")


# Tables


def candidates(answer: Answer, laws: Mapping[Heads, PowerLaw]) -> Table:
    """Every head configuration, the answer first, and the baseline last. Narrow: heads and cost stay."""
    frame = candidates_frame(answer)
    cost = _cost_cell(answer)
    columns = [
        Column("", lambda row: {"answer": "best", "baseline": "base"}.get(row.role, ""), "left", 0),
        Column("heads", grid_tables.heads_text, "left", 0),
        Column("L x d", grid_tables.shape_text, rank=1),
        Column("d/L", lambda row: "" if pd.isna(row.ratio) else f"{row.ratio:.0f}", rank=8),
        Column("N*", lambda row: size(row.n_params), rank=2),
        Column("95%", lambda row: formatting.sizes(row.n_params_low, row.n_params_high), "range", 7, name="95% of N*"),
        Column(COSTS[answer.objective["cost"]], lambda row: cost(row.cost) or "-", rank=0),
        Column("95%", lambda row: _cost_between(row, cost), "range", 4, name="95% of the cost"),
        Column("cheapest\n(prob.)", lambda row: _known(row.probability, probability), rank=2, name="probability"),
        Column("expected\nregret", lambda row: regret(row.expected_regret), rank=5),
        Column("against\nbase", lambda row: "" if row.role == "baseline" else saving(row.saving), rank=3),
        Column("N* against\ntrained sizes", _outside, "left", 6),
    ]
    caption = f"Heads for a loss of {answer.loss:.5g} at {answer.context_served:,} tokens of context" + (
        "" if np.isnan(answer.expected_regret) else ", least expected regret first"
    )
    return Table.of(
        frame, columns, "candidates", caption, [*_without(frame), *_legend(answer, laws)],
        strong=lambda row: row.role == "answer", elsewhere="--format json",
    )  # fmt: skip


def candidates_frame(answer: Answer) -> pd.DataFrame:
    """`Answer.candidates` and the baseline: role (answer, candidate or baseline) and the columns of the candidates.

    Without probabilities where the answer is `far`; without shape, probability and regret where a row has no cost.
    """
    frame = answer.candidates.copy()
    frame.insert(0, "role", ["answer", *["candidate"] * (len(frame) - 1)])
    if not np.isnan(answer.far):
        frame["probability"] = np.nan
    frame.loc[~np.isfinite(frame["cost"]), ["n_layers", "d_model", "ratio", "probability", "expected_regret"]] = np.nan
    if (base := answer.baseline) is None:
        return frame
    low, high = base.cost_interval
    row = {
        "role": "baseline", "n_heads": base.heads.n_heads, "n_kv_heads": base.heads.n_kv_heads, "n_params": base.n_params,
        "n_layers": base.n_layers, "d_model": base.d_model, "ratio": base.d_model / base.n_layers, "cost": base.cost,
        "cost_low": low, "cost_high": high, "saving": 0.0, "note": base.note,
    }  # fmt: skip
    last = pd.DataFrame([row]).reindex(columns=frame.columns).astype(frame.dtypes.to_dict())
    return pd.concat([frame, last], ignore_index=True)


def _cost_cell(answer: Answer) -> Callable[[float], str]:
    unit = answer.objective["unit"]
    return lambda value: amount(value, unit)


def _cost_between(row: Any, cost: Callable[[float], str]) -> str:
    """Nothing where no draw changes the cost."""
    return "" if row.cost_low == row.cost_high else formatting.interval(row.cost_low, row.cost_high, cost, anything="any cost")


def _known(value: float, text: Callable[[float], str]) -> str:
    return "" if pd.isna(value) else text(value)


def _outside(row: Any) -> str:
    """1.8x above."""
    if pd.isna(row.note) or not row.note.startswith("extrapolated: N* is "):
        return ""
    return row.note.removeprefix("extrapolated: N* is ").removesuffix(" the trained sizes")


def _without(frame: pd.DataFrame) -> list[str]:
    """Why rows have no cost, each reason once."""
    reasons: dict[str, list[str]] = {}
    for row in frame.itertuples():
        if not np.isfinite(row.cost) and not pd.isna(row.note):
            reasons.setdefault(row.note, []).append("base" if row.role == "baseline" else grid_tables.heads_text(row))
    return [f"{', '.join(rows)}: {why}" for why, rows in reasons.items()]


def _legend(answer: Answer, laws: Mapping[Heads, PowerLaw]) -> list[str]:
    """The words of the table, once."""
    known = [grid_tables.heads_of(row) for row in answer.candidates.itertuples()]
    if answer.baseline is not None:
        known.append(answer.baseline.heads)
    found = [f"{grid_tables.words_of_heads(known, _head_dim(laws))}; L x d: layers x width"]
    if answer.baseline is not None:
        found.append(f"base: {baseline_words(answer)}")
    found.append("N*: parameters without embeddings that reach the loss by the law of these heads")
    if answer.noise_model:
        words = f"95%: of {answer.noise_model.removeprefix('95% of ')}"
        if not np.isnan(answer.price_of_doubt):
            words += f", {answer.price_of_doubt:.1f} times as wide as for a power law alone"
        if np.isnan(answer.far):
            words += "; probability: the share of these draws in which they are the cheapest"
        found.append(f"{words}; expected regret: what they cost above the cheapest, on average")
    return found


def worth(answer: Answer) -> Table | None:
    """What heads are worth, and what shape is: the answer beside that with the trained shapes. None where shapes are given."""
    other = answer.as_trained
    if other is None:
        return None
    rows: list[dict[str, Any]] = [
        _row("heads and shape", answer),
        _row("heads, in the trained shapes", other),
    ]
    for what, key in ((f"{answer.heads} alone, in its trained shape", "heads"), ("shape alone, heads of the base", "shape")):
        if not np.isnan(value := answer.worth[key]) and not (key == "heads" and other.heads == answer.heads):
            rows.append({"change": what, "cost": answer.baseline.cost * (1 - value), "saving": value})
    frame = pd.DataFrame(rows).astype({"n_heads": "Int64", "n_kv_heads": "Int64"})
    if not (np.isnan(answer.far) and np.isnan(other.far)):
        frame["probability"] = np.nan
    cost = _cost_cell(answer)
    columns = [
        Column("what is chosen", lambda row: row.change, "left", 0),
        Column("heads", lambda row: "" if pd.isna(row.n_kv_heads) else grid_tables.heads_text(row), "left", 0),
        Column("L x d", grid_tables.shape_text, rank=1),
        Column("N*", lambda row: size(row.n_params), rank=3),
        Column(COSTS[answer.objective["cost"]], lambda row: cost(row.cost), rank=0),
        Column("cheapest\n(prob.)", lambda row: _known(row.probability, probability), rank=2, name="probability"),
        Column("against\nbase", lambda row: saving(row.saving), rank=0),
    ]
    shape = answer.shape
    between = formatting.interval(*shape.k_interval, "{:.2g}".format)
    notes = [
        f"shapes: a model of d/L = r has 1 + k ln^2(r / {shape.r0:.0f}) times the loss of its law, "
        f"k = {shape.k:.2g} ({between}): {shape.source}"
    ]
    return Table.of(frame, columns, "worth", "What heads are worth, and what shape is", notes, elsewhere="--format json")


def _row(what: str, answer: Answer) -> dict[str, Any]:
    names = ("n_params", "n_layers", "d_model", "cost", "probability", "saving")
    return {"change": what} | answer.heads._asdict() | {name: getattr(answer, name) for name in names}


def buildable(answer: Answer) -> Table | None:
    """Models of whole layers and even widths that reach the loss; None where there are none."""
    frame = answer.buildable
    if frame is None or frame.empty:
        return None
    cost = _cost_cell(answer)
    columns = [
        Column("L x d", lambda row: f"{row.n_layers} x {row.d_model}", rank=0),
        Column("heads", lambda row: f"({row.n_heads},{row.n_kv_heads})", "left", 0),
        Column("feed-forward", lambda row: f"{row.d_ff}", rank=3),
        Column("d/L", lambda row: f"{row.ratio:.0f}", rank=4),
        Column("N", lambda row: size(row.n_params), rank=2),
        Column("loss by\nthe law", lambda row: f"{row.loss:.4f}", rank=1),
        Column(COSTS[answer.objective["cost"]], lambda row: cost(row.cost), rank=0),
    ]
    return Table.of(frame, columns, "buildable", "Models to build that reach the loss", elsewhere="--format json")


def conventions(frame: pd.DataFrame) -> Table:
    """`gqa_jax.search.optimum.convention_sensitivity`."""
    columns = [
        Column("FLOPs of", lambda row: _FLOPS[row.flops], "left", 0),
        Column("memory in", lambda row: row.memory, "left", 0),
        Column("heads", grid_tables.heads_text, "left", 0),
        Column("N*", lambda row: size(row.n_params), rank=4),
        Column("cheapest\n(prob.)", lambda row: _known(row.probability, probability), rank=1, name="probability"),
        Column("against\nbase", lambda row: saving(row.saving), rank=2),
        Column("the first heads\ncost more by", lambda row: regret(row.regret), rank=1),
    ]
    caption = "The answer by Z in other conventions, and what the heads of the first would cost there above the cheapest"
    return Table.of(frame, columns, "conventions", caption)


def tables(answer: Answer, laws: Mapping[Heads, PowerLaw]) -> list[Table]:
    """All of an answer, the candidates first."""
    found = [candidates(answer, laws), worth(answer), buildable(answer)]
    return [one for one in found if one is not None]


# For a terminal


def print_answer(found: Answer, one: Fitted, console: Console, also: Sequence[str] = (), about: Sequence[str] = ()) -> None:
    """One question's answer: in words, its tables, how it is served, warnings.

    also: of `headline`; about: sentences that follow it.
    """
    print_headline(headline(found, one.laws, also), console)
    for sentence in about:
        console.print(escape(sentence), highlight=False)
    if one.laws.source:
        console.print(escape(one.laws.source), highlight=False)
        console.print()
    for table in tables(found, one.laws):
        console.print(table, "")
    for sentence in serving_screens.said(found):
        console.print(escape(sentence), highlight=False)
    print_warnings([warning for warning in found.warnings if warning != one.laws.source], console)


def print_headline(text: str, console: Console) -> None:
    """What is answered stands out from what is assumed."""
    line = Text(text)
    line.stylize("bold", 0, text.index(ASSUMED) if ASSUMED in text else len(text))
    console.print(line, "")


def print_warnings(warnings: Sequence[str], console: Console) -> None:
    """A line each."""
    for warning in warnings:
        console.print(f"[yellow]warning:[/] {escape(warning)}", highlight=False)


def _head_dim(laws: Mapping[Heads, PowerLaw]) -> float:
    return laws.head_dim if isinstance(laws, LawsByHeads) else 64.0
