"""The numbers come from the paper's text, tables and figures as decoded for the conventions (arXiv 2503.09579v2)."""

import dataclasses
from typing import NamedTuple

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from gqa_jax import costs, shapes
from gqa_jax.config import ModelConfig

T = 131_072


def mha(n_layers, d_model):
    return ModelConfig(n_layers=n_layers, d_model=d_model, n_heads=d_model // 64, n_kv_heads=d_model // 64)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("3M", 3_115_264),
        ("19M", 18_979_328),
        ("85M", 84_953_856),
        ("150M", 150_627_328),
        ("200M", 200_836_096),
        ("470M", 472_904_960),
        ("680M", 679_552_512),
        ("1.2B", 1_019_328_000),
    ],
)
def test_exact_parameters_of_table_9(name, count):
    size = shapes.SIZES[name]
    assert costs.count_params(mha(size.n_layers, size.d_model), "exact").non_embedding == count


def test_exact_parameters_of_1_8b():
    assert costs.count_params(mha(*shapes.LARGE_SHAPES["1.8B"]), "exact").non_embedding == 1_814_448_128


@pytest.mark.parametrize(("n_layers", "n_kv", "z"), [(32, 8, 75_568), (12, 8, 42_997), (12, 4, 32_668)])
def test_z_of_the_markers_of_figure_2(n_layers, n_kv, z):
    """Sequence FLOPs T/2 x C_infer and values held; per-token FLOPs miss by more than 10%."""
    shape = costs.Shape(n_layers, 64 * n_layers, 8, n_kv)
    cost = costs.serving_costs(shape, T, 1, T, "figures")
    assert cost["z"] == pytest.approx(z, rel=0.0025)
    per_token = dataclasses.replace(costs.CONVENTIONS["figures"], flops="per_token")
    assert costs.serving_costs(shape, T, 1, T, per_token)["z"] < 0.95 * z


def test_llama_configuration_of_figure_1():
    shape = costs.Shape(32, 2048, 32, 8)
    per_token = dataclasses.replace(costs.CONVENTIONS["figures"], flops="per_token")
    assert costs.count_params(shape, "figures").total == 1_409_286_144
    assert costs.infer_memory(shape, T, "figures") == 5_704_253_440
    assert costs.infer_flops(shape, T, per_token) == 37_178_310_656


@pytest.mark.parametrize("n_layers", [42.6, 42.65])
def test_savings_of_figure_1(n_layers):
    """(8,1) at the same loss: memory -50.8%, FLOPs -57.8%, within 0.3 points; a real-valued shape."""
    llama, ours = costs.Shape(32, 2048, 32, 8), costs.Shape(n_layers, 56.4 * n_layers, 8, 1)
    assert costs.infer_memory(ours, T, "figures") / costs.infer_memory(llama, T, "figures") - 1 == pytest.approx(
        -0.508, abs=0.003
    )
    assert costs.infer_flops(ours, T, "figures") / costs.infer_flops(llama, T, "figures") - 1 == pytest.approx(
        -0.578, abs=0.003
    )


def test_paper_convention_is_its_tables():
    layers, d, f, n, k, h, v = 24, 1280, 3424, 20, 4, 64, 50_304
    shape = costs.Shape(layers, d, n, k, d_ff=f)
    n_params = 2 * layers * d * h * (n + k) + 2 * layers * d * f + d * v
    assert costs.count_params(shape, "paper").total == n_params
    assert costs.infer_flops(shape, 8192, "paper") == 2 * n_params + 4 * 8192 * layers * h * n
    assert costs.infer_memory(shape, 8192, "paper") == n_params + 2 * 8192 * layers * h * k
    assert costs.train_flops(shape, 8192, 1e9, "paper") == 1e9 * (6 * n_params + 12 * 4096 * layers * h * n)
    assert costs.train_memory(shape, 8192, "paper") == 4 * n_params + 8192 * d * layers


