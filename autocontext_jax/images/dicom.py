"""One DICOM series in a folder, checked for what GDCM and ITK do not report."""

from pathlib import Path

import numpy as np
import SimpleITK as sitk

from autocontext_jax.errors import UserError
from autocontext_jax.images import headers
from autocontext_jax.images.itk import check_kind, itk_errors


def series_of(folder: Path) -> tuple[str, ...]:
    """The identifiers of the DICOM series in a folder.

    Raises:
      UserError: a DICOM file is damaged.
    """
    for path in folder.iterdir():
        if _is_dicom(path):
            headers.check_elements(path)
    with itk_errors(folder, "searched for DICOM slices"):
        return sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(folder))


def read_series(folder: Path) -> sitk.Image:
    """The one DICOM series of a folder, checked for faults that GDCM and ITK do not report."""
    series = series_of(folder)
    if len(series) != 1:
        listed = f": {', '.join(series)}; give each a folder of its own" if series else "; expected a folder with one"
        raise UserError(f"{folder} holds {len(series)} DICOM series{listed}")
    names = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), series[0])
    known = {Path(name).name for name in names} | {"DICOMDIR"}
    if unread := sorted(file.name for file in folder.iterdir() if file.name not in known and _is_dicom(file)):
        raise UserError(
            f"{folder} holds {len(unread)} DICOM file(s) that cannot be read as slices of its series, the first "
            f"{unread[0]}: copy or export them again, or move them away"
        )
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(names)
    reader.MetaDataDictionaryArrayUpdateOn()
    with itk_errors(folder, "read as a DICOM series: a slice is damaged or of another kind; export the series again"):
        image = reader.Execute()
        check_kind(folder, image.GetSize(), image.GetNumberOfComponentsPerPixel())
        if image.GetSize()[2] == len(names) > 1:  # else one file that holds many slices and places them itself
            positions = [reader.GetMetaData(k, "0020|0032").split("\\") for k in range(len(names))]
            # ITK spaces the slices evenly from first to last along their normal; see that they lie there.
            expected = [image.TransformIndexToPhysicalPoint((0, 0, k)) for k in range(len(names))]
            errors = np.linalg.norm(np.array(positions, float) - expected, axis=1)
            if errors.max() > 0.1 * image.GetSpacing()[2]:
                raise UserError(
                    f"{folder} has slices missing, unevenly spaced or sheared by a tilted gantry: one lies "
                    f"{errors.max():.3g} mm off an even stack of {image.GetSpacing()[2]:.3g} mm; expected an even stack"
                )
    return image


def _is_dicom(path: Path) -> bool:
    if path.name.startswith(".") or not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"
