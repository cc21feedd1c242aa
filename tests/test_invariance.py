import numpy as np
import pandas as pd
import pytest
from scipy import stats

from gqa_jax.laws.heads import Heads
from gqa_jax.search.invariance import context_invariance, pairs

CONTEXTS = (1024, 2048, 8192, 16384, 32768, 65536, 131072)
GAPS = {(1, 1): 0.04, (8, 1): 0.012}  # fewer parameters first, as in the results


def table(noise=0.0, seed=0, drift=None, contexts=CONTEXTS, gaps=GAPS, **columns):
    """Losses that fall with T alike for all heads; `drift`: of the relative difference, per doubling."""
    rng = np.random.default_rng(seed)
    rows = []
    for context in contexts:
        base = 2.6 + 0.3 * (context / 1024) ** -0.3
        for heads in ((8, 8), *gaps):
            ratio = 1 + gaps.get(heads, 0.0) + (drift or {}).get(heads, 0.0) * np.log2(context / 8192)
            rows.append(
                {"size": "470M", "n_heads": heads[0], "n_kv_heads": heads[1], "context": context, "status": "done"}
                | {"params_non_embedding": 470_000_000 + heads[0], "loss": base * ratio + noise * rng.normal()}
                | columns
            )
    return pd.DataFrame(rows)


def test_differences_are_relative_to_the_baseline_of_the_same_context():
    result = context_invariance(table(), (8, 8))
    frame = result.differences
    assert len(frame) == 2 * len(CONTEXTS)
    for heads, gap in GAPS.items():
        assert frame.loc[frame["model"] == str(Heads(*heads)), "difference"].to_numpy() == pytest.approx(gap)
    assert frame["baseline_loss"].iloc[0] == pytest.approx(2.9)
    assert result.tests["contexts"].tolist() == [5, 5]  # from 8K on
    assert result.tests["mean"].tolist() == pytest.approx(list(GAPS.values()))
    assert result.tests["slope"].tolist() == pytest.approx([0, 0], abs=1e-12)
    assert result.tests["verdict"].tolist() == ["flat", "flat"]
    assert result.verdict.startswith("From 8,192 tokens on, differences to (8,8) are flat within 1.00%")


def test_noise_below_a_percent_leaves_them_flat():
    result = context_invariance(table(noise=0.002), (8, 8))
    assert result.tests["verdict"].tolist() == ["flat", "flat"]
    assert (result.tests["change_low"] < 0).all()
    assert (result.tests["change_high"] > 0).all()
    assert result.noise == pytest.approx(0.002 * np.sqrt(2) / 2.65, rel=0.6)


def test_a_drift_is_found_measured_and_named():
    result = context_invariance(table(noise=0.001, drift={(1, 1): 0.006}), (8, 8))
    row = result.tests.set_index("model").loc["(1,1)"]
    assert row["verdict"] == "not flat"
    assert row["slope_low"] < 0.006 < row["slope_high"]
    assert row["change"] == pytest.approx(4 * row["slope"])
    assert row["p_adjusted"] < 0.01
    assert "are not flat within 1.00%: (1,1) changes by +2." in result.verdict
    assert "(8,1)" not in result.verdict


def test_what_noise_hides_is_left_open():
    result = context_invariance(table(noise=0.02), (8, 8))
    assert result.tests["verdict"].tolist() == ["open", "open"]
    assert "the data leave it open" in result.verdict


def test_a_bump_is_not_flat_although_its_slope_is_zero():
    data = table(noise=1e-5)
    data.loc[(data["context"] == 32768) & (data["n_heads"] == 1), "loss"] *= 1.03
    row = context_invariance(data, (8, 8)).tests.set_index("model").loc["(1,1)"]
    assert row["largest_deviation"] > 0.02
    assert row["verdict"] == "open"


def test_slope_is_that_of_a_regression_and_one_model_has_its_own_degrees_of_freedom():
    data = table(noise=0.002, seed=4, gaps={(1, 1): 0.04})
    result = context_invariance(data, (8, 8))
    frame = result.differences[result.differences["context"] >= 8192]
    line = stats.linregress(np.log2(frame["context"]), frame["difference"])
    row = result.tests.iloc[0]
    assert row["slope"] == pytest.approx(line.slope)
    assert row["p_value"] == pytest.approx(line.pvalue)
    assert row["p_adjusted"] == row["p_value"]
    assert result.dof == 3
    assert row["slope_high"] - row["slope"] == pytest.approx(stats.t.ppf(0.975, 3) * line.stderr)


