"""The survey of a data set: hand-made cases whose numbers are known, and sets where most of it is missing."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from channel_sets import case_of, write_decathlon, write_pictures
from conftest import in_turn
from scipy import ndimage

from autocontext_jax.data import survey as module
from autocontext_jax.data.class_sizes import ClassSize, class_sizes
from autocontext_jax.data.combination import read_datasets
from autocontext_jax.data.datasets import read_dataset
from autocontext_jax.data.fingerprint import Fingerprint, fingerprint
from autocontext_jax.data.labels import IGNORE, FileLabels, LabelSpec
from autocontext_jax.data.layouts import Case
from autocontext_jax.data.phantom.dataset import write_dataset
from autocontext_jax.data.survey import ClassSurvey, Range, Survey, survey
from autocontext_jax.data.survey_table import survey_table
from autocontext_jax.data.workers import WorkerDiedError
from autocontext_jax.errors import UserError
from autocontext_jax.files import write_json
from autocontext_jax.images import scans
from autocontext_jax.images.spec import CT, ct_image
from autocontext_jax.jobs.config_files import default_config, from_config_dict
from autocontext_jax.jobs.run_folder import open_data, read_fingerprint, write_learned

LABELS = LabelSpec.plain(("background", "liver", "duct", "never"), (0, 205, 420, 500), ignore=1000)
REGIONS = LabelSpec(("background", "whole", "core"), (0, 3, 7), ((0,), (1, 2), (2,)), (0, 3, 7), ignore=9)
ABSENT = ClassSize(0, (0, 0, 0), (0, 0, 0))


@pytest.fixture
def one_process(monkeypatch):
    """Does the work of the parallel processes here: starting them takes longer than all else."""
    monkeypatch.setattr(module, "in_processes", in_turn)


def make(cases, labels: LabelSpec, **options) -> Survey:
    return survey(cases, labels, **({"workers": 1, "progress": lambda name: None} | options))


def write(folder: Path, name: str, label: np.ndarray, spacing=(1.0, 1.0, 1.0), order=(0, 1, 2), **more) -> Case:
    """A case with a scan of zeros, its files' axes in another order if one is given."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / f"{name}_image.nii.gz", folder / f"{name}_label.nii.gz"
    for path, voxels in zip(paths, (np.zeros(label.shape, np.int16), label.astype(np.uint16)), strict=True):
        image = sitk.GetImageFromArray(voxels)
        image.SetSpacing(spacing[::-1])
        sitk.WriteImage(sitk.PermuteAxes(image, order), path)
    return Case(name, paths[:1], paths[1], **more)


def exactly(value: float) -> Range:
    return Range(value, value, value)


# ---- one label map ----


@pytest.mark.parametrize("labels", [LabelSpec.plain(("background", "a", "b", "c")), REGIONS])
@pytest.mark.parametrize("size", [(5, 6, 7), (1, 9, 4), (1, 1, 1)])
def test_sizes_are_those_of_a_plain_count(labels, size):
    stored = np.array([*range(len(labels.values)), IGNORE], np.uint8)
    label = np.random.default_rng(1).choice(stored, size)
    for seen in (label, label.transpose(2, 0, 1)[::-1]):  # a view of an array in another order
        for found, numbers in zip(class_sizes(seen, labels), labels.members[1:], strict=True):
            mask = np.isin(seen, numbers)
            if not mask.any():
                assert found == ABSENT
                continue
            places = np.argwhere(mask)
            lines = [np.zeros((3, 3, 3), bool) for _ in range(3)]
            for axis, line in enumerate(lines):
                line[tuple(slice(None) if each == axis else 1 for each in range(3))] = True
            assert found.voxels == len(places)
            assert found.box == tuple(places.max(axis=0) - places.min(axis=0) + 1)
            assert found.runs == tuple(ndimage.label(mask, line)[1] for line in lines)
    assert class_sizes(np.full(size, IGNORE, np.uint8), labels) == (ABSENT,) * (len(labels.classes) - 1)


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (4.0, 0.5, 1.0)])
def test_thickness_of_simple_shapes(spacing, one_process, tmp_path):
    """In mm, and the same however the shape is sampled: of a ball 2/3 of its diameter, of a tube π/4, of a slab all."""
    size = tuple(round(48 / mm) for mm in spacing)
    places = [(np.arange(n) + 0.5) * mm - 24 for n, mm in zip(size, spacing, strict=True)]
    z, y, x = np.meshgrid(*places, indexing="ij")
    shapes = {"ball": z**2 + y**2 + x**2 < 20**2, "tube": y**2 + x**2 < 10**2, "slab": abs(z) < 8}
    labels = LabelSpec.plain(("background", "shape"))
    found = {}
    for name, mask in shapes.items():
        (of_shape,) = make([write(tmp_path, name, mask, spacing)], labels).classes
        found[name] = [each.median for each in of_shape.thickness]
    assert found["ball"] == pytest.approx([2 / 3 * 40] * 3, rel=0.03)
    assert found["tube"] == pytest.approx([48, math.pi / 4 * 20, math.pi / 4 * 20], rel=0.03)
    assert found["slab"] == [16, 48, 48]


