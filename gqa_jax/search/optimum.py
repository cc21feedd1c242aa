"""Cost-optimal heads, and how sure: the three-step search of arXiv 2503.09579v2, Section 4.1.

1. Fit L(N; H) for every head configuration H (`gqa_jax.laws`). 2. Solve N*(H) for the loss that must be reached (Eq. 8).
3. Turn N* into a shape (`shape_search`), evaluate a cost at the served context (`objectives`), compare the H (Eq. 9).

The same is done for every joint draw of the laws' coefficients. The probability of an H is the share of draws in which it is
the cheapest; its regret in a draw is its cost over the least one, minus 1, and 10 at most (`regret`). The answer is the H of
least expected regret, not the cheapest by the fitted curves: which H is cheapest changes with noise where costs are close, its
regret hardly does.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from gqa_jax import costs, formatting, shape_search
from gqa_jax.laws import LLAMA3, Draws, Heads, LawsByHeads, PowerLaw, posterior
from gqa_jax.search import objectives, roofline
from gqa_jax.search.roofline import Layout, Serving
from gqa_jax.shapes import paper_aspect

Aspect = Callable[[Any], Any]

LEVEL = 0.95
LARGEST_BUILT = 1e13  # parameters: beyond it no model is proposed
FAR = 10.0  # times the largest trained size: an answer beyond it is a guess, and is called so

CANDIDATES = (
    "n_heads", "n_kv_heads", "n_params", "n_params_low", "n_params_high", "n_layers", "d_model", "c_infer", "m_infer", "cost",
    "cost_low", "cost_high", "rank", "probability", "expected_regret", "saving_vs_llama3", "pareto", "note",
)  # fmt: skip


#: Columns of the candidates beside these, of costs that are of devices.
SERVED = (
    "layout", "batch", "memory_bytes", "ttft", "tpot", "request_seconds", "usd_per_million_input", "usd_per_million_output",
    "prefill_limit", "decode_limit", "replication",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Answer:
    """The cost-optimal heads for one loss and one served context.

    Costs are of real-valued models with exactly N* parameters; `buildable` are real ones close to the answer. Intervals are
    95% of the draws; None and nan where the laws have no degrees of freedom left for noise.
    """

    loss: float
    context_served: int
    objective: dict[str, Any]  # Objective.describe()
    heads: Heads
    n_params: float  # N*, without embeddings
    n_params_interval: tuple[float, float]
    probability: float  # that no other H is cheaper
    cost: float
    cost_interval: tuple[float, float]
    saving_vs_llama3: float  # 1 - cost / cost of Llama 3's heads at the same loss
    saving_interval: tuple[float, float]
    expected_regret: float  # of the answer, relative (`regret`)
    runner_up: Heads | None
    regret_of_runner_up: float  # expected
    not_reached: float  # share of draws in which no H reaches the loss
    noise_model: str  # what the intervals rest on, in words; empty where there are none
    price_of_doubt: float  # `LawsByHeads.price_of_doubt`; nan for narrower methods
    candidates: pd.DataFrame
    buildable: pd.DataFrame
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON: plain numbers, None where a number is missing or infinite."""
        return {
            "loss": self.loss,
            "context_served": self.context_served,
            "n_heads": self.heads.n_heads,
            "n_kv_heads": self.heads.n_kv_heads,
            "n_params": _plain(self.n_params),
            "n_params_interval": [_plain(x) for x in self.n_params_interval],
            "probability": _plain(self.probability),
            "cost": _plain(self.cost),
            "cost_interval": [_plain(x) for x in self.cost_interval],
            "saving_vs_llama3": _plain(self.saving_vs_llama3),
            "saving_vs_llama3_interval": [_plain(x) for x in self.saving_interval],
            "expected_regret": _plain(self.expected_regret),
            "runner_up": None if self.runner_up is None else list(self.runner_up),
            "regret_of_runner_up": _plain(self.regret_of_runner_up),
            "not_reached": _plain(self.not_reached),
            "noise_model": self.noise_model,
            "price_of_doubt": _plain(self.price_of_doubt),
            "objective": self.objective,
            "candidates": records(self.candidates),
            "buildable": records(self.buildable),
            "warnings": list(self.warnings),
        }


