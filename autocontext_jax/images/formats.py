"""The file formats of scans, by the endings of their names."""

from pathlib import Path

# Longest first: a name's suffix is the first that fits. SimpleITK reads and writes them. A new one also needs a check
# of its header in `headers.py`, for faults that ITK does not report.
FORMATS = (".nii.gz", ".nii", ".mha", ".mhd", ".nrrd")


def suffix_of(path: Path) -> str:
    """Which of `FORMATS` a file is by its name; "" if none."""
    return next((suffix for suffix in FORMATS if path.name.lower().endswith(suffix)), "")
