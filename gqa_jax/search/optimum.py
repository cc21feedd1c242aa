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
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd

from gqa_jax import costs, formatting
from gqa_jax.laws import LLAMA3, Heads, LawsByHeads, PowerLaw, posterior
from gqa_jax.laws.shape import REACH, Price
from gqa_jax.search import objectives, ranking
from gqa_jax.search.answer import Answer, Baseline, Model, ShapeChoice, measured_model, name_of
from gqa_jax.search.candidates import (
    LARGEST_BUILT,
    Ranked,
    Table,
    about,
    coefficients,
    limit_text,
    limited,
    one_of,
    rule_of,
)
from gqa_jax.search.objectives import Objective
from gqa_jax.search.ranking import TAILS, quantiles, savings
from gqa_jax.search.roofline import Serving
from gqa_jax.search.shape_rule import RATIOS, TRAINED, ShapeRule
from gqa_jax.shapes import Aspect

LLAMA3_UNKNOWN = (
    "no saving against Llama 3's heads (d/d_h,8): no run has them at three sizes, and no head law can be fitted here"
)
#: The table of laws without the runs that lie off them, and what is said of the row that answers there (`without_outliers`).
Without = tuple[Callable[[LawsByHeads], Table], Callable[[pd.Series], str]]
_SPARE = 1.001  # sizes between the ratios that are looked at are interpolated: to a thousandth
_ROUNDED = 1.25  # models to build have at most so many times a ratio that is given
_BUILT = ("n_layers", "d_model", "n_heads", "n_kv_heads", "head_dim", "d_ff", "n_params", "ratio", "loss", "cost")

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
    memory_limit: float | Serving | None = None,
    draws: int = 1000,
    seed: int = 0,
    method: str | None = None,
    loss_S: np.ndarray | None = None,
    without: Without | None = None,
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
      memory_limit: bytes that parameters and cache (bfloat16, one sequence) may take, or the `Serving` whose devices must hold
        them at its batch and precisions; what needs more can't be chosen.
      draws, seed, method: `LawsByHeads.draws`; draws=0 for an answer without probabilities.
      loss_S: the loss that each draw must reach, nats per token, where these differ; `loss` is then their middle.
      without: what laws without the runs that lie off them are asked, and what is said of their answer, where that is another
        question than this one (`without_outliers`).

    Raises:
      ValueError: a loss that no H reaches by the fitted laws, a limit that none keeps, a context below 1, heads without a law,
        or an aspect ratio that nothing is known of.
    """
    options = {"heads": heads, "baseline": baseline, "baseline_aspect": baseline_aspect, "convention": convention,
               "memory_limit": memory_limit, "draws": draws, "seed": seed, "method": method, "loss_S": loss_S,
               "without": without}  # fmt: skip
    objective, rule = objective or objectives.Z(convention), rule_of(laws, aspect)
    answer = _search(laws, loss, context_served, objective, rule, **options)
    if not rule.is_free:
        return answer
    try:
        trained = _search(laws, loss, context_served, objective, rule_of(laws, TRAINED), alone=False, **options)
    except ValueError as error:
        return dataclasses.replace(answer, warnings=(*answer.warnings, f"in the shapes of the trained sizes: {error}"))
    return dataclasses.replace(answer, as_trained=trained, worth=_worth(answer, trained))


def _search(
    laws: Mapping[Heads, PowerLaw],
    loss: float,
    context_served: int,
    objective: Objective,
    rule: ShapeRule,
    *,
    heads: Sequence[Heads] | None,
    baseline: Heads | Model,
    baseline_aspect: AspectAsked,
    convention: str | costs.Convention,
    memory_limit: float | Serving | None,
    draws: int,
    seed: int,
    method: str | None,
    loss_S: np.ndarray | None,
    without: Without | None,
    alone: bool = True,
) -> Answer:
    """`search` for one rule of shapes; `alone` is False where another answer beside it says what all answers of laws do."""
    _check(loss, [context_served])
    known = coefficients(
        laws, draws, seed, method, heads=_with_laws(laws, heads, loss, draws, seed, method), compared=_compared(baseline)
    )
    table = Table.of(laws, loss, rule, known, seed, loss_S)
    found = table.ranked(context_served, objective, convention, memory_limit)
    if not np.isfinite(found.frame["cost"]).any():
        raise ValueError(_unreachable(table, found.frame, memory_limit))
    base = _base(table, baseline, baseline_aspect)
    against, said = _against(base, found, baseline, objective, context_served, convention, memory_limit)
    best = found.frame.iloc[0]
    best_heads = _heads(best)
    i = found.heads.index(best_heads)
    runner = found.frame.iloc[1] if len(found.frame) > 1 and np.isfinite(found.frame["cost"].iloc[1]) else None
    far = known.far(i, float(best["n_params"]))
    rule.require(float(best["ratio"]))

    def others_table(others: LawsByHeads) -> Table:
        again = coefficients(others, draws, seed, method, heads=known.heads[: known.n_candidates], compared=None)
        return Table.of(others, loss, dataclasses.replace(rule, penalty=others.penalty), again, seed)

    warnings = [
        *(_common_warnings(laws) if alone else []),
        *(
            without_outliers(laws, best_heads, *(without or (others_table, _sure)), context_served, objective, memory_limit)
            if alone
            else []
        ),
        *_beyond(laws, context_served),
        *_doubts(table, best_heads, best, far),
        *([] if found.ranking is not None or not known.no_draws else [f"no probabilities: {known.no_draws}"]),
        *said,
        *_not_reached(found),
    ]
    drawn = known.draws
    doubt = laws.price_of_doubt(loss, draws, seed) if alone and drawn is not None and drawn.method == "posterior" else np.nan
    return Answer(
        loss=float(loss),
        context_served=int(context_served),
        objective=objective.describe(),
        heads=best_heads,
        n_params=float(best["n_params"]),
        n_params_interval=(float(best["n_params_low"]), float(best["n_params_high"])),
        n_layers=float(best["n_layers"]),
        d_model=float(best["d_model"]),
        probability=float(best["probability"]),
        n_candidates=int(np.isfinite(found.frame["cost"]).sum()),
        cost=float(best["cost"]),
        cost_interval=(float(best["cost_low"]), float(best["cost_high"])),
        baseline=against,
        saving=float(best["saving"]),
        saving_interval=(float(best["saving_low"]), float(best["saving_high"])),
        saving_memory=np.nan if not _known(against) else float(1 - best["m_infer"] / against.m_infer),
        saving_flops=np.nan if not _known(against) else float(1 - best["c_infer"] / against.c_infer),
        expected_regret=float(best["expected_regret"]),
        runner_up=None if runner is None else _heads(runner),
        regret_of_runner_up=np.nan if runner is None else float(runner["expected_regret"]),
        not_reached=np.nan if found.ranking is None else found.ranking.not_reached,
        far=far,
        head_dim=float(about(laws)[0]),
        shape=_choice(table, found, i, best),
        worth=dict.fromkeys(("heads", "shape", "both"), np.nan),
        as_trained=None,
        noise_model="" if drawn is None else posterior.NOISE_MODELS[drawn.method],
        price_of_doubt=doubt,
        candidates=found.frame,
        buildable=_buildable(table, found, i, context_served, objective, memory_limit)
        if alone
        else pd.DataFrame(columns=list(_BUILT)),
        warnings=tuple(dict.fromkeys(warnings)),
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
    memory_limit: float | Serving | None = None,
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
                found = table.ranked(context, one, convention, memory_limit, guesses=guesses)
                _against(base, found, baseline, one, context, convention, memory_limit)
                found.frame.insert(0, "loss", float(loss))
                found.frame.insert(1, "context_served", int(context))
                if several is objective:
                    found.frame.insert(0, "objective", name)
                frames.append(found.frame)
    return pd.concat(frames, ignore_index=True)


def convention_sensitivity(
    laws: Mapping[Heads, PowerLaw],
    loss: float,
    context_served: int,
    *,
    weights: objectives.Z | None = None,
    aspect: AspectAsked = None,
    heads: Sequence[Heads] | None = None,
    memory_limit: float | Serving | None = None,
    draws: int = 1000,
    seed: int = 0,
    method: str | None = None,
) -> pd.DataFrame:
    """What the answer under Z would be in every convention for FLOPs and memory: one row each, the paper's figures first.

    weights: whose weight and exponents Z has; default: the paper's. The others as in `search`.

    Columns: flops, memory ("values", or the bytes of a dtype), n_heads, n_kv_heads, n_params, probability, saving, and regret:
    how much more the heads of the first row cost in this convention than its answer, on average over the draws.
    """
    rows, first = [], None
    for flops in ("half_T", "full_T", "per_token"):
        for memory in ("values", "bfloat16", "int8 cache"):
            convention = dataclasses.replace(
                costs.named_convention("figures"), flops=flops, memory="values" if memory == "values" else "bytes"
            )
            dtypes = (
                {"param_dtype": None, "cache_dtype": None}
                if memory == "values"
                else {"param_dtype": "bfloat16", "cache_dtype": "int8" if "int8" in memory else "bfloat16"}
            )
            z = dataclasses.replace(weights or objectives.Z(), convention=convention, flops=None, **dtypes)
            own = optimum_map(
                laws, [loss], [context_served], z, aspect=aspect, heads=heads,
                convention=convention, memory_limit=memory_limit, draws=draws, seed=seed, method=method,
            )  # fmt: skip
            best = own.iloc[0]
            if not np.isfinite(best["cost"]):
                known = coefficients(laws, draws, seed, method, heads=heads, compared=None)
                raise ValueError(_unreachable(Table.of(laws, loss, rule_of(laws, aspect), known), own, memory_limit))
            first = first or _heads(best)
            regret_H = own["expected_regret"].to_numpy()
            if np.isnan(regret_H[0]):  # without draws
                regret_H = ranking.regret(own["cost"].fillna(np.inf).to_numpy())
            above = ranking.above(regret_H[[_heads(row) for _, row in own.iterrows()].index(first)], regret_H[0])
            rows.append(
                {"flops": flops, "memory": memory, **_heads(best)._asdict(), "n_params": best["n_params"],
                 "probability": best["probability"], "saving": best["saving"],
                 "regret": float(above)}
            )  # fmt: skip
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
    memory_limit: float | Serving | None = None,
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
    settled = table.settled(objective or objectives.Z(convention), context_served)
    cost_SxH, _ = table.drawn_costs(settled, context_served, memory_limit)
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
    base: Model | Table | None,
    found: Ranked,
    asked: Heads | Model,
    objective: Objective,
    context: int,
    convention: str | costs.Convention,
    memory_limit: float | Serving | None,
) -> tuple[Baseline | None, list[str]]:
    """What savings are against (`_base`), and warnings; fills in the columns of savings."""
    frame, against_S, said = found.frame, None, []
    if base is None:
        heads = Heads(*asked)
        return None, [LLAMA3_UNKNOWN if heads == LLAMA3 else f"no saving against heads {heads}: they have no law here"]
    if isinstance(base, Model):
        about_it = {name: getattr(base, name) for name in ("label", "heads", "measured", "run", "loss")}
        shape, n_params, cost = base.shape, base.n_params, cost_of(base, objective, context, memory_limit)
        interval = (cost, cost)
    else:
        heads = base.heads[0]
        about_it = {"label": name_of(heads), "heads": heads, "measured": False, "run": None, "loss": base.loss}
        about_it["shape"] = base.rule.name
        settled = base.settled(objective, context)
        cost_H, n_H, shape_H = base.typical(settled, context, memory_limit)
        shape, n_params, cost, interval = one_of(shape_H, 0), float(n_H[0]), float(cost_H[0]), (np.nan, np.nan)
        if base.known.draws is not None:
            against_S = base.drawn_costs(settled, context, memory_limit)[0][:, 0]
            interval = tuple(float(x) for x in quantiles(against_S, TAILS))
            said += base.known.draws.notes
    where = {
        "n_params": float(n_params), "n_layers": float(shape.n_layers), "d_model": float(shape.d_model),
        "c_infer": float(costs.infer_flops(shape, context, convention)),
        "m_infer": float(costs.infer_memory(shape, context, convention)),
    }  # fmt: skip
    if not np.isfinite(cost):
        note = _impossible(about_it["label"], memory_limit, np.isfinite(n_params))
        return Baseline(**about_it, **where, cost=np.nan, cost_interval=(np.nan, np.nan), note=note), [note]
    frame["saving"] = (1 - frame["cost"] / cost).where(np.isfinite(frame["cost"]))
    if found.cost_SxH is not None:
        low, _, high = savings(found.cost_SxH[:, : len(frame)], cost if against_S is None else against_S)
        order = [found.heads.index(_heads(row)) for row in frame[["n_heads", "n_kv_heads"]].to_dict("records")]
        frame["saving_low"], frame["saving_high"] = low[order], high[order]
    return Baseline(**about_it, **where, cost=cost, cost_interval=interval), said


def cost_of(model: Model, objective: Objective, context: int, memory_limit: float | Serving | None) -> float:
    """What a model costs; infinite where it can't be served, or does not keep the limit."""
    own = objectives.settled(objective, model.shape, context)
    return float(limited(own, model.shape, context, memory_limit))


