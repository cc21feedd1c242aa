"""The benchmark that says how well intervals hold: its truths and noise, what it counts, and, slowly, the bounds themselves."""

import dataclasses
import functools
import json
import math

import numpy as np
import pytest
from scipy import stats

from benchmarks import coverage, coverage_grids, coverage_power
from benchmarks.coverage import Record, Said
from benchmarks.coverage_grids import REGIMES, Bend
from gqa_jax.laws import fit_by_heads
from tests import law_tables

METHOD, AGAINST = "posterior", "independent"
TRUTHS = 40


def exact(one):
    """The same grid without noise."""
    return dataclasses.replace(one, loss_HxM=one.truth.loss(one.params_HxM))


def record(index, covers=1.0, width=1.0, stated=0.9, hit=True, regret=0.0, refused=None):
    """What came out for a truth of two H; the answer is the first, and it is the best one where it hits."""
    said = Said(covers, covers, covers, width, float(math.isinf(width)), np.array([stated, 1 - stated]), 0)
    other = dataclasses.replace(said, width=0.5)
    regret_H = np.array([0.0, 0.3]) if hit else np.array([regret, 0.0])
    rules = dict.fromkeys(coverage.RULES, 0.0)
    said = {} if refused else {METHOD: said, AGAINST: other}
    return Record("clean", index, refused, said, 0 if hit else 1, regret_H, rules, {"fit": 0.1})


@pytest.mark.parametrize("name", REGIMES)
def test_the_size_asked_for_is_where_the_true_law_has_that_loss(name):
    one, regime = coverage_grids.grid(name, 3), REGIMES[name]
    assert one.truth.loss(np.exp(one.log_size_H)) == pytest.approx(one.asked, rel=1e-12)
    middle = len(regime.heads) // 2
    assert np.exp(one.log_size_H[middle]) == pytest.approx(regime.far * one.params_HxM[middle].max(), rel=1e-9)
    with pytest.raises(ValueError, match="is not reached by every H"):
        one.truth.log_size(one.truth.entropy)


