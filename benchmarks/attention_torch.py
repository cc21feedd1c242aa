"""The other end of `benchmarks.attention_contenders.Torch`: measures PyTorch's attention when it is told to. Imports no jax.

Reads requests and writes answers, a line of JSON each. Arrays come and go in files.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

BACKENDS = {
    "cpu": {"sdpa": None},  # whatever torch chooses
    "gpu": {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION},
}


class Session:
    def __init__(self, platform: str):
        self.cuda = platform == "gpu"
        self.device = "cuda" if self.cuda else "cpu"
        self.backends = BACKENDS[platform]
        self.ready = {}

    def hello(self) -> dict:
        if self.cuda and not torch.cuda.is_available():
            return {"error": f"torch {torch.__version__} sees no GPU"}
        return {"version": torch.__version__, "backends": list(self.backends)}

    def load(self, files: list[str], dtype: str, folder: str) -> dict:
        self.ready = {}  # and with it the graphs over the last arrays
        self.arrays = [torch.from_numpy(np.load(name)).view(getattr(torch, dtype)).to(self.device) for name in files]
        if self.cuda:
            torch.cuda.empty_cache()
        return {}

    def prepare(self, name: str, backend: str, direction: str, iterations: int, folder: str) -> dict:
        q, k, v, *d_out = self.arrays
        q, k, v = (x.detach().requires_grad_(direction == "backward") for x in (q, k, v))
        chosen = self.backends[backend]

        def attend():
            with contextlib.nullcontext() if chosen is None else sdpa_kernel(chosen):
                if direction == "decode":
                    out = scaled_dot_product_attention(q[:, :, None], k.transpose(1, 2), v.transpose(1, 2), enable_gqa=True)
                    return out[:, :, 0]
                heads = (x.transpose(1, 2) for x in (q, k, v))
                return scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True).transpose(1, 2)

        def step():
            if direction != "backward":
                with torch.no_grad():
                    return (attend(),)
            out = attend()
            return out, *torch.autograd.grad(out, (q, k, v), d_out[0])

        def loop():
            for _ in range(iterations):
                outputs = step()
                # as in the loops of the others: one element of q depends on the pass before
                q.data.view(-1)[0].add_(outputs[0].detach()[(0,) * outputs[0].ndim], alpha=1e-6)

        temp_bytes = None
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        outputs = step()
        if self.cuda:
            torch.cuda.synchronize()
            results = sum(x.numel() * x.element_size() for x in outputs)
            temp_bytes = max(0, torch.cuda.max_memory_allocated() - before - results)
        files = []
        for i, x in enumerate(outputs):
            files.append(str(Path(folder) / f"out-{i}.npy"))
            raw = x.detach().cpu().contiguous().view({2: torch.int16, 4: torch.int32}[x.element_size()])
            np.save(files[-1], raw.numpy())
        del outputs
        remark = ""
        if self.cuda:
            loop, remark = captured(loop)
        loop()
        self.ready[name] = (loop, iterations)
        return {"files": files, "temp_bytes": temp_bytes, "remark": remark}

    def run(self, name: str, folder: str) -> dict:
        loop, iterations = self.ready[name]
        self.wait()
        begin = time.perf_counter()
        loop()
        self.wait()
        return {"seconds": (time.perf_counter() - begin) / iterations}

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()


def captured(loop):
    """The loop as one CUDA graph, so that launches from Python are not in its time; else itself, and the remark says why."""
    try:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            loop()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loop()
    except RuntimeError as error:
        torch.cuda.synchronize()
        return loop, f"launched from Python, no CUDA graph: {str(error).splitlines()[0]}"
    return graph.replay, ""


def main() -> None:
    session = Session(sys.argv[1])
    answer = session.hello()
    print(json.dumps(answer), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        act = {"load": session.load, "prepare": session.prepare, "run": session.run}[request.pop("do")]
        try:
            answer = act(**request)
        except Exception as error:  # of any kind: the other end reports it and goes on
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
