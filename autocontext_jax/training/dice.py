"""Dice scores of hard masks from counts that add up over batches and devices.

They are shown while a pyramid trains and choose the best checkpoint. `evaluation.metrics` scores whole scans instead.
"""

import jax
import jax.numpy as jnp


def overlap_counts(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Voxel counts from which the Dice of each class follows.

    Counts of several batches can be added; `class_dice` and `mean_dice` turn the sum into scores.

    Args:
      logits: [B, D, H, W, K]; the predicted class of a voxel is the one with the largest logit.
      labels: [B, D, H, W], integers in [0, K).

    Returns:
      [2, K] float32: 2 |P ∩ T| and |P| + |T|, with P and T the voxels that the prediction and the labels give a class.
      Exact up to 2^24 voxels a class and batch.
    """
    classes = logits.shape[-1]
    predicted = jax.nn.one_hot(jnp.argmax(logits, axis=-1), classes)
    truth = jax.nn.one_hot(labels, classes)
    voxels = (0, 1, 2, 3)
    return jnp.stack([2 * jnp.sum(predicted * truth, voxels), jnp.sum(predicted, voxels) + jnp.sum(truth, voxels)])


def class_dice(counts: jax.Array) -> jax.Array:
    """Dice of each foreground class.

    Args:
      counts: [..., 2, K], sums of `overlap_counts`.

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
