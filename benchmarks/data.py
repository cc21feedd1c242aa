"""Speed of tokenizing and of reading, beside the bare library: `python benchmarks/data.py`, about two minutes.

Tokenizing: GPT-2's BPE over several copies of the embedded corpus, as MB of text per second. Bare tiktoken is measured twice,
by its own `encode_ordinary_batch` (Python lists) and as a pool of threads around `encode_to_numpy`; then our tokenizer on
the same texts, and all of `prepare` from a .jsonl file to a finished store. Variants take turns, so that a busy neighbour
slows all of them; shown are medians of the speed and of each turn's ratio to its faster bare one.

Reading: batches of 524,288 tokens from the GPT-2 store of the corpus, one core, as tokens per second; directly and through
grain's prefetching.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

from rich.console import Console
from rich.table import Table

from gqa_jax.data import catalog, corpus, prepare, reader
from gqa_jax.data.tokenizer import GPT2Tokenizer
from gqa_jax.hardware import host

BATCH_TOKENS = 524_288


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="of each measurement; medians are shown")
    parser.add_argument("--copies", type=int, default=10, help="of the 10.8 MB corpus, for tokenizing")
    parser.add_argument("--threads", type=int, default=len(host.cpus()), help="for tokenizing")
    options = parser.parse_args()
    console = Console()
    console.print(f"{host.described()}, {platform.system()}, Python {platform.python_version()}")
    console.print(", ".join(f"{name} {metadata.version(name)}" for name in ("tiktoken", "numpy", "grain", "gqa-jax")))
    with tempfile.TemporaryDirectory() as folder:
        console.print(tokenizing(Path(folder), options.copies, options.threads, options.repeats))
        console.print(reading(Path(folder), options.repeats))


def tokenizing(folder: Path, copies: int, threads: int, repeats: int) -> Table:
    texts = corpus.load_sotu() * copies
    megabytes = copies * corpus.SOTU_BYTES / 1e6
    lines = folder / "text.jsonl"
    lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer = GPT2Tokenizer(threads)
    pool = ThreadPoolExecutor(threads)
    stores = iter(range(10**9))

    def bare_numpy() -> None:
        list(pool.map(lambda text: tokenizer.encoding.encode_to_numpy(text, disallowed_special=()), texts))

    def whole() -> None:
        prepare.prepare(prepare.Recipe((str(lines),), "gpt2"), folder / f"store-{next(stores)}", threads)

    variants = {
        "tiktoken, encode_ordinary_batch": lambda: tokenizer.encoding.encode_ordinary_batch(texts, num_threads=threads),
        "tiktoken, encode_to_numpy in threads": bare_numpy,
        "GPT2Tokenizer.encode_batch": lambda: tokenizer.encode_batch(texts),
        "prepare, .jsonl to store": whole,
    }
    seconds = _interleaved(variants, repeats)
    bare = [min(turn) for turn in zip(*list(seconds.values())[:2], strict=True)]
    table = Table("tokenizing, GPT-2", "MB/s", "of the faster bare one", title=f"{megabytes:.0f} MB of text, {threads} threads")
    for name, values in seconds.items():
        ratio = statistics.median(best / value for best, value in zip(bare, values, strict=True))
        table.add_row(name, f"{megabytes / statistics.median(values):.1f}", f"{ratio:.2f}")
    return table


def reading(folder: Path, repeats: int) -> Table:
    tokens = catalog.open_store("sotu-gpt2", folder)
    steps = 50
    cpus = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cpus)})  # also of the threads that are made from here on
    variants = {}
    for context_length, block_tokens in ((1024, 131_072), (8192, 131_072), (1024, 1024)):
        batches = reader.Batches(
            tokens,
            context_length=context_length,
            batch_size=BATCH_TOKENS // context_length,
            block_tokens=block_tokens,
            seed=0,
            epochs=2 * steps,
        )
        name = f"T = {context_length}, blocks of {block_tokens:,}"
        variants[f"{name}, batches(step)"] = lambda batches=batches: [batches(step) and None for step in range(steps)]
        variants[f"{name}, read (grain)"] = lambda batches=batches: [None for _ in reader.read(batches, 0, steps)]
    seconds = _interleaved(variants, repeats)
    os.sched_setaffinity(0, cpus)
    table = Table("reading, one core", "million tokens/s", title=f"batches of {BATCH_TOKENS:,} tokens")
    for name, values in seconds.items():
        table.add_row(name, f"{steps * BATCH_TOKENS / statistics.median(values) / 1e6:,.0f}")
    return table


def _interleaved(variants: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each variant in each turn, after one turn that isn't counted."""
    seconds = {name: [] for name in variants}
    for turn in range(repeats + 1):
        for name, run in variants.items():
            begin = time.perf_counter()
            run()
            if turn:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


if __name__ == "__main__":
    main()
