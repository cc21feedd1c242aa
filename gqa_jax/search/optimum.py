"""Cost-optimal heads and shape, and how sure: the three-step search of arXiv 2503.09579v2, Section 4.1.

1. Fit L(N; H) for every head configuration H (`gqa_jax.laws`). 2. Solve N*(H) for the loss that must be reached (Eq. 8).
3. Turn N* into a shape (`shape_rule`, `costs.solve_shape`), evaluate a cost at the served context (`objectives`), compare the H
(Eq. 9).

The same is done for every joint draw of the laws' coefficients and of what the shape costs in loss (`gqa_jax.laws.shape`): each
draw takes the aspect ratio d / L of least cost. The probability of an H is the share of draws in which it is the cheapest; its
regret in a draw is its cost over the least one, minus 1, and 10 at most (`ranking`). The answer is the H of least expected
regret, not the cheapest by the fitted curves: which H is cheapest changes with noise where costs are close, its regret hardly
does.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from gqa_jax import costs, formatting
from gqa_jax.laws import LLAMA3, Heads, LawsByHeads, PowerLaw, posterior
from gqa_jax.laws import runs as run_table
from gqa_jax.search import buildable, caveats, objectives, ranking
from gqa_jax.search.answer import Answer, Baseline, Model, ShapeChoice, heads_of, measured_model, name_of
from gqa_jax.search.candidates import CostAt, Ranked, Table, about, coefficients, one_of, rule_of
from gqa_jax.search.objectives import Objective
from gqa_jax.search.ranking import TAILS, quantiles, savings
from gqa_jax.search.shape_rule import TRAINED, ShapeRule
from gqa_jax.shapes import Aspect

AspectAsked = None | str | float | Aspect


def search(
    laws: Mapping[Heads, PowerLaw],
    loss: float,
    context_served: int,
    objective: Objective | None = None,
    *,
    aspect: AspectAsked = None,
    heads: Sequence[Heads] | None = None,
    baseline: Heads | Model = LLAMA3,
    baseline_aspect: AspectAsked = None,
    convention: str | costs.Convention = "figures",
    memory_limit: Any = None,
    draws: int = 1000,
    seed: int = 0,
    method: str | None = None,
    loss_S: np.ndarray | None = None,
    without: caveats.Without | None = None,
) -> Answer:
    """The heads and the shape that reach `loss` at the least cost of serving `context_served` tokens.

    Args:
      laws: of `fit_by_heads`, or of `gqa_jax.search.presets`.
      loss: L*, nats per token, as in the laws.
      context_served: T of the costs, tokens.
      objective: default `objectives.Z()` with `convention`.
      aspect: d / L: None or "best", the best of every draw; "paper", the paper's tables; "trained", as between the trained
        sizes (`LawsByHeads.aspect`); a ratio; or an `Aspect`. A ratio other than the runs' costs loss (`LawsByHeads.penalty`).
      heads: candidates; default: all that have a law.
      baseline: what savings are against: heads, of which a run within .003 nats of the loss is taken, else what their law
        says; or a model.
      baseline_aspect: d / L of what their law says; default: that of the trained sizes where `aspect` leaves it free, else
        `aspect`.
      convention: of the columns c_infer and m_infer.
      memory_limit: bytes that parameters and cache (bfloat16, one sequence) may take, or the `roofline.RooflineServing` whose
        devices must hold them at its batch and precisions; what needs more can't be chosen.
      draws, seed, method: `LawsByHeads.draws`; draws=0 for an answer without probabilities.
      loss_S: the loss that each draw must reach, nats per token, where these differ; `loss` is then their middle.
      without: what laws without the runs that lie off them are asked, and what is said of their answer, where that is another
        question than this one (`caveats.without_outliers`).

    Raises:
      ValueError: a loss that no H reaches by the fitted laws, a limit that none keeps, a context below 1, heads without a law,
        or an aspect ratio that nothing is known of.
    """
    rule, cost = rule_of(laws, aspect), CostAt(objective or objectives.Z(convention), context_served, memory_limit)
    _check(loss, [context_served])
    heads = _with_laws(laws, heads, loss, draws, seed, method)
    known = coefficients(laws, draws, seed, method, heads=heads, compared=_compared(baseline))

    def asked(rule: ShapeRule) -> tuple[Table, Answer]:
        table = Table.of(laws, loss, rule, known, seed, loss_S)
        return table, _answer(table, cost, baseline, baseline_aspect, convention)

    def others_table(others: LawsByHeads) -> Table:
        again = coefficients(others, draws, seed, method, heads=known.heads[: known.n_candidates], compared=None)
        return Table.of(others, loss, dataclasses.replace(rule, penalty=others.penalty), again, seed)

    table, answer = asked(rule)
    drawn, warnings = (
        known.draws,
        [
            *caveats.of_laws(laws),
            *caveats.without_outliers(laws, answer.heads, *(without or (others_table, caveats.sure)), cost),
            *answer.warnings,
        ],
    )
    trained, worth = None, answer.worth
    if rule.is_free:
        try:
            trained = asked(rule_of(laws, TRAINED))[1]
            worth = _worth(answer, trained)
        except ValueError as error:
            warnings.append(f"in the shapes of the trained sizes: {error}")
    by_posterior = drawn is not None and drawn.method == "posterior"
    return dataclasses.replace(
        answer,
        worth=worth,
        as_trained=trained,
        price_of_doubt=laws.price_of_doubt(loss, draws, seed) if by_posterior else np.nan,
        buildable=buildable.near(table, answer, cost),
        warnings=tuple(dict.fromkeys(warnings)),
    )


def _answer(
    table: Table,
    cost: CostAt,
    baseline: Heads | Model,
    baseline_aspect: AspectAsked,
    convention: str | costs.Convention,
) -> Answer:
    """The answer of a table, without what `search` adds of other tables."""
    found = table.ranked(cost, convention)
    if not np.isfinite(found.frame["cost"]).any():
        raise ValueError(caveats.unreachable(table, found.frame, cost))
    against, said = _against(_base(table, baseline, baseline_aspect), found, baseline, cost, convention)
    best, drawn = found.frame.iloc[0], table.known.draws
    heads = heads_of(best)
    i = table.heads.index(heads)
    runner = found.frame.iloc[1] if len(found.frame) > 1 and np.isfinite(found.frame["cost"].iloc[1]) else None
    far = table.known.far(i, float(best["n_params"]))
    table.rule.require(float(best["ratio"]))
    known_cost = against is not None and np.isfinite(against.cost)
    intervals = ("n_params", "cost", "saving")
    numbers = ("n_params", "n_layers", "d_model", "probability", "cost", "saving", "expected_regret")
    return Answer(
        loss=float(table.loss),
        context_served=int(cost.context),
        objective=cost.objective.describe(),
        heads=heads,
        **{name: float(best[name]) for name in numbers},
        **{f"{name}_interval": (float(best[f"{name}_low"]), float(best[f"{name}_high"])) for name in intervals},
        n_candidates=int(np.isfinite(found.frame["cost"]).sum()),
        baseline=against,
        saving_memory=float(1 - best["m_infer"] / against.m_infer) if known_cost else np.nan,
        saving_flops=float(1 - best["c_infer"] / against.c_infer) if known_cost else np.nan,
        runner_up=None if runner is None else heads_of(runner),
        regret_of_runner_up=np.nan if runner is None else float(runner["expected_regret"]),
        not_reached=np.nan if found.ranking is None else found.ranking.not_reached,
        far=far,
        head_dim=float(about(table.laws)[0]),
        shape=_choice(table.rule, found, i, best),
        worth=dict.fromkeys(("heads", "shape", "both"), np.nan),
        as_trained=None,
        noise_model="" if drawn is None else posterior.NOISE_MODELS[drawn.method],
        price_of_doubt=np.nan,
        candidates=found.frame,
        buildable=pd.DataFrame(columns=list(buildable.COLUMNS)),
        warnings=tuple(dict.fromkeys(caveats.of_answer(table, found, cost, said))),
    )


def optimum_map(
    laws: Mapping[Heads, PowerLaw],
    losses: Sequence[float],
    contexts_served: Sequence[int],
    objective: Objective | Mapping[str, Objective] | None = None,
    *,
    aspect: AspectAsked = None,
    heads: Sequence[Heads] | None = None,
    baseline: Heads | Model = LLAMA3,
    convention: str | costs.Convention = "figures",
    memory_limit: Any = None,
    draws: int = 1000,
    seed: int = 0,
    method: str | None = None,
    guesses: bool = False,
) -> pd.DataFrame:
    """Every H for every loss and served context: loss, context_served and those of `Answer.candidates`; rank 1 answers.

    Arguments as in `search`; draws=0 leaves out what is uncertain, and ranks by the cost of the fitted laws. objective: several
    by name share what they can, and the first column is then objective, the name. A loss that an H does not reach gives a row
    without numbers and with a note. guesses: whether answers beyond FAR keep their probabilities, for who interpolates.
    """
    several = objective if isinstance(objective, Mapping) else {"": objective or objectives.Z(convention)}
    rule = rule_of(laws, aspect)
    known = coefficients(laws, draws, seed, method, heads=heads, compared=_compared(baseline))
    frames = []
    for loss in losses:
        _check(loss, contexts_served)
        table = Table.of(laws, loss, rule, known, seed)
        base = _base(table, baseline)
        for context in contexts_served:
            for name, one in several.items():
                cost = CostAt(one, context, memory_limit)
                found = table.ranked(cost, convention, guesses)
                _against(base, found, baseline, cost, convention)
                found.frame.insert(0, "loss", float(loss))
                found.frame.insert(1, "context_served", int(context))
                if several is objective:
                    found.frame.insert(0, "objective", name)
                frames.append(found.frame)
    return pd.concat(frames, ignore_index=True)


def convention_sensitivity(
    laws: Mapping[Heads, PowerLaw], loss: float, context_served: int, *, weights: objectives.Z | None = None, **options: Any
) -> pd.DataFrame:
    """What the answer under Z would be in every convention for FLOPs and memory: one row each, the paper's figures first.

    weights: whose weight and exponents Z has; default: the paper's. options: of `optimum_map`, but for costs and conventions.

    Columns: flops, memory ("values", or the bytes of a dtype), n_heads, n_kv_heads, n_params, probability, saving, and regret:
    how much more the heads of the first row cost in this convention than its answer, on average over the draws.
    """
    rows, first = [], None
    for flops, memory in itertools.product(("half_T", "full_T", "per_token"), ("values", "bfloat16", "int8 cache")):
        counted, dtypes = "values", {"param_dtype": None, "cache_dtype": None}
        if memory != "values":
            counted, dtypes = "bytes", {"param_dtype": "bfloat16", "cache_dtype": memory.removesuffix(" cache")}
        convention = dataclasses.replace(costs.named_convention("figures"), flops=flops, memory=counted)
        z = dataclasses.replace(weights or objectives.Z(), convention=convention, flops=None, **dtypes)
        own = optimum_map(laws, [loss], [context_served], z, convention=convention, **options)
        best = own.iloc[0]
        if not np.isfinite(best["cost"]):
            search(laws, loss, context_served, z, convention=convention, **options)  # raises, and says why
        heads = [heads_of(row) for row in own[["n_heads", "n_kv_heads"]].to_dict("records")]
        first = first or heads[0]
        regret_H = own["expected_regret"].to_numpy()
        if np.isnan(regret_H[0]):  # without draws
            regret_H = ranking.regret(own["cost"].fillna(np.inf).to_numpy())
        row = {"flops": flops, "memory": memory, **heads[0]._asdict()} | dict(best[["n_params", "probability", "saving"]])
        rows.append(row | {"regret": float(ranking.above(regret_H[heads.index(first)], regret_H[0]))})
    return pd.DataFrame(rows).astype({"n_heads": "Int64"})


@dataclasses.dataclass(frozen=True)
class Regrets:
    """What each H costs above the cheapest, in every draw."""

    heads: list[Heads]
    regret_SxH: np.ndarray  # of `ranking.regret`; nan in draws in which no H reaches the loss
    reached_S: np.ndarray


def regrets(
    laws: Mapping[Heads, PowerLaw],
    loss: float,
    context_served: int,
    objective: Objective | None = None,
    *,
    aspect: AspectAsked = None,
    heads: Sequence[Heads] | None = None,
    convention: str | costs.Convention = "figures",
    memory_limit: Any = None,
    draws: int = 1000,
    seed: int = 0,
    method: str | None = None,
) -> Regrets:
    """The regrets that `search` averages, of its candidates. Arguments as there; ValueError where nothing can be drawn."""
    _check(loss, [context_served])
    known = coefficients(laws, draws, seed, method, heads=heads, compared=None)
    if known.draws is None:
        raise ValueError(f"no draws, so no regrets: {known.no_draws or 'plain laws, or draws=0'}")
    table = Table.of(laws, loss, rule_of(laws, aspect), known, seed)
    cost = CostAt(objective or objectives.Z(convention), context_served, memory_limit)
    cost_SxH = table.drawn_costs(table.settled(cost)).cost
    return Regrets(known.heads, ranking.regret(cost_SxH), np.isfinite(cost_SxH.min(1)))


def _with_laws(
    laws: Mapping[Heads, PowerLaw], heads: Sequence[Heads] | None, loss: float, draws: int, seed: int, method: str | None
) -> Sequence[Heads] | None:
    """The candidates. Raises ValueError for heads without a law, with what the law of heads says of them, if anything."""
    missing = [Heads(*one) for one in heads or () if Heads(*one) not in laws]
    if not missing or not draws or not isinstance(laws, LawsByHeads):
        return heads
    one = missing[0]
    if one.n_heads is None:
        return heads
    try:
        n_S = np.exp(laws.draws_of(one.n_heads, one.n_kv_heads, draws, seed, method).log_size(loss)[:, 0])
    except ValueError as error:
        said = f"and no law of heads: {error}"
    else:
        low, middle, high = (formatting.short(float(x)) for x in quantiles(n_S, [TAILS[0], 0.5, TAILS[1]]))
        said = f"the law of heads would need N* = {middle} ({low} to {high}) for this loss, which no run has checked"
    raise ValueError(f"heads {one} have no law here ({said}): there are {', '.join(map(str, laws))}")


def _compared(baseline: Heads | Model) -> Heads | None:
    """The heads whose law savings are against; None for a model."""
    return None if isinstance(baseline, Model) else Heads(*baseline)


def _base(table: Table, asked: Heads | Model, aspect: AspectAsked = None) -> Model | Table | None:
    """What savings are against: a model that is given, or that was measured, or what the law of heads says; None: no law.

    By a law it has the shape of the trained sizes where shapes are free: that is what heads and shape are chosen against.
    """
    if isinstance(asked, Model):
        return asked
    heads = Heads(*asked)
    if (model := measured_model(table.laws, heads, table.loss)) is not None:
        return model
    if heads not in table.heads:
        return None
    aspect = TRAINED if aspect is None and table.rule.is_free else aspect
    return table.alone(heads, table.rule if aspect is None else rule_of(table.laws, aspect))


def _against(
    base: Model | Table | None, found: Ranked, asked: Heads | Model, cost: CostAt, convention: str | costs.Convention
) -> tuple[Baseline | None, list[str]]:
    """What savings are against (`_base`), and warnings; fills in the columns of savings."""
    frame, against_S, said = found.frame, None, []
    if base is None:
        return None, [caveats.no_law_of(Heads(*asked))]
    if isinstance(base, Model):
        about_it = {name: getattr(base, name) for name in ("label", "heads", "measured", "run", "loss")}
        shape, n_params, own = base.shape, base.n_params, cost_of(base, cost)
        interval, against_S = (own, own), None if found.drawn is None else drawn_cost_of(base, cost, found)
    else:
        heads = base.heads[0]
        about_it = {"label": name_of(heads), "heads": heads, "measured": False, "run": None, "loss": base.loss}
        about_it["shape"] = base.rule.name
        settled = base.settled(cost)
        cost_H, n_H, shape_H = base.typical(settled)
        shape, n_params, own, interval = one_of(shape_H, 0), float(n_H[0]), float(cost_H[0]), (np.nan, np.nan)
        if base.known.draws is not None:
            against_S = base.drawn_costs(settled).cost[:, 0]
            interval = tuple(float(x) for x in quantiles(against_S, TAILS))
            said += base.known.draws.notes
    where = {
        "n_params": float(n_params), "n_layers": float(shape.n_layers), "d_model": float(shape.d_model),
        "c_infer": float(costs.infer_flops(shape, cost.context, convention)),
        "m_infer": float(costs.infer_memory(shape, cost.context, convention)),
    }  # fmt: skip
    if not np.isfinite(own):
        note = caveats.no_saving(about_it["label"], cost, np.isfinite(n_params))
        return Baseline(**about_it, **where, cost=np.nan, cost_interval=(np.nan, np.nan), note=note), [note]
    frame["saving"] = (1 - frame["cost"] / own).where(np.isfinite(frame["cost"]))
    if found.drawn is not None:
        low, _, high = savings(found.drawn.cost[:, : len(frame)], own if against_S is None else against_S)
        order = [found.heads.index(heads_of(row)) for row in frame[["n_heads", "n_kv_heads"]].to_dict("records")]
        frame["saving_low"], frame["saving_high"] = low[order], high[order]
    return Baseline(**about_it, **where, cost=own, cost_interval=interval), said


def cost_of(model: Model, cost: CostAt) -> float:
    """What a model costs; infinite where it can't be served, or does not keep the limit."""
    return float(cost.settled(model.shape)(model.shape))


