"""Parameters as generation multiplies by them: cast once, a dict for each layer, cut over the devices that share a model.

Programs take them as arguments. Closed over, they would be constants of every program, folded while it compiles; and XLA's CPU
compiler (jax 0.11.2) has made NaN of closed-over zeros.

On CPUs a step of decoding reads parameters and does little else, so there they are held in rows, one for each output: XLA's
library packs the right-hand matrix of a product each time, more bytes than it has. `product` has the rows on the left.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
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
    reason = shape.kv_heads_reason(config.n_kv_heads)
    return None if reason is None else f"mesh {str(shape)!r}: {reason}"


def kv_heads_held(config: ModelConfig, tensor: int) -> int:
    """Key/value heads on each device: where there are fewer than devices, several hold the same one."""
    return max(1, config.n_kv_heads // tensor)


FEW = 32  # rows up to which a product's time is that of reading its parameters
#: Matrices of a layer: how many of their axes, the first ones, are summed over in a product.
_SUMMED = {"query": 1, "key": 1, "value": 1, "output": 2, "gate": 1, "up": 1, "down": 1}


def product(axes: str, x: jax.Array, rows: jax.Array) -> jax.Array:
    """einsum(axes, x, w) of a matrix `w` that is held in rows: its axes that are summed over come last, and last in `x` too.

    Few rows of `x`, as of a step of decoding, stand on the right; the barrier keeps XLA from exchanging the two sides again.
    Matrices are made of all axes first: of two that are summed over XLA would turn the parameters around for each token.
    """
    given, wanted = axes.split("->")
    of_x, of_w = given.split(",")
    summed = [axis for axis in of_w if axis in of_x]
    if not (of_x.endswith("".join(summed)) and wanted == of_x[: -len(summed)] + of_w[len(summed) :]):
        raise ValueError(f"{axes}: what is summed over must come last in the stream and first in its parameters")
    count = math.prod(x.shape[-len(summed) :])
    left_RxS, right_MxS = rows.reshape(-1, count), x.reshape(-1, count)
    if len(right_MxS) > FEW:
        found_MxR = jnp.einsum("ms,rs->mr", right_MxS, left_RxS)
    else:
        found_MxR = lax.optimization_barrier(jnp.einsum("rs,ms->rm", left_RxS, right_MxS)).T
    return found_MxR.reshape(*x.shape[: -len(summed)], *rows.shape[: rows.ndim - len(summed)])


def in_rows(name: str, x: Any) -> Any:
    """A matrix of a layer, or how its axes lie on a mesh, as `product` takes it."""
    if name not in _SUMMED:
        return x
    count = _SUMMED[name]
    if isinstance(x, P):
        axes = (*x, None, None)[: 3 if name in ("query", "key", "value", "output") else 2]
        return P(*axes[count:], *axes[:count])
    return jnp.moveaxis(x, range(count), range(x.ndim - count, x.ndim))


def specs(config: ModelConfig, rows: bool = False) -> dict[str, Any]:
    """How each array lies on a mesh of `tensor` and `context`."""
    layer = {
        "attention_norm": P(), "query": P(None, ALL), "key": P(None, "tensor"), "value": P(None, "tensor"), "output": P(ALL),
        "ffn_norm": P(), "gate": P(None, ALL), "up": P(None, ALL), "down": P(ALL),
    }  # fmt: skip
    if rows:
        layer = {name: in_rows(name, spec) for name, spec in layer.items()}
    ends = {"embedding": P(ALL), "final_norm": P()} | ({"head": P(ALL)} if config.untied else {})
    return ends | {"layers": [layer] * config.n_layers}


def prepared(config: ModelConfig, params: dict, mesh: Mesh | None = None, rows: bool = False) -> dict[str, Any]:
    """Parameters of `gqa_jax.model.init_params` for `gqa_jax.inference.engine`: of config.dtype, norms as they are.

    On a mesh the rows of the vocabulary are padded with zeros to what its devices can share, and key/value heads are repeated
    where there are fewer than `tensor`. rows: matrices of layers are held in rows (`product`).

    Raises ConfigError for a mesh that can't share this model.
    """
    shape = MeshShape() if mesh is None else MeshShape(**{name: mesh.shape[name] for name in ("data", "fsdp", *ALL)})
    if (reason := unsupported_reason(config, shape)) is not None:
        raise ConfigError(reason)
    repeats = max(1, shape.tensor // config.n_kv_heads)
    more = -config.vocab_size % (shape.tensor * shape.context)

    def narrow(name: str, x: jax.Array) -> jax.Array:
        x = jnp.asarray(x) if name.endswith("_norm") else jnp.asarray(x, config.dtype)
        if name in ("key", "value"):
            x = jnp.repeat(x, repeats, axis=1)
        if rows:
            x = in_rows(name, x)
        return jnp.pad(x, ((0, more), (0, 0))) if name in ("embedding", "head") and more else x

    found = {name: narrow(name, x) for name, x in params.items() if name != "layers"}
    found["layers"] = [{name: narrow(name, x[i]) for name, x in params["layers"].items()} for i in range(config.n_layers)]
    if mesh is None:
        return found
    return jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), found, specs(config, rows))
