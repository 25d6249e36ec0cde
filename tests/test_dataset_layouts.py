"""Which files a data set's folder gives: each test lays out its own files and compares with what it wrote."""

import json
import logging
import os
from pathlib import Path

import nibabel
import numpy as np
import pytest

from autocontext_jax.data.datasets import read_dataset
from autocontext_jax.errors import UserError

LABELS = {"background": 0, "liver": 1, "spleen": 2}
BY_VALUE = {str(value): name for name, value in LABELS.items()}


def scan(path: Path, value: int) -> Path:
    """A scan or a label whose every voxel is `value`: read again, it says which file it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(np.full((4, 4, 4), value, np.int16), np.eye(4)), path)
    return path


def values(cases) -> dict[str, tuple[int, int | None]]:
    """What the files of each case hold, read by nibabel."""

    def value(path: Path) -> int:
        return int(np.asarray(nibabel.load(path).dataobj)[0, 0, 0])

    return {case.name: (value(case.images[0]), None if case.label is None else value(case.label)) for case in cases}


def describe(root: Path, **keys) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    (root / "dataset.json").write_text(json.dumps(keys), encoding="utf-8")
    return root


def nnunet(root: Path, **more) -> Path:
    keys = {"channel_names": {"0": "CT"}, "labels": LABELS, "file_ending": ".nii.gz"}
    return describe(root, **keys, **more)


def msd(root: Path, training: list, **more) -> Path:
    return describe(root, modality={"0": "CT"}, labels=BY_VALUE, training=training, **more)


def entry(image: object, label: object) -> dict:
    return {"image": str(image), "label": str(label)}


def refusal(root: Path, **options) -> str:
    with pytest.raises(UserError) as caught:
        read_dataset(root, **options)
    assert "\n" not in str(caught.value)
    assert str(root) in str(caught.value)
    return str(caught.value)


@pytest.fixture
def warnings(caplog):
    """The lines warned of by the call."""

    def read(root: Path, **options):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            dataset = read_dataset(root, **options)
        return dataset, [record.getMessage() for record in caplog.records]

    return read


# ---- nnU-Net v2's key "dataset" ----


def test_the_key_dataset_names_the_files(tmp_path, warnings):
    for number, name in enumerate(("c0", "c1")):
        scan(tmp_path / f"imagesTr/{name}_0000.nii.gz", 10 + number)
        scan(tmp_path / f"labelsTr/{name}.nii.gz", 0)
        scan(tmp_path / f"labelsTr2/{name}.nii.gz", 1 + number)
    files = {f"c{n}": {"images": [f"imagesTr/c{n}_0000.nii.gz"], "label": f"./labelsTr2/c{n}.nii.gz"} for n in (0, 1)}
    dataset, lines = warnings(nnunet(tmp_path, numTraining=2, dataset=files))
    assert values(dataset.training) == {"c0": (10, 1), "c1": (11, 2)}
    (line,) = lines  # labels lie where they usually do, and are not taken
    assert "labelsTr/c0.nii.gz, labelsTr/c1.nii.gz" in line
    assert '"dataset" does not name them' in line


def test_the_key_dataset_needs_no_usual_folder(tmp_path, warnings):
    scan(tmp_path / "patient 7/ct.nii.gz", 5)
    scan(tmp_path / "patient 7/organs.nii.gz", 1)
    scan(tmp_path / "imagesTs/t_0000.nii.gz", 6)
    files = {"seven": {"images": ["patient 7/ct.nii.gz"], "label": "patient 7/organs.nii.gz"}}
    dataset, lines = warnings(nnunet(tmp_path, dataset=files, numTraining=1, numTest=1))
    assert values(dataset.training) == {"seven": (5, 1)}
    assert values(dataset.test) == {"t": (6, None)}
    assert lines == []


def test_environment_variables_in_the_key_dataset(tmp_path, monkeypatch):
    monkeypatch.setenv("SCANS_OF_TEST", str(tmp_path / "data"))
    scan(tmp_path / "data/a.nii.gz", 5)
    scan(tmp_path / "data/b.nii.gz", 1)
    files = {"a": {"images": ["$SCANS_OF_TEST/a.nii.gz"], "label": "${SCANS_OF_TEST}/b.nii.gz"}}
    assert values(read_dataset(nnunet(tmp_path / "data", dataset=files)).training) == {"a": (5, 1)}


@pytest.mark.parametrize("absolute", [False, True])
def test_paths_outside_are_refused_unless_a_key_allows_them(tmp_path, absolute):
    scan(tmp_path / "disk/a.nii.gz", 7)
    root = tmp_path / "data"
    scan(root / "labels/a.nii.gz", 2)
    words = str(tmp_path / "disk/a.nii.gz") if absolute else "../disk/a.nii.gz"
    nnunet(root, dataset={"a": {"images": [words], "label": "labels/a.nii.gz"}})
    message = refusal(root)
    assert f'"dataset", case a: "{words}" is outside {root}' in message
    assert "--config.data.outside_paths=True" in message
    assert values(read_dataset(root, outside_paths=True).training) == {"a": (7, 2)}
    msd(root, [entry(words, "labels/a.nii.gz")])
    assert f'"training", entry 1: "{words}" is outside' in refusal(root)
    assert values(read_dataset(root, outside_paths=True).training) == {"a": (7, 2)}


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ([], '"dataset" is a list: expected an object'),
        ({"a": 3}, '"dataset", case a is 3: expected'),
        ({"a": {"label": "l.nii.gz"}}, '"dataset", case a lacks the key "images": found label'),
        ({"a": {"images": ["i.nii.gz"]}}, '"dataset", case a lacks the key "label": found images'),
        ({"a": {"images": [], "label": "l.nii.gz"}}, '"images" is empty: expected one path'),
        ({"a": {"images": ["i.nii.gz", "j.nii.gz"], "label": "l.nii.gz"}}, '"i.nii.gz", "j.nii.gz": expected one path'),
        ({"a": {"images": "i.nii.gz", "label": "l.nii.gz"}}, '"images" is "i.nii.gz": expected a list'),
        ({"a": {"images": ["gone.nii.gz"], "label": "l.nii.gz"}}, 'its image "gone.nii.gz" does not exist'),
        ({"a": {"images": ["i.nii.gz"], "label": "gone.nii.gz"}}, 'its label "gone.nii.gz" does not exist'),
        ({"../a": {"images": ["i.nii.gz"], "label": "l.nii.gz"}}, "expected a name that a file can have"),
        ({}, "no training case and no test case"),
    ],
)
def test_a_key_dataset_of_another_form(tmp_path, files, words):
    scan(tmp_path / "i.nii.gz", 1)
    scan(tmp_path / "j.nii.gz", 1)
    scan(tmp_path / "l.nii.gz", 1)
    assert words in refusal(nnunet(tmp_path, dataset=files))


def test_two_cases_of_one_image_are_named(tmp_path, warnings):
    scan(tmp_path / "i.nii.gz", 1)
    files = {}
    for name in "ab":
        scan(tmp_path / f"{name}.nii.gz", 1)
        files[name] = {"images": ["i.nii.gz"], "label": f"{name}.nii.gz"}
    _, (line,) = warnings(nnunet(tmp_path, dataset=files))
    assert "same image" in line
    assert line.endswith("a and b")


# ---- paths that are inside ----


def test_absolute_paths_inside_the_folder_are_inside(tmp_path):
    scan(tmp_path / "imagesTr/a.nii.gz", 3)
    scan(tmp_path / "labelsTr/a.nii.gz", 1)
    training = [entry(tmp_path / "imagesTr/a.nii.gz", tmp_path / "labelsTr/a.nii.gz")]
    assert values(read_dataset(msd(tmp_path, training)).training) == {"a": (3, 1)}
    files = {"a": {"images": [training[0]["image"]], "label": training[0]["label"]}}
    assert values(read_dataset(nnunet(tmp_path, dataset=files)).training) == {"a": (3, 1)}


@pytest.mark.parametrize("way", ["relative folder", "by a link", "words by a link"])
def test_absolute_paths_are_inside_whichever_way_leads_there(tmp_path, monkeypatch, way):
    root, link = tmp_path / "data", tmp_path / "link"
    scan(root / "imagesTr/a.nii.gz", 3)
    scan(root / "labelsTr/a.nii.gz", 1)
    link.symlink_to(root)
    named = link if way == "words by a link" else root
    msd(root, [entry(named / "imagesTr/a.nii.gz", named / "labelsTr/a.nii.gz")])
    monkeypatch.chdir(tmp_path)
    given = {"relative folder": Path("data"), "by a link": link, "words by a link": root}[way]
    dataset = read_dataset(given)
    assert values(dataset.training) == {"a": (3, 1)}
    assert dataset.training[0].images[0] == given / "imagesTr/a.nii.gz"


def test_folders_that_are_links_to_another_disk_are_inside(tmp_path, warnings):
    root = tmp_path / "data"
    scan(tmp_path / "disk/scans/a_0000.nii.gz", 3)
    scan(tmp_path / "disk/labels/a.nii.gz", 1)
    files = {"a": {"images": ["imagesTr/a_0000.nii.gz"], "label": str(root / "labelsTr/a.nii.gz")}}
    nnunet(root, dataset=files)
    (root / "imagesTr").symlink_to(tmp_path / "disk/scans")
    (root / "labelsTr").symlink_to(tmp_path / "disk/labels")
    dataset, lines = warnings(root)
    assert values(dataset.training) == {"a": (3, 1)}
    assert lines == []


# ---- what dataset.json says beside it ----


@pytest.mark.parametrize("layout", ["nnU-Net", "MSD"])
def test_unknown_keys_are_named_once_and_known_ones_are_not(tmp_path, warnings, layout):
    known = dict.fromkeys(
        ("name", "description", "reference", "licence", "license", "release", "citation", "tensorImageSize"), "x"
    ) | {"numTraining": 1, "numTest": 0, "test": []}
    scan(tmp_path / ("imagesTr/a_0000.nii.gz" if layout == "nnU-Net" else "imagesTr/a.nii.gz"), 3)
    scan(tmp_path / "labelsTr/a.nii.gz", 1)
    listed = [entry("imagesTr/a.nii.gz", "./labelsTr/a.nii.gz")]

    def write(**more):
        if layout == "MSD":
            return msd(tmp_path, listed, **known, **more)
        own = {"overwrite_image_reader_writer": "SimpleITKIO", "regions_class_order": [1, 2], "training": listed}
        return nnunet(tmp_path, **known, **own, **more)

    assert warnings(write())[1] == []
    _, (line,) = warnings(write(validation=listed, label_folder="labelsTr2"))
    assert str(tmp_path / "dataset.json") in line
    assert "validation, label_folder" in line


def test_a_list_of_other_labels_beside_the_folders_of_nnunet_is_named(tmp_path, warnings):
    scan(tmp_path / "imagesTr/a_0000.nii.gz", 3)
    scan(tmp_path / "labelsTr/a.nii.gz", 1)
    scan(tmp_path / "labelsTr2/a.nii.gz", 2)
    dataset, (line,) = warnings(nnunet(tmp_path, training=[entry("imagesTr/a.nii.gz", "./labelsTr2/a.nii.gz")]))
    assert values(dataset.training) == {"a": (3, 1)}
    assert "./labelsTr2/a.nii.gz" in line


def test_a_number_that_contradicts_msds_list_is_named_and_so_is_what_the_list_lacks(tmp_path, warnings):
    for name in "abc":
        scan(tmp_path / f"imagesTr/{name}.nii.gz", 3)
        scan(tmp_path / f"labelsTr/{name}.nii.gz", 1)
    scan(tmp_path / "imagesTs/t.nii.gz", 4)
    listed = [entry(f"imagesTr/{name}.nii.gz", f"labelsTr/{name}.nii.gz") for name in "ab"]
    dataset, lines = warnings(msd(tmp_path, listed, numTraining=3, test=[]))
    assert sorted(values(dataset.training)) == ["a", "b"]
    number, left = lines
    assert '"numTraining" is 3, and "training" has 2 cases' in number
    assert "imagesTr/c.nii.gz, labelsTr/c.nii.gz, imagesTs/t.nii.gz" in left
    # A number that agrees, of the list's lines or of its visible files, is no news.
    hidden = [*listed, entry("imagesTr/._a.nii.gz", "labelsTr/._a.nii.gz")]
    for number in (2, 3):
        assert len(warnings(msd(tmp_path, hidden, numTraining=number))[1]) == 1


@pytest.mark.parametrize(
    ("number", "words"),
    [(3, "2 cases: bring the others back"), (1, "2 cases: take the others away"), ("2", 'is "2": expected a whole')],
)
def test_a_number_that_contradicts_the_folder_is_refused(tmp_path, number, words):
    for name in "ab":
        scan(tmp_path / f"imagesTr/{name}_0000.nii.gz", 3)
        scan(tmp_path / f"labelsTr/{name}.nii.gz", 1)
    assert words in refusal(nnunet(tmp_path, numTraining=number))


def test_a_number_that_contradicts_the_key_dataset_is_named(tmp_path, warnings):
    scan(tmp_path / "i.nii.gz", 3)
    scan(tmp_path / "l.nii.gz", 1)
    root = nnunet(tmp_path, dataset={"a": {"images": ["i.nii.gz"], "label": "l.nii.gz"}}, numTraining=2)
    dataset, (line,) = warnings(root)
    assert sorted(values(dataset.training)) == ["a"]
    assert '"numTraining" is 2, and "dataset" has 1 case:' in line


# ---- names and endings ----


def test_nnunet_v1_lists_names_without_their_channel(tmp_path, warnings):
    for number, name in enumerate(("liver_0", "liver_1")):
        scan(tmp_path / f"imagesTr/{name}_0000.nii.gz", 10 + number)
        scan(tmp_path / f"labelsTr/{name}.nii.gz", 1 + number)
    scan(tmp_path / "imagesTs/liver_2_0000.nii.gz", 12)
    scan(tmp_path / "labelsTs/liver_2.nii.gz", 2)
    listed = [entry(f"./imagesTr/liver_{n}.nii.gz", f"./labelsTr/liver_{n}.nii.gz") for n in (0, 1)]
    root = msd(tmp_path, listed, test=["./imagesTs/liver_2.nii.gz"], numTraining=2, numTest=1)
    dataset, lines = warnings(root)
    assert values(dataset.training) == {"liver_0": (10, 1), "liver_1": (11, 2)}
    assert values(dataset.test) == {"liver_2": (12, 2)}
    assert lines == []


def test_a_further_channel_of_nnunet_v1_is_refused(tmp_path):
    scan(tmp_path / "imagesTr/a_0000.nii.gz", 3)
    scan(tmp_path / "imagesTr/a_0001.nii.gz", 4)
    scan(tmp_path / "labelsTr/a.nii.gz", 1)
    message = refusal(msd(tmp_path, [entry("imagesTr/a.nii.gz", "labelsTr/a.nii.gz")]))
    assert "case a" in message
    assert "a_0000.nii.gz, a_0001.nii.gz: expected one channel" in message


@pytest.mark.parametrize("channels", [("0000", "0001"), ("0001",)])
def test_a_further_channel_of_nnunet_v2_is_refused(tmp_path, channels):
    for channel in channels:
        scan(tmp_path / f"imagesTr/a_{channel}.nii.gz", 3)
    scan(tmp_path / "labelsTr/a.nii.gz", 1)
    message = refusal(nnunet(tmp_path))
    assert "case a" in message
    assert f"are {', '.join(f'a_{channel}.nii.gz' for channel in channels)}: expected one channel" in message


def test_files_of_another_ending_are_named(tmp_path, warnings):
    for name in "ab":
        scan(tmp_path / f"imagesTr/{name}_0000.nii.gz", 3)
        scan(tmp_path / f"labelsTr/{name}.nii.gz", 1)
    scan(tmp_path / "imagesTr/c_0000.nii", 5)
    scan(tmp_path / "labelsTr/c.nii", 2)
    (tmp_path / "imagesTr/.DS_Store").touch()
    dataset, lines = warnings(nnunet(tmp_path, numTraining=2))
    assert sorted(values(dataset.training)) == ["a", "b"]
    assert [line.rpartition(": ")[2] for line in lines] == ["c_0000.nii", "c.nii"]
    assert all("do not end in .nii.gz" in line for line in lines)


def test_a_file_ending_that_no_file_has(tmp_path):
    scan(tmp_path / "imagesTr/a_0000.nii", 3)
    scan(tmp_path / "labelsTr/a.nii", 1)
    message = refusal(nnunet(tmp_path, numTraining=1))
    assert '"file_ending" is ".nii.gz"' in message
    assert "found a_0000.nii" in message


def test_a_missing_label_is_told_with_the_name_it_should_have(tmp_path):
    for name in "ab":
        scan(tmp_path / f"imagesTr/{name}_0000.nii.gz", 3)
    scan(tmp_path / "labelsTr/a.nii.gz", 1)
    assert f"expected {tmp_path / 'labelsTr/b.nii.gz'}" in refusal(nnunet(tmp_path))


def test_a_name_with_a_line_end_stays_on_one_line(tmp_path, warnings):
    scan(tmp_path / "imagesTr/a_0000.nii.gz", 3)
    scan(tmp_path / "labelsTr/a.nii.gz", 1)
    (tmp_path / f"labelsTr/two{os.linesep}lines").touch()
    _, (line,) = warnings(nnunet(tmp_path))
    assert r"two\nlines" in line
    assert "\n" not in line


# ---- test cases alone ----


@pytest.mark.parametrize("folders", [True, False])
def test_test_cases_alone_are_a_data_set(tmp_path, warnings, folders):
    scan(tmp_path / "imagesTs/t_0000.nii.gz", 3)
    scan(tmp_path / "labelsTs/t.nii.gz", 2)
    if folders:
        (tmp_path / "imagesTr").mkdir()
        (tmp_path / "labelsTr").mkdir()
    dataset, lines = warnings(nnunet(tmp_path, numTraining=0, numTest=1))
    assert (dataset.training, values(dataset.test)) == ((), {"t": (3, 2)})
    assert lines == []
    (tmp_path / "imagesTs/t_0000.nii.gz").rename(tmp_path / "imagesTs/t.nii.gz")
    assert values(read_dataset(msd(tmp_path, [], test=["imagesTs/t.nii.gz"])).test) == {"t": (3, 2)}


def test_training_cases_that_are_lost_are_missed_among_test_cases_alone(tmp_path):
    scan(tmp_path / "imagesTs/t_0000.nii.gz", 3)
    assert '"numTraining" is 4' in refusal(nnunet(tmp_path, numTraining=4))
