import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gqa_jax import attention, costs, model, shapes
from gqa_jax.config import ModelConfig
from gqa_jax.training import loss
from tests import llama_numpy

TINY = {"n_layers": 2, "d_model": 32, "n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "vocab_size": 64, "dtype": "float32"}


def tiny(**changes):
    return ModelConfig(**TINY | changes)


def setup(config, batch=2, length=9):
    params = model.init_params(config, jax.random.key(0))
    tokens = np.random.default_rng(0).integers(config.vocab_size, size=(batch, length + 1)).astype(np.int32)
    return params, tokens[:, :-1], tokens[:, 1:]


def mean_loss(config, params, tokens, targets, remat="none"):
    return loss.mean_loss(hidden(model.with_params(config, params), tokens, remat=remat), params["embedding"], targets)


def hidden(transformer, tokens, **how):
    return transformer.hidden(transformer.embed(tokens), jnp.arange(tokens.shape[1]), **how)[0]


# With theta = 100 the four pairs of 8 dims turn 6.4, 2.0, 0.64 and 0.2 times in 40 tokens.
LLAMA3 = {"rope_theta": 100.0, "rope_scaling": "llama3", "rope_factor": 4.0, "rope_original_context": 40}


@pytest.mark.parametrize(
    ("n_heads", "n_kv", "changes"),
    [
        (4, 4, {}),
        (4, 2, {}),
        (4, 1, {}),
        (6, 3, {}),
        (1, 1, {}),
        (4, 2, {"untied": True}),
        (4, 2, LLAMA3),
        (4, 2, {"rope_theta": 100.0, "rope_scaling": "linear", "rope_factor": 3.0, "untied": True}),
    ],
)
def test_equals_independent_float64_implementation(n_heads, n_kv, changes):
    """Also for n_heads * head_dim != d_model. Scales are perturbed, so that a norm that ignores them is seen."""
    config = tiny(n_heads=n_heads, n_kv_heads=n_kv, **changes)
    params, tokens, _ = setup(config)
    params = jax.tree.map(lambda x: x * (1 + 0.3 * jax.random.normal(jax.random.key(x.size), x.shape)) * 4, params)
    expected = llama_numpy.logits(jax.tree.map(lambda x: np.asarray(x, np.float64), params), tokens, config)
    np.testing.assert_allclose(model.with_params(config, params)(tokens), expected, rtol=1e-4, atol=1e-3)


def test_no_gradient_of_the_loss_at_t_to_later_inputs():
    config = tiny()
    params, tokens, _ = setup(config)
    transformer, inputs = model.with_params(config, params), params["embedding"][tokens]

    def logit_sum_at_4(inputs):
        return (transformer.hidden(inputs, jnp.arange(tokens.shape[1]))[0][:, 4] ** 2).sum()

    gradient = np.asarray(jax.grad(logit_sum_at_4)(inputs))
    assert np.all(gradient[:, 5:] == 0)
    assert np.all(np.abs(gradient[:, :5]).max(-1) > 0)


def layers_of(params, count):
    return [jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"]) for i in range(count)]


def test_scan_over_layers_equals_a_loop():
    config = tiny(n_layers=3)
    params, tokens, _ = setup(config)
    transformer, positions = model.with_params(config, params), jnp.arange(tokens.shape[1])
    x, states = model.run_layers(config, layers_of(params, 3), transformer.embed(tokens), positions)
    assert states == [None] * 3
    x = model.rms_norm(x, params["final_norm"], config.norm_eps)
    np.testing.assert_allclose(hidden(transformer, tokens), x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("unrolled", "chunk"), [(True, 6), (False, 4)])
def test_decoding_with_a_cache_equals_the_whole_forward_pass(unrolled, chunk):
    """Greedily, prompts of unequal lengths in chunks, then token by token through `Hooks.attend`, whose state is the cache of a
    layer; weights are held in another form than they are multiplied in, as quantised ones are (`Hooks.weights`)."""
    config, steps, size = tiny(n_layers=3), 5, 16
    params, tokens, _ = setup(config, batch=2, length=6)
    transformer, batch = model.with_params(config, jax.tree.map(lambda x: 3 * x, params)), np.arange(2)
    lengths, expected = np.array([6, 3]), np.zeros((2, size), np.int32)
    expected[:, :6] = tokens  # what is behind the shorter prompt is written over
    whole = jax.jit(transformer)
    for end in range(lengths.max(), lengths.max() + steps):  # all of it again for every token; those behind it are not seen
        own = end - lengths.max() + lengths
        expected[batch, own] = whole(expected)[batch, own - 1].argmax(-1)

    def prefill(q, k, v, cache, start):
        end = start + q.shape[1]
        k_cache, v_cache = (held.at[:, start:end].set(new) for held, new in zip(cache, (k, v), strict=True))
        return attention.attention(q, k_cache[:, :end], v_cache[:, :end], q_offset=start), (k_cache, v_cache)

    def append(q, k, v, cache, position_B):
        k_cache, v_cache = (held.at[batch, position_B].set(x[:, 0]) for held, x in zip(cache, (k, v), strict=True))
        return attention.decode(q[:, 0], attention.cache_of(k_cache, v_cache), position_B + 1)[:, None], (k_cache, v_cache)

    shape = (2, size, config.n_kv_heads, config.head_dim)
    layers = jax.tree.map(lambda x: x / 4, nnx.to_pure_dict(nnx.state(transformer))["layers"])
    caches = tuple(jnp.zeros((config.n_layers, *shape)) for _ in range(2))
    if unrolled:
        layers, caches = layers_of({"layers": layers}, 3), [(jnp.zeros(shape), jnp.zeros(shape)) for _ in range(3)]

    def last_logits(tokens, positions, attend, caches, at_B):
        hooks = model.Hooks(attend, weights=lambda layer: jax.tree.map(lambda x: 4 * x, layer))
        x, caches = model.run_layers(config, layers, transformer.embed(tokens), positions, hooks, caches)
        x = model.rms_norm(x[batch, at_B][:, None], transformer.final_norm[...], config.norm_eps)
        return transformer.logits(x)[:, 0].argmax(-1), caches

    @functools.partial(jax.jit, static_argnames="start")
    def first_token(part, at, caches, start):
        attend = functools.partial(prefill, start=start)
        return last_logits(part, start + jnp.arange(part.shape[1]), attend, caches, at)

    @jax.jit
    def next_token(token, at, caches):
        return last_logits(token[:, None], at[:, None], functools.partial(append, position_B=at), caches, np.zeros(2, int))

    token = np.zeros(2, np.int32)
    for start in range(0, 6, chunk):
        part = tokens[:, start : start + chunk]
        found, caches = first_token(part, np.clip(lengths - 1 - start, 0, part.shape[1] - 1), caches, start)
        token = np.where((lengths - 1) // chunk == start // chunk, found, token)
    for step in range(steps):
        np.testing.assert_array_equal(token, expected[batch, lengths + step])
        token, caches = next_token(token, lengths + step, caches)
    assert len({int(x) for x in expected[0, 6:11]}) > 1  # not one token over and over


def test_remat_changes_the_program_and_not_the_gradient():
    results, programs = {}, {}
    config = tiny()
    params, tokens, targets = setup(config, length=16)
    for policy in ("none", "full", "attention_only", "dots"):
        gradient = jax.jit(jax.grad(lambda p, policy=policy, x=tokens, y=targets: mean_loss(config, p, x, y, policy)))
        results[policy] = gradient(params)
        programs[policy] = str(jax.make_jaxpr(gradient)(params)).count("dot_general")
    for policy in ("full", "attention_only", "dots"):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), results["none"], results[policy])
    assert programs["none"] < programs["dots"] < programs["full"], f"matmuls in the gradient: {programs}"


def test_rope_depends_on_relative_position_only():
    q, k = (np.random.default_rng(i).normal(size=8).astype(np.float32) for i in range(2))
    cos, sin = model.rope_rotation(jnp.arange(40), model.rope_frequencies(tiny()))

    def product(i, j):
        def at(x, t):
            return model.rotate(jnp.asarray(x).reshape(1, 1, 1, 8), cos[:, t : t + 1], sin[:, t : t + 1])

        return float((at(q, i) * at(k, j)).sum())

    assert product(5, 2) == pytest.approx(product(35, 32), rel=1e-4)
    assert abs(product(5, 2) - product(5, 4)) > 1e-3


# Of theta 500,000 and heads of 128, and for 8 times 8192 tokens, as float64 gives them: where wavelengths are below 2048 tokens
# as they are, above 8192 divided by 8.
PLAIN = {0: 1.0, 28: 0.003211445994752591, 29: 0.0026160992529250353, 31: 0.0017360467021768657, 34: 0.0009384738703573802,
         35: 0.0007644969883171747, 36: 0.000622772421914596, 63: 2.455140791131609e-06}  # fmt: skip
LLAMA_31 = {0: 1.0, 28: 0.003211445994752591, 29: 0.002166570763503359, 31: 0.0008567514129196321, 34: 0.0001785078127679964,
            35: 9.556212353964683e-05, 36: 7.78465527393245e-05, 63: 3.068925988914511e-07}  # fmt: skip


def test_frequencies_are_those_of_llama_3_1():
    plain = model.rope_frequencies(tiny(head_dim=128))
    scaled = model.rope_frequencies(tiny(head_dim=128, rope_scaling="llama3", rope_factor=8.0))
    for found, known in ((plain, PLAIN), (scaled, LLAMA_31)):
        assert (found.shape, found.dtype) == ((64,), jnp.float32)
        np.testing.assert_allclose(found[np.array([*known])], [*known.values()], rtol=3e-6)
    np.testing.assert_array_equal(scaled[:29], plain[:29])
    np.testing.assert_array_equal(scaled[36:], plain[36:] / 8)
    config = tiny(head_dim=64, **LLAMA3 | {"rope_low_freq_factor": 0.5, "rope_high_freq_factor": 3.0})
    np.testing.assert_allclose(model.rope_frequencies(config), llama_numpy.frequencies(config), rtol=3e-6)


def test_linear_scaling_is_that_of_positions():
    frequencies = [model.rope_frequencies(tiny(**how)) for how in ({}, {"rope_scaling": "linear", "rope_factor": 4.0})]
    there = model.rope_rotation(jnp.arange(9), frequencies[0])
    scaled = model.rope_rotation(4 * jnp.arange(9), frequencies[1])
    jax.tree.map(np.testing.assert_array_equal, scaled, there)
    assert not np.allclose(model.rope_rotation(jnp.arange(9), frequencies[1])[0], there[0])


# Of theta 500,000 and heads of 64, plain and for 8 times 8192 tokens, as transformers 5.24.0 computes them with torch, float32.
OF_TRANSFORMERS = {
    None:
    "0000803fc6e1293fbc77e13ee39e953eb093463ea0c6033eade4ae3d671e683dc8081a3d496fcc3cc3a9873c6d0d343c4ff7ee3b"
    "02949e3b2077523b41aa0b3b215db93aea03763a8d41233a81acd839f8c88f39f4d43e39c345fd386b12a838c4105f38cb061438"
    "1076c437345f8237a7072d374da5e536a7649836b0414a36",
    "llama3":
    "0000803fc6e1293fbc77e13ee39e953eb093463ea0c6033eade4ae3d671e683dc8081a3d496fcc3cc3a9873c6d0d343c4ff7ee3b"
    "02949e3b2077523b1dd1b33ad295093ad22d3b398d41a33881ac5838f8c80f38f4d4be37c3457d376b122837c410df36cb069436"
    "10764436345f0236a707ad354da56535a7641835b041ca34",
}  # fmt: skip


@pytest.mark.parametrize("scaling", OF_TRANSFORMERS)
def test_frequencies_have_the_bits_of_transformers(scaling):
    """A last bit is 0.01 radians at position 131,072: with it wrong in a third of them, logits differed by 0.09 there."""
    known = np.frombuffer(bytes.fromhex(OF_TRANSFORMERS[scaling]), np.float32)
    changes = {} if scaling is None else {"rope_scaling": scaling, "rope_factor": 8.0}
    np.testing.assert_array_equal(model.rope_frequencies(tiny(head_dim=64, **changes)), known)


def test_an_untied_model_has_the_parameters_of_the_tied_one_and_a_head_like_the_embedding():
    tied, untied = (model.init_params(tiny(untied=flag), jax.random.key(0)) for flag in (False, True))
    head = untied.pop("head")
    jax.tree.map(np.testing.assert_array_equal, untied, tied)
    assert (head.shape, head.dtype) == (tied["embedding"].shape, tied["embedding"].dtype)
    assert not (head == tied["embedding"]).any()
    assert float(head.std()) == pytest.approx(tiny().init_std, rel=0.1)
    assert model.unembedding(tied) is tied["embedding"]
    assert model.unembedding({"head": head, **untied}) is head


def test_an_untied_model_looks_up_the_embedding_and_multiplies_by_the_head():
    config = tiny(untied=True)
    params, tokens, _ = setup(config)
    transformer = model.with_params(config, params)
    np.testing.assert_array_equal(transformer.embed(tokens), params["embedding"][tokens])
    expected = np.einsum("btd,vd->btv", hidden(transformer, tokens), params["head"])
    np.testing.assert_allclose(transformer(tokens), expected, rtol=1e-5, atol=1e-6)
    del params["head"]
    assert np.abs(transformer(tokens) - model.with_params(tiny(), params)(tokens)).max() > 0.1


@pytest.mark.parametrize("name", list(shapes.SIZES))
def test_parameters_are_what_the_cost_model_counts(name):
    size = shapes.SIZES[name]
    for n_heads, n_kv in [(size.d_model // 64, size.d_model // 64), (8, 1)]:
        config = ModelConfig(n_layers=size.n_layers, d_model=size.d_model, n_heads=n_heads, n_kv_heads=n_kv)
        params = jax.eval_shape(lambda c=config: model.init_params(c, jax.random.key(0)))
        count = costs.count_params(config, convention="exact")
        assert sum(x.size for x in jax.tree.leaves(params)) == count.total
        assert params["embedding"].size == count.embedding
        untied = dataclasses.replace(config, untied=True)
        params = jax.eval_shape(lambda c=untied: model.init_params(c, jax.random.key(0)))
        assert sum(x.size for x in jax.tree.leaves(params)) == costs.count_params(untied, convention="exact").total


def test_bfloat16_computes_in_bfloat16_with_float32_parameters():
    config = tiny(dtype="bfloat16")
    params, tokens, targets = setup(config)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    assert hidden(model.with_params(config, params), tokens).dtype == jnp.bfloat16
    assert model.with_params(config, params)(tokens).dtype == jnp.float32
    exact = mean_loss(tiny(), params, tokens, targets)
    assert float(mean_loss(config, params, tokens, targets)) == pytest.approx(float(exact), rel=1e-2)


def test_initialisation_is_a_function_of_the_key_and_layers_differ():
    one, again, other = (model.init_params(tiny(), jax.random.key(seed)) for seed in (0, 0, 1))
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), one, again))
    assert not np.array_equal(one["embedding"], other["embedding"])
    assert not np.array_equal(one["layers"]["query"][0], one["layers"]["query"][1])
    assert float(one["layers"]["up"].std()) == pytest.approx(tiny().init_std, rel=0.1)
    assert float(one["layers"]["down"].std()) == pytest.approx(tiny().init_std / 2, rel=0.1)  # sqrt(2 L) = 2


def test_every_seed_has_a_key_of_its_own_and_small_ones_the_key_of_jax():
    """`jax.random.key` gives 2^32 + s the key of s."""
    small, large = (0, 1, 5, 2**31, 2**32 - 1), (2**32, 2**32 + 1, 2**33 + 1, 2**62 + 5, 2**63 - 1)
    data = {seed: tuple(jax.random.key_data(model.seed_key(seed)).tolist()) for seed in (*small, *large)}
    assert all(data[seed] == tuple(jax.random.key_data(jax.random.key(seed)).tolist()) for seed in small)
    assert len(set(data.values())) == len(data)
    assert data[2**32] == (928981903, 3453687069)  # runs keep their weights
