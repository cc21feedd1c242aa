"""What attention is within a training step: its grids, what is kept of it, and derivatives that it has and has not."""

import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gqa_jax import attention, optimizer, program, sharding
from gqa_jax.attention import gradient, implementations, oracle
from gqa_jax.attention.masks import Mask
from gqa_jax.config import TrainConfig
from tests import attention_cases as cases
from tests import machines


def step_config(context_length, *, n_layers=2, remat="attention_only", **model):
    """One device, one sequence."""
    values = TrainConfig(steps=10).to_dict()
    values |= {"context_length": context_length, "batch_tokens": context_length, "mesh": "data=1", "accumulation_steps": 1}
    values |= {"context_attention": "gather"}
    values["data"]["block_tokens"] = values["evaluation"]["tokens"] = context_length
    sizes = {"n_layers": n_layers, "d_model": 128, "n_heads": 8, "n_kv_heads": 1, "vocab_size": 512, "d_ff": None}
    values["model"] |= sizes | {"remat": remat} | model
    return TrainConfig.from_dict(values)


def traced_step(config, mesh):
    """`program.train_step` as it is compiled: shard_map, scan over layers, checkpoint, gradient."""
    step = functools.partial(program.train_step, config, optimizer.adamw(config.optimizer, config.n_steps), mesh)
    arguments = program.abstract_state(config, mesh), program.abstract_batch(config, mesh)
    with jax.set_mesh(mesh):
        return jax.jit(step).trace(*arguments)


def equations(jaxpr):
    """All of a jaxpr's equations, of those within it too."""
    for equation in jaxpr.eqns:
        yield equation
        inner = jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr"))
        for x in inner:
            x = getattr(x, "jaxpr", x)
            if hasattr(x, "eqns") and equation.primitive.name != "pallas_call":
                yield from equations(x)


def grids(jaxpr):
    """Name, grid and number of prefetched scalars of each Pallas call."""
    for equation in equations(jaxpr):
        if equation.primitive.name == "pallas_call":
            mapping = equation.params["grid_mapping"]
            name = equation.params.get("name") or equation.params["name_and_src_info"].name
            yield name, mapping.grid, mapping.num_index_operands
