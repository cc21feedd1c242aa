import dataclasses
from typing import NamedTuple

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from gqa_jax import costs, shapes
from gqa_jax.shape_search import reaching, solve_shape
from gqa_jax.shapes import Aspect


class Heads(NamedTuple):
    n_heads: int | None
    n_kv_heads: int


HEADS = [Heads(*heads) for heads in shapes.head_configurations()]
LLAMA3 = Heads(None, 8)


@hypothesis.settings(max_examples=200, deadline=None, derandomize=True)
@hypothesis.given(
    st.floats(1, 18),
    st.sampled_from([*HEADS, LLAMA3]),
    st.floats(0.1, 5000),
    st.sampled_from([8, 64, 256]),
    st.sampled_from(list(costs.CONVENTIONS)),
)
def test_the_shape_has_the_size_and_the_aspect_that_were_asked_for(log_n, heads, ratio, head_dim, convention):
    n_params = 10**log_n
    shape = solve_shape(n_params, heads, Aspect.constant(ratio), head_dim, 1000, convention)
    assert costs.count_params(shape, convention).non_embedding == pytest.approx(n_params, rel=1e-13)
    assert shape.d_model / shape.n_layers == pytest.approx(ratio, rel=1e-14)
    assert shape.n_heads == (shape.d_model / head_dim if heads.n_heads is None else heads.n_heads)
    assert (shape.n_kv_heads, shape.head_dim, shape.vocab_size) == (heads.n_kv_heads, head_dim, 1000)


def test_many_sizes_of_many_heads_at_once_are_those_of_one_at_a_time():
    """An array of draws x heads, and heads along its last axis."""
    n_SxH = np.geomspace(1e6, 1e11, 4 * 22).reshape(4, 22)
    aspect = shapes.paper_aspect()
    many = solve_shape(n_SxH, [*HEADS, LLAMA3], aspect)
    assert many.n_layers.shape == many.d_model.shape == (4, 22)
    for i, heads in enumerate([*HEADS, LLAMA3]):
        column = solve_shape(n_SxH[:, i], heads, aspect)
        np.testing.assert_allclose(many.n_layers[:, i], column.n_layers, rtol=1e-14)
        one = solve_shape(n_SxH[2, i], heads, aspect)
        assert many.d_model[2, i] == pytest.approx(one.d_model, rel=1e-14)
        cost = costs.serving_costs(many, 8192, 1e9, 8192, "figures")["z"]
        assert cost[2, i] == pytest.approx(costs.serving_costs(one, 8192, 1e9, 8192, "figures")["z"], rel=1e-13)


def test_sizes_that_no_model_has_stay_infinite_or_nan_and_do_not_warn():
    shape = solve_shape([1e9, np.inf, np.nan], LLAMA3, shapes.paper_aspect())
    for field in (shape.n_layers, shape.d_model, shape.n_heads, shape.d_ff):
        assert np.isfinite(field[0])
        assert field[1] == np.inf
        assert np.isnan(field[2])
    for cost in costs.serving_costs(shape, 8192, 1e9, 8192).values():
        assert np.isfinite(cost[0])
        assert cost[1] == np.inf
        assert np.isnan(cost[2])
    with pytest.raises(ValueError, match=r"n_params = -1\.0: a model has more than 0 parameters"):
        solve_shape([1e9, np.nan, -1], LLAMA3, shapes.paper_aspect())


def test_savings_of_figure_1():
    """(8,1) of 2.087e9 parameters, on the paper's aspect, against Llama-3's heads: memory -50.8%, FLOPs -57.8% at 128K."""
    context, llama = 131_072, costs.Shape(32, 2048, 32, 8)
    ours = solve_shape(2.087e9, Heads(8, 1), shapes.paper_aspect())
    assert ours.n_layers == pytest.approx(42.6, abs=0.05)
    for cost, saving in ((costs.infer_memory, -0.508), (costs.infer_flops, -0.578)):
        assert cost(ours, context, "figures") / cost(llama, context, "figures") - 1 == pytest.approx(saving, abs=0.003)


def near(n_params, heads, ratio=64, needed=None, **options):
    """Shapes about a real one, d / L from half to twice its, that have `needed` parameters (default: as many)."""
    return reaching(n_params, heads, ratio, (ratio / 2, ratio * 2), needed or (lambda r: 0 * r + n_params), **options)


def test_the_papers_own_model_is_among_those_that_reach_its_size():
    """Figure 1's Llama-3 configuration: 32 layers of 2048 with (32,8), aspect 64."""
    own = costs.Shape(32, 2048, 32, 8, d_ff=shapes.ffn_width(2048))
    assert own.d_ff == 5472
    size = costs.count_params(own, "figures").non_embedding
    assert own in near(size, LLAMA3)
    assert own not in near(size + 1, LLAMA3)  # a layer more is needed then


@pytest.mark.parametrize("heads", [Heads(8, 1), Heads(32, 32), LLAMA3])
@pytest.mark.parametrize("n_params", [3e7, 2.087e9, 6.4e10])
def test_of_every_width_the_fewest_layers_that_are_enough(n_params, heads):
    wider = lambda r: n_params * (1 + 0.05 * np.log(r / 64) ** 2)  # noqa: E731 (what other shapes need is more)
    found = near(n_params, heads, needed=wider)
    assert len(found) >= 2
    for shape in found:
        assert all(isinstance(value, int) for value in (shape.n_layers, shape.d_model, shape.n_heads, shape.d_ff))
        assert shape.d_model % 64 == 0
        assert shape.d_ff == shapes.ffn_width(shape.d_model)
        assert shape.n_heads % shape.n_kv_heads == 0
        assert shape.n_heads * 64 == shape.d_model or heads.n_heads is not None
        assert 32 <= shape.d_model / shape.n_layers <= 128
        assert costs.count_params(shape, "figures").non_embedding >= wider(shape.d_model / shape.n_layers)
        fewer = dataclasses.replace(shape, n_layers=shape.n_layers - 1)
        ratio = shape.d_model / fewer.n_layers
        enough = costs.count_params(fewer, "figures").non_embedding >= wider(ratio)
        assert ratio > 128 or not enough


def test_small_models_can_have_narrow_steps():
    found = near(30_000, Heads(4, 1), 20, head_dim=16, vocab_size=257, multiple=16)
    assert [(shape.n_layers, shape.d_model) for shape in found] == [(3, 32), (2, 48), (2, 64)]


def test_other_feed_forward_widths():
    wide = solve_shape(1e9, Heads(8, 2), shapes.paper_aspect(), ffn_ratio=4.0)
    assert wide.d_ff == pytest.approx(4 * wide.d_model)
    assert costs.count_params(wide, "figures").non_embedding == pytest.approx(1e9)
    assert {shape.d_ff / shape.d_model for shape in near(1e9, Heads(8, 2), ffn_ratio=4.0)} == {4.0}


def test_what_can_not_be_built_is_refused():
    for wrong in (np.inf, np.nan, 0):
        with pytest.raises(ValueError, match="only a finite number of parameters above 0 can be built"):
            near(wrong, LLAMA3)
    with pytest.raises(ValueError, match="n_kv_heads = 3 must divide n_heads = 8"):
        near(1e9, Heads(8, 3))
    with pytest.raises(ValueError, match="'figure' is unknown"):
        solve_shape(1e9, LLAMA3, shapes.paper_aspect(), convention="figure")
