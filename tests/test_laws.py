import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from scipy import optimize

from gqa_jax import laws
from gqa_jax.search import presets
from tests import law_tables


def table(points, context=8192):
    rows = [
        {"n_heads": h[0], "n_kv_heads": h[1], "params_non_embedding": n, "loss": loss, "status": "done", "context": context}
        for h, values in points.items()
        for n, loss in values
    ]
    return pd.DataFrame(rows)


SIZES = np.array([75e6, 168e6, 315e6, 528e6, 822e6, 1.2e9])
TRUTH = {(8, 8): (2.0e8, 0.19), (8, 1): (2.3e8, 0.17), (1, 1): (4.0e8, 0.16)}


def synthetic(noise=0.0, entropy=1.95):
    rng = np.random.default_rng(0)
    return {h: [(n, (a / n) ** b + entropy + noise * rng.normal()) for n in SIZES] for h, (a, b) in TRUTH.items()}


@pytest.mark.parametrize("shared", [True, False])
def test_recovers_the_truth_without_a_start_value(shared):
    fits = laws.fit_by_heads(table(synthetic()), shared_entropy=shared)
    for heads, (a, b) in TRUTH.items():
        law = fits[heads]
        assert law.a == pytest.approx(a, rel=1e-4)
        assert law.b == pytest.approx(b, rel=1e-4)
        assert law.entropy == pytest.approx(1.95, rel=1e-4)
        assert law.r_squared == pytest.approx(1.0, abs=1e-9)
        assert law.solve(2.615) == pytest.approx(a / (2.615 - 1.95) ** (1 / b), rel=1e-3)
        assert law.predict(law.solve(2.7)) == pytest.approx(2.7)


def test_shared_entropy_is_one_number_and_free_ones_differ_under_noise():
    points = table(synthetic(noise=0.003))
    assert len({law.entropy for law in laws.fit_by_heads(points).values()}) == 1
    assert len({law.entropy for law in laws.fit_by_heads(points, shared_entropy=False).values()}) == 3


@pytest.fixture(scope="module")
def fits():
    return laws.fit_by_heads(table(synthetic(noise=0.003)))


class TestWhatIsShown:
    def test_frame_has_the_intervals_and_what_they_rest_on(self, fits):
        frame = fits.to_frame()
        own = fits.intervals()
        assert frame[["a_low", "b_high", "entropy_low"]].equals(own[["a_low", "b_high", "entropy_low"]])
        assert frame["points"].tolist() == [6, 6, 6]
        assert frame["r_squared"].tolist() == [law.r_squared for law in fits.values()]
        assert set(frame["sigma"]) == {fits.sigma}
        assert str(frame["n_heads"].dtype) == "Int64"
        narrow = fits.to_frame(0.5)
        assert (narrow["b_high"] - narrow["b_low"] < frame["b_high"] - frame["b_low"]).all()

    def test_summary_and_html_say_the_same(self, fits):
        text, html = fits.summary(), fits._repr_html_()
        low, high = fits.block(laws.Heads(8, 1)).interval(laws.Heads(8, 1), "b")
        for said in (f"({low:.4f} to {high:.4f})", f"noise {fits.sigma:.4f} nats", "trained at 8,192 tokens", "(8,1)",
                     "one E for all H", *fits.doubted):  # fmt: skip
            assert said in text
            assert said in html
        assert "<table" in html
        assert "one E for all" not in laws.fit_by_heads(table(synthetic(0.003)), shared_entropy=False).summary()

    def test_of_other_people_s_runs_their_source_is_said(self):
        paper = presets.load("paper")
        assert paper.summary().startswith("preset paper: fitted to 45 losses")
        assert "(d/d_h,8)" in paper.summary()
        assert str(paper.to_frame()["n_heads"].iloc[-1]) == "<NA>"

    def test_one_line_each(self, fits):
        assert repr(fits).startswith("<LawsByHeads: (1,1), (8,1), (8,8); 18 runs trained at 8,192 tokens, noise 0.00")
        assert "\n" not in repr(fits)
        law = laws.PowerLaw(2e8, 0.19, 1.95, 0.9999, SIZES, SIZES)
        assert repr(law) == "<PowerLaw: L(N) = (200M / N)^0.19 + 1.95, R² 0.99990 of 6 points>"

    def test_without_degrees_of_freedom(self):
        few = {h: values[:3] for h, values in synthetic().items()}
        one = laws.fit_by_heads(table({(8, 8): few[8, 8]}))
        assert "noise not known" in repr(one)
        assert "(nan" not in one.summary()


