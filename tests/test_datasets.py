import json
import re
from pathlib import Path

import pytest
from refusals import refused

from autocontext_jax.data import datasets
from autocontext_jax.data.datasets import Case
from autocontext_jax.data.labels import LabelSpec

SHARED = Path(__file__).resolve().parents[1].parent / "shared" / "data"


def touch(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def describe(root, description, **changes):
    """Writes dataset.json; a change to None takes its key away."""
    kept = {key: value for key, value in {**description, **changes}.items() if value is not None}
    (root / "dataset.json").write_text(json.dumps(kept), encoding="utf-8")


NNUNET = {
    "channel_names": {"0": "CT"},
    "labels": {"background": 0, "vein": 2, "artery": 1},
    "file_ending": ".nii.gz",
    "numTraining": 2,
}
MSD = {
    "modality": {"0": "CT"},
    "labels": {"0": "background", "1": "artery", "2": "vein"},
    "training": [
        {"image": "./imagesTr/b.nii.gz", "label": "./labelsTr/b.nii.gz"},
        {"image": "./imagesTr/a.nii.gz", "label": "./labelsTr/a.nii.gz"},
        {"image": "./imagesTr/._a.nii.gz", "label": "./labelsTr/._a.nii.gz"},
    ],
    "test": ["./imagesTs/t.nii.gz", "./imagesTs/._t.nii.gz"],
}


@pytest.fixture
def nnunet(tmp_path):
    touch(tmp_path, "imagesTr/b_1_0000.nii.gz", "imagesTr/a_0000.nii.gz", "imagesTr/._a_0000.nii.gz", "imagesTr/note")
    touch(tmp_path, "labelsTr/b_1.nii.gz", "labelsTr/a.nii.gz", "labelsTr/._a.nii.gz")
    touch(tmp_path, "imagesTs/t_0000.nii.gz", "imagesTs/u_0000.nii.gz", "labelsTs/t.nii.gz")
    describe(tmp_path, NNUNET)
    return tmp_path


@pytest.fixture
def msd(tmp_path):
    touch(tmp_path, "imagesTr/a.nii.gz", "imagesTr/b.nii.gz", "labelsTr/a.nii.gz", "labelsTr/b.nii.gz")
    touch(tmp_path, "imagesTs/t.nii.gz", "imagesTr/._a.nii.gz", "labelsTr/._a.nii.gz")
    describe(tmp_path, MSD)
    return tmp_path


def test_as_many_training_cases_as_the_file_says(nnunet):
    describe(nnunet, NNUNET, numTraining=3)
    refused(lambda: datasets.read_dataset(nnunet), '"numTraining" is 3', nnunet / "imagesTr", "has 2 cases")


def test_another_number_of_test_cases_is_named(nnunet, caplog):
    """Test cases may have been removed, and nnU-Net does not look at their number."""
    describe(nnunet, NNUNET, numTest=1)
    assert len(datasets.read_dataset(nnunet).test) == 2
    assert '"numTest" is 1, and imagesTs has 2 cases: no others are taken' in caplog.text


def test_nnunet(nnunet):
    dataset = datasets.read_dataset(str(nnunet))
    assert dataset.root == nnunet
    assert dataset.labels.classes == ("background", "artery", "vein")
    assert dataset.training == (
        Case("a", (nnunet / "imagesTr/a_0000.nii.gz",), nnunet / "labelsTr/a.nii.gz"),
        Case("b_1", (nnunet / "imagesTr/b_1_0000.nii.gz",), nnunet / "labelsTr/b_1.nii.gz"),
    )
    assert dataset.test == (
        Case("t", (nnunet / "imagesTs/t_0000.nii.gz",), nnunet / "labelsTs/t.nii.gz"),
        Case("u", (nnunet / "imagesTs/u_0000.nii.gz",), None),
    )


def test_msd(msd):
    dataset = datasets.read_dataset(msd)
    assert dataset.labels.classes == ("background", "artery", "vein")
    assert [case.name for case in dataset.training] == ["a", "b"]
    assert dataset.training[0] == Case("a", (msd / "imagesTr/a.nii.gz",), msd / "labelsTr/a.nii.gz")
    assert dataset.test == (Case("t", (msd / "imagesTs/t.nii.gz",), None),)
    touch(msd, "labelsTs/t.nii.gz")
    assert datasets.read_dataset(msd).test[0].label == msd / "labelsTs/t.nii.gz"


def test_a_folder_of_links_to_another_disk_is_inside(msd, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("disk") / "images"
    (msd / "imagesTr").rename(elsewhere)
    (msd / "imagesTr").symlink_to(elsewhere)
    assert len(datasets.read_dataset(msd).training) == 2


def test_no_data_set(tmp_path):
    refused(lambda: datasets.read_dataset(tmp_path / "gone"), tmp_path / "gone", "not a folder")
    refused(lambda: datasets.read_dataset(tmp_path), tmp_path, "no dataset.json")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (b'{\n "labels": {},\n "x" 3}', ["dataset.json, line 3", "not JSON"]),
        (b"\xff\xfe\x00", ["dataset.json is not text"]),
        (b"[1]", ["list", "object"]),
        (b'{"labels": {}}', ["channel_names", "training", "found labels"]),
    ],
)
def test_a_bad_dataset_json(tmp_path, text, parts):
    (tmp_path / "dataset.json").write_bytes(text)
    refused(lambda: datasets.read_dataset(tmp_path), *parts)