def test_intervals_of_slopes_cover_and_flat_models_are_not_accused():
    """80 seeded tables of six heads and one noisy baseline: 480 intervals of 95%, and false alarms of all six together."""
    gaps = {(4, 4): 0.0, (4, 1): 0.01, (2, 2): 0.02, (2, 1): 0.03, (1, 1): 0.04, (8, 1): 0.01}
    inside, alarms = [], 0
    for seed in range(80):
        rng = np.random.default_rng(seed)
        data = table(contexts=(8192, 16384, 32768, 65536), gaps=gaps)
        result = context_invariance(data.assign(loss=data["loss"] + 0.004 * rng.normal(size=len(data))), (8, 8), tolerance=1e-9)
        inside += ((result.tests["slope_low"] <= 0) & (result.tests["slope_high"] >= 0)).tolist()
        alarms += (result.tests["verdict"] == "not flat").any()
    assert np.mean(inside) == pytest.approx(0.95, abs=0.04)
    assert alarms / 80 < 0.11


def test_sizes_against_a_size():
    parts = [table().assign(size=size, loss=lambda x, f=f: x["loss"] * f) for size, f in (("680M", 0.97), ("470M", 1.0))]
    data = pd.concat(parts)
    result = context_invariance(data[data["n_kv_heads"] == 8], "470M")
    assert result.differences["model"].unique().tolist() == ["680M"]
    assert result.tests["mean"].tolist() == pytest.approx([-0.03])
    assert "differences to 470M are flat" in result.verdict


def test_standard_errors_come_from_the_runs_where_they_have_them():
    known = context_invariance(table(noise=0.002, loss_sem=0.01), (8, 8)).differences
    ratio = known["loss"] / known["baseline_loss"]
    expected = ratio * 0.01 * np.sqrt(1 / known["loss"] ** 2 + 1 / known["baseline_loss"] ** 2)
    assert known["standard_error"].to_numpy() == pytest.approx(expected.to_numpy())
    unknown = context_invariance(table(noise=0.002), (8, 8))
    assert (unknown.differences["standard_error"] == unknown.noise).all()
    seeds = pd.concat([table(noise=0.002, seed=s).assign(seed=s) for s in range(3)])
    averaged = context_invariance(seeds, (8, 8))
    first = averaged.differences.set_index("model").loc["(8,1)"].iloc[0]
    own = seeds[(seeds["context"] == 1024) & (seeds["n_kv_heads"] == 1) & (seeds["n_heads"] == 8)]["loss"]
    assert first["loss"] == pytest.approx(own.mean())
    assert first["standard_error"] > own.std() / np.sqrt(3) / first["baseline_loss"]


TEXT = {"heldout": "1f2e3d4c5b6a/spread/131072", "loss_sem": 0.03}


def of_one_text(seeds=1, **columns):
    """Runs with names, evaluated on one text, with an error by documents far above their differences."""
    frame = pd.concat([table(noise=0.002, seed=s, seeds=s) for s in range(seeds)], ignore_index=True)
    return frame.assign(cell=[f"run{i}" for i in range(len(frame))], **TEXT | columns)


def paired(data, error, baseline=(8, 8)):
    """As `gqa_jax.differences.load_differences`, whose columns hold empty cells."""
    found = pd.DataFrame(pairs(data, baseline), columns=["cell", "other"])
    return found.assign(standard_error=pd.array([error] * len(found), dtype="Float64"))


def test_differences_of_one_text_have_errors_paired_by_documents():
    data = of_one_text()
    result = context_invariance(data, (8, 8), differences=paired(data, 0.004))
    frame = result.differences
    np.testing.assert_allclose(frame["standard_error"], 0.004 / frame["baseline_loss"])
    assert result.warnings == ()
    other_way = paired(data, 0.004).rename(columns={"cell": "other", "other": "cell"})
    same = context_invariance(data, (8, 8), differences=other_way)
    np.testing.assert_array_equal(same.differences["standard_error"], frame["standard_error"])


