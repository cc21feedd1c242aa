"""A trained model as a folder that Hugging Face's readers open, and their folders as models of ours: `export` and `read_in`.

Neither needs torch or transformers, and no more memory than the largest parameter and one file of arrays.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from gqa_jax import costs, storage
from gqa_jax.config import DTYPES, ModelConfig
from gqa_jax.conversion import hf_config, hf_tensors, hf_tokenizer, model_card
from gqa_jax.data.vocabulary import RECORD, Tokenizer
from gqa_jax.errors import ConfigError
from gqa_jax.formatting import counted, gb, short
from gqa_jax.inference import loaded
from gqa_jax.training import parameters, start
from gqa_jax.training.parameters import Leaf, new_folder
from gqa_jax.training.start import IMPORT, Start

CARD, GENERATION = "README.md", "generation_config.json"


@dataclasses.dataclass(frozen=True)
class Exported:
    """A folder that was written."""

    folder: Path
    model_class: str  # of transformers
    files: dict[str, int]  # bytes by name
    no_tokenizer: str | None  # why there is none

    def sentences(self) -> list[str]:
        """What was written, and how it is opened."""
        kinds = [name for name in self.files if name.endswith(".safetensors")]
        rest = [name for name in self.files if name not in kinds]
        arrays = f"{counted(len(kinds), 'file')} of arrays, {gb(sum(self.files[name] for name in kinds))}"
        lines = [f"{self.folder}: {self.model_class}, {arrays}, and {', '.join(rest)}"]
        if self.no_tokenizer is not None:
            lines.append(f"without a tokenizer: {self.no_tokenizer}")
        return [*lines, f'from transformers import AutoModelForCausalLM; AutoModelForCausalLM.from_pretrained("{self.folder}")']


@dataclasses.dataclass(frozen=True)
class Imported:
    """A model that came in."""

    start: Start
    notes: list[str]

    def sentences(self) -> list[str]:
        """What it is, and what can be done with it."""
        model, folder = self.start.model, self.start.folder
        count = costs.count_params(model, "exact")
        first = (
            f"{folder}: {model.n_layers} layers of width {model.d_model}, ({model.n_heads},{model.n_kv_heads}) heads of "
            f"{model.head_dim}, {short(count.total)} parameters, {short(count.non_embedding)} without embeddings; content "
            f"{self.start.identity[:12]}"
        )
        return [first, *self.notes, f"python -m launch generate {folder} --prompt 'Once upon a time'"]


def export(run: os.PathLike | str, out: os.PathLike | str, dtype: str | None = None) -> Exported:
    """Writes the model of a run that is done, or of imported parameters, as transformers, vLLM, mlx-lm, llama.cpp read it.

    The folder is made beside its place and renamed when it is whole.

    Args:
      run: a folder, local or on gs://. out: a new local folder.
      dtype: float32 or bfloat16, of the arrays; None: that of the run's parameters.
    Raises:
      ConfigError: no such run, a folder that holds something, another dtype, too little room on the disk, a damaged checkpoint.
    """
    source = start.of_folder(run)
    dtype = source.model.param_dtype if dtype is None else dtype
    if dtype not in DTYPES:
        raise ConfigError(f"dtype = {dtype!r}: use {', '.join(DTYPES)}")
    if storage.is_remote(out):
        raise ConfigError(f"{out}: export into a local folder, then copy it (gcloud storage cp -r)")
    tokenizer, why = None, None
    try:
        tokenizer = loaded.tokenizer_of(source)
    except (OSError, ValueError) as error:
        why = str(error)
    loaded.check_tokenizer(tokenizer, source.model)
    params = parameters.saved(source)
    fields = _fields(source, dtype, tokenizer)
    small = _tokenizer_files(source, tokenizer)
    small[hf_config.CONFIG] = hf_tokenizer.encoded(fields)
    small.setdefault(
        GENERATION, hf_tokenizer.encoded({"bos_token_id": fields["bos_token_id"], "eos_token_id": fields["eos_token_id"]})
    )
    small[CARD] = model_card.text(source, fields, tokenizer).encode()
    arrays = hf_tensors.files(params, dtype)
    _check_room(Path(storage.path(out)), sum(size for *_, size in arrays) + sum(map(len, small.values())), "--out")
    with new_folder(out, "export into a new folder") as folder:
        for name, content in small.items():
            storage.write_bytes(folder / name, content)
        hf_tensors.write(Path(folder), params, dtype)
    found = Path(os.path.abspath(storage.path(out)))
    return Exported(
        found, fields["architectures"][0], {file.name: file.stat().st_size for file in sorted(found.iterdir())}, why
    )


def _fields(source: Start, dtype: str, tokenizer: Tokenizer | None) -> dict[str, Any]:
    eos: Any = [*source.stop] or (None if tokenizer is None else tokenizer.eos_id)
    eos = eos[0] if isinstance(eos, list) and len(eos) == 1 else eos
    bos = tokenizer.prefix[0] if tokenizer is not None and len(tokenizer.prefix) == 1 else None
    return hf_config.of_model(source.model, dtype, source.context, eos) | {"bos_token_id": bos}


def _tokenizer_files(source: Start, tokenizer: Tokenizer | None) -> dict[str, bytes]:
    """Of an import what came with it, else what says what ours does."""
    if tokenizer is None:
        return {}
    made = hf_tokenizer.written(tokenizer, source.context)
    if source.kind != IMPORT:
        return made
    there = {name: storage.read_bytes(storage.path(source.folder) / RECORD / name) for name in hf_tokenizer.KEPT}
    came = {name: content for name, content in there.items() if content is not None}
    return made | ({} if tokenizer.json is None else {hf_tokenizer.CONTENT: tokenizer.json}) | came


def read_in(folder: os.PathLike | str, out: os.PathLike | str) -> Imported:
    """Imports the model of a Hugging Face folder: parameters in float32, its tokenizer, the context that it is for.

    Args:
      folder: local, with config.json and safetensors. out: a new folder, local or on gs://, for `load_model`, `continue_from`
        and everything else that takes a run.
    Raises:
      ConfigError: what isn't of the Llama class, by its field; arrays that are missing, too many, misshaped or damaged, by
        their names; a tokenizer with more entries than the vocabulary; too little room; a folder that holds something.
    """
    folder = Path(os.path.expanduser(os.fspath(folder)))
    if not folder.is_dir():
        raise ConfigError(f"{folder}: there is no such folder: download the model first (hf download NAME --local-dir DIR)")
    config = hf_config.read(folder)
    source = str(folder / hf_config.CONFIG)
    hf_config.model_of(config, source, "float32")  # before any file is opened
    arrays = hf_tensors.Arrays(folder)
    arrays.check(parameters.abstract(hf_config.model_of(config, source, "float32")), hf_config.CONFIG)
    model = hf_config.model_of(config, source, arrays.dtype)
    eos = hf_config.eos_of(config)
    tokenizer = hf_tokenizer.read(folder, eos[0] if eos else None)
    loaded.check_tokenizer(tokenizer, model)
    params = _leaves(arrays, model)
    if not model.untied:
        arrays.check_tied()
    if not storage.is_remote(out):
        _check_room(Path(storage.path(out)), sum(leaf.nbytes for leaf in _each(params)), "--out")
    named = next(iter(config.get("architectures") or []), config["model_type"])
    missing = f"without a tokenizer: {folder} has no {hf_tokenizer.CONTENT}; give ids, or --tokenizer"
    found = parameters.write_import(
        out, model, params, provenance=f"{folder.resolve().name}, a {named} of Hugging Face", tokenizer=tokenizer,
        context=hf_config.context_of(config), stop=eos if len(eos) > 1 or tokenizer is None else (),
        files=hf_tokenizer.kept(folder),
    )  # fmt: skip
    return Imported(found, [missing] if tokenizer is None else [])


def _leaves(arrays: hf_tensors.Arrays, model: ModelConfig) -> dict:
    """The parameters of a folder, nested as ours, each read when it is asked for."""
    like = parameters.abstract(model)
    found: dict[str, Any] = {}
    for weight in hf_tensors.WEIGHTS:
        if (held := hf_tensors.leaf(like, weight)) is None:
            continue
        dtype, inside = np.dtype(held.dtype), found
        for key in weight.path[:-1]:
            inside = inside.setdefault(key, {})
        inside[weight.path[-1]] = Leaf(held.shape, dtype, partial(arrays.read, weight, held.shape, dtype))
    return found


def _each(params: dict) -> list[Leaf]:
    return [leaf for value in params.values() for leaf in (_each(value) if isinstance(value, dict) else [value])]


def _check_room(folder: Path, needed: int, option: str) -> None:
    """Raises ConfigError where the disk of a folder, which need not be there, has not so many bytes."""
    there = next(one for one in (folder.absolute(), *folder.absolute().parents) if one.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise ConfigError(f"{option} {folder}: {gb(needed)} will be written, and {there} has {gb(free)} free: use another disk")
