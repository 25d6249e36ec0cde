"""Scores of a mask against the truth on the same grid."""

import math
from collections.abc import Sequence

import numpy as np


def dice_scores(prediction: np.ndarray, truth: np.ndarray, organs: Sequence[str]) -> dict[str, float]:
    """Dice of each organ: 2 |P ∩ T| / (|P| + |T|).

    Args:
      prediction: [D, H, W], integers; class k is `organs[k - 1]`.
      truth: the same shape and meaning.
      organs: names without the background.

    Returns:
      For each organ a value in [0, 1]; NaN where neither mask holds the organ, which leaves the case out of that
      organ's statistics.
    """
    classes = len(organs) + 1
    pairs = truth.ravel().astype(np.intp) * classes + prediction.ravel()
    confusion = np.bincount(pairs, minlength=classes**2).reshape(classes, classes)
    overlap, total = np.diag(confusion), confusion.sum(0) + confusion.sum(1)
    return {
        organ: 2.0 * int(overlap[k]) / int(total[k]) if total[k] else math.nan
        for k, organ in enumerate(organs, start=1)
    }
