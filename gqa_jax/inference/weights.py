"""Parameters as generation multiplies by them: cast once, a dict for each layer, cut over the devices that share a model.

Programs take them as arguments. Closed over, they would be constants of every program, folded while it compiles; and XLA's CPU
compiler (jax 0.11.2) has made NaN of closed-over zeros.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gqa_jax.config import ModelConfig
from gqa_jax.errors import ConfigError
from gqa_jax.mesh import MeshShape, divisors

ALL = ("tensor", "context")  # axes over which everything is cut but keys and values


def unsupported_reason(config: ModelConfig, shape: MeshShape) -> str | None:
    """Why devices can't share a model as `shape` says, or None: tensor and context divide the query heads, no other axis."""
    if shape.data * shape.fsdp > 1:
        return f"mesh {str(shape)!r}: generation divides heads over `tensor` and the cache over `context` alone"
    over = shape.tensor * shape.context
    if config.n_heads % over or config.d_ff % over:
        allowed = [n for n in divisors(config.n_heads) if config.d_ff % n == 0]
        return (
            f"mesh {str(shape)!r}: {over} devices can't share {config.n_heads} query heads and a feed-forward width of "
            f"{config.d_ff}: use a product of tensor and context from {allowed}"
        )
    if config.n_kv_heads % shape.tensor and shape.tensor % config.n_kv_heads:
        return (
            f"mesh {str(shape)!r}: tensor = {shape.tensor} neither divides nor is a multiple of {config.n_kv_heads} key/value "
            "heads"
        )
    return None


def kv_heads_held(config: ModelConfig, tensor: int) -> int:
    """Key/value heads on each device: where there are fewer than devices, several hold the same one."""
    return max(1, config.n_kv_heads // tensor)


def specs(config: ModelConfig) -> dict[str, Any]:
    """How each array lies on a mesh of `tensor` and `context`."""
    layer = {
        "attention_norm": P(), "query": P(None, ALL), "key": P(None, "tensor"), "value": P(None, "tensor"), "output": P(ALL),
        "ffn_norm": P(), "gate": P(None, ALL), "up": P(None, ALL), "down": P(ALL),
    }  # fmt: skip
    ends = {"embedding": P(ALL), "final_norm": P()} | ({"head": P(ALL)} if config.untied else {})
    return ends | {"layers": [layer] * config.n_layers}


def prepared(config: ModelConfig, params: dict, mesh: Mesh | None = None) -> dict[str, Any]:
    """Parameters of `gqa_jax.model.init_params` for `gqa_jax.inference.engine`: of config.dtype, norms as they are.

    On a mesh the rows of the vocabulary are padded with zeros to what its devices can share, and key/value heads are repeated
    where there are fewer than `tensor`.

    Raises ConfigError for a mesh that can't share this model.
    """
    shape = MeshShape() if mesh is None else MeshShape(**{name: mesh.shape[name] for name in ("data", "fsdp", *ALL)})
    if (reason := unsupported_reason(config, shape)) is not None:
        raise ConfigError(reason)
    repeats = max(1, shape.tensor // config.n_kv_heads)
    rows = -config.vocab_size % (shape.tensor * shape.context)

    def narrow(name: str, x: jax.Array) -> jax.Array:
        x = jnp.asarray(x) if name.endswith("_norm") else jnp.asarray(x, config.dtype)
        if name in ("key", "value"):
            x = jnp.repeat(x, repeats, axis=1)
        return jnp.pad(x, ((0, rows), (0, 0))) if name in ("embedding", "head") and rows else x

    found = {name: narrow(name, x) for name, x in params.items() if name != "layers"}
    found["layers"] = [{name: narrow(name, x[i]) for name, x in params["layers"].items()} for i in range(config.n_layers)]
    if mesh is None:
        return found
    return jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), found, specs(config))
