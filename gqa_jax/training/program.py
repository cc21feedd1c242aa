"""The programs that a run executes on a mesh: fresh state, training step, held-out losses.

One device or a pod: the step is what each device does with its part of the batch (`jax.shard_map`; `parallel` has the
collectives) and the optimizer on the shards of the state. A configuration must be resolved (`planning.planner.resolve`):
mesh, rematerialisation and accumulation given. The mesh may be of devices that are not there (`planning.topologies`): then
programs compile, and `memory_analysis` tells what they need, but don't run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gqa_jax import attention, model
from gqa_jax.config import TrainConfig
from gqa_jax.errors import ConfigError
from gqa_jax.mesh import SEQUENCES
from gqa_jax.training import optimizer, sharding
from gqa_jax.training.parallel import Shard


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a step changes."""

    step: jax.Array  # int32 scalar: optimizer steps done
    params: dict[str, Any]  # as model.init_params
    opt_state: optax.OptState


def init_state(config: TrainConfig, tx: optax.GradientTransformation, key: jax.Array) -> TrainState:
    """State before the first step; a pure function of the configuration and the key."""
    params = model.init_params(config.model, key)
    return TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=tx.init(params))


def train_step(
    config: TrainConfig, tx: optax.GradientTransformation, mesh: Mesh, state: TrainState, batch: Mapping[str, jax.Array]
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One optimizer step on int32 `tokens` and `targets`, and with document masks `segments`, each (A, B, T).

    The gradient is the mean over A micro-batches of B sequences. It is summed over them and over devices in float32, and its
    norm taken and clipped in float32, whatever the dtype of the parameters. Returns the new state and the float32 scalars
    `loss` (nats per token, before the update) and `grad_norm` (before clipping).
    """
    params_specs = sharding.specs(state.params, sharding.shape_of(mesh), config.model.n_kv_heads)
    gradients = partial(_loss_and_gradients, config)
    mean_loss, grads = _on_devices(gradients, mesh, params_specs, (PartitionSpec(), params_specs))(state.params, batch)
    with jax.named_scope("optimizer"):
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
    return TrainState(state.step + 1, params, opt_state), {"loss": mean_loss, "grad_norm": optax.tree.norm(grads)}


def _on_devices(function: Callable, mesh: Mesh, params_specs: Any, out_specs: Any) -> Callable:
    """`function` (parameters, batch) as every device runs it on its shards."""
    return jax.shard_map(function, mesh=mesh, in_specs=(params_specs, sharding.BATCH), out_specs=out_specs, check_vma=False)


def _loss_and_gradients(config: TrainConfig, params: dict, batch: Mapping[str, jax.Array]) -> tuple[jax.Array, dict]:
    """Of one device: mean loss over the batch of all, and the gradients of the device's shards, float32 or wider.

    Matrices in bfloat16 have a gradient in bfloat16 of each micro-batch, as the product that makes it; sums are in float32.
    """
    shard = Shard(config)

    def share_of_loss(wide_params, micro):
        hidden_BxTxD, whole_VxD = _hidden(shard, params, wide_params, micro)
        return shard.mean_loss(model.unembedding(wide_params), whole_VxD, hidden_BxTxD, micro["targets"])

    def accumulate(carry, micro):
        return jax.tree.map(jnp.add, carry, jax.value_and_grad(share_of_loss)(wide_params, micro)), None

    wide_params = jax.tree_util.tree_map_with_path(_wide_unless_matrix, params)
    steps = config.execution.accumulation_steps
    if steps == 1:
        share, grads = jax.value_and_grad(share_of_loss)(wide_params, jax.tree.map(lambda x: x[0], batch))
        grads = jax.tree.map(_wide, grads)
    else:
        zero = (jnp.zeros((), jnp.float32), jax.tree.map(lambda x: jnp.zeros_like(_wide(x)), params))
        total, _ = jax.lax.scan(accumulate, zero, batch)
        share, grads = jax.tree.map(lambda x: x / steps, total)
    return shard.total(share), shard.sum_gradients(grads)


def _hidden(shard: Shard, held: dict, params: dict, micro: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """The model's last hidden states (B, T, D) of a micro-batch, of one device, and the whole unembedding (V, D).

    The embedding, and a head of its own, are read of `held`; `params` are what gradients are taken for.
    """
    whole_VxD = shard.whole_embedding(held["embedding"])
    config, x_BxTxD = shard.config, shard.embed(params["embedding"], whole_VxD, micro["tokens"])
    hooks, positions = shard.hooks(micro.get("segments")), shard.positions(x_BxTxD.shape[1])
    transformer = model.with_params(config.model, params)
    hidden_BxTxD, _ = transformer.hidden(x_BxTxD, positions, hooks, remat=config.execution.remat or "none")
    return hidden_BxTxD, shard.whole_embedding(held["head"]) if config.model.untied else whole_VxD


def _wide(x: jax.Array) -> jax.Array:
    """x in float32 at least."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _wide_unless_matrix(path: tuple, leaf: jax.Array) -> jax.Array:
    """A parameter as gradients are taken for it: those of embedding, head and norms are sums over tokens, made in float32.

    A matrix stays as it is: a wide copy of them all would need the memory that narrow ones save. Of embedding and head none is
    made: the model reads `Shard.whole_embedding`, and the shard only for its dtype.
    """
    name = sharding.name_of(path)
    return _wide(leaf) if name in ("embedding", "head") or name.endswith("_norm") else leaf


def token_losses(config: TrainConfig, mesh: Mesh, params: dict, batch: Mapping[str, jax.Array]) -> jax.Array:
    """-log p of every target of a batch (1, B, T), (B, T) float32 nats."""
    shard = Shard(config)

    def of_device(params, batch):
        micro = jax.tree.map(lambda x: x[0], batch)
        hidden_BxTxD, whole_VxD = _hidden(shard, params, params, micro)
        return shard.token_losses(whole_VxD, hidden_BxTxD, micro["targets"])

    params_specs = sharding.specs(params, sharding.shape_of(mesh), config.model.n_kv_heads)
    return _on_devices(of_device, mesh, params_specs, PartitionSpec(SEQUENCES, "context"))(params, batch)


def attention_of(config: TrainConfig) -> str:
    """The implementation of attention that the step runs on each device, for the mesh in use or the devices there.

    Raises ConfigError when the one asked for can't run, saying which can.
    """
    shape, mesh = config.model, config.execution.mesh
    case = attention.planned_case(
        batch=config.micro_batch // mesh.sequences,
        length=config.context_length // mesh.context,
        n_heads=shape.n_heads // mesh.tensor,
        n_kv_heads=max(1, shape.n_kv_heads // mesh.tensor),
        head_dim=shape.head_dim,
        dtype=shape.dtype,
        size=mesh.context,
        method=config.execution.context_attention,
        segments=config.data.document_mask,
    )
    try:
        return attention.resolve(config.execution.attention, case)
    except ValueError as error:
        raise ConfigError(f"execution.attention: {error}") from error


def abstract_state(config: TrainConfig, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the training state; allocates nothing."""
    tx = optimizer.adamw(config.optimizer, config.n_steps)
    shapes = jax.eval_shape(partial(init_state, config, tx), jax.random.key(0))
    return sharding.placed(shapes, mesh, config.model.n_kv_heads)


def abstract_batch(config: TrainConfig, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, dtypes and shardings of what a step reads."""
    names = ("tokens", "targets", "segments") if config.data.document_mask else ("tokens", "targets")
    shape = (config.execution.accumulation_steps, config.micro_batch, config.context_length)
    placement = NamedSharding(mesh, sharding.BATCH)
    return {name: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=placement) for name in names}


def fresh_state(config: TrainConfig, mesh: Mesh) -> TrainState:
    """The state before the first step, each shard made where it lies; the same numbers on any mesh."""
    tx = optimizer.adamw(config.optimizer, config.n_steps)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, mesh))
    # Drawing the weights takes a moment, compiling the draws well took seconds on CPU.
    options = {"xla_backend_optimization_level": 0} if mesh.devices.flat[0].platform == "cpu" else {}
    init = jax.jit(partial(init_state, config, tx), out_shardings=shardings, compiler_options=options)
    return init(model.seed_key(config.seed))


