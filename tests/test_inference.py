"""Generation: against the full forward pass, for every form of heads, in batches, in chunks, sharded, and its bad input."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gqa_jax import model
from gqa_jax.attention.spec import interpreted
from gqa_jax.config import ModelConfig
from gqa_jax.errors import ConfigError
from gqa_jax.inference import engine as engines
from gqa_jax.inference import weights
from gqa_jax.inference.engine import Engine
from gqa_jax.inference.sampling import Sampling, draw

GREEDY = Sampling()
HEADS = [  # the paper's (Section 5.1), cut to sizes that a test can take
    (1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4), (8, 1), (8, 2), (8, 4), (8, 8), (16, 1), (16, 2), (16, 4), (16, 8),
    (16, 16), (32, 1), (32, 2), (32, 4), (32, 8), (32, 16), (32, 32),
]  # fmt: skip


def tiny(n_heads=4, n_kv_heads=2, **fields):
    sizes = {"n_layers": 2, "d_model": 32, "head_dim": 8, "d_ff": 64, "vocab_size": 61, "dtype": "float32", "init_std": 0.3}
    return ModelConfig(n_heads=n_heads, n_kv_heads=n_kv_heads, **(sizes | fields))


@functools.cache
def params_of(config):
    return model.init_params(config, jax.random.key(1))


@functools.cache
def whole(config):
    return jax.jit(lambda params, tokens: model.with_params(config, params)(tokens))


def prompts(*lengths, vocab=61):
    rng = np.random.default_rng(len(lengths))
    return [rng.integers(0, vocab, n).tolist() for n in lengths]


def check(engine, asked, n, *, limit=None):
    """Every token is the likeliest one by the full forward pass, or as likely but for rounding: 1e-5 x max(1, spread)."""
    found = engine.generate(asked, n, GREEDY)
    assert found.shape == (len(asked), n)
    for prompt, answer in zip(asked, found, strict=True):
        text = np.array([*prompt, *answer])
        logits = np.asarray(whole(engine.config)(params_of(engine.config), text[None]))[0, len(prompt) - 1 : -1]
        chosen = np.take_along_axis(logits, answer[:, None], axis=1)[:, 0]
        largest = logits[:, : engine.n_ids].max(axis=1)
        assert (largest - chosen <= (limit or 1e-5 * max(1.0, logits.std()))).all()
    return found


@pytest.mark.parametrize(("n_heads", "n_kv_heads"), HEADS)
def test_every_form_of_heads_follows_the_full_forward_pass(n_heads, n_kv_heads):
    found = check(Engine(tiny(n_heads, n_kv_heads), params_of(tiny(n_heads, n_kv_heads))), prompts(9, 9), 12)
    assert len(set(found.ravel().tolist())) > 2


@pytest.mark.parametrize("cache_dtype", ["float32", "bfloat16", "int8"])
def test_prompts_of_unequal_lengths_in_chunks(cache_dtype):
    config = tiny(untied=True, rope_scaling="linear", rope_factor=2.0)
    engine = Engine(config, params_of(config), chunk=16, cache_dtype=cache_dtype)
    check(engine, prompts(40, 3, 16, 17, 1), 20, limit=None if cache_dtype == "float32" else 0.3)


def test_the_same_tokens_where_64_bits_are_on():
    config, asked = tiny(), prompts(40, 3, 16, 17, 1)
    rule, found = Sampling(temperature=1.0, top_k=20, top_p=0.9), []
    for wide in (False, True):
        with jax.enable_x64(wide):
            found.append(Engine(config, params_of(config), chunk=16).generate(asked, 20, rule))
    np.testing.assert_array_equal(*found)


def test_logits_of_every_step_are_those_of_the_full_forward_pass():
    """Not only which token is the likeliest: the logits, to 1e-5 x max(1, spread)."""
    config = tiny(8, 1)
    engine, seen = Engine(config, params_of(config), chunk=16), []
    inner = engine._draw

    def noting(held, hidden_BxD, kind, rule, step):
        logits_BxV = engines._logits(engine.shape, True, held, hidden_BxD)
        jax.debug.callback(lambda step, x: seen.append((int(step), np.asarray(x))), step, logits_BxV, ordered=True)
        return inner(held, hidden_BxD, kind, rule, step)

    engine._draw = noting
    asked = prompts(21, 5)
    found = engine.generate(asked, 10, GREEDY)
    jax.effects_barrier()
    assert [step for step, _ in seen] == list(range(10))
    for row, (prompt, answer) in enumerate(zip(asked, found, strict=True)):
        logits = np.asarray(whole(config)(params_of(config), np.array([*prompt, *answer])[None]))[0, len(prompt) - 1 : -1]
        steps = np.stack([x[row] for _, x in seen])
        np.testing.assert_allclose(steps, logits, atol=1e-5 * max(1.0, logits.std()), rtol=0)


@pytest.mark.parametrize(
    ("mesh", "n_heads", "n_kv_heads"), [("tensor=4,context=2", 8, 1), ("tensor=2,context=4", 16, 8), ("tensor=8", 8, 8)]
)
def test_sharded_over_heads_and_context(mesh, n_heads, n_kv_heads):
    config = tiny(n_heads, n_kv_heads)
    engine = Engine(config, params_of(config), mesh=mesh, chunk=16)
    if engine.shape.context > 1:  # one text goes on to the next device while it is read, one while it is generated
        assert engine.plan([150, 110], 30).keys // engine.shape.context == 128
    check(engine, prompts(150, 110), 30)


@pytest.mark.slow
def test_thousands_of_steps_over_all_edges_of_buckets():
    config = tiny(4, 1, d_model=16, d_ff=32, n_layers=1)
    check(Engine(config, params_of(config), chunk=64), prompts(1), 4096)


def test_buckets_hold_what_they_must_and_little_more():
    for n in range(1, 5000):
        size = engines.bucket(n, 16)
        assert n <= size <= max(n + 15, 1.13 * n)
    assert len({engines.bucket(n, 128) for n in range(4097, 8193)}) == 8


def test_programs_are_compiled_once_for_each_bucket():
    config = tiny()
    engine = Engine(config, params_of(config), chunk=16)
    for lengths, n in (((20, 30), 5), ((25, 31), 9), ((17, 18), 16)):
        engine.generate(prompts(*lengths), n, GREEDY)
    assert sorted(name for name, _ in engine._programs) == ["advance", "begin", "caches", "continue", "first"]
    assert {program._cache_size() for program in engine._programs.values()} == {1}


def test_a_stop_token_ends_a_sequence_alone():
    config = tiny()
    engine, asked = Engine(config, params_of(config)), prompts(7, 11, 5)
    free = engine.generate(asked, 24, GREEDY)
    stop = int(free[0, 6])
    found = engine.generate(asked, 24, GREEDY, stop=[stop])
    for row, ended in zip(free, found, strict=True):
        hit = np.flatnonzero(row[: found.shape[1]] == stop)
        end = hit[0] + 1 if len(hit) else found.shape[1]
        np.testing.assert_array_equal(ended[:end], row[:end])
        assert (ended[end:] == -1).all()
    every = engine.generate(asked, 24, GREEDY, stop=sorted({int(row[2]) for row in free}))
    assert every.shape[1] <= 3  # nothing is computed once all have ended


def test_ids_that_the_tokenizer_has_not_are_never_drawn():
    config = tiny()
    params = dict(params_of(config), embedding=params_of(config)["embedding"].at[40:].multiply(50))
    drawn = {
        n: Engine(config, params, n_ids=n).generate(prompts(5, 9), 40, Sampling(temperature=2.0)).max() for n in (None, 40)
    }
    assert drawn[40] < 40 <= drawn[None]


def test_a_stream_shows_the_same_tokens_bit_by_bit():
    config = tiny()
    engine, asked = Engine(config, params_of(config)), prompts(7, 11)
    shown = list(engine.stream(asked, 40, GREEDY, segment=8))
    assert [x.shape[1] for x in shown] == [1, 3, 7, 15, 23, 31, 39, 40]
    for part in shown:
        np.testing.assert_array_equal(part, shown[-1][:, : part.shape[1]])
    np.testing.assert_array_equal(shown[-1], engine.generate(asked, 40, GREEDY))


def test_draws_depend_on_the_seed_and_the_place_alone():
    config = tiny()
    engine, (a, b) = Engine(config, params_of(config)), prompts(6, 9)
    rule = Sampling(temperature=1.0, seed=2**40)
    both = engine.generate([a, b], 16, rule)
    np.testing.assert_array_equal(both, engine.generate([a, b], 16, rule))
    np.testing.assert_array_equal(both[0], engine.generate([a], 16, rule)[0])
    assert (both != engine.generate([a, b], 16, dataclasses.replace(rule, seed=3))).any()
    same = engine.generate([a, a], 16, rule)
    assert (same[0] != same[1]).any()


def test_what_is_drawn_has_the_distribution_asked_for():
    logits = jnp.log(jnp.array([0.5, 0.2, 0.15, 0.1, 0.05]))
    many = jnp.broadcast_to(logits, (20_000, 5))

    def shares(**fields):
        rule = Sampling(**{"temperature": 1.0} | fields)
        ids = draw(many, rule.kind, rule.arguments(len(many)), jnp.int32(3))
        return np.bincount(np.asarray(ids), minlength=5) / len(many)

    def near(found, expected):
        np.testing.assert_allclose(found, np.array(expected) / sum(expected), atol=0.015)
        assert (found[np.array(expected) == 0] == 0).all()

    near(shares(), [0.5, 0.2, 0.15, 0.1, 0.05])
    near(shares(temperature=0.5), np.array([0.5, 0.2, 0.15, 0.1, 0.05]) ** 2)
    near(shares(top_k=2), [0.5, 0.2, 0, 0, 0])
    near(shares(top_k=9), [0.5, 0.2, 0.15, 0.1, 0.05])
    near(shares(top_p=0.6), [0.5, 0.2, 0, 0, 0])  # 0.5 is too little
    near(shares(top_p=0.01), [1, 0, 0, 0, 0])
    near(shares(top_k=3, top_p=0.8), [0.5, 0.2, 0, 0, 0])  # of what top_k leaves, 0.5 and 0.2 are 0.82
    near(shares(temperature=0.0), [1, 0, 0, 0, 0])


def test_the_loop_writes_its_caches_in_place():
    """jax#40101 (0.11.1): a small write in a loop cost as much as its whole buffer on CPUs. What the program copies says so."""
    config = tiny(8, 2, n_layers=2)
    engine = Engine(config, params_of(config))
    plan = engine.plan([30_000], 64)
    compiled = engine.lower("advance", plan).compile()
    held = engine.cache_bytes(1, plan.keys)
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= held
    assert memory.temp_size_in_bytes < held / 8
    assert held == 2 * 2 * plan.keys * 2 * 8 * 4  # layers, keys and values, positions, heads, head size, float32
    for line in compiled.as_text().splitlines():  # no copy of a cache's shape
        assert not (" copy(" in line and f"{plan.keys},8]" in line), line


