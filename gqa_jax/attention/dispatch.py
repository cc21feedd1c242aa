"""The one registry of implementations: forward, backward and decode by name, what each can run, and which is best where.

What an implementation can run is data, rows of `Limits`, read by one function: `unsupported_reason`. An implementation of this
package is a module and an entry of `_ALL`; one from outside comes through `gqa_jax.attention.external`.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gqa_jax import hardware
from gqa_jax.attention import vjp
from gqa_jax.attention.cache import BLOCKS, LANES, ROWS, WITHIN_HEADS, Cache, Layout
from gqa_jax.attention.spec import Case, Mask, compute_capability
from gqa_jax.attention.vjp import Kernel
from gqa_jax.errors import closest

GENERATIONS = {8.0: "Ampere", 9.0: "Hopper", 10.0: "Blackwell"}  # of NVIDIA GPUs, by compute capability
PLATFORMS = {"cpu": "CPUs", "gpu": "NVIDIA GPUs", "tpu": "TPUs"}


class Limits(NamedTuple):
    """What an implementation takes on one kind of device. None is any; what of masks and results is not said, it has not."""

    platform: str | None = None  # "cpu", "gpu" or "tpu"
    capability: tuple[float, float] | None = None  # of an NVIDIA GPU: the least, and the first that is too large
    dtypes: tuple[str, ...] | None = None
    head_dims: Sequence[int] | None = None
    multiple: int = 1  # of which T and S must be multiples
    offsets: bool = False  # queries and keys that begin at different positions; S other than T
    segments: bool = False
    lse: bool = False  # gives the log-sum-exp, with its gradient
    interpreted: bool = False  # a Pallas kernel: interpreted, it runs on any device
    caches: tuple[str, ...] = ()  # dtypes of a cache beside that of the queries
    beyond: Callable[[Case], str | None] | None = None  # why a case can't run that the fields above have let pass, or None

    def is_for(self, case: Case) -> bool:
        """Whether this is the row of the case's device."""
        if self.interpreted and case.interpreted:
            return True
        if self.platform not in (None, case.platform):
            return False
        least, end = self.capability or (0, float("inf"))
        return self.capability is None or least <= (compute_capability(case.chip) or 0) < end

    def reason(self, name: str, case: Case) -> str | None:
        """Why a case can't run on a device of this row, or None."""
        if self.dtypes is not None and (dtype := jnp.dtype(case.dtype).name) not in self.dtypes:
            return f"{name} takes {_listed(self.dtypes)}, not {dtype} ('reference' and 'xla' take any floating type)"
        if self.head_dims is not None and case.head_dim not in self.head_dims:
            sizes = self.head_dims
            known = f"a multiple of {sizes.step} up to {sizes[-1]}" if isinstance(sizes, range) else _listed(map(str, sizes))
            return f"{name} takes heads of {known} on {case.chip}, not {case.head_dim}"
        if case.decode:  # a mask and a log-sum-exp are part of it
            cache = jnp.dtype(case.dtype if case.cache_dtype is None else case.cache_dtype).name
            if cache not in (jnp.dtype(case.dtype).name, *self.caches):
                unproven = "; no GPU has run one" if cache == "int8" and case.platform == "gpu" else ""
                return f"{name} reads no caches of {cache} for queries of {jnp.dtype(case.dtype).name} on {case.chip}{unproven}"
            return self.beyond(case) if self.beyond else None
        if case.length % self.multiple or case.keys % self.multiple:
            return f"{name} takes lengths of a multiple of {self.multiple}, not {case.length} and {case.keys}"
        if case.segments and not self.segments:
            return f"{name} has no segments"
        if not (case.aligned and case.length == case.keys) and not self.offsets:
            return f"{name} attends from a sequence to itself: no offsets, as many keys as queries"
        if case.return_lse and not self.lse:
            return f"{name} gives no log-sum-exp that has a gradient"
        return self.beyond(case) if self.beyond else None