def test_bytes_of_parameter_and_cache_dtypes():
    shape = ModelConfig(n_layers=2, d_model=64, n_heads=2, n_kv_heads=1)
    count, cache = costs.count_params(shape).total, 2 * 1024 * 2 * 64
    assert costs.infer_memory(shape, 1024) == 2 * count + 2 * cache
    assert costs.infer_memory(shape, 1024, param_dtype="int4", cache_dtype="int8") == 0.5 * count + cache
    with pytest.raises(ValueError, match=r"dtype 'int3' is unknown here: use float32"):
        costs.infer_memory(shape, 1024, cache_dtype="int3")


def test_costs_are_affine_in_context_so_the_mean_context_is_enough():
    shape = ModelConfig(n_heads=8, n_kv_heads=2)
    contexts, weights = np.array([1e3, 8e3, 1e5]), np.array([5.0, 3.0, 2.0])
    mean = np.average(contexts, weights=weights)
    for cost in (costs.infer_flops, costs.infer_memory):
        assert np.average(cost(shape, contexts), weights=weights) == pytest.approx(cost(shape, mean))
    whole = np.average(costs.infer_flops(shape, contexts, "figures"), weights=weights)
    assert whole > 1.1 * costs.infer_flops(shape, mean, "figures")  # a sequence is quadratic in T


@pytest.mark.parametrize("convention", list(costs.CONVENTIONS))
def test_an_untied_model_has_another_matrix_and_the_same_flops(convention):
    """Where the convention counts the embedding; N of the fits has neither."""
    tied = ModelConfig(n_heads=8, n_kv_heads=2)
    untied, matrix = dataclasses.replace(tied, untied=True), 256 * 50_304 * costs.CONVENTIONS[convention].embedding
    before, after = (costs.count_params(shape, convention) for shape in (tied, untied))
    assert (before.head, after.head) == (0, matrix)
    assert after == before._replace(head=matrix)
    assert after.total - before.total == matrix
    assert all(isinstance(part, int) for part in (*after, after.total))
    assert after.non_embedding == before.non_embedding
    assert costs.forward_flops(untied, 8192, convention) == costs.forward_flops(tied, 8192, convention)
    each = 2 if convention == "exact" else 1  # bytes, or values
    held = [costs.infer_memory_parts(shape, 8192, convention) for shape in (tied, untied)]
    assert held[1] == held[0]._replace(embedding=each * (before.embedding + matrix))
    trained = [costs.train_memory(shape, 8192, convention) for shape in (tied, untied)]
    assert trained[1] - trained[0] == 4 * matrix * (4 if convention == "exact" else 1)


def test_an_untied_shape_of_no_model_costs_infinity():
    sizes = np.array([12.0, np.inf])
    tied, untied = (costs.count_params(costs.Shape(sizes, 64 * sizes, 8, 1, untied=flag)) for flag in (False, True))
    np.testing.assert_array_equal(untied.total, tied.total + untied.head)
    assert np.isinf([tied.total[1], untied.total[1]]).all()


def test_unknown_conventions_and_weights_are_refused():
    with pytest.raises(ValueError, match="'figure' is unknown: use paper, figures, exact"):
        costs.count_params(ModelConfig(), "figure")
    with pytest.raises(ValueError, match="lam = 2"):
        costs.hardware_aware_cost(1, 1, lam=2)
    with pytest.raises(ValueError, match="n_layers = 0"):
        costs.Shape(0, 64, 1, 1)


def test_breakdown_adds_up_and_scales():
    shape = mha(12, 768)
    flops = costs.forward_flops(shape, 8192)
    assert flops.total == flops.projections + flops.attention + flops.ffn + flops.output
    assert flops.output == 2 * 768 * 50_304
    assert costs.forward_flops(shape, 2 * 8192).attention == 2 * flops.attention


