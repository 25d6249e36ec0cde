"""Which case is for what: drawn once, written down, and compared with the data set at every later start."""

import dataclasses
import json
import os
from pathlib import Path

import pytest
from refusals import refused

from autocontext_jax.data.datasets import Case, Dataset
from autocontext_jax.data.labels import LabelSpec
from autocontext_jax.data.split import (
    Split,
    compare,
    content_checksum,
    draw_validation,
    make_split,
    same_scans,
    sides_of,
)


def cases_of(count):
    return [Case(f"c{index:02d}", (Path(f"c{index:02d}.nii"),), None) for index in range(count)]


def test_split_is_a_partition_that_depends_on_the_seed_alone():
    cases = cases_of(20)
    training, validation = draw_validation(cases, fraction=0.25, seed=3)
    assert (len(training), len(validation)) == (15, 5)
    assert sorted((*training, *validation), key=lambda case: case.name) == cases
    assert draw_validation(cases[::-1], fraction=0.25, seed=3) == (training, validation)
    assert len({draw_validation(cases, fraction=0.25, seed=seed) for seed in range(5)}) == 5


@pytest.mark.parametrize(
    ("count", "fraction", "sizes"), [(0, 0.5, (0, 0)), (1, 0.9, (1, 0)), (2, 0.01, (1, 1)), (3, 0.99, (1, 2))]
)
def test_split_leaves_one_on_either_side(count, fraction, sizes):
    assert tuple(map(len, draw_validation(cases_of(count), fraction=fraction, seed=0))) == sizes


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, float("nan")])
def test_split_refuses_what_is_no_fraction(fraction):
    refused(lambda: draw_validation(cases_of(4), fraction=fraction, seed=0), fraction)


# ---- split.json ----


@pytest.fixture
def dataset(tmp_path) -> Dataset:
    """Three training cases and two test cases, one of them without a label; files of a few bytes."""

    def case(name: str, side: str, labelled: bool = True) -> Case:
        image, label = tmp_path / f"images{side}" / name, tmp_path / f"labels{side}" / name
        for path in (image, label)[: 1 + labelled]:
            path.parent.mkdir(exist_ok=True)
            path.write_text(f"{path.parent.name} of {name}", encoding="utf-8")
        return Case(name, (image,), label if labelled else None)

    training = tuple(case(name, "Tr") for name in ("a", "b", "c"))
    return Dataset(
        tmp_path,
        LabelSpec.plain(("background", "one")),
        ("CT",),
        training,
        (case("d", "Ts"), case("e", "Ts", labelled=False)),
    )


@pytest.fixture
def split(dataset) -> Split:
    first, *rest = dataset.training
    return make_split(dataset, sides_of(dataset, rest, [first]))


def names(cases) -> list[str]:
    return [case.name for case in cases]


def test_every_case_has_its_side_and_survives_json(dataset, split):
    assert names(split.of("validation", dataset)) == ["a"]
    assert names(split.of("training", dataset)) == ["b", "c"]
    assert names(split.of("test", dataset)) == ["d", "e"]
    assert Split.from_json(json.loads(json.dumps(split.to_json()))) == split
    (case,) = split.of("validation", dataset)
    assert case.checksum == content_checksum(case) != ""


def test_cases_that_a_fold_leaves_out_are_unused(dataset):
    split = make_split(dataset, sides_of(dataset, dataset.training[:1], dataset.training[1:2]))
    assert {name: case.side for name, case in split.cases.items()} == {
        "a": "training", "b": "validation", "c": "unused", "d": "test", "e": "test",
    }  # fmt: skip


def test_an_unchanged_data_set_shows_no_change_and_nothing_of_it_is_read(dataset, split, monkeypatch):
    def read(self, *arguments, **keywords):
        raise AssertionError(f"{self} was opened")

    monkeypatch.setattr(Path, "open", read)
    now, changes = compare(split, dataset)
    assert now == split
    assert (changes.lost, changes.new, changes.changed, changes.labels) == ((), (), (), None)


def test_a_file_that_was_only_touched_is_read_and_found_the_same(dataset, split):
    os.utime(dataset.training[0].images[0], ns=(1, 1))
    now, changes = compare(split, dataset)
    assert changes.changed == ()
    assert now.cases["a"].images[0].modified == 1


def test_a_case_that_was_added_changes_no_side(dataset, split):
    (more := dataset.root / "more").write_text("x", encoding="utf-8")
    larger = dataclasses.replace(dataset, training=(*dataset.training, Case("bb", (more,), more)))
    now, changes = compare(split, larger)
    assert changes.new == ("bb",)
    assert now == split