def test_pairs_are_those_of_the_same_context():
    data = of_one_text()
    found = pairs(data, (8, 8))
    assert len(found) == 2 * len(CONTEXTS)
    by_name = data.set_index("cell")
    assert all(by_name.loc[a, "context"] == by_name.loc[b, "context"] for a, b in found)
    assert {by_name.loc[b, "n_kv_heads"] for _, b in found} == {8}
    assert pairs(data.drop(columns="cell"), (8, 8)) == []


def test_seeds_add_their_spread_to_the_error_of_the_text_which_they_share():
    data = of_one_text(seeds=3)
    frame = context_invariance(data, (8, 8), differences=paired(data, 0.004)).differences
    row = frame.iloc[0]
    own, base = (
        data[(data["context"] == row["context"]) & (data["n_heads"] == n) & (data["n_kv_heads"] == k)]["loss"]
        for n, k in ((1, 1), (8, 8))
    )
    assert row["model"] == "(1,1)"
    ratio = own.mean() / base.mean()
    spread = ratio * np.hypot(own.std() / np.sqrt(3) / own.mean(), base.std() / np.sqrt(3) / base.mean())
    assert row["standard_error"] == pytest.approx(np.hypot(0.004 / base.mean(), spread))


@pytest.mark.parametrize("differences", [None, "empty", "some"])
def test_without_them_the_errors_of_one_text_are_not_taken_for_independent(differences):
    data = of_one_text()
    given = None if differences is None else paired(data, None if differences == "empty" else 0.004)
    if differences == "some":
        given = given.iloc[:-1]
    result = context_invariance(data, (8, 8), differences=given)
    count = 1 if differences == "some" else 2 * len(CONTEXTS)
    assert (result.differences["standard_error"] == result.noise).sum() == count
    assert result.differences["standard_error"].max() < 0.005  # two errors of 0.03 would be .016
    assert f"{count} of {2 * len(CONTEXTS)} differences are without a paired error by documents" in result.warnings[0]
    seeds = of_one_text(seeds=3)
    frame = context_invariance(seeds, (8, 8)).differences
    assert frame["standard_error"].max() < 0.005
    assert frame["standard_error"].nunique() == len(frame)  # each by its own seeds


def test_what_is_left_out_is_said():
    data = table()
    data.loc[(data["context"] == 65536) & (data["n_kv_heads"] == 8), "status"] = "diverged"
    data.loc[(data["context"] >= 32768) & (data["n_heads"] == 1), "loss"] = np.nan
    result = context_invariance(data, (8, 8))
    text = " ".join(result.warnings)
    assert "their loss diverged" in text
    assert "1 losses left out: the baseline (8,8) has none at T = 65,536" in text
    assert "(1,1) is not tested: it has 2 contexts of 8,192 tokens or more" in text
    assert result.tests["model"].tolist() == ["(8,1)"]


@pytest.mark.parametrize(
    ("change", "arguments", "sentence"),
    [
        (lambda x: x, {"baseline": (4, 4)}, r"baseline \(4,4\) has no finished run: there are \(1,1\), "),
        (lambda x: x, {"baseline": "3M"}, "baseline 3M has no finished run: there are 470M"),
        (
            lambda x: x[x["context"] < 16384],
            {},
            r"needs 3 contexts of 8,192 tokens or more .* there are 1 of \(1,1\), 1 of \(8,1\)",
        ),
        (lambda x: x[x["n_kv_heads"] == 8], {}, "nothing to compare"),
        (lambda x: pd.concat([x, x.assign(size="680M")]), {}, "one size at a time: the table has 470M, 680M"),
        (lambda x: x.assign(status="diverged"), {}, "no finished run"),
        (lambda x: x.drop(columns="context"), {}, "no column context"),
        (lambda x: x, {"tolerance": 0}, "tolerance = 0"),
        (lambda x: x, {"level": 95}, "level = 95"),
    ],
)
def test_errors(change, arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        context_invariance(change(table()), **{"baseline": (8, 8)} | arguments)
