"""Checkpoints of a run: state, step, clock and configuration in one, written in the background, whole or not at all.

Orbax writes each checkpoint into a temporary folder and renames it when it is complete, so a kill during a save leaves the
one before it. Against damage after that, every checkpoint carries a checksum of each array, computed on the device; a
checkpoint that can't be read or doesn't match is reported, moved to `damaged-checkpoints/`, and the one before it is used.
"""

from __future__ import annotations

import logging
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath

log = logging.getLogger(__name__)


class Restored(NamedTuple):
    """A checkpoint as it was saved: the state's arrays and what was noted beside them."""

    step: int
    state: Any
    metadata: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run folder. Use as a context manager: leaving it waits for a save under way."""

    def __init__(self, workdir: epath.PathLike, keep: int):
        """Opens (and makes) `workdir/checkpoints`; the newest `keep` are kept. Leftovers of a killed save are removed."""
        self._folder = epath.Path(workdir).absolute() / "checkpoints"
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager(self._folder, options=options)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.close()

    def save(self, step: int, state: Any, metadata: dict[str, Any]) -> None:
        """Starts saving the state after `step` optimizer steps with JSON-serialisable metadata; returns before it is written.

        An error of the save before it (a full disk, say) is raised here or in `wait`.
        """
        metadata = metadata | {"checksums": {path: int(value) for path, value in jax.device_get(checksums(state)).items()}}
        self._manager.save(
            step, args=ocp.args.Composite(state=ocp.args.StandardSave(state), metadata=ocp.args.JsonSave(metadata))
        )

    def wait(self) -> None:
        """Returns when the last save is complete on disk; raises what went wrong with it."""
        self._manager.wait_until_finished()
        self._manager.check_for_errors()

    def newest_metadata(self) -> dict[str, Any] | None:
        """Metadata of the newest checkpoint whose metadata can be read, None when there is no checkpoint."""
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                return self._manager.restore(step, args=ocp.args.Composite(metadata=ocp.args.JsonRestore())).metadata
            except Exception as error:  # orbax has no single class for unreadable files
                log.warning("checkpoint %s: metadata can't be read (%s)", self._folder / str(step), _first_line(error))
        return None

    def restore_newest(self, abstract_state: Any) -> Restored | None:
        """The newest undamaged checkpoint, its arrays placed as the ShapeDtypeStructs (with shardings) of `abstract_state`.

        None when there is none. Damaged ones are logged and moved aside, never deleted.
        """
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                restored = self._manager.restore(
                    step,
                    args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state), metadata=ocp.args.JsonRestore()),
                )
                state, metadata = restored.state, restored.metadata
                saved = metadata["checksums"]
                found = {path: int(value) for path, value in jax.device_get(checksums(state)).items()}
                wrong = [path for path in found if saved.get(path) != found[path]]
                if not wrong:
                    return Restored(step, state, metadata)
                reason = f"checksum of {wrong[0]} differs"
            except Exception as error:  # orbax has no single class for unreadable files
                reason = _first_line(error)
            self._set_aside(step, reason)
        return None

    def _set_aside(self, step: int, reason: str) -> None:
        folder = self._folder / str(step)
        aside = self._folder.parent / "damaged-checkpoints" / f"{step}-{time.time_ns()}"
        aside.parent.mkdir(exist_ok=True)
        folder.rename(aside)
        self._manager.reload()
        log.warning("checkpoint of step %d is damaged (%s): moved to %s, using the one before it", step, reason, aside)


@jax.jit
def _leaf_checksums(leaves: list[jax.Array]) -> list[jax.Array]:
    return [_checksum(leaf) for leaf in leaves]


def checksums(state: Any) -> dict[str, jax.Array]:
    """A uint32 for every array of `state`, by its path.

    Sum of each element's bits times an odd number that depends on its position, modulo 2^32: integer arithmetic, so
    the same however the array is sharded, and no single changed element goes unseen.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return dict(
        zip([jax.tree_util.keystr(path) for path, _ in leaves], _leaf_checksums([leaf for _, leaf in leaves]), strict=True)
    )


def _checksum(x: jax.Array) -> jax.Array:
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(jnp.uint32)
    position = jax.lax.iota(jnp.uint32, x.size).reshape(x.shape)
    return jnp.sum(bits * (2 * position + 1), dtype=jnp.uint32)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error).strip() else ''}"
