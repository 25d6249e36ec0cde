"""Scores of a predicted mask against the true one on the same grid.

If a class is in neither mask, all its scores are NaN, and the case does not count in the statistics of that class. If
it is in only one of the masks, its Dice, Jaccard index and surface Dice are 0 and its distances infinite.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from scipy import ndimage, spatial

# Names of the metrics of `scores`.
METRICS = (
    "dice", "jaccard", "volume_difference", "hausdorff_95", "surface_distance", "surface_dice",
    "true_positives", "false_positives", "false_negatives",
)  # fmt: skip

Box = tuple[slice, ...]
# A metric from outside the package: of the voxels of a class in prediction and truth, [D, H, W] bool each, one of which
# may be empty, and the spacing in mm, (z, y, x); a number. Infinity counts the class as missed.
Metric = Callable[[np.ndarray, np.ndarray, tuple[float, float, float]], float]


def scores(
    prediction: np.ndarray,
    truth: np.ndarray,
    classes: Sequence[str],
    spacing: tuple[float, float, float],
    *,
    tolerance: float,
    extra: Mapping[str, Metric] | None = None,
) -> dict[str, dict[str, float]]:
    """Every metric of every class.

    The surface of a class is the set of its voxels with a face neighbour of another class or outside the scan.
    Distances are between the centres of such voxels. Memory beyond the masks: a few bytes for each voxel of the largest
    class's bounding box, and the coordinates of its surfaces.

    Args:
      prediction: [D, H, W], integers; value k is the class `classes[k - 1]`, 0 is background.
      truth: as `prediction`.
      classes: names without the background.
      spacing: mm, (z, y, x).
      tolerance: mm, of the surface Dice.
      extra: further metrics by name.

    Returns:
      {class: {metric: value}}. Let P and T be the voxels of the class in prediction and truth, and d(p, T) the distance
      from a surface voxel p of P to the nearest surface voxel of T, d(t, P) the other way round. The metrics are
        dice: 2 |P ∩ T| / (|P| + |T|);
        jaccard: |P ∩ T| / |P ∪ T|;
        volume_difference: |P| - |T|, mL;
        hausdorff_95: the larger of the 95th percentiles of d(p, T) and of d(t, P), mm;
        surface_distance: the mean of all d(p, T) and d(t, P), mm;
        surface_dice: the fraction of all d(p, T) and d(t, P) within the tolerance (Nikolov et al., 2018; here each
          surface voxel counts once, there each surface element counts by its area);
        true_positives, false_positives, false_negatives: numbers of voxels.
    """
    confusion = confusion_matrix(prediction, truth, len(classes) + 1)
    boxes, true_boxes = (ndimage.find_objects(mask, len(classes)) for mask in (prediction, truth))
    millilitres = math.prod(spacing) / 1000
    result = {}
    for k, name in enumerate(classes, start=1):
        both = int(confusion[k, k])
        predicted, true = int(confusion[:, k].sum()), int(confusion[k].sum())
        union = predicted + true - both
        predicted_surface = surface(prediction, k, boxes[k - 1], spacing)
        true_surface = surface(truth, k, true_boxes[k - 1], spacing)
        result[name] = {
            "dice": 2 * both / (predicted + true) if union else math.nan,
            "jaccard": both / union if union else math.nan,
            "volume_difference": (predicted - true) * millilitres if union else math.nan,
            **surface_scores(predicted_surface, true_surface, tolerance),
            "true_positives": both if union else math.nan,
            "false_positives": predicted - both if union else math.nan,
            "false_negatives": true - both if union else math.nan,
        }
        for metric, function in (extra or {}).items():
            result[name][metric] = float(function(prediction == k, truth == k, spacing)) if union else math.nan
    return result


def confusion_matrix(prediction: np.ndarray, truth: np.ndarray, num_classes: int) -> np.ndarray:
    """Counts voxels by their true class (rows) and predicted class (columns).

    Args:
      prediction: [D, H, W], integers in [0, K).
      truth: as `prediction`.
      num_classes: K, with the background.

    Returns:
      [K, K] int64.
    """
    total = np.zeros(num_classes**2, np.int64)
    # Plane by plane: the pairs take 8 bytes a voxel, too much for a whole scan at once.
    for truth_plane, prediction_plane in zip(truth, prediction, strict=True):
        pairs = truth_plane.astype(np.intp) * num_classes + prediction_plane
        total += np.bincount(pairs.ravel(), minlength=num_classes**2)
    return total.reshape(num_classes, num_classes)


def surface(mask: np.ndarray, k: int, box: Box | None, spacing: tuple[float, float, float]) -> np.ndarray:
    """The surface voxels of one class, as `scores` defines them.

    Args:
      mask: [D, H, W], integers.
      k: value of the class.
      box: bounding box of the class in the mask, None if the mask does not contain it.
      spacing: mm, (z, y, x).

    Returns:
      [n, 3], centres of the voxels in mm from the centre of the scan's first voxel.
    """
    if box is None:
        return np.zeros((0, 3))
    region = np.pad(mask[box] == k, 1)
    inner = (slice(1, -1),) * 3
    inside = region[inner].copy()
    for axis in range(3):
        if mask.shape[axis] == 1:
            continue  # of a single slice it is the contour in the plane
        for step in (slice(None, -2), slice(2, None)):
            inside &= region[(*inner[:axis], step, *inner[axis + 1 :])]
    corner = [edge.start for edge in box]
    return (np.argwhere(region[inner] & ~inside) + corner) * np.asarray(spacing)


def surface_scores(predicted: np.ndarray, true: np.ndarray, tolerance: float) -> dict[str, float]:
    """The distance metrics of `scores`.

    Args:
      predicted: [n, 3], surface voxels of the class in the prediction, mm.
      true: [m, 3], those in the truth, mm.
      tolerance: mm.

    Returns:
      {"hausdorff_95", "surface_distance", "surface_dice"}.
    """
    if not len(predicted) and not len(true):
        return dict.fromkeys(("hausdorff_95", "surface_distance", "surface_dice"), math.nan)
    if not len(predicted) or not len(true):
        return {"hausdorff_95": math.inf, "surface_distance": math.inf, "surface_dice": 0.0}
    to_true = spatial.KDTree(true).query(predicted, workers=-1)[0]
    to_predicted = spatial.KDTree(predicted).query(true, workers=-1)[0]
    both = np.concatenate([to_true, to_predicted])
    return {
        "hausdorff_95": float(max(np.percentile(to_true, 95), np.percentile(to_predicted, 95))),
        "surface_distance": float(both.mean()),
        "surface_dice": float((both <= tolerance).mean()),
    }
