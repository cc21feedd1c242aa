"""Training speed on this CPU: the 3M model here, beside a PyTorch Llama of the same shape, interleaved in one run.

    python benchmarks/train_cpu.py [--torch_python PYTHON]     PYTHON has torch and transformers; default: this one

Both train 4 layers x 256, 4 heads of 64, vocabulary 50,304, tied embeddings, T = 1,024, batch 2, float32, AdamW and clipping.
Each turn measures a few steps of every form, one process at a time while the others wait, so that a busy neighbour slows
all alike. Prints tokens/s (medians) and the medians of the ratios within a turn.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

OURS = """
import json, sys, time
import jax, numpy as np
from gqa_jax import planner, program, sharding
from gqa_jax.config import TrainConfig, default_config
config = default_config()
config.context_length, config.batch_tokens, config.steps = 1024, 2048, 1000
config.model.update(n_layers=4, d_model=256, n_heads=4, n_kv_heads=4, head_dim=64, vocab_size=50304, dtype="float32")
config.evaluation.tokens = 1024
config = planner.resolve(TrainConfig.from_dict(config.to_dict()), "cpu", 1)
mesh = sharding.make_mesh(config.mesh_shape)
state, step = program.fresh_state(config, mesh), program.compile_step(config, mesh)
rows = program.local_rows(config, mesh, 1)
def batch(x):
    return program.place(config, mesh, {"tokens": x[:, :-1].astype(np.int32), "targets": x[:, 1:].astype(np.int32)}, rows, 1)
rng = np.random.default_rng(0)
def run():
    global state
    x = batch(rng.integers(50304, size=(2, 1025)))
    state, metrics = step(state, x)
    return float(metrics["loss"])
run()
versions = f"jax {jax.__version__}"
"""

THEIRS = """
import json, sys, time
import numpy as np, torch, transformers
from transformers import LlamaConfig, LlamaForCausalLM
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(
    head_dim=64, num_attention_heads=4, num_key_value_heads=4, hidden_size=256, intermediate_size=672, num_hidden_layers=4,
    vocab_size=50304, tie_word_embeddings=True, rms_norm_eps=1e-6, max_position_embeddings=1024))
assert sum(p.numel() for p in model.parameters()) == 15_993_088, "not the same shape"
forward = torch.compile(model) if COMPILE else model
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
rng = np.random.default_rng(0)
def run():
    x = torch.from_numpy(rng.integers(50304, size=(2, 1024)))
    loss = forward(input_ids=x, labels=x).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()
run()
versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
"""

LOOP = """
print(json.dumps(versions), flush=True)
for line in sys.stdin:
    times = []
    for _ in range(int(line)):
        start = time.perf_counter()
        loss = run()
        times.append(time.perf_counter() - start)
        assert loss == loss
    print(json.dumps(times), flush=True)
"""


class Worker:
    """A process that has compiled its step and measures when it is told to."""

    def __init__(self, python: str, code: str):
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
        environment.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")  # for all alike, as the launcher sets it
        self._process = subprocess.Popen(
            [python, "-c", code + LOOP], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.versions = self._read()

    def measure(self, steps: int) -> float:
        """Median seconds of a step."""
        self._process.stdin.write(f"{steps}\n")
        self._process.stdin.flush()
        return statistics.median(self._read())

    def _read(self):
        line = self._process.stdout.readline()
        if not line:
            sys.exit("a worker ended early: see its message above; --torch_python needs torch and transformers")
        return json.loads(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch_python", default=sys.executable)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--steps", type=int, default=2, help="steps of each form in a turn")
    arguments = parser.parse_args()
    workers = {
        "gqa_jax": Worker(sys.executable, OURS),
        "PyTorch eager": Worker(arguments.torch_python, THEIRS.replace("COMPILE", "False")),
        "PyTorch torch.compile": Worker(arguments.torch_python, THEIRS.replace("COMPILE", "True")),
    }
    turns = [{name: worker.measure(arguments.steps) for name, worker in workers.items()} for _ in range(arguments.turns)]
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}")
    for name, worker in workers.items():
        rate = statistics.median(2048 / turn[name] for turn in turns)
        ratios = sorted(turn[name] / turn["gqa_jax"] for turn in turns)
        print(
            f"{name:22} {rate:7,.0f} tokens/s   gqa_jax is {statistics.median(ratios):.2f}x "
            f"({ratios[0]:.2f} to {ratios[-1]:.2f})   {worker.versions}"
        )


if __name__ == "__main__":
    main()
