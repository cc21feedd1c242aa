"""What the heads of a model that somebody has cost, and which heads and shape reach the same loss for less.

The target is the law's loss for the model's own N, heads and d / L, in every draw its own: so E and what all laws have in
common cancel, and what is compared is heads and shape. Both models are taken as trained alike, on the same text and as many
tokens. Nothing is claimed of the loss that the published model has: it saw other text and more of it.

Heads are expressed in the head size of the laws: n_h d_h / 64 and n_kv d_h / 64 with the paper's. Where no run has them, the
law of heads says what they reach, with its doubt (`gqa_jax.laws.head_law`).
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from gqa_jax import formatting
from gqa_jax.laws import Draws, Heads, LawsByHeads
from gqa_jax.search import candidates, objectives, optimum, ranking
from gqa_jax.search.answer import Answer, Model, plain
from gqa_jax.search.candidates import FAR, Coefficients, CostAt, Table, rule_of
from gqa_jax.search.objectives import Objective
from gqa_jax.search.optimum import AspectAsked
from gqa_jax.search.own_model import SHAPE, OwnModel
from gqa_jax.search.ranking import TAILS, quantiles

#: d / L of the shapes that docs/shape.md has losses of: outside, nothing is known of any.
KNOWN_RATIOS = (3.0, 750.0)


@dataclasses.dataclass(frozen=True)
class Kept:
    """The own model's heads with the best shape that reaches the loss: typical values and 95% of the draws."""

    n_params: float
    n_params_interval: tuple[float, float]
    n_layers: float
    d_model: float
    cost: float
    cost_interval: tuple[float, float]
    saving: float  # of the better shape alone: 1 - cost / cost of the own model
    saving_interval: tuple[float, float]
    above: float  # cost over that of the answer, minus 1; below 0 where no candidate is as cheap
    above_interval: tuple[float, float]
    probability: float  # that keeping the heads is cheaper than every candidate of other heads; nan where far

    @property
    def ratio(self) -> float:
        """d / L."""
        return self.d_model / self.n_layers


@dataclasses.dataclass(frozen=True)
class OwnAnswer:
    """An answer for a model that somebody has: `answer.baseline` is the model, and savings are against it."""

    own: OwnModel
    heads: Heads  # in the laws' head size
    source: str  # of the law of these heads, in words
    n_params: float  # without embeddings, as the laws count
    n_params_over_largest: float  # over the largest model of the runs
    ratio: float  # d / L of the own model
    loss: float  # the target, nats per token: the middle of the draws
    loss_interval: tuple[float, float]  # 95% of the draws'; the comparison is within a draw, and does not feel it
    above: float  # cost of the own model over that of the answer, minus 1: what its heads and shape cost
    above_interval: tuple[float, float]
    kept: Kept | None  # None where there are no draws
    notes: tuple[str, ...]
    answer: Answer

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the answer's, and `like`, what is of the own model."""
        own, shape = self.own, self.own.shape
        like = {"name": own.name, "source": own.source}
        like |= {name: getattr(shape, name) for name in SHAPE}
        like |= {"untied": own.untied}
        like |= {name: getattr(self, name) for name in ("ratio", "n_params", "n_params_over_largest")}
        like |= {"law_of_heads": list(self.heads), "law_source": self.source, "loss": self.loss}
        like |= {name: plain(getattr(self, name)) for name in ("loss_interval", "above", "above_interval")}
        kept = None if self.kept is None else {k: plain(v) for k, v in dataclasses.asdict(self.kept).items()}
        like |= {"kept": kept, "notes": list(self.notes)}
        return {"like": like} | self.answer.to_dict()

    def sentences(self) -> list[str]:
        """What is of the own model, in plain words: what it is, its target, what its heads cost and what keeping them costs."""
        own, shape, base = self.own, self.own.shape, self.answer.baseline
        low, high = self.loss_interval
        between = f" ({low:.3f} to {high:.3f})" if np.isfinite(low) else ""
        found = [
            f"Your model {own.name}: {shape.n_layers} layers x {shape.d_model}, {shape.n_heads} query and {shape.n_kv_heads} "
            f"key/value heads of {shape.head_dim}, N = {formatting.short(self.n_params)} without embeddings ({own.source})",
            f"To beat: a loss of {self.loss:.3f} nats{between}, what the laws say of a model of its N, heads {self.heads} and "
            f"d/L = {self.ratio:.3g} that is trained like their runs; both models are taken as trained alike, and nothing is "
            "said of the loss that the published model has",
        ]
        if base is not None and not np.isfinite(base.cost):
            found.append(f"It has no cost here: {base.note}")
        elif np.isfinite(self.above):
            found.append(f"It costs {formatting.three(base.cost)} here, {_more(self.above, self.above_interval)} the answer")
        if self.kept is not None and np.isfinite(self.kept.cost):
            kept = self.kept
            text = (
                f"Its heads with the best shape: {kept.n_layers:.0f} x {kept.d_model:.0f}, N = "
                f"{formatting.short(kept.n_params)}, cost {formatting.three(kept.cost)}"
            )
            if np.isfinite(kept.saving):
                text += f", {_more(-kept.saving, (-kept.saving_interval[1], -kept.saving_interval[0]))} it does now"
            found.append(f"{text}, and {_more(kept.above, kept.above_interval)} the answer")
        return found + list(self.notes)