def _known(against: Baseline | None) -> bool:
    return against is not None and np.isfinite(against.cost)


def _choice(table: Table, found: Ranked, i: int, best: pd.Series) -> ShapeChoice:
    """The shape of the answer, the i-th of the heads."""
    rule, interval = table.rule, (np.nan, np.nan)
    if rule.is_free and found.ratio_SxH is not None:
        own = found.ratio_SxH[np.isfinite(found.cost_SxH[:, i]), i]
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
    frame = answer.candidates
    same = [_heads(row) == answer.baseline.heads for row in frame.to_dict("records")]
    shape = float(frame.loc[same, "saving"].iloc[0]) if any(same) else np.nan
    return {"heads": trained.saving, "shape": shape, "both": answer.saving}


def _not_reached(found: Ranked) -> list[str]:
    share = 0.0 if found.ranking is None else found.ranking.not_reached
    if share <= 0.005:
        return []
    return [f"in {share:.0%} of the draws no size of any H reaches the loss: probabilities are of the others"]


def _doubts(table: Table, heads: Heads, row: pd.Series, far: float) -> list[str]:
    """What makes this answer doubtful."""
    found = []
    law = table.laws[heads]
    highest = max((one.loss.max() for one in table.laws.values() if len(one.loss)), default=np.inf)
    if table.loss > highest:
        found.append(
            f"a loss of {table.loss:g} is above every measured one (at most {highest:.3f}): smaller than every trained model"
        )
    candidates = table.heads[: table.known.n_candidates]
    counts = [h.n_heads for h in candidates if h.n_heads is not None]
    if len(counts) > 1 and heads.n_heads == max(counts):
        found.append(f"{heads} has the most query heads of those that were trained: with more it may be cheaper still")
    n = float(row["n_params"])
    if np.isfinite(far):
        side = "times the largest" if n > law.params.max() else "times below the smallest"
        found.append(f"N* is {formatting.figure(far)} {side} model of {heads}: this is a guess, not a measurement")
    elif pd.notna(row["note"]):
        found.append(f"{heads}: {row['note']}")
    if np.isfinite(row["n_params_low"]):
        if not table.follows_its_curve(heads):
            found.append(
                f"N* of the curve of {heads} lies outside the interval of the draws, in which the other heads have a say: "
                "this H does not follow its neighbours"
            )
        if not np.isfinite(row["n_params_high"]):
            found.append("N* is not bounded above: the data allow an E at or above the loss")
    bounds, by_size = table.rule.penalty.bounds, table.rule.penalty.by_size
    if table.rule.ratios_R is not None and by_size is not None:
        usual = float(by_size(row["n_params"]))
        away = max(row["ratio"] / usual, usual / row["ratio"])
        if away > REACH * (1 + 1e-6):
            found.append(
                f"d/L = {row['ratio']:.3g} is {formatting.times(away)} away from that of the runs about this N, {usual:.3g}: "
                "what that does to loss is known from no run and no prior"
            )
    if table.rule.is_free and any(np.isclose(row["ratio"], bound, rtol=1e-6) for bound in bounds):
        found.append(
            f"d/L = {row['ratio']:.3g} is at the edge of what is looked at ({bounds[0]:.3g} to {bounds[1]:.3g}): beyond it "
            "nothing is known of the loss"
        )
    return found


