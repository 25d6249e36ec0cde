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
            args=ocp.args.Composite(state=ocp.args.StandardSave(state), feed=ocp.args.JsonSave(feed)),
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
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        try:
            restored = self._manager.restore(
                step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract), feed=ocp.args.JsonRestore())
            )
        except (ValueError, OSError, KeyError) as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(
                f"checkpoint {self._directory / str(step)} cannot be read ({reason}); wanted a whole checkpoint: "
                "delete that folder to go on from the one before"
            ) from error
        return restored.state, restored.feed

    def close(self) -> None:
        """Waits until the last save is whole."""
        self._manager.wait_until_finished()
        self._manager.close()


def _dice(metrics: dict[str, float]) -> float:
    return -1.0 if math.isnan(metrics["dice"]) else metrics["dice"]
