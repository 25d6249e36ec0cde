"""Which intensities the labelled voxels of CT have, and from them how networks normalise it."""

from collections.abc import Iterable, Sequence

import numpy as np

from autocontext_jax.data.labels import IGNORE

FIRST_VALUE, VALUES = -(2**15), 2**16  # of a histogram: those of int16
SLAB = 32  # planes that are counted together: bounds memory, and each count goes through all values
# Percentiles of the labelled voxels to which CT is clipped, as in nnU-Net.
CLIPPED = (0.5, 99.5)


def histograms(channels: Sequence[np.ndarray], label: np.ndarray) -> np.ndarray:
    """How many labelled voxels of a scan have each value.

    Args:
      channels: [C] of [D, H, W] HU; fractions are rounded, and what is outside int16 counts at its edges.
      label: [D, H, W] of a stored label map; the background and `IGNORE` do not count.

    Returns:
      [C, VALUES] uint32, from FIRST_VALUE.
    """
    counts = np.zeros((len(channels), VALUES), np.uint32)
    for start in range(0, len(label), SLAB):
        slab = label[start : start + SLAB]
        labelled = (slab != 0) & (slab != IGNORE)
        if not labelled.any():
            continue
        for channel, of_channel in zip(channels, counts, strict=True):
            found = channel[start : start + SLAB][labelled]
            if found.dtype != np.int16:
                found = np.rint(found.clip(FIRST_VALUE, FIRST_VALUE + VALUES - 1))
            of_channel += np.bincount(found.astype(np.int32) - FIRST_VALUE, minlength=VALUES).astype(np.uint32)
    return counts


def ct_statistics(cases: Iterable[np.ndarray]) -> tuple[float, float, float, float]:
    """How CT is normalised: the percentiles it is clipped to, mean and standard deviation of the labelled voxels, HU.

    Each case counts equally, however many voxels it has labelled, as in nnU-Net, which draws as many from each.

    Args:
      cases: [VALUES] each, of one channel; at least one voxel is labelled.

    Returns:
      (low, high, mean, std).
    """
    shares = np.zeros(VALUES)
    for counts in cases:
        if total := counts.sum(dtype=np.int64):
            shares += counts / total
    shares /= shares.sum()
    values, below = np.arange(FIRST_VALUE, FIRST_VALUE + VALUES), np.cumsum(shares)
    low, high = (float(values[np.searchsorted(below, percent / 100)]) for percent in CLIPPED)
    mean = float(shares @ values)
    std = float(np.sqrt(shares @ (values - mean) ** 2))
    # Of a constant intensity there is nothing to clip or to divide by.
    return low, max(high, low + 1), mean, std or 1.0