def test_corrected_labels_are_noticed(dataset, split):
    label = dataset.training[1].label
    label.write_text("corrected", encoding="utf-8")
    now, changes = compare(split, dataset)
    assert changes.changed == ("b",)
    assert now.cases["b"].side == "training"
    assert now.cases["b"].label != split.cases["b"].label


def test_voxels_beside_a_header_belong_to_the_file(dataset, tmp_path):
    header = tmp_path / "labelsTr/b.mhd"
    header.write_text("ObjectType = Image\nElementDataFile = b.raw\n", encoding="utf-8")
    header.with_suffix(".raw").write_bytes(b"before")
    training = tuple(dataclasses.replace(case, label=header) if case.name == "b" else case for case in dataset.training)
    dataset = dataclasses.replace(dataset, training=training)
    split = make_split(dataset, sides_of(dataset, dataset.training, []))
    header.with_suffix(".raw").write_bytes(b"behind")
    _, changes = compare(split, dataset)
    assert changes.changed == ("b",)
    # A record of before is of the header alone: that is no change.
    status = header.stat()
    label = dataclasses.replace(split.cases["b"].label, bytes=status.st_size, modified=status.st_mtime_ns)
    before = dataclasses.replace(split, cases={**split.cases, "b": dataclasses.replace(split.cases["b"], label=label)})
    assert compare(before, dataset)[1].changed == ()
    header.with_suffix(".raw").unlink()  # reading the case says so
    _, changes = compare(split, dataset)
    assert changes.changed == ("b",)


def test_a_scan_on_two_sides_is_found(dataset):
    first, second, third = dataset.training
    third.images[0].write_bytes(first.images[0].read_bytes())
    assert same_scans(make_split(dataset, sides_of(dataset, [first, second], [third]))) == [("a", "c")]
    assert same_scans(make_split(dataset, sides_of(dataset, [first, third], [second]))) == []


def test_another_folder_with_the_same_content_is_the_same_data_set(dataset, split, tmp_path_factory):
    root = tmp_path_factory.mktemp("moved")

    def moved(case: Case) -> Case:
        files = []
        for path in (case.images[0], case.label):
            new = None
            if path is not None:
                new = root / path.relative_to(dataset.root)
                new.parent.mkdir(exist_ok=True)
                new.write_bytes(path.read_bytes())
            files.append(new)
        return Case(case.name, tuple(files[:-1]), files[-1])

    other = dataclasses.replace(
        dataset, root=root, training=tuple(map(moved, dataset.training)), test=tuple(map(moved, dataset.test))
    )
    _, changes = compare(split, other)
    assert (changes.lost, changes.new, changes.changed) == ((), (), ())


def test_what_is_lost_is_named(dataset, split):
    _, changes = compare(split, dataclasses.replace(dataset, training=dataset.training[1:]))
    assert changes.lost == ("a",)
    unlabelled = tuple(dataclasses.replace(case, label=None) for case in dataset.test)
    _, changes = compare(split, dataclasses.replace(dataset, test=unlabelled))
    assert changes.lost == ("the label of d",)


def test_other_classes_are_named(dataset, split):
    for labels in (LabelSpec.plain(("background", "two")), LabelSpec.plain(("background", "one"), (0, 7))):
        _, changes = compare(split, dataclasses.replace(dataset, labels=labels))
        assert changes.labels == labels


def test_a_case_that_annotates_other_classes_has_changed(dataset, split):
    first, *rest = dataset.training
    partly = dataclasses.replace(dataset, training=(dataclasses.replace(first, annotated=("one",)), *rest))
    now, changes = compare(split, partly)
    assert changes.changed == ("a",)
    assert Split.from_json(json.loads(json.dumps(now.to_json()))) == now
    assert now.of("validation", partly)[0].annotated == ("one",)
    assert compare(now, partly)[1].changed == ()
    assert compare(now, dataset)[1].changed == ("a",)


def test_regions_and_ignore_survive_json(dataset, split):
    members = ((0,), (1, 2), (2,))
    labels = LabelSpec(("background", "whole", "core"), (0, 3, 7), members, (0, 3, 7), ignore=9)
    other = dataclasses.replace(split, labels=labels)
    assert Split.from_json(json.loads(json.dumps(other.to_json()))) == other


def test_a_split_of_an_earlier_version(dataset, split):
    """It named the classes alone: their values were 0, 1, 2, ..., and each case annotated all."""
    content = split.to_json()
    old = {"format": content["format"], "classes": content["classes"], "cases": content["cases"]}
    assert Split.from_json(json.loads(json.dumps(old))) == split