def search(
    laws: Mapping[Heads, PowerLaw],
    loss: float,
    context_served: int,
    objective: objectives.Objective | None = None,
    *,
    aspect: Aspect | None = None,
    convention: str | costs.Convention = "figures",
    memory_limit: float | Serving | None = None,
    draws: int = 1000,
    seed: int = 0,
    method: str | None = None,
) -> Answer:
    """The heads that reach `loss` at the least cost of serving `context_served` tokens.

    Args:
      laws: of `fit_by_heads`, or of `gqa_jax.presets`.
      loss: L*, nats per token, as in the laws.
      context_served: T of the costs, tokens.
      objective: default `objectives.Z()` with `convention`.
      aspect: d / L of the models as a function of N; default: that of the laws (`LawsByHeads.aspect`).
      convention: of the columns c_infer and m_infer.
      memory_limit: bytes that parameters and cache (bfloat16, one sequence) may take, or the `Serving` whose devices must hold
        them at its batch and precisions; what needs more can't be chosen.
      draws, seed, method: `LawsByHeads.draws`; draws=0 for an answer without probabilities.

    Raises:
      ValueError: a loss that no H reaches by the fitted laws, a limit that none keeps, or a context below 1.
    """
    objective = objective or objectives.Z(convention)
    _check(loss, [context_served])
    table = _Table.of(laws, loss, aspect or _aspect(laws), draws, seed, method)
    rows = table.rows(context_served, objective, convention, memory_limit)
    frame, facts = rows.frame, rows.facts
    if not np.isfinite(frame["cost"]).any():
        raise ValueError(_unreachable(laws, loss, frame, memory_limit))
    best = frame.iloc[0]
    heads = _heads(best)
    runner = frame.iloc[1] if len(frame) > 1 and np.isfinite(frame["cost"].iloc[1]) else None
    drawn = table.known.draws
    without = _without_outliers(laws, loss, context_served, objective, aspect, memory_limit, (draws, seed, method), heads)
    warnings = [
        *_common_warnings(laws),
        *without,
        *_beyond(laws, context_served),
        *table.warnings(heads, best),
        *facts.warnings,
    ]
    return Answer(
        loss=float(loss),
        context_served=int(context_served),
        objective=objective.describe(),
        heads=heads,
        n_params=float(best["n_params"]),
        n_params_interval=(float(best["n_params_low"]), float(best["n_params_high"])),
        probability=float(best["probability"]),
        cost=float(best["cost"]),
        cost_interval=(float(best["cost_low"]), float(best["cost_high"])),
        saving_vs_llama3=float(best["saving_vs_llama3"]),
        saving_interval=facts.saving_interval,
        expected_regret=float(best["expected_regret"]),
        runner_up=None if runner is None else _heads(runner),
        regret_of_runner_up=np.nan if runner is None else float(runner["expected_regret"]),
        not_reached=facts.not_reached,
        noise_model="" if drawn is None else posterior.NOISE_MODELS[drawn.method],
        price_of_doubt=laws.price_of_doubt(loss, draws, seed) if drawn is not None and drawn.method == "posterior" else np.nan,
        candidates=frame,
        buildable=_buildable(laws, heads, float(best["n_params"]), table, context_served, objective),
        warnings=tuple(dict.fromkeys(warnings)),
    )


def optimum_map(
    laws: Mapping[Heads, PowerLaw],
    losses: Sequence[float],
    contexts_served: Sequence[int],
    objective: objectives.Objective | None = None,
    *,
    aspect: Aspect | None = None,
    convention: str | costs.Convention = "figures",
    memory_limit: float | Serving | None = None,
    draws: int = 1000,
    seed: int = 0,
    method: str | None = None,
) -> pd.DataFrame:
    """Every H for every loss and served context: loss, context_served and those of `Answer.candidates`; rank 1 answers.

    Arguments as in `search`; draws=0 leaves out what is uncertain, and ranks by the cost of the fitted laws. A loss that an H
    does not reach gives a row without numbers and with a note.
    """
    objective = objective or objectives.Z(convention)
    aspect = aspect or _aspect(laws)
    frames = []
    for loss in losses:
        _check(loss, contexts_served)
        table = _Table.of(laws, loss, aspect, draws, seed, method)
        for context in contexts_served:
            frame = table.rows(context, objective, convention, memory_limit).frame
            frame.insert(0, "loss", float(loss))
            frame.insert(1, "context_served", int(context))
            frames.append(frame)
    return pd.concat(frames, ignore_index=True)


def best_heads(
    laws: Mapping[Heads, PowerLaw],
    losses: Sequence[float],
    contexts_served: Sequence[int],
    *,
    convention: str = "figures",
    cost: str = "z",
    aspect: Aspect | None = None,
) -> pd.DataFrame:
    """`optimum_map` by the fitted laws alone: without draws, so without probabilities and intervals, and with a column z.

    Raises ValueError for an unknown cost or convention.
    """
    objective = objectives.make(cost, convention=convention)
    frame = optimum_map(laws, losses, contexts_served, objective, aspect=aspect, convention=convention, draws=0)
    frame["z"] = costs.hardware_aware_cost(frame["m_infer"], frame["c_infer"])
    return frame.sort_values(["loss", "context_served", "rank"], ascending=[False, True, True], ignore_index=True)


