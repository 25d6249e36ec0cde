import dataclasses
import json

import numpy as np
import pytest
import scipy.ndimage
import SimpleITK as sitk

from autocontext_jax.data.phantom import anatomy, dataset, painting
from autocontext_jax.data.phantom.anatomy import ORGANS
from autocontext_jax.errors import UserError

SMALL = {"size": (64, 64, 64), "spacing": (5.25, 5.25, 5.25)}
LABELS = {organ: value for value, organ in enumerate(ORGANS, 1)}
MILLILITRES = {
    "artery": (60, 250), "portal_vein": (15, 80), "liver": (600, 2000), "spleen": (50, 350), "stomach": (100, 800),
    "gallbladder": (5, 80), "pancreas": (25, 130),
}  # fmt: skip
HOUNSFIELD = {  # of the median voxel; vessels lose some to their blurred surface
    "artery": (140, 280), "portal_vein": (120, 220), "liver": (80, 140), "spleen": (85, 150), "stomach": (-30, 90),
    "gallbladder": (-30, 60), "pancreas": (40, 120),
}  # fmt: skip


def make(seed, **grid):
    return painting.make_phantom(np.random.default_rng([0, seed]), **(grid or SMALL))


def volumes(label, spacing):
    return np.bincount(label.ravel(), minlength=8)[1:] * np.prod(spacing) / 1000


@pytest.fixture(scope="module")
def patients():
    return [make(seed) for seed in range(30)]


def test_the_seed_decides(patients):
    image, label = make(0)
    assert image.shape == label.shape == SMALL["size"]
    assert (image.dtype, label.dtype) == (np.int16, np.uint8)
    np.testing.assert_array_equal(image, patients[0][0])
    np.testing.assert_array_equal(label, patients[0][1])
    assert np.mean(label != patients[1][1]) > 0.02


@pytest.mark.parametrize("organ", ORGANS)
def test_every_patient_has_a_plausible_organ(patients, organ):
    value, place = LABELS[organ], LABELS[organ] - 1
    ml = [volumes(label, SMALL["spacing"])[place] for _, label in patients]
    hu = [np.median(image[label == value]) for image, label in patients]
    assert MILLILITRES[organ][0] < min(ml) <= max(ml) < MILLILITRES[organ][1]
    assert HOUNSFIELD[organ][0] < min(hu) <= max(hu) < HOUNSFIELD[organ][1]
    assert np.std(ml) > 0.05 * np.mean(ml)


def test_every_patient_has_air_around_and_fat_and_bone_inside(patients):
    for image, label in patients:
        assert label.max() == len(LABELS)
        assert np.median(image[:, 0]) < -900
        assert np.mean((image > -150) & (image < -50)) > 0.03
        assert np.mean(image > 250) > 0.003


def test_organs_lie_where_they_should(patients):
    for image, label in patients:
        z, y, x = np.transpose([scipy.ndimage.center_of_mass(label == value) for value in range(1, 8)])
        at = {organ: place for place, organ in enumerate(ORGANS)}
        middle = np.argwhere(image > -500)[:, 2].mean()
        for right in ("liver", "gallbladder"):
            assert x[at[right]] < middle
        for left in ("spleen", "stomach"):
            assert x[at[left]] > middle
        assert y[at["spleen"]] > y[at["stomach"]]  # behind
        assert y[at["artery"]] > y[at["pancreas"]]
        assert z[at["liver"]] > z[at["gallbladder"]]  # above
        lungs = np.argwhere((image < -700) & scipy.ndimage.binary_fill_holes(image > -500, np.ones((1, 3, 3))))
        assert lungs[:, 0].mean() > z[at["liver"]]


def test_vessels_hold_together():
    for seed in range(4):
        _, label = make(seed, size=(96, 96, 96), spacing=(3.5, 3.5, 3.5))
        for vessel in ("artery", "portal_vein"):
            mask = label == LABELS[vessel]
            pieces, _ = scipy.ndimage.label(mask, np.ones((3, 3, 3)))
            assert np.bincount(pieces.ravel())[1:].max() > 0.8 * mask.sum(), (seed, vessel)