@pytest.mark.parametrize("convention", list(costs.CONVENTIONS))
def test_arrays_of_shapes_and_contexts_give_what_each_gives_alone(convention):
    layers, widths = np.array([[4], [12]]), np.array([256, 768, 1024])
    contexts = np.array([1024, 8192])[:, None, None]
    many = costs.serving_costs(costs.Shape(layers, widths, 8, 2), contexts, 1e9, 8192, convention)
    for name in many:
        assert many[name].shape == ((2, 2, 3) if "infer" in name or name == "z" else (2, 3))
    one = costs.serving_costs(costs.Shape(12, 256, 8, 2), 8192, 1e9, 8192, convention)
    assert {name: many[name][..., 1, 0].flat[-1] for name in many} == pytest.approx(one, rel=1e-15)


def test_integer_shapes_give_integers():
    count = costs.count_params(ModelConfig(), "exact")
    assert all(isinstance(part, int) for part in count)
    many = costs.count_params(costs.Shape(np.array([4, 6]), np.array([256, 512]), 8, 1, d_ff=np.array([672, 1376])), "exact")
    assert np.issubdtype(many.total.dtype, np.integer)
    assert many.total[0] == costs.count_params(ModelConfig(n_heads=8, n_kv_heads=1)).total


def test_the_offending_element_of_a_shape_is_named():
    with pytest.raises(ValueError, match=r"d_model = -2: must be above 0"):
        costs.Shape(np.array([1, 2]), np.array([64, -2]), 1, 1)
    with pytest.raises(ValueError, match=r"d_ff = 0: must be above 0"):
        costs.Shape(1, 64, 1, 1, d_ff=0)
    with pytest.raises(ValueError, match=r"must broadcast; these do not: n_layers \(2,\), d_model \(3,\), d_ff \(3,\)"):
        costs.Shape(np.ones(2), np.ones(3), 1, 1)


def test_a_size_that_no_model_has_costs_infinity_or_nan():
    shape = costs.Shape(np.array([12, np.inf, np.nan]), np.array([768, np.inf, np.nan]), 8, 1)
    for lam in (0, 0.5, 1):
        cost = costs.hardware_aware_cost(costs.infer_memory(shape, T), costs.infer_flops(shape, T), lam)
        np.testing.assert_array_equal(np.isfinite(cost), [True, False, False])
        assert cost[1] == np.inf
    assert np.isnan(costs.memory_shares(shape, T).cache[1:]).all()


@pytest.mark.parametrize("convention", list(costs.CONVENTIONS))
def test_shares_add_up_to_one_and_attention_takes_over(convention):
    shape = costs.Shape(np.array([[12.0], [32.0]]), np.array([[768.0], [2048.0]]), 8, 2)
    contexts = np.array([1024, 8192, 131_072])
    for shares, growing in (
        (costs.flops_shares(shape, contexts, convention), "attention"),
        (costs.memory_shares(shape, contexts, convention), "cache"),
    ):
        assert all(share.shape == (2, 3) for share in shares)
        np.testing.assert_allclose(sum(shares), 1, rtol=1e-14)
        share = getattr(shares, growing)
        assert (np.diff(share, axis=1) > 0).all()  # with the context
        assert (np.diff(share, axis=0) < 0).all()  # and it falls with the size


def test_the_cache_of_a_1b_model_at_128k():
    """Appendix G: more than 90% of the memory of a 1B model with multi-head attention is keys and values."""
    shape = costs.Shape(16, 2048, 32, 32)
    assert costs.memory_shares(shape, T, "figures").cache == pytest.approx(0.914, abs=0.0005)