class Implementation(NamedTuple):
    """How a name is run: by forward, else by kernel; ring attention by kernel; decode is another matter.

    kernel(case, scale) is a pair of passes, under the gradient that all of them share (`gqa_jax.attention.vjp`).
    forward(q (B, T, K, G, H), k, v (B, S, K, H), mask, scale, case) -> out, lse (B, K, G, T), differentiated by JAX; lse may be
      None where limits have none.
    decode(q (B, K, G, H), cache, length (B,) int32, scale, case) -> out (B, K, G, H), lse (B, K, G) float32; `layout` is the
      one that it reads without a copy (`gqa_jax.attention.cache`), `layout_on_cpus` that on CPUs.
    """

    limits: tuple[Limits, ...] = ()
    kernel: Callable[[Case, float], Kernel] | None = None
    forward: Callable[..., tuple[jax.Array, jax.Array | None]] | None = None
    decode: Callable[..., tuple[jax.Array, jax.Array]] | None = None
    decode_limits: tuple[Limits, ...] = ()
    layout: Layout = ROWS
    layout_on_cpus: Layout | None = None  # None: the same

    def layout_of(self, case: Case) -> Layout:
        """How a cache lies that it decodes without a copy."""
        return self.layout_on_cpus or self.layout if case.platform == "cpu" else self.layout


def _of(path: str) -> Callable:
    """A function of this package, its module imported when it is called: a kernel's compiler takes long to load, and Pallas's
    for Triton is deprecated in JAX.
    """
    module, _, name = path.partition(":")

    def call(*args):
        return getattr(importlib.import_module(f"gqa_jax.attention.{module}"), name)(*args)

    return call


def _without_tiles(case: Case) -> str | None:
    known = case.platform != "tpu" or hardware.tiles_of(case.chip, case.head_dim) is not None
    return None if known else f"gqa_jax.hardware has no tiles for {case.chip}"


def _beyond_triton(case: Case) -> str | None:
    if importlib.util.find_spec(backend := "jax.experimental.pallas.triton") is None:
        return f"this jax ({jax.__version__}) has no {backend} any more: gqa_jax runs it with jax>=0.11,<0.12"
    if max(case.batch, case.n_kv_heads) > 65535:
        return f"a CUDA grid takes a batch and key/value heads of 65535 at most, not {case.batch} and {case.n_kv_heads}"
    if max(case.length * case.group, case.keys) >= 2**30:
        return f"pallas_triton counts rows in 32 bits; {case.length} queries of a group of {case.group} are too many"
    return None


def _without_tokamax(case: Case) -> str | None:
    least = "0.0.17"  # the first whose tile sizes can be chosen through its public modules
    try:
        version = importlib.metadata.version("tokamax")
    except importlib.metadata.PackageNotFoundError:
        return f"tokamax is not installed: pip install 'tokamax>={least}'"
    old = [int(part) for part in version.split(".")[:3]] < [int(part) for part in least.split(".")]
    return f"tokamax {version} is too old: pip install 'tokamax>={least}'" if old else None


ANYWHERE = Limits(offsets=True, segments=True, lse=True)
_KERNEL = ANYWHERE._replace(interpreted=True)
_TPU = _KERNEL._replace(platform="tpu", dtypes=("bfloat16", "float32"), head_dims=range(16, 129, 16))
_TRITON = _KERNEL._replace(
    platform="gpu", capability=(8.0, float("inf")), dtypes=("bfloat16", "float16", "float32"), head_dims=range(16, 257, 16),
    beyond=_beyond_triton,
)  # fmt: skip

_INT8 = ("int8",)
_CACHES = ("bfloat16", "float16", "float32")
_DECODE = (ANYWHERE._replace(platform="gpu", caches=_CACHES), ANYWHERE._replace(caches=(*_CACHES, *_INT8)))