def test_points_of_the_papers_figure_2():
    """(8,8), read off arXiv 2503.09579 Figure 2 (error about 0.003): b = 0.228, E = 2.13, R^2 = 0.99985 with its own E."""
    points = {(8, 8): [(75497472, 3.1188), (167772160, 2.9518), (314572800, 2.8455), (528482304, 2.7604)]}
    law = laws.fit_by_heads(table(points), shared_entropy=False)[8, 8]
    assert law.r_squared > 0.999
    assert 0.1 < law.b < 0.3
    assert law.predict(314572800) == pytest.approx(2.8455, abs=0.01)


def test_no_answer_is_given_where_there_is_none():
    points = synthetic()
    with pytest.raises(ValueError, match="one training context at a time"):
        laws.fit_by_heads(pd.concat([table(points), table(points, context=1024)]))
    with pytest.raises(ValueError, match=r"heads \(8,8\): 2 sizes have finished, a law needs 3"):
        laws.fit_by_heads(table({(8, 8): points[8, 8][:2]}))
    with pytest.raises(ValueError, match="no finished run"):
        laws.fit_by_heads(table(points).assign(status="diverged"))
    with pytest.raises(ValueError, match="do not fall with size"):
        laws.fit_by_heads(table({(8, 8): [(n, 3.0 + 0.01 * i) for i, n in enumerate(SIZES)]}))
    law = laws.fit_by_heads(table(points))[8, 8]
    with pytest.raises(ValueError, match=r"a loss of 1.9 can't be reached: the fitted entropy E is 1.95"):
        law.solve(1.9)


def test_diverged_rows_are_left_out():
    points = table(synthetic())
    bad = points.iloc[[0]].assign(loss=99.0, status="diverged")
    assert laws.fit_by_heads(pd.concat([points, bad]))[8, 8].a == pytest.approx(2.0e8, rel=1e-4)


def test_warns_of_exact_fits_and_narrow_sizes():
    points = {(8, 8): synthetic()[8, 8][:3]}
    text = " ".join(laws.fit_by_heads(table(points))[8, 8].warnings)
    assert "R^2 = 1 says nothing" in text
    assert "span a factor of 4.2 only" in text


def test_sizes_too_close_to_each_other_give_no_law():
    points = {(8, 8): [(n, 2.0 + (1e8 / n) ** 0.2) for n in (1e8, 2e8, 3e8)]}
    with pytest.raises(ValueError, match=r"heads \(8,8\): sizes span a factor of 3.0, a law needs 4 or more"):
        laws.fit_by_heads(table(points))


# Poor laws


def said_of(fits):
    return [w for law in fits.values() for w in law.warnings if "poor law" in w]


@pytest.mark.parametrize("shared", [True, False])
def test_laws_that_do_not_describe_their_runs_are_called_poor(shared):
    rates = 0.05 * np.array([3.0, -2, 1, -3, 2, -1])
    points = {h: [(n, loss + rate) for (n, loss), rate in zip(runs, rates, strict=True)] for h, runs in synthetic().items()}
    said = said_of(laws.fit_by_heads(table(points), shared))
    assert len(said) == 3
    assert all("residuals of ln L are 3." in w and "at the largest N by" in w for w in said)
    assert (said[0] == said[1]) == shared
    assert said[0].startswith("poor law" if shared else "heads (1,1): poor law")


def test_sound_laws_are_not_called_poor():
    for seed in range(20):
        assert not said_of(laws.fit_by_heads(law_tables.synthetic(0.002, seed, random_truth=True)))
        assert not said_of(laws.fit_by_heads(law_tables.synthetic(0.002, seed, random_truth=True), shared_entropy=False))
    for delta in (None, 1e-3):
        assert not said_of(laws.fit_by_heads(presets.paper_losses(), huber_delta=delta))
    assert not any("poor" in w for w in laws.fit_joint(presets.paper_losses()).warnings)


def test_a_joint_law_that_does_not_describe_its_runs_is_called_poor():
    rows = law_tables.synthetic(0.02)
    law = laws.fit_joint(rows)
    (said,) = (w for w in law.warnings if "poor law" in w)
    assert "residuals of ln L are 1." in said or "residuals of ln L are 2." in said
    assert not any("poor law" in w for w in laws.fit_joint(law_tables.synthetic(0.003)).warnings)


