"""Parameters, FLOPs and memory of a model, to train and to serve, and the shape of a number of parameters.

Source: arXiv 2503.09579v2, Tables 2, 3 and 8, Equation 5. What counts differs between the paper's equations, its figures
and the model that is really trained, so every function takes a named `Convention`; none is ever assumed silently to be
another. Shapes may be real-valued: the search of Section 4.1 needs models between the ones that can be built
(`solve_shape`, Appendix B.1; `buildable_shapes` are the ones that can be built).

Symbols: T context length, N parameters, D training tokens, L layers, d hidden size, d_h head size, F feed-forward width.
Everything broadcasts over NumPy arrays of contexts and of the fields of a shape. All costs are affine in T or, for a whole
sequence, T times that.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from gqa_jax.shapes import FFN_RATIO, HEAD_DIM, VOCAB_SIZE, ffn_width

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
    untied: bool


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
    untied: bool = False  # whether the unembedding is a matrix of its own, in all of them

    def __post_init__(self):
        if self.d_ff is None:
            object.__setattr__(self, "d_ff", 8 * self.d_model / 3)
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for name, value in fields.items():
            if name != "untied" and np.any(np.less_equal(value, 0)):
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
    embedding: bool  # the embedding in N (once where it is tied) and the projection to logits in FLOPs
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
    head: Any = 0  # another d V of an untied model, where the convention counts the embedding

    @property
    def non_embedding(self) -> Any:
        """N of the fits."""
        return self.attention + self.ffn + self.norms

    @property
    def total(self) -> Any:
        """Every parameter that the convention counts."""
        return self.embedding + self.head + self.non_embedding


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

    embedding: Any  # with the head of an untied model
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
    embedding = d * shape.vocab_size if rule.embedding else 0
    return ParamCount(
        embedding=embedding,
        attention=2 * layers * d * shape.head_dim * (shape.n_heads + shape.n_kv_heads),
        ffn=rule.ffn_matrices * layers * d * shape.d_ff,
        norms=(2 * layers + 1) * d if rule.norms else 0,
        head=embedding if shape.untied else 0,
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


def infer_memory(shape: HasShape, context: Any, convention: str | Convention = "exact", **dtypes: str) -> Any:
    """M_infer = N + 2 T L d_h n_kv (Table 8, Eq. 4): values held, or bytes in the given dtypes where the convention says so."""
    return infer_memory_parts(shape, context, convention, **dtypes).total


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
    parts = count.embedding + count.head, count.attention, count.ffn, count.norms
    return InferMemory(*(param * part for part in parts), value * cache)


def flops_shares(shape: HasShape, context: Any, convention: str | Convention = "exact") -> ForwardFlops:
    """Share of each component in the forward FLOPs of a token that attends to `context` keys (Figure 7); they sum to 1."""
    return ForwardFlops(*_shares(forward_flops(shape, context, convention)))


def memory_shares(shape: HasShape, context: Any, convention: str | Convention = "exact", **dtypes: str) -> InferMemory:
    """Share of each component in the memory that serving holds (Figure 8); they sum to 1. The dtypes matter for bytes only."""
    return InferMemory(*_shares(infer_memory_parts(shape, context, convention, **dtypes)))


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


def dtype_bytes(dtype: str) -> float:
    """Bytes of one value. Raises ValueError naming the dtypes there are."""
    if dtype not in DTYPE_BYTES:
        raise ValueError(f"dtype {dtype!r} is unknown here: use {', '.join(DTYPE_BYTES)}")
    return DTYPE_BYTES[dtype]


#: Of Newton's method. From where it starts 5 reach the last digits of float64, whatever the size, heads and aspect ratio.
NEWTON_STEPS = 6


class HasHeads(Protocol):
    """Heads of a model, such as `gqa_jax.laws.Heads`.

    n_heads None is the width's own number d / d_h (Llama-3's rule), real-valued where the width is; an n_kv_heads of -g is then
    n_h / g.
    """

    n_heads: int | None
    n_kv_heads: int


def solve_shape(
    n_params: Any,
    heads: HasHeads | Sequence[HasHeads],
    aspect: Callable[[Any], Any],
    head_dim: float = HEAD_DIM,
    vocab_size: float = VOCAB_SIZE,
    convention: str | Convention = "figures",
    ffn_ratio: float = FFN_RATIO,
) -> Shape:
    """The real-valued shape with `n_params` parameters without embeddings and the aspect ratio r = d / L = aspect(N).

    With d = r L and d_ff = f d the count is a cubic in L,

        N = c3 L^3 + c2 L^2 + c1 L,   c3 = r^2 (f m + 2 u),   c2 = 2 r (d_h (n_h + n_kv) + s),   c1 = r s

    with f the `ffn_ratio`, m FFN matrices and s = 1 or 0 norms of the convention; where n_heads is None, u = 1 and n_h in c2 is
    0, else u = 0; where n_kv is n_h / g too, u = 1 + 1 / g, and n_kv in c2 is 0.
    It rises and is convex for L > 0, so Newton's method from a bound above falls to its only positive root and never beyond.

    Args:
      n_params: N, of any shape. Infinite where no size reaches a loss: so are then L and d. NaN gives NaN.
      heads: one configuration, or a sequence of them along the last axis of `n_params`.
      aspect: a `gqa_jax.shapes.Aspect`, or any function of arrays.

    Returns the shapes, whose fields broadcast to the shape of `n_params` (and `heads`). Raises ValueError for N <= 0.
    """
    n_params = np.asarray(n_params, np.float64)[()]
    if np.any(n_params <= 0):
        raise ValueError(f"n_params = {np.nanmin(n_params)}: a model has more than 0 parameters")
    rule = named_convention(convention)
    if hasattr(heads, "n_heads"):
        own_heads, n_heads, n_kv_heads = heads.n_heads is None, heads.n_heads or 0, np.asarray(heads.n_kv_heads)[()]
    else:
        own_heads = np.array([one.n_heads is None for one in heads])
        n_heads = np.array([one.n_heads or 0 for one in heads])
        n_kv_heads = np.array([one.n_kv_heads for one in heads])
    grouped = n_kv_heads < 0
    share = np.where(grouped, 1.0 / np.where(grouped, -n_kv_heads, 1), 0.0)[()]  # n_kv / n_h of rules that fix it
    n_kv_heads = np.where(grouped, 0, n_kv_heads)[()]

    ratio = aspect(n_params)
    cubic = ratio**2 * (ffn_ratio * rule.ffn_matrices + 2 * own_heads * (1 + share))
    square = 2 * ratio * (head_dim * (n_heads + n_kv_heads) + rule.norms)
    linear = ratio * rule.norms
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):  # infinite and NaN sizes; no square term
        layers = np.minimum((n_params / cubic) ** (1 / 3), (n_params / square) ** (1 / 2))  # by one term: not below the root
        for _ in range(NEWTON_STEPS):
            slope = linear + 2 * square * layers + 3 * cubic * layers**2
            newton = (n_params + square * layers**2 + 2 * cubic * layers**3) / slope
            layers = np.fmin(layers, newton)  # rounding does not rise again; an infinite size, whose step is NaN, stays so
        d_model = ratio * layers
        if np.any(own_heads):
            n_heads = np.where(own_heads, d_model / head_dim, n_heads)[()]
        if np.any(grouped):
            n_kv_heads = np.where(grouped, n_heads * share, n_kv_heads)[()]
    d_ff = None if ffn_ratio == FFN_RATIO else ffn_ratio * d_model
    return Shape(layers, d_model, n_heads, n_kv_heads, head_dim, d_ff, vocab_size)


def buildable_shapes(
    n_params: float,
    heads: HasHeads,
    ratio: float,
    bounds: tuple[float, float],
    needed: Callable[[Any], Any],
    head_dim: int = HEAD_DIM,
    vocab_size: int = VOCAB_SIZE,
    convention: str | Convention = "figures",
    ffn_ratio: float = FFN_RATIO,
    *,
    multiple: int = 64,
) -> list[Shape]:
    """Integer shapes that have as many parameters as their aspect ratio needs: for every width the fewest layers.

    Args:
      n_params, ratio: of the real-valued model that they are to be close to; widths from 2/3 to 3/2 of its are tried.
      bounds: least and largest d / L.
      needed: N without embeddings as a function of d / L that a model must have, or more.
      multiple: of hidden sizes, and where n_heads is None of n_kv d_h (of a rule with groups g d_h) too.

    Feed-forward widths are those that are trained (`gqa_jax.shapes.ffn_width`). No shape within the bounds: an empty list.

    Raises ValueError: an N that is not a positive number, or n_kv that does not divide n_h.
    """
    if not 0 < n_params < math.inf:
        raise ValueError(f"n_params = {n_params}: only a finite number of parameters above 0 can be built")
    if heads.n_heads is not None and heads.n_heads % heads.n_kv_heads:
        raise ValueError(f"n_kv_heads = {heads.n_kv_heads} must divide n_heads = {heads.n_heads}")
    real = solve_shape(n_params, heads, lambda _: ratio, head_dim, vocab_size, convention, ffn_ratio)
    unit = multiple if heads.n_heads is not None else math.lcm(multiple, head_dim * abs(heads.n_kv_heads))
    found = []
    for width in range(max(1, int(real.d_model / 1.5 / unit)), int(1.5 * real.d_model / unit) + 2):
        d_model = unit * width
        fewest, most = max(1, math.ceil(d_model / bounds[1])), math.floor(d_model / bounds[0])
        if most < fewest:
            continue
        layers = np.arange(fewest, most + 1)
        sizes = count_params(_integer_shape(layers, d_model, heads, head_dim, vocab_size, ffn_ratio), convention)
        enough = layers[sizes.non_embedding >= needed(d_model / layers)]
        if len(enough):
            found.append(_integer_shape(int(enough[0]), d_model, heads, head_dim, vocab_size, ffn_ratio))
    return found


def _integer_shape(
    layers: Any, d_model: int, heads: HasHeads, head_dim: int, vocab_size: int, ffn_ratio: float = FFN_RATIO
) -> Shape:
    n_heads = d_model // head_dim if heads.n_heads is None else heads.n_heads
    n_kv_heads = heads.n_kv_heads if heads.n_kv_heads > 0 else n_heads // -heads.n_kv_heads
    return Shape(layers, d_model, n_heads, n_kv_heads, head_dim, ffn_width(d_model, ffn_ratio), vocab_size)
