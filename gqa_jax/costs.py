"""Parameters, FLOPs and memory of a model, to train and to serve: arithmetic on shapes.

Source: arXiv 2503.09579v2, Tables 2, 3 and 8, Equation 5. What counts differs between the paper's equations, its figures
and the model that is really trained, so every function takes a named `Convention`; none is ever assumed silently to be
another. Shapes may be real-valued: the search of Section 4.1 needs models between the ones that can be built.

Symbols: T context length, N parameters, D training tokens, L layers, d hidden size, d_h head size, F feed-forward width.
Everything broadcasts over NumPy arrays of contexts and of the fields of a shape. All costs are affine in T or, for a whole
sequence, T times that.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from gqa_jax.shapes import HEAD_DIM, VOCAB_SIZE

#: Bytes of one value; int4 is packed two to a byte. float4 is NVIDIA's NVFP4, with its 8-bit scale for every 16 values.
DTYPE_BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "float8": 1.0, "int8": 1.0, "float4": 9 / 16, "int4": 0.5}


class HasShape(Protocol):
    """What every function takes: a `Shape`, or a `gqa_jax.config.ModelConfig`."""

    n_layers: Any
    d_model: Any
    n_heads: Any
    n_kv_heads: Any
    head_dim: Any
    d_ff: Any
    vocab_size: Any


@dataclass(frozen=True)
class Shape:
    """A model shape whose numbers may be real, or arrays of many shapes that broadcast. `d_ff` None: exactly 8 d / 3.

    Infinity and NaN are allowed, for a size that no model has: its costs are infinite or NaN too.

    Raises ValueError: a number of 0 or below, or arrays that do not broadcast.
    """

    n_layers: Any
    d_model: Any
    n_heads: Any
    n_kv_heads: Any
    head_dim: Any = HEAD_DIM
    d_ff: Any = None
    vocab_size: Any = VOCAB_SIZE

    def __post_init__(self):
        if self.d_ff is None:
            object.__setattr__(self, "d_ff", 8 * self.d_model / 3)
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for name, value in fields.items():
            if np.any(np.less_equal(value, 0)):
                raise ValueError(f"{name} = {np.nanmin(value)}: must be above 0")
        try:
            np.broadcast_shapes(*map(np.shape, fields.values()))
        except ValueError:
            found = ", ".join(f"{name} {np.shape(value)}" for name, value in fields.items() if np.shape(value))
            raise ValueError(f"arrays of a shape must broadcast; these do not: {found}") from None


@dataclass(frozen=True)
class Convention:
    """What is counted. `CONVENTIONS` holds the named ones; make another to ask what a choice changes."""

    ffn_matrices: int  # of d x F per layer: 2 in the paper's tables, 3 (gate, up, down) in the model
    norms: bool  # RMSNorm scales among the parameters
    embedding: bool  # the tied embedding in N (once) and its projection in FLOPs
    flops: str  # "per_token" at context T; "half_T" or "full_T" times the per-token count: a whole sequence
    memory: str  # "values" or "bytes"

    def __post_init__(self):
        for name, allowed in (("flops", tuple(_SEQUENCE_FACTOR)), ("memory", ("values", "bytes"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"convention {name} = {getattr(self, name)!r}: allowed are {', '.join(allowed)}")


_SEQUENCE_FACTOR: dict[str, Callable[[Any], Any]] = {
    "per_token": lambda context: 1.0,
    "half_T": lambda context: context / 2,
    "full_T": lambda context: context,
}

CONVENTIONS: dict[str, Convention] = {
    # Tables 2, 3, 8 and Equation 3 as printed: two FFN matrices, the tied embedding in N, FLOPs per token, values held.
    "paper": Convention(ffn_matrices=2, norms=False, embedding=True, flops="per_token", memory="values"),
    # What Figures 1, 2 and Table 4 turn out to use: three matrices, N without embeddings, T/2 x C_infer, values held.
    "figures": Convention(ffn_matrices=3, norms=False, embedding=False, flops="half_T", memory="values"),
    # The model that is trained here: every parameter, the FLOPs of its matmuls per token, bytes.
    "exact": Convention(ffn_matrices=3, norms=True, embedding=True, flops="per_token", memory="bytes"),
}


def named_convention(name: str | Convention) -> Convention:
    """The Convention of that name, or the one given. Raises ValueError naming those there are."""
    if isinstance(name, Convention):
        return name
    if name not in CONVENTIONS:
        raise ValueError(f"cost convention {name!r} is unknown: use {', '.join(CONVENTIONS)}, or a Convention of your own")
    return CONVENTIONS[name]


class ParamCount(NamedTuple):
    """Parameters by component (Table 2)."""

    embedding: Any  # d V, tied: counted once; 0 where the convention leaves it out
    attention: Any  # 2 L d d_h (n_h + n_kv)
    ffn: Any  # matrices x L d F
    norms: Any  # (2 L + 1) d

    @property
    def non_embedding(self) -> Any:
        """N of the fits."""
        return self.attention + self.ffn + self.norms

    @property
    def total(self) -> Any:
        """Every parameter that the convention counts."""
        return self.embedding + self.non_embedding


class ForwardFlops(NamedTuple):
    """Forward FLOPs of one token by component (Table 3); a multiply-add is two."""

    projections: Any  # 4 L d d_h (n_h + n_kv)
    attention: Any  # 4 L T n_h d_h: scores and weighted values against T keys
    ffn: Any  # 2 x matrices x L d F
    output: Any  # 2 d V

    @property
    def total(self) -> Any:
        return self.projections + self.attention + self.ffn + self.output


class InferMemory(NamedTuple):
    """What serving holds by component (Table 8): values, or bytes where the convention says so."""

    embedding: Any
    attention: Any
    ffn: Any
    norms: Any
    cache: Any  # 2 T L d_h n_kv: keys and values of T tokens

    @property
    def params(self) -> Any:
        return self.embedding + self.attention + self.ffn + self.norms

    @property
    def total(self) -> Any:
        return self.params + self.cache


def count_params(shape: HasShape, convention: str | Convention = "exact") -> ParamCount:
    """Parameters of `shape` (Table 2); integers for an integer shape."""
    rule = named_convention(convention)
    layers, d = shape.n_layers, shape.d_model
    return ParamCount(
        embedding=d * shape.vocab_size if rule.embedding else 0,
        attention=2 * layers * d * shape.head_dim * (shape.n_heads + shape.n_kv_heads),
        ffn=rule.ffn_matrices * layers * d * shape.d_ff,
        norms=(2 * layers + 1) * d if rule.norms else 0,
    )


def forward_flops(shape: HasShape, context: Any, convention: str | Convention = "exact") -> ForwardFlops:
    """Forward FLOPs of one token that attends to `context` keys, by component (Table 3).

    A sequence of T tokens whose T x T scores are all computed, masked ones too, costs T times this at context T: what XLA
    counts for the plain form. A causal kernel computes half of `attention`.
    """
    count = count_params(shape, convention)
    return ForwardFlops(
        projections=2 * count.attention,
        attention=4 * shape.n_layers * np.asarray(context, np.float64)[()] * shape.n_heads * shape.head_dim,
        ffn=2 * count.ffn,
        output=2 * count.embedding,
    )


def infer_flops(shape: HasShape, context: Any, convention: str | Convention = "exact") -> Any:
    """C_infer = 2 N + 4 T L d_h n_h FLOPs per token (Table 8, Eq. 3), or T/2 or T times that, as the convention says."""
    rule = named_convention(convention)
    return forward_flops(shape, context, rule).total * _SEQUENCE_FACTOR[rule.flops](np.asarray(context, np.float64)[()])


def infer_memory(
    shape: HasShape,
    context: Any,
    convention: str | Convention = "exact",
    *,
    param_dtype: str = "bfloat16",
    cache_dtype: str = "bfloat16",
) -> Any:
    """M_infer = N + 2 T L d_h n_kv (Table 8, Eq. 4): values held, or bytes in the given dtypes where the convention says so."""
    return infer_memory_parts(shape, context, convention, param_dtype=param_dtype, cache_dtype=cache_dtype).total


def infer_memory_parts(
    shape: HasShape,
    context: Any,
    convention: str | Convention = "exact",
    *,
    param_dtype: str = "bfloat16",
    cache_dtype: str = "bfloat16",
) -> InferMemory:
    """M_infer by component: parameters that the convention counts, and the cache of one sequence of `context` tokens."""
    rule = named_convention(convention)
    count = count_params(shape, rule)
    cache = 2 * np.asarray(context, np.float64)[()] * shape.n_layers * shape.head_dim * shape.n_kv_heads
    param, value = (1, 1) if rule.memory == "values" else (dtype_bytes(param_dtype), dtype_bytes(cache_dtype))
    return InferMemory(param * count.embedding, param * count.attention, param * count.ffn, param * count.norms, value * cache)


def flops_shares(shape: HasShape, context: Any, convention: str | Convention = "exact") -> ForwardFlops:
    """Share of each component in the forward FLOPs of a token that attends to `context` keys (Figure 7); they sum to 1."""
    return ForwardFlops(*_shares(forward_flops(shape, context, convention)))


def memory_shares(
    shape: HasShape,
    context: Any,
    convention: str | Convention = "exact",
    *,
    param_dtype: str = "bfloat16",
    cache_dtype: str = "bfloat16",
) -> InferMemory:
    """Share of each component in the memory that serving holds (Figure 8); they sum to 1. The dtypes matter for bytes only."""
    return InferMemory(
        *_shares(infer_memory_parts(shape, context, convention, param_dtype=param_dtype, cache_dtype=cache_dtype))
    )


def _shares(parts: ForwardFlops | InferMemory) -> list[Any]:
    """Each part divided by their sum, all in the shape that they broadcast to."""
    with np.errstate(invalid="ignore"):  # of a size that no model has: NaN
        return [np.asarray(share)[()] for share in np.broadcast_arrays(*(part / parts.total for part in parts))]


def train_flops(shape: HasShape, context: Any, tokens: Any, convention: str | Convention = "exact") -> Any:
    """C_train = 6 D N + 12 D T_mean L d_h n_h, T_mean = T / 2 (Table 8): a causal token attends to T/2 keys on average.

    The backward pass is counted as twice the forward pass, recomputation is not counted.
    """
    return 3.0 * np.asarray(tokens, np.float64)[()] * forward_flops(shape, np.asarray(context) / 2, convention).total


def train_memory(
    shape: HasShape,
    context: Any,
    convention: str | Convention = "exact",
    *,
    dtype: str = "float32",
    activation_dtype: str = "bfloat16",
) -> Any:
    """M_train = 4 N + T d L (Table 8): parameters, gradients, two moments and a residual stream per layer of one sequence.

    Values held, or bytes where the convention says so: `dtype` of the four, `activation_dtype` of the stream.
    """
    rule = named_convention(convention)
    state = 4 * count_params(shape, rule).total
    stream = np.asarray(context, np.float64)[()] * shape.d_model * shape.n_layers
    if rule.memory == "values":
        return state + stream
    return dtype_bytes(dtype) * state + dtype_bytes(activation_dtype) * stream


def hardware_aware_cost(memory: Any, flops: Any, lam: float = 0.9, alpha: float = 1 / 2, beta: float = 1 / 3) -> Any:
    """Z = lambda M^alpha + (1 - lambda) C^beta (Eq. 5 and its defaults). A term of weight 0 is left out."""
    if not 0 <= lam <= 1:
        raise ValueError(f"lam = {lam}: a weight between 0 (FLOPs only) and 1 (memory only)")
    memory, flops = np.asarray(memory, np.float64)[()], np.asarray(flops, np.float64)[()]
    if lam in (0, 1):
        return memory**alpha if lam == 1 else flops**beta
    return lam * memory**alpha + (1 - lam) * flops**beta


def serving_costs(
    shape: HasShape, context: Any, tokens: float, train_context: float, convention: str | Convention = "exact"
) -> dict[str, Any]:
    """Costs of serving at `context` and of having trained on `tokens` at `train_context`: the columns of the cost table."""
    flops, memory = infer_flops(shape, context, convention), infer_memory(shape, context, convention)
    return {
        "c_infer": flops,
        "m_infer": memory,
        "z": hardware_aware_cost(memory, flops),
        "c_train": train_flops(shape, train_context, tokens, convention),
        "m_train": train_memory(shape, train_context, convention),
    }


def expected(cost: Callable[[Any], Any], contexts: Any, weights: Any = None) -> float:
    """Mean of `cost(T)` under a distribution of context lengths; equal weights when none are given.

    For a cost that is affine in T (per-token FLOPs, memory) this is the cost at the mean context (Section 3).
    """
    contexts = np.asarray(contexts, np.float64)
    weights = np.ones_like(contexts) if weights is None else np.asarray(weights, np.float64)
    if contexts.size == 0 or contexts.shape != weights.shape or (weights < 0).any() or not weights.sum() > 0:
        raise ValueError(f"one weight, at least 0, per context and a positive sum; got contexts {contexts}, weights {weights}")
    return float(np.sum(weights * cost(contexts)) / weights.sum())


def dtype_bytes(dtype: str) -> float:
    """Bytes of one value. Raises ValueError naming the dtypes there are."""
    if dtype not in DTYPE_BYTES:
        raise ValueError(f"dtype {dtype!r} is unknown here: use {', '.join(DTYPE_BYTES)}")
    return DTYPE_BYTES[dtype]
