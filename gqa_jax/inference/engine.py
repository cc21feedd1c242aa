"""Programs of generation: a prompt is read in chunks, its keys and values kept, then a loop on the device makes token by token.

Sequences are right-padded: `length` says how many positions of each are text, and what lies behind them is written over by what
is generated. Shapes come in buckets (`bucket`), so that a program is compiled once for each: chunks of a prompt, entries of a
cache, tokens of an answer.

On a mesh each device has n_h / (tensor x context) query heads, n_kv / tensor key/value heads and S / context positions of the
cache (`gqa_jax.search.roofline` has the costs): queries are gathered over `context`, every device attends to its positions, and
the parts are merged by their log-sum-exp as they are handed back (arXiv 2507.07120). Feed-forward network and vocabulary are
cut over all devices.

Axes beside those of gqa_jax.model: C tokens of a chunk, M of an answer.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import PartitionSpec as P

from gqa_jax import attention, model
from gqa_jax.attention import Cache
from gqa_jax.attention.spec import target
from gqa_jax.config import ModelConfig
from gqa_jax.errors import ConfigError
from gqa_jax.inference import weights
from gqa_jax.inference.sampling import Sampling, draw
from gqa_jax.inference.weights import ALL
from gqa_jax.mesh import MeshShape
from gqa_jax.training import sharding

CHUNK = 2048  # tokens of a prompt that are read at once: bounds the activations of a long one
SMALLEST_CHUNK = 16
SMALLEST_CACHE = 128  # a TPU's lanes
SEGMENT = 32  # tokens that the loop makes before a stream is shown


def bucket(n: int, smallest: int) -> int:
    """The least of the sizes that programs are compiled for which holds n: eight to an octave, so an eighth more at most."""
    step = max(smallest, 1 << max(0, (n - 1).bit_length() - 4))
    return -(-n // step) * step


class Carry(NamedTuple):
    """What the loop over tokens hands on."""

    caches: list[Cache]
    token_B: jax.Array  # the last one, which has not been read yet
    position_B: jax.Array  # its place
    done_B: jax.Array  # whether the sequence has ended
    out_BxM: jax.Array
    count: jax.Array  # tokens of `out` that are there


@dataclasses.dataclass(frozen=True)
class Plan:
    """Sizes of a batch of prompts: those of its programs."""

    batch: int
    chunk: int  # C
    keys: int  # S
    answers: int  # M
    alike: bool  # all prompts have one length: positions are written together
    kind: str  # of `Sampling`


class Engine:
    """A model that generates; its programs are compiled when they are needed and kept.

    Args:
      params: as of `gqa_jax.model.init_params(config, key)`, of any dtype. Of shapes and dtypes alone (`jax.ShapeDtypeStruct`)
        there are programs to `lower`, and nothing to run.
      n_ids: ids that may be drawn, those below it: the entries of the tokenizer. None: all of the vocabulary.
      cache_dtype: float32, bfloat16 or int8; None: config.dtype.
      mesh: devices that share the model, "tensor=4,context=2"; None: one.
      chunk: most tokens of a prompt that are read at once.
      attention: implementation by name; None: the best here.

    Raises:
      ConfigError: a mesh that can't share the model, n_ids that it has not.
      ValueError: a cache that nothing reads here.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: dict,
        *,
        n_ids: int | None = None,
        cache_dtype: str | None = None,
        mesh: str | MeshShape | None = None,
        chunk: int = CHUNK,
        attention: str | None = None,
    ):
        shape = MeshShape.parse(mesh) if isinstance(mesh, str) else mesh or MeshShape()
        if (reason := weights.unsupported_reason(config, shape)) is not None:
            raise ConfigError(reason)
        self.config, self.shape, self.implementation = config, shape, attention
        self.n_ids = config.vocab_size if n_ids is None else n_ids
        if not 1 <= self.n_ids <= config.vocab_size:
            raise ConfigError(f"n_ids = {n_ids}: the model has {config.vocab_size} ids")
        if chunk < SMALLEST_CHUNK:
            raise ConfigError(f"chunk = {chunk}: must be at least {SMALLEST_CHUNK} tokens")
        self.cache_dtype, self.chunk = cache_dtype or config.dtype, chunk
        self.mesh = None if shape.n_devices == 1 else sharding.make_mesh(shape)
        self._rows = target()[0] == "cpu"
        prepare = functools.partial(weights.prepared, config, mesh=self.mesh, rows=self._rows)
        described = all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(params))
        self.weights = jax.eval_shape(prepare, params) if described else prepare(params)
        self._layers = functools.partial(_read, config, shape, weights.product if self._rows else jnp.einsum)
        self._programs: dict[Any, Callable] = {}

    def plan(self, lengths: Sequence[int], max_new_tokens: int, kind: str = "greedy") -> Plan:
        """Sizes for prompts of so many tokens."""
        longest = max(lengths)
        chunk = min(self.chunk, bucket(longest, SMALLEST_CHUNK))
        unit = SMALLEST_CACHE * self.shape.context
        if self.shape.context > 1:  # a chunk lies on one device
            unit = int(np.lcm(unit, chunk * self.shape.context))
        keys = -(-bucket(max(-(-longest // chunk) * chunk, longest + max_new_tokens), SMALLEST_CACHE) // unit) * unit
        answers = bucket(max_new_tokens, SMALLEST_CHUNK)
        return Plan(len(lengths), chunk, keys, answers, len(set(lengths)) == 1, kind)

    def cache_bytes(self, batch: int, keys: int) -> int:
        """Bytes of the caches of a batch on each device."""
        leaves = jax.tree.leaves(jax.eval_shape(lambda: self._caches(batch, keys)))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)

    def working_bytes(self, plan: Plan) -> int:
        """Bytes, about, that reading a chunk of prompts takes of each device beside weights and caches.

        What attention reads of one layer's cache, its keys and values as rows of config.dtype, where there is more than one
        chunk; and of the widest part of a layer the stream before and behind its norm, gate, up and their product.
        """
        config, rows = self.config, plan.batch * plan.chunk
        value = jnp.dtype(config.dtype).itemsize
        held = weights.kv_heads_held(config, self.shape.tensor)
        keys = 2 * plan.batch * plan.keys // self.shape.context * held * config.head_dim if plan.keys > plan.chunk else 0
        return value * (keys + rows * (3 * config.d_model + 3 * config.d_ff // self.shape.n_devices))

    def start(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, sampling: Sampling, stop: Sequence[int] = ()
    ) -> tuple[Plan, Carry, dict]:
        """Reads prompts, ids below the vocabulary, at least one each, and draws the first token of every answer.

        Returns the sizes, the state of the loop, which `advance` takes, and what it draws by.
        """
        lengths = [len(prompt) for prompt in prompts]
        plan = self.plan(lengths, max_new_tokens, sampling.kind)
        length_B = jnp.asarray(lengths, jnp.int32)
        padded = np.zeros((plan.batch, -(-max(lengths) // plan.chunk) * plan.chunk), np.int32)
        for row, prompt in zip(padded, prompts, strict=True):
            row[: len(prompt)] = prompt
        caches = self._program("caches", plan)()
        last_BxD = jnp.zeros((plan.batch, self.config.d_model), self.config.dtype)
        for at in range(0, padded.shape[1], plan.chunk):
            tokens = jnp.asarray(padded[:, at : at + plan.chunk])
            name = "continue" if at else "begin"
            caches, last_BxD = self._program(name, plan)(self.weights, caches, tokens, jnp.int32(at), length_B, last_BxD)
        rule = sampling.arguments(plan.batch) | {"stop": jnp.asarray(list(stop) or [-1], jnp.int32)}
        token_B, done_B, out_BxM = self._program("first", plan)(self.weights, last_BxD, rule)
        return plan, Carry(caches, token_B, length_B, done_B, out_BxM, jnp.int32(1)), rule

    def warm_up(self, plan: Plan, passes: int) -> Carry:
        """Compiles every program of these sizes and runs each once: one chunk of each kind, of `passes`, and two tokens."""
        length_B, last_BxD = jnp.full(plan.batch, plan.chunk, jnp.int32), jnp.zeros((plan.batch, self.config.d_model))
        caches, last_BxD = self._program("caches", plan)(), last_BxD.astype(self.config.dtype)
        tokens = jnp.zeros((plan.batch, plan.chunk), jnp.int32)
        for at, name in ((0, "begin"), (plan.chunk, "continue"))[:passes]:
            caches, last_BxD = self._program(name, plan)(self.weights, caches, tokens, jnp.int32(at), length_B, last_BxD)
        rule = Sampling().arguments(plan.batch) | {"stop": jnp.array([-1], jnp.int32)}
        token_B, done_B, out_BxM = self._program("first", plan)(self.weights, last_BxD, rule)
        return self.advance(plan, Carry(caches, token_B, length_B, done_B, out_BxM, jnp.int32(1)), rule, 2)

    def advance(self, plan: Plan, carry: Carry, rule: dict, limit: int) -> Carry:
        """Goes on until every answer has `limit` tokens or has ended; `carry` is given up."""
        return self._program("advance", plan)(self.weights, carry, rule, jnp.int32(limit))

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sampling: Sampling,
        stop: Sequence[int] = (),
        segment: int | None = SEGMENT,
    ) -> Iterator[np.ndarray]:
        """Ids (B, n) generated so far, again and again as there are more, n up to `max_new_tokens`; behind a stop token -1.

        segment: tokens between looks at most; None: one look, at the end.
        """
        plan, carry, rule = self.start(prompts, max_new_tokens, sampling, stop)
        limit = step = 1
        while True:
            out_BxM, done_B, count = jax.device_get((carry.out_BxM, carry.done_B, carry.count))
            yield out_BxM[:, : int(count)]
            if done_B.all() or count >= max_new_tokens:
                return
            step = min(2 * step, segment) if segment else max_new_tokens
            limit = min(limit + step, max_new_tokens)
            carry = self.advance(plan, carry, rule, limit)

    def generate(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, sampling: Sampling, stop: Sequence[int] = ()
    ) -> np.ndarray:
        """The last of `stream`."""
        *_, last = self.stream(prompts, max_new_tokens, sampling, stop, segment=None)
        return last

    def lower(self, name: str, plan: Plan, sharding: jax.sharding.Sharding | None = None) -> Any:
        """The program "begin", "continue", "first" or "advance" of these sizes, traced for arguments that are not made.

        sharding: where all of them lie, of a device that need not be here; None: as on the devices of this engine.
        """
        caches, here = jax.eval_shape(lambda: self._caches(plan.batch, plan.keys)), self.config
        ids = jax.ShapeDtypeStruct((plan.batch,), jnp.int32)
        number, last = jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((plan.batch, here.d_model), here.dtype)
        rule = jax.eval_shape(lambda: Sampling().arguments(plan.batch) | {"stop": jnp.zeros(1, jnp.int32)})
        out = jax.ShapeDtypeStruct((plan.batch, plan.answers), jnp.int32)
        chunk = jax.ShapeDtypeStruct((plan.batch, plan.chunk), jnp.int32)
        done = jax.ShapeDtypeStruct((plan.batch,), jnp.bool_)
        arguments = {
            "begin": (caches, chunk, number, ids, last), "continue": (caches, chunk, number, ids, last),
            "first": (last, rule), "advance": (Carry(caches, ids, ids, done, out, number), rule, number),
        }[name]  # fmt: skip
        given = (self.weights, *arguments)
        if sharding is not None:
            given = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), given)
        return self._program(name, plan).lower(*given)

    def _program(self, name: str, plan: Plan) -> Callable:
        # what a program doesn't depend on is left out of the name under which it is kept
        if name in ("caches", "begin", "continue"):
            plan = dataclasses.replace(plan, answers=0, alike=True, kind="", chunk=0 if name == "caches" else plan.chunk)
        if name == "first":
            plan = dataclasses.replace(plan, chunk=0, keys=0, alike=True)
        if name == "advance":
            plan = dataclasses.replace(plan, chunk=0)
        if (name, plan) not in self._programs:
            self._programs[name, plan] = getattr(self, f"_{name}_program")(plan)
        return self._programs[name, plan]

    def _caches(self, batch: int, keys: int) -> list[Cache]:
        """Those that a device holds."""
        held = weights.kv_heads_held(self.config, self.shape.tensor)
        group = self.config.n_heads // self.shape.tensor // held
        return [
            attention.new_cache(
                batch, keys // self.shape.context, held * group, held, self.config.head_dim, self.config.dtype,
                cache_dtype=self.cache_dtype, implementation=self.implementation,
            )
            for _ in range(self.config.n_layers)
        ]  # fmt: skip

    def _on_mesh(self, function: Callable, inputs: tuple, outputs: Any, donate: tuple[int, ...] = ()) -> Callable:
        """The program of what each device does; `inputs` and `outputs` say how arguments behind the weights lie."""
        if self.mesh is None:
            return jax.jit(function, donate_argnums=donate)
        mapped = jax.shard_map(
            function, mesh=self.mesh, in_specs=inputs, out_specs=outputs, axis_names=set(self.mesh.axis_names), check_vma=False
        )
        return jax.jit(mapped, donate_argnums=donate)

    @property
    def _weight_specs(self) -> dict:
        return weights.specs(self.config, self._rows)

    @property
    def _cache_specs(self) -> list:
        if self.mesh is None:
            return []

        def spec(path: Any, leaf: Any) -> P:
            name = path[-1].name
            axes = {"k": cache.layout.k, "v": cache.layout.v}.get(name, "BK1S")
            return P(*({"K": "tensor", "C" if "C" in axes else "S": "context"}.get(axis) for axis in axes))

        found = []
        for cache in jax.eval_shape(lambda: self._caches(1, SMALLEST_CACHE * self.shape.context)):
            found.append(jax.tree_util.tree_map_with_path(spec, cache))
        return found

    def _caches_program(self, plan: Plan) -> Callable:
        return self._on_mesh(lambda: self._caches(plan.batch, plan.keys), (), self._cache_specs)

    def _begin_program(self, plan: Plan, *, first: bool = True) -> Callable:
        def read(held, caches, tokens_BxC, start, length_B, last_BxD):
            hook = functools.partial(_attend_chunk, self.shape, self.implementation, start=start, first=first)
            hidden_BxCxD, caches = self._layers(held, tokens_BxC, start + jnp.arange(tokens_BxC.shape[1]), caches, hook)
            at_B = jnp.clip(length_B - 1 - start, 0, tokens_BxC.shape[1] - 1)
            own_BxD = jnp.take_along_axis(hidden_BxCxD, at_B[:, None, None], axis=1)[:, 0]
            here_B = (length_B - 1 >= start) & (length_B - 1 < start + tokens_BxC.shape[1])
            return caches, jnp.where(here_B[:, None], own_BxD, last_BxD)

        specs = self._weight_specs, self._cache_specs, P(), P(), P(), P()
        return self._on_mesh(read, specs, (self._cache_specs, P()), donate=(1,))

    def _continue_program(self, plan: Plan) -> Callable:
        return self._begin_program(plan, first=False)

    def _draw(self, held: dict, hidden_BxD: jax.Array, kind: str, rule: dict, step: jax.Array) -> jax.Array:
        logits_BxV = _logits(self.shape, self._rows, held, hidden_BxD)
        allowed_V = jnp.arange(logits_BxV.shape[1]) < self.n_ids
        return draw(jnp.where(allowed_V[None], logits_BxV, -jnp.inf), kind, rule, step)

    def _first_program(self, plan: Plan) -> Callable:
        def first(held, last_BxD, rule):
            token_B = self._draw(held, last_BxD, plan.kind, rule, jnp.int32(0))
            out_BxM = jnp.full((plan.batch, plan.answers), -1, jnp.int32).at[:, 0].set(token_B)
            return token_B, jnp.isin(token_B, rule["stop"]), out_BxM

        return self._on_mesh(first, (self._weight_specs, P(), P()), P())

    def _advance_program(self, plan: Plan) -> Callable:
        def advance(held, carry, rule, limit):
            def pending(carry: Carry):
                return (carry.count < limit) & ~carry.done_B.all()

            def step(carry: Carry):
                at = carry.position_B[0] if plan.alike else carry.position_B
                hook = functools.partial(_attend_token, self.shape, self.implementation, position=at)
                tokens_Bx1, positions_Bx1 = carry.token_B[:, None], carry.position_B[:, None]
                hidden_Bx1xD, caches = self._layers(held, tokens_Bx1, positions_Bx1, carry.caches, hook)
                token_B = self._draw(held, hidden_Bx1xD[:, 0], plan.kind, rule, carry.count)
                shown_B = jnp.where(carry.done_B, -1, token_B)
                return Carry(
                    caches,
                    jnp.where(carry.done_B, carry.token_B, token_B),
                    carry.position_B + 1,
                    carry.done_B | jnp.isin(token_B, rule["stop"]),
                    lax.dynamic_update_slice_in_dim(carry.out_BxM, shown_B[:, None], carry.count, axis=1),
                    carry.count + 1,
                )

            return lax.while_loop(pending, step, carry)

        carries = Carry(self._cache_specs, P(), P(), P(), P(), P())
        return self._on_mesh(advance, (self._weight_specs, carries, P(), P()), carries, donate=(1,))


def _read(
    config: ModelConfig, shape: MeshShape, product: Callable, held: dict, tokens_BxT: jax.Array, positions: jax.Array,
    caches: list[Cache], attend: Callable,
) -> tuple[jax.Array, list[Cache]]:  # fmt: skip
    """Output of the final norm (B, T, D) for tokens at positions, and the caches with theirs."""
    x_BxTxD = _rows(shape, held["embedding"], tokens_BxT)
    hooks = model.Hooks(attend=attend, leave=functools.partial(_summed, shape), product=product)
    x_BxTxD, caches = model.run_layers(config, held["layers"], x_BxTxD, positions, hooks, caches)
    return model.rms_norm(x_BxTxD, held["final_norm"], config.norm_eps), caches


def _attend_chunk(shape: MeshShape, implementation, q_BxTxNxH, k_BxTxKxH, v_BxTxKxH, cache: Cache, *, start, first: bool):
    """Tokens of a chunk attend to the cache and to each other."""
    q_BxTxNxH = _gathered(shape, q_BxTxNxH)
    cache = _append(shape, cache, k_BxTxKxH, v_BxTxKxH, start)
    if first:  # nothing is in the cache but what is at hand
        out_BxTxNxH = attention.attention(q_BxTxNxH, k_BxTxKxH, v_BxTxKxH, implementation=implementation)
        return _own_heads(shape, out_BxTxNxH), cache
    k_BxSxKxH, v_BxSxKxH = _as_it_lies(cache).rows(q_BxTxNxH.dtype)
    rest = {"q_offset": start, "kv_offset": _offset(shape, cache), "implementation": implementation}
    if shape.context == 1:
        return attention.attention(q_BxTxNxH, k_BxSxKxH, v_BxSxKxH, **rest), cache
    return _merged(*attention.attention(q_BxTxNxH, k_BxSxKxH, v_BxSxKxH, **rest, return_lse=True)), cache


def _attend_token(shape: MeshShape, implementation, q_Bx1xNxH, k_Bx1xKxH, v_Bx1xKxH, cache: Cache, *, position):
    """One token of each sequence attends to the cache and to itself."""
    q_BxNxH = _gathered(shape, q_Bx1xNxH)[:, 0]
    cache = _append(shape, cache, k_Bx1xKxH, v_Bx1xKxH, position)
    if shape.context == 1:
        return attention.decode(q_BxNxH, cache, position + 1, implementation=implementation)[:, None], cache
    length = jnp.clip(position + 1 - _offset(shape, cache), 0, cache.keys)
    out_BxNxH, lse_BxN = attention.decode(q_BxNxH, cache, length, implementation=implementation, return_lse=True)
    return _merged(out_BxNxH[:, None], lse_BxN[:, None]), cache


def _as_it_lies(cache: Cache) -> Cache:
    """The cache, in memory as its arrays say: XLA's TPU compiler would copy those of all layers to the form in which keys are
    read, write that, and copy them back.
    """
    return jax.tree.map(lambda x: with_layout_constraint(x, Layout(tuple(range(x.ndim)))), cache)


def _append(shape: MeshShape, cache: Cache, k_BxTxKxH, v_BxTxKxH, position) -> Cache:
    if shape.context == 1:
        return cache.append(k_BxTxKxH, v_BxTxKxH, position)
    own = position - _offset(shape, cache)
    return cache.append(k_BxTxKxH, v_BxTxKxH, jnp.clip(own, 0, cache.keys - 1), (own >= 0) & (own < cache.keys))


def _offset(shape: MeshShape, cache: Cache):
    """Position of the first entry that this device has."""
    return 0 if shape.context == 1 else lax.axis_index("context") * cache.keys


def _gathered(shape: MeshShape, q_BxTxNxH: jax.Array) -> jax.Array:
    """Query heads of all devices that hold parts of one context."""
    return q_BxTxNxH if shape.context == 1 else lax.all_gather(q_BxTxNxH, "context", axis=2, tiled=True)


def _own_heads(shape: MeshShape, out_BxTxNxH: jax.Array) -> jax.Array:
    if shape.context == 1:
        return out_BxTxNxH
    own = out_BxTxNxH.shape[2] // shape.context
    return lax.dynamic_slice_in_dim(out_BxTxNxH, lax.axis_index("context") * own, own, axis=2)


def _merged(out_BxTxNxH: jax.Array, lse_BxTxN: jax.Array) -> jax.Array:
    """Attention over all parts of the context, of the heads of this device, from that over the part that it has."""
    weight_BxTxN = jnp.exp(lse_BxTxN - lax.pmax(lse_BxTxN, "context"))
    part = {"axis_name": "context", "scatter_dimension": 2, "tiled": True}
    sum_BxTxNxH = lax.psum_scatter(out_BxTxNxH.astype(jnp.float32) * weight_BxTxN[..., None], **part)
    return (sum_BxTxNxH / lax.psum_scatter(weight_BxTxN, **part)[..., None]).astype(out_BxTxNxH.dtype)


def _summed(shape: MeshShape, x: jax.Array) -> jax.Array:
    return x if shape.n_devices == 1 else lax.psum(x, ALL)


def _rows(shape: MeshShape, embedding_VxD: jax.Array, tokens_BxT: jax.Array) -> jax.Array:
    if shape.n_devices == 1:
        return embedding_VxD[tokens_BxT]
    own = tokens_BxT - lax.axis_index(ALL) * len(embedding_VxD)
    here = (own >= 0) & (own < len(embedding_VxD))
    return _summed(shape, jnp.where(here[..., None], embedding_VxD[jnp.where(here, own, 0)], 0))


def _logits(shape: MeshShape, rows: bool, held: dict, hidden_BxD: jax.Array) -> jax.Array:
    """Logits (B, V), float32; rows: on the left of the product, as those of layers (`weights.product`)."""
    matrix = {"preferred_element_type": jnp.float32}
    if rows:
        logits_BxV = lax.optimization_barrier(jnp.einsum("vd,bd->vb", model.unembedding(held), hidden_BxD, **matrix)).T
    else:
        logits_BxV = jnp.einsum("bd,vd->bv", hidden_BxD, model.unembedding(held), **matrix)
    return logits_BxV if shape.n_devices == 1 else lax.all_gather(logits_BxV, ALL, axis=1, tiled=True)
