"""A data set of generated scans in the nnU-Net v2 folder layout."""

import dataclasses
import json
from pathlib import Path

import numpy as np

from autocontext_jax.data.phantom.anatomy import ORGANS
from autocontext_jax.data.phantom.painting import make_phantom
from autocontext_jax.errors import UserError, require
from autocontext_jax.files import write_whole, writing
from autocontext_jax.images import scans


@dataclasses.dataclass(frozen=True)
class PhantomConfig:
    """The section `phantom` of a configuration: phantoms to generate into the data set's folder.

    Attributes:
      training: number of training cases; 0 generates nothing and uses the data set that is there.
      test: number of test cases.
      size: voxels of each scan, (z, y, x).
      spacing: mm, (z, y, x).
      look_alikes: of each kind, structures that only their place in the body tells from an organ.
    """

    training: int = 0
    test: int = 0
    size: tuple[int, int, int] = (96, 96, 96)
    spacing: tuple[float, float, float] = (3.5, 3.5, 3.5)
    look_alikes: int = 0

    def __post_init__(self):
        for name in ("training", "test", "look_alikes"):
            require(getattr(self, name) >= 0, self, name, "0 or more")
        require(len(self.size) == 3 and min(self.size) >= 1, self, "size", "three numbers of voxels, (z, y, x)")
        require(len(self.spacing) == 3 and min(self.spacing) > 0, self, "spacing", "three lengths in mm, (z, y, x)")


def write_dataset(
    root: Path,
    *,
    training: int,
    test: int,
    size: tuple[int, int, int],
    spacing: tuple[float, float, float],
    look_alikes: int = 0,
    seed: int,
) -> None:
    """An nnU-Net v2 folder of phantoms; returns at once where the same one stands already.

    A case depends on the seed and its number alone. `dataset.json` is written last: without it a folder is unfinished.

    Raises:
      UserError: the folder has other files, or phantoms of other parameters.
    """
    expected = {
        "training": training, "test": test, "size": list(size), "spacing": list(spacing), "look_alikes": look_alikes,
        "seed": seed,
    }  # fmt: skip
    index = root / "dataset.json"
    if index.exists():
        found = json.loads(index.read_bytes()).get("phantom")
        if found != expected:
            raise UserError(
                f"{index}: made with {found}, expected {expected}; choose another folder or remove this one"
            )
        return
    begun = root / ".phantoms_unfinished"
    if not begun.exists() and any(root.glob("*T[rs]/*")):
        raise UserError(f"{root} holds scans that are no phantoms; expected an empty folder for phantoms: name another")
    with writing(root):
        root.mkdir(parents=True, exist_ok=True)
        begun.touch()
    for unfinished in root.glob("*T[rs]/phantom_*.nii.gz"):  # perhaps of other parameters
        unfinished.unlink()
    for number in range(training + test):
        rng = np.random.default_rng([seed, number])
        image, label = make_phantom(rng, size=size, spacing=spacing, look_alikes=look_alikes)
        split, name = "Tr" if number < training else "Ts", f"phantom_{number:03d}"
        for path, voxels in ((f"images{split}/{name}_0000.nii.gz", image), (f"labels{split}/{name}.nii.gz", label)):
            scans.write_scan(root / path, voxels, spacing, origin=(0.0, 0.0, 0.0))
    description = {
        "name": "Phantom",
        "channel_names": {"0": "CT"},
        "labels": {"background": 0} | {organ: value for value, organ in enumerate(ORGANS, 1)},
        "numTraining": training,
        "numTest": test,
        "file_ending": ".nii.gz",
        "phantom": expected,
    }
    write_whole(index, json.dumps(description, indent=2) + "\n")
    with writing(root):
        begun.unlink(missing_ok=True)  # another run may have made the same phantoms meanwhile
