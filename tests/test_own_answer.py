"""A model that somebody has against the laws: its target is the law's for it in every draw, its own shape is what costs."""

import dataclasses
import json

import numpy as np
import pytest

from gqa_jax import costs, laws
from gqa_jax.costs import Shape
from gqa_jax.laws import LLAMA3, Heads, head_law
from gqa_jax.search import objectives, optimum, own_model, presets
from gqa_jax.search.own_answer import compare_own
from gqa_jax.search.own_model import PUBLIC, OwnModel
from gqa_jax.search.roofline import RooflineServing
from launch.__main__ import main
from tests import law_tables

CONTEXT = 131_072


def paper():
    return presets.load("paper")


def model(layers=24, d=1536, heads=8, kv=1, head_dim=64, d_ff=None, vocabulary=50_304, untied=False):
    return OwnModel(
        "mine", Shape(layers, d, heads, kv, head_dim, 8 * d / 3 if d_ff is None else d_ff, vocabulary), untied, "here"
    )


def test_a_model_of_the_laws_own_kind_is_met_by_itself():
    """Its heads at its own d / L have its own N and cost in every draw: nothing is saved, nothing lost."""
    own = model()
    found = compare_own(paper(), own, CONTEXT, aspect=64, heads=[Heads(8, 1)])
    assert found.heads == Heads(8, 1)
    assert found.source == "their own law"
    answer = found.answer
    assert answer.n_params == pytest.approx(own.n_params("figures"), rel=1e-6)
    assert answer.n_params_interval == pytest.approx((answer.n_params, answer.n_params), rel=1e-6)
    assert (answer.n_layers, answer.d_model) == pytest.approx((24, 1536), rel=1e-6)
    assert answer.saving == pytest.approx(0, abs=1e-6)
    assert found.above == pytest.approx(0, abs=1e-6)
    assert (found.kept.n_params, found.kept.above) == pytest.approx((own.n_params("figures"), 0), abs=1e-3)
    base = answer.baseline
    assert (base.label, base.measured, base.n_layers, base.d_model) == ("your model mine", False, 24, 1536)
    assert base.cost == pytest.approx(objectives.Z("figures")(own.shape, CONTEXT))


def test_what_all_laws_have_in_common_cancels():
    """E moves the target as it moves every law: beyond the data N* is far surer than for a loss that is given."""
    own = model(60, 3840, heads=8, kv=4)
    found = compare_own(paper(), own, CONTEXT)
    given = optimum.search(paper(), found.loss, CONTEXT)

    def width(interval):
        return np.log(interval[1] / interval[0])

    assert width(found.answer.n_params_interval) < 0.6 * width(given.n_params_interval)
    assert found.answer.n_params == pytest.approx(given.n_params, rel=0.1)
    low, high = found.loss_interval
    assert low < found.loss < high
    assert found.loss == pytest.approx(float(paper()[Heads(8, 4)].predict(found.n_params)), abs=0.02)


def test_its_shape_is_part_of_its_target():
    """At another d / L the same N is worth less, so that less has to be reached."""
    found = {layers: compare_own(paper(), model(layers, d), CONTEXT) for layers, d in ((24, 1536), (60, 970), (9, 2500))}
    middle = found[24]
    for layers in (60, 9):
        factor = paper().penalty.factor(paper().penalty.typical, found[layers].ratio)
        assert factor > 1.003
        expected = float(paper()[Heads(8, 1)].predict(found[layers].n_params)) * factor
        assert found[layers].loss == pytest.approx(expected, abs=0.006)
    assert "its d/L = 16.2 is outside 32 to 128" in " ".join(found[60].notes)
    assert "outside" not in " ".join(middle.notes)


def test_llama3s_rule_is_the_law_of_its_heads_where_they_fill_the_width():
    found = compare_own(paper(), PUBLIC["llama-3.2-1b"], CONTEXT)
    assert found.heads == LLAMA3
    assert found.source == "their own law, heads that grow with the width: 32 of 64 at 2048"
    answer = found.answer
    assert answer.heads != LLAMA3
    assert answer.probability > 0.95
    assert 0.15 < answer.saving_interval[0] < answer.saving < answer.saving_interval[1] < 0.4
    assert 1 / (1 - answer.saving) - 1 == pytest.approx(found.above)
    assert found.above_interval[0] < found.above < found.above_interval[1]
    assert found.kept.probability == 0
    narrower = dataclasses.replace(PUBLIC["llama-3.2-1b"].shape, d_model=1920)  # heads no longer fill it
    other = compare_own(paper(), OwnModel("n", narrower, False, ""), CONTEXT)
    assert other.heads == Heads(32, 8)
    assert other.source.startswith("(32,8): no run has these heads")


