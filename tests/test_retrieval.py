"""The model of exact weights finds every needle through generation: chunks of a prompt, every cache, and the decode step."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

from gqa_jax.inference.engine import Engine
from gqa_jax.inference.sampling import Sampling
from tests import retrieval


@functools.cache
def haystack(context, count):
    return retrieval.haystack(context, count, theta=500_000.0 if context <= 1024 else 1e7)


def found(of, *, params=None, dtype="float32", cache_dtype=None, chunk=512, batch=10):
    """How many needles are found: the prompt is read but for its last word, which the loop over tokens reads from the cache."""
    engine = Engine(dataclasses.replace(of.config, dtype=dtype), params or of.params, cache_dtype=cache_dtype, chunk=chunk)
    right = 0
    for i in range(0, len(of.prompts), batch):
        prompts, values = of.prompts[i : i + batch], of.values[i : i + batch]
        plan, carry, rule = engine.start([prompt[:-1] for prompt in prompts], 2, Sampling())
        carry = carry._replace(token_B=jnp.array([prompt[-1] for prompt in prompts], jnp.int32))
        answers = jax.device_get(engine.advance(plan, carry, rule, 2).out_BxM)[:, 1]
        right += sum(int(answer) == value for answer, value in zip(answers, values, strict=True))
    return right


def test_every_needle_is_found():
    assert found(haystack(1024, 20)) == 20


@pytest.mark.parametrize("part", retrieval.PARTS)
def test_without_one_of_its_heads_none_is(part):
    of = haystack(1024, 10)
    assert found(of, params=retrieval.without(of.params, part)) == 0


@pytest.mark.slow
@pytest.mark.parametrize("cache_dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize(("context", "count", "batch"), [(1024, 100, 10), (4096, 20, 5)])
def test_all_of_them_in_every_cache(context, count, batch, cache_dtype):
    assert found(haystack(context, count), cache_dtype=cache_dtype, batch=batch) == count


@pytest.mark.slow
def test_in_bfloat16():
    assert found(haystack(1024, 100), dtype="bfloat16") == 100


def test_what_is_generated_ends_with_the_value():
    of = haystack(1024, 20)
    engine = Engine(of.config, of.params, chunk=256)
    assert engine.generate(of.prompts[:4], 1, Sampling())[:, 0].tolist() == of.values[:4]
