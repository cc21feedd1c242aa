import dataclasses
import warnings

import numpy as np
import pytest
from scipy import optimize

from gqa_jax.laws import Draws, Heads, evidence
from gqa_jax.laws.bends import BREAK, DRIFT, NONE, Bends, shape

CENTER, REACH = 3e8, 2.5
PLACES = np.concatenate([np.linspace(-6, 6, 61), [-400.0, -REACH, REACH, 400.0]])  # of x; a drift ends at its reach


def random_laws(kind, seed=0, count=40, heads=3):
    """Bends of a kind, of both signs, and exponents with which the laws fall everywhere."""
    generator = np.random.default_rng(seed)
    largest = 0.02 if kind == DRIFT else 0.1
    found = Bends(
        CENTER, REACH, np.full(count, kind), generator.uniform(-largest, largest, count), generator.uniform(-3, 3, count)
    )
    b_SxH = found.least_b_S[:, None] + generator.uniform(0.001, 0.3, (count, heads))
    return found, b_SxH


def written_out(kind, amount, place, log_n):
    """q at ln N, by the formulas of the module's docstring."""
    x = log_n - np.log(CENTER)
    if kind == DRIFT:  # beyond the reach the line that touches the parabola
        over = max(abs(x) - REACH, 0.0)
        return amount * (min(abs(x), REACH) ** 2 + 2 * REACH * over)
    return amount / 2 * np.log1p(np.exp(2 * (x - place))) if kind == BREAK else 0.0


@pytest.mark.parametrize("kind", [NONE, DRIFT, BREAK])
def test_the_derivative_is_that_of_the_bend(kind):
    step = 1e-5
    value, slope = shape(PLACES, kind, 0.7, REACH)
    ahead, behind = (shape(PLACES + side, kind, 0.7, REACH)[0] for side in (step, -step))
    np.testing.assert_allclose(slope, (ahead - behind) / (2 * step), atol=2e-5)
    inside = np.abs(PLACES) < 100  # where exp is finite
    expected = [written_out(kind, 1.0, 0.7, np.log(CENTER) + x) for x in PLACES[inside]]
    np.testing.assert_allclose(value[inside], expected, rtol=1e-9, atol=1e-15)


def test_each_draw_has_its_own_kind_at_sizes_of_all_or_of_each():
    kinds, amounts, places = np.array([DRIFT, NONE, BREAK]), np.array([0.01, 5.0, -0.03]), np.array([9.0, 9.0, 0.5])
    three = Bends(CENTER, REACH, kinds, amounts, places)
    log_n = np.log([1e7, CENTER, 1e10, 1e13])
    rows = list(zip(kinds, amounts, places, strict=True))
    expected = [[written_out(*row, x) for x in log_n] for row in rows]
    for given in (log_n[None], np.repeat(log_n[None], 3, axis=0)):
        value, slope = three.at(given)
        np.testing.assert_allclose(value, expected, rtol=1e-9)
        assert slope.shape == (3, 4)
        assert (slope[1] == 0).all()
    np.testing.assert_allclose(
        three.at(np.log([1e7, 1e8, 1e9]))[0], [written_out(*rows[s], np.log(1e7 * 10**s)) for s in range(3)]
    )


@pytest.mark.parametrize("kind", [NONE, DRIFT, BREAK])
def test_laws_that_fall_are_those_that_fall_at_every_size(kind):
    bends, b_SxH = random_laws(kind)
    assert bends.falls(b_SxH).all()
    log_n = np.log(CENTER) + np.linspace(-40, 40, 801)
    least_S = bends.at(log_n[None])[1].min(1) * np.ones(len(b_SxH))
    assert (b_SxH.min(1) + least_S > 0.01).all()
    np.testing.assert_allclose(bends.least_b_S + least_S, 0.01, atol=1e-9)  # no more than that is asked for
    assert not bends.falls(np.column_stack([b_SxH, bends.least_b_S])).any()  # one law of a draw is enough


