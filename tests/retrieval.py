"""A model of exact weights that finds a needle, and texts that hold one: to try on it what generates, evaluates or exports.

Two layers, two query heads on one key/value head of 64, no feed-forward network, over a vocabulary of words. In layer 1 one
head looks 3 words back (from a needle's value to its key), the other 6 (from the last word of the question to the key asked
for): against a constant key a query of cos and sin of the offset's angles is largest there. Layer 2 matches the two codes of
keys, on the pairs of dims that RoPE hardly rotates within the context, and copies the code of the value.

The texts are those of RULER's niah_single_1 (arXiv 2404.06654): noise, one needle, a question at the end.
"""

from __future__ import annotations

import random
import re
from typing import NamedTuple

import numpy as np

from gqa_jax.config import ModelConfig

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
INTRODUCTION = (
    "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about the number "
    "afterwards.\n"
)
QUESTION = (
    "\nWhat is the special magic number for {key} mentioned in the provided text? The special magic number for {key} mentioned "
    "in the provided text is"
)
NEEDLE = "One of the special magic numbers for {key} is: {value}."
HEAD = 64
VALUE_CODE = 64
#: What each part of the model is, by the query head that does it: a layer and a head.
PARTS = {"needle": (0, 0), "question": (0, 1), "match": (1, 0)}


class Haystack(NamedTuple):
    """Texts as ids, and the id that must follow each."""

    prompts: list[list[int]]
    values: list[int]
    config: ModelConfig
    params: dict


def words(text: str) -> list[str]:
    return re.findall(r"[.:?!]|[^\s.:?!]+", text)


def haystack(context: int, count: int, *, theta: float = 500_000.0, seed: int = 42) -> Haystack:
    """`count` texts of `context` words at most, their vocabulary, and the model that answers them.

    theta: base of RoPE: with 500,000 there are pairs that hardly rotate within 1K, with 1e7 within 4K.
    """
    rng = random.Random(seed)
    adjectives = [a + b for a in ("fast", "dull", "wide", "mild", "odd") for b in ("ish", "ly", "er", "est")]
    nouns = [a + b for a in ("cat", "road", "lamp", "tree", "sea") for b in ("s", "man", "let", "side")]
    texts = []
    for _ in range(count):
        key, value = f"{rng.choice(adjectives)}-{rng.choice(nouns)}", str(rng.randint(10**6, 10**7 - 1))
        needle, question = NEEDLE.format(key=key, value=value), QUESTION.format(key=key)
        n = (context - 8 - len(words(INTRODUCTION + question + needle))) // len(words(NOISE))
        lines = [NOISE] * n
        lines.insert(rng.randint(0, n), needle)
        texts.append((words(INTRODUCTION + "\n".join(lines) + question), key, value))
    keys, values = (sorted({text[i] for text in texts}) for i in (1, 2))
    others = sorted({word for text, _, _ in texts for word in text} - {*keys, *values})
    ids = {word: i for i, word in enumerate(["<eos>", *others, *keys, *values])}
    config, params = _model(ids, keys, values, context, theta)
    return Haystack([[ids[word] for word in text] for text, _, _ in texts], [ids[text[2]] for text in texts], config, params)


def without(params: dict, part: str) -> dict:
    """The model without one of its three heads (`PARTS`): it finds nothing."""
    output = params["layers"]["output"].copy()
    output[PARTS[part]] = 0
    return params | {"layers": params["layers"] | {"output": output}}


def _model(ids: dict[str, int], keys: list[str], values: list[str], context: int, theta: float) -> tuple[ModelConfig, dict]:
    frequency = theta ** (-np.arange(HEAD // 2) / (HEAD // 2))
    slow = [i for i in range(HEAD // 2) if frequency[i] * context < 0.35]
    code = 2 * len(slow)
    parts = {"constant": 1, "key": code, "of_needle": code, "of_question": code, "value": VALUE_CODE, "filling": 1}
    ends = np.cumsum(list(parts.values()))
    at = {name: slice(end - size, end) for (name, size), end in zip(parts.items(), ends, strict=True)}
    d, vocab, f, rng = int(ends[-1]), len(ids), 32, np.random.default_rng(0)

    embedding = np.zeros((vocab, d), np.float32)
    embedding[:, at["constant"]] = 1
    for names, part, size in ((keys, "key", code), (values, "value", VALUE_CODE)):
        signs = rng.choice([-1.0, 1.0], (len(names), size))
        for name, row in zip(names, signs, strict=True):
            embedding[ids[name], at[part]] = 2 * row / size**0.5
    norm = 5.5
    embedding[:, at["filling"]] = np.sqrt(norm - (embedding**2).sum(1, keepdims=True))  # all words of one norm
    rms = np.sqrt(norm / d)

    shapes = (d, 2, HEAD), (d, 1, HEAD), (d, 1, HEAD), (2, HEAD, d)
    query, key, value, output = (np.zeros((2, *shape), np.float32) for shape in shapes)
    amplitude = np.sqrt(60 * HEAD**0.5) * rms  # logits of 60 x the sum of cos((t - s - offset) frequency)
    key[0, 0, 0, : HEAD // 2] = amplitude
    for head, offset in ((0, 3), (1, 6)):
        query[0, 0, head] = amplitude * np.concatenate([np.cos(offset * frequency), -np.sin(offset * frequency)])
    value[0][at["key"], 0, :code] = np.eye(code) * rms
    output[0, 0][:code, at["of_needle"]] = np.eye(code)
    output[0, 1][:code, at["of_question"]] = np.eye(code)
    for j, dim in enumerate([*slow, *(i + HEAD // 2 for i in slow)]):
        # scores of a match near 20: with thousands, what little these pairs rotate would choose the nearest equal word
        query[1, at["of_question"].start + j, 0, dim] = 0.45
        key[1, at["of_needle"].start + j, 0, dim] = 8.0
    value[1][at["value"], 0, :] = np.eye(VALUE_CODE) * rms
    output[1, 0][:, at["value"]] = 30 * np.eye(VALUE_CODE)

    ones, zeros = np.ones((2, d), np.float32), np.zeros((2, d, f), np.float32)
    layers = {
        "attention_norm": ones, "ffn_norm": ones, "query": query, "key": key, "value": value, "output": output,
        "gate": zeros, "up": zeros, "down": np.zeros((2, f, d), np.float32),
    }  # fmt: skip
    sizes = {"n_layers": 2, "d_model": d, "n_heads": 2, "n_kv_heads": 1, "head_dim": HEAD, "d_ff": f, "vocab_size": vocab}
    config = ModelConfig(**sizes, rope_theta=theta, dtype="float32")
    return config, {"embedding": embedding, "final_norm": np.ones(d, np.float32), "layers": layers}
