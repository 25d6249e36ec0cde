"""The file formats of scans, by the endings of their names."""

import os
from pathlib import Path

# Longest first: a name's suffix is the first that fits, in small or in capital letters.
FORMATS = (".nii.gz", ".nii", ".mha", ".mhd", ".nrrd", ".png", ".tiff", ".tif")
NIFTI = (".nii.gz", ".nii")  # through nibabel; SimpleITK reads and writes the others
PICTURES = (".png", ".tiff", ".tif")  # of one slice, grey or colour; they do not say the size of a voxel


def suffix_of(path: Path) -> str:
    """Which of `FORMATS` a file is by its name; "" if none."""
    return next((suffix for suffix in FORMATS if path.name.lower().endswith(suffix)), "")


def mask_suffix(path: Path) -> str:
    """The suffix of the mask of a scan: that of a picture, NIfTI's of all others."""
    suffix = suffix_of(path)
    return suffix if suffix in PICTURES else ".nii.gz"


def scan_name(path: str | os.PathLike) -> str:
    """A scan's file name without its suffix: "a/liver_1.nii.gz" -> "liver_1"."""
    name = Path(path).name
    return name[: len(name) - len(suffix_of(Path(path)))]
