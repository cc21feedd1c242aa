"""Times of generation: one closed batch of prompts of one length, read and answered together, by the device's own loop.

Time to first token (TTFT) is from the prompts' ids to the first drawn token, time per output token (TPOT) what each further one
takes. The loop runs on the device, so single tokens are not seen: it is stopped every few tokens, a stretch, and percentiles
are over stretches. Programs are compiled and run once before anything is timed. No requests arrive: that measures a server.
"""

from __future__ import annotations

import dataclasses
import time

import jax
import numpy as np

from gqa_jax.inference.engine import Carry, Engine, Plan
from gqa_jax.inference.sampling import Sampling

STRETCH_SECONDS = 0.1  # that the loop runs at least before it is stopped: on a CPU starting it again takes some milliseconds
MOST_STRETCHES = 64
PATIENCE = 20.0  # seconds of reading prompts after which it isn't their turn again


@dataclasses.dataclass(frozen=True)
class Times:
    """What was measured of a batch."""

    plan: Plan
    prompt_tokens: int
    new_tokens: int
    passes: int  # chunks of the prompts
    first_seconds: tuple[float, ...]  # TTFT, each time that the prompts were read
    token_seconds: tuple[float, ...]  # TPOT, of each stretch of the loop
    stretch: int  # tokens of one, the last may have fewer
    compile_seconds: float  # of the first run of every program
    weight_bytes: int  # of a device
    cache_bytes: int
    peak_bytes: int | None  # as the device says, of all that ran on it; None: it doesn't say

    def ttft(self, percentile: float = 50) -> float:
        return float(np.percentile(self.first_seconds, percentile))

    def tpot(self, percentile: float = 50) -> float:
        return float(np.percentile(self.token_seconds, percentile))

    def __add__(self, later: Times) -> Times:
        """All that two turns of one batch found."""
        return dataclasses.replace(
            self,
            first_seconds=self.first_seconds + later.first_seconds,
            token_seconds=self.token_seconds + later.token_seconds,
            peak_bytes=later.peak_bytes,
        )

    @property
    def enough(self) -> bool:
        """Whether reading the prompts took so long that they are not read again."""
        return sum(self.first_seconds) >= PATIENCE


def measure(engine: Engine, prompt_tokens: int, new_tokens: int, batch: int, *, seed: int = 0) -> Times:
    """Times of `batch` prompts of `prompt_tokens` drawn ids and `new_tokens` likeliest tokens of each, at least 2: one turn."""
    generator, rule = np.random.default_rng(seed), Sampling()
    prompts = generator.integers(0, engine.n_ids, (batch, prompt_tokens)).tolist()
    plan = engine.plan([prompt_tokens] * batch, new_tokens, rule.kind)
    passes = -(-prompt_tokens // plan.chunk)
    began = time.perf_counter()
    jax.block_until_ready(engine.warm_up(plan, passes))
    compiled, began = time.perf_counter() - began, time.perf_counter()
    _, carry, arguments = engine.start(prompts, new_tokens, rule)
    jax.block_until_ready(carry.token_B)
    first = time.perf_counter() - began
    tokens, stretch = _run_on(engine, plan, carry, arguments, new_tokens)
    device = jax.local_devices()[0]
    weights = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(engine.weights))
    return Times(
        plan, prompt_tokens, new_tokens, passes, (first,), tuple(tokens), stretch, compiled, weights,
        engine.cache_bytes(batch, plan.keys), (device.memory_stats() or {}).get("peak_bytes_in_use"),
    )  # fmt: skip


def _run_on(engine: Engine, plan: Plan, carry: Carry, arguments: dict, new_tokens: int) -> tuple[list[float], int]:
    """Seconds of a token in each stretch, and the tokens of one; the first token says how long they are to be."""

    def timed(count: int, tokens: int) -> float:
        nonlocal carry
        began = time.perf_counter()
        carry = engine.advance(plan, carry, arguments, count + tokens)
        jax.block_until_ready(carry.token_B)
        return (time.perf_counter() - began) / tokens

    count, found = 2, [timed(1, 1)]
    stretch = max(1, int(np.ceil(STRETCH_SECONDS / found[0])), -(-new_tokens // MOST_STRETCHES))
    while count < new_tokens:
        tokens = min(stretch, new_tokens - count)
        found.append(timed(count, tokens))
        count += tokens
    return (found[1:] or found), stretch
