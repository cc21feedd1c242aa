"""Worker of `benchmarks.generation` (protocol: `benchmarks.workers`): transformers' `generate`. Imports no jax.

    PYTHON -m benchmarks.generation_torch          PYTHON, 3.11 or newer, has torch and transformers

Requests, by "do":

    versions
    prepare   n_layers, d_model, d_ff, n_heads, n_kv_heads, head_dim, vocab_size, room     a Llama of random weights, float32
    generate  cache ("dynamic", "static"), prompt, new_tokens                               wall and CPU seconds of one call
"""

from __future__ import annotations

import time
from typing import Any

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import workers


class Session:
    """The model of the last `prepare`."""

    def versions(self, phase) -> dict[str, Any]:
        return {"torch": torch.__version__, "transformers": transformers.__version__}

    def prepare(
        self, phase, *, n_layers: int, d_model: int, d_ff: int, n_heads: int, n_kv_heads: int, head_dim: int, vocab_size: int,
        room: int,
    ) -> dict[str, Any]:  # fmt: skip
        config = LlamaConfig(
            vocab_size=vocab_size, hidden_size=d_model, intermediate_size=d_ff, num_hidden_layers=n_layers,
            num_attention_heads=n_heads, num_key_value_heads=n_kv_heads, head_dim=head_dim, tie_word_embeddings=True,
            max_position_embeddings=room, bos_token_id=None, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        torch.manual_seed(0)
        self.model, self.room = LlamaForCausalLM(config).eval(), room
        return {"parameters": sum(one.numel() for one in self.model.parameters())}

    def generate(self, phase, *, cache: str, prompt: int, new_tokens: int) -> dict[str, Any]:
        tokens = torch.randint(0, self.model.config.vocab_size, (1, prompt))
        more: dict[str, Any] = {}
        if cache == "static":
            more = {"past_key_values": transformers.StaticCache(config=self.model.config, max_cache_len=self.room)}
        wall, cpu = time.perf_counter(), time.process_time()
        with torch.no_grad():
            found = self.model.generate(tokens, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, **more)
        assert found.shape[1] == prompt + new_tokens
        return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


if __name__ == "__main__":
    session = Session()
    workers.serve({"versions": session.versions, "prepare": session.prepare, "generate": session.generate})
