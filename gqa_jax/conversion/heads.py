"""A trained model with other heads: fewer key/value heads by pooling, more by repetition, query heads left out.

Key/value heads n g to n g + g - 1 become head n, which their query heads share (GQA, arXiv 2305.13245, Section 2.1). What is
pooled is what keys and values are projected with; rotations are the same for all heads, so a mean of keys is a mean of rotated
keys. Axes as in `gqa_jax.model`.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from gqa_jax import model
from gqa_jax.config import HEAD_METHODS, ModelConfig, check_heads
from gqa_jax.errors import ConfigError, closest
from gqa_jax.training import sharding
from gqa_jax.training.checkpoint import restore_start
from gqa_jax.training.start import Start


def check_method(method: str) -> None:
    """Raises ConfigError unless a method is one of HEAD_METHODS."""
    if method not in HEAD_METHODS:
        raise ConfigError(f"method = {method!r}: {closest(method, HEAD_METHODS)}")


def target(source: ModelConfig, n_kv_heads: int | None = None, n_heads: int | None = None) -> ModelConfig:
    """The model with other heads; None: as many as there. Raises ConfigError, naming what is possible."""
    n_heads = source.n_heads if n_heads is None else n_heads
    n_kv_heads = source.n_kv_heads if n_kv_heads is None else n_kv_heads
    check_heads(source, n_heads, n_kv_heads)
    return dataclasses.replace(source, n_heads=n_heads, n_kv_heads=n_kv_heads)


def convert(params: dict, config: ModelConfig, method: str) -> dict:
    """Parameters with the heads of `config`, of parameters with others; a pure function of arrays.

    Args:
      params: nested dict as `gqa_jax.model.init_params` returns.
      method: of HEAD_METHODS, how a group of g key/value heads becomes one. "mean": their mean (arXiv 2305.13245).
        "scaled_mean": that times sqrt(g), which keeps the norm of heads that have nothing in common. "first": the first one.

    Query heads are left out by the product of their value and output matrices: those of the smallest Frobenius norm in each
    group, |W_V W_O| (Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits": all that a head can write).
    Raises ConfigError for an unknown method.
    """
    check_method(method)
    layers = dict(params["layers"])
    for name in ("key", "value"):
        layers[name] = _regroup(layers[name], config.n_kv_heads, method)
    if config.n_heads < layers["query"].shape[2]:
        layers["query"], layers["output"] = _strongest(layers, config)
    return params | {"layers": layers}


def _regroup(x_LxDxKxH: jax.Array, n_kv_heads: int, method: str) -> jax.Array:
    n_layers, d_model, here, head_dim = x_LxDxKxH.shape
    if n_kv_heads >= here:
        return jnp.repeat(x_LxDxKxH, n_kv_heads // here, axis=2)
    size = here // n_kv_heads
    x_LxDxKxSxH = x_LxDxKxH.reshape(n_layers, d_model, n_kv_heads, size, head_dim)
    if method == "first":
        return x_LxDxKxSxH[:, :, :, 0]
    mean = x_LxDxKxSxH.astype(jnp.float32).mean(3)
    return (mean * (size**0.5 if method == "scaled_mean" else 1.0)).astype(x_LxDxKxH.dtype)


def _strongest(layers: dict, config: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """Query and output matrices of the n_h / n_kv heads of each group that can write most, in their order."""
    query_LxDxNxH, output_LxNxHxD = layers["query"], layers["output"]
    n_layers, d_model, here, head_dim = query_LxDxNxH.shape
    k, kept = config.n_kv_heads, config.n_heads // config.n_kv_heads
    query = query_LxDxNxH.reshape(n_layers, d_model, k, here // k, head_dim)
    output = output_LxNxHxD.reshape(n_layers, k, here // k, head_dim, d_model)
    wide = jnp.promote_types(output.dtype, jnp.float32)
    # |W_V W_O|^2 = tr(W_V' W_V W_O W_O'): products of H x H matrices.
    values = jnp.einsum("ldkh,ldki->lkhi", layers["value"].astype(wide), layers["value"].astype(wide))
    outputs = jnp.einsum("lkghd,lkgid->lkghi", output.astype(wide), output.astype(wide))
    strength_LxKxG = jnp.einsum("lkhi,lkghi->lkg", values, outputs)
    chosen_LxKxG = jnp.sort(jnp.argsort(-strength_LxKxG, axis=-1)[..., :kept], axis=-1)
    query = jnp.take_along_axis(query, chosen_LxKxG[:, None, :, :, None], axis=3)
    output = jnp.take_along_axis(output, chosen_LxKxG[..., None, None], axis=2)
    shape = n_layers, config.n_heads, head_dim, d_model
    return query.reshape(n_layers, d_model, config.n_heads, head_dim), output.reshape(shape)


def restored(source: Start, config: ModelConfig, method: str, abstract_params: dict) -> dict:
    """The parameters of a start with the heads of `config`, placed as `abstract_params`. ConfigError: as `restore_start`."""
    shapes = jax.eval_shape(partial(model.init_params, source.model), jax.random.key(0))
    mesh = jax.tree.leaves(abstract_params)[0].sharding.mesh
    # Cut by the hidden size alone: the tensor axis may divide the heads here and not there.
    specs = sharding.specs(shapes, dataclasses.replace(sharding.shape_of(mesh), tensor=1), source.model.n_kv_heads)
    placed = jax.tree.map(
        lambda one, spec: jax.ShapeDtypeStruct(one.shape, one.dtype, sharding=NamedSharding(mesh, spec)), shapes, specs
    )
    there = jax.tree.map(lambda one: one.sharding, abstract_params)
    act = jax.jit(partial(convert, config=config, method=method), out_shardings=there)
    return act(restore_start(source, placed))
