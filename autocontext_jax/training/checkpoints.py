"""Checkpoints: the training state and the feed's position together, through orbax, asynchronous and atomic."""

import math
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from autocontext_jax.errors import UserError


class Checkpoints:
    """The checkpoints of one run: the newest few and the best by validation.

    Args:
      directory: made if missing.
      keep: how many of the newest to keep.
    """

    def __init__(self, directory: Path, *, keep: int = 2):
        policies = [
            checkpoint_managers.LatestN(keep),
            checkpoint_managers.BestN(get_metric_fn=_dice, n=1, keep_checkpoints_without_metrics=False),
        ]
        self._directory = directory
        self._manager = ocp.CheckpointManager(
            directory.absolute(),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
                best_fn=_dice,
                cleanup_tmp_directories=True,
            ),
        )

    @property
    def latest(self) -> int | None:
        """Step of the newest checkpoint; None if there is none."""
        return self._manager.latest_step()

    @property
    def best(self) -> int | None:
        """Step of the best checkpoint; the newest if none was validated; None if there is none."""
        best = self._manager.best_step()
        return self.latest if best is None else best

    def save(self, step: int, state: Any, feed: dict[str, Any], *, dice: float | None = None) -> None:
        """Starts to save; returns as soon as the state may change.

        Args:
          step: steps done.
          state: a pytree of arrays.
          feed: the feed's position of the batch after this step, as JSON.
          dice: mean validation Dice of this state, if it was validated.
        """
        self._manager.save(
            step,
            args=ocp.args.Composite(state=ocp.args.PyTreeSave(state), feed=ocp.args.JsonSave(feed)),
            metrics=None if dice is None else {"dice": dice},
        )

    def restore(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        """The state and the feed's position of a step.

        Args:
          step: of an existing checkpoint.
          like: a state of the same structure; its shardings say where the arrays go.

        Raises:
          UserError: the checkpoint is damaged.
        """
        restored = self._restore(step, state=_restore_args(like), feed=ocp.args.JsonRestore())
        return restored.state, restored.feed

    def restore_weights(self, step: int, params: Any, statistics: Any) -> tuple[Any, Any]:
        """Parameters and running averages of a step, whatever optimiser they were trained with.

        Args:
          step: of an existing checkpoint.
          params: of the same structure; their shardings say where the arrays go.
          statistics: likewise.

        Raises:
          UserError: the checkpoint is damaged.
        """
        # An empty tree, as of a model without normalisation, is not in the file.
        like = {key: tree for key, tree in (("params", params), ("statistics", statistics)) if jax.tree.leaves(tree)}
        restored = self._restore(step, state=_restore_args(like, partial_restore=True)).state
        return restored["params"], restored.get("statistics", statistics)

    def _restore(self, step: int, **items: Any) -> Any:
        self._manager.wait_until_finished()
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except (ValueError, OSError, KeyError) as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(
                f"checkpoint {self._directory / str(step)} cannot be read ({reason}); wanted a whole checkpoint: "
                "delete that folder to go on from the one before"
            ) from error

    def close(self) -> None:
        """Waits until the last save is whole."""
        self._manager.wait_until_finished()
        self._manager.close()


def _restore_args(like: Any, **options: Any) -> ocp.args.PyTreeRestore:
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    where = ocp.checkpoint_utils.construct_restore_args(abstract)
    return ocp.args.PyTreeRestore(abstract, restore_args=where, **options)


def _dice(metrics: dict[str, float]) -> float:
    return -1.0 if math.isnan(metrics["dice"]) else metrics["dice"]
