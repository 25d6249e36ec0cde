"""Reads crops of a prepared case; the files are described in `format.py`."""

import dataclasses
import functools
import json
import math
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorstore as ts

from autocontext_jax.data.histograms import VALUES
from autocontext_jax.data.store.format import (
    CHUNK,
    FORMAT,
    REMEDY,
    SHARD,
    array_spec,
    case_path,
    case_url,
    read_attributes,
    storage_errors,
)
from autocontext_jax.errors import UserError
from autocontext_jax.geometry import Spacing, times
from autocontext_jax.images.spec import Channel, ImageSpec


@dataclasses.dataclass(frozen=True)
class Crop:
    """A crop of one level that is being read: image and label, on their way at once.

    Attributes:
      case: whose.
      arrays: image [C, D, H, W] and label [D, H, W] uint8; where the scan does not reach, padding and background.
      reads: futures of what fills the rest of them; none if the crop misses the scan.
    """

    case: "PreparedCase"
    arrays: tuple[np.ndarray, np.ndarray]
    reads: tuple[Any, ...]

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """Waits; returns the arrays.

        Raises:
          UserError: a chunk is damaged or missing.
        """
        with storage_errors(self.case.root, self.case.name, "read"):
            for read in self.reads:
                read.result()
        return self.arrays


