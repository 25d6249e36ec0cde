"""What labels mean to losses and scores: classes or regions, voxels that nobody labelled, classes not annotated.

The functions give maps [B, D, H, W, K] of the labels and of a prediction, one for each of the network's K outputs.
Where something does not count, all of them are 0: sums over voxels then leave it out, and its gradient is exactly 0.

Two things are left out. Voxels labelled `IGNORE`, if `Targets.ignore` says that there are any. And what a sample's case
does not annotate, if `known` is given: [B, K] bool, True for the background (with regions [B, R + 1], column 0 for the
background). A class that is not annotated may be anywhere in the background, so its probability counts towards that of
the background, and so does its label if there is one: the marginal losses of Fang and Yan (IEEE TMI, 2020) and Shi et
al. (Medical Image Analysis, 2021). A region that is not annotated does not count: its sigmoid concerns no other region.
"""

import dataclasses
import functools
import operator

import jax
import jax.numpy as jnp

from autocontext_jax.data.labels import IGNORE
from autocontext_jax.models.activations import last_region

# In the place of minus infinity among logits: its softmax is 0 too, and 0 times its logarithm is a number.
NEVER = -1e30


@dataclasses.dataclass(frozen=True)
class Targets:
    """What the numbers in label maps mean.

    Attributes:
      regions: the numbers that make up each of R regions, which may overlap; the network then has R outputs, one
        sigmoid each. () means classes: K outputs, a softmax over them, and class k is number k.
      ignore: whether label maps may hold `IGNORE`.
    """

    regions: tuple[tuple[int, ...], ...] = ()
    ignore: bool = False

    @property
    def activation(self) -> str:
        """One of `activations.ACTIVATIONS`."""
        return "sigmoid" if self.regions else "softmax"

    def annotated(self, known: jax.Array) -> jax.Array:
        """The columns of `known` that belong to outputs of the network: [B, K], or [B, R] of [B, R + 1]."""
        return known[:, 1:] if self.regions else known


CLASSES = Targets()  # every number is a class, every voxel is labelled


def truth_maps(labels: jax.Array, outputs: int, targets: Targets, known: jax.Array | None = None) -> jax.Array:
    """The labels as maps.

    Args:
      labels: [B, D, H, W], integers.
      outputs: K, or R.
      targets: what they mean.
      known: see the top of this file; None if all is annotated.

    Returns:
      [B, D, H, W, K] float32: 1 in the voxels of a class or region, 0 elsewhere.
    """
    if not targets.regions:
        maps = jax.nn.one_hot(labels, outputs)  # zeros where the label is IGNORE
    else:
        assert len(targets.regions) == outputs, f"{outputs} outputs for {len(targets.regions)} regions"
        members = [functools.reduce(operator.or_, (labels == number for number in some)) for some in targets.regions]
        maps = jnp.stack(members, axis=-1).astype(jnp.float32)
    return _counted(maps, labels, targets, known)


def soft_maps(logits: jax.Array, labels: jax.Array, targets: Targets, known: jax.Array | None = None) -> jax.Array:
    """Probabilities, [B, D, H, W, K] float32; the arguments as of `truth_maps`, and logits [B, D, H, W, K]."""
    logits = logits.astype(jnp.float32)
    maps = jax.nn.sigmoid(logits) if targets.regions else jax.nn.softmax(logits)
    return _counted(maps, labels, targets, known)


def hard_maps(logits: jax.Array, labels: jax.Array, targets: Targets, known: jax.Array | None = None) -> jax.Array:
    """What a mask would hold, as maps of 0 and 1, otherwise as `soft_maps`.

    The class with the largest logit of all, whether it is annotated or not; regions above one half.
    """
    if targets.regions:
        maps = (logits > 0).astype(jnp.float32)
    else:
        maps = jax.nn.one_hot(jnp.argmax(logits, axis=-1), logits.shape[-1])
    return _counted(maps, labels, targets, known)


def predicted_numbers(logits: jax.Array, targets: Targets) -> jax.Array:
    """[..., K] -> [...] uint8: the class with the largest logit; of regions the last above one half, counted from 1."""
    if targets.regions:
        return last_region(logits > 0)
    return jnp.argmax(logits, axis=-1).astype(jnp.uint8)


def valid_voxels(labels: jax.Array) -> jax.Array:
    """Where somebody labelled: bool, shaped as the labels."""
    return labels != IGNORE


def marginal_logits(logits: jax.Array, known: jax.Array) -> jax.Array:
    """Logits [B, D, H, W, K] of classes whose softmax is that of `soft_maps`, for a logarithm without underflow.

    The background's is the logarithm of the summed exponentials of its own and those of classes that are not annotated,
    whose own is `NEVER`.
    """
    known, background = known[:, None, None, None], _is_background(logits)
    joined = jax.nn.logsumexp(logits, axis=-1, keepdims=True, where=background | ~known)
    return jnp.where(background, joined, jnp.where(known, logits, NEVER))


def _counted(maps: jax.Array, labels: jax.Array, targets: Targets, known: jax.Array | None) -> jax.Array:
    """Maps with 0 where something does not count; of classes, what is not annotated is added to the background."""
    if known is not None:
        annotated = targets.annotated(known)[:, None, None, None]
        counted = jnp.where(annotated, maps, 0)
        if not targets.regions:
            unknown = jnp.sum(jnp.where(annotated, 0, maps), axis=-1, keepdims=True)
            counted += jnp.where(_is_background(maps), unknown, 0)
        maps = counted
    return jnp.where(valid_voxels(labels)[..., None], maps, 0) if targets.ignore else maps


def _is_background(maps: jax.Array) -> jax.Array:
    """[K], True at class 0."""
    return jnp.arange(maps.shape[-1]) == 0