def test_heads_of_another_size_and_that_no_run_has():
    found = compare_own(paper(), PUBLIC["llama-3.1-8b"], CONTEXT)
    assert found.heads == Heads(64, 16)
    text = " ".join(found.sentences())
    assert "32 and 8 of 128 are taken as (64,16) of 64, which are as wide" in text
    assert "4 times outside those that were trained" in text
    assert "nothing is said of the loss that the published model has" in text
    assert "feed-forward network is 3.5 d wide" in text
    inside = compare_own(paper(), PUBLIC["llama-3.2-1b"], CONTEXT)
    assert np.diff(found.above_interval) > 3 * np.diff(inside.above_interval)  # the doubt of the law of heads
    assert "between" in found.sentences()[2]  # 95% hold more and less


def test_heads_that_are_no_whole_ones_of_the_laws():
    found = compare_own(paper(), model(heads=16, kv=1, head_dim=96), CONTEXT, draws=100)
    assert found.heads == Heads(24, 1.5)
    assert np.isfinite(found.kept.cost)
    frame = found.answer.to_frame()
    assert list(frame.iloc[-1][["n_heads", "n_kv_heads"]]) == [24, 1.5]
    assert str(compare_own(paper(), model(), CONTEXT, draws=100).answer.to_frame()["n_kv_heads"].dtype) == "Int64"


def test_keeping_its_heads_goes_with_the_draws_of_the_answer():
    found = compare_own(paper(), PUBLIC["smollm2-135m"], CONTEXT)
    kept = found.kept
    assert kept.saving_interval[0] < kept.saving < kept.saving_interval[1]
    assert kept.above_interval[0] < kept.above < kept.above_interval[1]
    assert kept.cost == pytest.approx(found.answer.cost * (1 + kept.above))
    assert kept.saving == pytest.approx(1 - kept.cost / found.answer.baseline.cost)
    assert 32 <= kept.ratio <= 128.000001
    assert found.ratio == pytest.approx(19.2)
    assert kept.probability < 0.05
    own = compare_own(paper(), model(heads=8, kv=1), CONTEXT)  # the heads that are the answer
    assert own.answer.heads == own.heads
    assert own.kept.above == pytest.approx(0, abs=1e-9)
    assert own.kept.probability == pytest.approx(own.answer.probability, abs=1e-9)


def test_far_from_every_run_there_is_a_range_and_no_probability():
    found = compare_own(paper(), PUBLIC["llama-3.1-70b"], CONTEXT)
    assert np.isfinite(found.answer.far)
    assert np.isnan(found.answer.probability)
    assert np.isnan(found.kept.probability)
    assert found.n_params_over_largest == pytest.approx(48.57, abs=0.01)
    low, high = found.answer.saving_interval
    assert low < found.answer.saving < high
    assert "its N is 48.6 times the largest model of these runs" in " ".join(found.notes)
    assert found.to_dict()["probability"] is None
    tiny = compare_own(paper(), model(3, 192), CONTEXT)
    assert np.isfinite(tiny.answer.far)
    assert np.isnan(tiny.answer.probability)
    assert "times below the smallest" in " ".join(tiny.notes)


def test_candidates_have_its_vocabulary_and_its_kind_of_unembedding():
    large, small = (
        compare_own(paper(), model(vocabulary=v), CONTEXT, objectives.make("memory", convention="exact"), convention="exact")
        for v in (256_000, 32_000)
    )
    for found, vocabulary in ((large, 256_000), (small, 32_000)):
        one = found.answer
        shape = Shape(one.n_layers, one.d_model, one.heads.n_heads, one.heads.n_kv_heads, 64, vocab_size=vocabulary)
        assert one.cost == pytest.approx(costs.infer_memory(shape, CONTEXT, "exact"), rel=1e-6)
    assert paper().vocab_size == 50_304
    price = objectives.make("price", device="h200", batch=8)
    for untied in (True, False):
        found = compare_own(paper(), model(vocabulary=128_256, untied=untied), 8192, price, draws=50)
        assert found.answer.objective["serving"]["untied"] is untied
    limit = RooflineServing("h200", batch=1)
    assert compare_own(paper(), model(), 8192, memory_limit=limit, draws=50).answer.cost > 0


def test_a_run_that_lies_off_its_law_moves_the_target_too():
    """Llama 3's rule at the smallest size, in the paper: without it the own target is another one."""
    for draws in (0, 200):
        warnings = compare_own(paper(), PUBLIC["llama-3.2-1b"], CONTEXT, draws=draws).answer.warnings
        (at,) = (i for i, one in enumerate(warnings) if one.startswith("without that run"))
        assert warnings[at].endswith("than your model")
        assert "look at its training, or leave it out" in warnings[at - 1]


def test_without_draws_the_fitted_laws_answer():
    found = compare_own(paper(), PUBLIC["llama-3.2-1b"], CONTEXT, draws=0)
    assert found.kept is None
    assert np.isnan(found.loss_interval).all()
    assert found.answer.saving > 0.1
    assert "nan" not in " ".join(found.sentences())
    assert json.dumps(found.to_dict(), allow_nan=False)
    with pytest.raises(ValueError, match=r"heads \(64,16\) have no law here, and without draws"):
        compare_own(paper(), PUBLIC["llama-3.1-8b"], CONTEXT, draws=0)