_ALL: dict[str, Implementation] = {
    "reference": Implementation(
        (ANYWHERE,), forward=_of("reference:attend"), decode=_of("decoding:written_out"), decode_limits=_DECODE
    ),
    "xla": Implementation(
        (ANYWHERE,), _of("xla:kernel"), _of("xla:attend"), decode=_of("decoding:xla"), decode_limits=_DECODE,
        layout=WITHIN_HEADS, layout_on_cpus=BLOCKS,
    ),
    "pallas_tpu": Implementation(
        (_TPU._replace(beyond=_without_tiles),), _of("tpu:kernel"),
        decode=_of("tpu.decode:decode"), decode_limits=(_TPU._replace(caches=_INT8),), layout=LANES,
    ),
    "pallas_gpu": Implementation(
        (_KERNEL._replace(platform="gpu", capability=(9.0, 10.0), dtypes=("bfloat16",), head_dims=(64, 128)),),
        _of("hopper:kernel"),
    ),
    "pallas_triton": Implementation(
        (_TRITON,), _of("triton:kernel"), decode=_of("triton.decode:decode"), decode_limits=(_TRITON,), layout=WITHIN_HEADS,
    ),
    # what they are and why their rows refuse the rest: gqa_jax.attention.peers
    "cudnn": Implementation(
        (
            Limits("gpu", (8.0, 9.0), ("bfloat16", "float16"), range(8, 129, 8)),
            Limits("gpu", (9.0, float("inf")), ("bfloat16", "float16"), range(8, 257, 8)),
        ),
        forward=_of("peers:cudnn"),
    ),
    "tokamax": Implementation(
        (
            Limits("tpu", None, ("bfloat16", "float32"), multiple=128, beyond=_without_tokamax),
            Limits("gpu", (8.0, float("inf")), ("bfloat16", "float16"), beyond=_without_tokamax),
        ),
        forward=_of("peers:tokamax"),
    ),
}  # fmt: skip


class Row(NamedTuple):
    """A row of the table of defaults: in which cases, and the implementations, best first."""

    platform: str
    preferred: tuple[str, ...]
    head_dims: range = range(1, 1 << 30)
    lengths: range = range(1, 1 << 30)
    groups: range = range(1, 1 << 30)

    def covers(self, case: Case) -> bool:
        return (
            case.platform == self.platform
            and case.head_dim in self.head_dims
            and case.length in self.lengths
            and case.group in self.groups
        )


# The first row that covers a case decides, by the first of its implementations that can run it. TPU: by cycles of compiled
# schedules (benchmarks/tpu_cycles.py). GPU: cuDNN until benchmarks/attention.py has shown ours faster on one; it has neither
# segments nor offsets nor a log-sum-exp, and does not decode. `pallas_gpu` runs by name alone until it has run on a GPU. CPU:
# by benchmarks/attention.py.
BEST = (
    Row("tpu", ("pallas_tpu", "xla")),
    Row("gpu", ("cudnn", "pallas_triton", "xla")),
    Row("cpu", ("xla",)),
)


def names(*, decode: bool = False) -> list[str]:
    """All that are registered, or those of them that decode."""
    return [name for name, found in _ALL.items() if found.decode or not decode]


def add(name: str, implementation: Implementation) -> None:
    """Registers an implementation. Raises ValueError on a name that another one has."""
    if _ALL.setdefault(name, implementation) != implementation:
        raise ValueError(f"there is an attention implementation {name!r} already: choose another name")


def get(name: str) -> Implementation:
    """The implementation of a name, installed ones among them (`gqa_jax.attention.external`).

    Raises ValueError where there is none, naming those that there are.
    """
    if name not in _ALL:
        from gqa_jax.attention import external  # which makes what this module has: an `Implementation`

        if (found := external.find(name)) is None:
            raise ValueError(f"attention implementation {name!r} is unknown: {closest(name, names() + external.installed())}")
        add(name, found)
    return _ALL[name]


def unsupported_reason(name: str, case: Case) -> str | None:
    """Why an implementation can't run a case here, or None. Raises ValueError where there is none of that name."""
    found = get(name)
    if case.decode and found.decode is None:
        return f"{name} does not decode"
    if case.by_pass and found.kernel is None:
        return f"ring attention calls a kernel's passes one by one, and {name} has none to call"
    limits = found.decode_limits if case.decode else found.limits
    row = next((row for row in limits if row.is_for(case)), None)
    if row is None:
        return f"{name} runs on {_devices(limits)}, and this is {case.chip} ({case.platform})"
    return row.reason(name, case)