def _buildable(
    table: Table, found: Ranked, i: int, context: int, objective: Objective, memory_limit: float | Serving | None
) -> pd.DataFrame:
    """The cheapest models of whole layers and rounded widths near the answer that reach the loss; none that miss it.

    Of models that can be served those from which, within the bounds of d / L, neither a layer nor a step of width can be taken.
    A model reaches the loss where its typical loss, the median of the draws, is not above it.
    """
    head_dim, vocab_size, convention, ffn_ratio = about(table.laws)
    heads, n_params = found.heads[i], float(found.n_params_H[i])
    if not n_params <= LARGEST_BUILT:
        return pd.DataFrame(columns=list(_BUILT))
    shape = one_of(found.shape_H, i)
    ratio = float(shape.d_model / shape.n_layers)
    rule = table.rule
    bounds = rule.penalty.bounds
    if not rule.is_free:  # the ratio is given: some about it
        about_it = (ratio / _ROUNDED, ratio * _ROUNDED)
        bounds = about_it if rule.ratios_R is None else (max(bounds[0], about_it[0]), min(bounds[1], about_it[1]))
        penalty = rule.penalty if rule.aspect is None else dataclasses.replace(rule.penalty, by_size=rule.aspect)
        rule = dataclasses.replace(rule, penalty=penalty, aspect=None, ratios_R=np.geomspace(*bounds, RATIOS))
        table, i = table.alone(heads, rule), 0
    found_shapes = costs.buildable_shapes(
        n_params, heads, ratio, bounds, lambda r: _SPARE * table.needed(i, r), int(head_dim), int(vocab_size), convention,
        ffn_ratio, multiple=64 if n_params > 1e7 else 16,
    )  # fmt: skip
    if not found_shapes:
        return pd.DataFrame(columns=list(_BUILT))
    names = [field.name for field in dataclasses.fields(costs.Shape)]
    frame = pd.DataFrame([{name: getattr(one, name) for name in names} for one in found_shapes])
    several = costs.Shape(**{name: frame[name].to_numpy() for name in names})
    frame["n_params"] = np.asarray(costs.count_params(several, convention).non_embedding, np.float64)
    frame["ratio"] = frame["d_model"] / frame["n_layers"]
    frame["cost"] = limited(objective, several, context, memory_limit)
    frame["loss"] = _loss_of(table, i, frame["n_params"].to_numpy(), frame["ratio"].to_numpy())
    frame = frame[np.isfinite(frame["cost"]) & (frame["loss"] <= table.loss)]  # each has the fewest layers of its width
    width, layers = frame["d_model"].to_numpy(), frame["n_layers"].to_numpy()
    narrower = (width < width[:, None]) & (layers <= layers[:, None]) & (width >= bounds[0] * layers[:, None])
    frame = frame[~narrower.any(1)].sort_values("cost", kind="stable")
    return frame.head(3)[list(_BUILT)].reset_index(drop=True)


