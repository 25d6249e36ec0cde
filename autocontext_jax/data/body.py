"""The box around the body: outside it there is air, which prediction can leave out."""

import math

import numpy as np
from scipy import ndimage

from autocontext_jax.data.labels import IGNORE

# HU between air and everything of the body but the lungs, which lie inside its box anyway.
THRESHOLD = -500
# A region smaller than this share of the largest is noise. Hands and feet apart from the rest are larger.
SHARE = 0.001
# The regions of a body fill at least this share of their box, though lungs count as air. Vessels inside a lung do not.
FILLED = 0.2
# Voxels of the search's grid by which the box is larger than what is found on it.
MARGIN = 2
# Voxels along an axis beyond which the search takes every second, third, ... voxel.
FINE = 128

Interval = tuple[int, int]


def body_box(image: np.ndarray) -> tuple[Interval, Interval, Interval] | None:
    """The smallest box that holds every large connected region above -500 HU, with a margin.

    In images of other kinds, whose values are not negative, that is everything. It is everything too where the regions
    fill too little of their box to be a body.

    Args:
      image: [D, H, W] int16, HU.

    Returns:
      The voxels [low, high) along z, y, x; None if there is no such region.
    """
    steps = [math.ceil(size / FINE) for size in image.shape]
    coarse = image[tuple(slice(step // 2, None, step) for step in steps)] > THRESHOLD
    labels, count = ndimage.label(coarse)
    if not count:
        return None
    voxels = np.bincount(labels.ravel())[1:]
    large = voxels >= SHARE * voxels.max()
    places = [place for place, kept in zip(ndimage.find_objects(labels), large, strict=True) if kept]
    edges = [
        (min(place[axis].start for place in places), max(place[axis].stop for place in places)) for axis in range(3)
    ]
    if voxels[large].sum() < FILLED * math.prod(high - low for low, high in edges):
        depth, height, width = image.shape
        return (0, depth), (0, height), (0, width)
    box = []
    for (low, high), size, step in zip(edges, image.shape, steps, strict=True):
        box.append((max(0, (low - MARGIN) * step), min(size, (high + MARGIN) * step)))
    z, y, x = box
    return z, y, x


def voxels_outside(image: np.ndarray, label: np.ndarray) -> int:
    """How many labelled voxels lie outside the box around the body: prediction would lose them.

    Args:
      image: [D, H, W] int16, HU.
      label: [D, H, W] of a stored label map; the background and `IGNORE` do not count.
    """
    box = body_box(image)

    def outside(mask: np.ndarray) -> int:
        inside = 0 if box is None else np.count_nonzero(mask[tuple(slice(*edges) for edges in box)])
        return int(np.count_nonzero(mask) - inside)

    lost = outside(label)
    return lost - outside(label == IGNORE) if lost else 0
