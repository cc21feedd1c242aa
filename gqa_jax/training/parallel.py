"""What a device of a mesh does beside its own arithmetic: gathers weights, sums, looks at keys of others.

The training step is one program that every device runs on its shard (`jax.shard_map`); the model calls these where shards
meet, as `model.Hooks`. On a mesh of one device each returns what it is given. All collectives of the step are here and in
`attention.context`:

    weights, forward and again backward     all-gather over fsdp and context, in the compute dtype; gradients reduce-scattered
                                            in float32, per layer and micro-batch; summed over data in float32, once a step
    embedding, a head of its own            all-gather once a micro-batch; two float32 reduce-scatters (lookup, loss)
    tensor                                  a sum per attention and per feed-forward network each way (arXiv 1909.08053)
    context                                 keys and values of a layer (`attention.context_attention`)
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from gqa_jax import attention
from gqa_jax.collectives import reduce_scatter
from gqa_jax.config import TrainConfig
from gqa_jax.mesh import AXES, MeshShape
from gqa_jax.model import Hooks
from gqa_jax.training import loss, sharding


@dataclasses.dataclass(frozen=True)
class Shard:
    """A device's share of a run, whose mesh is given or chosen, within `jax.shard_map` over all its axes."""

    config: TrainConfig

    @property
    def mesh(self) -> MeshShape:
        return self.config.execution.mesh

    def cuts(self, name: str) -> tuple[tuple[str, ...], ...]:
        """`sharding.cuts` of the leaf `name`."""
        return sharding.cuts(name, self.mesh, self.config.model.n_kv_heads)

    def hooks(self, segments_BxT: jax.Array | None) -> Hooks:
        """What the layers do on this device; with segments, attention stays within the documents that they number."""

        def attend(q_BxTxNxH: jax.Array, k_BxTxKxH: jax.Array, v_BxTxKxH: jax.Array, state: None) -> tuple[jax.Array, None]:
            return attention.context_attention(
                q_BxTxNxH,
                k_BxTxKxH,
                v_BxTxKxH,
                axis="context",
                size=self.mesh.context,
                method=self.config.execution.context_attention or "gather",
                implementation=self.config.execution.attention,
                segment_ids=segments_BxT,
            ), state

        if self.mesh.tensor == 1:
            return Hooks(attend, self.weights)
        return Hooks(attend, self.weights, enter=lambda x: _enter(x, None), leave=_leave)

    def weights(self, layer: dict) -> dict:
        """Parameters of one layer whole, but for what `tensor` cuts, in the compute dtype; as they are where nothing is cut."""
        return jax.tree_util.tree_map_with_path(lambda path, leaf: self._weight(sharding.name_of(path), leaf), layer)

    def _weight(self, name: str, leaf: jax.Array) -> jax.Array:
        narrow, n_kv_heads = jnp.promote_types(leaf.dtype, jnp.float32) != leaf.dtype, self.config.model.n_kv_heads
        for dimension, axes in enumerate(self.cuts(name)):
            if gathered := tuple(axis for axis in axes if axis != "tensor"):
                leaf = _gather(leaf, gathered, dimension, self.config.model.dtype)
        if name in ("key", "value") and n_kv_heads % self.mesh.tensor:
            # Every device has all key/value heads and needs the one that its queries read.
            head = jax.lax.axis_index("tensor") * n_kv_heads // self.mesh.tensor
            leaf = jax.lax.dynamic_slice_in_dim(_enter(leaf, "float32" if narrow else None), head, 1, axis=1)
        return leaf

    def positions(self, length: int) -> jax.Array:
        """Positions in their sequence of the `length` tokens that this device has, int32 (T,)."""
        return attention.positions(length, "context", self.mesh.context)

    def whole_embedding(self, shard_VxD: jax.Array) -> jax.Array:
        """Embedding or head (V, D) in the compute dtype, without a gradient: for that others take the shard."""
        shard_VxD, axes = jax.lax.stop_gradient(shard_VxD), self._embedding_axes
        return jax.lax.all_gather(shard_VxD.astype(self.config.model.dtype), axes, axis=1, tiled=True) if axes else shard_VxD

    @jax.named_scope("embedding")
    def embed(self, shard_VxD: jax.Array, whole_VxD: jax.Array, tokens_BxT: jax.Array) -> jax.Array:
        """Rows of the embedding for tokens, (B, T, D) in the compute dtype; gradients of equal tokens are summed in float32."""
        x_CxD = _embed(shard_VxD, whole_VxD, self._own(tokens_BxT), self._embedding_axes)
        return self._all(x_CxD.astype(self.config.model.dtype)).reshape(*tokens_BxT.shape, -1)

    def mean_loss(self, shard_VxD: jax.Array, whole_VxD: jax.Array, hidden_BxTxD: jax.Array, targets_BxT: jax.Array):
        """This device's share of the mean cross-entropy over the tokens of all devices: shares add up to it. float32."""
        hidden_CxD = self._own_features(hidden_BxTxD.reshape(-1, hidden_BxTxD.shape[-1]))
        mean = loss.mean_loss_of_shard(
            shard_VxD, whole_VxD, hidden_CxD[None], self._own(targets_BxT)[None], self._embedding_axes
        )
        return mean / self.mesh.n_devices

    def token_losses(self, whole_VxD: jax.Array, hidden_BxTxD: jax.Array, targets_BxT: jax.Array) -> jax.Array:
        """-log p of each target that this device has, (B, T) float32."""
        hidden_CxD = self._own_features(hidden_BxTxD.reshape(-1, hidden_BxTxD.shape[-1]))
        losses_C = loss.token_losses(hidden_CxD[None], whole_VxD, self._own(targets_BxT)[None])[0]
        return self._all(losses_C).reshape(targets_BxT.shape)

    def total(self, x: jax.Array) -> jax.Array:
        """The sum of x over all devices."""
        axes = tuple(axis for axis in AXES if self.mesh.sizes[axis] > 1)
        return jax.lax.psum(x, axes) if axes else x

    def sum_gradients(self, grads: Any) -> Any:
        """Gradients of this device's shards, summed over the devices that hold the same shard and saw other tokens."""

        def summed(path, grad):
            cut = {axis for axes in self.cuts(sharding.name_of(path)) for axis in axes}
            axes = tuple(a for a in ("data", "fsdp", "context") if self.mesh.sizes[a] > 1 and a not in cut)
            return jax.lax.psum(grad, axes) if axes else grad

        return jax.tree_util.tree_map_with_path(summed, grads)

    @property
    def _embedding_axes(self) -> tuple[str, ...]:
        return self.cuts("embedding")[1]

    # Devices of `tensor` hold the same tokens; embedding and loss are computed by each for its own share of them.

    def _own(self, x_BxT: jax.Array) -> jax.Array:
        flat = x_BxT.reshape(-1)
        if self.mesh.tensor == 1:
            return flat
        share = flat.shape[0] // self.mesh.tensor
        return jax.lax.dynamic_slice_in_dim(flat, jax.lax.axis_index("tensor") * share, share)

    def _own_features(self, x_CxD: jax.Array) -> jax.Array:
        return _scatter_tokens(x_CxD) if self.mesh.tensor > 1 else x_CxD

    def _all(self, x_C: jax.Array) -> jax.Array:
        return _gather_tokens(x_C) if self.mesh.tensor > 1 else x_C


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gather(shard: jax.Array, axes: tuple[str, ...], dimension: int, dtype: str) -> jax.Array:
    return jax.lax.all_gather(shard.astype(dtype), axes, axis=dimension, tiled=True)