def _loss_of(table: Table, i: int, n_params: np.ndarray, ratio: np.ndarray) -> np.ndarray:
    """Typical loss of the i-th heads at N and d / L: as far from `table.loss` as from what the draws ask for."""
    rule, heads = table.rule, table.heads[i]
    drawn = table.known.draws
    if drawn is None:
        return table.laws[heads].predict(n_params) * rule.penalty.factor(rule.penalty.typical, ratio, n_params)
    price = rule.penalty.draw(len(drawn.b_SxH), table.seed)
    factor_SxN = rule.penalty.factor(Price(price.k[:, None], price.best[:, None]), ratio, n_params)
    loss_SxN = drawn.loss(heads, n_params) * factor_SxN
    asked_S = table.loss if table.loss_S is None else table.loss_S[:, None]
    return table.loss + np.median(loss_SxN - asked_S, 0)


def _check(loss: float, contexts: Sequence[int]) -> None:
    if not (np.isfinite(loss) and loss > 0):
        raise ValueError(f"loss = {loss}: must be a number above 0, in nats per token")
    for context in contexts:
        if not (np.isfinite(context) and context >= 1):
            raise ValueError(f"context_served = {context}: must be at least 1 token")


def without_outliers(
    laws: Mapping[Heads, PowerLaw],
    heads: Heads,
    table_of: Callable[[LawsByHeads], Table],
    more: Callable[[pd.Series], str],
    context: int,
    objective: Objective,
    memory_limit: float | Serving | None,
) -> list[str]:
    """What the answer would be without the runs that lie off their law, in a sentence; nothing where none does.

    heads: of the answer with them. table_of: what other laws are asked. more: what is said of the new answer's row at the end.
    """
    if not isinstance(laws, LawsByHeads) or not laws.doubts.outliers:
        return []
    count = len(laws.doubts.outliers)
    which = "that run" if count == 1 else f"those {count} runs"
    if (others := laws.without_outliers) is None:
        return [f"without {which} too few sizes are left for a law"]
    try:
        best = table_of(others).ranked(context, objective, "figures", memory_limit).frame.iloc[0]
    except ValueError as error:
        return [f"without {which} there is no answer: {error}"]
    if not np.isfinite(best["cost"]):
        return [f"without {which} no heads reach this loss"]
    found = _heads(best)
    same = "the same heads, " if found == heads else ""
    said = f"the answer is {same}{found}, N* = {formatting.short(best['n_params'])}{more(best)}"
    return [f"without {which} {said}"]


