"""What differs between heads of a size besides the heads: a law by heads takes it for their effect.

Training more of the same model lowers its loss, so heads that saw more tokens look better than they are. Two designs are fair:
all heads of a size see the same tokens, or the same tokens per parameter (at a size N differs by heads). Where neither holds
there is no saying what the heads did, and the table is refused unless its user allows it.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import numpy as np
import pandas as pd

from gqa_jax.formatting import short
from gqa_jax.laws import runs as run_table
from gqa_jax.laws.heads import Heads

TOLERANCE = 1.05  # factor within which tokens, or tokens per parameter, of the heads of a size agree

TOKENS, PER_PARAMETER, BOTH = "equal tokens", "equal tokens per parameter", "equal tokens, and equal tokens per parameter"
NEITHER, UNKNOWN = "neither", "not known"

#: Columns in which heads of a size should agree; those that say how long they were trained are judged by the design.
DATA = ("data_fingerprint", "data", "tokenizer", "vocab_size", "heldout", "rules")
RECIPE = (
    "learning_rate", "batch_tokens", "schedule", "warmup", "warmup_steps", "optimizer", "weight_decay", "init_std", "dtype",
    "n_layers", "d_model", "d_ff", "head_dim",
)  # fmt: skip
SEED = ("seed",)  # chance, not a bias: `fit` shows it, answers don't repeat it
LENGTH = ("tokens", "steps")
CLOSE = 1e-3  # relative difference up to which two numbers of a recipe are one


@dataclasses.dataclass(frozen=True)
class Design:
    """What heads of a size have in common.

    kind: one of the constants above. differences: what else differs between heads of a size, a sentence per column, shown by
    `fit`. warnings: what every answer from these runs has to say. problem: why the runs are no basis for a law by heads; None
    where they are one.
    """

    kind: str
    differences: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    problem: str | None = None

    def __str__(self) -> str:
        at = "" if self.kind in (NEITHER, UNKNOWN) else " for all heads of a size"
        kind = "neither equal tokens nor equal tokens per parameter" if self.kind == NEITHER else self.kind
        found = "; ".join(self.differences) or "nothing that the table has a column for"
        return f"design: {kind}{at}; differs between heads at a size: {found}"


def require(rows: pd.DataFrame, allow: bool = False) -> Design:
    """The design of `runs.usable` rows. Raises ValueError where there is none, unless that is allowed."""
    found = design(rows)
    if found.problem is not None and not allow:
        raise ValueError(
            f"{found.problem}: what looks like an effect of heads may be one of tokens. Train them alike, leave these heads "
            "out, or allow it (allow_confounded=True, on the command line --allow_confounded): every answer will then say so"
        )
    return found


def design(rows: pd.DataFrame) -> Design:
    """The design of `runs.usable` rows of one law; runs are of one size by `runs.size_labels`, and one training context."""
    sizes = _sizes(rows)
    kind, problem, warnings = _kind(rows, sizes)
    said = {name: _difference(rows, sizes, name) for name in (*DATA, *RECIPE, *SEED)}
    if kind in (NEITHER, UNKNOWN):
        said |= {name: _difference(rows, sizes, name, TOLERANCE - 1) for name in LENGTH}
    differences = {name: sentence for name, sentence in said.items() if sentence is not None}
    for name, sentence in differences.items():
        if name not in SEED + LENGTH:
            warnings.append(f"heads of a size differ in more than their heads: {sentence}")
    return Design(kind, tuple(differences.values()), tuple(warnings), problem)


class _Size(NamedTuple):
    """A size at which several heads can be compared, and its rows (positions) of each H."""

    name: str
    rows: dict[Heads, np.ndarray]


def _sizes(rows: pd.DataFrame) -> list[_Size]:
    labels = run_table.size_labels(rows)
    names = run_table.size_names(rows, labels)
    contexts = rows["context"].to_numpy(np.int64) if "context" in rows else np.zeros(len(rows), np.int64)
    frame = rows[["n_heads", "n_kv_heads"]].astype("Int64").reset_index(drop=True)
    found = []
    for (label, _), own in frame.groupby([labels, contexts]):
        by_heads = {Heads.of(*heads): one.index.to_numpy() for heads, one in own.groupby([*own.columns], dropna=False)}
        if len(by_heads) > 1:
            found.append(_Size(names[label], by_heads))
    return found


def _kind(rows: pd.DataFrame, sizes: list[_Size]) -> tuple[str, str | None, list[str]]:
    """The kind of design, what is wrong with it, and what answers have to say of it."""
    tokens = run_table.column(rows, "tokens")
    known = np.isfinite(tokens)
    if not known.any():
        if not sizes:
            return UNKNOWN, None, []
        return UNKNOWN, None, ["whether heads of a size saw as many tokens is not known: the table has no column tokens"]
    said = []
    if not known.all():
        said.append(f"tokens of {int((~known).sum())} of {len(known)} runs are not known: they may have seen more than others")
    ratio = tokens / run_table.column(rows, "params_non_embedding")
    worst_tokens, worst_ratio = (
        max((far for size in sizes for far in _apart(values, known, size).values()), key=lambda far: far.factor, default=None)
        for values in (tokens, ratio)
    )
    if worst_tokens is None or worst_ratio is None:
        kinds = {(True, True): BOTH, (True, False): TOKENS, (False, True): PER_PARAMETER}
        return kinds[worst_tokens is None, worst_ratio is None], None, said
    problem = _problem(tokens, known, worst_tokens, worst_ratio)
    return NEITHER, problem, [*said, f"confounded, and allowed: {problem}; what looks like an effect of heads may be of tokens"]


class _Far(NamedTuple):
    """Heads that are far from the others of their size."""

    size: _Size
    heads: Heads
    own: float
    others: float  # their median
    factor: float  # 1 or more


def _apart(values: np.ndarray, known: np.ndarray, size: _Size) -> dict[Heads, _Far]:
    """Every H of a size against the others, at its least or at its most; none where all agree within TOLERANCE.

    Both the least and the most must agree, so that runs of several token counts are compared too.
    """
    ends = {h: np.sort(values[at[known[at]]])[[0, -1]] for h, at in size.rows.items() if known[at].any()}
    ends_Hx2 = np.array([*ends.values()]).reshape(-1, 2)
    if len(ends) < 2 or (ends_Hx2.max(0) <= TOLERANCE * ends_Hx2.min(0)).all():
        return {}
    found = {}
    for i, (heads, own_2) in enumerate(ends.items()):
        others_2 = np.median(np.delete(ends_Hx2, i, axis=0), axis=0)
        factors_2 = np.maximum(own_2 / others_2, others_2 / own_2)
        end = int(np.argmax(factors_2))
        found[heads] = _Far(size, heads, float(own_2[end]), float(others_2[end]), float(factors_2[end]))
    return found


def _problem(tokens: np.ndarray, known: np.ndarray, worst_tokens: _Far, worst_ratio: _Far) -> str:
    """A sentence on the heads that are farthest from the others."""
    at_ratio, size = _apart(tokens, known, worst_ratio.size).get(worst_ratio.heads), worst_ratio.size.name
    if at_ratio is not None and at_ratio.factor > TOLERANCE:
        return (
            f"heads {worst_ratio.heads} at size {size} saw {short(at_ratio.own)} tokens, other heads there "
            f"{short(at_ratio.others)}: {at_ratio.factor:.3g} times apart, and {worst_ratio.factor:.3g} times per parameter"
        )
    # Tokens agree at some sizes, tokens per parameter at others: no one design.
    return (
        f"heads {worst_tokens.heads} at size {worst_tokens.size.name} saw {short(worst_tokens.own)} tokens, "
        f"other heads there {short(worst_tokens.others)} ({worst_tokens.factor:.3g} times apart), and heads "
        f"{worst_ratio.heads} at size {size} {worst_ratio.own:.3g} per parameter, other heads there {worst_ratio.others:.3g} "
        f"({worst_ratio.factor:.3g} times)"
    )


def _difference(rows: pd.DataFrame, sizes: list[_Size], name: str, close: float = CLOSE) -> str | None:
    """How a column differs between heads of a size, in a sentence; None where it is not there, or does not."""
    if name not in rows or rows[name].isna().all():
        return None
    values, same = rows[name].to_numpy(object), functools.partial(_same, close=close)
    first, count = None, 0
    for size, by_heads in sizes:
        own = {heads: found for heads, at in by_heads.items() if (found := _distinct(values[at], close))}
        one = next(iter(own.values()), [])
        if any(len(one) != len(other) or not all(map(same, one, other)) for other in own.values()):
            first, count = first or (size, own), count + 1
    if first is None:
        return None
    size, own = first
    by_value: dict[str, list[str]] = {}
    for heads, found in own.items():
        by_value.setdefault(", ".join(_text(value) for value in found), []).append(str(heads))
    listed = "; ".join(f"{value} of {_few(heads)}" for value, heads in list(by_value.items())[:3])
    more = f"; {len(by_value) - 3} more" if len(by_value) > 3 else ""
    return f"{name} (at {count} of {len(sizes)} sizes; at {size} {listed}{more})"


def _distinct(values: np.ndarray, close: float) -> list:
    found: list = []
    for value in sorted((value for value in values if not pd.isna(value)), key=lambda value: (str(type(value)), value)):
        if not any(_same(value, other, close) for other in found):
            found.append(value)
    return found


def _same(a: object, b: object, close: float) -> bool:
    if isinstance(a, int | float | np.number) and isinstance(b, int | float | np.number):
        return abs(a - b) <= close * max(abs(a), abs(b))
    return a == b


def _text(value: object) -> str:
    """A value as people write it; large counts with a letter."""
    if isinstance(value, int | float | np.number):
        return short(float(value)) if abs(value) >= 1e6 else f"{value:g}"
    return str(value)


def _few(heads: list[str]) -> str:
    return ", ".join(heads[:3]) + (f" and {len(heads) - 3} more" if len(heads) > 3 else "")
