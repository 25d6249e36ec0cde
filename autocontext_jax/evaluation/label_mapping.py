"""What the classes of a data set are to those of a checkpoint, and scores of its masks by them."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence

import numpy as np

from autocontext_jax.data.labels import IGNORE, LabelSpec, last_class
from autocontext_jax.data.layouts import Case
from autocontext_jax.errors import UserError
from autocontext_jax.evaluation import metrics


@dataclasses.dataclass(frozen=True)
class LabelMapping:
    """What a data set's label maps are to a checkpoint.

    Attributes:
      theirs: labels of the data set.
      ours: labels of the checkpoint.
      classes: [K of theirs] the checkpoint's class that each class of the data set is; 0 where it does not know it.
    """

    theirs: LabelSpec
    ours: LabelSpec
    classes: tuple[int, ...]

    @classmethod
    def same(cls, labels: LabelSpec) -> "LabelMapping":
        """Of the data set that a checkpoint was trained on."""
        return cls(labels, labels, tuple(range(len(labels.classes))))

    @property
    def annotated(self) -> tuple[str, ...]:
        """Names of the checkpoint's classes that the data set annotates, in their order."""
        return tuple(name for number, name in enumerate(self.ours.classes) if number and number in self.classes)

    def annotated_by(self, case: Case) -> tuple[str, ...]:
        """Those of `annotated` that a case annotates; one that several of its classes make up, if it does all."""
        known = self.theirs.known(case.annotated)
        unknown = {ours for ours, is_known in zip(self.classes, known, strict=True) if not is_known}
        return tuple(name for name in self.annotated if self.ours.classes.index(name) not in unknown)

    @functools.cached_property
    def _truth(self) -> np.ndarray:
        """[K, 256] bool: whether a voxel of a stored number is of a class of the checkpoint."""
        table = np.zeros((len(self.ours.classes), IGNORE + 1), bool)
        for ours, row in zip(self.classes, self.theirs.membership, strict=True):
            table[ours] |= row
        return table

    def shown(self, truth: np.ndarray) -> np.ndarray:
        """A stored label map by classes of the checkpoint, [D, H, W] uint8; of regions the last that holds a voxel."""
        return last_class(self._truth)[truth]

    def scores(
        self,
        mask: np.ndarray,
        truth: np.ndarray,
        case: Case,
        spacing: tuple[float, float, float],
        *,
        tolerance: float,
        extra: Mapping[str, metrics.Metric] | None = None,
    ) -> dict[str, dict[str, float]]:
        """Scores of a predicted mask, as `metrics.scores` gives them.

        Voxels that nobody labelled are background in both. A region is the union of the values that a written mask
        shows and that the label map holds.

        Args:
          mask: [D, H, W] uint8, numbers of the checkpoint's classes; of regions the last that holds a voxel.
          truth: [D, H, W] uint8, the case's stored label map.
          case: whose label map it is.
          spacing: mm, (z, y, x).
          tolerance: mm, of the surface Dice.
          extra: further metrics by name.

        Returns:
          {name: {metric: value}} of the classes in `annotated`; every metric is NaN where the case does not annotate
          the class.
        """
        if self.theirs.ignore >= 0:
            mask = np.where(truth == IGNORE, 0, mask).astype(np.uint8)
        own, named = self.annotated_by(case), list(self.ours.classes)
        scored: dict[str, dict[str, float]] = {}
        if self.ours.regions or self.theirs.regions:
            shown = self.ours.mask_membership
            for name in own:  # they may overlap: each has masks of its own
                row = named.index(name)
                predicted, true = shown[row][mask].view(np.uint8), self._truth[row][truth].view(np.uint8)
                scored |= metrics.scores(predicted, true, (name,), spacing, tolerance=tolerance, extra=extra)
        elif own:
            scored = metrics.scores(mask, self.shown(truth), named[1:], spacing, tolerance=tolerance, extra=extra)
        absent = dict.fromkeys((*metrics.METRICS, *(extra or {})), math.nan)
        return {name: scored[name] if name in own else dict(absent) for name in self.annotated}


def label_mapping(theirs: LabelSpec, ours: LabelSpec, names: Sequence[str], place: str) -> LabelMapping:
    """The checkpoint's class of each of a data set's classes.

    Args:
      theirs: labels of the data set.
      ours: labels of the checkpoint.
      names: "theirs=ours" for each class that the data set calls otherwise.
      place: where the data set lies, for messages.

    Raises:
      UserError: an unknown name, or no class in common.
    """
    known = {name: number for number, name in enumerate(ours.classes) if number}
    found = {name: name for name in theirs.classes[1:] if name in known}
    for pair in names:
        name, _, own = pair.partition("=")
        if name not in theirs.classes[1:] or own not in known:
            raise UserError(
                f"config key evaluate.label_mapping holds {pair!r}; expected THEIRS=OURS with one of "
                f"{theirs.classes[1:]} of {place} and one of {ours.classes[1:]} of the checkpoint"
            )
        found[name] = own
    if not found:
        raise UserError(
            f"data set {place} has the classes {theirs.classes[1:]}, the checkpoint knows {ours.classes[1:]}: "
            "name those that are the same, --config.evaluate.label_mapping=\"('theirs=ours',)\""
        )
    return LabelMapping(theirs, ours, tuple(known[found[name]] if name in found else 0 for name in theirs.classes))