def compile_step(config: TrainConfig, mesh: Mesh) -> jax.stages.Compiled:
    """The training step, compiled: (state, batch) -> (state, metrics). The state given is used up."""
    return lower_step(config, mesh).compile()


def lower_step(config: TrainConfig, mesh: Mesh) -> jax.stages.Lowered:
    """The training step, traced and written as the program that the compiler reads."""
    tx = optimizer.adamw(config.optimizer, config.n_steps)
    state = abstract_state(config, mesh)
    everywhere = sharding.replicated(mesh)
    out_shardings = jax.tree.map(lambda leaf: leaf.sharding, state), {"loss": everywhere, "grad_norm": everywhere}
    step = jax.jit(partial(train_step, config, tx, mesh), donate_argnums=0, out_shardings=out_shardings)
    with jax.set_mesh(mesh):  # kernels, and the choice of one, go by the mesh
        return step.lower(state, abstract_batch(config, mesh))


def evaluation_losses(config: TrainConfig, mesh: Mesh) -> jax.stages.Wrapped:
    """A function (params, batch (1, B, T)) -> -log p of every target, (B, T) float32, whole on every device."""
    return jax.jit(partial(token_losses, config, mesh), out_shardings=sharding.replicated(mesh))


def order(config: TrainConfig) -> np.ndarray:
    """Positions of a sequence in the order in which arrays hold them: zig-zag over a context axis, so that work is equal."""
    return attention.zigzag(config.context_length, config.execution.mesh.context)


def local_rows(config: TrainConfig, mesh: Mesh, accumulation_steps: int) -> np.ndarray:
    """Numbers, ascending, of the sequences of a batch (A x B of them) that devices of this process read."""
    shape = (accumulation_steps, config.micro_batch, config.context_length)
    slices = NamedSharding(mesh, sharding.BATCH).addressable_devices_indices_map(shape).values()
    numbers = np.arange(shape[0] * shape[1]).reshape(shape[:2])
    return np.unique(np.concatenate([numbers[steps, sequences].ravel() for steps, sequences, _ in slices]))


def place(
    config: TrainConfig, mesh: Mesh, batch: Mapping[str, np.ndarray], rows: np.ndarray, accumulation_steps: int
) -> dict[str, jax.Array]:
    """Global arrays (A, B, T) of a batch of which this process has the sequences `rows` (`local_rows`), each array (R, T)."""
    shape = (accumulation_steps, config.micro_batch, config.context_length)
    numbers = np.arange(shape[0] * shape[1]).reshape(shape[:2])
    placement, positions = NamedSharding(mesh, sharding.BATCH), order(config)

    def shard(values: np.ndarray, index: tuple[slice, ...]) -> np.ndarray:
        own = np.searchsorted(rows, numbers[index[:2]])
        return values[own[..., None], positions[index[2]]]

    return {
        name: jax.make_array_from_callback(shape, placement, partial(shard, values), dtype=values.dtype)
        for name, values in batch.items()
    }
