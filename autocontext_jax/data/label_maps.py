"""A case's label file -> its stored label map, see `labels.py`."""

import logging

import numpy as np

from autocontext_jax.data.labels import IGNORE, LabelSpec
from autocontext_jax.data.layouts import Case
from autocontext_jax.errors import some
from autocontext_jax.images import scans
from autocontext_jax.images.grid import Grid

log = logging.getLogger(__name__)


def read_label_map(case: Case, labels: LabelSpec, like: Grid) -> np.ndarray:
    """Reads a case's label map as stored numbers.

    What a case does not annotate is background in it; a warning says where its label map shows it nevertheless.

    Args:
      case: with a label.
      labels: of its data set.
      like: grid of its image.

    Returns:
      [D, H, W] uint8, canonical: numbers, and `IGNORE` where nobody labelled.

    Raises:
      UserError: see `scans.read_label`.
    """
    assert case.label is not None
    files = case.files or labels.files
    stored = scans.read_label(case.label, values=files.values, numbers=files.numbers, like=like, case=case.name)
    known = np.array(labels.known(case.annotated))
    if known.all():
        return stored
    kept = labels.membership[known].any(axis=0)
    kept[IGNORE] = True
    counts = np.zeros(256, np.int64)
    for plane in stored:  # a plane at a time: counting takes 8 bytes a voxel
        counts += np.bincount(plane.ravel(), minlength=256)
    stray = [labels.number_names[number] for number in np.flatnonzero((counts > 0) & ~kept)]
    if stray:
        log.warning(
            "case %s: %s holds %s, which it is said not to annotate: taken as background", case.name, case.label,
            some(stray),
        )  # fmt: skip
    return np.where(kept, np.arange(256), 0).astype(np.uint8)[stored]
