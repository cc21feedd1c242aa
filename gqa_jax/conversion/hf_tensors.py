"""Arrays of a model as Hugging Face's folders have them: names, layout, and files of safetensors.

Theirs are one array a layer, matrices [outputs, inputs], heads flattened into either; ours are stacked over layers, [inputs,
outputs], heads an axis of their own (`gqa_jax.model`). Queries and keys are in the half-split order of RoPE in both.
"""

from __future__ import annotations

import collections
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from gqa_jax.errors import ConfigError, first_line
from gqa_jax.formatting import counted
from gqa_jax.storage import write_json

SHARD_BYTES = 10**9  # of a file; of what is in memory while one is written
ALONE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}  # of arrays that are read, by their names in a header
_NUMPY = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
_BUFFERS = re.compile(r".*\.rotary_emb\.inv_freq")  # in old files, beside the parameters


class Weight(NamedTuple):
    """A parameter of ours, and what it is called there."""

    path: tuple[str, ...]  # in the nested dict of our parameters
    name: str  # with {} for the layer's number, where there is one of each
    inputs: int  # leading axes that are summed over, of a layer's part; 0: a vector or a table, the same in both

    def theirs(self, array: np.ndarray) -> np.ndarray:
        """A layer's part of ours as theirs, not yet contiguous."""
        if not self.inputs:
            return array
        return array.reshape(math.prod(array.shape[: self.inputs]), -1).T

    def their_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Of a layer's part of this shape."""
        if not self.inputs:
            return tuple(shape)
        return math.prod(shape[self.inputs :]), math.prod(shape[: self.inputs])

    def ours(self, array: np.ndarray, shape: Sequence[int]) -> np.ndarray:
        """Theirs as a layer's part of this shape of ours."""
        return array.T.reshape(shape) if self.inputs else array


_LAYER = "model.layers.{}."
HEAD = "lm_head.weight"
WEIGHTS = (
    Weight(("embedding",), "model.embed_tokens.weight", 0),
    Weight(("layers", "attention_norm"), _LAYER + "input_layernorm.weight", 0),
    Weight(("layers", "query"), _LAYER + "self_attn.q_proj.weight", 1),
    Weight(("layers", "key"), _LAYER + "self_attn.k_proj.weight", 1),
    Weight(("layers", "value"), _LAYER + "self_attn.v_proj.weight", 1),
    Weight(("layers", "output"), _LAYER + "self_attn.o_proj.weight", 2),
    Weight(("layers", "ffn_norm"), _LAYER + "post_attention_layernorm.weight", 0),
    Weight(("layers", "gate"), _LAYER + "mlp.gate_proj.weight", 1),
    Weight(("layers", "up"), _LAYER + "mlp.up_proj.weight", 1),
    Weight(("layers", "down"), _LAYER + "mlp.down_proj.weight", 1),
    Weight(("final_norm",), "model.norm.weight", 0),
    Weight(("head",), HEAD, 0),
)


def parts(weight: Weight, shape: Sequence[int]) -> list[tuple[str, tuple[int, ...]]]:
    """Name and shape there of each layer's part of a parameter of ours of this shape."""
    if "{}" not in weight.name:
        return [(weight.name, weight.their_shape(shape))]
    return [(weight.name.format(i), weight.their_shape(shape[1:])) for i in range(shape[0])]


def leaf(params: Mapping[str, Any], weight: Weight) -> Any:
    """What nested dicts have at the path of a weight; None: a tied model has no head."""
    found: Any = params
    for key in weight.path:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found


# Writing


