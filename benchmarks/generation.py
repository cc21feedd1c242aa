"""How fast models generate on the CPU at hand, and what a narrower cache costs.

    python -m benchmarks.generation heads                          bytes/s of a decode step of 16K keys, by heads
    python -m benchmarks.generation room                           time per token with the cache filled to 1K, of 4K and of 16K
    python -m benchmarks.generation transformers --torch_python PYTHON    tokens per CPU-second by transformers (`make torch`)
    python -m benchmarks.generation loss RUN                       held-out loss through caches of float32, bfloat16 and int8

What is compared takes turns, and the least of `--turns` counts: machines are shared. Ratios stand, seconds only with them.
"""

from __future__ import annotations

import argparse
import functools
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import gqa_jax
from benchmarks import workers
from gqa_jax import attention, model
from gqa_jax.config import ModelConfig
from gqa_jax.data import catalog
from gqa_jax.inference import engine as engines
from gqa_jax.inference.engine import Carry, Engine
from gqa_jax.inference.sampling import Sampling
from gqa_jax.training import loss

HEADS = ((8, 1), (8, 8), (32, 8), (32, 32))
KEYS, HEAD_DIM, LAYERS = 16_384, 64, 4
ROOMS, FILLED = (4096, 16_384), 1024
PROMPT, NEW = 128, 256
CONTEXTS = (512, 4096)
LIMITS = {"start": 300.0, "run": 300.0}
FIELDS = ("n_layers", "d_model", "d_ff", "n_heads", "n_kv_heads", "head_dim", "vocab_size")


class Seconds:
    """The least wall and CPU seconds that a call took."""

    def __init__(self):
        self.wall = self.cpu = float("inf")

    def add(self, wall: float, cpu: float) -> None:
        self.wall, self.cpu = min(self.wall, wall), min(self.cpu, cpu)

    def time(self, call: Callable[[], Any]) -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        jax.block_until_ready(call())
        self.add(time.perf_counter() - wall, time.process_time() - cpu)


def small(n_heads: int, n_kv_heads: int, vocab_size: int = 50_304) -> ModelConfig:
    """The paper's 3M with these heads, in float32."""
    return ModelConfig(LAYERS, 256, n_heads, n_kv_heads, vocab_size=vocab_size, dtype="float32")


def heads(turns: int) -> list[str]:
    """A row for each of HEADS: GB/s of keys and values of LAYERS caches, read one after the other in a loop."""
    loops, steps = {}, 16
    for n_heads, n_kv in HEADS:
        cache = attention.new_cache(1, KEYS, n_heads, n_kv, HEAD_DIM, jnp.float32)
        caches = [jax.tree.map(lambda x: x + 0.01, cache) for _ in range(LAYERS)]

        @jax.jit
        def loop(q, caches):
            def step(_, q):
                for one in caches:
                    q = q + 1e-3 * attention.decode(q, one, KEYS)
                return q

            return lax.fori_loop(0, steps, step, q)

        loops[n_heads, n_kv] = functools.partial(loop, jnp.ones((1, n_heads, HEAD_DIM)), caches)
    found = _in_turns(loops, turns)
    lines = ["| heads | GB/s, wall | GB/s, per CPU-second |", "|---|---|---|"]
    rates = {}
    for (n_heads, n_kv), took in found.items():
        size = steps * LAYERS * 2 * KEYS * n_kv * HEAD_DIM * 4 / 1e9
        rates[n_heads, n_kv] = size / took.wall
        lines.append(f"| ({n_heads},{n_kv}) | {size / took.wall:.1f} | {size / took.cpu:.1f} |")
    return [*lines, f"fastest over slowest: {max(rates.values()) / min(rates.values()):.2f}"]


def room(turns: int) -> list[str]:
    """A row for each of HEADS: milliseconds of a token with FILLED entries in caches of ROOMS."""
    calls = {(one, keys): _loop_over_tokens(one, keys) for one in HEADS for keys in ROOMS}
    found = _in_turns(calls, turns)
    lines = [f"| heads | ms a token, S = {ROOMS[0]:,} | S = {ROOMS[1]:,} | ratio |", "|---|---|---|---|"]
    for one in HEADS:
        small_ms, large_ms = (1e3 * found[one, keys].wall / 63 for keys in ROOMS)
        lines.append(f"| ({one[0]},{one[1]}) | {small_ms:.2f} | {large_ms:.2f} | {large_ms / small_ms:.2f} |")
    return lines


def _loop_over_tokens(one: tuple[int, int], keys: int) -> Callable[[], Any]:
    config = small(*one, vocab_size=512)
    engine = Engine(config, model.init_params(config, jax.random.key(0)))
    plan = replace(engine.plan([FILLED], 64), keys=keys, answers=64)
    rule = Sampling().arguments(1) | {"stop": jnp.array([-1], jnp.int32)}
    caches = engine._program("caches", plan)()

    def call() -> Any:
        nonlocal caches
        ids = jnp.zeros(1, jnp.int32), jnp.array([FILLED], jnp.int32), jnp.zeros(1, bool), jnp.full((1, 64), -1, jnp.int32)
        carry = engine.advance(plan, Carry(caches, *ids, jnp.int32(1)), rule, 64)
        caches = carry.caches
        return carry.token_B

    return call


