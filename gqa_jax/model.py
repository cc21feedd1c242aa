"""Decoder-only Transformer with grouped-query attention, as the paper trains it (arXiv 2503.09579v2, Section 5.1).

Pre-norm blocks, RMSNorm, SwiGLU, RoPE, no biases, embeddings tied unless asked, query heads decoupled from the hidden size.

Axes, here and everywhere: B batch, T query position, S key position, D hidden (d), F feed-forward, L layers, V vocabulary,
N query heads (n_h), K key/value heads (n_kv), G = N / K group, H head size (d_h).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from gqa_jax import attention
from gqa_jax.config import REMAT_POLICIES, ModelConfig

RESIDUAL = "residual"  # name of the residual stream between layers, which a rematerialisation policy may keep


def _attend_alone(q_BxTxNxH: jax.Array, k_BxTxKxH: jax.Array, v_BxTxKxH: jax.Array, state: None) -> tuple[jax.Array, None]:
    return attention.attention(q_BxTxNxH, k_BxTxKxH, v_BxTxKxH), state


def _same[T](x: T) -> T:
    return x


class Hooks(NamedTuple):
    """What stands around the layers' own arithmetic; the defaults are causal attention on one device.

    `gqa_jax.training.parallel` has those of a device of a mesh. `attend` gets rotated queries and keys, and a layer's `state`.
    """

    attend: Callable[..., tuple[jax.Array, Any]] = _attend_alone  # q (B, T, N, H), k, v (B, T, K, H), state -> out, state
    weights: Callable[[dict], dict] = _same  # parameters of a layer as they are held -> as they are multiplied
    enter: Callable[[jax.Array], jax.Array] = _same  # normalised stream -> input of work that devices share
    leave: Callable[[jax.Array], jax.Array] = _same  # what a device made of it -> what all made
    product: Callable[[str, jax.Array, jax.Array], jax.Array] = jnp.einsum  # axes, a stream, parameters -> their product


ALONE = Hooks()


class Block(nnx.Module):
    """One layer: attention, then feed-forward, each behind an RMSNorm and added to the residual stream."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        d, f, h = config.d_model, config.d_ff, config.head_dim
        n, k = config.n_heads, config.n_kv_heads
        dtype = jnp.dtype(config.param_dtype)
        inward = nnx.initializers.normal(config.init_std, dtype)
        outward = nnx.initializers.normal(config.init_std / (2 * config.n_layers) ** 0.5, dtype)  # as in GPT-2
        self.config = config
        self.attention_norm = nnx.Param(jnp.ones(d, dtype))
        self.query = nnx.Param(inward(rngs.params(), (d, n, h)))
        self.key = nnx.Param(inward(rngs.params(), (d, k, h)))
        self.value = nnx.Param(inward(rngs.params(), (d, k, h)))
        self.output = nnx.Param(outward(rngs.params(), (n, h, d)))
        self.ffn_norm = nnx.Param(jnp.ones(d, dtype))
        self.gate = nnx.Param(inward(rngs.params(), (d, f)))
        self.up = nnx.Param(inward(rngs.params(), (d, f)))
        self.down = nnx.Param(outward(rngs.params(), (f, d)))

    def __call__(
        self, x_BxTxD: jax.Array, rotation: tuple[jax.Array, jax.Array], hooks: Hooks = ALONE, state: Any = None
    ) -> tuple[jax.Array, Any]:
        eps = self.config.norm_eps
        normal_BxTxD = hooks.enter(rms_norm(x_BxTxD, self.attention_norm[...], eps))
        attended_BxTxD, state = self._attention(normal_BxTxD, rotation, hooks, state)
        x_BxTxD = x_BxTxD + hooks.leave(attended_BxTxD)
        normal_BxTxD = hooks.enter(rms_norm(x_BxTxD, self.ffn_norm[...], eps))
        return x_BxTxD + hooks.leave(self._ffn(normal_BxTxD, hooks.product)), state

    @jax.named_scope("attention")
    def _attention(self, x_BxTxD: jax.Array, rotation, hooks: Hooks, state: Any) -> tuple[jax.Array, Any]:
        q_BxTxNxH = hooks.product("btd,dnh->btnh", x_BxTxD, self.query[...].astype(x_BxTxD.dtype))
        k_BxTxKxH = hooks.product("btd,dkh->btkh", x_BxTxD, self.key[...].astype(x_BxTxD.dtype))
        v_BxTxKxH = hooks.product("btd,dkh->btkh", x_BxTxD, self.value[...].astype(x_BxTxD.dtype))
        out_BxTxNxH, state = hooks.attend(rotate(q_BxTxNxH, *rotation), rotate(k_BxTxKxH, *rotation), v_BxTxKxH, state)
        return hooks.product("btnh,nhd->btd", out_BxTxNxH, self.output[...].astype(x_BxTxD.dtype)), state

    @jax.named_scope("ffn")
    def _ffn(self, x_BxTxD: jax.Array, product: Callable) -> jax.Array:
        gate_BxTxF = product("btd,df->btf", x_BxTxD, self.gate[...].astype(x_BxTxD.dtype))
        up_BxTxF = product("btd,df->btf", x_BxTxD, self.up[...].astype(x_BxTxD.dtype))
        return product("btf,fd->btd", jax.nn.silu(gate_BxTxF) * up_BxTxF, self.down[...].astype(x_BxTxD.dtype))


