"""Changes of an array's grid by a factor of two: max pooling, depth-to-space, linear upsampling.

Shapes are [B, D, H, W, C]. A step (z, y, x) is 2 along the axes that are halved or doubled, and 1 along the others.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from autocontext_jax.geometry import Triple


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def max_pool(x: jax.Array, step: Triple = (2, 2, 2)) -> jax.Array:
    """Maximum of each block of `step` voxels.

    The gradient goes to the first largest voxel of a block. Only that voxel's number is kept for it, a byte a block.

    Args:
      x: [B, D, H, W, C]; the sizes that are halved must be even.
      step: voxels of a block along each axis.

    Returns:
      [B, D/2, H/2, W/2, C], without the division along an axis whose step is 1.
    """
    return _max_and_corner(x, step)[0]


def _max_and_corner(x: jax.Array, step: Triple) -> tuple[jax.Array, jax.Array]:
    """The largest voxel of each block and its number in the block, from 0 to at most 7, uint8."""
    largest, chosen = _corner(x, 0, step), jnp.uint8(0)
    for number in range(1, math.prod(step)):
        corner = _corner(x, number, step)
        chosen = jnp.where(corner > largest, jnp.uint8(number), chosen)
        largest = jnp.maximum(largest, corner)
    return largest, chosen


def _corner(x: jax.Array, number: int, step: Triple) -> jax.Array:
    """The voxels that have this number in their blocks."""
    starts = np.unravel_index(number, step)
    return x[:, *(slice(start, None, by) for start, by in zip(starts, step, strict=True))]


def _max_pool_backward(step, chosen, gradient):
    b, d, h, w, c = gradient.shape
    deep, high, wide = step
    number = np.arange(math.prod(step), dtype=np.uint8).reshape(1, 1, deep, 1, high, 1, wide, 1)
    shape = (b, d, 1, h, 1, w, 1, c)
    blocks = jnp.where(chosen.reshape(shape) == number, gradient.reshape(shape), 0)
    return (blocks.reshape(b, deep * d, high * h, wide * w, c),)


max_pool.defvjp(_max_and_corner, _max_pool_backward)


def depth_to_space(blocks: jax.Array, step: Triple = (2, 2, 2)) -> jax.Array:
    """Depth-to-space (pixel shuffle): the values of a voxel's block become voxels.

    Args:
      blocks: [B, D, H, W, block, C], the values of blocks of `step` voxels in the order of their (z, y, x).
      step: voxels of a block along each axis.

    Returns:
      [B, 2D, 2H, 2W, C], without the factor along an axis whose step is 1.
    """
    b, d, h, w, _, c = blocks.shape
    deep, high, wide = step
    split = blocks.reshape(b, d, h, w, *step, c)
    return split.transpose(0, 1, 4, 2, 5, 3, 6, 7).reshape(b, deep * d, high * h, wide * w, c)


def upsample_by_two(x: jax.Array, step: Triple = (2, 2, 2)) -> jax.Array:
    """Doubles the grid by linear interpolation between voxel centres, consuming a halo of one voxel on each side.

    A coarse voxel i covers fine voxels 2i and 2i + 1, whose centres lie a quarter of a coarse voxel before and after
    its own. The halo makes the result exact up to the border, wherever the piece was cut from.

    Args:
      x: [B, n + 2, n + 2, n + 2, C]; without a halo along an axis whose step is 1.
      step: by how much the grid grows along each axis.

    Returns:
      [B, 2n, 2n, 2n, C]; n along an axis whose step is 1.
    """
    for axis in (axis for axis, by in enumerate(step, start=1) if by == 2):
        n = x.shape[axis] - 2
        before, here, after = (lax.slice_in_dim(x, i, i + n, axis=axis) for i in range(3))
        halves = jnp.stack([0.25 * before + 0.75 * here, 0.75 * here + 0.25 * after], axis=axis + 1)
        x = halves.reshape(*x.shape[:axis], 2 * n, *x.shape[axis + 1 :])
    return x
