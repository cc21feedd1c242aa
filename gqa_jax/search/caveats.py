"""What makes an answer doubtful, and why there is none: every warning and note of `optimum.search`, in sentences."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import pandas as pd

from gqa_jax import formatting
from gqa_jax.laws import LLAMA3, Heads, LawsByHeads, PowerLaw
from gqa_jax.laws.shape import REACH
from gqa_jax.search.answer import heads_of
from gqa_jax.search.candidates import CostAt, Ranked, Table

#: The table of laws without the runs that lie off them, and what is said of the row that answers there (`without_outliers`).
Without = tuple[Callable[[LawsByHeads], Table], Callable[[pd.Series], str]]


def of_laws(laws: Mapping[Heads, PowerLaw]) -> list[str]:
    """What all answers of these laws share: where they are from, and what is doubtful about them."""
    found = [w for law in laws.values() for w in law.warnings]
    if isinstance(laws, LawsByHeads):
        found = ([laws.source] if laws.source else []) + [*laws.warnings, *laws.doubted, *found]
    return list(dict.fromkeys(found))


def without_outliers(
    laws: Mapping[Heads, PowerLaw],
    heads: Heads,
    table_of: Callable[[LawsByHeads], Table],
    more: Callable[[pd.Series], str],
    cost: CostAt,
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
        best = table_of(others).ranked(cost).frame.iloc[0]
    except ValueError as error:
        return [f"without {which} there is no answer: {error}"]
    if not np.isfinite(best["cost"]):
        return [f"without {which} no heads reach this loss"]
    found = heads_of(best)
    same = "the same heads, " if found == heads else ""
    said = f"the answer is {same}{found}, N* = {formatting.short(best['n_params'])}{more(best)}"
    return [f"without {which} {said}"]


def sure(best: pd.Series) -> str:
    """How sure an answer is, where that is known and it is no guess."""
    if np.isnan(best["probability"]):
        return ""
    return f", the cheapest with a probability of {formatting.probability(best['probability'])}"


def of_answer(table: Table, found: Ranked, cost: CostAt, said: Sequence[str]) -> Iterator[str]:
    """What is doubtful about the first of `found`; `said`: of what savings are against."""
    laws, best = table.laws, found.frame.iloc[0]
    if isinstance(laws, LawsByHeads) and cost.context > laws.context:
        yield (
            f"served at {cost.context:,} tokens, trained at {laws.context:,}: that heads compare there as here is taken from "
            "the paper (Section 5.7; gqa_jax.invariance tests it on runs of several contexts)"
        )
    yield from _of_size(table, heads_of(best), best)
    yield from _of_shape(table, best)
    if found.ranking is None and table.known.no_draws:
        yield f"no probabilities: {table.known.no_draws}"
    yield from said
    if found.ranking is not None and (share := found.ranking.not_reached) > 0.005:
        yield f"in {share:.0%} of the draws no size of any H reaches the loss: probabilities are of the others"


def _of_size(table: Table, heads: Heads, row: pd.Series) -> Iterator[str]:
    """Of the loss, the heads and N*."""
    law = table.laws[heads]
    highest = max((one.loss.max() for one in table.laws.values() if len(one.loss)), default=np.inf)
    if table.loss > highest:
        yield f"a loss of {table.loss:g} is above every measured one (at most {highest:.3f}): smaller than every trained model"
    counts = [h.n_heads for h in table.heads[: table.known.n_candidates] if h.n_heads is not None]
    if len(counts) > 1 and heads.n_heads == max(counts):
        yield f"{heads} has the most query heads of those that were trained: with more it may be cheaper still"
    n_params = float(row["n_params"])
    if np.isfinite(far := table.known.far(table.heads.index(heads), n_params)):
        side = "times the largest" if n_params > law.params.max() else "times below the smallest"
        yield f"N* is {formatting.figure(far)} {side} model of {heads}: this is a guess, not a measurement"
    elif pd.notna(row["note"]):
        yield f"{heads}: {row['note']}"
    if not np.isfinite(row["n_params_low"]):
        return
    if not table.follows_its_curve(heads):
        yield (
            f"N* of the curve of {heads} lies outside the interval of the draws, in which the other heads have a say: this H "
            "does not follow its neighbours"
        )
    if not np.isfinite(row["n_params_high"]):
        yield "N* is not bounded above: the data allow an E at or above the loss"


def _of_shape(table: Table, row: pd.Series) -> Iterator[str]:
    """Of d / L."""
    rule, ratio = table.rule, row["ratio"]
    (low, high), by_size = rule.penalty.bounds, rule.penalty.by_size
    if rule.ratios_R is not None and by_size is not None:
        usual = float(by_size(row["n_params"]))
        away = max(ratio / usual, usual / ratio)
        if away > REACH * (1 + 1e-6):
            yield (
                f"d/L = {ratio:.3g} is {formatting.times(away)} away from that of the runs about this N, {usual:.3g}: what "
                "that does to loss is known from no run and no prior"
            )
    if rule.is_free and any(np.isclose(ratio, bound, rtol=1e-6) for bound in (low, high)):
        yield (
            f"d/L = {ratio:.3g} is at the edge of what is looked at ({low:.3g} to {high:.3g}): beyond it nothing is known of "
            "the loss"
        )


def unreachable(table: Table, frame: pd.DataFrame, cost: CostAt) -> str:
    """Why there is no answer, and what to ask for instead."""
    loss, laws = table.loss, [table.laws[h] for h in table.heads[: table.known.n_candidates]]
    least = min(law.entropy for law in laws)
    lowest = min((law.loss.min() for law in laws if len(law.loss)), default=np.inf)
    notes = frame.loc[frame["n_params"].notna(), "note"].dropna()
    if loss > least and cost.limit is None and len(notes):
        nearest = f"{heads_of(frame.loc[notes.index[0]])} {notes.iloc[0]}"
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
        f"no head configuration reaches a loss of {loss:g} within {cost.limit_text} at this context: allow more "
        "memory, a higher loss, a shorter context or a smaller batch"
    )


def no_law_of(heads: Heads) -> str:
    """Why there is no saving against heads that no law has."""
    if heads == LLAMA3:
        return "no saving against Llama 3's heads (d/d_h,8): no run has them at three sizes, and no head law can be fitted here"
    return f"no saving against heads {heads}: they have no law here"


def no_saving(label: str, cost: CostAt, reached: bool) -> str:
    """Why there is no saving against a model without a cost; `reached`: whether some size of it reaches the loss."""
    why = "can't be served as asked" if cost.limit is None else f"take more than {cost.limit_text}"
    return f"no saving against {label}: they {why if reached else 'do not reach this loss'}"
