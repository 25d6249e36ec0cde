"""How much memory a tile takes, by the compiler's own figure, and how much there is."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from autocontext_jax.geometry import Triple
from autocontext_jax.inference.context import MAP_DTYPE, context_size
from autocontext_jax.inference.tiling import map_chunk
from autocontext_jax.models.pyramid import PyramidConfig
from autocontext_jax.runtime import free_memory


def free_bytes() -> float:
    """Of the first device's memory what a tile may take: 0.8 of what is free; on CPUs half, as others use it too."""
    device = jax.local_devices()[0].memory_stats()
    if device and "bytes_limit" in device:
        return 0.8 * (device["bytes_limit"] - device["bytes_in_use"])
    return 0.5 * free_memory()


def bytes_a_voxel(
    program: Any,
    state: Any,
    tile: Triple,
    *,
    pyramid: PyramidConfig,
    level: int,
    devices: int = 1,
) -> float:
    """Bytes that the predictor's program takes for each voxel of a tile, which hardly depends on the tile's size.

    Args:
      program: of `tile_programs.make_tile_program`; it is compiled for this tile, and not run.
      state: of the model, which is not counted.
      tile: voxels along z, y, x.
      pyramid: of the model.
      level: of the program, 1 = coarsest.
      devices: how many tiles the program takes, one for each device.
    """
    arguments = tile_arguments(tile, pyramid=pyramid, level=level, devices=devices)
    needed = program.lower(state, *arguments).compile().memory_analysis()
    own = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    taken = needed.temp_size_in_bytes + needed.argument_size_in_bytes + needed.output_size_in_bytes - own
    return taken / float(np.prod(tile))


def tile_arguments(tile: Triple, *, pyramid: PyramidConfig, level: int, devices: int = 1) -> tuple[Any, ...]:
    """Shapes and types of what a program of `tile_programs.make_tile_program` takes after the state."""
    image = pyramid.image
    images = jax.ShapeDtypeStruct((devices, len(image.channels), *tile), image.dtype)
    weights = tuple(jax.ShapeDtypeStruct((devices, size), jnp.float32) for size in tile)
    if level == 1:
        return images, None, weights, None
    size = context_size(tile, pyramid.steps[level - 1])
    maps = (jax.ShapeDtypeStruct((*size, pyramid.classes), MAP_DTYPE),)
    return images, maps, weights, jax.ShapeDtypeStruct((devices, 3), jnp.int32)


def row_bytes(size: int, stride: int, canvas: tuple[int, int], classes: int, *, step: Triple = (2, 2, 2)) -> int:
    """Bytes of the maps beside a tile: those of its row, the coarser level's below them, and planes for a mask.

    Args:
      size: voxels of a tile along z.
      stride: distance between the starts of tiles along z.
      canvas: height and width of all tiles of a row together.
      classes: K.
      step: voxels of the level for one of the coarser level along each axis.
    """
    chunk, plane = map_chunk(size, stride), canvas[0] * canvas[1] * classes
    slabs = -(-size // chunk) * chunk * plane * np.dtype(MAP_DTYPE).itemsize
    # The coarser level has an eighth of the voxels if it halves all axes, its context in whole chunks up to twice of
    # that. A mask takes about ten planes in float32.
    return slabs + 2 * slabs // math.prod(step) + 10 * plane * 4