def test_sizes_are_counted_as_in_the_papers_figures_and_tables_are_fitted_as_they_are():
    one = coverage_grids.grid("clean", 0)
    for heads, n in zip(coverage_grids.H3, coverage_grids.params(coverage_grids.H3, coverage_grids.W4), strict=True):
        assert n == pytest.approx(law_tables.params(heads, [(d // 64, d) for d in coverage_grids.W4]))
    table = exact(one).table()
    assert table.groupby("d_model")["tokens"].nunique().eq(1).all()
    laws = fit_by_heads(table)
    assert laws.blocks[0].entropy == pytest.approx(one.truth.entropy, abs=1e-6)
    assert [laws[h].b for h in one.truth.heads] == pytest.approx(one.truth.b_H, abs=1e-6)
    assert laws.blocks[0].center == pytest.approx(one.middle)
    assert laws.aspect(1e9) == 64


@pytest.mark.parametrize(("name", "total", "share"), [("half_by_size", 0.004, 0.5), ("most_by_size", 0.0042, 0.9)])
def test_runs_of_a_size_share_the_variance_that_a_regime_says(name, total, share):
    noise, generator = REGIMES[name].noise, np.random.default_rng(0)
    assert noise.shared_share == pytest.approx(share)
    drawn = np.stack([noise.draw((7, 6), generator) for _ in range(4000)])
    assert drawn.std() == pytest.approx(total, rel=0.02)
    within = drawn.var(1, ddof=1).mean()
    assert 1 - within / drawn.var() == pytest.approx(share, abs=0.02)


def test_noise_has_the_tails_and_the_outliers_of_its_regime():
    generator = np.random.default_rng(0)
    drawn = REGIMES["student_t"].noise.draw((100, 1000), generator)
    assert np.quantile(drawn, 0.995) == pytest.approx(0.003 * stats.t.ppf(0.995, 3), rel=0.05)
    grids = [REGIMES["outlier"].noise.draw((7, 6), generator) for _ in range(2000)]
    off = np.array([(grid > 0.03).sum() for grid in grids])
    assert set(off) == {0, 1}
    assert off.mean() == pytest.approx(0.1, abs=0.02)
    assert np.std(REGIMES["clean"].noise.draw((300, 300), generator)) == pytest.approx(0.003, rel=0.02)


def test_bends_change_the_exponent_by_what_a_regime_says():
    for i in range(10):
        one = coverage_grids.grid("drift_3x", i)
        ends = [one.truth.exponent(n) for n in (one.params_HxM.min(), one.params_HxM.max())]
        assert np.abs(ends[1] - ends[0]) == pytest.approx(0.05)
        one = coverage_grids.grid("break_3x", i)
        change = one.truth.exponent(1e15) - one.truth.exponent(1e3)
        assert change == pytest.approx(np.full(7, one.truth.bend.amount))
        assert 0.03 <= abs(change[0]) <= 0.07
        assert one.params_HxM.min() < one.truth.bend.place < one.params_HxM.max()


@pytest.mark.parametrize("bend", [Bend("drift", 0.01, 2e8), Bend("drift", 0.01, 2e8, 1.0), Bend("break", 0.05, 3e8), Bend()])
def test_the_exponent_is_the_slope_of_the_law(bend):
    truth = dataclasses.replace(coverage_grids.grid("clean", 1).truth, bend=bend)
    for n in (3e7, 2.5e8, 3e9):
        low, high = (np.log(truth.loss(np.full(7, n * f)) - truth.entropy) for f in (1 - 1e-5, 1 + 1e-5))
        assert -(high - low) / 2e-5 == pytest.approx(truth.exponent(n), abs=1e-7)


def test_truths_of_the_prior_have_every_bend_and_fall():
    kinds, shared = set(), 0
    for i in range(60):
        generator = np.random.default_rng(i)
        bend, noise = coverage_grids.prior(generator, coverage_grids.H7, coverage_grids.W6)
        kinds.add(bend.kind)
        shared += noise.shared > 0
        assert 0.0015 <= noise.own <= 0.006
    assert kinds == {"none", "drift", "break"}
    assert 15 < shared < 45
    truths = [coverage_grids.grid("prior", i).truth for i in range(100)]  # of some the first that was drawn rises again
    assert min(truth.exponent(n).min() for truth in truths for n in (1e5, 1e12)) > 0.01


def test_simple_rules_find_the_sizes_of_laws_without_noise():
    one = exact(coverage_grids.grid("clean", 2))
    assert np.log(coverage.free_entropy_sizes(one)) == pytest.approx(one.log_size_H, abs=2e-3)
    n, loss = one.params_HxM[0, -2:], one.loss_HxM[0, -2:]
    assert coverage.two_largest_sizes(dataclasses.replace(one, asked=float(loss[0])))[0] == pytest.approx(n[0])
    rising = dataclasses.replace(one, loss_HxM=one.loss_HxM[:, ::-1])
    assert np.isinf(coverage.two_largest_sizes(rising)).all()
    assert np.isinf(coverage.free_entropy_sizes(dataclasses.replace(rising, asked=3.0))).all()
    assert np.isinf(coverage.free_entropy_sizes(dataclasses.replace(one, asked=1.0))).all()
    assert coverage._choice(one, np.full(7, np.inf)) is None


def test_what_a_method_says_is_held_against_the_truth():
    one = coverage_grids.grid("small", 0)
    laws = fit_by_heads(one.table())
    said = coverage.say(laws, one, METHOD, 200, 1)
    log_size = laws.draws(200, 1, METHOD).take(list(one.truth.heads)).log_size(one.asked)
    low, high = np.quantile(log_size, [0.025, 0.975], axis=0)
    assert said.width == pytest.approx(np.median(high - low))
    assert said.covers_size == np.mean((low <= one.log_size_H) & (one.log_size_H <= high)) > 0
    assert said.probability_H.sum() == pytest.approx(1)
    elsewhere = dataclasses.replace(one.truth, entropy=0.1, b_H=one.truth.b_H + 1)
    wrong = coverage.say(laws, dataclasses.replace(one, truth=elsewhere, log_size_H=high + 1e-6), METHOD, 200, 1)
    assert (wrong.covers_size, wrong.covers_entropy, wrong.covers_exponent) == (0, 0, 0)
    assert wrong.width == said.width


def test_results_do_not_depend_on_the_processes():
    lines, task = [], functools.partial(coverage.measure, methods=[AGAINST], draws=50)
    found = coverage.run(task, ["small"], 2, 2, lines.append)["small"]
    assert [one.index for one in found] == [0, 1]
    for i, one in enumerate(found):
        alone = coverage.measure("small", i, [AGAINST], draws=50)
        np.testing.assert_array_equal(one.regret_H, alone.regret_H)
        assert one.said[AGAINST].width == pytest.approx(alone.said[AGAINST].width, rel=1e-9)
    assert not np.array_equal(found[0].regret_H, found[1].regret_H)
    assert lines[-1].startswith("2 of 2 grids")
    assert not np.array_equal(coverage_grids.grid("small", 0, seed=1).loss_HxM, coverage_grids.grid("small", 0).loss_HxM)


def test_a_summary_counts_grids_and_gives_their_intervals():
    records = [record(i, covers=float(i % 4 > 0), hit=i % 2 == 0, regret=0.1) for i in range(100)]
    found = coverage.summary(records, METHOD, AGAINST)
    assert found["covers_size"]["value"] == pytest.approx(0.75)
    spread = 2.576 * math.sqrt(0.75 * 0.25 / 100)
    assert found["covers_size"]["low"] == pytest.approx(0.75 - spread, abs=0.03)
    assert found["covers_size"]["high"] == pytest.approx(0.75 + spread, abs=0.03)
    assert found["width_ratio"] == {"value": 2.0, "low": 2.0, "high": 2.0}
    assert (found["stated"]["value"], found["happened"]["value"]) == (pytest.approx(0.9), 0.5)
    assert found["regret"]["mean"] == pytest.approx(5.0)  # percent points
    assert found["regret"]["error"] == pytest.approx(100 * 0.05 / math.sqrt(99))
    assert [(b["count"], b["happened"]) for b in found["bins"]] == [(100, 0.5), (100, 0.5)]
    refused = coverage.summary([*records, record(100, refused="no law")], METHOD, AGAINST)
    assert (refused["refused"], refused["truths"]) == (1, 101)
    assert refused["covers_size"] == found["covers_size"]
    nothing = coverage.summary([record(0, refused="no law")], METHOD)
    assert coverage.missed({"clean": nothing}) == ["clean: every grid was refused"]
    open_ended = coverage.summary([record(i, width=math.inf) for i in range(4)], METHOD, AGAINST)
    assert math.isinf(open_ended["width"]["value"])
    assert open_ended["unbounded"]["value"] == 1.0


def test_bounds_that_do_not_hold_are_said():
    def sentences(**how):
        good = [record(i, stated=0.95, hit=i % 20 > 0) for i in range(60)]
        return coverage.missed({"clean": coverage.summary([dataclasses.replace(r, **how) for r in good], METHOD, AGAINST)})

    assert sentences() == ["clean: width against independent noise and power laws 2.000 (2.000 to 2.000), wanted at most 1.9"]
    said = record(0).said[METHOD]
    narrow = {METHOD: dataclasses.replace(said, width=0.9, covers_size=0.8), AGAINST: dataclasses.replace(said, width=0.5)}
    found = sentences(said=narrow, rules=dict.fromkeys(coverage.RULES, 0.0), regret_H=np.array([0.01, 0.0]), best=1)
    assert found == [
        "clean: coverage of N* 0.800 (0.800 to 0.800), wanted at least 0.92",
        "clean: stated probability minus what happened 0.900 (0.900 to 0.900), wanted -0.05 to 0.05",
        "clean: regret 1.00 ± 0.00 points above that of free E",
    ]


def test_stated_probabilities_are_binned():
    stated = np.array([[0.97, 0.03], [0.6, 0.4]])
    happened = np.array([[True, False], [False, True]])
    found = coverage.bins(stated, happened)
    assert [(b["from"], b["to"], b["count"], b["stated"], b["happened"]) for b in found] == [
        (0.0, 0.05, 1, pytest.approx(0.03), 0.0),
        (0.2, 0.5, 1, pytest.approx(0.4), 1.0),
        (0.5, 0.8, 1, pytest.approx(0.6), 0.0),
        (0.95, 1.0, 1, pytest.approx(0.97), 1.0),
    ]
    assert coverage.bins(np.array([[1.0, 0.0]]), np.array([[True, False]]))[-1]["count"] == 1


def test_tables_and_json_say_what_was_found():
    good = coverage.summary([record(i, width=math.inf if i else 1.0) for i in range(5)], METHOD, AGAINST)
    text = coverage.markdown({"clean": good, "loud": coverage.summary([record(0, refused="no law")], METHOD)})
    lines = text.splitlines()
    assert lines[2].startswith("| clean: noise 0.003 | 3x | 100.0% (100.0 to 100.0) | 100.0% | 100.0% | inf | inf | 80.0% |")
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert len(tables) == 3
    for table in tables:
        assert len({line.count("|") for line in table}) == 1, table
    assert "1 of 1" in tables[1][-1]
    found = coverage.document(["--truths", "5"], {"truths": 5}, {"clean": good}, 1.5)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["command"] == "python -m benchmarks.coverage --truths 5"
    assert found["regimes"]["clean"]["width"]["value"] is None
    assert found["versions"]["numpy"] == np.__version__


def test_the_test_that_knows_the_form_sees_bends_and_no_others():
    sharp, blunt = [], []
    for i in range(6):
        one = coverage_grids.grid("break_3x", i)
        noise = np.random.default_rng(i).normal(0, 1e-5, one.loss_HxM.shape)
        bent = dataclasses.replace(one, loss_HxM=exact(one).loss_HxM + noise)
        straight = dataclasses.replace(one.truth, bend=Bend())
        flat = dataclasses.replace(one, loss_HxM=straight.loss(one.params_HxM) + noise)
        sharp.append(coverage_power.knows_the_form(fit_by_heads(bent.table()), bent))
        blunt.append(coverage_power.knows_the_form(fit_by_heads(flat.table()), flat))
    assert all(sharp)
    assert sum(blunt) <= 2  # one in twenty is expected
    clean = coverage_grids.grid("clean", 0)
    assert coverage_power.knows_the_form(fit_by_heads(clean.table()), clean) is None


def test_power_is_the_share_of_grids_that_are_doubted():
    fires = iter([True, False, True, True])
    alarms = [coverage_power.alarm("small", i, fires=lambda laws: next(fires)) for i in range(4)]
    found = coverage_power.power(alarms)
    assert (found["fired"]["value"], found["truths"], found["refused"]) == (0.75, 4, 0)
    assert "knows" not in found
    bent = [dataclasses.replace(a, knows=k) for a, k in zip(alarms, (True, True, True, False), strict=True)]
    assert coverage_power.power(bent)["relative"]["value"] == pytest.approx(1.0)
    assert coverage_power.power_markdown({"small": found}).splitlines()[2].startswith("| small: 3 H x 4 sizes | 75.0% (")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--regimes", "claen"], "regime 'claen' is unknown: did you mean 'clean'?"),
        (["--truths", "0"], "--truths 0: must be at least 1"),
        (["--out", "no/such/folder/a.json"], "there is no folder no/such/folder"),
    ],
)
def test_what_cannot_be_asked_is_said_before_anything_runs(arguments, said, capsys):
    with pytest.raises(SystemExit):
        coverage.main(arguments)
    assert said in capsys.readouterr().err


@pytest.mark.thorough
@pytest.mark.parametrize("name", REGIMES)
def test_intervals_and_probabilities_hold(name):
    methods = [METHOD, AGAINST] if name == "clean" else [METHOD]
    records = [coverage.measure(name, i, methods) for i in range(TRUTHS)]
    found = coverage.summary(records, METHOD, AGAINST if name == "clean" else None)
    assert not found["refused"]
    assert not coverage.missed({name: found})


def test_what_bounds_power_is_what_each_test_looks_for():
    found = coverage_power.bound(2000)
    assert all(abs(powers["nothing"] - 0.05) < 0.02 for powers in found.values())
    half, most = coverage_power.SHARED
    assert found["sizes"][most] > found["sizes"][half] > 0.6 > found["drift"][half]
    assert found["drift"]["drift"] > found["sizes or drift"]["drift"] > found["sizes"]["drift"]
    assert found["sizes"][half] > found["sizes or drift"][half]
    assert "| sizes | " in coverage_power.bound_markdown(found)


@pytest.mark.thorough
def test_what_a_fit_says_that_it_could_have_seen_is_seen_in_four_grids_of_five():
    """Deviations that sizes share, and the drift that shows less: losses that fall more slowly are taken for a higher E."""
    quiet = [fit_by_heads(coverage_grids.grid("clean", i).table()).doubts for i in range(20)]
    drift = np.median([doubts.amounts["seen"].iloc[0] for doubts in quiet])
    shared = np.median([doubts.size_effect for doubts in quiet])
    fired = {"drift": 0, "shared": 0}
    for i in range(60):
        one, generator = coverage_grids.grid("clean", i, seed=5), np.random.default_rng(i)
        n, noise = one.params_HxM, one.loss_HxM - one.truth.loss(one.params_HxM)
        amount = -drift / (2 * np.log(n.max() / n.min()))
        bent = dataclasses.replace(one.truth, bend=Bend("drift", amount, reach=np.log(10 * n.max() / 2.5e8)))
        losses = {"drift": bent.loss(n) + noise, "shared": one.loss_HxM + shared * generator.normal(size=(1, n.shape[1]))}
        for name, loss in losses.items():
            fired[name] += fit_by_heads(dataclasses.replace(one, loss_HxM=loss).table()).doubts.fires
    print(drift, shared, fired)
    assert all(0.65 * 60 < count < 0.93 * 60 for count in fired.values())