def best(case: Case) -> str:
    """The best implementation for the case on its platform; `xla` runs everywhere.

    Raises ValueError for a cache that nothing reads on this platform.
    """
    row = next((row for row in BEST if row.covers(case)), Row(case.platform, ("xla",)))
    found = next((name for name in row.preferred if unsupported_reason(name, case) is None), None)
    if found is None:  # of a cache: `xla` computes everything else
        raise ValueError(f"nothing here decodes this: {unsupported_reason(row.preferred[-1], case)}")
    return found


def resolve(implementation: str | None, case: Case) -> str:
    """The name of the implementation that runs `case` for `implementation`; None asks for the best one.

    Raises ValueError on an unknown name and on one that can't run the case here. Nothing else is ever run in the place of
    the one that was asked for.
    """
    if implementation is None:
        return best(case)
    if (reason := unsupported_reason(implementation, case)) is not None:
        able = [name for name in names(decode=case.decode) if unsupported_reason(name, case) is None]
        kind = "decode" if case.decode else "attention"
        raise ValueError(f"{kind} implementation {implementation!r} can't run here: {reason}. These can: {', '.join(able)}")
    return implementation


_traced: dict[str, dict[str, None]] = {"attention": {}, "decode": {}}


def traced() -> dict[str, str]:
    """What programs traced by this process since `clear_traced` run: {"attention": "cudnn", "decode": "pallas_triton"}.

    Several of a kind are joined by ", " in the order in which they were traced; a kind that was not traced is left out.
    """
    return {kind: ", ".join(found) for kind, found in _traced.items() if found}


def clear_traced() -> None:
    """Forgets what `traced` has noted. A program that JAX has traced before, and keeps, is not noted again."""
    for found in _traced.values():
        found.clear()


def attend(
    name: str, q_BxTxKxGxH: jax.Array, k_BxSxKxH: jax.Array, v_BxSxKxH: jax.Array, mask: Mask, scale: float, case: Case
) -> tuple[jax.Array, jax.Array | None]:
    """Output (B, T, K, G, H) and log-sum-exp (B, K, G, T) by an implementation that can run the case, differentiable."""
    found = get(name)
    if found.forward is None:
        return vjp.attend(kernel(name, case, scale), q_BxTxKxGxH, k_BxSxKxH, v_BxSxKxH, mask)
    _traced["attention"][name] = None
    return found.forward(q_BxTxKxGxH, k_BxSxKxH, v_BxSxKxH, mask, scale, case)


def kernel(name: str, case: Case, scale: float) -> Kernel:
    """Both passes of an implementation that has a kernel and can run the case."""
    _traced["attention"][name] = None
    return get(name).kernel(case, scale)._replace(name=name)


def decode(
    name: str, q_BxKxGxH: jax.Array, cache: Cache, length_B: jax.Array, scale: float, case: Case
) -> tuple[jax.Array, jax.Array]:
    """Output (B, K, G, H) and log-sum-exp (B, K, G) of one query per sequence, by an implementation that can run the case."""
    _traced["decode"][name] = None
    return get(name).decode(q_BxKxGxH, cache, length_B, scale, case)


def _listed(words: Iterable[str]) -> str:
    *words, last = words
    return f"{', '.join(words)} and {last}" if words else last


def _devices(limits: Iterable[Limits]) -> str:
    """In words, the devices that rows are for."""
    words = []
    for platform in dict.fromkeys(row.platform for row in limits):
        spans = [row.capability for row in limits if row.platform == platform]
        word = PLATFORMS.get(platform, "GPUs")
        if None not in spans:
            least, end = min(span[0] for span in spans), max(span[1] for span in spans)
            word += f" of compute capability {least} ({GENERATIONS.get(least, 'NVIDIA')})"
            word += " or later" if end == float("inf") else f" to below {end}" if end - least > 1 else ""
        words.append(word)
    return " or ".join(words)