@dataclasses.dataclass(frozen=True)
class PreparedCase:
    """A prepared case to read from; cheap, safe to share among threads and to send to other processes.

    Attributes:
      root: folder or URL of the store.
      name: the case's.
      labels: [K] names of the classes, background first.
      spacing: mm of the finest level, (z, y, x).
      factors: [S] native voxels per voxel along (z, y, x), coarsest level first.
      shapes: [S] voxels (z, y, x), coarsest level first.
      image: of the channels, as far as it is known which values are stored; not the window of CT.
      foreground_offsets: [V]; entries [n - 1] to [n] of the foreground are the voxels of number n; none if all are 0.
      known: [K] whether the case annotates each class.
      cache_bytes: most memory for decompressed chunks, shared by all cases of this process that have the same number
        here: what is read often stays, whichever case it is of.
    """

    root: str
    name: str
    labels: tuple[str, ...]
    spacing: Spacing
    factors: tuple[Spacing, ...]
    shapes: tuple[tuple[int, int, int], ...]
    image: ImageSpec
    foreground_offsets: tuple[int, ...]
    known: tuple[bool, ...]
    cache_bytes: int = 0

    @classmethod
    def open(cls, root: str, name: str, cache_bytes: int = 0) -> "PreparedCase":
        """Reads a case's description; its arrays are opened by the first read.

        Raises:
          UserError: the case is missing or incomplete, or of another format.
        """
        ours = read_attributes(root, name)
        if not ours:
            raise UserError(f"{case_path(root, name)} is missing, incomplete or damaged: {REMEDY}")
        if ours.get("format") != FORMAT:
            raise UserError(f"{case_path(root, name)} has the format {ours.get('format')}, expected {FORMAT}: {REMEDY}")
        try:
            labels, offsets = tuple(ours["labels"]), tuple(map(operator.index, ours["foreground_offsets"]))
            known = tuple(map(bool, ours["known"]))
            factors = tuple(_three(float, row) for row in ours["factors"])
            shapes = tuple(_three(operator.index, row) for row in ours["shapes"])
            spacing = times(_three(float, ours["native"]["spacing"]), factors[-1])
            image = ImageSpec(tuple(Channel("", scheme) for scheme in ours["channels"]))
            whole = all(isinstance(label, str) for label in labels) and len(shapes) == len(factors)
            whole &= all(0 < size < 2**32 for shape in shapes for size in shape)
            whole &= len(offsets) == operator.index(ours["numbers"]) and [0, *offsets] == sorted([0, *offsets])
            whole &= len(known) == len(labels)
            whole &= bool(np.isfinite(spacing).all()) and all(0 < f < 1e9 for row in (spacing, *factors) for f in row)
        except (KeyError, IndexError, TypeError, ValueError, OverflowError):
            whole = False
        if not whole:
            raise UserError(f"{case_path(root, name)} has a description that is not what was written: {REMEDY}")
        return cls(root, name, labels, spacing, factors, shapes, image, offsets, known, cache_bytes)

    def read(
        self,
        level: int,
        start: tuple[int, int, int],
        size: tuple[int, int, int],
        into: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> Crop:
        """Starts to read a crop, and returns at once.

        Args:
          level: 1 = coarsest.
          start: the level's voxel at the crop's corner, (z, y, x); may be negative or beyond the scan.
          size: voxels, (z, y, x).
          into: image [C, *size] and label uint8 of `size` to read into, such as views of a batch; new ones if not
            given.
        """
        spec = self.image
        crops = into or (np.empty((len(spec.channels), *size), spec.dtype), np.empty(size, np.uint8))
        for crop, outside in zip(crops, (spec.padding, 0), strict=True):
            crop[...] = outside
        shape = self.shapes[level - 1]
        first = np.clip(start, 0, shape)
        last = np.clip(np.add(start, size), 0, shape)
        if (last <= first).any():
            return Crop(self, crops, ())
        inside: Any = (
            ...,
            *(slice(*edges) for edges in (np.stack([first, last], 1) - np.array(start)[:, None]).tolist()),
        )
        box = (..., *(slice(*edges) for edges in np.stack([first, last], 1).tolist()))
        arrays = self._arrays[f"level_{level}/"], self._arrays[f"labels/classes/level_{level}/"]
        # Chunks are decoded straight into their places: no copy, and no memory that is new to the process each time.
        reads = (ts.array(crop[inside]).write(array[box]) for crop, array in zip(crops, arrays, strict=True))
        return Crop(self, crops, tuple(reads))

    def foreground_voxel(self, number: int) -> tuple[int, int, int]:
        """The finest level's voxel (z, y, x) at this place of the foreground.

        Raises:
          UserError: its chunk is damaged or missing.
        """
        array = self._arrays["foreground/"]
        with storage_errors(self.root, self.name, "read"):
            flat = array[number].read().result()
            z, y, x = np.unravel_index(int(flat), self.shapes[-1])  # a ValueError if it lies outside
        return int(z), int(y), int(x)

    def intensities(self) -> np.ndarray:
        """What `histograms.histograms` counted, [channels of CT, 65536]."""
        with storage_errors(self.root, self.name, "read"):
            return self._arrays["intensities/"].read().result().reshape(len(self.image.ct), -1)

    @functools.cached_property
    def _arrays(self) -> dict[str, Any]:
        levels = [f"level_{level}/" for level in range(1, len(self.shapes) + 1)]
        names = ["foreground/", "intensities/", *levels, *(f"labels/classes/{level}" for level in levels)]
        with storage_errors(self.root, self.name, "read"):
            url = case_url(self.root, self.name)
            described = ts.KvStore.open(url).result()
            for read in [described.read(f"{name}zarr.json") for name in names]:
                _check_depth(read.result().value)
            opening = [
                ts.open(array_spec(url + name), read=True, recheck_cached=False, context=shared_cache(self.cache_bytes))
                for name in names
            ]
            arrays = {name: array.result() for name, array in zip(names, opening, strict=True)}
            expected: dict[str, tuple[tuple[int, ...], str]] = {
                "foreground/": (self.foreground_offsets[-1:], "uint32"),
                "intensities/": ((len(self.image.ct) * VALUES,), "uint32"),
            }
            channels, dtype = len(self.image.channels), self.image.dtype.name
            for level, shape in zip(levels, self.shapes, strict=True):
                expected |= {level: ((channels, *shape), dtype), f"labels/classes/{level}": (shape, "uint8")}
            for name, (size, dtype) in expected.items():  # what an array says of itself carries no checksum
                found = arrays[name]
                if (found.shape, found.dtype.name) != (size, dtype):
                    raise ValueError(f"{name}zarr.json has {found.shape} {found.dtype.name}, expected {size} {dtype}")
                # A piece is decoded at once: it takes its memory whatever the file holds.
                layout = found.chunk_layout
                piece, file = ([n or 0 for n in part.shape or ()] for part in (layout.read_chunk, layout.write_chunk))
                if math.prod(piece) > channels * CHUNK**3 or math.prod(file) > channels * SHARD**3:
                    raise ValueError(f"{name}zarr.json has pieces of {piece} in files of {file}, more than are written")
            return arrays


@functools.cache
def shared_cache(cache_bytes: int) -> ts.Context:
    """The cache of this size that every array opened with it shares."""
    return ts.Context({"cache_pool": {"total_bytes_limit": cache_bytes}})


def _check_depth(description: bytes) -> None:
    """Raises a ValueError for JSON so deep that TensorStore, which reads it next, would run out of stack and crash."""
    try:
        json.loads(description or "{}")
    except RecursionError:
        raise ValueError("a zarr.json is nested too deep") from None


def _three(kind: Callable[[Any], Any], numbers: Any) -> tuple[Any, Any, Any]:
    """Three numbers of a description, (z, y, x); a ValueError or TypeError if it holds something else."""
    z, y, x = map(kind, numbers)
    return z, y, x
