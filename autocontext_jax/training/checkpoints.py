"""Checkpoints: the training state and the run's progress together, through orbax, asynchronous and atomic.

Each holds checksums of all of it, which every reading verifies: orbax itself does not notice flipped bits.
"""

import contextlib
import json
import logging
import math
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax import lax

from autocontext_jax import processes
from autocontext_jax.errors import UserError

log = logging.getLogger(__name__)

# What orbax and its storage raise when files cannot be read or written. The last three: it takes for granted that its
# own JSON has the shape it gave it.
FAILURES = (ValueError, OSError, KeyError, RuntimeError, TypeError, AttributeError, IndexError)

# As orbax has them, but without its `array_metadatas`: only random keys need these notes, and damage to them shows only
# when arrays go to devices, which `set_damaged_aside` does not see.
ARRAYS = ocp.type_handlers.create_type_handler_registry(
    (jax.Array, ocp.type_handlers.ArrayHandler()),
    (np.ndarray, ocp.type_handlers.NumpyHandler()),
)


class Checkpoints:
    """The checkpoints of one run: the newest few and the best by validation.

    Args:
      directory: made if missing, unless it is only read.
      keep: how many of the newest to keep.
      read_only: for everything that does not train. Nothing in the directory is changed, so that a run which trains
        there meanwhile is not disturbed: opened for writing, orbax removes checkpoints that are being saved.
    """

    def __init__(self, directory: Path, *, keep: int = 2, read_only: bool = False):
        self._directory, self._keep = directory, keep
        if read_only and not directory.exists():
            raise UserError(f"{directory} does not exist: train there first (--mode train)")
        try:
            self._manager = ocp.CheckpointManager(
                directory.absolute(),
                item_handlers={
                    "state": ocp.PyTreeCheckpointHandler(type_handler_registry=ARRAYS),
                    "record": ocp.JsonCheckpointHandler(),
                },
                options=ocp.CheckpointManagerOptions(read_only=True, save_interval_steps=0, create=False)
                if read_only
                else ocp.CheckpointManagerOptions(preservation_policy=self, cleanup_tmp_directories=True),
            )
        except FAILURES as error:  # orbax reads what every step's _CHECKPOINT_METADATA says of it
            raise UserError(
                f"{directory} cannot be read ({_short(error)}); expected whole checkpoints: move away the one whose "
                "_CHECKPOINT_METADATA is damaged, and the others count"
            ) from error
        # Ours, as orbax's own note of it carries no checksum and stops every reading once it is damaged.
        self._dice: dict[int, float | None] = {}
        for step in self._manager.all_steps():
            with contextlib.suppress(UserError):
                self._dice[step] = self._record(step)["dice"]

    @property
    def latest(self) -> int | None:
        """Step of the newest checkpoint; None if there is none."""
        return self._manager.latest_step()

    @property
    def best(self) -> int | None:
        """Step of the best checkpoint; the newest if none has a Dice; None if there is none.

        Raises:
          UserError: a checkpoint is damaged.
        """
        return _best({step: self._record(step)["dice"] for step in self._manager.all_steps()}, self.latest)

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Orbax asks which of the checkpoints, oldest first, are kept."""
        del context
        steps = [checkpoint.step for checkpoint in checkpoints]
        best = _best({step: self._dice.get(step) for step in steps}, None)
        return [step in steps[-self._keep :] or step == best for step in steps]

    def save(self, step: int, state: Any, progress: dict[str, Any], *, dice: float | None = None) -> None:
        """Starts to save; returns as soon as the state may change.

        Args:
          step: steps done.
          state: a pytree of arrays.
          progress: what else the run needs to go on after this step, such as the loader's position; JSON.
          dice: mean validation Dice of this state; None if it was not validated, or no held-out patch shows a class.

        Raises:
          UserError: this or the last checkpoint cannot be written.
        """
        record = {"progress": progress, "dice": dice, "checksums": _checksums(state)}
        args = ocp.args.Composite(
            state=ocp.args.PyTreeSave(state), record=ocp.args.JsonSave(record | {"crc": _crc(record)})
        )
        self._dice[step] = dice
        try:
            self._manager.save(step, args=args)
        except FAILURES as error:
            raise self._not_written(error) from error

    def set_damaged_aside(self) -> None:
        """Moves the newest checkpoints, as long as they are damaged, into the folder `damaged` beside this one.

        Raises:
          UserError: none is left of those that there were.
        """
        found = self.latest
        while (step := self.latest) is not None:
            try:
                checksums = self._record(step)["checksums"]
                # As plain arrays, whatever they were laid out on.
                state = self._restore(step, state=ocp.args.PyTreeRestore(restore_args=self._as_numpy(step))).state
                self._verify(step, state, checksums)
                return
            except UserError as error:
                aside = self._directory.parent / "damaged" / str(step)
                log.warning("%s; it is moved to %s and the run goes on from the one before", error, aside)
                processes.wait(f"checkpoint {step} is damaged")
                if processes.is_first():
                    aside.parent.mkdir(exist_ok=True)
                    (self._directory / str(step)).rename(_free(aside))
                processes.wait(f"checkpoint {step} is set aside")
                self._manager.reload()
        if found is not None:
            raise UserError(
                f"{self._directory} has no whole checkpoint left, see {self._directory.parent / 'damaged'}; expected "
                "one to go on from: start again in another --workdir"
            )

    def restore(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        """The state and the progress of a step.

        Args:
          step: of an existing checkpoint.
          like: a state of the same structure; its shardings say where the arrays go.

        Raises:
          UserError: the checkpoint is damaged.
        """
        record = self._record(step)
        state = self._restore(step, state=_restore_args(like)).state
        self._verify(step, state, record["checksums"])
        return state, record["progress"]

    def restore_weights(self, step: int, params: Any, batch_stats: Any) -> tuple[Any, Any]:
        """Parameters and running averages of a step, whatever optimiser they were trained with.

        Args:
          step: of an existing checkpoint.
          params: of the same structure; their shardings say where the arrays go.
          batch_stats: likewise.

        Raises:
          UserError: the checkpoint is damaged.
        """
        # An empty tree, as of a model without normalisation, is not in the file.
        like = {key: tree for key, tree in (("params", params), ("batch_stats", batch_stats)) if jax.tree.leaves(tree)}
        restored = self._restore(step, state=_restore_args(like, partial_restore=True)).state
        checksums = self._record(step)["checksums"]
        self._verify(step, restored, {name: value for name, value in checksums.items() if name.split("/")[0] in like})
        return restored["params"], restored.get("batch_stats", batch_stats)

    def _restore(self, step: int, **items: Any) -> Any:
        self.wait()
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:  # of an array that cannot be read orbax raises it bare, the reason being its cause
            raise self._damaged(step, f"cannot be read ({_short(error.__cause__ or error)})") from error

    def _record(self, step: int) -> dict[str, Any]:
        """What was saved beside the arrays."""
        record = self._restore(step, record=ocp.args.JsonRestore()).record
        crc = record.pop("crc", None) if isinstance(record, dict) else None
        if crc is None or crc != _crc(record):
            raise self._damaged(step, "has a record that is not what was saved")
        return record

    def _as_numpy(self, step: int) -> Any:
        try:
            metadata = self._manager.item_metadata(step)["state"]
            return jax.tree.map(lambda leaf: ocp.RestoreArgs(restore_type=np.ndarray), metadata.tree)
        except FAILURES as error:
            raise self._damaged(step, f"cannot be read ({_short(error)})") from error

    def _verify(self, step: int, state: Any, checksums: dict[str, int]) -> None:
        # Of an array that its own note of the tree does not name any more orbax gives back what it was asked with.
        found = _checksums(jax.tree.map(lambda leaf: None if isinstance(leaf, jax.ShapeDtypeStruct) else leaf, state))
        bad = sorted(name for name in checksums.keys() | found if checksums.get(name) != found.get(name))
        if bad:
            raise self._damaged(step, f"holds numbers that are not those saved, in {bad[0]} and {len(bad) - 1} more")

    def exists(self, step: int) -> bool:
        """Whether a checkpoint of this step is still there: the run that trains may have removed it meanwhile."""
        return (self._directory / str(step)).exists()

    def _damaged(self, step: int, what: str) -> UserError:
        return UserError(
            f"checkpoint {self._directory / str(step)} {what}; expected a whole checkpoint: delete that folder, and "
            "the one before counts"
        )

    def _not_written(self, error: Exception) -> UserError:
        return UserError(
            f"a checkpoint cannot be written to {self._directory} ({_short(error)}): see that "
            "there is room and leave to write; what was saved before is whole"
        )

    def wait(self) -> None:
        """Until the last save is whole.

        Raises:
          UserError: it cannot be written.
        """
        try:
            self._manager.wait_until_finished()
        except FAILURES as error:
            raise self._not_written(error) from error

    def close(self) -> None:
        """Waits until the last save is whole, and lets go."""
        try:
            self.wait()
        finally:
            with contextlib.suppress(*FAILURES):  # what it raises `wait` has told
                self._manager.close()


def _checksums(tree: Any) -> dict[str, int]:
    """A number of 32 bits for each leaf, which any one flipped bit changes, wherever the leaf lies."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    names = ["/".join(_key(part) for part in path) for path, _ in leaves]
    return dict(zip(names, (int(value) for value in jax.device_get(_sums([leaf for _, leaf in leaves]))), strict=True))


