"""From logits to maps: a softmax over classes, or one sigmoid a region.

Classes exclude each other, and the background is one of them. Regions may overlap, and the background has no map.
"""

import jax
import jax.numpy as jnp

ACTIVATIONS = ("softmax", "sigmoid")


def activate(logits: jax.Array, activation: str) -> jax.Array:
    """The maps of logits [..., K], values from 0 to 1; with `softmax` they add up to 1."""
    return jax.nn.softmax(logits) if activation == "softmax" else jax.nn.sigmoid(logits)


def logits_of(maps: jax.Array, activation: str) -> jax.Array:
    """Logits [..., K] of which `activate` makes these maps, to the precision of float32."""
    smallest = jnp.finfo(jnp.float32).tiny
    logits = jnp.log(jnp.maximum(maps, smallest))
    return logits if activation == "softmax" else logits - jnp.log(jnp.maximum(1 - maps, smallest))


def last_region(inside: jax.Array) -> jax.Array:
    """Writes regions that may overlap into one map, each over those before it, as nnU-Net does.

    Args:
      inside: [..., R] bool, whether a voxel lies in each region; R is at most 255.

    Returns:
      [...] uint8: the number, from 1, of the last region that holds the voxel; 0 where none does.
    """
    numbers = jnp.arange(1, inside.shape[-1] + 1, dtype=jnp.uint8)
    return jnp.max(jnp.where(inside, numbers, jnp.uint8(0)), axis=-1)
