"""Dice scores of hard masks from counts that add up over batches and devices.

They are shown while a pyramid trains and choose the best checkpoint. `evaluation.metrics` scores whole scans instead.
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
      [2, K] float32: 2 |P ∩ T| and |P| + |T|, with P and T the voxels that the prediction and the labels give a class.
      Exact up to 2^24 voxels a class and batch. With regions [2, R + 1], the first column 0 as they have no background.
    """
    predicted = hard_maps(logits, labels, targets, known)
    truth = truth_maps(labels, logits.shape[-1], targets, known)
    voxels = (0, 1, 2, 3)
    counts = jnp.stack([2 * jnp.sum(predicted * truth, voxels), jnp.sum(predicted, voxels) + jnp.sum(truth, voxels)])
    return jnp.pad(counts, ((0, 0), (1, 0))) if targets.regions else counts


def class_dice(counts: jax.Array) -> jax.Array:
    """Dice of each foreground class.

    Args:
      counts: [..., 2, K], sums of `overlap_counts`; [..., 2, R + 1] of regions.

    Returns:
      [..., K - 1], without the background; NaN for a class that neither prediction nor labels contain.
    """
    overlap, total = counts[..., 0, 1:], counts[..., 1, 1:]
    present = total > 0
    return jnp.where(present, overlap / jnp.where(present, total, 1), jnp.nan)


def mean_dice(counts: jax.Array) -> jax.Array:
    """Mean Dice over the foreground classes that prediction or labels contain.

    Args:
      counts: [..., 2, K], sums of `overlap_counts`.

    Returns:
      [...]; NaN where there is no such class.
    """
    dice = class_dice(counts)
    present = ~jnp.isnan(dice)
    return jnp.sum(jnp.where(present, dice, 0), axis=-1) / jnp.sum(present, axis=-1)
