"""Checkpoints of a run: state, step, clock and configuration in one, written in the background, whole or not at all.

Orbax writes each checkpoint into a temporary folder and renames it when it is complete, so a kill during a save leaves the
one before it. Against damage after that, every checkpoint carries a checksum of each array, computed on the devices; a
checkpoint that can't be read or doesn't match is reported, moved to `damaged-checkpoints/`, and the one before it is used.
One that is whole but holds the state after another step than its folder is named for was renamed or copied by somebody: it is
refused and left where it is.

Every process writes the shards that it holds into the one folder, which all share, and reads those that it needs, so another
number of processes and another mesh can go on. Except for `Checkpoints.wait` all functions are for all processes together.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from gqa_jax import errors, storage
from gqa_jax.config import hash_identity
from gqa_jax.errors import ConfigError
from gqa_jax.training import distributed, run_folder
from gqa_jax.training.start import IMPORT, Start

log = logging.getLogger(__name__)

HASHED_BYTES = 1 << 28  # of a leaf that are on every device at once for `params_sha256`


class Restored(NamedTuple):
    """A checkpoint as it was saved: the state's arrays and what was noted beside them."""

    step: int
    state: Any
    metadata: dict[str, Any]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Parameters:
    """A state without its optimizer: leaves have the paths that they have in a `TrainState`."""

    step: jax.Array
    params: Any


class Checkpoints:
    """The checkpoints of one run folder, of states that have a `step`, an integer scalar.

    Use as a context manager: leaving it waits for a save under way.
    """

    def __init__(self, workdir: epath.PathLike, keep: int):
        """Opens (and makes) `workdir/checkpoints`; the newest `keep` are kept. Leftovers of a killed save are removed."""
        self._folder = folder_of(workdir)
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager(self._folder, options=options)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # To close is to wait for the other processes, who don't come when only this one failed.
        if kind is None or issubclass(kind, run_folder.ALIKE) or jax.process_count() == 1:
            self._manager.close()

    def save(self, step: int, state: Any, metadata: dict[str, Any]) -> None:
        """Starts saving the state after `step` optimizer steps with JSON-serialisable metadata; returns before it is written.

        The metadata is kept with `step` and `checksums` added. Nothing is done when this step is saved. An error of the save
        before it (a full disk, say) is raised here or in `wait`.
        """
        metadata = metadata | {"step": step, "checksums": fetched_checksums(state)}
        self._manager.save(
            step, args=ocp.args.Composite(state=ocp.args.StandardSave(state), metadata=ocp.args.JsonSave(metadata))
        )

    def wait(self) -> None:
        """Returns when the last save is complete on disk; raises what went wrong with it."""
        self._manager.wait_until_finished()
        self._manager.check_for_errors()

    def newest_metadata(self) -> dict[str, Any] | None:
        """Metadata of the newest checkpoint whose metadata can be read, None when there is no checkpoint.

        Raises ConfigError when it is of another step than its folder is named for (metadata of the first version has no step).
        """
        return distributed.from_primary("metadata of checkpoints", self._newest_metadata)

    def _newest_metadata(self) -> dict[str, Any] | None:
        for step in sorted(self._manager.all_steps(), reverse=True):
            folder = self._folder / str(step)
            try:
                metadata = _read_metadata(folder)
            except Exception as error:  # orbax has no single class for unreadable files
                log.warning("checkpoint %s: metadata can't be read (%s)", folder, errors.named(error, 200))
                continue
            _refuse_renamed(folder, metadata)
            return metadata
        return None

    def restore_newest(self, abstract_state: Any) -> Restored | None:
        """The newest undamaged checkpoint, its arrays placed as the ShapeDtypeStructs (with shardings) of `abstract_state`.

        None when there is none. Damaged ones are logged and moved aside, never deleted. Raises ConfigError when it is of
        another step than its folder is named for.
        """
        for step in distributed.from_primary("checkpoints", lambda: sorted(self._manager.all_steps(), reverse=True)):
            folder = self._folder / str(step)
            state, metadata, damage = _read(
                folder,
                lambda folder=folder: ocp.StandardCheckpointHandler().restore(
                    folder / "state", args=ocp.args.StandardRestore(abstract_state)
                ),
            )
            if damage is None:
                _refuse_renamed(folder, metadata, state)
                return Restored(step, state, metadata)
            self._set_aside(step, damage)
        return None

    def _set_aside(self, step: int, reason: str) -> None:
        aside = self._folder.parent / "damaged-checkpoints" / f"{step}-{time.time_ns()}"

        def move() -> None:
            storage.move(self._folder / str(step), aside)
            log.warning("checkpoint of step %d is damaged (%s): moved to %s, using the one before it", step, reason, aside)

        distributed.from_primary(f"moving the damaged checkpoint of step {step} away", move)
        self._manager.reload()