def test_the_grid_only_samples_the_patient():
    fine, coarse = (
        {"size": (96, 96, 96), "spacing": (3.5, 3.5, 3.5)},
        {"size": (150, 140, 140), "spacing": (2.24, 2.4, 2.4)},
    )
    ml = [volumes(make(5, **grid)[1], grid["spacing"]) for grid in (fine, coarse)]
    np.testing.assert_allclose(*ml, rtol=0.12)
    solid = [LABELS[organ] - 1 for organ in ("liver", "spleen", "stomach")]
    np.testing.assert_allclose(ml[0][solid], ml[1][solid], rtol=0.03)


def test_a_small_field_of_view_shrinks_the_body():
    image, label = make(3, size=(48, 60, 60), spacing=(3.0, 3.0, 3.0))
    assert np.unique(label).tolist() == list(range(8))
    assert np.mean(image[:, :, [0, -1]] < -500) > 0.75  # a warped or shifted patient may touch the border


def test_slabs_leave_no_seam(monkeypatch, patients):
    monkeypatch.setattr(painting, "_SLAB", 7 * 64 * 64)
    image, label = make(2)
    assert np.mean(label != patients[2][1]) < 1e-4
    assert np.mean(np.abs(image - patients[2][0].astype(float)) > 2) < 1e-4


def test_write_dataset(tmp_path, monkeypatch):
    root, expected = tmp_path / "phantom", {"size": (24, 28, 28), "spacing": (10.0, 12.0, 13.0), "seed": 4}
    left = root / "imagesTr" / "phantom_007_0000.nii.gz"  # by an interrupted run for more cases
    left.parent.mkdir(parents=True)
    left.touch()
    with pytest.raises(UserError, match="holds scans that are no phantoms"):  # perhaps somebody's own, of this name
        dataset.write_dataset(root, training=2, test=1, **expected)
    assert left.exists()
    (root / ".phantoms_unfinished").touch()
    dataset.write_dataset(root, training=2, test=1, **expected)
    assert sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()) == [
        "dataset.json",
        "imagesTr/phantom_000_0000.nii.gz",
        "imagesTr/phantom_001_0000.nii.gz",
        "imagesTs/phantom_002_0000.nii.gz",
        "labelsTr/phantom_000.nii.gz",
        "labelsTr/phantom_001.nii.gz",
        "labelsTs/phantom_002.nii.gz",
    ]
    description = json.loads((root / "dataset.json").read_bytes())
    assert description["labels"] == {"background": 0} | LABELS
    assert (description["numTraining"], description["file_ending"]) == (2, ".nii.gz")

    stored = sitk.ReadImage(root / "labelsTs" / "phantom_002.nii.gz")
    assert stored.GetSpacing() == (13.0, 12.0, 10.0)
    _, label = painting.make_phantom(np.random.default_rng([4, 2]), size=expected["size"], spacing=expected["spacing"])
    np.testing.assert_array_equal(sitk.GetArrayFromImage(stored), label)

    monkeypatch.setattr(dataset, "make_phantom", None)  # from here on nothing may be made anew
    dataset.write_dataset(root, training=2, test=1, **expected)
    with pytest.raises(UserError, match=r"dataset\.json.*another folder"):
        dataset.write_dataset(root, training=3, test=1, **expected)


def test_look_alikes_look_like_organs_and_are_none():
    alike = {part.name: part for part in anatomy._look_alikes(np.random.default_rng(0), 1)}
    organs = {part.name: part for part in anatomy._anatomy(np.random.default_rng(0), 0)}
    pairs = {"cyst": "gallbladder", "loop": "stomach", "other artery": "artery", "other vein": "portal_vein"}
    assert alike.keys() == pairs.keys()
    for name, organ in pairs.items():
        assert alike[name].hu == organs[organ].hu
        assert name not in ORGANS

    # Painted alone, each shows and leaves the label empty.
    axis = np.arange(-200, 150, 5.0, np.float32)
    p = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"))
    for part in alike.values():
        image, label = np.full(p.shape[1:], 20, np.float32), np.zeros(p.shape[1:], np.uint8)
        smooth = dataclasses.replace(part, curve=anatomy._smooth(part.curve))
        painting._paint(image, label, p, [smooth], 5.0, 4.0)
        assert np.sum(np.abs(image - 20) > 5) > 20
        assert not label.any()

    # A patient has them beside all organs.
    rng = np.random.default_rng(0)
    assert len(anatomy.individual(rng, 8)) == len(anatomy.individual(rng, 0)) + 4 * 8
    _, label = painting.make_phantom(np.random.default_rng([1, 0]), **SMALL, look_alikes=8)
    assert np.unique(label).tolist() == list(range(8))
