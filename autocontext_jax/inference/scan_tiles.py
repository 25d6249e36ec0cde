"""Which tiles a scan is divided into: the box around the body, and for each level boxes within the memory."""

import functools
import logging
import math
from collections.abc import Callable, Sequence

import jax
import numpy as np

from autocontext_jax.data.body import Interval, body_box
from autocontext_jax.errors import UserError
from autocontext_jax.geometry import Triple, along_axes, level_shape
from autocontext_jax.inference.boxes import SMALL, Box, choose_box, tile_stride
from autocontext_jax.inference.tile_memory import free_bytes, row_bytes
from autocontext_jax.inference.tiling import (
    SLICES,
    Blend,
    LevelTiles,
    MakeBlend,
    PredictorConfig,
    pyramid_tiles,
    tile_shape,
)
from autocontext_jax.models.pyramid import PyramidConfig

FITS = 96**3  # a box of so many voxels is taken to fit the memory beside its maps

log = logging.getLogger(__name__)


class ScanTiles:
    """Divides scans into tiles. It remembers which sizes did not fit the memory.

    Args:
      config: how scans are divided.
      pyramid: of the model.
      align: starts and sizes of tiles along each axis are multiples of it.
      blend: weights along an axis of a tile.
      bytes_a_voxel: gives the bytes that a tile takes for each of its voxels; called if a tile may not fit.
    """

    def __init__(
        self,
        config: PredictorConfig,
        pyramid: PyramidConfig,
        *,
        align: Triple,
        blend: MakeBlend,
        bytes_a_voxel: Callable[[], float],
    ):
        self._config, self._pyramid = config, pyramid
        self._align, self._blend, self._bytes_a_voxel = align, blend, bytes_a_voxel
        on_cpu = jax.default_backend() == "cpu"
        self._step = 8 if on_cpu else 4
        self._small = SMALL if not on_cpu and all(np.isfinite(pyramid.spacing)) else ()
        # To measure what a voxel takes is to compile a program too.
        self._unmeasured = SMALL[-1] ** 3 if self._small else FITS
        self._too_large = math.inf  # voxels of the smallest tile that did not fit

    def plan(
        self, native: Triple, factors: Sequence[tuple[float, float, float]], coarsest: np.ndarray | None
    ) -> tuple[tuple[LevelTiles, ...], tuple[Interval, ...]] | None:
        """The tiles of every level, coarsest first, and the voxels [low, high) of the scan along each axis to predict.

        Args:
          native: (D, H, W) of the scan.
          factors: for each level, coarsest first, voxels of the scan per voxel of the level along (z, y, x).
          coarsest: [D', H', W'] HU, the scan on the coarsest level's grid; None if it is no CT, and all of it is tiled.

        Returns:
          None if the scan holds nothing but air.
        """
        box: tuple[Interval, ...] = tuple((0, size) for size in native)
        if self._config.crop_to_body and coarsest is not None:
            found = body_box(coarsest)
            if found is None:
                return None
            box = tuple(
                (math.floor(low * factor), min(size, math.ceil(high * factor)))
                for (low, high), factor, size in zip(found, factors[0], native, strict=True)
            )
        # The voxels of the finest level between which those of the box lie. Tiles follow from the finest grid alone:
        # coarser grids have whole voxels of it, so that contexts nest exactly.
        region = []
        for (low, high), factor, size in zip(box, factors[-1], level_shape(native, factors[-1]), strict=True):
            first, last = (math.floor((voxel + 0.5) / factor - 0.5) for voxel in (low, high - 1))
            region.append((min(max(0, first), size - 1), min(size, max(0, last) + 2)))
        return pyramid_tiles(region, self._pyramid.steps, self._choose, align=self._align), box

    def shrink(self, tiles: tuple[LevelTiles, ...]) -> None:
        """Excludes tiles as large as the largest of these, which did not fit the memory, from now on.

        Raises:
          UserError: there are no smaller ones.
        """
        size = max((tile_shape(axes) for axes in tiles), key=math.prod)
        voxels, name = math.prod(size), "x".join(map(str, size))
        if not self._config.boxes or voxels >= self._too_large:
            smaller = "" if self._config.boxes else ", or a smaller predict.tile"
            raise UserError(
                f"the device has too little free memory for a tile of {name} voxels; expected more of it{smaller}"
            )
        self._too_large = voxels
        log.warning("tiles of %s voxels do not fit the memory: smaller ones are used", name)

    def _choose(self, regions: Sequence[Interval]) -> list[tuple[Blend, int]]:
        """The tiles of a level along z, y, x, see `boxes`."""
        config, seen = self._config, np.isfinite(self._pyramid.spacing)
        if config.boxes:
            # Along an axis that the networks do not look along a tile is a stack of slices.
            covered = [region if looks else (0, SLICES) for region, looks in zip(regions, seen, strict=True)]
            box = choose_box(
                covered, margin=config.margin, align=self._align, blend=self._blend, fits=self._fits, step=self._step,
                small=self._small,
            )  # fmt: skip
            sizes, strides = list(box.size), list(box.stride)
        else:
            sizes = list(along_axes(config.tile))
            strides = [tile_stride(size, config.margin, unit) for size, unit in zip(sizes, self._align, strict=True)]
        return [
            (self._blend(size), stride) if looks else (Blend(np.ones(SLICES, np.float32)), SLICES)
            for size, stride, looks in zip(sizes, strides, seen, strict=True)
        ]

    def _fits(self, box: Box) -> bool:
        voxels = math.prod(box.size)
        if voxels >= self._too_large:
            return False
        step = min(self._pyramid.steps[1:], key=math.prod, default=(2, 2, 2))
        maps = row_bytes(box.size[0], box.stride[0], box.extent[1:], self._pyramid.classes, step=step)
        return maps + (voxels * self._cost if voxels > self._unmeasured else 0) <= self._limit

    @functools.cached_property
    def _cost(self) -> float:
        return self._bytes_a_voxel()

    @functools.cached_property
    def _limit(self) -> float:
        """Bytes that the tiles of a level may take on the device."""
        return 1e9 * self._config.memory if self._config.memory else free_bytes()