def restore_params(workdir: epath.PathLike, abstract_params: Any, whole: bool = True) -> Restored:
    """The newest undamaged checkpoint of another run, which is left as it is; of its state only the parameters.

    Arrays are placed as the ShapeDtypeStructs of `abstract_params`, all of them, or some where not `whole`. Raises ConfigError
    when no checkpoint can be used, its parameters have other shapes, or it is of another step than its folder is named for.
    """
    folder = folder_of(workdir)
    leaves = jax.tree.leaves(abstract_params)
    step_like = jax.ShapeDtypeStruct((), jnp.int32, sharding=_replicated(leaves) or leaves[0].sharding)
    wanted = {"step": step_like, "params": abstract_params}
    arguments = ocp.args.PyTreeRestore(
        item=wanted, restore_args=ocp.checkpoint_utils.construct_restore_args(wanted), partial_restore=True
    )
    restore = ocp.PyTreeCheckpointHandler().restore
    shapes = described(abstract_params)
    steps = distributed.from_primary("checkpoints to start from", lambda: _finished_steps(folder))
    problems = []
    for step in sorted(steps, reverse=True):
        at = folder / str(step)
        there, damage = distributed.from_primary(f"shapes in {at}", functools.partial(_saved_shapes, at))
        there = there if whole or damage else {path: held for path, held in there.items() if path in shapes}
        if damage is None and there != shapes:
            path = next(path for path in [*shapes, *there] if shapes.get(path) != there.get(path))
            raise ConfigError(
                f"{at} is of another model: {path} is {there.get(path, 'not there')}, here "
                f"{shapes.get(path, 'not there')}: give the `model` fields of that run"
            )
        if damage is None:
            state, metadata, damage = _read(at, lambda at=at: Parameters(**restore(at / "state", args=arguments)))
            if damage is None:
                _refuse_renamed(at, metadata, state)
                return Restored(step, state.params, metadata)
        problems.append(f"that of step {step} is damaged ({damage})")
        log.warning("%s is damaged (%s)", at, damage)
    raise ConfigError(f"{folder} has no checkpoint to start from: {'; '.join(problems) or 'there is none'}")


def restore_start(start: Start, abstract_params: dict, whole: bool = True) -> dict:
    """The parameters of a start, placed as the ShapeDtypeStructs of `abstract_params` (with shardings); `whole`: all of them.

    Raises ConfigError where no checkpoint can be used, or the newest that can is not the one that `start` names.
    """
    restored = restore_params(start.folder, abstract_params, whole)
    held = restored.step, hash_identity(restored.metadata["identity"], len(start.identity))
    if held != (start.step, start.identity):
        raise ConfigError(
            f"{start.folder}: the newest checkpoint that can be used there is of step {restored.step}, not the last "
            f"({start.step}), or of other parameters: "
            + ("import them again" if start.kind == IMPORT else "run that one again in a new folder")
        )
    return restored.state


def _refuse_renamed(folder: epath.Path, metadata: dict[str, Any], state: Any = None) -> None:
    """Raises ConfigError unless metadata and, where given, state are those after the step that the folder is named for."""
    step = int(folder.name)
    found = [] if state is None else [int(state.step)]
    for held in (*found, metadata.get("step", step)):  # that of the first version has none
        if held != step:
            raise ConfigError(
                f"{folder} holds the state after step {held}, not {step}: it was renamed or copied: give it back its "
                "name, or move it away"
            )


def folder_of(workdir: epath.PathLike) -> epath.Path:
    """Where the checkpoints of a run folder are."""
    workdir = storage.path(workdir)
    return (workdir if storage.is_remote(workdir) else workdir.absolute()) / "checkpoints"


def _finished_steps(folder: epath.Path) -> list[int]:
    """Steps of the finished checkpoints: of folders whose name is the step and nothing else, unlike "backup_60"."""
    found = set(ocp.utils.checkpoint_steps(folder)) if folder.exists() else set()
    return sorted(step for step in found if (folder / str(step)).exists())


def _saved_shapes(folder: epath.Path) -> tuple[dict[str, str] | None, str | None]:
    """The parameters of a checkpoint, `described`; or what is wrong with it."""
    try:
        return described(ocp.PyTreeCheckpointHandler().metadata(folder / "state").tree["params"]), None
    except Exception as error:  # orbax has no single class for unreadable files
        return None, errors.named(error, 200)


