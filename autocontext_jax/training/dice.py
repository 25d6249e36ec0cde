"""Dice scores of hard masks from counts that add up over batches and devices.

They are shown while a pyramid trains and choose the best checkpoint. `evaluation.metrics` scores whole scans instead.

Only classes that the labels contain have a score. The patches that choose the best checkpoint are the same for all
checkpoints, so that all are compared by the same classes: a few voxels predicted of a class that no patch shows would
otherwise count as a Dice of 0 at one checkpoint, and not at the next.
"""

import jax
import jax.numpy as jnp

from autocontext_jax.training.targets import CLASSES, Targets, hard_maps, truth_maps


def overlap_counts(
    logits: jax.Array, labels: jax.Array, *, targets: Targets = CLASSES, known: jax.Array | None = None
) -> jax.Array:
    """Voxel counts from which the Dice of each class follows.

    Counts of several batches can be added; `class_dice` and `mean_dice` turn the sum into scores.

    Args:
      logits: [B, D, H, W, K]; the predicted class of a voxel is the one with the largest logit. With regions
        [B, D, H, W, R]; a region is predicted where its sigmoid is above one half.
      labels: [B, D, H, W], integers: numbers in [0, K), or those of `targets`.
      targets: what the labels mean. Ignored voxels are not counted.
      known: what each sample's case annotates, see `targets`; None means everything. A sample adds nothing to the
        counts of other classes; where these are predicted it counts as background.

    Returns:
      [3, K] float32: 2 |P ∩ T|, |P| + |T| and |T|, with P and T the voxels that the prediction and the labels give a
      class. Exact up to 2^24 voxels a class and batch. With regions [3, R + 1], the first column 0 as they have no
      background.
    """
    predicted = hard_maps(logits, labels, targets, known)
    truth = truth_maps(labels, logits.shape[-1], targets, known)
    voxels = (0, 1, 2, 3)
    true = jnp.sum(truth, voxels)
    counts = jnp.stack([2 * jnp.sum(predicted * truth, voxels), jnp.sum(predicted, voxels) + true, true])
    return jnp.pad(counts, ((0, 0), (1, 0))) if targets.regions else counts


def class_dice(counts: jax.Array) -> jax.Array:
    """Dice of each foreground class.

    Args:
      counts: [..., 3, K], sums of `overlap_counts`; [..., 3, R + 1] of regions.

    Returns:
      [..., K - 1], without the background; NaN for a class that the labels do not contain.
    """
    overlap, total, true = (counts[..., row, 1:] for row in range(3))
    present = true > 0
    return jnp.where(present, overlap / jnp.where(present, total, 1), jnp.nan)


def mean_dice(counts: jax.Array) -> jax.Array:
    """Mean Dice over the foreground classes that the labels contain.

    Args:
      counts: [..., 3, K], sums of `overlap_counts`.

    Returns:
      [...]; NaN where there is no such class.
    """
    dice = class_dice(counts)
    present = ~jnp.isnan(dice)
    return jnp.sum(jnp.where(present, dice, 0), axis=-1) / jnp.sum(present, axis=-1)
