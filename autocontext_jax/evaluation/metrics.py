"""Scores of a mask against the truth on the same grid.

Where an organ is in neither mask every score is NaN, which leaves the case out of that organ's statistics. Where it is
in one alone, Dice, Jaccard and surface Dice are 0 and distances infinite.
"""

import math
from collections.abc import Sequence

import numpy as np
from scipy import ndimage, spatial

Box = tuple[slice, ...]


def scores(
    prediction: np.ndarray,
    truth: np.ndarray,
    organs: Sequence[str],
    spacing: tuple[float, float, float],
    *,
    tolerance: float,
) -> dict[str, dict[str, float]]:
    """Every metric of every organ.

    Distances are between surfaces: the centres of an organ's voxels that have a face neighbour outside it, or outside
    the scan. Memory beside the masks is a few bytes a voxel of the largest organ's box, and its surfaces' coordinates.

    Args:
      prediction: [D, H, W], integers; class k is `organs[k - 1]`.
      truth: the same shape and meaning.
      organs: names without the background.
      spacing: mm, (z, y, x).
      tolerance: of the surface Dice, mm.

    Returns:
      {organ: {metric: value}}, where with P and T the sets of voxels and d(p, T) the distance of a surface voxel p to
      the nearest of T's
        dice: 2 |P ∩ T| / (|P| + |T|);
        jaccard: |P ∩ T| / |P ∪ T|;
        volume_difference: |P| - |T|, mL;
        hausdorff_95: the larger of the 95th percentiles of d(p, T) and of d(t, P), mm;
        surface_distance: mean of all d(p, T) and d(t, P), mm;
        surface_dice: share of all d(p, T) and d(t, P) within the tolerance (Nikolov et al., 2018, on voxel centres);
        true_positives, false_positives, false_negatives: voxels.
    """
    confusion = confusion_matrix(prediction, truth, len(organs) + 1)
    boxes, true_boxes = (ndimage.find_objects(mask, len(organs)) for mask in (prediction, truth))
    millilitres = math.prod(spacing) / 1000
    result = {}
    for k, organ in enumerate(organs, start=1):
        both = int(confusion[k, k])
        predicted, true = int(confusion[:, k].sum()), int(confusion[k].sum())
        union = predicted + true - both
        predicted_surface = surface(prediction, k, boxes[k - 1], spacing)
        true_surface = surface(truth, k, true_boxes[k - 1], spacing)
        result[organ] = {
            "dice": 2 * both / (predicted + true) if union else math.nan,
            "jaccard": both / union if union else math.nan,
            "volume_difference": (predicted - true) * millilitres if union else math.nan,
            **surface_scores(predicted_surface, true_surface, tolerance),
            "true_positives": both if union else math.nan,
            "false_positives": predicted - both if union else math.nan,
            "false_negatives": true - both if union else math.nan,
        }
    return result


def confusion_matrix(prediction: np.ndarray, truth: np.ndarray, classes: int) -> np.ndarray:
    """Voxels of every true class (rows) that were given every class (columns): [K, K] int64."""
    total = np.zeros(classes**2, np.int64)
    for truth_plane, prediction_plane in zip(truth, prediction, strict=True):  # a whole scan's pairs need 8 bytes each
        pairs = truth_plane.astype(np.intp) * classes + prediction_plane
        total += np.bincount(pairs.ravel(), minlength=classes**2)
    return total.reshape(classes, classes)


def surface(mask: np.ndarray, k: int, box: Box | None, spacing: tuple[float, float, float]) -> np.ndarray:
    """Centres of class k's surface voxels: [n, 3], mm from the scan's first voxel; `box` holds them, None if none."""
    if box is None:
        return np.zeros((0, 3))
    organ = np.pad(mask[box] == k, 1)
    inner = (slice(1, -1),) * 3
    inside = organ[inner].copy()
    for axis in range(3):
        for step in (slice(None, -2), slice(2, None)):
            inside &= organ[(*inner[:axis], step, *inner[axis + 1 :])]
    corner = [edge.start for edge in box]
    return (np.argwhere(organ[inner] & ~inside) + corner) * np.asarray(spacing)


def surface_scores(predicted: np.ndarray, true: np.ndarray, tolerance: float) -> dict[str, float]:
    """The distances' metrics of `scores` from two surfaces, [n, 3] and [m, 3] mm."""
    if not len(predicted) and not len(true):
        return dict.fromkeys(("hausdorff_95", "surface_distance", "surface_dice"), math.nan)
    if not len(predicted) or not len(true):
        return {"hausdorff_95": math.inf, "surface_distance": math.inf, "surface_dice": 0.0}
    there = spatial.KDTree(true).query(predicted, workers=-1)[0]
    back = spatial.KDTree(predicted).query(true, workers=-1)[0]
    both = np.concatenate([there, back])
    return {
        "hausdorff_95": float(max(np.percentile(there, 95), np.percentile(back, 95))),
        "surface_distance": float(both.mean()),
        "surface_dice": float((both <= tolerance).mean()),
    }
