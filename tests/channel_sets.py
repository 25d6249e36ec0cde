"""Small data sets of several channels, of slices and colours, in which one channel alone shows the class."""

import json
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import SimpleITK as sitk

SIZE = (20, 26, 24)


def ball(rng: np.random.Generator, size: Sequence[int], radius: float) -> np.ndarray:
    """Where a ball lies, whole inside along the axes that have room for it, [D, H, W] bool."""
    centre = [rng.uniform(radius, n - radius) if n > 2 * radius else n / 2 for n in size]
    places = np.meshgrid(*(np.arange(n) + 0.5 - c for n, c in zip(size, centre, strict=True)), indexing="ij")
    return np.linalg.norm(np.stack(places), axis=0) < radius


def case_of(seed: int, channels: int, shows: int, size: Sequence[int] = SIZE) -> tuple[np.ndarray, np.ndarray]:
    """[C, D, H, W] with a bright ball in each channel, and where that of the channel `shows` is."""
    rng = np.random.default_rng(seed)
    balls = [ball(rng, size, 5.0) for _ in range(channels)]
    voxels = np.stack([1000.0 * found + rng.normal(300, 80, size) for found in balls])
    return voxels, balls[shows].astype(np.uint8)


def write_decathlon(root: Path, modality: Sequence[str], *, training: int, test: int, shows: int = 1) -> Path:
    """4D files, as the Medical Segmentation Decathlon has them; the labels of test cases lie in labelsTs."""
    entries = []
    for number in range(training + test):
        voxels, label = case_of(number, len(modality), shows)
        side, name = "Tr" if number < training else "Ts", f"BRATS_{number:03d}.nii.gz"
        for folder, array in ((f"images{side}", voxels.transpose(3, 2, 1, 0)), (f"labels{side}", label.T)):
            (root / folder).mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(np.float32(array), np.diag([1.0, 1.0, 1.2, 1.0])), root / folder / name)
        entries.append({"image": f"./images{side}/{name}", "label": f"./labels{side}/{name}"})
    description = {
        "name": "BRATS",
        "tensorImageSize": "4D",
        "modality": {str(number): name for number, name in enumerate(modality)},
        "labels": {"0": "background", "1": "tumour"},
        "numTraining": training,
        "numTest": test,
        "training": entries[:training],
        "test": [entry["image"] for entry in entries[training:]],
    }
    (root / "dataset.json").write_text(json.dumps(description), encoding="utf-8")
    return root


def write_pictures(root: Path, channels: dict[str, str], *, training: int, test: int, ending: str = ".png") -> Path:
    """Slices, grey or colour by the number of channels, in the layout of nnU-Net v2; the class shows in the last."""
    size = (1, 48, 40)
    for number in range(training + test):
        voxels, label = case_of(number, len(channels), len(channels) - 1, size)
        grey = np.uint8(np.clip(voxels / 6, 0, 255))[:, 0]
        side = "Tr" if number < training else "Ts"
        image = sitk.GetImageFromArray(np.moveaxis(grey, 0, -1) if len(channels) > 1 else grey[0], len(channels) > 1)
        for folder, name, picture in (
            (f"images{side}", f"cell_{number}_0000{ending}", image),
            (f"labels{side}", f"cell_{number}{ending}", sitk.GetImageFromArray(label[0])),
        ):
            (root / folder).mkdir(parents=True, exist_ok=True)
            sitk.WriteImage(picture, str(root / folder / name))
    description = {
        "channel_names": channels,
        "labels": {"background": 0, "cell": 1},
        "numTraining": training,
        "file_ending": ending,
    }
    (root / "dataset.json").write_text(json.dumps(description), encoding="utf-8")
    return root