def convention_sensitivity(
    laws: Mapping[Heads, PowerLaw],
    loss: float,
    context_served: int,
    *,
    aspect: Aspect | None = None,
    draws: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """What the answer under Z would be in every convention for FLOPs and memory: one row each, the paper's figures first.

    Columns: flops, memory ("values", or the bytes of a dtype), n_heads, n_kv_heads, n_params, probability, saving_vs_llama3,
    and regret: how much more the answer of the first row costs in this convention (`regret`).
    """
    rows, first = [], None
    for flops in ("half_T", "full_T", "per_token"):
        for memory in ("values", "bfloat16", "int8 cache"):
            rule = dataclasses.replace(
                costs.named_convention("figures"), flops=flops, memory="values" if memory == "values" else "bytes"
            )
            dtypes = (
                {}
                if memory == "values"
                else {"param_dtype": "bfloat16", "cache_dtype": "int8" if "int8" in memory else "bfloat16"}
            )
            answer = search(
                laws, loss, context_served, objectives.Z(rule, **dtypes), aspect=aspect, convention=rule, draws=draws, seed=seed
            )
            first = first or answer.heads
            own = answer.candidates
            regret_H = regret(own["cost"].fillna(np.inf).to_numpy())
            rows.append(
                {"flops": flops, "memory": memory, **answer.heads._asdict(), "n_params": answer.n_params,
                 "probability": answer.probability, "saving_vs_llama3": answer.saving_vs_llama3,
                 "regret": float(regret_H[[_heads(row) for _, row in own.iterrows()].index(first)])}
            )  # fmt: skip
    return pd.DataFrame(rows).astype({"n_heads": "Int64"})


def regret(cost_H: np.ndarray) -> np.ndarray:
    """What each H costs above the cheapest, relative: cost_(...)xH / the least of them - 1, 10 at most.

    A cost is infinite where the H does not reach the loss or keep the limit of memory. Next to an H that does, its regret is 10
    too: otherwise the few draws in which a size is astronomical would decide, and one far dearer would count for more than one
    that is not possible. nan where no H is possible.
    """
    cost_H = np.asarray(cost_H, np.float64)
    least = cost_H.min(-1, keepdims=True)
    ratio = np.divide(cost_H, least, out=np.full(cost_H.shape, np.nan), where=np.isfinite(least))
    return np.minimum(ratio - 1, formatting.LARGEST_REGRET)


@dataclasses.dataclass(frozen=True)
class Regrets:
    """What each H costs above the cheapest, in every draw."""

    heads: list[Heads]
    regret_SxH: np.ndarray  # of `regret`; nan in draws in which no H reaches the loss
    reached_S: np.ndarray


def regrets(
    laws: Mapping[Heads, PowerLaw],
    loss: float,
    context_served: int,
    objective: objectives.Objective | None = None,
    *,
    aspect: Aspect | None = None,
    convention: str | costs.Convention = "figures",
    memory_limit: float | Serving | None = None,
    draws: int = 1000,
    seed: int = 0,
    method: str | None = None,
) -> Regrets:
    """The regrets that `search` averages, of its candidates. Arguments as there; ValueError where nothing can be drawn."""
    _check(loss, [context_served])
    table = _Table.of(laws, loss, aspect or _aspect(laws), draws, seed, method)
    if table.known.draws is None:
        raise ValueError(f"no draws, so no regrets: {table.known.no_draws or 'plain laws, or draws=0'}")
    fixed = objectives.settled(objective or objectives.Z(convention), table.typical_H, context_served)
    cost = _limited(fixed, table.shape_SxH, context_served, memory_limit)
    own = cost[:, : table.known.n_candidates]
    return Regrets(table.heads[: table.known.n_candidates], regret(own), np.isfinite(own.min(1)))


@dataclasses.dataclass(frozen=True)
class Coefficients:
    """What a search starts from: candidates, then Llama 3's heads where they are known and no candidate."""

    heads: list[Heads]
    n_candidates: int  # the first of `heads`; the rest is only compared with
    entropy_H: np.ndarray  # of the fitted laws; nan for Llama 3's heads where only the draws have them
    log_a_H: np.ndarray
    b_H: np.ndarray
    trained_Hx2: np.ndarray  # least and largest N that the law was fitted to
    draws: Draws | None  # of `heads`, in their order
    no_draws: str | None  # why there are none

    @property
    def baseline(self) -> int | None:
        """Index of Llama 3's heads."""
        return self.heads.index(LLAMA3) if LLAMA3 in self.heads else None


def coefficients(laws: Mapping[Heads, PowerLaw], draws: int = 1000, seed: int = 0, method: str | None = None) -> Coefficients:
    """Coefficients of the fitted laws and their joint draws (none with draws=0, or where no noise is known)."""
    if draws < 0 or draws == 1:
        raise ValueError(f"draws = {draws}: draw 2 or more, or 0 for an answer without probabilities")
    drawn, why = None, None
    if draws and isinstance(laws, LawsByHeads):
        try:
            drawn = laws.draws(draws, seed, method)
        except ValueError as error:
            why = str(error)
    candidates = [h for h in laws if h.n_heads is not None] or list(laws)
    heads = list(candidates)
    if LLAMA3 not in heads and (LLAMA3 in laws or (drawn is not None and LLAMA3 in drawn.heads)):
        heads.append(LLAMA3)

    def each(value: Callable[[PowerLaw], Any], empty: Any = np.nan) -> np.ndarray:
        return np.array([value(laws[h]) if h in laws else empty for h in heads], np.float64)

    return Coefficients(
        heads,
        len(candidates),
        each(lambda law: law.entropy),
        each(lambda law: np.log(law.a)),
        each(lambda law: law.b),
        each(lambda law: (law.params.min(), law.params.max()) if len(law.params) else (np.nan, np.nan), (np.nan, np.nan)),
        None if drawn is None else drawn.take(heads),
        why,
    )


@dataclasses.dataclass(frozen=True)
class _Rows:
    frame: pd.DataFrame
    facts: _Facts


@dataclasses.dataclass(frozen=True)
class _Facts:
    not_reached: float
    saving_interval: tuple[float, float]
    warnings: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class _Table:
    """Shapes of every H (and of Llama 3's, last, where it is no candidate) for one loss, by the fits and by every draw."""

    laws: Mapping[Heads, PowerLaw]
    loss: float
    known: Coefficients
    n_params_H: np.ndarray  # by the fitted laws; inf where no size reaches the loss, nan without a law
    shape_H: costs.Shape
    n_params_SxH: np.ndarray | None
    shape_SxH: costs.Shape | None
    aspect: Aspect

    @classmethod
    def of(
        cls, laws: Mapping[Heads, PowerLaw], loss: float, aspect: Aspect, count: int, seed: int, method: str | None
    ) -> _Table:
        known = coefficients(laws, count, seed, method)
        about = _about(laws)
        n_params = _sizes(loss, known.entropy_H, known.log_a_H, known.b_H)
        shape = shape_search.solve_shape(n_params, known.heads, aspect, *about)
        if (drawn := known.draws) is None:
            return cls(laws, loss, known, n_params, shape, None, None, aspect)
        with np.errstate(over="ignore"):  # draws whose sizes are astronomical
            n_SxH = np.exp(drawn.log_size(loss))
        return cls(
            laws, loss, known, n_params, shape, n_SxH, shape_search.solve_shape(n_SxH, known.heads, aspect, *about), aspect
        )

    @property
    def heads(self) -> list[Heads]:
        return self.known.heads

    @functools.cached_property
    def typical_H(self) -> costs.Shape:
        """`shape_H`, and the middle of the draws where an H has no law of its own: what a layout is chosen by."""
        if self.n_params_SxH is None or not np.isnan(self.n_params_H).any():
            return self.shape_H
        size_H = np.where(np.isnan(self.n_params_H), quantiles(self.n_params_SxH, [0.5])[0], self.n_params_H)
        return shape_search.solve_shape(size_H, self.known.heads, self.aspect, *_about(self.laws))

    def rows(
        self,
        context: int,
        objective: objectives.Objective,
        convention: str | costs.Convention,
        memory_limit: float | Serving | None,
    ) -> _Rows:
        """The candidates at one served context, the answer first."""
        k = self.known.n_candidates
        objective = objectives.settled(objective, self.typical_H, context)
        cost_H = _limited(objective, self.shape_H, context, memory_limit)
        serving = getattr(objective, "serving", None)
        frame = pd.DataFrame([h._asdict() for h in self.heads[:k]]).astype({"n_heads": "Int64", "n_kv_heads": "Int64"})
        finite = np.isfinite(self.n_params_H[:k])

        def known(values: np.ndarray) -> np.ndarray:
            return np.where(finite, np.broadcast_to(values, (len(self.heads),))[:k], np.nan)

        frame["n_params"] = known(self.n_params_H)
        frame["n_layers"], frame["d_model"] = known(self.shape_H.n_layers), known(self.shape_H.d_model)
        frame["c_infer"] = known(costs.infer_flops(self.shape_H, context, convention))
        frame["m_infer"] = known(costs.infer_memory(self.shape_H, context, convention))
        frame["cost"] = known(cost_H)
        frame["pareto"] = _pareto(frame["c_infer"].to_numpy(), frame["m_infer"].to_numpy())
        notes = [self._note(h, n, c, memory_limit) for h, n, c in zip(self.heads, self.n_params_H, cost_H, strict=True)][:k]
        columns = list(CANDIDATES)
        if serving is not None:
            by = objectives.chosen_by(objective)
            for name, values in _served(serving, self.shape_H, context, by).items():
                frame[name] = values[:k]
            notes = [
                note if np.isfinite(c) or not np.isfinite(n) else _why(serving, self.shape_H, i, context, by) or note
                for i, (note, n, c) in enumerate(zip(notes, self.n_params_H[:k], cost_H[:k], strict=True))
            ]
            frame["excess"] = _excess(serving, self.shape_H, context, by)[:k]
            columns += SERVED
        frame["note"] = pd.array(notes, dtype="string")
        facts = self._uncertain(frame, cost_H, context, objective, memory_limit)
        by = "expected_regret" if self.known.draws is not None else "cost"
        keys = frame.assign(hopeless=~np.isfinite(frame["cost"]))
        ranks = ["hopeless", by, "cost", *(["excess"] if serving is not None else [])]
        order = keys.sort_values(ranks, kind="stable").index
        frame = frame.loc[order].reset_index(drop=True)
        frame["rank"] = pd.array(np.arange(1, k + 1), dtype="Int64")
        frame.loc[~np.isfinite(frame["cost"]), "rank"] = pd.NA
        return _Rows(frame.reindex(columns=columns), facts)

    def _uncertain(
        self,
        frame: pd.DataFrame,
        cost_H: np.ndarray,
        context: int,
        objective: objectives.Objective,
        memory_limit: float | Serving | None,
    ) -> _Facts:
        """Adds what the draws say to the candidates."""
        k, baseline = self.known.n_candidates, self.known.baseline
        llama3 = np.nan if baseline is None else cost_H[baseline]
        impossible = baseline is not None and np.isinf(llama3) and np.isfinite(self.n_params_H[baseline])
        if impossible:
            llama3 = np.nan
        for name in ("n_params_low", "n_params_high", "cost_low", "cost_high", "probability", "expected_regret"):
            frame[name] = np.nan
        frame["saving_vs_llama3"] = 1 - frame["cost"] / llama3
        if self.known.draws is None:
            said = (f"no probabilities: {self.known.no_draws}",) if self.known.no_draws else ()
            why = (_impossible(memory_limit),) if impossible else self._llama3_missing(llama3)
            return _Facts(np.nan, (np.nan, np.nan), said + why)
        cost_SxH = _limited(objective, self.shape_SxH, context, memory_limit)
        if baseline is not None and np.isnan(self.n_params_H[baseline]):  # no law of its own: in most draws
            sizes_S, served_S = np.isfinite(self.n_params_SxH[:, baseline]), np.isfinite(cost_SxH[:, baseline])
            impossible = served_S.sum() < 0.5 * sizes_S.sum()
        own = cost_SxH[:, :k]
        least = own.min(1)
        reached = np.isfinite(least)
        tails = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
        frame["n_params_low"], frame["n_params_high"] = quantiles(self.n_params_SxH[:, :k], tails)
        frame["cost_low"], frame["cost_high"] = quantiles(own, tails)
        interval, said, chosen = (np.nan, np.nan), [], 0
        if reached.any():
            frame["probability"] = np.bincount(own[reached].argmin(1), minlength=k) / reached.sum()
            frame["expected_regret"] = regret(own[reached]).mean(0)
            if np.isfinite(frame["cost"]).any():
                chosen = int(frame["expected_regret"].where(np.isfinite(frame["cost"])).idxmin())
        if impossible:
            frame["saving_vs_llama3"] = np.nan
            said.append(_impossible(memory_limit))
        elif baseline is None:
            said += self._llama3_missing(np.nan)
        else:
            with np.errstate(invalid="ignore"):  # neither reaches the loss
                saving_SxH = 1 - own / cost_SxH[:, baseline, None]
            if np.isnan(llama3):  # no law of its own: the middle of the draws
                frame["saving_vs_llama3"] = [float(quantiles(column[~np.isnan(column)], [0.5])[0]) for column in saving_SxH.T]
            interval = tuple(float(x) for x in quantiles(saving_SxH[~np.isnan(saving_SxH[:, chosen]), chosen], tails))
            said += self.known.draws.notes
        share = float(1 - reached.mean())
        if share > 0.005:
            said.append(f"in {share:.0%} of the draws no size of any H reaches the loss: probabilities are of the others")
        return _Facts(share, interval, tuple(said))

    def _llama3_missing(self, cost: float) -> tuple[str, ...]:
        if np.isfinite(cost):
            return ()
        return (
            "no saving against Llama 3's heads (d/d_h,8): no run has them at three sizes, and no head law can be fitted here",
        )

    def _note(self, heads: Heads, n_params: float, cost: float, memory_limit: float | Serving | None) -> str | None:
        law = self.laws.get(heads)
        if law is None:
            return None
        if not np.isfinite(n_params):
            return f"not reached at any size: E = {law.entropy:.4f}"
        if memory_limit is not None and not np.isfinite(cost):
            return f"takes more than {_limit_text(memory_limit)}"
        if not len(law.params):
            return "never trained"
        smallest, largest = law.params.min(), law.params.max()
        if smallest <= n_params <= largest:
            return None
        factor, side = (n_params / largest, "above") if n_params > largest else (smallest / n_params, "below")
        return f"extrapolated: N* is {factor:.2g}x {side} the trained sizes"

    def warnings(self, heads: Heads, row: pd.Series) -> list[str]:
        """What makes this answer doubtful."""
        found = []
        law = self.laws[heads]
        highest = max((one.loss.max() for one in self.laws.values() if len(one.loss)), default=np.inf)
        if self.loss > highest:
            found.append(
                f"a loss of {self.loss:g} is above every measured one (at most {highest:.3f}): smaller than every trained model"
            )
        counts = [h.n_heads for h in self.heads[: self.known.n_candidates] if h.n_heads is not None]
        if len(counts) > 1 and heads.n_heads == max(counts):
            found.append(f"{heads} has the most query heads of those that were trained: with more it may be cheaper still")
        n = row["n_params"]
        if len(law.params) and n > FAR * law.params.max():
            found.append(
                f"N* is {n / law.params.max():.0f} times the largest model of {heads}: this is a guess, not a measurement"
            )
        elif pd.notna(row["note"]):
            found.append(f"{heads}: {row['note']}")
        if np.isfinite(row["n_params_low"]):
            if not row["n_params_low"] <= n <= row["n_params_high"]:
                found.append(
                    f"N* of the curve of {heads} lies outside the interval of the draws, in which the other heads have a say: "
                    "this H does not follow its neighbours"
                )
            if not np.isfinite(row["n_params_high"]):
                found.append("N* is not bounded above: the data allow an E at or above the loss")
        return found


def _served(serving: Serving, shape: costs.Shape, context: int, by: str) -> dict[str, Any]:
    """Columns SERVED: how every H is served; empty where it can't be."""
    load = serving.load(shape, context, by)
    count = np.broadcast_shapes(np.shape(shape.n_layers), np.shape(load.token_seconds))

    def known(values: Any) -> np.ndarray:
        return np.where(np.broadcast_to(load.possible, count), np.broadcast_to(values, count), np.nan)

    usd = serving.usd_per_million(1.0) if serving.has_price else np.nan
    possible = np.broadcast_to(load.possible, count)
    chosen = _each(load.layout, count)
    return {
        "layout": pd.array([str(one) if ok else None for one, ok in zip(chosen, possible, strict=True)], dtype="string"),
        "batch": known(load.batch),
        "memory_bytes": known(load.memory),
        "ttft": known(load.ttft),
        "tpot": known(load.tpot),
        "request_seconds": known(load.request),
        "usd_per_million_input": known(usd * load.input_seconds),
        "usd_per_million_output": known(usd * load.output_seconds),
        "prefill_limit": pd.array(np.broadcast_to(load.prefill.limit, count), dtype="string"),
        "decode_limit": pd.array(np.broadcast_to(load.decode.limit, count), dtype="string"),
        "replication": known(roofline.replication_cost(serving, shape, context, by)),
    }


def _excess(serving: Serving, shape: costs.Shape, context: int, by: str) -> np.ndarray:
    """By what factor every H misses the limit that it misses, in its best layout; 0 where it keeps all, infinite for heads."""
    count = np.shape(shape.n_layers)
    least = np.full(count, np.inf)
    for layout in serving.layouts():
        load = serving.load(shape, context, by, layout)
        over = [0.0, np.inf, np.inf, load.memory / serving.chip.server_bytes]
        over += [
            np.inf if limit is None else value / limit
            for value, limit in ((load.ttft, serving.ttft), (load.tpot, serving.tpot))
        ]
        least = np.fmin(least, np.choose(load.obstacle, [np.broadcast_to(one, count) for one in over]))
    return least


def _each(layout: Layout, count: tuple[int, ...]) -> list[Layout]:
    """The layouts of a row of H, one by one."""
    return [Layout(*map(int, one)) for one in zip(*(np.broadcast_to(values, count) for values in layout), strict=True)]


def _why(serving: Serving, shape: costs.Shape, index: int, context: int, by: str) -> str:
    """Why the H of that index can't be served; empty where it can."""
    fields = {field.name: getattr(shape, field.name) for field in dataclasses.fields(shape)}
    one = costs.Shape(**{name: np.broadcast_to(value, np.shape(shape.n_layers))[index] for name, value in fields.items()})
    if isinstance(serving.parallelism, Layout):
        serving = dataclasses.replace(serving, parallelism=_each(serving.parallelism, np.shape(shape.n_layers))[index])
    return roofline.obstacle_text(serving, one, context, by)


def _about(laws: Mapping[Heads, PowerLaw]) -> tuple[float, float, str]:
    """Head size, vocabulary and convention of sizes."""
    if isinstance(laws, LawsByHeads):
        return laws.head_dim, laws.vocab_size, laws.size_convention
    return 64.0, 50_304.0, "figures"


def _limited(
    objective: objectives.Objective, shape: costs.Shape, context: int, memory_limit: float | Serving | None
) -> np.ndarray:
    """The cost; infinite where a model does not keep the limit, or where no size reaches the loss."""
    with np.errstate(over="ignore"):  # draws whose sizes are astronomical
        cost = np.asarray(objective(shape, context), np.float64)
    cost = np.where(np.isfinite(shape.n_layers), cost, np.where(np.isnan(shape.n_layers), np.nan, np.inf))
    if memory_limit is None:
        return cost
    if isinstance(memory_limit, Serving):
        kept = memory_limit.fits(shape, context)
    else:
        kept = costs.infer_memory(shape, context, "exact") <= memory_limit
    return np.where(kept | np.isnan(cost), cost, np.inf)


def _sizes(loss: float, entropy: np.ndarray, log_a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """N* = a / (L - E)^(1/b); inf where E is not below the loss, nan where there is no law."""
    gap = loss - entropy
    with np.errstate(over="ignore"):
        return np.where(gap <= 0, np.inf, np.exp(log_a - np.log(np.where(gap > 0, gap, 1.0)) / b))


def quantiles(values: np.ndarray, at: Sequence[float]) -> list[np.ndarray]:
    """Quantiles along the first axis by NumPy's linear rule, which between infinite values would give nan; nan of nothing."""
    if not len(values):
        return [np.full(values.shape[1:], np.nan)] * len(at)
    ordered = np.sort(values, 0)
    found = []
    for share in at:
        position = share * (len(ordered) - 1)
        low = ordered[int(np.floor(position))]
        high = ordered[int(np.ceil(position))]
        with np.errstate(invalid="ignore"):
            found.append(np.where(low == high, low, low + (high - low) * (position - np.floor(position))))
    return found


def _pareto(flops: np.ndarray, memory: np.ndarray) -> np.ndarray:
    """Whether no other H needs less of one without more of the other."""
    worse = (flops[None] <= flops[:, None]) & (memory[None] <= memory[:, None])
    strictly = (flops[None] < flops[:, None]) | (memory[None] < memory[:, None])
    return ~(worse & strictly).any(1) & np.isfinite(flops)


def _buildable(
    laws: Mapping[Heads, PowerLaw], heads: Heads, n_params: float, table: _Table, context: int, objective: objectives.Objective
) -> pd.DataFrame:
    """Real models close to the answer, with the loss their size promises and their cost."""
    head_dim, vocab_size, rule = 64, 50_304, "figures"
    if isinstance(laws, LawsByHeads):
        head_dim, vocab_size, rule = int(laws.head_dim), int(laws.vocab_size), laws.size_convention
    unit = 64 if n_params > 1e7 else 16
    rows = []
    if n_params > LARGEST_BUILT:
        return pd.DataFrame(
            columns=["n_layers", "d_model", "n_heads", "n_kv_heads", "head_dim", "d_ff", "n_params", "loss", "cost"]
        )
    for shape in shape_search.buildable(n_params, heads, table.aspect, head_dim, vocab_size, rule, multiple=unit):
        count = costs.count_params(shape, rule).non_embedding
        rows.append(
            {"n_layers": shape.n_layers, "d_model": shape.d_model, "n_heads": shape.n_heads, "n_kv_heads": shape.n_kv_heads,
             "head_dim": shape.head_dim, "d_ff": shape.d_ff, "n_params": count, "loss": float(laws[heads].predict(count)),
             "cost": float(objective(shape, context))}
        )  # fmt: skip
    return pd.DataFrame(rows)


def _aspect(laws: Mapping[Heads, PowerLaw]) -> Aspect:
    return laws.aspect if isinstance(laws, LawsByHeads) else paper_aspect()


def _check(loss: float, contexts: Sequence[int]) -> None:
    if not (np.isfinite(loss) and loss > 0):
        raise ValueError(f"loss = {loss}: must be a number above 0, in nats per token")
    for context in contexts:
        if not (np.isfinite(context) and context >= 1):
            raise ValueError(f"context_served = {context}: must be at least 1 token")


def _without_outliers(
    laws: Mapping[Heads, PowerLaw],
    loss: float,
    context_served: int,
    objective: objectives.Objective,
    aspect: Aspect | None,
    memory_limit: float | Serving | None,
    how: tuple[int, int, str | None],
    heads: Heads,
) -> list[str]:
    """What the answer would be without the runs that lie off their law; nothing where none does."""
    if not isinstance(laws, LawsByHeads) or not laws.doubts.outliers:
        return []
    count = len(laws.doubts.outliers)
    which = "that run" if count == 1 else f"those {count} runs"
    if (others := laws.without_outliers) is None:
        return [f"without {which} too few sizes are left for a law"]
    draws, seed, method = how
    try:
        table = _Table.of(others, loss, aspect or _aspect(laws), draws, seed, method)
        frame = table.rows(context_served, objective, "figures", memory_limit).frame
    except ValueError as error:
        return [f"without {which} there is no answer: {error}"]
    best = frame.iloc[0]
    if not np.isfinite(best["cost"]):
        return [f"without {which} no heads reach this loss"]
    same = "the same heads, " if _heads(best) == heads else ""
    sure = (
        ""
        if np.isnan(best["probability"])
        else f", the cheapest with a probability of {formatting.probability(best['probability'])}"
    )
    return [f"without {which} the answer is {same}{_heads(best)}, N* = {formatting.short(best['n_params'])}{sure}"]


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


def _unreachable(laws: Mapping[Heads, PowerLaw], loss: float, frame: pd.DataFrame, memory_limit: float | Serving | None) -> str:
    least = min(law.entropy for law in laws.values())
    lowest = min((law.loss.min() for law in laws.values() if len(law.loss)), default=np.inf)
    notes = frame.loc[frame["n_params"].notna(), "note"].dropna()
    if loss > least and memory_limit is None and len(notes):
        nearest = f"{_heads(frame.loc[notes.index[0]])} {notes.iloc[0]}"
        return (
            f"no head configuration can be served as asked at a loss of {loss:g}; what comes closest: {nearest}. Allow more "
            "time, other devices, a higher loss, a shorter context or fewer requests at once"
        )
    if loss <= least:
        return (
            f"a loss of {loss:g} can't be reached at any size: the fitted entropy E is {least:.4f}; the lowest measured loss "
            f"is {lowest:.4f}, so ask for {least + 0.25 * (lowest - least):.3f} or more"
        )
    return (
        f"no head configuration reaches a loss of {loss:g} within {_limit_text(memory_limit)} at this context: allow more "
        "memory, a higher loss, a shorter context or a smaller batch"
    )


def _impossible(memory_limit: float | Serving | None) -> str:
    why = "can't be served as asked" if memory_limit is None else f"take more than {_limit_text(memory_limit)}"
    return f"no saving against Llama 3's heads: they {why}"


def _limit_text(memory_limit: float | Serving | None) -> str:
    if isinstance(memory_limit, Serving):
        count, chip = memory_limit.n_devices, memory_limit.chip
        return f"the {formatting.gb(chip.server_bytes)} that a server fills of each of {count} x {chip.name}"
    return f"the {formatting.gb(memory_limit or 0)} of the limit"


def _heads(row: pd.Series) -> Heads:
    return Heads(None if pd.isna(row["n_heads"]) else int(row["n_heads"]), int(row["n_kv_heads"]))


def _plain(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows as plain Python values."""
    return [
        {
            key: None if pd.isna(v) or (isinstance(v, float) and not np.isfinite(v)) else v.item() if hasattr(v, "item") else v
            for key, v in row.items()
        }
        for row in frame.to_dict("records")
    ]