def _key(part: Any) -> str:
    """A step into a tree; orbax gives dictionaries back for whatever else has named parts."""
    return str(next(getattr(part, name) for name in ("key", "name", "idx") if hasattr(part, name)))


@jax.jit
def _sums(leaves: list[jax.Array]) -> list[jax.Array]:
    """Sum of the leaf's words, each times an odd number of its own, modulo 2^32."""
    words = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}

    def one(leaf: jax.Array) -> jax.Array:
        word = lax.bitcast_convert_type(leaf, words[leaf.dtype.itemsize]).astype(jnp.uint32)
        strides = [int(np.prod(leaf.shape[axis + 1 :])) for axis in range(leaf.ndim)]
        places = (lax.broadcasted_iota(jnp.uint32, leaf.shape, axis) * np.uint32(s) for axis, s in enumerate(strides))
        place = sum(places, jnp.zeros(leaf.shape, jnp.uint32))
        return jnp.sum(word * ((place * np.uint32(2654435761)) | np.uint32(1)), dtype=jnp.uint32)

    return [one(leaf) for leaf in leaves]


def _crc(record: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(record, sort_keys=True).encode())


def _short(error: BaseException) -> str:
    """What happened, in one line: long ones begin with where and end with why."""
    words = " ".join(str(error).split())
    return words if len(words) <= 300 else f"{words[:130]} ... {words[-160:]}"


def _free(path: Path) -> Path:
    """A name beside `path` that nothing has yet."""
    names = [path, *(path.with_name(f"{path.name}_{number}") for number in range(1, 1000))]
    return next(name for name in names if not name.exists())


def _restore_args(like: Any, **options: Any) -> ocp.args.PyTreeRestore:
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    where = ocp.checkpoint_utils.construct_restore_args(abstract)
    return ocp.args.PyTreeRestore(abstract, restore_args=where, **options)


def _best(dice: dict[int, float | None], default: int | None) -> int | None:
    """The step of the highest Dice, of equal ones the newest; the default if none was validated."""
    validated = {step: value for step, value in dice.items() if value is not None and not math.isnan(value)}
    return max(validated, key=lambda step: (validated[step], step), default=default)