@pytest.mark.parametrize("key", ["labels", "file_ending"])
def test_a_missing_key_of_nnunet(nnunet, key):
    describe(nnunet, NNUNET, **{key: None})
    refused(lambda: datasets.read_dataset(nnunet), "dataset.json", f'lacks the key "{key}"')


@pytest.mark.parametrize("key", ["labels", "modality"])
def test_a_missing_key_of_msd(msd, key):
    describe(msd, MSD, **{key: None})
    refused(lambda: datasets.read_dataset(msd), "dataset.json", f'lacks the key "{key}"')


@pytest.mark.parametrize(
    ("labels", "part"),
    [
        ({"background": 0, "artery": 1, "vein": 1}, 'the labels "artery" and "vein" both have the value 1'),
        ({"artery": 1, "vein": 2}, "artery 1, vein 2"),
        ({"artery": 0, "background": 1}, 'label 0 is "artery"'),
        ({"background": 0, "vessel": [1, 2]}, "labels are regions"),
        ({"background": 0, "artery": 1.5}, "1.5"),
        (["background", "artery"], '"labels" is a list'),
    ],
)
def test_bad_labels(nnunet, labels, part):
    describe(nnunet, NNUNET, labels=labels)
    refused(lambda: datasets.read_dataset(nnunet), "dataset.json", part)


def test_labels_of_any_value(nnunet):
    describe(nnunet, NNUNET, labels={"vein": 420, "background": 0, "artery": 205, "ignore": 1000})
    labels = datasets.read_dataset(nnunet).labels
    assert labels == LabelSpec.plain(("background", "artery", "vein"), (0, 205, 420), ignore=1000)


def test_labels_of_any_value_of_msd(msd):
    describe(msd, MSD, labels={"0": "background", "3": "artery", "1": "vein", "255": "ignore"})
    labels = datasets.read_dataset(msd).labels
    assert labels == LabelSpec.plain(("background", "vein", "artery"), (0, 1, 3), ignore=255)


def test_regions_of_nnunet(nnunet):
    regions = {"background": 0, "whole": [1, 2, 3], "core": [3, 2], "enhancing": 3}
    describe(nnunet, NNUNET, labels=regions, regions_class_order=[1, 2, 3])
    labels = datasets.read_dataset(nnunet).labels
    assert labels.classes == ("background", "whole", "core", "enhancing")
    assert labels.regions == ((1, 2, 3), (2, 3), (3,))
    assert labels.mask_values == (0, 1, 2, 3)


@pytest.mark.parametrize("layout", ["nnunet", "msd"])
def test_what_single_cases_annotate(request, layout, caplog):
    root, description = request.getfixturevalue(layout), {"nnunet": NNUNET, "msd": MSD}[layout]
    describe(root, description, annotated={"a": ["vein"], "t": ["artery", "vein", "background"]})
    dataset = datasets.read_dataset(root)
    assert not [record for record in caplog.records if "keys are not known" in record.getMessage()]
    assert {case.name: case.annotated for case in (*dataset.training, *dataset.test) if case.annotated} == {
        "a": ("vein",)
    }
    for annotated, parts in (
        ({"z": ["vein"]}, ["'z'", "none of the data set"]),
        ({"a": ["liver"]}, ["case a", "'liver'", "artery, vein"]),
        ({"a": []}, ["case a", "no class"]),
        ({"a": ["background"]}, ["case a", "no class"]),
        ({"a": "vein"}, ["case a", "'vein'", "expected {"]),
        (["a"], ["['a']", "expected {"]),
    ):
        describe(root, description, annotated=annotated)
        refused(lambda: datasets.read_dataset(root), "dataset.json", '"annotated"', *parts)


def test_labels_that_are_whole_numbers_of_another_kind(nnunet):
    describe(nnunet, NNUNET, labels={"background": 0.0, "artery": 1.0, "vein": "2"})
    assert datasets.read_dataset(nnunet).labels.classes == ("background", "artery", "vein")


def test_bad_labels_of_msd(msd):
    describe(msd, MSD, labels={"0": "background", "1": "artery", "2": "artery"})
    refused(lambda: datasets.read_dataset(msd), "labels 1 and 2", "artery", "once")
    describe(msd, MSD, labels={"0": "background", "one": "artery"})
    refused(lambda: datasets.read_dataset(msd), "'one'")


