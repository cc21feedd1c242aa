"""An answer: which heads and which shape, how sure, against what."""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from gqa_jax import costs
from gqa_jax.laws import LLAMA3, Heads, LawsByHeads, PowerLaw

MEASURED_WITHIN = 0.003  # nats per token: a run this close to the loss asked is the model that savings are against


@dataclasses.dataclass(frozen=True)
class Model:
    """A model that savings are to be against: its own shape, whatever the laws say."""

    label: str
    heads: Heads
    shape: costs.Shape
    loss: float  # nats per token, measured or by the law
    n_params: float  # without embeddings
    measured: bool = False  # a run of these laws
    run: str | None = None  # its name, where it has one


@dataclasses.dataclass(frozen=True)
class Baseline:
    """What savings are against. Without a cost: `note` says why there is none."""

    label: str
    heads: Heads
    measured: bool  # a run of these laws; else what the law of these heads says for the loss asked
    run: str | None
    loss: float
    n_params: float
    n_layers: float
    d_model: float
    c_infer: float  # as in the columns of the candidates
    m_infer: float
    cost: float  # nan where there is none
    cost_interval: tuple[float, float]  # 95% of the draws; the cost twice where no draw changes it
    shape: str = "own"  # of a model; else the rule by which its law's size has a shape
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return _fields(self, ("label", "measured", "run", "shape", "note")) | self.heads._asdict()


@dataclasses.dataclass(frozen=True)
class ShapeChoice:
    """How the shape was chosen, and what is known of its price in loss (`gqa_jax.laws.shape.Penalty`)."""

    rule: str  # best, paper, trained, given, or a number
    ratio: float  # d / L of the answer
    ratio_interval: tuple[float, float]  # 95% of the draws' best; nan where the rule fixes it, or without draws
    bounds: tuple[float, float]
    r0: float  # of the runs: the usual one
    r0_of_sizes: tuple[float, float]  # least and largest
    k: float  # median
    k_interval: tuple[float, float]
    best: float  # c: where loss is least; median
    best_interval: tuple[float, float]
    source: str  # of both, in words

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return _fields(self, ("rule", "source"))


@dataclasses.dataclass(frozen=True, repr=False)
class Answer:
    """The cost-optimal heads and shape for one loss and one served context.

    Costs are of real-valued models of exactly N* parameters; `buildable` are real ones close to the answer that reach the loss.
    Estimates and intervals are of one estimator, the draws: N* is their median, the shape that of least cost at it, and an
    interval holds 95% of the draws. Where there are no draws estimates are the fitted laws', intervals None and nan.
    """

    loss: float
    context_served: int
    objective: dict[str, Any]  # Objective.describe()
    heads: Heads
    n_params: float  # N*, without embeddings
    n_params_interval: tuple[float, float]
    n_layers: float
    d_model: float
    probability: float  # that no other H is cheaper; nan where `far`
    n_candidates: int  # of which it is the cheapest
    cost: float
    cost_interval: tuple[float, float]
    baseline: Baseline | None
    saving: float  # 1 - cost / cost of the baseline
    saving_interval: tuple[float, float]
    saving_memory: float  # the same of the memory and the FLOPs of serving, in the convention of the candidates' columns
    saving_flops: float
    expected_regret: float  # of the answer, relative (`ranking.regret`)
    runner_up: Heads | None
    regret_of_runner_up: float  # expected
    not_reached: float  # share of draws in which no H reaches the loss
    far: float  # how many times N* is beyond the trained sizes, where that is more than 10; else nan
    head_dim: float  # of the laws: d_h
    shape: ShapeChoice
    worth: dict[str, float]  # savings of other heads alone (trained shapes), of the shape alone, of both; nan where unknown
    as_trained: Answer | None  # the same question with the shapes of the trained sizes, where the shape was free
    noise_model: str  # what the intervals rest on, in words; empty where there are none
    price_of_doubt: float  # `LawsByHeads.price_of_doubt`; nan for narrower methods
    candidates: pd.DataFrame  # without probabilities where it is `far`
    buildable: pd.DataFrame
    warnings: tuple[str, ...]

    @property
    def ratio(self) -> float:
        """d / L."""
        return self.d_model / self.n_layers

    def to_frame(self) -> pd.DataFrame:
        """`candidates` and the baseline: role (answer, candidate or baseline) and the columns of the candidates.

        Without shape, probability and regret where a row has no cost.
        """
        frame = self.candidates.copy()
        frame.insert(0, "role", ["answer", *["candidate"] * (len(frame) - 1)])
        frame.loc[~np.isfinite(frame["cost"]), ["n_layers", "d_model", "ratio", "probability", "expected_regret"]] = np.nan
        if (base := self.baseline) is None:
            return frame
        low, high = base.cost_interval
        row = {
            "role": "baseline", "n_heads": base.heads.n_heads, "n_kv_heads": base.heads.n_kv_heads, "n_params": base.n_params,
            "n_layers": base.n_layers, "d_model": base.d_model, "ratio": base.d_model / base.n_layers, "c_infer": base.c_infer,
            "m_infer": base.m_infer, "cost": base.cost, "cost_low": low, "cost_high": high,
            "saving": 0.0 if np.isfinite(base.cost) else np.nan, "pareto": False,
            "note": base.note,
        }  # fmt: skip
        if any((heads or 0) % 1 for heads in base.heads):  # a model of one's own, whose heads are not whole ones of the laws'
            frame = frame.astype(dict.fromkeys(("n_heads", "n_kv_heads"), "Float64"))
        last = pd.DataFrame([row]).reindex(columns=frame.columns).astype(frame.dtypes.to_dict())
        return pd.concat([frame, last], ignore_index=True)

    def summary(self) -> str:
        """The answer in plain words with what it takes for granted, its rows, and what is doubtful about it."""
        from gqa_jax.search import words

        shown = words.shown(self).to_string(index=False)
        return "\n".join([words.headline(self), shown, *(f"warning: {text}" for text in self.warnings)])

    def __repr__(self) -> str:
        from gqa_jax.search import words

        return f"<Answer: {words.headline(self).partition(words.ASSUMED)[0]}>"

    def _repr_html_(self) -> str:
        from gqa_jax.search import words

        warnings = "".join(f"<li>{html.escape(text)}</li>" for text in self.warnings)
        table = words.shown(self).to_html(index=False, border=0)
        return f"<p>{html.escape(words.headline(self))}</p>{table}" + (f"<ul>{warnings}</ul>" if warnings else "")

    def to_dict(self) -> dict[str, Any]:
        """For JSON: plain numbers, None where a number is missing or infinite."""
        own = ("n_params", "n_params_interval", "n_layers", "d_model", "ratio", "probability", "cost", "cost_interval",
               "saving", "saving_interval", "saving_memory", "saving_flops", "expected_regret")  # fmt: skip
        numbers = {name: plain(getattr(self, name)) for name in own}
        brief = ("n_params", "n_layers", "d_model", "ratio", "probability", "cost", "saving")
        trained = self.as_trained
        return {
            "loss": self.loss,
            "context_served": self.context_served,
            **self.heads._asdict(),
            **numbers,
            "n_candidates": self.n_candidates,
            "baseline": None if self.baseline is None else self.baseline.to_dict(),
            "runner_up": None if self.runner_up is None else list(self.runner_up),
            "regret_of_runner_up": plain(self.regret_of_runner_up),
            "not_reached": plain(self.not_reached),
            "far": plain(self.far),
            "shape": self.shape.to_dict(),
            "worth": {name: plain(value) for name, value in self.worth.items()},
            "as_trained": None
            if trained is None
            else trained.heads._asdict() | {name: plain(getattr(trained, name)) for name in brief},
            "noise_model": self.noise_model,
            "price_of_doubt": plain(self.price_of_doubt),
            "objective": self.objective,
            "candidates": records(self.candidates),
            "buildable": records(self.buildable),
            "warnings": list(self.warnings),
        }


