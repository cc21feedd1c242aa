"""What the page opens with: the first question of the first study, answered."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from gqa_jax import formatting
from gqa_jax.laws import LLAMA3
from launch.report import words
from launch.report.findings import Findings
from launch.report.payload import DRAWS


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
    facts: Sequence[Fact]
    served: str  # how, of costs that are of devices
    basis: str
    warnings: Sequence[str]


def opening(findings: Findings) -> Opening:
    """The answer to the first question of the first study."""
    study = findings.studies[0]
    question, laws, goal = study.questions[0], study.laws, study.objective
    found = question.answer
    cost = words.cost(goal.unit)
    trained = words.listed([formatting.context(one.laws.context) for one in findings.studies])
    lead = [f"At {words.long(found.n_params)} parameters. What is kept low is the {goal.label}."]
    extra = formatting.regret(found.regret_of_runner_up)
    runner_up = "" if found.runner_up is None else words.label(found.runner_up, laws.head_dim)
    if not words.missing(found.probability):
        end = f"; the next, {runner_up}, would cost {extra} more on average." if runner_up else "."
        lead.append(
            f"These heads are the cheapest in {words.share(found.probability)} of {DRAWS:,} draws of the fitted laws{end}"
        )
    if found.noise_model:
        wider = (
            "" if words.missing(found.price_of_doubt) else f"; {found.price_of_doubt:.1f} times as wide as for power laws alone"
        )
        lead.append(f"Ranges are {found.noise_model}{wider}.")
    facts = [
        Fact("Cheapest in", words.percent(found.probability), f"of {DRAWS:,} draws")
        if not words.missing(found.probability)
        else Fact("Certainty", "unknown", "no runs are left over to judge it by"),
        Fact("Parameters N*", words.short(found.n_params), _range(found.n_params_interval, words.short)),
        Fact(words.capital(goal.label), cost(found.cost), _range(found.cost_interval, cost) + words.unit(goal.unit)),
        _saving(found),
    ]
    if runner_up:
        facts.append(Fact("Next", runner_up, f"{extra} extra on average" if extra else "by the fitted laws"))
    where = f"Served at {formatting.context(question.context_served)} tokens, a loss of {question.loss:g}"
    return Opening(
        " · ".join(filter(None, (findings.name, f"trained at {trained} tokens", findings.made))),
        f"{where} costs least with {words.heads(found.heads, laws.head_dim)}.",
        " ".join(lead),
        facts,
        " ".join(words.served(found.candidates.iloc[0], serving)) if (serving := found.objective.get("serving")) else "",
        f"Based on {words.ended(findings.about)}",
        warnings(findings, found.warnings),
    )


def warnings(findings: Findings, said: Sequence[str]) -> list[str]:
    """Warnings as sentences, without the one that only says whose data these are: the page does so itself."""
    return [words.sentence(line) for line in dict.fromkeys(said) if line != findings.about]


def _range(interval: Sequence[float] | None, text: Callable[[float], str]) -> str:
    shown = words.span(interval, text)
    return f"95%: {shown}" if shown else ""


def _saving(found: Any) -> Fact:
    name = "Saving against Llama 3's heads"
    if found.heads == LLAMA3:
        return Fact(name, "none", "they are the cheapest")
    if words.missing(found.saving):
        return Fact(name, "unknown", "there is no law of theirs")
    return Fact(name, words.tenths(found.saving), _range(found.saving_interval, words.tenths))
