"""What the page opens with: the first question of the first study, answered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from gqa_jax import formatting
from gqa_jax.formatting import amount
from gqa_jax.search import ranking
from gqa_jax.search.answer import Answer
from gqa_jax.search.words import in_words
from launch.report import words
from launch.report.answer_map import DRAWS
from launch.report.findings import Findings


class Fact(NamedTuple):
    """A number, and how sure it is."""

    name: str
    value: str
    range: str = ""


class Opening(NamedTuple):
    """The answer in a sentence, in a paragraph, and in numbers; what it rests on, and what to know before relying on it."""

    kicker: str
    headline: str
    lead: str
    more: Sequence[str]  # paragraphs: what is saved, the answer in other shapes, what ranges hold
    facts: Sequence[Fact]
    served: str  # how, of costs that are of devices
    basis: str
    warnings: Sequence[str]


def opening(findings: Findings) -> Opening:
    """The answer to the first question of the first study."""
    study = findings.studies[0]
    found, laws, goal = study.answer, study.laws, study.objective
    trained = words.listed([formatting.context(one.laws.context) for one in findings.studies])
    far = not words.missing(found.far)
    where = f"Served at {formatting.context(found.context_served)} tokens, a loss of {found.loss:g}"
    guess = f" A guess: that is {formatting.times(found.far)} beyond what was trained." if far else ""
    lead = [
        f"At {words.long(found.n_params)} parameters, in {found.n_layers:.1f} layers of width {found.d_model:,.0f}: "
        f"{_ratio(found)}.",
        f"What is kept low is the {goal.label}.",
        _sure(found, laws, far),
    ]
    worth = _worth(found, laws)
    if found.noise_model:
        wider = (
            "" if words.missing(found.price_of_doubt) else f"; {found.price_of_doubt:.1f} times as wide as for power laws alone"
        )
        worth.append(f"Ranges are {found.noise_model}{wider}.")
    return Opening(
        " · ".join(filter(None, (findings.name, f"trained at {trained} tokens", findings.made))),
        f"{where} costs least with {in_words(found.heads, laws.head_dim)}.{guess}",
        " ".join(filter(None, lead)),
        worth,
        _facts(found, goal, laws, far),
        " ".join(words.served(found.candidates.iloc[0], serving)) if (serving := found.objective.get("serving")) else "",
        f"Based on {words.ended(findings.about)}",
        warnings(findings, found.warnings),
    )


def _sure(found: Answer, laws: Any, far: bool) -> str:
    """How sure the heads are, and what the next would cost."""
    second = "" if found.runner_up is None else words.label(found.runner_up, laws.head_dim)
    extra = words.more(ranking.above(found.regret_of_runner_up, found.expected_regret))
    next_ = f"the next, {second}, costs {extra} on average" if second and extra else ""
    if far or words.missing(found.probability):
        return words.sentence(next_) if next_ else ""
    if found.n_candidates == 1:
        return "No other heads can be chosen here."
    among = f"the cheapest of the {found.n_candidates}"
    said = f"These heads are {among} in {words.share(found.probability)} of {DRAWS:,} draws of the fitted laws"
    return words.ended("; ".join(filter(None, (said, next_))))


def _worth(found: Answer, laws: Any) -> list[str]:
    """What is saved, against what; what of it is the heads' and what the shape's; and the answer with the trained shapes."""
    said = []
    base, trained = found.baseline, found.as_trained
    if base is not None and not words.missing(found.saving):
        told = formatting.saving(found.saving)
        said.append(f"It costs {told} {'as' if told == 'the same' else 'than'} {words.baseline(base)}")
        heads, shape = (formatting.saving(found.worth[name]) for name in ("heads", "shape"))
        if heads and shape:
            said[-1] += f": other heads alone {heads}, another shape alone {shape}"
        said[-1] += "."
    if trained is not None:
        same = "the same heads" if trained.heads == found.heads else in_words(trained.heads, laws.head_dim)
        often = words.share(trained.probability)
        sure = f", the cheapest in {often} of the draws" if often else ""
        size = f"{words.long(trained.n_params)} parameters in {words.shape(trained.n_layers, trained.d_model)}"
        cost = amount(trained.cost, found.objective["unit"])
        said.append(f"With the shapes of the sizes that were trained the answer is {same}, {size}, at a cost of {cost}{sure}.")
    return said


def _ratio(found: Answer) -> str:
    """Width over layers, and how it was chosen."""
    return f"width / layers = {formatting.figure(found.ratio)}, {words.rule(found.shape.rule)}"


def _facts(found: Answer, goal: Any, laws: Any, far: bool) -> list[Fact]:
    if far:
        first = Fact("Probability", "a guess", "too far from what was trained")
    elif words.missing(found.probability):
        first = Fact("Probability", "unknown", "no runs are left over to judge it by")
    else:
        alone = "the only heads that can be chosen here"
        among = f"that it is the cheapest of {found.n_candidates}" if found.n_candidates > 1 else alone
        first = Fact("Probability", words.percent(found.probability), among)
    between = formatting.interval(*found.cost_interval, lambda one: amount(one, goal.unit), anything="any cost")
    facts = [
        first,
        Fact("Parameters N*", formatting.size(found.n_params), _range(formatting.sizes(*found.n_params_interval))),
        Fact(f"Layers {words.TIMES} width", words.shape(found.n_layers, found.d_model), _ratio(found)),
        Fact(words.capital(goal.label), amount(found.cost, goal.unit), _range(between) + words.unit(goal.unit)),
        _saving(found),
    ]
    if found.runner_up is not None:
        extra = words.more(ranking.above(found.regret_of_runner_up, found.expected_regret))
        note = f"costs {extra} on average" if extra else "by the fitted laws"
        facts.append(Fact("Next", words.label(found.runner_up, laws.head_dim), note))
    return facts


def warnings(findings: Findings, said: Sequence[str]) -> list[str]:
    """Warnings as sentences, without the one that only says whose data these are: the page does so itself."""
    return [words.sentence(line) for line in dict.fromkeys(said) if line != findings.about]


def _range(between: str) -> str:
    return between and f"95%: {between}"


def _saving(found: Answer) -> Fact:
    base = found.baseline
    name = "Against Llama 3's heads" if base is None else f"Against {base.label}"
    if base is None or words.missing(base.cost):
        return Fact(name, "unknown", "they have no law here" if base is None else "they have no cost here")
    which = f"measured, {base.n_layers:.0f} {words.TIMES} {base.d_model:,.0f}" if base.measured else "by their law"
    between = formatting.saving_between(*found.saving_interval)
    return Fact(name, formatting.saving(found.saving), "; ".join(filter(None, (_range(between), which))))
