"""How many devices share what: the shape of a mesh as four numbers, and which runs it suits.

    data      sequences are spread over it; parameters are copied
    fsdp      sequences are spread over it; parameters, gradients and moments too (ZeRO-3, arXiv 1910.02054)
    tensor    heads and feed-forward width are spread over it (Megatron-LM, arXiv 1909.08053)
    context   positions of a sequence are spread over it; parameters, gradients and moments too

A mesh is written "data=2,fsdp=4,context=8"; an axis that is left out has size 1.
"""

from __future__ import annotations

import dataclasses
import math

from gqa_jax.errors import closest

AXES = ("data", "fsdp", "tensor", "context")  # from the slowest network to the fastest
SEQUENCES = ("data", "fsdp")  # axes that the sequences of a batch are spread over
PARAMETERS = ("fsdp", "context")  # axes that the hidden size of every parameter is spread over


@dataclasses.dataclass(frozen=True)
class MeshShape:
    """Sizes of the four axes; `str` writes them as they are read."""

    data: int = 1
    fsdp: int = 1
    tensor: int = 1
    context: int = 1

    @classmethod
    def parse(cls, text: str) -> MeshShape:
        """The shape that `text` describes, for example "fsdp=4,context=2". Raises ValueError naming what is wrong with it."""
        sizes: dict[str, int] = {}
        for term in text.split(","):
            name, _, value = (part.strip() for part in term.partition("="))
            if name not in AXES:
                raise ValueError(
                    f"mesh {text!r}: write it like data=2,fsdp=4,context=8; {name!r} is no axis: {closest(name, AXES)}"
                )
            if name in sizes:
                raise ValueError(f"mesh {text!r}: {name} is there twice")
            if not value.isdecimal() or int(value) < 1:
                raise ValueError(f"mesh {text!r}: {name}={value} must be a whole number of at least 1")
            sizes[name] = int(value)
        return cls(**sizes)

    def __str__(self) -> str:
        return ",".join(f"{name}={size}" for name, size in self.sizes.items() if size > 1) or "data=1"

    @property
    def sizes(self) -> dict[str, int]:
        """Size of every axis, in the order of AXES."""
        return {name: getattr(self, name) for name in AXES}

    @property
    def n_devices(self) -> int:
        return math.prod(self.sizes.values())

    @property
    def sequences(self) -> int:
        """Parts that the sequences of a batch are cut into."""
        return self.data * self.fsdp

    @property
    def parameters(self) -> int:
        """Parts that the hidden size of a parameter is cut into."""
        return self.fsdp * self.context

    def unsupported_reason(self, model, context_length: int, micro_batch: int) -> str | None:
        """Why a run does not divide into this mesh, with what would; None when it does.

        `model` is a `gqa_jax.config.ModelConfig`, `micro_batch` the sequences of a micro-batch, over all devices.
        """
        if micro_batch % self.sequences:
            return (
                f"data x fsdp = {self.sequences} does not divide the {micro_batch} sequences of a micro-batch: use "
                f"{divisors(micro_batch)}, or spread positions over context instead"
            )
        if self.context > 1 and context_length % (2 * self.context):
            # every device takes a block from the front and one from the back, so that all have as many keys to look at
            return (
                f"context = {self.context} does not divide half of context_length = {context_length}: use "
                f"{divisors(context_length // 2)}"
            )
        if model.d_model % (self.parameters * self.tensor):
            return (
                f"fsdp x context x tensor = {self.parameters * self.tensor} does not divide model.d_model = {model.d_model}, "
                f"which parameters are cut along: use {divisors(model.d_model)}, and data for the other devices"
            )
        if model.n_heads % self.tensor or model.d_ff % self.tensor:
            both = math.gcd(model.n_heads, model.d_ff)
            return (
                f"tensor = {self.tensor} does not divide model.n_heads = {model.n_heads} and model.d_ff = {model.d_ff}: use "
                f"{divisors(both)}"
            )
        if (micro_batch // self.sequences) * (context_length // self.context) % self.tensor:
            return f"tensor = {self.tensor} does not divide the tokens of a device, which the loss is spread over"
        return self.kv_heads_reason(model.n_kv_heads)

    def kv_heads_reason(self, n_kv_heads: int) -> str | None:
        """Why a device could not hold the key/value heads of its query heads (several may hold the same one), or None."""
        why = f"tensor = {self.tensor} neither divides model.n_kv_heads = {n_kv_heads} nor is a multiple of it: use "
        return f"{why}{divisors(n_kv_heads)}" if n_kv_heads % self.tensor and self.tensor % n_kv_heads else None


def divisors(n: int) -> list[int]:
    """Ascending. Of numbers that nobody means, above 10^12, only those of a factor up to a million: an error doesn't hang."""
    small = [i for i in range(1, min(math.isqrt(n), 10**6) + 1) if n % i == 0]
    return sorted({*small, *(n // i for i in small)})