def test_cache_dtypes_change_the_shares_of_bytes_only():
    shape = costs.Shape(16, 2048, 32, 32)
    plain, int8 = (costs.memory_shares(shape, T, "exact", cache_dtype=dtype).cache for dtype in ("bfloat16", "int8"))
    assert int8 / (1 - int8) == pytest.approx(plain / (1 - plain) / 2)
    assert costs.memory_shares(shape, T, "figures", cache_dtype="int8") == costs.memory_shares(shape, T, "figures")


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
    shape = costs.solve_shape(n_params, heads, shapes.Aspect.constant(ratio), head_dim, 1000, convention)
    assert costs.count_params(shape, convention).non_embedding == pytest.approx(n_params, rel=1e-13)
    assert shape.d_model / shape.n_layers == pytest.approx(ratio, rel=1e-14)
    assert shape.n_heads == (shape.d_model / head_dim if heads.n_heads is None else heads.n_heads)
    assert (shape.n_kv_heads, shape.head_dim, shape.vocab_size) == (heads.n_kv_heads, head_dim, 1000)


def test_many_sizes_of_many_heads_at_once_are_those_of_one_at_a_time():
    """An array of draws x heads, and heads along its last axis."""
    n_SxH = np.geomspace(1e6, 1e11, 4 * 22).reshape(4, 22)
    aspect = shapes.paper_aspect()
    many = costs.solve_shape(n_SxH, [*HEADS, LLAMA3], aspect)
    assert many.n_layers.shape == many.d_model.shape == (4, 22)
    for i, heads in enumerate([*HEADS, LLAMA3]):
        column = costs.solve_shape(n_SxH[:, i], heads, aspect)
        np.testing.assert_allclose(many.n_layers[:, i], column.n_layers, rtol=1e-14)
        one = costs.solve_shape(n_SxH[2, i], heads, aspect)
        assert many.d_model[2, i] == pytest.approx(one.d_model, rel=1e-14)
        cost = costs.serving_costs(many, 8192, 1e9, 8192, "figures")["z"]
        assert cost[2, i] == pytest.approx(costs.serving_costs(one, 8192, 1e9, 8192, "figures")["z"], rel=1e-13)


def test_sizes_that_no_model_has_stay_infinite_or_nan_and_do_not_warn():
    shape = costs.solve_shape([1e9, np.inf, np.nan], LLAMA3, shapes.paper_aspect())
    for field in (shape.n_layers, shape.d_model, shape.n_heads, shape.d_ff):
        assert np.isfinite(field[0])
        assert field[1] == np.inf
        assert np.isnan(field[2])
    for cost in costs.serving_costs(shape, 8192, 1e9, 8192).values():
        assert np.isfinite(cost[0])
        assert cost[1] == np.inf
        assert np.isnan(cost[2])
    with pytest.raises(ValueError, match=r"n_params = -1\.0: a model has more than 0 parameters"):
        costs.solve_shape([1e9, np.nan, -1], LLAMA3, shapes.paper_aspect())


def test_the_model_of_figure_1_on_the_papers_aspect():
    """(8,1) of 2.087e9 parameters, on the paper's aspect, against Llama-3's heads: memory -50.8%, FLOPs -57.8% at 128K."""
    context, llama = 131_072, costs.Shape(32, 2048, 32, 8)
    ours = costs.solve_shape(2.087e9, Heads(8, 1), shapes.paper_aspect())
    assert ours.n_layers == pytest.approx(42.6, abs=0.05)
    for cost, saving in ((costs.infer_memory, -0.508), (costs.infer_flops, -0.578)):
        assert cost(ours, context, "figures") / cost(llama, context, "figures") - 1 == pytest.approx(saving, abs=0.003)


def near(n_params, heads, ratio=64, needed=None, **options):
    """Shapes about a real one, d / L from half to twice its, that have `needed` parameters (default: as many)."""
    return costs.buildable_shapes(
        n_params, heads, ratio, (ratio / 2, ratio * 2), needed or (lambda r: 0 * r + n_params), **options
    )


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
    wide = costs.solve_shape(1e9, Heads(8, 2), shapes.paper_aspect(), ffn_ratio=4.0)
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
        costs.solve_shape(1e9, LLAMA3, shapes.paper_aspect(), convention="figure")
