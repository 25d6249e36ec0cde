"""How much memory a tile takes, by the compiler's own figure, and how much there is."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from autocontext_jax.geometry import Triple
from autocontext_jax.inference.context import CONTEXT_DTYPE
from autocontext_jax.runtime import free_memory


def free_bytes() -> float:
    """Of the first device's memory what a tile may take: 0.8 of what is free; on CPUs half, as others use it too."""
    device = jax.local_devices()[0].memory_stats()
    if device and "bytes_limit" in device:
        return 0.8 * (device["bytes_limit"] - device["bytes_in_use"])
    return 0.5 * free_memory()


def bytes_a_voxel(program: Any, state: Any, tile: Triple, context: Triple | None, classes: int) -> float:
    """Bytes that the predictor's program for a tile takes for each voxel of it, which hardly depends on its size.

    Args:
      program: jitted, see `predictor`; it is compiled for this tile, and not run.
      state: of the model, which is not counted.
      tile: voxels along z, y, x.
      context: voxels of the coarser level's maps; None at level 1.
      classes: K.
    """
    slab = jax.ShapeDtypeStruct((*tile, classes), jnp.float32)
    image = jax.ShapeDtypeStruct(tile, jnp.int16)
    weights = tuple(jax.ShapeDtypeStruct((size,), jnp.float32) for size in tile)
    place = jax.ShapeDtypeStruct((3,), jnp.int32)
    maps = None if context is None else (jax.ShapeDtypeStruct((*context, classes), CONTEXT_DTYPE),)
    offset = None if maps is None else place
    needed = program.lower((slab,), state, image, maps, weights, place, offset).compile().memory_analysis()
    own = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    return (needed.temp_size_in_bytes + needed.argument_size_in_bytes - own) / float(np.prod(tile))
