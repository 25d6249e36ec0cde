"""The compiled programs of the predictor: one tile's maps, and their sum in the maps of a level."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from autocontext_jax.geometry import Triple
from autocontext_jax.inference.context import MAP_DTYPE, context_size, cut_window
from autocontext_jax.inference.masks import weighted_maps
from autocontext_jax.models.pyramid import Pyramid
from autocontext_jax.runtime import compiler_options


def make_tile_program(graph: Any, level: int, *, mirror_classes: tuple[int, ...] = (), mesh: Mesh | None = None) -> Any:
    """The jitted program that predicts tiles of a level, one on each device.

    Args:
      graph: of the pyramid, see `nnx.split`.
      level: 1 = coarsest.
      mirror_classes: see `predictor.Predictor`.
      mesh: of several devices, with the axis `data`.

    Returns:
      A function of these arguments, which gives the maps times the weights, [n, z, y, x, K] in MAP_DTYPE:
        state: of the model.
        images: [n, C, z, y, x], as they are stored.
        maps: consecutive chunks of the coarser level that contain the tiles' context; None at level 1.
        weights: of each tile along each axis, ([n, z], [n, y], [n, x]).
        offsets: [n, 3], first voxel of each tile's context in `maps`; None at level 1.
    """
    mirror = np.array(mirror_classes, int)

    def predict_tiles(state, images, maps, weights, offsets):
        model: Pyramid = nnx.merge(graph, state, copy=True)
        z, y, x = weights
        weight = z[:, :, None, None] * y[:, None, :, None] * x[:, None, None, :]
        context = None
        if maps is not None:
            size = context_size(shape_of(images[0, 0]), model.config.steps[level - 1])
            context = jax.vmap(lambda offset: cut_window(maps, offset, size))(offsets)
        activation = model.config.activation
        if not mirror.size:
            logits = model.level(level, jnp.moveaxis(images, 1, -1), context)
            return weighted_maps(logits, weight, activation).astype(MAP_DTYPE)
        # Each tile and its mirror image follow each other in the batch, so that one device has both.
        images = _pairs(images, images[..., ::-1])
        if context is not None:
            context = _pairs(context, context[..., ::-1, mirror])
        logits = model.level(level, jnp.moveaxis(images, 1, -1), context)
        plain, mirrored = logits[::2], logits[1::2, :, :, ::-1, mirror]
        both = [weighted_maps(seen, weight / 2, activation) for seen in (plain, mirrored)]
        return (both[0] + both[1]).astype(MAP_DTYPE)

    sharding: dict[str, Any] = {}
    if mesh is not None:
        whole, split = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))
        sharding = {"in_shardings": (whole, split, whole, split, split), "out_shardings": split}
    return jax.jit(predict_tiles, compiler_options=compiler_options(jax.default_backend()), **sharding)


def _pairs(first: jax.Array, second: jax.Array) -> jax.Array:
    """[n, ...] and [n, ...] -> [2n, ...], in turn."""
    return jnp.stack([first, second], axis=1).reshape(-1, *first.shape[1:])


@functools.partial(jax.jit, donate_argnums=0)
def add_tile(slabs: tuple[jax.Array, ...], maps: jax.Array, place: jax.Array) -> tuple[jax.Array, ...]:
    """Adds the maps of a tile to a level's.

    Args:
      slabs: arrays [chunk, canvas height, canvas width, K], consecutive along z.
      maps: [1, z, y, x, K].
      place: [2], first voxel of the tile in the slabs along y and x.

    Returns:
      The slabs, in the same memory.
    """
    start, added, depth = (0, *place, 0), [], slabs[0].shape[0]
    for number, slab in enumerate(slabs):
        part = maps[0, number * depth : (number + 1) * depth]
        added.append(lax.dynamic_update_slice(slab, lax.dynamic_slice(slab, start, part.shape) + part, start))
    return tuple(added)


# Sets a slab to zero in place.
clear: Callable[[jax.Array], jax.Array] = jax.jit(jnp.zeros_like, donate_argnums=0, keep_unused=True)


def shape_of(volume: Any) -> Triple:
    """(D, H, W)."""
    depth, height, width = volume.shape
    return depth, height, width