# ---- a data set ----


def hand_made(folder: Path) -> list[Case]:
    """Spacings, orientations and annotations that differ, an empty case, a class of one voxel and one of none."""
    first = np.zeros((4, 6, 8), int)
    first[1:3, 1:4, 2:6] = 205
    first[0, 0, 0] = 420
    first[3, 0, :] = 1000
    apart = np.zeros((4, 10, 8), int)
    apart[0, 0, :2] = apart[3, 9, 6:] = 205
    apart[1, 5, :3] = 420  # which the case does not annotate
    return [
        write(folder, "c", apart, (4.0, 1.0, 1.0), annotated=("liver",)),
        write(folder, "b", np.zeros((2, 6, 8), int), (8.0, 2.0, 1.0), order=(2, 0, 1)),
        dataclasses.replace(write(folder, "d", first, (9.0, 9.0, 9.0)), label=None),
        write(folder, "a", first, (4.0, 2.0, 1.0)),
    ]


def test_every_number_of_a_hand_made_set(tmp_path, one_process, caplog):
    done: list[str] = []
    found = make(hand_made(tmp_path), LABELS, progress=done.append)
    assert found == Survey(
        cases=3,
        shape=(Range(4, 2, 4), Range(6, 6, 10), exactly(8)),
        extent=(exactly(16), Range(12, 10, 12), exactly(8)),
        spacing=(Range(4, 4, 8), Range(2, 1, 2), exactly(1)),
        spacing_p10=(4.0, 1.2, 1.0),
        orientations=(("LPS", 2), ("SLP", 1)),
        label_maps=3,
        classes=(
            ClassSurvey(
                "liver",
                annotated=3,
                cases=2,
                share=pytest.approx(28 / (184 + 96 + 320), rel=1e-11),
                voxels=Range(14, 4, 24),
                volume=Range(0.104, 0.016, 0.192),
                extent=(Range(12, 8, 16), Range(8, 6, 10), Range(6, 4, 8)),
                thickness=(Range(6, 4, 8), Range(3.5, 1, 6), Range(3, 2, 4)),
            ),
            ClassSurvey(
                "duct",
                annotated=2,
                cases=1,
                share=pytest.approx(1 / (184 + 96), rel=1e-11),
                voxels=exactly(1),
                volume=exactly(0.008),
                extent=(exactly(4), exactly(2), exactly(1)),
                thickness=(exactly(4), exactly(2), exactly(1)),
            ),
            ClassSurvey("never", 2, 0, 0.0, None, None, None, None),
        ),
    )
    assert sorted(done) == ["a", "b", "c"]
    assert "case c: " in caplog.text
    assert "holds duct, which it is said not to annotate" in caplog.text


def test_regions_overlap_and_what_a_case_leaves_out_is_unknown(tmp_path, one_process):
    label = np.zeros((2, 2, 4), int)
    label[0, 0], label[0, 1] = (3, 3, 7, 7), (0, 0, 0, 9)
    whole, core = make([write(tmp_path, "a", label)], REGIONS).classes
    assert (whole.voxels, core.voxels) == (exactly(4), exactly(2))
    assert (whole.share, core.share) == pytest.approx((4 / 15, 2 / 15))
    whole, core = make([write(tmp_path, "a", label, annotated=("core",))], REGIONS).classes
    assert whole == ClassSurvey("whole", 0, 0, None, None, None, None, None)
    assert (core.annotated, core.voxels) == (1, exactly(2))


