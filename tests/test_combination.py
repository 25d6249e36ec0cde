"""Several data sets as one: the union of their classes, each case with what its data set annotates."""

import json
from pathlib import Path

import numpy as np
import pytest

from autocontext_jax.data.combination import read_datasets
from autocontext_jax.data.label_maps import read_label_map
from autocontext_jax.data.labels import FileLabels, LabelSpec
from autocontext_jax.errors import UserError
from autocontext_jax.images import scans
from autocontext_jax.jobs.data_config import DataConfig

SIZE = (4, 5, 6)


def data_set(root: Path, labels: dict, cases: str = "", test: str = "", **more) -> Path:
    for side, names in (("Tr", cases), ("Ts", test)):
        for name in names:
            for path in (root / f"images{side}/{name}_0000.nii.gz", root / f"labels{side}/{name}.nii.gz"):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()
    counts = {"numTraining": len(cases), "numTest": len(test)}
    description = {"channel_names": {"0": "CT"}, "labels": labels, "file_ending": ".nii.gz", **counts, **more}
    root.mkdir(parents=True, exist_ok=True)
    (root / "dataset.json").write_text(json.dumps(description), encoding="utf-8")
    return root


def refused(folders, *parts):
    with pytest.raises(UserError) as caught:
        read_datasets(folders)
    assert "\n" not in str(caught.value)
    for part in parts:
        assert str(part) in str(caught.value)


def test_one_folder_is_read_as_it_is(tmp_path):
    root = data_set(tmp_path / "A", {"background": 0, "whole": [1, 2], "core": 2}, "a", regions_class_order=[1, 2])
    dataset = read_datasets([root])
    assert (dataset.root, dataset.folders, dataset.place) == (root, (), str(root))
    assert dataset.labels.regions


def test_the_union_of_two(tmp_path, caplog):
    first = data_set(tmp_path / "A", {"background": 0, "spleen": 3, "liver": 1}, "xa", "t")
    second = data_set(
        tmp_path / "deep/B", {"background": 0, "kidney": 5, "liver": 1}, "xb", annotated={"b": ["kidney"]}
    )
    dataset = read_datasets([first, second])
    assert not caplog.records
    assert dataset.labels == LabelSpec.plain(("background", "liver", "spleen", "kidney"), (0, 1, 3, 5))
    assert dataset.root == tmp_path
    assert dataset.sources == (first, second)
    assert dataset.place == f"{first}, {second}"
    found = {case.name: (case.annotated, case.files) for case in dataset.training}
    ours, theirs = FileLabels((0, 1, 3), (0, 1, 2)), FileLabels((0, 1, 5), (0, 1, 3))
    assert found == {
        "A_x": (("liver", "spleen"), ours),
        "B_x": (("liver", "kidney"), theirs),
        "a": (("liver", "spleen"), ours),
        "b": (("kidney",), theirs),
    }
    assert [case.name for case in dataset.training] == sorted(found)
    assert [(case.name, case.annotated) for case in dataset.test] == [("t", ("liver", "spleen"))]


def test_a_data_set_with_all_classes_annotates_all(tmp_path):
    first = data_set(tmp_path / "A", {"background": 0, "liver": 1, "spleen": 2}, "a")
    second = data_set(tmp_path / "B", {"background": 0, "liver": 1}, "b")
    assert [case.annotated for case in read_datasets([first, second]).training] == [None, ("liver",)]


@pytest.mark.parametrize(
    ("one", "two"),
    [({"liver": 1}, {"liver": 2}), ({"liver": 1}, {"spleen": 1}), ({"liver": 6, "spleen": 1}, {"spleen": 6})],
)
def test_values_that_do_not_agree_are_numbered_anew(tmp_path, caplog, one, two):
    folders = [
        data_set(tmp_path / name, {"background": 0, **labels}, name) for name, labels in (("A", one), ("B", two))
    ]
    labels = read_datasets(folders).labels
    assert labels.mask_values == tuple(range(len(labels.classes)))
    (record,) = caplog.records
    assert "values do not agree" in record.getMessage()
    assert str(folders[1]) in record.getMessage()


