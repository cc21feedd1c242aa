"""PyTorch's attention for first light: prepared and measured when asked to. Imports no jax.

python -m benchmarks.first_light.torch_worker gpu|cpu
"""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks import workers
from benchmarks.attention_torch import Session

SAMPLE_S = 0.02
NOMINAL = 3e14  # FLOP/s that choose how many passes a sample has, as for the others


class Attention:
    """Cases by name, over random arrays of their own."""

    def __init__(self, platform: str):
        self.session = Session(platform)
        if "error" in (hello := self.session.hello()):
            raise SystemExit(hello["error"])
        self.folder = tempfile.TemporaryDirectory(prefix="first-light-torch-")

    def prepare(self, phase: Callable, case: str, backend: str, direction: str, shape: dict, **_: Any) -> dict[str, Any]:
        """`shape` has batch, length, n_heads, n_kv_heads, head_dim and dtype."""
        phase("compile")  # the device is opened, libraries are loaded and choose their kernels
        b, t, n, k, h = (shape[name] for name in ("batch", "length", "n_heads", "n_kv_heads", "head_dim"))
        q, kv = (b, t, n, h), (b, t, k, h)
        generator = torch.Generator(self.session.device).manual_seed(0)
        dtype = getattr(torch, shape.get("dtype", "bfloat16"))
        self.session.arrays = [
            torch.randn(size, generator=generator, device=self.session.device, dtype=torch.float32).to(dtype)
            for size in (q, kv, kv, *([q] if direction == "backward" else []))
        ]
        amount = 2.0 * b * n * h * t * t * (3.5 if direction == "backward" else 1.0)
        iterations = max(1, min(256, math.floor(SAMPLE_S * NOMINAL / amount))) if self.session.cuda else 1
        answer = self.session.prepare(case, backend, direction, iterations, self.folder.name)
        return {
            "status": "ok", "reason": answer["remark"], "amount": amount, "iterations": iterations,
            "temp_bytes": answer["temp_bytes"], "versions": {"torch": torch.__version__},
        }  # fmt: skip

    def measure(self, phase: Callable, case: str, **_: Any) -> dict[str, Any]:
        """Seconds of one pass of a case that was prepared, the mean of its sample."""
        phase("run")
        return {"seconds": self.session.run(case, self.folder.name)["seconds"]}

    def forget(self, phase: Callable, cases: Sequence[str], **_: Any) -> dict[str, Any]:
        """Gives back the memory of cases."""
        for case in cases:
            self.session.ready.pop(case, None)
        self.session.arrays = []
        if self.session.cuda:
            torch.cuda.empty_cache()
        return {}


def main() -> None:
    attention = Attention(sys.argv[1])
    workers.serve({"prepare": attention.prepare, "measure": attention.measure, "forget": attention.forget})


if __name__ == "__main__":
    main()