def _sure(best: pd.Series) -> str:
    """How sure an answer is, where that is known and it is no guess."""
    if np.isnan(best["probability"]):
        return ""
    return f", the cheapest with a probability of {formatting.probability(best['probability'])}"


def _common_warnings(laws: Mapping[Heads, PowerLaw]) -> list[str]:
    found = [w for law in laws.values() for w in law.warnings]
    if isinstance(laws, LawsByHeads):
        found = ([laws.source] if laws.source else []) + [*laws.warnings, *laws.doubted, *found]
    return list(dict.fromkeys(found))


def _beyond(laws: Mapping[Heads, PowerLaw], context_served: int) -> list[str]:
    if not isinstance(laws, LawsByHeads) or context_served <= laws.context:
        return []
    return [
        f"served at {context_served:,} tokens, trained at {laws.context:,}: that heads compare there as here is taken from the "
        "paper (Section 5.7; gqa_jax.invariance tests it on runs of several contexts)"
    ]


def _unreachable(table: Table, frame: pd.DataFrame, memory_limit: float | Serving | None) -> str:
    loss, laws = table.loss, [table.laws[h] for h in table.heads[: table.known.n_candidates]]
    least = min(law.entropy for law in laws)
    lowest = min((law.loss.min() for law in laws if len(law.loss)), default=np.inf)
    notes = frame.loc[frame["n_params"].notna(), "note"].dropna()
    if loss > least and memory_limit is None and len(notes):
        nearest = f"{_heads(frame.loc[notes.index[0]])} {notes.iloc[0]}"
        return (
            f"no head configuration can be served as asked at a loss of {loss:g}; what comes closest: {nearest}. Allow more "
            "time, other devices, a higher loss, a shorter context or fewer requests at once"
        )
    if frame["n_params"].isna().all():
        said = f"the fitted entropy E is {least:.4f}"
        if loss > least:
            why = (
                "most draws of it are above the loss"
                if table.known.draws is not None
                else "at these d / L the shape alone costs more than the loss leaves above it"
            )
            said += f", and {why}"
        return (
            f"a loss of {loss:g} can't be reached at any size: {said}; the lowest measured loss "
            f"is {lowest:.4f}, so ask for {least + 0.25 * (lowest - least):.3f} or more"
        )
    return (
        f"no head configuration reaches a loss of {loss:g} within {limit_text(memory_limit)} at this context: allow more "
        "memory, a higher loss, a shorter context or a smaller batch"
    )


def _impossible(label: str, memory_limit: float | Serving | None, reached: bool) -> str:
    why = "can't be served as asked" if memory_limit is None else f"take more than {limit_text(memory_limit)}"
    why = why if reached else "do not reach this loss"
    return f"no saving against {label}: they {why}"


def _heads(row: Mapping | pd.Series) -> Heads:
    return Heads.of(row["n_heads"], row["n_kv_heads"])
