"""A case's label file as stored numbers: any values, regions, ignored voxels, classes that a case does not annotate."""

from pathlib import Path

import numpy as np
import pytest

from autocontext_jax.data import preparation
from autocontext_jax.data.label_maps import read_label_map
from autocontext_jax.data.labels import IGNORE, FileLabels, LabelSpec
from autocontext_jax.data.layouts import Case
from autocontext_jax.data.store.level_grids import LevelGrids
from autocontext_jax.data.store.reader import PreparedCase
from autocontext_jax.errors import UserError
from autocontext_jax.images import scans

SIZE = (12, 14, 16)
PLAIN = LabelSpec.plain(("background", "artery", "vein"), (0, 205, 420), ignore=1000)
REGIONS = LabelSpec(("background", "whole", "core"), (0, 3, 7), ((0,), (1, 2), (2,)), (0, 3, 7), ignore=9)


def case_of(folder: Path, label: np.ndarray, **options) -> Case:
    image, path = folder / "image.nii.gz", folder / "label.nii.gz"
    rng = np.random.default_rng(1)
    scans.write_scan(image, rng.integers(-1000, 1000, label.shape).astype(np.int16), (1.0, 1.0, 1.0))
    scans.write_scan(path, label, (1.0, 1.0, 1.0))
    return Case("a", (image,), path, **options)


def random_numbers(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, count, SIZE)


def read(case: Case, labels: LabelSpec) -> np.ndarray:
    return read_label_map(case, labels, scans.read_grid(case.images))


def test_values_and_ignored_voxels(tmp_path):
    places = random_numbers(4)
    case = case_of(tmp_path, np.array([0, 205, 420, 1000], np.uint16)[places])
    np.testing.assert_array_equal(read(case, PLAIN), np.array([0, 1, 2, IGNORE])[places])


def test_a_case_of_another_data_set_has_values_of_its_own(tmp_path):
    places = random_numbers(2)
    case = case_of(tmp_path, np.array([0, 7], np.uint8)[places], files=FileLabels((0, 7), (0, 2)))
    np.testing.assert_array_equal(read(case, PLAIN), np.array([0, 2])[places])
    with pytest.raises(UserError, match=r"205 \(\d+ voxels\); expected only 0, 7"):
        read(case_of(tmp_path, np.full(SIZE, 205, np.uint8), files=FileLabels((0, 7), (0, 2))), PLAIN)


def test_what_a_case_does_not_annotate_is_background_and_named(tmp_path, caplog):
    places = random_numbers(4)
    case = case_of(tmp_path, np.array([0, 205, 420, 1000], np.uint16)[places], annotated=("artery",))
    np.testing.assert_array_equal(read(case, PLAIN), np.array([0, 1, 0, IGNORE])[places])
    (record,) = caplog.records
    assert record.getMessage().startswith("case a: ")
    assert "holds vein, which it is said not to annotate" in record.getMessage()
    case = case_of(tmp_path, np.array([0, 205, 0, 1000], np.uint16)[places], annotated=("artery",))
    np.testing.assert_array_equal(read(case, PLAIN), np.array([0, 1, 0, IGNORE])[places])
    assert len(caplog.records) == 1  # there was nothing to tell


def test_regions_that_a_case_does_not_annotate(tmp_path, caplog):
    """A number stays as long as one region that is annotated has it."""
    places = random_numbers(4)
    label = np.array([0, 3, 7, 9], np.uint8)[places]
    np.testing.assert_array_equal(read(case_of(tmp_path, label), REGIONS), np.array([0, 1, 2, IGNORE])[places])
    whole = read(case_of(tmp_path, label, annotated=("whole",)), REGIONS)
    np.testing.assert_array_equal(whole, np.array([0, 1, 2, IGNORE])[places])
    assert not caplog.records
    core = read(case_of(tmp_path, label, annotated=("core",)), REGIONS)
    np.testing.assert_array_equal(core, np.array([0, 0, 2, IGNORE])[places])
    assert "holds whole, which it is said not to annotate" in caplog.text


@pytest.mark.parametrize(
    ("labels", "annotated"), [(PLAIN, None), (PLAIN, ("vein",)), (REGIONS, None), (REGIONS, ("whole",))]
)
def test_a_prepared_case(tmp_path, labels, annotated):
    """What is stored is what was read, ignored voxels are no foreground, and what is annotated is written down."""
    zarr = pytest.importorskip("zarr")
    values = np.array([*labels.values, labels.ignore], np.uint16)
    case = case_of(tmp_path, values[random_numbers(4)], annotated=annotated)
    expected = read(case, labels)
    assert preparation.prepare_case(case, str(tmp_path), LevelGrids((2, 1)), labels)
    assert not preparation.prepare_case(case, str(tmp_path), LevelGrids((2, 1)), labels)
    opened = PreparedCase.open(str(tmp_path), "a")
    assert opened.labels == labels.classes
    assert opened.known == labels.known(annotated)
    _, stored = opened.read(2, (0, 0, 0), SIZE).result()
    np.testing.assert_array_equal(stored, expected)
    assert len(opened.foreground_offsets) == len(labels.values)
    for number in range(1, len(labels.values)):
        entries = range(*opened.foreground_offsets[number - 1 : number + 1])
        assert [list(opened.foreground_voxel(entry)) for entry in entries] == np.argwhere(stored == number).tolist()
    assert opened.foreground_offsets[-1] == np.isin(stored, range(1, len(labels.values))).sum() > 0
    attributes = zarr.open_group(f"{tmp_path}/a.ome.zarr/labels/classes", mode="r").attrs["ome"]["image-label"]
    named = {entry["label-value"]: entry["name"] for entry in attributes["properties"]}
    assert named == dict(enumerate(labels.number_names[1:], start=1)) | {IGNORE: "ignore"}
    # Outside the scan there is background, which is labelled.
    _, beyond = opened.read(2, (-2, 0, 0), (2, 4, 4)).result()
    assert not beyond.any()


def test_a_case_with_ignored_voxels_alone_has_no_foreground(tmp_path):
    case = case_of(tmp_path, np.full(SIZE, 1000, np.uint16))
    assert preparation.prepare_case(case, str(tmp_path), LevelGrids((2, 1)), PLAIN)
    assert PreparedCase.open(str(tmp_path), "a").foreground_offsets == (0, 0, 0)
    with pytest.raises(UserError, match=r"no voxel is labelled.*artery, vein"):
        preparation.check_classes([case], str(tmp_path), PLAIN, "data")


def test_regions_that_no_case_has_are_named(tmp_path, caplog):
    case = case_of(tmp_path, np.full(SIZE, 3, np.uint8))
    assert preparation.prepare_case(case, str(tmp_path), LevelGrids((2, 1)), REGIONS)
    preparation.check_classes([case], str(tmp_path), REGIONS, "data")
    (record,) = [record for record in caplog.records if "cannot be learned" in record.getMessage()]
    assert record.getMessage().endswith("cannot be learned: core")
