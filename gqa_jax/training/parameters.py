"""Parameters outside of a training run: of a run or an import one at a time, and importing some of elsewhere."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import SingleDeviceSharding

from gqa_jax import model, storage
from gqa_jax.config import ModelConfig
from gqa_jax.data import vocabulary
from gqa_jax.data.vocabulary import Tokenizer, record_tokenizer
from gqa_jax.errors import ConfigError
from gqa_jax.training import checkpoint, start
from gqa_jax.training.checkpoint import Parameters, described
from gqa_jax.training.start import Start

CHUNK_BYTES = 1 << 24  # of a parameter that are written together: what writing needs beside the parameter itself
PARTIAL = ".partial"  # behind the name of a local folder that is being made


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A parameter that is made when it is read, so that one at a time is in memory."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    # What Orbax asks of arrays.
    ndim = property(lambda self: len(self.shape))
    size = property(lambda self: int(np.prod(self.shape)))
    nbytes = property(lambda self: self.size * self.dtype.itemsize)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self.read()


def saved(source: Start) -> dict:
    """The parameters of a start, each a `Leaf`: nested dict as `gqa_jax.model.init_params` returns.

    Reading one raises ConfigError as `checkpoint.restore_start` does.
    """

    def read(path: tuple, like: jax.ShapeDtypeStruct) -> np.ndarray:
        return np.asarray(jax.tree.leaves(checkpoint.restore_start(source, _nested(path, like), whole=False))[0])

    def leaf(path: tuple, like: jax.ShapeDtypeStruct) -> Leaf:
        return Leaf(like.shape, np.dtype(like.dtype), partial(read, path, like))

    return jax.tree_util.tree_map_with_path(leaf, abstract(source.model))


def write_import(
    folder: os.PathLike | str,
    config: ModelConfig,
    params: dict,
    *,
    provenance: str,
    tokenizer: Tokenizer | None = None,
    context: int | None = None,
    stop: Sequence[int] = (),
    files: Mapping[str, bytes] | None = None,
) -> Start:
    """Writes parameters into a new folder, local or on gs://, which `continue_from` and `gqa_jax.load_model` take.

    A local folder is made beside its place and renamed when it is whole.

    Args:
      params: nested dict of arrays, or of a `Leaf` each; shapes and dtypes as of `gqa_jax.model.init_params(config, key)`.
      provenance: where they come from, for people. Like all that follows it is no part of the content hash.
      tokenizer: what their vocabulary means, kept with them; None: not known.
      context: tokens of the context that they are for; None: not known.
      stop: ids that end an answer; none: the tokenizer's end of a document.
      files: kept beside the tokenizer, by name, for who exports it again.
    Raises:
      ConfigError: the folder holds something, or the parameters are not those of `config`, naming the first that differs.
    """
    ours, theirs = described(abstract(config)), described(params)
    for path in [*ours, *theirs]:
        if ours.get(path) != theirs.get(path):
            raise ConfigError(
                f"the parameters are not those of the configuration: {path} is {theirs.get(path, 'not there')}, must be "
                f"{ours.get(path, 'left out')}"
            )
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise ConfigError(f"tokenizer {tokenizer.name} has {tokenizer.vocab_size} entries, the model {config.vocab_size}")
    params = jax.tree.map(
        lambda leaf: leaf if isinstance(leaf, Leaf) else Leaf(leaf.shape, np.dtype(leaf.dtype), lambda: leaf), params
    )
    values: dict[str, Any] = {"format": start.FORMAT, "version": start.VERSION, "model": config.identity()}
    with new_folder(folder, "import into a new folder") as at:
        values["params_sha256"], sums = _digests(params)
        _save(at, params, {"identity": dict(values), "step": 0, "checksums": sums})
        if tokenizer is not None:
            record_tokenizer(at, tokenizer)
        storage.make_folder(at / vocabulary.RECORD)
        for name, content in (files or {}).items():
            storage.write_bytes(at / vocabulary.RECORD / name, content)
        about = {"content": start.content_hash(values), "provenance": provenance, "context": context, "stop": [*stop]}
        storage.write_json(at / start.FILE, values | about)
    return start.of_folder(folder)


@contextlib.contextmanager
def new_folder(folder: os.PathLike | str, fix: str) -> Iterator[os.PathLike]:
    """Where to make a folder, local or on gs://: a local one is made beside its place and renamed at the end.

    Raises ConfigError, `fix` at its end, where the folder holds something, or another is making it.
    """
    require_new(folder, fix)
    folder = storage.path(folder)
    if storage.is_remote(folder):
        yield folder
        return
    place = Path(os.path.abspath(folder))
    beside = place.with_name(place.name + PARTIAL)
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        beside.mkdir()
    except FileExistsError:
        raise ConfigError(
            f"{beside} is there: another is making {place.name}, or was killed; then remove that folder"
        ) from None
    try:
        yield storage.path(beside)
        beside.rename(place)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def require_new(folder: os.PathLike | str, fix: str) -> None:
    """Raises ConfigError, `fix` at its end, where a folder holds something."""
    folder = storage.path(folder)
    if storage.names(folder) or (not storage.is_remote(folder) and Path(folder).is_file()):
        raise ConfigError(f"{folder} holds something: {fix}")


def _digests(params: dict) -> tuple[str, dict[str, int]]:
    """`checkpoint.params_sha256`, and checksums of the state as `Checkpoints.save` keeps them; each parameter is read once."""
    digest, sums = hashlib.sha256(), checkpoint.fetched_checksums(Parameters(jnp.int32(0), {}))
    for path, leaf in sorted(jax.tree_util.tree_leaves_with_path(params), key=lambda found: jax.tree_util.keystr(found[0])):
        array: Any = leaf.read()
        checkpoint.add_sha256(digest, jax.tree_util.keystr(path), array)
        sums |= checkpoint.fetched_checksums(Parameters(jnp.int32(0), _nested(path, jnp.asarray(array))))
    return digest.hexdigest(), sums


def _nested(path: tuple, leaf: Any) -> Any:
    """Nested dicts with nothing but what is at a path."""
    return leaf if not path else {path[0].key: _nested(path[1:], leaf)}


class _LeafHandler(ocp.type_handlers.NumpyHandler):
    """Writes each `Leaf` before the next is read."""

    async def serialize(self, values: Sequence[Leaf], infos: Sequence[Any], args: Sequence[Any] | None = None) -> Sequence[Any]:
        small = ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES)
        for leaf, info in zip(values, infos, strict=True):
            for written in await super().serialize([np.asarray(leaf.read())], [info], [small]):
                written.result()
        return []


def _save(folder: os.PathLike, params: dict, metadata: Mapping[str, Any]) -> None:
    """Writes checkpoints/0 as `Checkpoints.save` does."""
    registry = ocp.type_handlers.create_type_handler_registry(
        (jax.Array, ocp.type_handlers.ArrayHandler()), (Leaf, _LeafHandler(deepcopy_host_arrays=False))
    )
    handler = ocp.CompositeCheckpointHandler(
        state=ocp.PyTreeCheckpointHandler(type_handler_registry=registry), metadata=ocp.JsonCheckpointHandler()
    )
    state = ocp.args.PyTreeSave({"step": jnp.int32(0), "params": params})
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(
            checkpoint.folder_of(folder) / "0", args=ocp.args.Composite(state=state, metadata=ocp.args.JsonSave(metadata))
        )


def abstract(config: ModelConfig) -> dict:
    """Shapes and dtypes of the parameters of a model, each whole on the first device."""
    here = SingleDeviceSharding(jax.devices()[0])
    shapes = jax.eval_shape(partial(model.init_params, config), jax.random.key(0))
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), shapes)
