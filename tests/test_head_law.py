"""What laws say of heads that no run has: against laws that are left out, and against truths."""

import numpy as np
import pytest

from gqa_jax import laws
from gqa_jax.laws import LLAMA3, Heads, head_law
from gqa_jax.search import presets
from tests import law_tables

PAPER = [(1, 1), (2, 1), (4, 1), (8, 1), (8, 2), (8, 4), (8, 8)]


def without(heads):
    table = presets.paper_losses()
    return laws.fit_by_heads(table[~((table.n_heads.fillna(0) == (heads[0] or 0)) & (table.n_kv_heads == heads[1]))])


def interval(drawn, n_params):
    return np.quantile(drawn.loss(drawn.heads[0], n_params)[:, 0], [0.025, 0.975])


@pytest.mark.parametrize("heads", PAPER)
def test_a_head_configuration_of_the_paper_that_is_left_out_is_within_what_the_others_say(heads):
    said = without(heads).draws_of(*heads)
    for n_params in (1e8, 3e8, 1e9):
        low, high = interval(said, n_params)
        own = float(presets.load("paper")[Heads(*heads)].predict(n_params))
        assert low < own < high, (n_params, low, own, high)
        assert high - low < 0.12, n_params  # (1,1) is the least of all: a doubling outside of the others
        own_low, own_high = np.quantile(presets.load("paper").draws().loss(Heads(*heads), n_params), [0.025, 0.975])
        assert high - low > own_high - own_low  # a law of its own is worth something


def test_runs_of_llama3s_rule_tell_what_many_query_heads_do():
    """Without them (28,8) is two doublings outside, and what the trained heads have in curvature is hardly known."""
    params, width = 9.5e8, 1792
    own = float(presets.load("paper")[LLAMA3].predict(params))
    widths = []
    for one in (presets.load("paper"), without((None, 8))):
        low, high = interval(one.draws_of(width / 64, 8), params)
        assert low < own < high
        widths.append(high - low)
    assert widths[0] < 0.5 * widths[1]


def test_true_losses_are_covered_as_often_as_is_said():
    """Inside, at the edge and a doubling outside of the heads that were trained: 40 random truths."""
    asked = [(4, 2), (16, 4), (16, 16)]
    covered = {heads: [] for heads in asked}
    for seed in range(40):
        entropy, truth = law_tables.truth([*PAPER, *asked], seed)
        trained = {heads: truth[heads] for heads in PAPER}
        generator = np.random.default_rng(seed)
        one = laws.fit_by_heads(law_tables.table(entropy, trained, law_tables.SIZES[1:7], 0.002, generator))
        for heads in asked:
            low, high = interval(one.draws_of(*heads, count=400), 3e8)
            covered[heads].append(low < law_tables.loss(entropy, truth[heads], 3e8) < high)
    for heads, found in covered.items():
        assert np.mean(found) >= 0.9, (heads, np.mean(found))


def test_doubt_grows_with_the_distance():
    one = presets.load("paper")
    widths = [np.diff(interval(one.draws_of(n_heads, 8), 1e9))[0] for n_heads in (32, 64, 128, 256)]
    assert (np.diff(widths) > 0).all()


def test_draws_go_together_with_those_of_the_others():
    one = presets.load("paper")
    drawn, said = one.draws(300, 1), one.draws_of(64, 16, 300, 1)
    assert said.heads == [Heads(64, 16)]
    assert str(said.heads[0]) == "(64,16)"
    np.testing.assert_array_equal(said.entropy_SxH[:, 0], drawn.entropy_SxH[:, 0])
    assert said.bends is drawn.bends
    assert (said.b_SxH[:, 0] >= drawn.bends.least_b_S).all()
    np.testing.assert_array_equal(said.log_a_SxH, one.draws_of(64, 16, 300, 1).log_a_SxH)
    # What two H have in common cancels: with the same E, losses at one size rise and fall together.
    together = np.corrcoef(said.loss(Heads(64, 16), 3e8)[:, 0] - said.entropy_SxH[:, 0], drawn.entropy_SxH[:, 0])[0, 1]
    assert together < -0.8
    assert one.draws_of(9, 3).heads == [Heads(9, 3)]
    assert str(one.draws_of(2.5, 1.25).heads[0]) == "(2.5,1.25)"


def test_heads_with_a_law_have_that_law():
    one = presets.load("paper")
    said = one.draws_of(8, 2)
    assert said.notes == ()
    np.testing.assert_array_equal(said.log_a_SxH[:, 0], one.draws().take([Heads(8, 2)]).log_a_SxH[:, 0])


def test_where_they_are_from_is_said():
    one = presets.load("paper")
    assert one.draws_of(9, 3).notes == ("(9,3): no run has these heads; from the law of heads of 8 configurations",)
    assert one.draws_of(64, 16).notes[0].endswith("configurations, 4 times outside those that were trained")


def test_a_rule_that_has_draws_is_one_of_them():
    paper = presets.load("paper")
    assert paper.draws_of(None, 8).heads == [Heads(None, 8)]
    with pytest.raises(ValueError, match="n_heads = None, n_kv_heads = 4: heads without a law are numbers above 0"):
        paper.draws_of(None, 4)


def test_what_is_not_known_is_refused_with_what_is():
    few = laws.fit_by_heads(law_tables.synthetic(noise=0.002, heads=PAPER[:4]))
    with pytest.raises(head_law.NoHeadLaw, match=r"4 head conf.* needs 5 or more; the closest that has a law is \(8,1\)"):
        few.draws_of(32, 8)
    with pytest.raises(head_law.NoHeadLaw, match=r"heads \(4096,8\) lie 128 times outside.*n_h = 1 to 32 and n_kv = 1 to 8;"):
        presets.load("paper").draws_of(4096, 8)
    with pytest.raises(head_law.NoHeadLaw, match="every H has its own E here"):
        laws.fit_by_heads(presets.paper_losses(), shared_entropy=False).draws_of(64, 16)
    with pytest.raises(ValueError, match="n_heads = 0, n_kv_heads = 1: heads without a law are numbers above 0"):
        presets.load("paper").draws_of(0, 1)


def test_calibrated_curves_have_a_law_of_heads_too():
    """Their draws are refits, which know no pooling."""
    one = presets.load("paper-table4")
    low, high = interval(one.draws_of(24, 8), 1e9)
    between = [float(one[Heads(n, 8)].predict(1e9)) for n in (32, 16)]
    assert between[0] - 0.02 < low < between[0] < between[1] < high < between[1] + 0.02