def beside_transformers(python: str, turns: int) -> list[str]:
    """A row for each heads and room: tokens per CPU-second, prompts included, of ours and of transformers' faster cache."""
    lines = ["| heads | S | ours | transformers, dynamic | static | ratio to the better |", "|---|---|---|---|---|---|"]
    log = Path(tempfile.mkdtemp(prefix="generation-")) / "torch.log"
    with workers.Worker([python, "-m", "benchmarks.generation_torch"], log, cwd=Path(__file__).parents[1]) as other:
        versions = _asked(other, "versions")
        for n_heads, n_kv in ((8, 1), (8, 8)):
            for keys in CONTEXTS:
                config = small(n_heads, n_kv)
                _asked(other, "prepare", **{name: asdict(config)[name] for name in FIELDS}, room=keys)
                engine = Engine(config, model.init_params(config, jax.random.key(0)))
                plan_of = engine.plan
                engine.plan = lambda *given, plan_of=plan_of, keys=keys: replace(plan_of(*given), keys=keys)
                prompt = np.random.default_rng(0).integers(0, config.vocab_size, (1, PROMPT)).tolist()
                ours, dynamic, static = Seconds(), Seconds(), Seconds()
                engine.generate(prompt, NEW, Sampling())
                for _ in range(turns):
                    ours.time(lambda engine=engine, prompt=prompt: engine.generate(prompt, NEW, Sampling()))
                    for took, kind in ((dynamic, "dynamic"), (static, "static")):
                        took.add(**_asked(other, "generate", cache=kind, prompt=PROMPT, new_tokens=NEW))
                rates = [NEW / took.cpu for took in (ours, dynamic, static)]
                numbers = " | ".join(f"{rate:.0f}" for rate in rates)
                lines.append(f"| ({n_heads},{n_kv}) | {keys} | {numbers} | {rates[0] / max(rates[1:]):.2f} |")
    return [*lines, ", ".join(f"{name} {version}" for name, version in versions.items())]


def _asked(worker: workers.Worker, what: str, **request: Any) -> dict[str, Any]:
    outcome = worker.ask({"do": what, **request}, limits=LIMITS)
    if not outcome.ok:
        raise SystemExit(f"generation: {what}: {outcome.status}: {outcome.reason}")
    return outcome.result


def losses_by_cache(run: str, windows: int = 256, chunk: int = 16) -> list[str]:
    """Held-out loss of a run, its windows read in chunks from caches of each dtype, beside the full forward pass."""
    loaded = gqa_jax.load_model(run)
    length, store = loaded.context, loaded.start.config.data.store
    tokens = np.asarray(catalog.open_store(store).tokens("validation")[: windows * length]).astype(np.int32)
    tokens_WxT = tokens[: len(tokens) // length * length].reshape(-1, length)
    parts = [tokens_WxT[i : i + 64] for i in range(0, len(tokens_WxT), 64)]
    whole = np.concatenate([np.asarray(loaded.losses(part)) for part in parts])
    lines = ["| cache | loss | more than the full pass | largest change of a token |", "|---|---|---|---|"]
    for cache_dtype in ("float32", "bfloat16", "int8"):
        read = _reader(loaded.engine(cache_dtype=cache_dtype), length, chunk)
        found = np.concatenate([np.asarray(read(part)) for part in parts])
        lines.append(
            f"| {cache_dtype} | {found.mean():.5f} | {found.mean() - whole.mean():+.5f} | {np.abs(found - whole).max():.3f} |"
        )
    return [*lines, f"{whole.size:,} targets of {store}, {len(tokens_WxT)} windows of {length}, chunks of {chunk}"]


def _reader(engine: Engine, length: int, chunk: int) -> Callable[[np.ndarray], jax.Array]:
    """Losses (B, T - 1) of windows whose every chunk attends to the cache."""

    @jax.jit
    def read(held, tokens_BxT):
        def one(i, carry):
            caches, hidden_BxTxD = carry
            at = i * chunk
            own = lax.dynamic_slice_in_dim(tokens_BxT, at, chunk, 1)
            hook = functools.partial(engines._attend_chunk, engine.shape, None, start=at, first=False)
            own_BxCxD, caches = engine._layers(held, own, at + jnp.arange(chunk), caches, hook)
            return caches, lax.dynamic_update_slice_in_dim(hidden_BxTxD, own_BxCxD, at, 1)

        start = jnp.zeros((*tokens_BxT.shape, engine.config.d_model), engine.config.dtype)
        _, hidden_BxTxD = lax.fori_loop(0, length // chunk, one, (engine._caches(len(tokens_BxT), length), start))
        return loss.token_losses(hidden_BxTxD[:, :-1], model.unembedding(held), tokens_BxT[:, 1:])

    return functools.partial(read, engine.weights)


def _in_turns(calls: dict[Any, Callable[[], Any]], turns: int) -> dict[Any, Seconds]:
    found = {name: Seconds() for name in calls}
    for call in calls.values():
        jax.block_until_ready(call())
    for _ in range(turns):
        for name, call in calls.items():
            found[name].time(call)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.generation", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("heads", "room", "transformers", "loss"))
    parser.add_argument("run", nargs="?", metavar="RUN", help="of loss: the folder of a run that is done")
    parser.add_argument("--turns", type=int, default=5, metavar="N", help="(default: 5)")
    parser.add_argument("--torch_python", default=sys.executable, metavar="PYTHON", help="that has torch and transformers")
    options = parser.parse_args(arguments)
    if options.turns < 1:
        parser.error(f"--turns {options.turns}: at least 1")
    if (options.what == "loss") != (options.run is not None):
        parser.error("loss takes the folder of a run, the others none")
    lines = {
        "heads": lambda: heads(options.turns),
        "room": lambda: room(options.turns),
        "transformers": lambda: beside_transformers(options.torch_python, options.turns),
        "loss": lambda: losses_by_cache(options.run),
    }[options.what]()
    print("\n".join(lines))
    turns = "" if options.what == "loss" else f", float32, the least of {options.turns} turns"
    print(f"{jax.devices()[0].device_kind}, jax {metadata.version('jax')}{turns}")


if __name__ == "__main__":
    main()