def _gather_forward(shard, axes, dimension, dtype):
    return _gather(shard, axes, dimension, dtype), jnp.zeros((), shard.dtype)


def _gather_backward(axes, dimension, dtype, like, cotangent):
    return (reduce_scatter(cotangent, axes, dimension).astype(like.dtype),)


_gather.defvjp(_gather_forward, _gather_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _embed(shard_VxD, whole_VxD, tokens_C, axes):
    return whole_VxD[tokens_C]


def _embed_forward(shard_VxD, whole_VxD, tokens_C, axes):
    return whole_VxD[tokens_C], (tokens_C, jnp.zeros((whole_VxD.shape[0], 0), shard_VxD.dtype))


def _embed_backward(axes, kept, d_x_CxD):
    tokens_C, like_Vx0 = kept
    d_x_CxD = d_x_CxD.astype(jnp.promote_types(d_x_CxD.dtype, jnp.float32))
    d_whole_VxD = jnp.zeros((like_Vx0.shape[0], d_x_CxD.shape[1]), d_x_CxD.dtype).at[tokens_C].add(d_x_CxD)
    return reduce_scatter(d_whole_VxD, axes, 1).astype(like_Vx0.dtype), None, None


_embed.defvjp(_embed_forward, _embed_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _enter(x, sum_dtype):
    return x


def _enter_backward(sum_dtype, _, cotangent):
    return (jax.lax.psum(cotangent.astype(sum_dtype or cotangent.dtype), "tensor").astype(cotangent.dtype),)


_enter.defvjp(lambda x, _: (x, None), _enter_backward)


@jax.custom_vjp
def _leave(x):
    return jax.lax.psum(x, "tensor")


_leave.defvjp(lambda x: (_leave(x), None), lambda _, cotangent: (cotangent,))


@jax.custom_vjp
def _scatter_tokens(x_CxD):
    share = x_CxD.shape[0] // jax.lax.axis_size("tensor")
    return jax.lax.dynamic_slice_in_dim(x_CxD, jax.lax.axis_index("tensor") * share, share)


_scatter_tokens.defvjp(lambda x: (_scatter_tokens(x), None), lambda _, cotangent: (_gather_tokens(cotangent),))


@jax.custom_vjp
def _gather_tokens(x_C):
    return jax.lax.all_gather(x_C, "tensor", tiled=True)


_gather_tokens.defvjp(lambda x: (_gather_tokens(x), None), lambda _, cotangent: (_scatter_tokens(cotangent),))
