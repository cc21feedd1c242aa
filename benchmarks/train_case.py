"""What both workers of `benchmarks.train` must have alike: tokens, initial weights, the recipe. Imports no jax and no torch.

Runs under Python 3.11 too, the oldest that has the PyTorch which we are measured against.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

RECIPE = "recipe"  # of the file of weights: the entry that is no weight


def tokens(recipe: Mapping[str, Any], step: int) -> np.ndarray:
    """Token ids of an optimizer step, (A, B, T + 1) int32, of which `[..., :-1]` is read and `[..., 1:]` predicted.

    A function of seed and step alone. Each is the product of three uniform draws, as a part of the vocabulary: low ids are
    frequent, so there is something to learn at once (entropy log V - 1.15 nats), and a wrong update shows in ten losses.
    """
    size, vocab_size = (recipe["accumulation_steps"], recipe["micro_batch"], recipe["context_length"] + 1), recipe["vocab_size"]
    rng = np.random.default_rng([recipe["seed"], step])
    a, b, c = (rng.integers(vocab_size, size=size) for _ in range(3))  # below 2^21, so that the product is below 2^63
    return (a * b * c // vocab_size**2).astype(np.int32)


def tokens_sha256(recipe: Mapping[str, Any], steps: int) -> str:
    """Of the tokens of the first `steps` steps: equal where two Pythons draw the same."""
    digest = hashlib.sha256()
    for step in range(steps):
        digest.update(tokens(recipe, step).tobytes())
    return digest.hexdigest()


def llama_weights(params: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """`gqa_jax.model.init_params`' arrays under the names and in the shapes of a Llama checkpoint, one at a time.

    A linear layer of PyTorch holds (out, in) where ours hold (in, out), heads and head size in one axis, head first. RoPE
    rotates dims i and i + H/2 in both, so no rows change places. The embedding is tied: there is no `lm_head`.

    Args:
      params: embedding (V, D), final_norm (D), and `layers`, each with a leading axis L: attention_norm and ffn_norm (D), query
        (D, N, H), key and value (D, K, H), output (N, H, D), gate and up (D, F), down (F, D).
    """
    yield "model.embed_tokens.weight", params["embedding"]
    yield "model.norm.weight", params["final_norm"]
    layers = params["layers"]
    d = params["final_norm"].shape[0]
    for i in range(len(layers["gate"])):
        layer = {name: values[i] for name, values in layers.items()}
        prefix = f"model.layers.{i}."
        yield prefix + "input_layernorm.weight", layer["attention_norm"]
        yield prefix + "post_attention_layernorm.weight", layer["ffn_norm"]
        for theirs, ours in (("q", "query"), ("k", "key"), ("v", "value")):
            yield f"{prefix}self_attn.{theirs}_proj.weight", layer[ours].reshape(d, -1).T
        yield prefix + "self_attn.o_proj.weight", layer["output"].reshape(-1, d).T
        for name in ("gate", "up", "down"):
            yield f"{prefix}mlp.{name}_proj.weight", layer[name].T


def save(path: Path, params: Mapping[str, Any], recipe: Mapping[str, Any]) -> None:
    """Writes initial weights (`llama_weights`) and the recipe as one .npz. Raises ValueError for another suffix."""
    if path.suffix != ".npz":
        raise ValueError(f"weights = {str(path)!r}: must end with .npz")
    np.savez(path, **{RECIPE: np.array(json.dumps(recipe))}, **dict(llama_weights(params)))


def load_recipe(path: Path) -> dict[str, Any]:
    """The recipe of a file that `save` wrote."""
    with np.load(path) as file:
        return json.loads(str(file[RECIPE]))


def load_weights(path: Path) -> dict[str, np.ndarray]:
    """The weights, by name, of a file that `save` wrote."""
    with np.load(path) as file:
        return {name: file[name] for name in file.files if name != RECIPE}
