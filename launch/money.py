"""Dollars of a grid on an engine: what an hour of a cell costs, what was spent, what more would add; and a budget.

Prices are list prices of chips (`gqa_jax.hardware.prices`), spot where the engine asks for spot machines. What a machine costs
before its cell trains (boot, packages, waiting for others) is counted while the machine is there, and not any more afterwards.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

from gqa_jax import hardware
from gqa_jax.errors import ConfigError
from gqa_jax.formatting import counted
from gqa_jax.hardware import Price, prices
from launch import fit as fitting
from launch.cells import Cell
from launch.executors.base import RUNNING, Executor, Rents
from launch.run import Pass
from launch.state import CellState
from launch.training_cells import training


@dataclasses.dataclass(frozen=True)
class Rate:
    """What a cell costs while an engine has machines for it."""

    rents: Rents
    price: Price
    on_demand: Price | None  # of a spot price; None: nobody lists one

    @property
    def usd_per_hour(self) -> float:
        return self.rents.chips * self.price.usd_per_hour

    def said(self) -> str:
        """In words: "$3.92 an hour (16 v5e, Google Cloud TPU v5e, us-west4, spot, 2026-11; on demand $19.20)"."""
        other = ""
        if self.on_demand is not None:
            other = f"; on demand ${self.rents.chips * self.on_demand.usd_per_hour:,.2f}"
        return f"${self.usd_per_hour:,.2f} an hour ({self.rents.chips:g} {self.rents.chip}, {self.price.origin}{other})"


def rate(engine: Executor, whose: str | None = None) -> Rate | None:
    """What a cell costs on this engine; None where its chips, or their price, are not known.

    whose: as in `gqa_jax.hardware.prices.load`; None: the list price in the terms that the engine asks for, of its region where
    there is one. Raises ValueError as `load`.
    """
    if (rents := engine.rents) is None:
        return None
    if whose is not None:
        price = prices.load(whose).get(rents.chip)
    else:
        terms = prices.SPOT if rents.spot else prices.ON_DEMAND
        asked = [f"{rents.region}:{terms}"] if rents.region else []
        price = next((found for words in (*asked, terms) if (found := prices.find(rents.chip, words)) is not None), None)
        price = price or prices.load().get(rents.chip)
    if price is None:
        return None
    other = prices.find(rents.chip, f"{price.region}:{prices.ON_DEMAND}" if price.region else prices.ON_DEMAND)
    return Rate(rents, price, other if price.spot else None)


def table(own: Rate | None, whose: str | None = None) -> dict[str, Price]:
    """Prices by name of the chip, that of an engine's rate as it is there."""
    return prices.load(whose) | ({} if own is None else {own.rents.chip: own.price})


def cost(now: CellState, known: Mapping[str, Price]) -> float | None:
    """US dollars of the devices that a cell has used; without machines that boot or wait. None: no price is known."""
    chip = hardware.chip_of(now.device) if now.device else None
    if chip is None or now.device_seconds is None or chip.name not in known:
        return None
    return max(now.device_seconds, 0.0) / 3600 * known[chip.name].usd_per_hour


def expected(cells: Sequence[Cell], engine: Executor, one: Rate) -> dict[str, float]:
    """US dollars of whole cells by arithmetic, by name; of those that train, where the slice of a cell is known."""
    if engine.slice is None:
        return {}
    found = {}
    for cell in training(cells):
        fit = fitting.estimate(cell, engine.slice)
        if fit.chosen is not None:
            # Of a chip that cells share by the whole one: what they gain by it is not known before it is measured.
            chips = max(one.rents.chips, engine.slice.n_chips)
            found[cell.name] = fitting.expected_seconds(fit) / 3600 * chips * one.price.usd_per_hour
    return found


def billed(now: Pass, one: Rate | None) -> tuple[int, float | None]:
    """How many cells have machines now, and their US dollars an hour."""
    count = sum(job.state == RUNNING for job in now.jobs.values())
    return count, None if one is None else count * one.usd_per_hour


@dataclasses.dataclass(frozen=True)
class Budget:
    """US dollars that a grid may cost, those spent before included.

    A cell is submitted while what was spent, what those that run are expected to add, and what it is expected to cost stay
    within; of a cell of which nothing is known, an hour is counted. Raises ConfigError for what is no budget.
    """

    max_usd: float
    rate: Rate
    expected: Mapping[str, float]  # US dollars of a whole cell, by name

    def __post_init__(self):
        if not (math.isfinite(self.max_usd) and self.max_usd > 0):
            raise ConfigError(f"--max_usd {self.max_usd}: must be US dollars, above 0")

    def spent(self, now: Pass) -> float:
        """US dollars so far, by what cells and the engine say."""
        usd = sum(max(one.device_seconds or 0.0, 0.0) for one in now.states) / 3600 * self.rate.price.usd_per_hour
        ages = {cell.name: one.heartbeat_age for cell, one in zip(now.cells, now.states, strict=True)}
        for job in now.jobs.values():
            if job.state == RUNNING:  # since it was heard of last, or since it is there
                spans = (ages.get(job.cell), None if job.since is None else now.at - job.since)
                unheard = min((span for span in spans if span is not None), default=0.0)
                usd += max(unheard, 0.0) / 3600 * self.rate.usd_per_hour
        return usd

    def is_over(self, now: Pass) -> bool:
        return self.spent(now) >= self.max_usd

    def hold(self, now: Pass, chosen: Sequence[Cell]) -> dict[str, str]:
        """Of the cells that a pass would submit, those that would lead beyond the budget, and why."""
        states = {cell.name: one for cell, one in zip(now.cells, now.states, strict=True)}
        spent = self.spent(now)
        running = sum(self._left(job.cell, states) for job in now.jobs.values())
        held, total = {}, spent + running
        for cell in chosen:
            own = self._left(cell.name, states)
            if total + own > self.max_usd:
                before = f"${spent:,.2f} are spent, ${total - spent:,.2f} expected of those before it"
                held[cell.name] = f"--max_usd {self.max_usd:g}: {before}, ${own:,.2f} of this one"
            else:
                total += own
        return held

    def _left(self, name: str, states: Mapping[str, CellState]) -> float:
        """US dollars that a cell is expected to add."""
        known, now = self.expected.get(name), states.get(name)
        if known is None:
            return self.rate.usd_per_hour
        return known * (1 - min((now.step or 0) / now.steps, 1.0)) if now is not None and now.steps else known

    def over(self, now: Pass) -> str:
        """What is said when it is over."""
        count, _ = billed(now, self.rate)
        return f"--max_usd {self.max_usd:g}: ${self.spent(now):,.2f} are spent: {counted(count, 'cell')} ended, to be resumed"
