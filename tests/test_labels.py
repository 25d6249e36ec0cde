"""Labels of any values, regions and ignored voxels: from `dataset.json` to tables, and through JSON."""

import json
from pathlib import Path

import numpy as np
import pytest

from autocontext_jax.data.labels import IGNORE, FileLabels, LabelSpec, parse_labels
from autocontext_jax.errors import UserError

PATH = Path("data/dataset.json")
BRATS = {"background": 0, "whole": [1, 2, 4], "core": [2, 4], "enhancing": 4, "ignore": 9}
REGIONS = LabelSpec(
    ("background", "whole", "core", "enhancing"), (0, 1, 2, 4), ((0,), (1, 2, 3), (2, 3), (3,)), (0, 1, 2, 4), 9
)


def refused(labels, *parts, order=None):
    with pytest.raises(UserError) as caught:
        parse_labels(PATH, labels, order)
    assert str(PATH) in str(caught.value)
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


def test_values_of_any_size_in_any_order():
    largest = 2**31 - 1
    spec = parse_labels(PATH, {"vein": largest, "Background": 0, "artery": "205", "duct": 4.0, "ignore": 7})
    assert spec == LabelSpec.plain(("background", "duct", "artery", "vein"), (0, 4, 205, largest), ignore=7)
    assert (spec.regions, spec.outputs, spec.members) == ((), 4, ((0,), (1,), (2,), (3,)))
    assert spec.files == FileLabels((0, 4, 7, 205, largest), (0, 1, IGNORE, 2, 3))
    assert spec.masks == FileLabels((0, 4, 205, largest), (0, 1, 2, 3))
    assert spec.number_names == spec.classes
    assert parse_labels(PATH, {"background": 0, "one": [3]}).regions == ()  # nnU-Net takes a list of one as a value


def test_regions():
    spec = parse_labels(PATH, BRATS, [1, 2, 4])
    assert spec == REGIONS
    assert (spec.regions, spec.outputs) == (((1, 2, 3), (2, 3), (3,)), 3)
    assert spec.files == FileLabels((0, 1, 2, 4, 9), (0, 1, 2, 3, IGNORE))
    assert spec.number_names == ("background", "whole", "whole + core", "whole + core + enhancing")
    assert spec.shown() == "background 0, whole [1, 2, 4], core [2, 4], enhancing 4; in masks 0, 1, 2, 4; ignore 9"


def test_tables_against_counting_by_value():
    """Every region of a mask and of a label map, voxel by voxel, as a user would count it."""
    spec = parse_labels(PATH, {"background": 0, "kidney": [1, 2, 3], "mass": [3, 2], "tumor": 2}, [1.0, "3", 2])
    values = {"kidney": {1, 2, 3}, "mass": {2, 3}, "tumor": {2}}
    assert spec.mask_values == (0, 1, 3, 2)
    stored = np.array([0, 1, 2, 3, IGNORE], np.uint8)
    in_files = [0, 1, 2, 3, None]
    for number, name in enumerate(spec.classes[1:], start=1):
        assert spec.membership[number][stored].tolist() == [value in values[name] for value in in_files]
        shown = spec.mask_membership[number].tolist()
        assert shown == [value in values[name] for value in (0, 1, 3, 2)]  # of a voxel shown as class 0, 1, 2, 3
    assert spec.masks == FileLabels((0, 1, 2, 3), (0, 1, 3, 2))
    assert spec.drawn[stored].tolist() == [0, 1, 3, 2, 0]


def test_known_classes():
    assert REGIONS.known(None) == (True,) * 4
    assert REGIONS.known(("core", "whole")) == (True, True, True, False)


@pytest.mark.parametrize(
    "spec", [LabelSpec.plain(("background", "a")), LabelSpec.plain(("background", "a"), (0, 420), ignore=3), REGIONS]
)
def test_a_spec_survives_json(spec):
    assert LabelSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


def test_the_first_files_name_classes_alone():
    assert LabelSpec.from_json({"classes": ["background", "a"]}) == LabelSpec.plain(("background", "a"))
    second = {"classes": ["background", "a"], "values": [0, 7]}
    assert LabelSpec.from_json(second) == LabelSpec.plain(("background", "a"), (0, 7))


def test_a_region_that_hides_an_earlier_one_is_named(caplog):
    parse_labels(PATH, {"background": 0, "core": 2, "whole": [1, 2]}, [2, 1])
    assert "the region whole holds core, and comes later" in caplog.text


MANY = {"background": 0, **{f"organ {value}": value for value in range(1, 256)}}


@pytest.mark.parametrize(
    ("labels", "part"),
    [
        ({"background": 0, "a": 1, "b": 1.0}, 'the labels "a" and "b" both have the value 1'),
        ({"background": 0, "a": 1, "ignore": 1}, 'the labels "a" and "ignore" both have the value 1'),
        ({"background": 0, "a": [1, 2], "b": [2, 1]}, 'the labels "a" and "b" both have the values [1, 2]'),
        ({"background": 0, "a": 1, "ignore": 0}, 'the labels "background" and "ignore" both have the value 0'),
        ({"background": 0, "a": 1, "ignore": [2, 3]}, '"ignore" is the region [2, 3]: expected one value'),
        ({"background": 0, "a": [0, 1], "b": 2}, 'region "a" is [0, 1] with the value of "background"'),
        ({"background": 0, "a": [1, 3], "ignore": 3}, 'region "a" is [1, 3] with the value of "ignore"'),
        ({"background": 0, "a": []}, '"a" is an empty list'),
        ({"background": 0, "a": [1, None]}, '"a" has the value None'),
        ({"a": 1, "b": 2}, "labels are a 1, b 2: expected the background"),
        ({"a": 0, "b": 2}, 'label 0 is "a": expected "background"'),
        ({"background": 0, "a": 1.5}, "1.5"),
        ({"background": 0, "a": True}, "True"),
        ({"background": 0, "a": -1}, "-1: expected a whole number from 0 to 2147483647"),
        ({"background": 0, "a": 2**31}, "2147483648: expected a whole number"),
        ({"background": 0, "a": 10**4000}, '"a" has the value'),
        ({"background": 0, "a": "1" * 5000}, '"a" has the value'),
        ({"background": 0, "a": "²"}, "²"),
        ({"background": 0, "a": float("inf")}, "inf"),
        ({"background": 0, "a": {"b": 1}}, "{'b': 1}"),
        ({"background": 0}, "the only label is background 0: expected one or more beside"),
        ({"background": 0, "ignore": 1}, "the only label is background 0"),
        (MANY, "has 256 labels: expected at most 255"),
        ({}, "labels are none"),
    ],
)
def test_bad_labels(labels, part):
    refused(labels, part, order=[1, 2])


@pytest.mark.parametrize(
    ("order", "parts"),
    [
        (None, ["labels are regions", "for each of the 3 regions whole, core, enhancing"]),
        ([1, 2], ["[1, 2]", "for each of the 3 regions"]),
        ("123", ["'123'"]),
        ([1, 2, 5], ['the region "enhancing" the value 5', "one of its own, 4"]),
        ([4, 2, 4], ['the regions "whole" and "enhancing" the value 4']),
        ([1, True, 4], ["regions_class_order of core", "True"]),
    ],
)
def test_a_bad_order(order, parts):
    refused(BRATS, *parts, order=order)


def test_255_labels_are_enough():
    labels = {name: value for name, value in MANY.items() if value < 255}
    spec = parse_labels(PATH, {**labels, "ignore": 255})
    assert (spec.outputs, spec.files.numbers[-1]) == (255, IGNORE)