def test_more_than_one_channel_of_nnunet(nnunet):
    touch(nnunet, "imagesTr/a_0001.nii.gz")
    refused(lambda: datasets.read_dataset(nnunet), "case a", "a_0000.nii.gz, a_0001.nii.gz", "one channel")


def test_several_channels_of_msd_are_in_one_file(msd):
    describe(msd, MSD, modality={"1": "ADC", "0": "T2"})
    dataset = datasets.read_dataset(msd)
    assert dataset.channels == ("T2", "ADC")
    assert dataset.training[0].images == (msd / "imagesTr/a.nii.gz",)


def test_nnunet_files_that_do_not_pair(nnunet):
    (nnunet / "labelsTr/a.nii.gz").unlink()
    refused(lambda: datasets.read_dataset(nnunet), "case a:", "no label")
    touch(nnunet, "labelsTr/a.nii.gz", "labelsTr/c.nii.gz")
    refused(lambda: datasets.read_dataset(nnunet), "case c:", "no image")
    (nnunet / "labelsTr/c.nii.gz").unlink()
    touch(nnunet, "imagesTr/plain.nii.gz")
    refused(lambda: datasets.read_dataset(nnunet), "plain.nii.gz", "_0000")


def test_nnunet_folders_and_ending(nnunet):
    describe(nnunet, NNUNET, file_ending=".png")
    refused(lambda: datasets.read_dataset(nnunet), "file_ending", ".png", ".nii.gz")
    describe(nnunet, NNUNET, file_ending=".mha")
    refused(lambda: datasets.read_dataset(nnunet), '"file_ending" is ".mha"', "found a_0000.nii.gz, b_1_0000.nii.gz")
    describe(nnunet, NNUNET)
    (nnunet / "labelsTr").rename(nnunet / "labels")
    refused(lambda: datasets.read_dataset(nnunet), "no folder labelsTr")


def test_a_case_named_twice(nnunet):
    touch(nnunet, "imagesTs/a_0000.nii.gz")
    refused(lambda: datasets.read_dataset(nnunet), "case a more than once")


def test_a_folder_that_cannot_be_read(nnunet, monkeypatch):
    def refuse(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)
    refused(lambda: datasets.read_dataset(nnunet), nnunet / "imagesTr", "cannot be read: Permission denied")


def test_a_file_ending_in_capitals(nnunet):
    for path in list(nnunet.glob("*T*/*.nii.gz")):
        path.rename(path.with_name(path.name.replace(".nii.gz", ".NII.GZ")))
    describe(nnunet, NNUNET, file_ending=".NII.GZ")
    assert [case.name for case in datasets.read_dataset(nnunet).training] == ["a", "b_1"]


def test_msd_lists(msd):
    describe(msd, MSD, training=MSD["training"][:1] * 2)
    refused(lambda: datasets.read_dataset(msd), "case b more than once")
    describe(msd, MSD, training=[{"image": "imagesTr/a.nii.gz"}])
    refused(lambda: datasets.read_dataset(msd), "case a:", "no label")
    describe(msd, MSD, training=[{"label": "labelsTr/a.nii.gz"}])
    refused(lambda: datasets.read_dataset(msd), 'lacks the key "image"')
    describe(msd, MSD, training={"image": "imagesTr/a.nii.gz"})
    refused(lambda: datasets.read_dataset(msd), '"training" is an object: expected a list')
    describe(msd, MSD, training=[], test=[])
    refused(lambda: datasets.read_dataset(msd), "no training case")
    describe(msd, MSD)
    (msd / "labelsTr/a.nii.gz").unlink()
    refused(lambda: datasets.read_dataset(msd), "case a:", "label", "does not exist")
    (msd / "imagesTr/a.nii.gz").unlink()
    refused(lambda: datasets.read_dataset(msd), "case a:", "imagesTr/a.nii.gz does not exist")


@pytest.mark.parametrize("path", ["../other/a.nii.gz", "imagesTr/../../a.nii.gz", "/etc/a.nii.gz"])
def test_msd_paths_that_lead_out(msd, path):
    describe(msd, MSD, training=[{"image": path, "label": "labelsTr/a.nii.gz"}])
    refused(lambda: datasets.read_dataset(msd), path, "inside")
    describe(msd, MSD, training=[{"image": "imagesTr/a.nii.gz", "label": path}])
    refused(lambda: datasets.read_dataset(msd), path, "inside")


def test_real_data_sets():
    if not SHARED.exists():
        pytest.skip(f"the shared scans {SHARED} are not on this machine")
    dataset = datasets.read_dataset(SHARED / "openkbp")
    assert (len(dataset.training), len(dataset.test), len(dataset.labels.classes)) == (24, 6, 8)
    assert all(re.fullmatch(r"pt_\d+", case.name) and case.label for case in (*dataset.training, *dataset.test))
    assert dataset.labels.classes[7] == "Mandible"
    assert datasets.read_dataset(SHARED / "abdomen").test == ()
