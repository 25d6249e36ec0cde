"""Scores of a state in training on fixed patches of held-out cases."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from autocontext_jax.data.loader import Margins, partly_annotated, read_batch
from autocontext_jax.data.sampling import draw_anywhere, draw_entry
from autocontext_jax.data.store.reader import PreparedCase
from autocontext_jax.geometry import PyramidPatch
from autocontext_jax.training.dice import class_dice, mean_dice
from autocontext_jax.training.sharding import place, sample_sharding
from autocontext_jax.training.state import Batch, Metrics, TrainState


def validation_batches(
    cases: Sequence[PreparedCase],
    *,
    patches: int,
    batch_size: int,
    patch: PyramidPatch,
    levels: Sequence[int],
    seed: int,
) -> list[dict[str, Any]]:
    """Fixed patches, as `loader.read_batch` gives them.

    The classes are drawn equally often; of a case without any class, patches are drawn from anywhere.

    Args:
      cases: held out; without any there are no batches.
      patches: how many, rounded up to whole batches.
      batch_size: B.
      patch: of all levels.
      levels: those that are trained.
      seed: of the draw.
    """
    if not cases:
        return []
    rng = np.random.default_rng([seed, 1])
    margins: Margins = tuple((0, 0, 0) if level in levels else None for level in range(1, len(cases[0].shapes) + 1))
    crops = []
    for number in range(-(-patches // batch_size) * batch_size):
        case = cases[number % len(cases)]
        centre = None
        if not case.foreground_offsets[-1]:
            centre = draw_anywhere(case.shapes[-1], rng, share=1.0)
        if centre is None:
            centre = case.foreground_voxel(draw_entry(case.foreground_offsets, rng, sampling="classes"))
        crops.append((case, centre, margins))
    batches = [crops[start : start + batch_size] for start in range(0, len(crops), batch_size)]
    partly = partly_annotated(cases)
    return [read_batch(some, patch, margins, known=partly) for some in batches]


def validate(
    step: Callable[[TrainState, Batch], tuple[Metrics, tuple[jax.Array, ...]]],
    state: TrainState,
    batches: Sequence[dict[str, Any]],
    sharding: NamedSharding,
    levels: Sequence[int],
    classes: Sequence[str],
) -> tuple[dict[str, float], list[np.ndarray]]:
    """Loss, Dice and each class's Dice over all held-out patches.

    Args:
      step: see `state.make_validation_step`.
      state: to be scored.
      batches: see `validation_batches`; `known`, of partly annotated cases, is [B, K] bool, see `targets`.
      sharding: of a batch's first axes.
      levels: those that are trained.
      classes: names without the background; of regions, if these are learned.

    Returns:
      Values by name, without those that are not finite; and each level's predicted classes in the middle slice of the
      first patch, [N, N] uint8.
    """
    results = []
    for batch in batches:
        images = tuple(place(np.moveaxis(array, 1, -1).astype(np.float32), sharding) for array in batch["images"])
        labels = tuple(place(array, sharding) for array in batch["labels"])
        known = batch.get("known")
        if known is not None:
            known = place(known, sample_sharding(sharding))
        results.append(step(state, Batch(images, labels, known)))
    metrics, slices = zip(*jax.device_get(results), strict=True)
    total = Metrics(
        np.mean([m.loss for m in metrics]),
        jnp.asarray(np.mean([m.losses for m in metrics], axis=0)),
        jnp.asarray(np.sum([m.counts for m in metrics], axis=0)),
        jnp.zeros(()),
    )
    values = named_values(total, levels)
    for level, dice in zip(levels, class_dice(total.counts), strict=True):
        values |= {f"dice_level_{level}_{name}": float(score) for name, score in zip(classes, dice, strict=True)}
    finite = {f"validation_{key}": value for key, value in values.items() if math.isfinite(value)}
    return finite, [level[0] for level in slices[0]]


def named_values(metrics: Metrics, levels: Sequence[int]) -> dict[str, float]:
    """Metrics on the host as numbers with names."""
    values = {"loss": float(metrics.loss)}
    for level, loss, dice in zip(levels, metrics.losses, mean_dice(metrics.counts), strict=True):
        values[f"loss_level_{level}"] = float(loss)
        if np.isfinite(dice):  # without any class in the labels there is no Dice
            values[f"dice_level_{level}"] = float(dice)
    return values