def test_what_nobody_labelled_tells_nothing(tmp_path, one_process):
    """A case whose every voxel is ignored does not count as one without the class."""
    found = make([write(tmp_path, "a", np.full((2, 3, 4), 1000))], LABELS)
    assert found.shape == (exactly(2), exactly(3), exactly(4))
    assert found.classes == tuple(ClassSurvey(name, 0, 0, *[None] * 5) for name in LABELS.classes[1:])
    label = np.full((2, 3, 4), 420)
    assert make([write(tmp_path, "b", label), write(tmp_path, "a", np.full((2, 3, 4), 1000))], LABELS).classes[1] == (
        ClassSurvey("duct", 1, 1, 1.0, exactly(24), exactly(0.024), found.extent, (exactly(2), exactly(3), exactly(4)))
    )


def test_one_case_of_one_slice_without_any_class(tmp_path, one_process):
    found = make([write(tmp_path, "a", np.zeros((1, 5, 4), int), (7.0, 0.5, 0.5))], LABELS)
    assert found.extent == (exactly(7), exactly(2.5), exactly(2))
    assert found.spacing_p10 == (7.0, 0.5, 0.5)
    assert [each.cases for each in found.classes] == [0, 0, 0]
    assert {each.share for each in found.classes} == {0.0}
    assert "never  0 of 1  0 %    –" in survey_table(found)


def test_the_tenth_percentile_is_nnunets(tmp_path, one_process):
    """By hand: of eleven sorted values it is the second; of ten it lies 0.9 of the way from the first to it.

    What a header's float32 made of 0.7 is 0.7 again.
    """
    label = np.zeros((2, 2, 2), int)
    spacings = [10.0, 5.0, 6.0, *[9.0] * 8]
    cases = [write(tmp_path, f"{number:02}", label, (mm, 0.7, 0.78125)) for number, mm in enumerate(spacings)]
    assert make(cases, LABELS).spacing_p10 == (6.0, 0.7, 0.78125)
    assert make(cases[1:], LABELS).spacing_p10 == (5.9, 0.7, 0.78125)


def test_headers_of_all_and_label_maps_of_some(tmp_path, one_process):
    """Which ones depends on the names alone, and all headers count nevertheless."""
    label = np.zeros((2, 2, 2), int)
    cases = [write(tmp_path, f"{number}", label, (1.0 + number, 1.0, 1.0)) for number in range(8)]
    done: list[str] = []
    found = make(cases, LABELS, at_most=3, progress=done.append)
    assert (found.cases, found.label_maps, len(set(done))) == (8, 3, 3)
    assert {each.annotated for each in found.classes} == {3}
    assert found.spacing[0] == Range(4.5, 1, 8)
    again: list[str] = []
    assert make(cases[::-1], LABELS, at_most=3, progress=again.append) == found
    assert again == done
    assert "classes in 3 label maps, drawn at random" in survey_table(found)
    assert make(cases, LABELS, at_most=8).label_maps == make(cases, LABELS).label_maps == 8


def test_all_that_is_damaged_is_named(tmp_path, one_process, caplog):
    label = np.zeros((8, 8, 8), int)
    cases = [write(tmp_path, name, label) for name in "abcd"]
    for path in (cases[0].label, cases[2].label):
        path.write_bytes(path.read_bytes()[:-20])
    done: list[str] = []
    with pytest.raises(UserError, match=r"c_label\.nii\.gz .*\(2 of 4 cases cannot be surveyed\)$"):
        make(cases, LABELS, progress=done.append)
    assert len(done) == 4
    (record,) = caplog.records
    assert "a_label.nii.gz" in record.getMessage()

    caplog.clear()
    cases[1].images[0].write_bytes(b"")
    cases[3].images[0].unlink()
    with pytest.raises(UserError, match=r"d_image\.nii\.gz .*\(2 of 4 cases cannot be surveyed\)$"):
        make(cases, LABELS)
    (record,) = caplog.records
    assert "b_image.nii.gz is empty" in record.getMessage()
    with pytest.raises(UserError, match="none of 1 case has a label"):
        make([dataclasses.replace(cases[0], label=None)], LABELS)