# Huber's loss


def spoilt(points, by=0.05):
    """A table with one run that is off by so many nats."""
    rows = table(points)
    rows.loc[rows.index[7], "loss"] += by
    return rows


@pytest.mark.parametrize("delta", [1e-4, 1e-3, 0.003, 0.1])
@pytest.mark.parametrize("options", [{}, {"shared_entropy": False}, {"entropy": 1.9}, {"log": True}])
@pytest.mark.parametrize("by", [0.0, 0.05])
def test_both_routes_to_hubers_minimum_agree(delta, options, by):
    fits = laws.fit_by_heads(spoilt(synthetic(0.002), by), huber_delta=delta, **options)
    assert fits.status == "CONVERGED"


def test_hubers_answer_is_near_the_one_without_the_outlier():
    good, bad = table(synthetic(0.001)), spoilt(synthetic(0.001))
    clean, squares, huber = laws.fit_by_heads(good), laws.fit_by_heads(bad), laws.fit_by_heads(bad, huber_delta=1e-3)

    def away(fits):
        return max(abs(np.log(law.solve(2.7) / clean[heads].solve(2.7))) for heads, law in fits.items())

    assert away(squares) > 0.04
    assert away(huber) < 0.01
    assert squares.sigma > 4 * huber.sigma
    widths = [np.log(np.divide(*one.size_interval(laws.Heads(8, 1), 2.7)[::-1])) for one in (clean, huber, squares)]
    assert widths[0] < widths[1] < widths[2] / 3  # of squares with the last weights: the outlier counts as delta |residual|


@pytest.mark.parametrize("delta", [3e-4, 0.003])
@pytest.mark.parametrize("by", [0.0, 0.05, 0.5])
def test_no_huber_minimum_of_many_starts_is_deeper(delta, by):
    rows = spoilt(synthetic(0.002), by)
    fits = laws.fit_by_heads(rows, huber_delta=delta)
    group = [list(TRUTH).index(heads) for heads in zip(rows["n_heads"], rows["n_kv_heads"], strict=True)]
    x, y = np.log(rows["params_non_embedding"].to_numpy() / 3e8), rows["loss"].to_numpy()

    def residual(theta):
        return theta[0] + np.exp(theta[1:4][group] - theta[4:][group] * x) - y

    def total(r):
        return np.sum(np.where(np.abs(r) <= delta, r**2, 2 * delta * np.abs(r) - delta**2))

    best = np.concatenate(
        [[fits[8, 1].entropy], *np.transpose([(law.b * np.log(law.a / 3e8), law.b) for law in map(fits.get, TRUTH)])]
    )
    starts = [best * (1 + 0.02 * np.random.default_rng(seed).normal(size=7)) for seed in range(4)]
    starts += [np.array([e, *[np.log(2.9 - e)] * 3, *[0.2] * 3]) for e in (1.0, 1.8, 2.2)]
    limits = ([0, *[-np.inf] * 6], [y.min(), *[np.inf] * 6])
    found = [
        optimize.least_squares(residual, start, bounds=limits, loss="huber", f_scale=delta, xtol=1e-14, ftol=1e-14, gtol=1e-14)
        for start in starts
    ]
    assert total(residual(best)) <= min(2 * one.cost for one in found) * (1 + 1e-7)
    assert total(residual(best)) == pytest.approx(min(2 * one.cost for one in found), rel=1e-3)


# The core and what stands beside it

CORE = {"law", "heads", "checks", "runs", "fitting", "block", "shape", "by_heads", "posterior"}


def test_the_core_imports_no_further_law_and_nothing_that_an_answer_can_do_without():
    code = "import sys, gqa_jax.laws; print(*(n.removeprefix('gqa_jax.laws.') for n in sys.modules if 'gqa_jax.laws.' in n))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert set(found) == CORE


def test_further_laws_are_found_under_the_name_of_the_package():
    for module, names in laws.FURTHER.items():
        for name in names:
            assert getattr(laws, name).__module__ == f"gqa_jax.laws.{module}"
            assert name in dir(laws)
    with pytest.raises(AttributeError, match="has no attribute 'fit_nothing'"):
        _ = laws.fit_nothing
    with pytest.raises(ImportError):
        from gqa_jax.laws import fit_nothing  # noqa: F401
