"""What a report says: the seam between those who find out and the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from gqa_jax.search.answer import Answer


@dataclass(frozen=True)
class Picture:
    """A picture, its title, and what it shows: a sentence, for those who can't see it too."""

    figure: Figure
    title: str
    caption: str


@dataclass(frozen=True)
class Study:
    """One training context: its laws, and what follows from them."""

    laws: Any  # gqa_jax.laws.LawsByHeads
    answer: Answer  # to the question that the page opens with
    objective: Any  # of gqa_jax.search.objectives: what is kept low
    answer_map: Any  # launch.report.answer_map.AnswerMap, which the explorer reads
    optimum_map: pd.DataFrame | None = None  # gqa_jax.search.optimum.optimum_map of losses and contexts served
    sensitivity: pd.DataFrame | None = None  # gqa_jax.search.optimum.convention_sensitivity of that question
    checks: pd.DataFrame | None = None  # gqa_jax.laws.validation.summary: how the laws do on runs that they have not seen
    doubts: Sequence[str] = ()  # what the checks say beside
    pictures: Mapping[str, Sequence[Picture]] = field(default_factory=dict)  # by part of the page: questions, runs, laws, costs

    @property
    def context(self) -> int:
        """Of the training, tokens."""
        return self.laws.context


@dataclass(frozen=True)
class Findings:
    """Everything that a page shows.

    Raises ValueError: no study, because a report begins with an answer.
    """

    name: str  # of the grid, or of the preset
    about: str  # a sentence: which runs, or whose data
    studies: Sequence[Study]  # one per training context; the first answers
    loss: pd.DataFrame  # the loss table (gqa_jax.results.LOSS_COLUMNS)
    cost: pd.DataFrame | None = None  # the cost table (gqa_jax.results.COST_COLUMNS)
    differences: pd.DataFrame | None = None  # every run against the best of its size (launch.studies.to_best)
    cells: pd.DataFrame | None = None  # columns cell, state, cause of the cells that are not done; None: nothing was planned
    unfitted: Mapping[int, str] = field(default_factory=dict)  # training contexts without laws, and why
    ask: str = "python -m launch optimum GRID"  # the command that the explorer completes
    command: str = "python -m launch report GRID"  # that makes this page
    made: str = ""  # when, UTC
    versions: Mapping[str, str] = field(default_factory=dict)  # of what made it: gqa-jax, its commit, python, numpy, scipy

    def __post_init__(self):
        if not self.studies:
            why = "; ".join(f"trained at {context}: {reason}" for context, reason in self.unfitted.items())
            raise ValueError(f"nothing to report: no training context could be fitted{f' ({why})' if why else ''}")