def measured_model(laws: Mapping[Heads, PowerLaw], heads: Heads, loss: float) -> Model | None:
    """The run of these heads whose loss is closest to the one asked, where that is within MEASURED_WITHIN; else None.

    Heads that grow with the width are found among runs of any heads that happen to have them.
    """
    rows = laws.rows if isinstance(laws, LawsByHeads) else None
    if rows is None or not {"n_layers", "d_model"} <= {*rows.columns}:
        return None
    rows = rows.dropna(subset=["n_layers", "d_model"]).reset_index(drop=True)
    own = rows["d_model"].astype(float) / laws.head_dim
    n_heads = rows["n_heads"].astype("Float64").fillna(own).astype(float)
    d_model = rows["d_model"].astype(float)
    n_kv = np.where(rows["n_kv_heads"] < 0, n_heads / -rows["n_kv_heads"].astype(float), rows["n_kv_heads"].astype(float))
    has = np.isclose(n_heads, heads.query_heads(d_model, laws.head_dim)) & np.isclose(
        n_kv, heads.kv_heads(d_model, laws.head_dim)
    )
    away = (rows["loss"].astype(float) - loss).abs()
    close = rows[has & (away <= MEASURED_WITHIN)]
    if close.empty:
        return None
    at = away[close.index].idxmin()
    row = rows.loc[at]
    shape = costs.Shape(
        float(row["n_layers"]), float(row["d_model"]), float(n_heads[at]), float(n_kv[at]), laws.head_dim,
        vocab_size=laws.vocab_size,
    )  # fmt: skip
    run = str(row["cell"]) if "cell" in rows and pd.notna(row["cell"]) else None
    return Model(name_of(heads), heads, shape, float(row["loss"]), float(row["params_non_embedding"]), True, run)


def heads_of(row: Mapping[str, Any] | pd.Series) -> Heads:
    """The head configuration of a row with n_heads (empty: d / d_h) and n_kv_heads."""
    return Heads.of(row["n_heads"], row["n_kv_heads"])


def name_of(heads: Heads) -> str:
    """What a baseline is called: Llama 3's heads, or the heads themselves."""
    return "Llama 3's heads" if heads == LLAMA3 else f"heads {heads}"


def plain(value: Any) -> Any:
    """A number, or a tuple of them, for JSON: None where it is missing or infinite."""
    if isinstance(value, tuple):
        return [plain(x) for x in value]
    return float(value) if np.isfinite(value) else None


def _fields(one: Any, words: tuple[str, ...]) -> dict[str, Any]:
    """Fields by name; `words` as they are, numbers plain, heads left to the caller."""
    values = {field.name: getattr(one, field.name) for field in dataclasses.fields(one) if field.name != "heads"}
    return {name: value if name in words else plain(value) for name, value in values.items()}


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows as plain Python values; None where one is missing or infinite."""

    def value(one: Any) -> Any:
        if isinstance(one, list | tuple):
            return [value(each) for each in one]
        one = one.item() if hasattr(one, "item") else one
        return None if pd.isna(one) or (isinstance(one, float) and not np.isfinite(one)) else one

    return [{str(key): value(one) for key, one in row.items()} for row in frame.to_dict("records")]