def described(params: Any) -> dict[str, str]:
    """Dtype and shape of every parameter, by its path."""
    return {path: f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in _by_path(params).items()}


def _read(folder: epath.Path, restore: Callable[[], Any]) -> tuple[Any, dict[str, Any] | None, str | None]:
    """State and metadata of a checkpoint, and on all processes alike what is wrong with it (None: nothing).

    `restore` reads the state, or some of its leaves, at their paths.
    """
    state = metadata = damage = None
    try:  # not by the manager, which makes processes that could read wait for those that couldn't
        metadata = _read_metadata(folder)
        saved = metadata["checksums"]
        state = restore()
    except jax.errors.JaxRuntimeError:  # of the devices, not of the files
        raise
    except Exception as error:  # orbax has no single class for unreadable files
        damage = errors.named(error, 200)
    if damages := distributed.gather(f"reading {folder.name}", damage):
        return None, None, next(iter(damages.values()))
    found = fetched_checksums(state)
    wrong = [path for path in found if saved.get(path) != found[path]]
    return state, metadata, f"checksum of {wrong[0]} differs" if wrong else None


def _read_metadata(folder: epath.Path) -> dict[str, Any]:
    return ocp.JsonCheckpointHandler().restore(folder / "metadata")


def checksums(state: Any) -> dict[str, jax.Array]:
    """A uint32 for every array of `state`, by its path, whole on every device.

    Sum of each element's bits times an odd number that depends on its position, modulo 2^32: integer arithmetic, so
    the same however the array is sharded, and no single changed element goes unseen.
    """
    leaves = _by_path(state)
    return dict(zip(leaves, _sums(_replicated(list(leaves.values())))(list(leaves.values())), strict=True))


def params_sha256(params: dict) -> str:
    """SHA-256 over every parameter's path, dtype, shape and bytes, in the order of the paths; on any mesh the same."""
    digest = hashlib.sha256()
    for path, leaf in sorted(_by_path(params).items()):
        add_sha256(digest, path, leaf)
    return digest.hexdigest()


def add_sha256(digest: Any, path: str, leaf: jax.Array | np.ndarray) -> None:
    """What a parameter adds to `params_sha256`."""
    digest.update(f"{path}|{leaf.dtype}|{leaf.shape}|".encode())
    for part in _parts(leaf):
        digest.update(np.ascontiguousarray(part).view(np.uint8))


def _parts(leaf: jax.Array | np.ndarray) -> Iterator[np.ndarray]:
    """The array in pieces along its first axis, on this host; never more than one piece on any device."""
    if isinstance(leaf, np.ndarray) or leaf.is_fully_addressable or leaf.is_fully_replicated:
        yield np.asarray(leaf)
        return
    take = jax.jit(jax.lax.dynamic_slice_in_dim, static_argnums=2, out_shardings=_replicated([leaf]))
    rows = max(1, HASHED_BYTES * leaf.shape[0] // leaf.nbytes)
    for start in range(0, leaf.shape[0], rows):
        yield np.asarray(take(leaf, start, min(rows, leaf.shape[0] - start)))


def _by_path(tree: Any) -> dict[str, Any]:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _replicated(leaves: list[jax.Array]) -> NamedSharding | None:
    """Whole on every device that the leaves are on; None leaves it to jax, for arrays outside of a mesh."""
    sharding = leaves[0].sharding
    return NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding) else None


@functools.lru_cache(maxsize=4)
def _sums(sharding: NamedSharding | None) -> Any:
    return jax.jit(lambda leaves: [_checksum(leaf) for leaf in leaves], out_shardings=sharding)


def _checksum(x: jax.Array) -> jax.Array:
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(jnp.uint32)
    # Of the whole array, by axis: an iota over all elements at once, reshaped, would not be cut as x is.
    strides = [int(np.prod(x.shape[axis + 1 :])) for axis in range(x.ndim)]
    axes = [jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(strides[axis] % 2**32) for axis in range(x.ndim)]
    position = functools.reduce(jnp.add, axes, jnp.zeros(x.shape, jnp.uint32))
    return jnp.sum(bits * (2 * position + 1), dtype=jnp.uint32)


def fetched_checksums(state: Any) -> dict[str, int]:
    """`checksums`, on this host."""
    return {path: int(value) for path, value in jax.device_get(checksums(state)).items()}