@pytest.mark.parametrize(("mesh", "parts"), [(None, 1), ("tensor=4", 2), ("tensor=2,context=2", 4), ("context=2", 2)])
def test_bytes_of_the_caches_on_a_device(mesh, parts):
    """Two key/value heads: over four devices two hold the same one."""
    config = tiny(8, 2)
    found = Engine(config, params_of(config), mesh=mesh).cache_bytes(3, 512)
    assert found * parts == 3 * 2 * 2 * 512 * 2 * 8 * 4  # sequences, layers, keys and values, positions, heads, size, float32


def test_the_interpreted_tpu_kernel_in_the_loop():
    config = tiny(4, 1, head_dim=32)
    with interpreted():
        engine = Engine(config, params_of(config), attention="pallas_tpu", cache_dtype="int8")
        found = engine.generate(prompts(5, 9), 6, GREEDY)
    check_int8 = Engine(config, params_of(config), cache_dtype="int8").generate(prompts(5, 9), 6, GREEDY)
    np.testing.assert_array_equal(found, check_int8)


@pytest.mark.parametrize(("n_heads", "n_kv_heads", "keys"), [(8, 1, 4096), (32, 8, 512), (12, 12, 1024)])
def test_a_token_copies_neither_caches_nor_parameters_on_a_cpu(n_heads, n_kv_heads, keys):
    """XLA copied caches of one block, or read whole, and turned the output's matrix around, for every token."""
    config = ModelConfig(2, 64, n_heads, n_kv_heads, 64, vocab_size=61, dtype="float32")
    engine = Engine(config, params_of(config))
    program = engine.lower("advance", engine.plan([keys - 32], 32)).compile().as_text()
    moved = re.findall(r"= \w+\[([0-9,]+)\]\S* (?:copy|transpose)\(", program)
    largest = max((int(np.prod([int(size) for size in one.split(",")])) for one in moved), default=0)
    assert largest < min(64 * n_heads * 64, keys * n_kv_heads * 64)


