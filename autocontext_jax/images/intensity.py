"""From the voxels of a scan's files to what is stored of them: see `spec`."""

import logging
from collections.abc import Sequence

import numpy as np
from scipy import ndimage

from autocontext_jax.errors import UserError
from autocontext_jax.images.checks import not_finite
from autocontext_jax.images.spec import ImageSpec

log = logging.getLogger(__name__)

# The smallest standard deviation or range that values are divided by, as in nnU-Net: of a constant image 0 remains.
SMALLEST = 1e-8
# Voxels of the box around what is not 0, as a share of all: below it the background counts as cut out, as in nnU-Net.
CUT_OUT = 0.75


def stored_voxels(name: str, channels: Sequence[np.ndarray], spec: ImageSpec) -> np.ndarray:
    """The channels of a scan as they are stored.

    Args:
      name: of the scan, for messages.
      channels: [C] of [D, H, W] integers or floats, as files hold them.
      spec: see there.

    Returns:
      [C, D, H, W] of the type `spec.dtype`, C-contiguous: HU of CT, normalised values of other channels.

    Raises:
      UserError: a voxel is not finite; a value is no grey value of 8 bits, where the channel needs one.
    """
    if spec.dtype == np.int16:
        if len(channels) == 1:
            return _as_int16(name, channels[0])[None]
        return np.stack([_as_int16(name, channel) for channel in channels])
    voxels = np.empty((len(channels), *channels[0].shape), np.float32)
    for channel, target in zip(channels, voxels, strict=True):
        with np.errstate(over="ignore"):  # to infinity, which is refused
            np.copyto(target, channel, casting="unsafe")
        if not np.isfinite(target).all():
            raise not_finite(name, int(np.count_nonzero(~np.isfinite(target))))
    z_scored = any(channel.normalization == "zscore" for channel in spec.channels)
    mask, box = shown(voxels) if z_scored else (np.array(True), ())
    for own, target in zip(spec.channels, voxels, strict=True):
        if own.normalization == "zscore":
            found = target[mask] if spec.cut_out else target[box]
            mean, std = float(found.mean(dtype=np.float64)), float(found.std(dtype=np.float64))
            target -= np.float32(mean)
            target /= np.float32(max(std, SMALLEST))
            if spec.cut_out:
                target[~mask] = 0
        elif own.normalization == "rescale_to_0_1":
            target -= target.min()
            target /= max(float(target.max()), SMALLEST)
        elif own.normalization == "rgb_to_0_1":
            low, high = float(target.min()), float(target.max())
            if low < 0 or high > 255:
                raise UserError(
                    f"{name}: the channel {own.name} has values from {low:g} to {high:g}; expected 0 to 255, as it is "
                    "normalised by rgb_to_0_1: choose another data.normalization"
                )
            target /= 255
    return voxels


def looks_like_ct(voxels: np.ndarray) -> bool:
    """Whether a channel's values can be HU: the lowest is at most -200 (air or lung) and they span 200 or more.

    MRI, scans scaled to [0, 1] and scanner values stored without their offset of -1024 all fail it. A CT cut out so
    tightly that it holds no air fails too: warn, do not refuse.
    """
    low, high = int(voxels.min()), int(voxels.max())
    return low <= -200 and high - low >= 200


def shown(voxels: np.ndarray) -> tuple[np.ndarray, tuple[slice, ...]]:
    """What a scan shows, as nnU-Net finds it: where any channel is not 0, without holes.

    Args:
      voxels: [C, D, H, W] as files hold them.

    Returns:
      [D, H, W] bool, and its bounding box; all of the scan where every voxel is 0.
    """
    mask = (voxels != 0).any(axis=0)
    if not mask.any():
        mask = ~mask
    elif not mask.all():
        mask = ndimage.binary_fill_holes(mask)
    return mask, ndimage.find_objects(mask.astype(np.uint8))[0]


def share_shown(voxels: np.ndarray) -> float:
    """The voxels of the box around what a scan shows, as a share of all; [C, D, H, W] as files hold them."""
    _, box = shown(voxels)
    shape = voxels.shape[1:]
    return float(np.prod([(s.stop - s.start) / size for s, size in zip(box, shape, strict=True)]))


def _as_int16(name: str, stored: np.ndarray) -> np.ndarray:
    """A C-contiguous int16 array of an integer or float one, clipped; a plane at a time, as floats are large."""
    if stored.dtype == np.int16:
        return np.ascontiguousarray(stored)
    voxels = np.empty(stored.shape, np.int16)
    limits, clipped = np.iinfo(np.int16), 0
    for plane, target in zip(stored, voxels, strict=True):
        if not np.isfinite(plane).all():
            raise not_finite(name, int(np.count_nonzero(~np.isfinite(stored))))
        rounded = np.rint(plane) if plane.dtype.kind == "f" else plane
        inside = rounded.clip(limits.min, limits.max)
        clipped += int(np.count_nonzero(inside != rounded))
        np.copyto(target, inside, casting="unsafe")
    if clipped:
        log.warning("%s has %d voxels outside %d to %d HU: they are clipped", name, clipped, limits.min, limits.max)
    return voxels
