"""What a run learns from its training scans, once."""

import concurrent.futures
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from autocontext_jax.data.datasets import Case
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
    """

    spacing: Triple
    smallest: Triple
    largest: Triple
    image: ImageSpec

    def to_json(self) -> dict[str, Any]:
        """As `fingerprint.json` has it."""
        spacings = {name: getattr(self, name) for name in SPACINGS}
        return {"format": FORMAT, **spacings, "image": as_dict(self.image)}

    @classmethod
    def from_json(cls, content: dict[str, Any], *, place: str, default: ImageSpec) -> "Fingerprint":
        """What `to_json` gave; the first files have no image.

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
        return cls(spacing, smallest, largest, image)


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
    if any(channel.normalization == "zscore" for channel in image.channels):
        image = dataclasses.replace(image, cut_out=_is_cut_out(cases[:: -(-len(cases) // LOOKED_AT)], image))
    median, smallest, largest = (_triple(fold(spacings, axis=0)) for fold in (np.median, np.min, np.max))
    return Fingerprint(median, smallest, largest, image)


def _is_cut_out(cases: Sequence[Case], image: ImageSpec) -> bool:
    """Whether the background of half of the scans was set to 0, as nnU-Net decides it."""

    def share(case: Case) -> float:
        _, channels = scans.read_channels(case.images, len(image.channels))
        return share_shown(np.stack(channels))

    with concurrent.futures.ThreadPoolExecutor(2) as pool:  # scans in memory
        return float(np.median(list(pool.map(share, cases)))) < CUT_OUT


def _triple(values: Sequence[float]) -> Triple:
    # Headers hold float32: to seven digits a median of equal spacings is the spacing.
    z, y, x = (float(f"{value:.7g}") for value in values)
    return z, y, x