def test_weights_are_cast_once_and_norms_kept():
    config = tiny(8, 1, dtype="bfloat16", untied=True)
    held = weights.prepared(config, params_of(config))
    assert {x.dtype.name for name, x in held["layers"][1].items() if not name.endswith("norm")} == {"bfloat16"}
    assert held["layers"][0]["ffn_norm"].dtype == held["final_norm"].dtype == jnp.float32
    assert len(held["layers"]) == 2
    np.testing.assert_array_equal(held["layers"][1]["up"], params_of(config)["layers"]["up"][1].astype(jnp.bfloat16))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": -1}, "temperature = -1: must be 0"),
        ({"temperature": float("nan")}, "temperature = nan"),
        ({"top_k": 0}, "top_k = 0: must be an integer of at least 1"),
        ({"top_p": 0}, "top_p = 0: must be above 0"),
        ({"top_p": 1.5}, "top_p = 1.5"),
        ({"seed": -1}, "seed = -1: must be 0 to"),
    ],
)
def test_bad_rules_of_drawing(fields, message):
    with pytest.raises(ConfigError, match=message):
        Sampling(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mesh": "fsdp=2"}, "over `tensor` and the cache over `context` alone"),
        ({"mesh": "tensor=3"}, r"3 devices can't share 4 query heads .* from \[1, 2, 4\]"),
        ({"n_ids": 62}, "n_ids = 62: the model has 61 ids"),
        ({"chunk": 1}, "chunk = 1: must be at least 16"),
    ],
)
def test_bad_engines(fields, message):
    with pytest.raises(ConfigError, match=message):
        Engine(tiny(), params_of(tiny()), **fields)
    with pytest.raises(ConfigError, match=r"mesh 'tensor=2': tensor = 2 neither divides model.n_kv_heads = 3"):
        Engine(tiny(6, 3, d_ff=60), params_of(tiny(6, 3, d_ff=60)), mesh="tensor=2")