def test_what_nothing_is_known_of_is_refused():
    with pytest.raises(ValueError, match=r"mine: d/L = 1\.92 \(192 / 100\): no run and no source has a shape outside 3 to 750"):
        compare_own(paper(), model(100, 192), CONTEXT)
    few = laws.fit_by_heads(law_tables.synthetic(noise=0.002, heads=[(1, 1), (2, 1), (4, 1), (8, 1)]))
    with pytest.raises(head_law.NoHeadLaw, match=r"needs 5 or more; the closest that has a law is \(8,1\)"):
        compare_own(few, PUBLIC["llama-3.1-8b"], CONTEXT)
    assert compare_own(few, model(), CONTEXT).heads == Heads(8, 1)


def test_a_model_that_can_not_be_served_has_no_cost():
    limit = 3e9  # bytes: less than its cache at this context
    found = compare_own(paper(), PUBLIC["smollm2-1.7b"], CONTEXT, memory_limit=limit * 2.5)
    assert np.isnan(found.above)
    assert any(one.startswith("It has no cost here: ") for one in found.sentences())
    assert json.dumps(found.to_dict(), allow_nan=False)


def test_json_says_what_is_of_the_own_model():
    said = compare_own(paper(), own_model.load("SmolLM2-360M"), CONTEXT, draws=200).to_dict()
    json.dumps(said, allow_nan=False)
    like = said["like"]
    assert (like["name"], like["n_layers"], like["law_of_heads"]) == ("smollm2-360m", 32, [15, 5])
    assert like["above_interval"][0] < like["above"] < like["above_interval"][1]
    assert like["kept"]["cost"] > said["cost"]
    assert said["baseline"]["label"] == "your model smollm2-360m"


ASK = ["optimum", "--preset", "paper", "--context", "128K", "--draws", "200", "--like"]


class TestOnTheCommandLine:
    def test_a_name_and_a_config_give_the_same_answer(self, tmp_path, capsys):
        config = {
            "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
            "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True,
        }  # fmt: skip
        (tmp_path / "config.json").write_text(json.dumps(config))
        found = []
        for own in ("meta-llama/Llama-3.2-1B", str(tmp_path)):
            assert main([*ASK, own, "--format", "json"]) == 0
            found.append(json.loads(capsys.readouterr().out))
        for name in ("cost", "saving", "probability", "loss"):
            assert found[0][name] == found[1][name], name
        assert found[0]["like"]["name"] == "llama-3.2-1b"
        assert found[1]["like"]["source"] == str(tmp_path / "config.json")

    def test_the_screen_says_what_is_compared(self, capsys):
        assert main([*ASK, "llama-3.1-8b"]) == 0
        text = " ".join(capsys.readouterr().out.split())
        assert "Your model llama-3.1-8b: 32 layers x 4096, 32 query and 8 key/value heads of 128, N = 6.98B" in text
        assert "both models are taken as trained alike" in text
        assert "than the answer" in text

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            (["llama-9"], "did you mean llama-7b? (there are smollm2-135m"),
            (["missing.json"], "missing.json: there is no such file"),
            (["llama-3.2-1b", "--conventions"], "--conventions is for a --loss"),
            (["llama-3.2-1b", "--cost", "price", "--device", "h200,v6e"], "--device h200,v6e: one device with --like"),
            (["llama-3.1-8b", "--draws", "0"], "--like llama-3.1-8b: heads (64,16) have no law here"),
            (["llama-3.2-1b", "--aspect", "500"], "--like llama-3.2-1b: aspect 500: what a d / L outside"),
        ],
    )
    def test_bad_input_is_a_sentence(self, options, said, capsys):
        assert main([*ASK, *options]) == 2
        assert said in capsys.readouterr().err

    def test_a_loss_or_a_model(self, capsys):
        for options in ([*ASK, "llama-3.2-1b", "--loss", "2.6"], ASK[:-1]):
            with pytest.raises(SystemExit):
                main(options)
            assert "--like" in capsys.readouterr().err


def test_models_to_build_reach_what_each_draw_asks_for():
    """The target is each draw's own: the median of how far a model is from it is not above 0."""
    found = compare_own(paper(), PUBLIC["llama-3.2-1b"], CONTEXT, draws=200)
    assert len(found.answer.buildable) == 3
    drawn = paper().draws(200, 0)
    price = paper().penalty.draw(200, 0)
    own = drawn.loss(found.heads, np.array([found.n_params]))[:, 0] * paper().penalty.factor(price, found.ratio)
    for row in found.answer.buildable.itertuples():
        heads = Heads(row.n_heads, row.n_kv_heads)
        loss_S = drawn.loss(heads, np.array([row.n_params]))[:, 0] * paper().penalty.factor(price, row.ratio)
        assert np.median(loss_S - own) <= 1e-9
        assert row.loss == pytest.approx(found.loss + np.median(loss_S - own))