def compare_own(
    laws: LawsByHeads,
    own: OwnModel,
    context_served: int,
    objective: Objective | None = None,
    *,
    aspect: AspectAsked = None,
    heads: Sequence[Heads] | None = None,
    convention: str = "figures",
    memory_limit: Any = None,
    draws: int = 1000,
    seed: int = 0,
    method: str | None = None,
) -> OwnAnswer:
    """Which heads and shape reach what `own` would reach, trained like the runs of `laws`, at the least cost.

    Its own shape is taken as it is: depth, widths, heads, feed-forward network, vocabulary. The candidates have its vocabulary,
    tied or not as its is (where a cost knows of that), its feed-forward network in proportion to d, and the laws' head size.
    Arguments as in `optimum.search`.

    Raises:
      NoHeadLaw (a ValueError): heads that these laws say nothing of.
      ValueError: a shape that no source has, as `optimum.search`, or no draws (count 0, or no noise known) and no own law.
    """
    objective = objective or objectives.Z(convention)
    if not KNOWN_RATIOS[0] <= own.ratio <= KNOWN_RATIOS[1]:
        raise ValueError(
            f"{own.name}: d/L = {own.ratio:.3g} ({own.shape.d_model} / {own.shape.n_layers}): no run and no source has a shape "
            f"outside {KNOWN_RATIOS[0]:g} to {KNOWN_RATIOS[1]:g}, so nothing is known of its loss"
        )
    served = _in_its_likeness(laws, own)
    if (serving := getattr(objective, "serving", None)) is not None:
        objective = dataclasses.replace(objective, serving=dataclasses.replace(serving, untied=own.untied))
    if hasattr(memory_limit, "untied"):
        memory_limit = dataclasses.replace(memory_limit, untied=own.untied)
    at = CostAt(objective, context_served, memory_limit)
    asked = _Question.of(laws, own, draws, seed, method)
    own_heads, drawn, n_params, loss, loss_S = asked.heads, asked.drawn, asked.n_params, asked.loss, asked.loss_S
    model = Model(f"your model {own.name}", own_heads, own.shape, loss, n_params)

    def others_table(others: LawsByHeads) -> Table:
        again = _Question.of(others, own, draws, seed, method)
        others = _in_its_likeness(others, own)
        known = candidates.coefficients(others, draws, seed, method, heads=heads, compared=None)
        return Table.of(others, again.loss, rule_of(others, aspect), known, seed, again.loss_S)

    def saves(best: pd.Series) -> str:
        cost = optimum.cost_of(model, at)
        return "" if not np.isfinite(cost) else f", at {_more(best['cost'] / cost - 1, (np.nan, np.nan))} your model"

    answer = optimum.search(
        served, loss, context_served, objective, aspect=aspect, heads=heads, baseline=model, convention=convention,
        memory_limit=memory_limit, draws=draws, seed=seed, method=method, loss_S=loss_S, without=(others_table, saves),
    )  # fmt: skip
    sizes = np.concatenate([law.params for law in laws.values()])
    beyond = candidates.beyond(n_params, sizes.min(), sizes.max())
    if beyond > FAR and not np.isfinite(answer.far):
        answer = dataclasses.replace(
            answer, far=float(beyond), probability=np.nan, candidates=answer.candidates.assign(probability=np.nan)
        )
    kept, above = None, (np.nan, np.nan)
    cost = np.nan if answer.baseline is None else answer.baseline.cost
    if drawn is not None:
        nothing = np.full((1, 5), np.nan)  # the fitted laws need not have these heads
        alone = Coefficients(drawn.heads, 1, nothing[:, :3], nothing[:, 3:], drawn, None)
        table = Table.of(served, loss, rule_of(served, aspect), alone, seed, loss_S)
        known = candidates.coefficients(served, len(drawn.b_SxH), seed, method, heads=heads, compared=None)
        others = Table.of(served, loss, table.rule, known, seed, loss_S)
        kept = _kept(table, others, answer, at, model, cost)
        ends = 1 / (1 - np.array(answer.saving_interval)) - 1 if np.isfinite(cost) else np.array(above)
        above = (float(ends[0]), float(ends[1]))
    return OwnAnswer(
        own=own, heads=own_heads, source=asked.source, n_params=n_params, n_params_over_largest=float(n_params / sizes.max()),
        ratio=own.ratio, loss=loss, loss_interval=asked.interval, above=float(cost / answer.cost - 1), above_interval=above,
        kept=kept, notes=tuple(_notes(laws, own, own_heads, asked.source, beyond, n_params > sizes.max())), answer=answer,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Question:
    """What is asked for: the heads of the laws, the draws of their law, and the loss to reach."""

    heads: Heads
    drawn: Draws | None  # of these heads alone
    source: str
    n_params: float
    loss: float
    loss_S: np.ndarray | None
    interval: tuple[float, float]

    @classmethod
    def of(cls, laws: LawsByHeads, own: OwnModel, draws: int, seed: int, method: str | None) -> _Question:
        heads, drawn, source = _law_of(laws, own, draws, seed, method)
        n_params, penalty = own.n_params(laws.size_convention), laws.penalty
        if drawn is None:
            loss = float(laws[heads].predict(n_params) * penalty.factor(penalty.typical, own.ratio, n_params))
            return cls(heads, None, source, n_params, loss, None, (np.nan, np.nan))
        factor_S = penalty.factor(penalty.draw(len(drawn.b_SxH), seed), own.ratio, n_params)
        loss_S = drawn.loss(drawn.heads[0], np.array([n_params]))[:, 0] * factor_S
        low, loss, high = (float(x) for x in quantiles(loss_S, [TAILS[0], 0.5, TAILS[1]]))
        return cls(heads, drawn, source, n_params, loss, loss_S, (low, high))


def _in_its_likeness(laws: LawsByHeads, own: OwnModel) -> LawsByHeads:
    """The laws, for models with the vocabulary (of which N counts nothing) and the feed-forward network of the own one."""
    found = copy.copy(laws)
    found.vocab_size = float(own.shape.vocab_size)
    found.ffn_ratio = own.shape.d_ff / own.shape.d_model
    return found


def _law_of(laws: LawsByHeads, own: OwnModel, draws: int, seed: int, method: str | None) -> tuple[Heads, Draws | None, str]:
    """(heads of the laws, the draws of their law, where it is from); no draws where none are wanted or can be had."""
    n_heads, n_kv_heads = own.heads_of(laws.head_dim)
    drawn, why = None, None
    if draws:
        try:
            drawn = laws.draws(draws, seed, method)
        except ValueError as error:
            why = error
    known = list(laws) + ([] if drawn is None else [one for one in drawn.heads if one not in laws])
    rules = [one for one in known if one.n_heads is None and own.fills_width]
    has = [one for one in known if one == (n_heads, n_kv_heads)]
    has += [one for one in rules if np.isclose(one.kv_heads(own.shape.d_model, laws.head_dim), n_kv_heads)]
    if has:
        source = "their own law" if has[0] in laws else drawn.notes[0]
        if has[0].n_heads is None:
            source += f", heads that grow with the width: {n_heads:g} of {laws.head_dim:g} at {own.shape.d_model}"
        return has[0], None if drawn is None else drawn.take(has[:1]), source
    if drawn is None:
        raise why or ValueError(
            f"heads ({n_heads:g},{n_kv_heads:g}) have no law here, and without draws no law of heads is made"
        )
    said = laws.draws_of(n_heads, n_kv_heads, draws, seed, method)
    return said.heads[0], said, said.notes[0]


def _kept(table: Table, others: Table, answer: Answer, at: CostAt, model: optimum.Model, own_cost: float) -> Kept:
    """The own heads (the only ones of `table`) at the best shape, draw by draw against the answer and `others`."""
    found = table.ranked(at)
    best = found.frame.iloc[0]
    own_S = found.drawn.cost[:, 0]
    against_S = optimum.drawn_cost_of(model, at, found) if np.isfinite(own_cost) else own_cost
    cost_SxH = others.drawn_costs(others.settled(at)).cost
    known = others.known
    same = known.heads.index(table.heads[0]) if table.heads[0] in known.heads else None
    with np.errstate(invalid="ignore"):
        above_S = own_S / cost_SxH[:, known.heads.index(answer.heads)] - 1
    rest = cost_SxH if same is None else np.delete(cost_SxH, same, 1)
    compared = np.isfinite(own_S) | np.isfinite(rest.min(1, initial=np.inf))
    cheaper = own_S[compared] < rest[compared].min(1, initial=np.inf)
    cost = float(best["cost"])
    return Kept(
        n_params=float(best["n_params"]),
        n_params_interval=(float(best["n_params_low"]), float(best["n_params_high"])),
        n_layers=float(best["n_layers"]),
        d_model=float(best["d_model"]),
        cost=cost,
        cost_interval=(float(best["cost_low"]), float(best["cost_high"])),
        saving=1 - cost / own_cost,
        saving_interval=tuple(float(x[0]) for x in ranking.savings(found.drawn.cost, against_S)[::2]),
        above=cost / answer.cost - 1,
        above_interval=tuple(float(x) for x in quantiles(above_S[~np.isnan(above_S)], TAILS)),
        probability=np.nan if np.isfinite(answer.far) or not compared.any() else float(cheaper.mean()),
    )


def _notes(laws: LawsByHeads, own: OwnModel, heads: Heads, source: str, beyond: float, above: bool) -> list[str]:
    shape, found = own.shape, []
    if shape.head_dim != laws.head_dim:
        found.append(
            f"heads: {shape.n_heads} and {shape.n_kv_heads} of {shape.head_dim} are taken as {heads} of {laws.head_dim:g}, "
            "which are as wide"
        )
    found.append(f"law of {heads}: {source.partition(': ')[2] or source}")
    low, high = laws.penalty.bounds
    if not low * (1 - 1e-9) <= own.ratio <= high * (1 + 1e-9):
        found.append(
            f"its d/L = {own.ratio:.3g} is outside {low:.3g} to {high:.3g}, which answers keep to: what it costs in loss is "
            "less sure than it looks"
        )
    if beyond > FAR:
        side = "the largest" if above else "below the smallest"
        found.append(
            f"its N is {formatting.figure(beyond)} times {side} model of these runs: intervals say what could be, and no "
            "probability is given"
        )
    if abs(np.log(shape.d_ff / (8 * shape.d_model / 3))) > np.log(1.1):
        found.append(
            f"its feed-forward network is {shape.d_ff / shape.d_model:.3g} d wide, that of the runs 8/3 d: a parameter is "
            "taken to be worth as much there as here"
        )
    return found


def _more(share: float, interval: tuple[float, float]) -> str:
    """ "34.8% more (31.8% to 39.4%) than"; where 95% of the draws hold more and less, both are said first."""
    low, high = interval
    if max(abs(share), abs(low), abs(high)) < 5e-4:
        return "as much as"
    if low < 0 < high:
        return f"between {-low:.1%} less and {high:.1%} more than"
    text = f"{abs(share):.1%} {'more' if share > 0 else 'less'}"
    if np.isfinite(interval).all() and high - low > 5e-4:
        ends = sorted(abs(x) for x in interval)
        text += f" ({ends[0]:.1%} to {ends[1]:.1%})"
    return f"{text} than"
