"""What a run learns from the headers of its training scans, once, before anything else."""

import concurrent.futures
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from autocontext_jax.data.datasets import Case
from autocontext_jax.images import scans

Triple = tuple[float, float, float]

FORMAT = 1  # of fingerprint.json


@dataclasses.dataclass(frozen=True)
class Fingerprint:
    """Of the scans that a run is trained on, as it was begun.

    Attributes:
      spacing: the median along each axis, mm, (z, y, x).
      smallest: the smallest spacing along each axis, mm.
      largest: the largest.
    """

    spacing: Triple
    smallest: Triple
    largest: Triple

    def to_json(self) -> dict[str, Any]:
        """As `fingerprint.json` has it."""
        return {"format": FORMAT, **dataclasses.asdict(self)}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Fingerprint":
        """What `to_json` gave."""
        return cls(*(_triple(content[field.name]) for field in dataclasses.fields(cls)))


def fingerprint(cases: Sequence[Case]) -> Fingerprint:
    """The fingerprint of training cases; of their scans only headers are read.

    Raises:
      UserError: a scan cannot be read.
    """
    with concurrent.futures.ThreadPoolExecutor(8) as pool:  # they wait for the disk
        spacings = np.array(list(pool.map(lambda case: scans.read_grid(case.image).canonical_spacing, cases)))
    return Fingerprint(*(_triple(fold(spacings, axis=0)) for fold in (np.median, np.min, np.max)))


def _triple(values: Sequence[float]) -> Triple:
    # Headers hold float32: to seven digits a median of equal spacings is the spacing.
    z, y, x = (float(f"{value:.7g}") for value in values)
    return z, y, x
