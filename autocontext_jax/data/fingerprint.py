"""What a run learns from its training scans, once."""

import concurrent.futures
import dataclasses
import hashlib
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from autocontext_jax.data.datasets import Case
from autocontext_jax.data.survey import Survey
from autocontext_jax.errors import UserError
from autocontext_jax.images import scans
from autocontext_jax.images.intensity import CUT_OUT, share_shown
from autocontext_jax.images.spec import ImageSpec
from autocontext_jax.sections import as_dict, from_dict

Triple = tuple[float, float, float]

FORMAT = 1  # of fingerprint.json
SPACINGS = ("spacing", "smallest", "largest")
LOOKED_AT = 32  # scans from which it is seen whether the background is cut out


@dataclasses.dataclass(frozen=True)
class Fingerprint:
    """Of the scans that a run is trained on, as it was begun.

    Attributes:
      spacing: the median along each axis, mm, (z, y, x).
      smallest: the smallest spacing along each axis, mm.
      largest: the largest.
      image: the channels, and how they are normalised. What CT needs is learned when the cases have been prepared.
      made_from: a checksum of what it depends on: the training cases, and the channels as they are declared; "" of runs
        that recorded none.
      survey: of the labelled cases, once it has been asked for; it is dropped when the fingerprint is made anew.
    """

    spacing: Triple
    smallest: Triple
    largest: Triple
    image: ImageSpec
    made_from: str = ""
    survey: Survey | None = None

    def to_json(self) -> dict[str, Any]:
        """As `fingerprint.json` has it."""
        spacings = {name: getattr(self, name) for name in SPACINGS}
        surveyed = {} if self.survey is None else {"survey": self.survey.to_json()}
        return {"format": FORMAT, **spacings, "image": as_dict(self.image), "made_from": self.made_from, **surveyed}

    @classmethod
    def from_json(cls, content: dict[str, Any], *, place: str, default: ImageSpec) -> "Fingerprint":
        """What `to_json` gave; the first files have no image, and those of runs that were not planned no survey.

        Args:
          content: of the file.
          place: of the file, for messages.
          default: the image of the first files.

        Raises:
          UserError: see `sections.from_dict`.
        """
        image = default
        if "image" in content:
            image = from_dict(ImageSpec, content["image"], place=f"{place}: key", prefix="image.")
        spacing, smallest, largest = (_triple(content[name]) for name in SPACINGS)
        surveyed = Survey.from_json(content.get("survey"))
        return cls(spacing, smallest, largest, image, content.get("made_from", ""), surveyed)


def made_from(cases: Sequence[Case], image: ImageSpec) -> str:
    """A checksum of what `fingerprint` depends on; the arguments are the same, and the cases' checksums are known."""
    content = [as_dict(image), [[case.name, case.checksum, case.annotated] for case in cases]]
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()


def fingerprint(cases: Sequence[Case], image: ImageSpec) -> Fingerprint:
    """The fingerprint of training cases; of their scans only headers are read, but of some where a channel is z-scored.

    Args:
      cases: at least one.
      image: the channels, see `spec.image_spec`.

    Raises:
      UserError: a scan cannot be read.
    """
    with concurrent.futures.ThreadPoolExecutor(8) as pool:  # they wait for the disk
        spacings = np.array(list(pool.map(lambda case: scans.read_grid(case.images).canonical_spacing, cases)))
    learned = image
    if any(channel.normalization == "zscore" for channel in image.channels):
        learned = dataclasses.replace(image, cut_out=_is_cut_out(cases[:: -(-len(cases) // LOOKED_AT)], image))
    median, smallest, largest = (_triple(fold(spacings, axis=0)) for fold in (np.median, np.min, np.max))
    return Fingerprint(median, smallest, largest, learned, made_from(cases, image))


def _is_cut_out(cases: Sequence[Case], image: ImageSpec) -> bool:
    """Whether the background of half of the scans was set to 0, as nnU-Net decides it."""

    def share(case: Case) -> float:
        try:
            _, channels = scans.read_channels(case.images, len(image.channels))
            return share_shown(np.stack(channels))
        except UserError:  # preparing names this case, and all others that cannot be read
            return math.nan

    with concurrent.futures.ThreadPoolExecutor(2) as pool:  # scans in memory
        shares = [found for found in pool.map(share, cases) if not math.isnan(found)]
    return bool(shares) and float(np.median(shares)) < CUT_OUT


def _triple(values: Sequence[float]) -> Triple:
    # Headers hold float32: to seven digits a median of equal spacings is the spacing.
    z, y, x = (float(f"{value:.7g}") for value in values)
    return z, y, x