class Transformer(nnx.Module):
    """Token ids to next-token logits. `layers` is one Block whose parameters carry a leading axis L, run by a scan."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = config
        dtype, shape = jnp.dtype(config.param_dtype), (config.vocab_size, config.d_model)
        rows = nnx.initializers.normal(config.init_std, dtype)
        self.embedding = nnx.Param(rows(rngs.params(), shape))
        self.layers = _stack(config, jax.random.split(rngs.params(), config.n_layers))
        self.final_norm = nnx.Param(jnp.ones(config.d_model, dtype))
        if config.untied:
            self.head = nnx.Param(rows(rngs.params(), shape))  # drawn last: all others are those of the tied model

    def __call__(self, tokens_BxT: jax.Array) -> jax.Array:
        """Logits (B, T, V), float32, of the token after each position; tokens are integers below V."""
        return self.logits(self.hidden(self.embed(tokens_BxT), jnp.arange(tokens_BxT.shape[1]))[0])

    def embed(self, tokens_BxT: jax.Array) -> jax.Array:
        """Rows of the embedding, (B, T, D) in the compute dtype."""
        return self.embedding[...].astype(self.config.dtype)[tokens_BxT]

    def logits(self, hidden_BxTxD: jax.Array) -> jax.Array:
        """What `hidden` gave, or some of its positions, to logits (B, T, V), float32."""
        return jnp.einsum(
            "btd,vd->btv",
            hidden_BxTxD,
            (self.head if self.config.untied else self.embedding)[...].astype(hidden_BxTxD.dtype),
            preferred_element_type=jnp.promote_types(hidden_BxTxD.dtype, jnp.float32),
        )

    def hidden(
        self, x_BxTxD: jax.Array, positions: jax.Array, hooks: Hooks = ALONE, states: Any = None, remat: str = "none"
    ) -> tuple[jax.Array, Any]:
        """Output of the final norm (B, T, D) in the compute dtype, which `logits` takes, and the layers' states.

        Args:
          x_BxTxD: the embedded tokens, in the compute dtype.
          positions: of the tokens in their sequences, integers (T,) or (B, T).
          states: what `hooks.attend` is given, for each layer: arrays with a leading axis L.
          remat: what the backward pass computes again (`gqa_jax.config.REMAT_POLICIES`).
        """
        layers = nnx.to_pure_dict(nnx.state(self.layers))
        x_BxTxD, states = run_layers(self.config, layers, x_BxTxD, positions, hooks, states, remat)
        return rms_norm(x_BxTxD, self.final_norm[...], self.config.norm_eps), states


def run_layers(
    config: ModelConfig,
    layers: dict | Sequence[dict],
    x_BxTxD: jax.Array,
    positions: jax.Array,
    hooks: Hooks = ALONE,
    states: Any = None,
    remat: str = "none",
) -> tuple[jax.Array, Any]:
    """The residual stream behind the last layer, and the layers' states; arguments as of `Transformer.hidden`.

    `layers` are parameters with a leading axis L, and `states` likewise: a scan. Or both are sequences, an element for each
    layer: then they run one after another, and every state is an array of its own, which a loop over tokens updates in place.
    """
    rotation = rope_rotation(positions, rope_frequencies(config))

    def body(x_BxTxD, layer_and_state):
        layer, state = layer_and_state
        block = _holding(Block, config, hooks.weights(layer))
        return block(checkpoint_name(x_BxTxD, RESIDUAL), rotation, hooks, state)

    body = _remat(body, remat)
    if isinstance(layers, dict):
        return jax.lax.scan(body, x_BxTxD, (layers, states))
    found = []
    for layer, state in zip(layers, [None] * len(layers) if states is None else states, strict=True):
        x_BxTxD, state = body(x_BxTxD, (layer, state))
        found.append(state)
    return x_BxTxD, found


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """x / sqrt(mean(x^2) + eps) * scale over the last axis; statistics in float32, result in x's dtype."""
    x32 = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    normal = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (normal * jnp.expand_dims(scale, range(x.ndim - 1))).astype(x.dtype)


