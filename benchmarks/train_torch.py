"""Worker of `benchmarks.train` (protocol: `benchmarks.workers`): the same steps by PyTorch's Llama. Imports no jax.

    PYTHON -m benchmarks.train_torch [--device cpu|cuda]          PYTHON, 3.11 or newer, has torch and transformers

Requests, by "do", as those of `benchmarks.train_ours`:

    device                                         platform, kind, versions
    prepare  case, weights, compile, autocast, sdpa    builds the model from a file of weights and runs a step
    measure  case, steps, blocked;  losses  case, steps;  forget  case

Parameters, gradients and moments are float32. With autocast bfloat16 matrix products and attention compute in bfloat16 and the
residual stream stays in float32, as PyTorch does it. Nothing is computed again in the backward pass.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from benchmarks import train_case, workers

SDPA = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
#: Fields of a request that the file of weights has as well: a request may repeat them, and must agree.
REPEATED = ("context_length", "micro_batch", "accumulation_steps", "seed")
#: Fields of a request to the other worker that say nothing here: shapes and rates are those of the file of weights.
OURS_ALONE = ("model", "attention", "remat", "dtype", "param_dtype", "learning_rate", "schedule_steps")

#: Causal attention without a mask. Under the name "sdpa" transformers builds a mask of T x T elements when torch.compile
#: traces: flash attention then refuses, keys and values are repeated, and the compiled model is slower than it could be.
CAUSAL = "causal_sdpa"

Phase = Callable[[str], None]


def _causal(module, query, key, value, attention_mask, **options):
    if attention_mask is not None:
        raise RuntimeError(f"transformers {transformers.__version__} gives a mask to attention that needs none")
    return sdpa_attention_forward(module, query, key, value, None, **options)


AttentionInterface.register(CAUSAL, _causal)


@dataclasses.dataclass
class Case:
    """A model, its optimizer, and the step that it is at."""

    recipe: dict[str, Any]
    weights: Path
    model: LlamaForCausalLM
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # mean over tokens; compiled where that was asked for
    within: Callable[[], contextlib.AbstractContextManager]  # precision and attention of the forward pass
    optimizer: torch.optim.Optimizer | None = None
    done: int = 0

    def restart(self) -> None:
        """The initial weights again, and fresh moments."""
        self.optimizer = None
        self.model.zero_grad(set_to_none=True)
        load(self.model, train_case.load_weights(self.weights))
        self.optimizer, self.done = adamw(self.model, self.recipe), 0

    def train(self, tokens: np.ndarray) -> torch.Tensor:
        """Starts one step on tokens (A, B, T + 1); its loss, before the update, not waited for."""
        recipe, device = self.recipe, self.model.device
        batch = torch.from_numpy(tokens).to(device).long()
        rates = recipe["learning_rates"]
        for group in self.optimizer.param_groups:
            group["lr"] = rates[min(self.done, len(rates) - 1)]
        total = torch.zeros((), device=device)
        for micro in batch:
            with self.within():
                loss = self.loss(micro[:, :-1], micro[:, 1:]) / len(batch)
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), recipe["clip_norm"])
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.done += 1
        return total

    def tokens(self, steps: int) -> list[np.ndarray]:
        """What the next steps train on."""
        return [train_case.tokens(self.recipe, self.done + i) for i in range(steps)]


def llama_config(recipe: dict[str, Any]) -> LlamaConfig:
    rope = {"rope_type": "default", "rope_theta": recipe["rope_theta"]}
    old = int(transformers.__version__.partition(".")[0]) < 5
    return LlamaConfig(
        vocab_size=recipe["vocab_size"],
        hidden_size=recipe["d_model"],
        intermediate_size=recipe["d_ff"],
        num_hidden_layers=recipe["n_layers"],
        num_attention_heads=recipe["n_heads"],
        num_key_value_heads=recipe["n_kv_heads"],
        head_dim=recipe["head_dim"],
        rms_norm_eps=recipe["norm_eps"],
        max_position_embeddings=recipe["context_length"],
        tie_word_embeddings=True,
        attn_implementation=CAUSAL,
        **({"rope_theta": recipe["rope_theta"]} if old else {"rope_parameters": rope}),
    )


def build(recipe: dict[str, Any], device: str) -> LlamaForCausalLM:
    """The model of the recipe on the device, its weights random. Raises RuntimeError where it turns out another one."""
    with torch.device(device):
        model = LlamaForCausalLM(llama_config(recipe))
    if model.lm_head.weight is not model.model.embed_tokens.weight:
        raise RuntimeError(f"transformers {transformers.__version__} does not tie the embedding")
    h = recipe["head_dim"]
    expected = recipe["rope_theta"] ** (-torch.arange(0, h, 2, dtype=torch.float64) / h)
    frequency = model.model.rotary_emb.inv_freq.double().cpu()
    if not torch.allclose(frequency, expected, rtol=1e-5):
        raise RuntimeError(f"transformers {transformers.__version__} rotates by {frequency[:3]}, not {expected[:3]}")
    return model.train()


def load(model: LlamaForCausalLM, weights: dict[str, Any]) -> None:
    """Copies arrays into the model's parameters. Raises RuntimeError for a name or shape that only one of them has."""
    missing, unexpected = model.load_state_dict({name: torch.from_numpy(x) for name, x in weights.items()}, strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:  # which is the embedding
        raise RuntimeError(f"weights without a place: {unexpected[:5]}; places without weights: {missing[:5]}")


def adamw(model: LlamaForCausalLM, recipe: dict[str, Any]) -> torch.optim.AdamW:
    """AdamW with decay on matrices only; one kernel for the step where there is a GPU. The learning rate is set per step."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    scales = [p for p in model.parameters() if p.ndim <= 1]
    return torch.optim.AdamW(
        [{"params": matrices, "weight_decay": recipe["weight_decay"]}, {"params": scales, "weight_decay": 0.0}],
        lr=0.0,
        betas=(recipe["b1"], recipe["b2"]),
        eps=recipe["eps"],
        fused=True if model.device.type == "cuda" else None,
    )


class Session:
    """The cases of one process, all on one device."""

    def __init__(self, device: str):
        self.device_type = device
        self.cases: dict[str, Case] = {}

    def handlers(self) -> dict[str, Callable[..., dict[str, Any]]]:
        return {name: getattr(self, name) for name in ("device", "prepare", "measure", "losses", "forget")}

    def about(self) -> dict[str, Any]:
        cuda = self.device_type == "cuda"
        return {
            "platform": "gpu" if cuda else "cpu",
            "device": torch.cuda.get_device_name() if cuda else "cpu",
            "versions": {
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "python": platform.python_version(),
                **({"cuda": torch.version.cuda} if cuda else {}),
            },
        }

    def device(self, phase: Phase) -> dict[str, Any]:
        return self.about()

    def prepare(
        self,
        phase: Phase,
        *,
        case: str,
        weights: str,
        compile: bool = False,
        autocast: str | None = None,
        sdpa: str | None = None,
        **fields: Any,
    ) -> dict[str, Any]:
        """`weights`: a file that `benchmarks.train_ours` wrote; its recipe says what is trained. `sdpa` None: as torch chooses.

        `seconds_compile` is the whole first step; `bytes_peak` the allocator's on a GPU, else None.
        """
        phase("compile")
        self.forget(phase, case=case)
        if sdpa not in (*SDPA, None):
            raise ValueError(f"sdpa = {sdpa!r}: must be {', '.join(SDPA)} or null")
        if autocast not in ("bfloat16", None):
            raise ValueError(f"autocast = {autocast!r}: must be bfloat16 or null")
        recipe = train_case.load_recipe(Path(weights))
        check(fields, recipe)
        cuda = self.device_type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        model = build(recipe, self.device_type)

        def loss(tokens, targets):
            logits = model(input_ids=tokens, use_cache=False).logits
            return cross_entropy(logits.float().flatten(0, 1), targets.flatten())

        @contextlib.contextmanager
        def within():
            with contextlib.ExitStack() as stack:
                if autocast:
                    stack.enter_context(torch.autocast(self.device_type, torch.bfloat16))
                if sdpa:
                    stack.enter_context(sdpa_kernel(SDPA[sdpa]))
                yield

        made = Case(recipe, Path(weights), model, torch.compile(loss) if compile else loss, within)
        made.restart()
        began = time.perf_counter()
        made.train(made.tokens(1)[0])
        self.wait()
        seconds = time.perf_counter() - began
        self.cases[case] = made
        return self.about() | {
            "seconds_compile": seconds,
            "bytes_peak": torch.cuda.max_memory_allocated() if cuda else None,
            "parameters": sum(p.numel() for p in model.parameters()),
            "compile": compile,
            "autocast": autocast,
            "sdpa": sdpa,
        }

    def measure(self, phase: Phase, *, case: str, steps: int, blocked: bool = True) -> dict[str, Any]:
        found = self._find(case)
        seconds, losses, drawn = [], [], found.tokens(steps)
        self.wait()
        began = time.perf_counter()
        for tokens in drawn:
            phase("run")
            losses.append(found.train(tokens))
            if blocked:
                self.wait()
                now = time.perf_counter()
                seconds.append(now - began)
                began = now
        self.wait()
        if not blocked:
            seconds = [(time.perf_counter() - began) / steps]
        return {"seconds": seconds, "losses": [x.item() for x in losses]}

    def losses(self, phase: Phase, *, case: str, steps: int = 10) -> dict[str, Any]:
        found = self._find(case)
        phase("check")
        found.restart()
        losses = []
        for tokens in found.tokens(steps):
            phase("run")
            losses.append(found.train(tokens).item())
        return {"losses": losses, "tokens_sha256": train_case.tokens_sha256(found.recipe, steps)}

    def forget(self, phase: Phase, *, case: str) -> dict[str, Any]:
        if self.cases.pop(case, None) is not None:
            torch.compiler.reset()  # which knows the model too
            gc.collect()
        if self.device_type == "cuda":
            torch.cuda.empty_cache()
        return {}

    def wait(self) -> None:
        if self.device_type == "cuda":
            torch.cuda.synchronize()

    def _find(self, case: str) -> Case:
        if case not in self.cases:
            raise ValueError(f"case {case!r} is not prepared: there are {', '.join(self.cases) or 'none'}")
        return self.cases[case]


def check(fields: dict[str, Any], recipe: dict[str, Any]) -> None:
    """Raises ValueError for a field that is unknown or says something else than the recipe."""
    for name, value in fields.items():
        if name not in (*REPEATED, *OURS_ALONE):
            raise ValueError(f"prepare has no field {name!r}")
        if name in REPEATED and value != recipe[name]:
            raise ValueError(f"{name} = {value}: the file of weights is of {recipe[name]}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.train_torch", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    workers.serve(Session(options.device).handlers())


if __name__ == "__main__":
    main()
