"""Losses of one held-out text, and under one rule: what they have in common goes into E, and others are refused."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from gqa_jax import laws
from gqa_jax.laws import Heads, validation
from gqa_jax.laws import runs as run_table
from gqa_jax.search import next_runs, optimum
from gqa_jax.search.equal_compute import equal_training_curves
from gqa_jax.search.invariance import context_invariance
from tests import law_tables
from tests.test_laws_loss_nd import table as nd_table
from tests.test_laws_query_heads import SHARED
from tests.test_laws_query_heads import table as query_table

OLD, NEW = "position/first/zero", "hash/spread/one"
TEXT = {"heldout": "1f2e3d4c5b6a/spread/131072", "eval_documents": 5}
SEM = 0.03
HEADS = [(1, 1), (8, 1), (8, 8)]
REACH = stats.t.ppf(0.975, 4) * SEM  # 5 documents


def table(**columns):
    """Runs of three H and six sizes, whose standard errors differ by as much as would make them weights."""
    frame = law_tables.synthetic(noise=0.003, heads=HEADS).assign(rules=NEW, **columns)
    return frame.assign(loss_sem=np.where(np.arange(len(frame)) % 2, SEM * np.sqrt(1.5), SEM * np.sqrt(0.5)))


@pytest.fixture(scope="module")
def alone():
    """The laws of runs that say nothing of their text, nor of errors."""
    return laws.fit_by_heads(table().drop(columns=["loss_sem", "rules"]))


@pytest.fixture(scope="module")
def shared():
    return laws.fit_by_heads(table(**TEXT))


def two_rules(frame):
    """The same runs, every other one under the rules of the first version."""
    return frame.assign(rules=np.where(np.arange(len(frame)) % 2, OLD, NEW))


@pytest.mark.parametrize(
    ("fit", "frame"),
    [
        (laws.fit_by_heads, table()),
        (laws.fit_joint, table()),
        (laws.fit_loss_nd_by_heads, nd_table()),
        (laws.fit_query_heads, query_table(SHARED)),
        (lambda frame: validation.hold_out(frame, "leave_largest_out"), table()),
        (lambda frame: context_invariance(frame, "470M"), query_table(SHARED)),
    ],
)
def test_runs_under_several_rules_are_no_law(fit, frame):
    with pytest.raises(ValueError, match=rf"runs under 2 rules \({NEW}: \d+ runs, {OLD}: \d+ runs\)") as error:
        fit(two_rules(frame))
    assert "--rules old or --rules new" in str(error.value)


def test_rules_that_differ_between_contexts_are_refused_too():
    """Every context alone is under one rule."""
    frame = query_table(SHARED)
    frame = frame.assign(rules=np.where(frame["context"] == 1024, OLD, NEW))
    with pytest.raises(ValueError, match="runs under 2 rules"):
        laws.fit_query_heads(frame)


def test_only_finished_runs_that_say_their_rules_count():
    frame = table()
    bad = frame.iloc[[0]].assign(rules=OLD, status="diverged")
    unknown = frame.assign(rules=frame["rules"].where(np.arange(len(frame)) % 2 == 0))
    expected = laws.fit_by_heads(frame)[8, 1].b
    assert laws.fit_by_heads(pd.concat([frame, bad]))[8, 1].b == expected
    assert laws.fit_by_heads(unknown)[8, 1].b == expected


def test_what_runs_have_in_common_is_no_weight(alone, shared):
    weighted = laws.fit_by_heads(table())
    for heads in HEADS:
        assert (shared[heads].a, shared[heads].b) == (alone[heads].a, alone[heads].b)
    assert weighted[8, 1].b != alone[8, 1].b
    assert shared.sigma == alone.sigma
    assert (alone.shared.sem, weighted.shared.sem) == (0, 0)
    assert shared.shared.sem == pytest.approx(SEM)


def test_it_is_in_the_interval_of_e_in_quadrature_and_in_those_of_a_and_b_not(alone, shared):
    ours, theirs = (one.intervals().iloc[0] for one in (shared, alone))
    for end in ("low", "high"):
        own = ours[f"entropy_{end}"] - ours["entropy"]
        assert abs(own) == pytest.approx(np.hypot(theirs[f"entropy_{end}"] - theirs["entropy"], REACH), rel=1e-6)
    others = [name for name in ours.index if not name.startswith("entropy_")]
    assert ours[others].equals(theirs[others])
    assert shared.blocks[0].entropy_interval(on_this_text=True) == alone.blocks[0].entropy_interval()


def test_it_is_in_the_interval_of_the_size_that_reaches_a_loss(alone, shared):
    loss, heads = 2.7, Heads(8, 1)
    law = shared[heads]
    low, high = shared.size_interval(heads, loss)
    own = alone.size_interval(heads, loss)
    ends = law.solve(loss + REACH), law.solve(loss - REACH)  # of a text that is harder, and easier, by so much
    expected = [np.hypot(np.log(a / law.solve(loss)), np.log(b / law.solve(loss))) for a, b in zip(own, ends, strict=True)]
    assert np.log(law.solve(loss) / low) == pytest.approx(expected[0], rel=1e-6)
    assert np.log(high / law.solve(loss)) == pytest.approx(expected[1], rel=1e-6)
    near = law.entropy + 0.9 * REACH  # another text's E may be above this loss
    assert shared.size_interval(heads, near)[1] == np.inf
    block = shared.blocks[0]
    for kind, at, reach in (("loss", 3e8, REACH), ("amplitude", 3e8, 0.0), ("b", np.nan, 0.0)):
        ours, theirs = block.interval(heads, kind, at), alone.blocks[0].interval(heads, kind, at)
        center = {"loss": law.predict(3e8), "amplitude": law.predict(3e8) - law.entropy, "b": law.b}[kind]
        assert ours[1] - center == pytest.approx(np.hypot(theirs[1] - center, reach), rel=1e-6)


@pytest.mark.parametrize("method", ["posterior", "bootstrap"])
def test_every_draw_has_one_shift_for_all_heads(alone, shared, method):
    ours, theirs = (one.draws(2000, 3, method) for one in (shared, alone))
    shift_SxH = ours.entropy_SxH - theirs.entropy_SxH
    np.testing.assert_allclose(shift_SxH, np.repeat(ours.shift_S[:, None], shift_SxH.shape[1], 1), atol=1e-12)
    assert np.quantile(np.abs(ours.shift_S), 0.95) == pytest.approx(REACH, rel=0.1)
    assert abs(np.median(ours.shift_S)) < 3 * SEM / np.sqrt(2000)
    np.testing.assert_allclose(ours.entropy_on_text_SxH, theirs.entropy_SxH, atol=1e-12)
    np.testing.assert_array_equal(ours.b_SxH, theirs.b_SxH)
    assert (theirs.shift_S == 0).all()


def test_with_an_entropy_for_each_the_shift_is_still_one():
    drawn = laws.fit_by_heads(table(**TEXT), shared_entropy=False).draws(50)
    assert drawn.shift_S.shape == (50,)
    assert drawn.shift_S.std() > 0


def test_sizes_are_less_sure_and_which_heads_are_cheapest_is_not(alone, shared):
    ours, theirs = (optimum.search(one, 2.7, 32_768) for one in (shared, alone))
    assert ours.heads == theirs.heads
    width = [np.log(found.n_params_interval[1] / found.n_params_interval[0]) for found in (ours, theirs)]
    assert width[0] > 1.5 * width[1]
    assert ours.n_params == pytest.approx(theirs.n_params, rel=0.02)  # medians of draws that are spread differently
    assert ours.probability == pytest.approx(theirs.probability, abs=0.02)
    text = f"± {SEM:.4f} nats per token by 5 documents: intervals of E and N* have it; between heads it cancels"
    assert sum(text in warning for warning in ours.warnings) == 1
    assert not any("in common" in warning for warning in theirs.warnings)


def test_bands_are_of_the_text_of_the_runs(alone, shared):
    at = np.geomspace(3e7, 1e9, 5)
    for ours, theirs in zip(shared.band((8, 1), at), alone.band((8, 1), at), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-9)


def test_a_run_to_come_is_evaluated_on_the_same_text(alone, shared):
    """Its loss says nothing of the error in common: what it is worth for which heads are the cheapest is as without."""
    run = [next_runs.Candidate("more", Heads(8, 1), 2e9, 1.0)]
    simulations = [next_runs._Simulation(one, [next_runs.Question(2.7, 32_768)], 1024, 64, 0) for one in (shared, alone)]
    (ours, _), (theirs, _) = (one._losses(run[0]) for one in simulations)
    np.testing.assert_allclose(ours, theirs, atol=1e-12)


def test_what_is_not_known_of_a_text_is_said():
    no_errors = laws.fit_by_heads(table(**TEXT).assign(loss_sem=np.nan, eval_documents=1))
    assert np.isnan(no_errors.shared.sem)
    assert "how far the held-out text is from others is not known by 1 document" in no_errors.warnings[0]
    assert np.isfinite(no_errors.draws(10).entropy_SxH).all()
    assert np.isfinite(no_errors.intervals()["entropy_high"]).all()
    frame = table(**TEXT)
    frame.loc[0, "heldout"] = "other/spread/131072"
    several = laws.fit_by_heads(frame)
    assert several.warnings[1].startswith("runs were evaluated on 2 held-out texts (1f2e3d4c5b6a/spread/131072, other/spread/")
    frame.loc[0, "heldout"] = None  # then nothing is known of what they have in common
    assert laws.fit_by_heads(frame)[8, 1].b == laws.fit_by_heads(table())[8, 1].b
    assert run_table.shared_sem(frame) is None


def test_the_joint_law_has_it_too():
    ours = laws.fit_joint(table(**TEXT))
    theirs = laws.fit_joint(table().drop(columns="loss_sem"))
    assert ours.shared.sem == pytest.approx(SEM)
    np.testing.assert_array_equal(ours.fit.theta, theirs.fit.theta)
    row, plain = ours.intervals().iloc[0], theirs.intervals().iloc[0]
    assert row["high"] - row["value"] == pytest.approx(np.hypot(plain["high"] - plain["value"], REACH), rel=1e-6)
    assert ours.intervals().iloc[1:].equals(theirs.intervals().iloc[1:])
    drawn = ours.draws(200)
    np.testing.assert_allclose(drawn.entropy_SxH - drawn.shift_S[:, None], theirs.draws(200).entropy_SxH, atol=1e-12)
    assert np.quantile(np.abs(drawn.shift_S), 0.5) == pytest.approx(stats.t.ppf(0.75, 4) * SEM, rel=0.2)
    for a, b in zip(ours.band((8, 1), [3e8]), theirs.band((8, 1), [3e8]), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-9)
    assert any("in common" in warning for warning in ours.warnings)


def test_the_law_in_tokens_has_it_too():
    frame = nd_table(noise=0.002).assign(loss_sem=SEM)
    ours, theirs = laws.fit_loss_nd_by_heads(frame.assign(**TEXT)), laws.fit_loss_nd_by_heads(frame)
    (heads, law), plain = next(iter(ours.items())), next(iter(theirs.values()))
    low, high = (one.intervals().loc["E"] for one in (law, plain))
    assert low["high"] - low["value"] == pytest.approx(np.hypot(high["high"] - high["value"], REACH), rel=1e-6)
    assert law.intervals().drop(index="E").equals(plain.intervals().drop(index="E"))
    drawn, bare = ours.draws(300), theirs.draws(300)
    np.testing.assert_allclose(drawn.entropy - drawn.shift, bare.entropy, atol=1e-12)
    assert np.quantile(np.abs(drawn.shift), 0.5) == pytest.approx(stats.t.ppf(0.75, 4) * SEM, rel=0.2)
    curves = [equal_training_curves(one, 1e21, [3e8], draws=300) for one in (ours, theirs)]
    np.testing.assert_allclose(curves[0]["loss_high"], curves[1]["loss_high"], atol=1e-9)
    assert any("in common" in warning for warning in ours.warnings)
    assert heads in theirs
    assert theirs.shared.sem == 0


def test_the_law_in_query_heads_has_it_too():
    frame = query_table(SHARED, noise=0.002)
    frame = frame.assign(loss_sem=np.where(np.arange(len(frame)) % 2, 2 * SEM, SEM))
    ours, theirs = laws.fit_query_heads(frame.assign(**TEXT)), laws.fit_query_heads(frame.drop(columns="loss_sem"))
    common = stats.t.ppf(0.975, 4) * SEM * np.sqrt(2.5)
    row, plain = ours.intervals().iloc[0], theirs.intervals().iloc[0]
    assert row["c_high"] - row["c"] == pytest.approx(np.hypot(plain["c_high"] - plain["c"], common), rel=1e-6)
    curve = next(iter(ours))
    for a, b in zip(ours.band(curve, [2, 16]), theirs.band(curve, [2, 16]), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-9)
    assert any("in common" in warning for warning in ours.warnings)