@pytest.mark.parametrize("kind", [DRIFT, BREAK])
def test_the_size_is_where_the_bent_law_reaches_the_loss(kind):
    """On both sides of the center, and far beyond the reach."""
    bends, b_SxH = random_laws(kind)
    goal_SxH = np.log(CENTER) + np.random.default_rng(1).uniform(-12, 12, b_SxH.shape)
    found = bends.log_size(goal_SxH, b_SxH)
    for s, h in np.ndindex(*b_SxH.shape):
        b, goal, row = b_SxH[s, h], goal_SxH[s, h], (kind, bends.amount_S[s], bends.place_S[s])
        root = optimize.brentq(lambda x, b=b, goal=goal, row=row: b * (x - goal) + written_out(*row, x), -2000, 350, xtol=1e-12)
        assert found[s, h] == pytest.approx(root, abs=1e-9)
    beyond = found - np.log(CENTER)
    assert beyond.min() < -REACH
    assert beyond.max() > REACH
    assert np.abs(found - goal_SxH).max() > 0.1


def test_what_is_not_reached_stays_so_and_nothing_is_warned_of():
    parts = [random_laws(kind, seed=kind) for kind in (NONE, DRIFT, BREAK)]
    bends, b_SxH = evidence.joined([part for part, _ in parts]), np.concatenate([b for _, b in parts])
    goal_SxH = np.full(b_SxH.shape, 20.0)
    goal_SxH[::2, 0], goal_SxH[:, 1], goal_SxH[1::2, 2] = np.inf, 900.0, -np.inf
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with np.errstate(all="raise", under="ignore"):
            found = bends.log_size(goal_SxH, b_SxH)
    np.testing.assert_array_equal(np.isinf(found), np.isinf(goal_SxH))
    np.testing.assert_array_equal(found[np.isinf(goal_SxH)], goal_SxH[np.isinf(goal_SxH)])
    np.testing.assert_array_equal(found[: len(parts[0][1])], goal_SxH[: len(parts[0][1])])  # power laws are left alone


def test_parts_are_joined_and_taken_apart():
    (first, _), (second, _) = random_laws(DRIFT, seed=4, count=5), random_laws(BREAK, seed=5, count=7)
    both = evidence.joined([first, second])
    assert (both.center, both.reach) == (CENTER, REACH)
    for part, rows in ((first, slice(5)), (second, np.arange(5, 12))):
        taken = evidence.taken(both, rows)
        for name in ("kind_S", "amount_S", "place_S"):
            np.testing.assert_array_equal(getattr(taken, name), getattr(part, name))
        assert (taken.center, taken.reach) == (CENTER, REACH)


@pytest.mark.parametrize("kind", [NONE, DRIFT, BREAK])
def test_draws_reach_a_loss_at_the_size_that_they_say(kind):
    bends, b_SxH = random_laws(kind, seed=7, count=60, heads=2)
    generator = np.random.default_rng(8)
    heads, entropy_SxH = [Heads(8, 8), Heads(8, 1)], generator.uniform(1.7, 2.7, (60, 2))
    log_a_SxH = np.log(CENTER) + generator.uniform(-1, 1, (60, 2))
    draws = Draws(heads, entropy_SxH, log_a_SxH, b_SxH, np.full((60, 2), 0.01), "posterior", bends=bends)
    log_n_SxH = draws.log_size(2.6)
    np.testing.assert_array_equal(np.isinf(log_n_SxH), entropy_SxH >= 2.6)
    assert np.isinf(log_n_SxH).any()
    for s, h in zip(*np.nonzero(np.isfinite(log_n_SxH) & (np.abs(log_n_SxH) < 600)), strict=True):
        assert draws.loss(heads[h], np.exp(log_n_SxH[s, h]))[s, 0] == pytest.approx(2.6, abs=1e-9)
    plain = dataclasses.replace(draws, bends=None)
    assert (kind == NONE) == np.array_equal(plain.log_size(2.6), log_n_SxH)