def test_a_worker_that_the_system_ends(tmp_path, monkeypatch):
    def ended(function, items, *, workers):
        raise WorkerDiedError
        yield

    monkeypatch.setattr(module, "in_processes", ended)
    cases = [write(tmp_path, name, np.zeros((2, 2, 2), int)) for name in "ab"]
    with pytest.raises(UserError, match=r"survey: the system ended one of 2 workers.*--config\.data\.workers=1"):
        make(cases, LABELS, workers=3)


# ---- whole data sets, in parallel processes ----


def test_phantoms(tmp_path):
    write_dataset(tmp_path, training=3, test=1, size=(24, 28, 32), spacing=(9.0, 8.0, 8.0), seed=0)
    data = read_dataset(tmp_path)
    found = make(data.training, data.labels, workers=2)
    assert (found.cases, found.label_maps, found.orientations) == (3, 3, (("LPS", 3),))
    assert found.extent == (exactly(216), exactly(224), exactly(256))
    truth = np.stack([sitk.GetArrayFromImage(sitk.ReadImage(case.label)) for case in data.training])
    for number, each in enumerate(found.classes, start=1):
        voxels = np.count_nonzero(truth == number, axis=(1, 2, 3))
        assert each.voxels == Range(float(np.median(voxels)), voxels.min(), voxels.max())
        assert each.share == pytest.approx(voxels.sum() / truth.size)
        assert each.volume.largest == pytest.approx(voxels.max() * 9 * 8 * 8 / 1000)
        for extent, thickness, whole, spacing in zip(each.extent, each.thickness, found.extent, (9, 8, 8), strict=True):
            assert spacing <= thickness.median <= extent.median <= whole.median
    liver, artery = found.classes[2], found.classes[0]
    assert min(each.median for each in liver.thickness) > 2 * min(each.median for each in artery.thickness)
    json.dumps(found.to_json(), allow_nan=False)


def test_several_channels_and_slices(tmp_path, one_process):
    tumours = read_dataset(write_decathlon(tmp_path / "4D", ("FLAIR", "T1w"), training=2, test=1))
    found = make(tumours.training, tumours.labels)
    assert (found.cases, found.shape) == (2, (exactly(20), exactly(26), exactly(24)))
    assert found.spacing == (exactly(1.2), exactly(1), exactly(1))
    assert found.orientations == (("RAS", 2),)
    balls = [case_of(number, 2, 1)[1] for number in range(2)]
    boxes = [(np.ptp(np.argwhere(each), axis=0) + 1) * (1.2, 1, 1) for each in balls]
    assert [each.largest for each in found.classes[0].extent] == pytest.approx(np.max(boxes, axis=0))
    voxels = [np.count_nonzero(each) for each in balls]
    assert found.classes[0].voxels == Range(float(np.median(voxels)), min(voxels), max(voxels))
    cells = read_dataset(write_pictures(tmp_path / "2D", {"0": "R", "1": "G", "2": "B"}, training=2, test=1))
    found = make(cells.training, cells.labels)
    assert found.shape == (exactly(1), exactly(48), exactly(40))
    assert [each.median for each in found.classes[0].thickness] == pytest.approx(
        [1, math.pi / 4 * 10, math.pi / 4 * 10], rel=0.05
    )


def test_data_sets_with_values_of_their_own(tmp_path, one_process):
    """What a data set does not name is unknown in its cases; each file is read by its own values."""
    for name, other, count in (("one", "liver", 2), ("two", "spleen", 1)):
        keys = {"channel_names": {"0": "CT"}, "labels": {"background": 0, other: 7}, "file_ending": ".nii.gz"}
        for number in range(count):
            label = np.zeros((2, 3, 4), int)
            label[0, 0, : 1 + number] = 7
            case = write(tmp_path / name, f"{number}", label)
            for path, place in ((case.images[0], f"imagesTr/{number}_0000"), (case.label, f"labelsTr/{number}")):
                (tmp_path / name / place).parent.mkdir(exist_ok=True)
                path.rename(tmp_path / name / f"{place}.nii.gz")
        (tmp_path / name / "dataset.json").write_text(json.dumps(keys), encoding="utf-8")
    data = read_datasets([tmp_path / "one", tmp_path / "two"])
    liver, spleen = make(data.training, data.labels).classes
    assert (liver.name, liver.annotated, liver.cases, liver.voxels) == ("liver", 2, 2, Range(1.5, 1, 2))
    assert (spleen.name, spleen.annotated, spleen.cases, spleen.share) == ("spleen", 1, 1, pytest.approx(1 / 24))