def drawn_cost_of(model: Model, cost: CostAt, found: Ranked) -> Any:
    """The same in each draw of what was measured of the device; one number where nothing was."""
    drawn = cost.settled(model.shape).drawn(len(found.drawn.cost), found.seed)
    return np.ravel(drawn(model.shape))


def _choice(rule: ShapeRule, found: Ranked, i: int, best: pd.Series) -> ShapeChoice:
    """The shape of the answer, the i-th of the heads."""
    interval = (np.nan, np.nan)
    if rule.is_free and found.drawn is not None:
        own = found.drawn.ratio[np.isfinite(found.drawn.cost[:, i]), i]
        interval = tuple(float(x) for x in quantiles(own, TAILS))
    penalty = rule.penalty
    ends = penalty.quantiles(TAILS)
    return ShapeChoice(
        rule=rule.name,
        ratio=float(best["ratio"]),
        ratio_interval=interval,
        bounds=penalty.bounds,
        r0=penalty.ratio,
        r0_of_sizes=penalty.of_sizes,
        k=float(penalty.typical.k),
        k_interval=(float(ends.k[0]), float(ends.k[1])),
        best=float(penalty.typical.best),
        best_interval=(float(ends.best[0]), float(ends.best[1])),
        source=penalty.source,
    )


def _worth(answer: Answer, trained: Answer) -> dict[str, float]:
    """What other heads alone save, the shape alone, and both."""
    if answer.baseline is None:
        return answer.worth
    own = answer.candidates.loc[run_table.have(answer.candidates, answer.baseline.heads), "saving"]
    shape = float(own.iloc[0]) if len(own) else np.nan
    return {"heads": trained.saving, "shape": shape, "both": answer.saving}


def _check(loss: float, contexts: Sequence[int]) -> None:
    if not 0 < loss <= 100:  # a model that knows nothing of a vocabulary of 2^31 reaches 21.5
        raise ValueError(f"loss = {loss}: must be above 0 and at most 100, in nats per token")
    for context in contexts:
        if not (np.isfinite(context) and context >= 1):
            raise ValueError(f"context_served = {context}: must be at least 1 token")