def files(params: Mapping[str, Any], dtype: str) -> list[tuple[str, list[str], int]]:
    """The files of a model in the order in which they are written: name, names of their arrays, bytes of these.

    Args:
      params: nested dict of what has a shape. dtype: float32 or bfloat16, of the arrays.
    """
    found: list[tuple[list[str], int]] = []
    for weight in WEIGHTS:
        held = leaf(params, weight)
        for name, shape in [] if held is None else parts(weight, held.shape):
            size = math.prod(shape) * _NUMPY[dtype].itemsize
            if not found or found[-1][1] + size > SHARD_BYTES:
                found.append(([], 0))
            found[-1] = ([*found[-1][0], name], found[-1][1] + size)
    count = len(found)
    names = [ALONE] if count == 1 else [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    return [(name, held, size) for name, (held, size) in zip(names, found, strict=True)]


def write(folder: Path, params: Mapping[str, Any], dtype: str) -> None:
    """Writes the arrays of a model into a folder, in several files with an index where they are more than `SHARD_BYTES`.

    Each parameter is read once (`np.asarray`); it and one file are in memory.
    """
    planned = files(params, dtype)
    of_file = {name: file for file, names, _ in planned for name in names}
    left = {file: len(names) for file, names, _ in planned}
    held: dict[str, dict[str, np.ndarray]] = collections.defaultdict(dict)
    for weight in WEIGHTS:
        if (found := leaf(params, weight)) is None:
            continue
        for name, array in _layers(weight, np.asarray(found), _NUMPY[dtype]):
            file = of_file[name]
            held[file][name] = array
            if len(held[file]) == left[file]:
                safetensors.numpy.save_file(held.pop(file), folder / file, {"format": "pt"})
                os.chmod(folder / file, folder.stat().st_mode & 0o666)  # it is for its owner alone, where its folder isn't
    if len(planned) > 1:
        total = {"total_size": sum(size for *_, size in planned)}
        write_json(folder / INDEX, {"metadata": total, "weight_map": dict(sorted(of_file.items()))})


def _layers(weight: Weight, array: np.ndarray, dtype: np.dtype) -> Iterator[tuple[str, np.ndarray]]:
    """Name and array there of each layer's part. No one else holds `array`, which is as large as all that is read at once."""
    layers = array if "{}" in weight.name else array[None]
    for i, (name, _) in enumerate(parts(weight, array.shape)):
        part = weight.theirs(layers[i])
        yield name, np.array(part, dtype, order="C")


# Reading


class Arrays:
    """The arrays of a folder: where each is, its shape and dtype. They are read one at a time, and files are not kept open."""

    def __init__(self, folder: Path):
        """Raises ConfigError: no files, one that is not there, or is damaged or cut off, or lacks what the index says."""
        self.folder = folder
        self.about: dict[str, tuple[str, tuple[int, ...], str]] = {}  # file, shape and dtype of every array
        index = _index(folder)
        for file in [ALONE] if index is None else sorted(set(index.values())):
            with self._open(file) as opened:
                for name in opened.keys():  # noqa: SIM118 (it is no mapping)
                    if index is None or index.get(name) == file:
                        part = opened.get_slice(name)
                        self.about[name] = file, tuple(part.get_shape()), part.get_dtype()
        if index is not None and (missing := [name for name in index if name not in self.about]):
            raise ConfigError(
                f"{folder / INDEX} has {missing[0]} in {index[missing[0]]}, and it is not there: get both files again"
            )
        for name in [name for name in self.about if _BUFFERS.fullmatch(name)]:
            del self.about[name]

    def _open(self, file: str) -> Any:
        path = self.folder / file
        if not path.is_file():
            raise ConfigError(f"{path} is not there, and {INDEX} names it: get the whole folder")
        try:
            return safetensors.safe_open(path, framework="np", backend="pread")
        except Exception as error:  # the binding's own class, an OSError for a file of no bytes, a MemoryError for odd ones
            raise ConfigError(f"{path} is damaged or cut off ({first_line(error)}): get it again") from error

    @property
    def dtype(self) -> str:
        """The commonest, by values: float32, bfloat16 or float16."""
        sizes: collections.Counter[str] = collections.Counter()
        for _, shape, kind in self.about.values():
            sizes[DTYPES[kind]] += math.prod(shape)
        return sizes.most_common(1)[0][0]

    def check(self, params: Mapping[str, Any], config: str) -> None:
        """Raises ConfigError unless they are those of a model, naming the first that is missing, too many, or otherwise.

        Args:
          params: nested dict of what has a shape: the parameters of the model. config: what says that they are so.
        """
        wanted = {}
        for weight in WEIGHTS:
            if (held := leaf(params, weight)) is not None:
                wanted |= dict(parts(weight, held.shape))
        if missing := [name for name in wanted if name not in self.about]:
            raise ConfigError(
                f"{self.folder} has no {missing[0]} {[*wanted[missing[0]]]} ({_count(missing)}), which {config} asks for"
            )
        tied = {HEAD} - {*wanted}  # some files of tied models have the table twice: `check_tied`
        if extra := [name for name in self.about if name not in wanted and name not in tied]:
            raise ConfigError(
                f"{self.folder} has {extra[0]} {[*self.about[extra[0]][1]]} ({_count(extra)}), which no model of the Llama "
                f"class with this {config} has: it is of another kind"
            )
        for name, (_, shape, kind) in self.about.items():
            if kind not in DTYPES:
                raise ConfigError(
                    f"{self.folder}: {name} is {kind}: arrays of {', '.join(DTYPES)} are taken, and none quantized"
                )
            if name in wanted and shape != wanted[name]:
                raise ConfigError(f"{self.folder}: {name} is {[*shape]}, and {config} says {[*wanted[name]]}")

    def check_tied(self) -> None:
        """Raises ConfigError where a tied model has another head than its embedding."""
        if HEAD not in self.about:
            return
        table = WEIGHTS[0].name
        if self.about[HEAD][1:] != self.about[table][1:] or not np.array_equal(self._read(HEAD), self._read(table)):
            raise ConfigError(f"{self.folder}: {HEAD} differs from {table}, and tie_word_embeddings is true: write false")

    def _read(self, name: str) -> np.ndarray:
        file = self.about[name][0]
        with self._open(file) as opened:
            return opened.get_tensor(name)

    def read(self, weight: Weight, shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
        """A parameter of ours of this shape, stacked over layers. Raises ConfigError: a file has become unreadable."""
        names = [name for name, _ in parts(weight, shape)]
        if "{}" not in weight.name:
            return np.ascontiguousarray(weight.ours(self._read(names[0]), shape), dtype)
        found = np.empty(shape, dtype)
        for file, numbers in self._by_file(names):
            with self._open(file) as opened:
                for i in numbers:
                    found[i] = weight.ours(opened.get_tensor(names[i]), shape[1:])
        return found

    def _by_file(self, names: Sequence[str]) -> Iterator[tuple[str, list[int]]]:
        groups: dict[str, list[int]] = collections.defaultdict(list)
        for i, name in enumerate(names):
            groups[self.about[name][0]].append(i)
        yield from groups.items()


def _index(folder: Path) -> dict[str, str] | None:
    """The file of every array by an index; None: all are in one file. Raises ConfigError: neither is there, or it is odd."""
    path = folder / INDEX
    if not path.is_file():
        if (folder / ALONE).is_file():
            return None
        other = sorted(name for name in os.listdir(folder) if name.endswith((".safetensors", ".bin", ".pth", ".gguf")))
        there = f" (there is {', '.join(other[:3])})" if other else ""
        raise ConfigError(f"{folder} has neither {ALONE} nor {INDEX}{there}: weights are read from safetensors alone")
    try:
        found = json.loads(path.read_text("utf-8"))["weight_map"]
        odd = not found or any(not isinstance(file, str) or os.path.basename(file) != file for file in found.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{path} has no weight_map that can be read: {first_line(error)}") from error
    if odd:
        raise ConfigError(f"{path}: its weight_map must have, for every array, the name of a file beside it")
    return found


def _count(names: Sequence[str]) -> str:
    return counted(len(names), "such array")
