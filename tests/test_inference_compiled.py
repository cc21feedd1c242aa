"""Programs of generation compiled for chips that are not here: no copy of a cache, nothing padded, the memory that is said."""

import functools
import re

import jax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from gqa_jax import costs, model
from gqa_jax.config import ModelConfig
from gqa_jax.inference.engine import Engine
from gqa_jax.search.roofline import RooflineServing
from tests import machines

CONTEXT = 131_072
#: Chips, query heads, key/value heads and head size; a layer's worth of each is compiled several times.
TPUS = [("v5e", 8, 1, 64), ("v6e", 32, 8, 64)]
GPUS = [("h100", 8, 1, 64), ("h100", 16, 8, 128)]
OF_TPUS = pytest.mark.needs("libtpu")
OF_GPUS = pytest.mark.needs("jax-cuda13-plugin")
CASES = [
    *(pytest.param(*case, marks=(OF_TPUS, *thorough)) for case, thorough in zip(TPUS, ((), ()), strict=True)),
    *(
        pytest.param(*case, marks=(OF_GPUS, *thorough))
        for case, thorough in zip(GPUS, ((), (pytest.mark.thorough,)), strict=True)
    ),
]


def compiled(chip, n_heads, n_kv, head_dim, name, layers=4):
    """A program, and its engine and sizes: one sequence of 128K."""
    config = ModelConfig(n_layers=layers, d_model=1536, n_heads=n_heads, n_kv_heads=n_kv, head_dim=head_dim)
    params = jax.eval_shape(functools.partial(model.init_params, config), jax.random.key(0))
    mesh = machines.mesh(chip)
    with jax.set_mesh(mesh):
        engine = Engine(config, params)
        plan = engine.plan([CONTEXT - 128], 128)
        program = engine.lower(name, plan, NamedSharding(mesh, PartitionSpec())).compile()
        held = engine.cache_bytes(1, plan.keys)
    return program, engine, plan, held


def weight_bytes(engine):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(engine.weights))


@pytest.mark.parametrize(("chip", "n_heads", "n_kv", "head_dim"), CASES)
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
def test_a_step_of_decoding_copies_no_cache(chip, n_heads, n_kv, head_dim):
    program, engine, plan, held = compiled(chip, n_heads, n_kv, head_dim, "advance")
    memory, weights = program.memory_analysis(), weight_bytes(engine)
    moved = re.findall(rf"= \w+\[[0-9,]*\b{plan.keys}\b[0-9,]*\]\S* (?:copy|copy-start|transpose)\(", program.as_text())
    assert not moved
    assert memory.alias_size_in_bytes >= held  # written where they lie
    assert memory.argument_size_in_bytes < 1.1 * (held + weights)  # as they lie there, padded
    # On GPUs the parts' results of every layer and the room of products, whatever the context
    assert memory.temp_size_in_bytes < (2**25 if chip == "h100" else 2**22)


@pytest.mark.parametrize(("chip", "n_heads", "n_kv", "head_dim"), CASES)
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
def test_a_chunk_of_a_prompt_takes_the_memory_that_is_said(chip, n_heads, n_kv, head_dim):
    """Of 24 layers within a tenth of weights, caches and `working_bytes`, and less than that but for the hundredth part.

    4 layers are compiled: what is not weights or caches is of one layer at a time. Weights and caches are the costs' formulas'.
    """
    program, engine, plan, held = compiled(chip, n_heads, n_kv, head_dim, "continue")
    memory = program.memory_analysis()
    taken = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    said = weight_bytes(engine) + held + engine.working_bytes(plan)
    config = engine.config
    four, more = (
        float(RooflineServing(chip).memory_bytes(
            costs.Shape(layers, 1536, n_heads, n_kv, head_dim, config.d_ff, config.vocab_size), CONTEXT, 1))
        for layers in (4, 24)
    )  # fmt: skip
    assert weight_bytes(engine) + held == pytest.approx(four, rel=0.01)
    assert taken + more - four == pytest.approx(said + more - four, rel=0.1)
    assert taken < said + 0.01 * more
