"""The compiled programs of the predictor: one tile's maps, and their sum in the maps of a level."""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from autocontext_jax.data.augmentation_ranges import AXES
from autocontext_jax.geometry import Triple
from autocontext_jax.inference.context import MAP_DTYPE, context_size, cut_window
from autocontext_jax.inference.masks import weighted_maps
from autocontext_jax.models.ensemble import Ensemble
from autocontext_jax.models.pyramid import Pyramid
from autocontext_jax.runtime import compiler_options


@dataclasses.dataclass(frozen=True)
class Mirroring:
    """How tiles are predicted as their mirror images too.

    Attributes:
      axes: letters of "zyx"; with n of them a tile is predicted 2^n times, mirrored along each combination of the axes,
        and the maps are averaged. "" predicts it once.
      classes: the output of the network that each of its K outputs becomes where x is mirrored; () if none changes.
    """

    axes: str = ""
    classes: tuple[int, ...] = ()

    @property
    def combinations(self) -> np.ndarray:
        """[2^n, n] bool: along which of the axes each pass mirrors a tile; the first along none."""
        return np.array(list(itertools.product((False, True), repeat=len(self.axes))))

    def apply(self, array: jax.Array, mirrored: jax.Array, *, maps: bool = True) -> jax.Array:
        """The mirror image of tiles; applied twice it gives them back.

        Args:
          array: [n, z, y, x, channels].
          mirrored: a row of `combinations`.
          maps: whether the channels are classes, which change where x is mirrored.
        """
        for number, axis in enumerate(self.axes):
            image = jnp.flip(array, 1 + AXES.index(axis))
            if maps and axis == "x" and self.classes:
                image = image[..., np.array(self.classes)]
            array = jnp.where(mirrored[number], image, array)
        return array


ONCE = Mirroring()


def make_tile_program(graph: Any, level: int, *, mirroring: Mirroring = ONCE, mesh: Mesh | None = None) -> Any:
    """The jitted program that predicts tiles of a level, one on each device.

    Args:
      graph: of the pyramid or ensemble, see `nnx.split`.
      level: 1 = coarsest.
      mirroring: see there.
      mesh: of several devices, with the axis `data`.

    Returns:
      A function of these arguments, which gives the maps times the weights, [n, z, y, x, K] in MAP_DTYPE:
        state: of the model.
        images: [n, C, z, y, x], as they are stored.
        maps: consecutive chunks of the coarser level that contain the tiles' context; None at level 1.
        weights: of each tile along each axis, ([n, z], [n, y], [n, x]).
        offsets: [n, 3], first voxel of each tile's context in `maps`; None at level 1.
    """
    combinations = mirroring.combinations

    def predict_tiles(state, images, maps, weights, offsets):
        model: Pyramid | Ensemble = nnx.merge(graph, state, copy=True)
        z, y, x = weights
        weight = z[:, :, None, None] * y[:, None, :, None] * x[:, None, None, :]
        context = None
        if maps is not None:
            size = context_size(shape_of(images[0, 0]), model.config.steps[level - 1])
            context = jax.vmap(lambda offset: cut_window(maps, offset, size))(offsets)
        activation, images = model.config.activation, jnp.moveaxis(images, 1, -1)
        if not mirroring.axes:
            return weighted_maps(model.level(level, images, context), weight, activation).astype(MAP_DTYPE)

        def add_pass(total, mirrored):
            image = mirroring.apply(images, mirrored, maps=False)
            around = None if context is None else mirroring.apply(context, mirrored)
            logits = nnx.merge(graph, state, copy=True).level(level, image, around)
            logits = mirroring.apply(logits, mirrored)
            return total + weighted_maps(logits, weight / len(combinations), activation), None

        # One pass after the other, so that a tile takes hardly more memory than without; the network is compiled once.
        total = jnp.zeros((*weight.shape, model.config.classes), jnp.float32)
        return lax.scan(add_pass, total, combinations)[0].astype(MAP_DTYPE)

    sharding: dict[str, Any] = {}
    if mesh is not None:
        whole, split = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))
        sharding = {"in_shardings": (whole, split, whole, split, split), "out_shardings": split}
    return jax.jit(predict_tiles, compiler_options=compiler_options(jax.default_backend()), **sharding)


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