def test_every_case_is_read_by_the_values_of_its_own_data_set(tmp_path):
    """From files of different values to one union of numbers, voxel by voxel."""
    descriptions = {"A": {"background": 0, "liver": 7, "spleen": 300}, "B": {"background": 0, "spleen": 1, "kidney": 2}}
    folders = [data_set(tmp_path / name, labels, "x") for name, labels in descriptions.items()]
    rng = np.random.default_rng(0)
    truth = {}
    for folder, labels in zip(folders, descriptions.values(), strict=True):
        values = rng.choice(list(labels.values()), SIZE)
        truth[f"{folder.name}_x"] = values, {value: name for name, value in labels.items()}
        scans.write_scan(folder / "imagesTr/x_0000.nii.gz", np.zeros(SIZE, np.int16), (1, 1, 1))
        scans.write_scan(folder / "labelsTr/x.nii.gz", values.astype(np.uint16), (1, 1, 1))
    dataset = read_datasets(folders)
    for case in dataset.training:
        values, names = truth[case.name]
        stored = read_label_map(case, dataset.labels, scans.read_grid(case.images))
        found = np.array(dataset.labels.classes)[stored]
        assert found.tolist() == np.vectorize(names.get)(values).tolist()


def test_folders_of_the_same_name_are_told_apart_by_those_above(tmp_path):
    folders = [data_set(tmp_path / above / "data", {"background": 0, "a": 1}, "x") for above in ("one", "two")]
    assert [case.name for case in read_datasets(folders).training] == ["one_data_x", "two_data_x"]


def test_names_that_are_spelled_in_two_ways_are_named(tmp_path, caplog):
    first = data_set(tmp_path / "A", {"background": 0, "left kidney": 1}, "a")
    second = data_set(tmp_path / "B", {"background": 0, "Left_Kidney": 2}, "b")
    assert read_datasets([first, second]).labels.classes == ("background", "left kidney", "Left_Kidney")
    assert "different classes: left kidney and Left_Kidney" in caplog.text


def test_what_cannot_be_combined(tmp_path):
    plain = data_set(tmp_path / "A", {"background": 0, "liver": 1}, "a")
    regions = data_set(tmp_path / "B", {"background": 0, "w": [1, 2], "c": 2}, "b", regions_class_order=[1, 2])
    ignore = data_set(tmp_path / "C", {"background": 0, "liver": 1, "ignore": 2}, "c")
    refused([plain, regions], regions, "has regions among its labels", "2 data sets")
    refused([ignore, plain], ignore, 'has "ignore" among its labels')
    refused([plain, tmp_path / "A/../A"], plain, "more than once")
    refused([plain, tmp_path / "gone"], tmp_path / "gone", "not a folder")
    many = [
        data_set(tmp_path / name, {"background": 0, **{f"{name}{n}": n for n in range(1, 129)}}, name) for name in "DE"
    ]
    refused(many, "257 classes", "at most 255")
    one = data_set(tmp_path / "F", {"background": 0, "liver": 1}, ["x"])
    two = data_set(tmp_path / "G", {"background": 0, "liver": 1}, ["x", "F_x"])
    refused([one, two], "F_x", "rename one")


def test_folders_of_the_configuration(tmp_path):
    assert DataConfig().folders == ()
    assert DataConfig(root="A").folders == (Path("A"),)
    assert DataConfig(root="A, /b/B,").folders == (Path("A"), Path("/b/B"))
    assert DataConfig(root="~/A,B").folders == (Path("~/A").expanduser(), Path("B"))
    odd = tmp_path / "A,B"
    odd.mkdir()
    assert DataConfig(root=str(odd)).folders == (odd,)
