"""The box around the body: outside it there is air, which need not be predicted."""

import math

import numpy as np
from scipy import ndimage

# HU between air and everything of the body but the lungs, which lie inside its box anyway.
THRESHOLD = -500
# A region smaller than this share of the largest is noise, or a part of the table. Arms and legs are larger.
SHARE = 0.01
# Voxels of the search's grid by which the box is larger than what is found on it.
MARGIN = 2
# Voxels along an axis beyond which the search takes every second, third, ... voxel.
FINE = 128

Interval = tuple[int, int]


def body_box(image: np.ndarray) -> tuple[Interval, Interval, Interval] | None:
    """The smallest box that holds every large connected region above -500 HU, with a margin.

    In images of other kinds, whose values are not negative, that is everything.

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
    large = [place for place, number in zip(ndimage.find_objects(labels), voxels, strict=True)
             if number >= SHARE * voxels.max()]  # fmt: skip
    box = []
    for axis, (size, step) in enumerate(zip(image.shape, steps, strict=True)):
        low = min(place[axis].start for place in large) - MARGIN
        high = max(place[axis].stop for place in large) + MARGIN
        box.append((max(0, low * step), min(size, high * step)))
    z, y, x = box
    return z, y, x
