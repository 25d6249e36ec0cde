"""Changes of an array's grid by a factor of two: max pooling, depth-to-space, linear upsampling.

Shapes are [B, D, H, W, C]. With 2 spatial dimensions the D slices are images of their own and D stays as it is.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from autocontext_jax.geometry import halving


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def max_pool(x: jax.Array, spatial_dims: int = 3) -> jax.Array:
    """Maximum of each 2x2x2 block, or of each 1x2x2 block with 2 spatial dimensions.

    The gradient goes to the first largest voxel of a block. Only that voxel's number is kept for it, a byte a block.

    Args:
      x: [B, D, H, W, C]; the sizes that are halved must be even.
      spatial_dims: number of spatial dimensions, 3 or 2.

    Returns:
      [B, D/2, H/2, W/2, C] in 3D, [B, D, H/2, W/2, C] in 2D.
    """
    return _max_and_corner(x, spatial_dims)[0]


def _max_and_corner(x: jax.Array, spatial_dims: int) -> tuple[jax.Array, jax.Array]:
    """The largest voxel of each block and its number in the block, 0 to 7 (0 to 3 in 2D), uint8."""
    deep = halving(spatial_dims)[0]
    largest, chosen = x[:, ::deep, ::2, ::2], jnp.uint8(0)
    for number in range(1, 4 * deep):
        i, j, k = number // 4, number // 2 % 2, number % 2
        corner = x[:, i::deep, j::2, k::2]
        chosen = jnp.where(corner > largest, jnp.uint8(number), chosen)
        largest = jnp.maximum(largest, corner)
    return largest, chosen


def _max_pool_backward(spatial_dims, chosen, gradient):
    deep = halving(spatial_dims)[0]
    b, d, h, w, c = gradient.shape
    number = np.arange(4 * deep, dtype=np.uint8).reshape(1, 1, deep, 1, 2, 1, 2, 1)
    shape = (b, d, 1, h, 1, w, 1, c)
    blocks = jnp.where(chosen.reshape(shape) == number, gradient.reshape(shape), 0)
    return (blocks.reshape(b, deep * d, 2 * h, 2 * w, c),)


max_pool.defvjp(_max_and_corner, _max_pool_backward)


def depth_to_space(blocks: jax.Array) -> jax.Array:
    """Depth-to-space (pixel shuffle) by 2: the values of a voxel's block become voxels.

    Args:
      blocks: [B, D, H, W, 8, C], the values of 2x2x2 blocks in the order of their (z, y, x); or [B, D, H, W, 4, C] of
        1x2x2 blocks.

    Returns:
      [B, 2D, 2H, 2W, C]; or [B, D, 2H, 2W, C].
    """
    b, d, h, w, size, c = blocks.shape
    deep = size // 4
    split = blocks.reshape(b, d, h, w, deep, 2, 2, c)
    return split.transpose(0, 1, 4, 2, 5, 3, 6, 7).reshape(b, deep * d, 2 * h, 2 * w, c)


def upsample_by_two(x: jax.Array, spatial_dims: int = 3) -> jax.Array:
    """Doubles the grid by linear interpolation between voxel centres, consuming a halo of one voxel on each side.

    A coarse voxel i covers fine voxels 2i and 2i + 1, whose centres lie a quarter of a coarse voxel before and after
    its own. The halo makes the result exact up to the border, wherever the piece was cut from.

    Args:
      x: [B, n + 2, n + 2, n + 2, C].
      spatial_dims: number of spatial dimensions; with 2 the first of the three axes stays as it is.

    Returns:
      [B, 2n, 2n, 2n, C].
    """
    for axis in (1, 2, 3)[3 - spatial_dims :]:
        n = x.shape[axis] - 2
        before, here, after = (lax.slice_in_dim(x, i, i + n, axis=axis) for i in range(3))
        halves = jnp.stack([0.25 * before + 0.75 * here, 0.75 * here + 0.25 * after], axis=axis + 1)
        x = halves.reshape(*x.shape[:axis], 2 * n, *x.shape[axis + 1 :])
    return x