def rope_frequencies(config: ModelConfig) -> np.ndarray:
    """Radians a position of every pair of dims, (H/2,) float32: theta^(-2i/H) (RoFormer, arXiv 2104.09864, Eq. 15), scaled.

    "linear" divides all by `rope_factor`, as if positions were (arXiv 2306.15595). "llama3" divides those with fewer than
    `rope_low_freq_factor` turns in `rope_original_context` tokens, leaves those with more than `rope_high_freq_factor` as they
    are, and goes linearly in turns from one to the other (`apply_scaling` of github.com/meta-llama/llama-models, Llama 3.1).

    Step by step in float32 as transformers has it: a last bit of a frequency is 0.01 radians at position 131,072, where models
    that go to other readers or come from them would answer otherwise. And on no device, as their powers differ.
    """
    exponent_F = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    frequency_F = np.float32(1) / np.float32(config.rope_theta) ** exponent_F
    factor = np.float32(config.rope_factor)
    match config.rope_scaling:
        case "linear":
            return frequency_F / factor
        case "llama3":
            low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
            wavelength_F = np.float32(2 * math.pi) / frequency_F
            kept_F = (np.float32(config.rope_original_context) / wavelength_F - np.float32(low)) / np.float32(high - low)
            between_F = (1 - kept_F) * frequency_F / factor + kept_F * frequency_F
            return np.where(kept_F <= 0, frequency_F / factor, np.where(kept_F >= 1, frequency_F, between_F))
    return frequency_F


def rope_rotation(positions: jax.Array, frequency_F: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine (1 or B, T, 1, H/2), float32, of position times frequency; `positions` are (T,), alike in all sequences,
    or (B, T)."""
    angle_BxTx1xF = jnp.atleast_2d(positions).astype(jnp.float32)[:, :, None, None] * frequency_F[None, None, None, :]
    return jnp.cos(angle_BxTx1xF), jnp.sin(angle_BxTx1xF)


def rotate(x_BxTxNxH: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates dims i and i + H/2 of every head (the half-split convention of Llama checkpoints); float32 inside."""
    first, second = jnp.split(x_BxTxNxH.astype(cos.dtype), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BxTxNxH.dtype)


def _stack(config: ModelConfig, keys: jax.Array) -> Block:
    """One Block whose every parameter has a leading axis of len(keys), each slice initialised from its own key."""
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: Block(config, nnx.Rngs(0))))
    return nnx.merge(graphdef, jax.vmap(lambda key: nnx.state(Block(config, nnx.Rngs(params=key))))(keys))


def _remat(body, policy: str):
    """`body` with the backward pass computing again what `policy` says (config.REMAT_POLICIES).

    All but "none" gather weights again.
    """
    policies = jax.checkpoint_policies
    match policy:
        case "none":
            return body  # gathered weights of all layers are kept too: the planner counts them
        case "full":  # keep the residual stream between layers
            keep = policies.nothing_saveable
        case "attention_only":  # and the results of attention, the dearest to compute again at long contexts
            keep = attention.results_saveable
        case "dots":  # keep the results of weight matmuls, compute attention and elementwise again
            keep = policies.dots_with_no_batch_dims_saveable
        case "offload":  # as attention_only, with the residual stream in the host's memory
            stream = policies.save_and_offload_only_these_names(
                names_which_can_be_saved=[],
                names_which_can_be_offloaded=[RESIDUAL],
                offload_src="device",
                offload_dst="pinned_host",
            )

            def keep(prim, *args, **params):
                return attention.results_saveable(prim, *args, **params) or stream(prim, *args, **params)

        case _:
            raise ValueError(f"unknown remat policy {policy!r}: use {', '.join(REMAT_POLICIES)}")
    return jax.checkpoint(body, prevent_cse=False, policy=keep)


def init_params(config: ModelConfig, key: jax.Array) -> dict:
    """Fresh parameters as a nested dict of arrays; a pure function of (config, key)."""
    return nnx.to_pure_dict(nnx.state(Transformer(config, nnx.Rngs(params=key))))


def seed_key(seed: int) -> jax.Array:
    """The random key of a seed, 0 to 2^63 - 1, for each another: `jax.random.key` alone drops all but the lower 32 bits."""
    key = jax.random.key(seed % 2**32)
    return jax.random.fold_in(key, seed >> 32) if seed >> 32 else key


def with_params(config: ModelConfig, params: dict) -> Transformer:
    """The model that holds `params`, a nested dict as `init_params` returns; allocates nothing."""
    return _holding(Transformer, config, params)


def unembedding(params: dict) -> Any:
    """The matrix (V, D) of the logits, of parameters or what is like them: an untied model's head, else the embedding."""
    return params.get("head", params["embedding"])


def _holding[M: nnx.Module](kind: type[M], config: ModelConfig, params: dict) -> M:
    graphdef, state = nnx.split(nnx.eval_shape(lambda: kind(config, nnx.Rngs(0))))
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graphdef, state)
