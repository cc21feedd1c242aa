"""Which token follows, given logits: the likeliest, or drawn, from all or from the likeliest ones."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from gqa_jax.config import LARGEST_SEED
from gqa_jax.errors import ConfigError
from gqa_jax.model import seed_key


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; the default takes the likeliest one. Raises ConfigError.

    The logits are divided by the temperature, then all but the `top_k` largest are left out, then all but the fewest whose
    probabilities add up to `top_p` (arXiv 1904.09751).
    """

    temperature: float = 0.0  # 0: the likeliest token
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0  # the draws of a prompt are a function of this and its place among the prompts

    def __post_init__(self):
        def require(holds: bool, message: str) -> None:
            if not holds:
                raise ConfigError(message)

        known = isinstance(self.temperature, (int, float)) and 0 <= self.temperature < math.inf
        require(known, f"temperature = {self.temperature!r}: must be 0 (the likeliest token) or above")
        require(
            self.top_k is None or (isinstance(self.top_k, int) and self.top_k >= 1),
            f"top_k = {self.top_k!r}: must be an integer of at least 1, or None for all tokens",
        )
        require(
            isinstance(self.top_p, (int, float)) and 0 < self.top_p <= 1, f"top_p = {self.top_p!r}: must be above 0, at most 1"
        )
        require(
            isinstance(self.seed, int) and 0 <= self.seed <= LARGEST_SEED, f"seed = {self.seed!r}: must be 0 to {LARGEST_SEED}"
        )

    @property
    def kind(self) -> str:
        """What of it a program is compiled for: "greedy", "all" or "truncated"."""
        if self.temperature == 0 or self.top_k == 1:
            return "greedy"
        return "all" if self.top_k is None and self.top_p == 1 else "truncated"

    def arguments(self, batch: int) -> dict[str, jax.Array]:
        """What a program is given of it: `draw` reads them."""
        keys_B = jax.vmap(lambda row: jax.random.fold_in(seed_key(self.seed), row))(jnp.arange(batch))
        return {
            "temperature": jnp.float32(self.temperature or 1),
            "top_k": jnp.int32(self.top_k or 2**31 - 1),
            "top_p": jnp.float32(self.top_p),
            "keys_B": keys_B,
        }


def draw(logits_BxV: jax.Array, kind: str, arguments: dict[str, jax.Array], step: jax.Array) -> jax.Array:
    """Ids (B,) int32 of the tokens that follow as generated token number `step`; logits float32, -inf where none may."""
    if kind == "greedy":
        return jnp.argmax(logits_BxV, axis=-1).astype(jnp.int32)
    logits_BxV = logits_BxV / arguments["temperature"]
    if kind == "truncated":
        logits_BxV = jnp.where(logits_BxV >= _least(logits_BxV, arguments["top_k"], arguments["top_p"]), logits_BxV, -jnp.inf)
    keys_B = jax.vmap(jax.random.fold_in, (0, None))(arguments["keys_B"], step)
    return jax.vmap(jax.random.categorical)(keys_B, logits_BxV).astype(jnp.int32)


def _least(logits_BxV: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """The smallest logit that may be drawn, (B, 1)."""
    sorted_BxV = -jnp.sort(-logits_BxV, axis=-1)
    inside_1xV = jnp.arange(sorted_BxV.shape[-1])[None] < top_k
    kept_BxV = jnp.where(inside_1xV, sorted_BxV, -jnp.inf)
    weights_BxV = jax.nn.softmax(kept_BxV, axis=-1)
    before_BxV = jnp.cumsum(weights_BxV, axis=-1) - weights_BxV  # of the likelier ones
    last_B = jnp.sum((before_BxV < top_p) & inside_1xV, axis=-1) - 1
    return jnp.take_along_axis(sorted_BxV, jnp.maximum(last_B, 0)[:, None], axis=-1)