# ---- as JSON, and in the run folder ----


def test_it_comes_back_from_json(tmp_path, one_process):
    cases = hand_made(tmp_path)
    found = make([dataclasses.replace(case, checksum=case.name) for case in cases], LABELS)
    content = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert Survey.from_json(content) == found
    assert Survey.from_json(None) is None
    assert Survey.from_json(content | {"format": 0}) is None
    learned = fingerprint(cases, CT)
    assert learned.survey is None
    assert "survey" not in learned.to_json()
    whole = dataclasses.replace(learned, survey=found)
    written = json.loads(json.dumps(whole.to_json(), allow_nan=False))
    assert Fingerprint.from_json(written, place="", default=CT) == whole
    del written["survey"]  # as runs wrote it that were not planned
    assert Fingerprint.from_json(written, place="", default=CT) == learned


def test_it_knows_what_it_is_of(tmp_path, one_process):
    cases = [dataclasses.replace(case, checksum=case.name) for case in hand_made(tmp_path)]
    found = make(cases, LABELS)
    assert found.is_of(cases[::-1], LABELS)
    assert found.is_of(cases, LABELS, at_most=3)  # there are no more
    assert not found.is_of(cases, LABELS, at_most=2)
    assert not found.is_of(cases[1:], LABELS)
    assert not found.is_of(cases, dataclasses.replace(LABELS, ignore=-1))
    for change in ({"checksum": "other"}, {"annotated": None}, {"files": FileLabels((0, 205), (0, 1))}):
        assert not found.is_of([dataclasses.replace(cases[0], **change), *cases[1:]], LABELS)
    unknown = [dataclasses.replace(case, checksum="") for case in cases]
    assert not make(unknown, LABELS).is_of(unknown, LABELS)


def test_a_run_takes_none_and_keeps_one(tmp_path, one_process, monkeypatch):
    """Runs that are not planned read no label map for it; what a planner wrote stays as long as the cases do."""
    root, workdir = tmp_path / "data", tmp_path / "run"
    write_dataset(root, training=3, test=0, size=(12, 12, 12), spacing=(24.0, 24.0, 24.0), seed=0)
    config = default_config()
    config.data.root = str(root)
    typed = from_config_dict(config)
    with monkeypatch.context() as patch:
        patch.setattr(scans, "read_label", None)
        data = open_data(typed, workdir)
    assert data.fingerprint.survey is None
    cases = [*data.training, *data.validation]
    found = make(cases, data.labels)
    assert found.is_of(cases, data.labels)
    learned = dataclasses.replace(data.fingerprint, survey=found)
    write_json(workdir / "fingerprint.json", learned.to_json())
    data = open_data(typed, workdir)
    assert data.fingerprint == learned
    write_learned(workdir, read_fingerprint(typed, workdir), image=ct_image((-100.0, 100.0)))
    assert read_fingerprint(typed, workdir).survey == found
    case = data.training[0]
    sitk.WriteImage(sitk.ReadImage(case.label) * 0, case.label)
    data = open_data(typed, workdir)
    assert data.fingerprint.survey is None
    assert not found.is_of([*data.training, *data.validation], data.labels)


# ---- as text ----


def test_the_table(tmp_path, one_process):
    assert survey_table(make(hand_made(tmp_path), LABELS)).splitlines() == [
        "3 labelled cases, orientation LPS in 2, SLP in 1; median (smallest to largest):",
        "scans                z           y              x",
        "voxels               4 (2 to 4)  6 (6 to 10)    8",
        "extent, mm           16          12 (10 to 12)  8",
        "spacing, mm          4 (4 to 8)  2 (1 to 2)     1",
        "10th percentile, mm  4           1.2            1",
        "",
        "classes in all label maps; medians over the cases that have the class, lengths along z × y × x:",
        "class  cases   share    voxels        volume, ml              extent, mm  largest, mm  thickness, mm",
        "liver  2 of 3  4.67 %   14 (4 to 24)  0.104 (0.016 to 0.192)  12 × 8 × 6  16 × 10 × 8  6 × 3.5 × 3",
        "duct   1 of 2  0.357 %  1             0.008                   4 × 2 × 1   4 × 2 × 1    4 × 2 × 1",
        "never  0 of 2  0 %      –             –                       –           –            –",
    ]
