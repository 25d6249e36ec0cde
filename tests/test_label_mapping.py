"""Scores of masks by the labels of any data set, against voxels counted by the values in the files."""

import math
from pathlib import Path

import numpy as np
import pytest

from autocontext_jax.data.labels import IGNORE, LabelSpec
from autocontext_jax.data.layouts import Case
from autocontext_jax.errors import UserError
from autocontext_jax.evaluation import metrics
from autocontext_jax.evaluation.label_mapping import LabelMapping, label_mapping
from autocontext_jax.images import scans

SIZE, SPACING = (6, 7, 8), (2.0, 1.0, 1.5)
PLAIN = LabelSpec.plain(("background", "artery", "vein", "duct"), (0, 5, 205, 420))
REGIONS = LabelSpec(
    ("background", "kidney", "mass", "tumor"), (0, 1, 2, 3), ((0,), (1, 2, 3), (2, 3), (2,)), (0, 1, 3, 2), ignore=9
)
ALL = Case("a", (Path("a"),), Path("a"))


def only(*names: str) -> Case:
    return Case("a", (Path("a"),), Path("a"), annotated=names)


def drawn(numbers, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).choice(np.array(numbers, np.uint8), SIZE)


def expected(predicted: np.ndarray, true: np.ndarray) -> dict[str, float]:
    """Scores of one class from its voxels."""
    return metrics.scores(predicted.astype(int), true.astype(int), ("it",), SPACING, tolerance=1.0)["it"]


def score(mapping: LabelMapping, mask, truth, case=ALL, **options) -> dict:
    return mapping.scores(mask, truth, case, SPACING, tolerance=1.0, **options)


def assert_same(found: dict, wanted: dict) -> None:
    assert found.keys() == wanted.keys()
    for name, scores in wanted.items():
        np.testing.assert_equal(found[name], scores, err_msg=name)


def test_classes_of_the_same_data_set_are_scored_at_once():
    mapping, mask, truth = LabelMapping.same(PLAIN), drawn(range(4)), drawn(range(4), 1)
    assert mapping.annotated == PLAIN.classes[1:]
    assert_same(score(mapping, mask, truth), metrics.scores(mask, truth, PLAIN.classes[1:], SPACING, tolerance=1.0))
    np.testing.assert_array_equal(mapping.shown(truth), truth)


def test_regions_are_unions_of_the_values_of_written_masks_and_label_maps():
    mapping, mask, stored = LabelMapping.same(REGIONS), drawn(range(4)), drawn([0, 1, 2, 3, IGNORE], 1)
    written = scans.label_values(mask, REGIONS.mask_values)
    in_file = np.array([*REGIONS.values, *[0] * 252])[stored]
    seen = stored != IGNORE
    values = {"kidney": (1, 2, 3), "mass": (2, 3), "tumor": (2,)}
    wanted = {
        name: expected(np.isin(written, own) & seen, np.isin(in_file, own) & seen) for name, own in values.items()
    }
    assert_same(score(mapping, mask, stored), wanted)
    last = {0: 0, 1: 1, 2: 3, 3: 2, IGNORE: 0}  # the last region that holds the number
    assert mapping.shown(stored).tolist() == np.vectorize(last.get)(stored).tolist()


def test_a_perfect_mask_of_regions_scores_1():
    mapping, stored = LabelMapping.same(REGIONS), drawn([0, 1, 2, 3, IGNORE])
    found = score(mapping, mapping.shown(stored), stored)
    assert {name: scores["dice"] for name, scores in found.items()} == dict.fromkeys(REGIONS.classes[1:], 1.0)


def test_ignored_voxels_count_neither_for_nor_against():
    """Whatever is predicted there, the scores are the same, distances of surfaces included."""
    spec = LabelSpec.plain(PLAIN.classes, PLAIN.values, ignore=9)
    mapping, stored = LabelMapping.same(spec), drawn([0, 1, 2, 3, IGNORE], 1)
    seen = stored != IGNORE
    first, second = (np.where(seen, drawn(range(4)), other).astype(np.uint8) for other in (0, drawn(range(4), 2)))
    assert (first != second).any()
    truth = np.where(seen, stored, 0)
    wanted = metrics.scores(first, truth, spec.classes[1:], SPACING, tolerance=1.0)
    for mask in (first, second):
        before = mask.copy()
        assert_same(score(mapping, mask, stored), wanted)
        np.testing.assert_array_equal(mask, before)


@pytest.mark.parametrize(("labels", "case"), [(PLAIN, only("vein")), (REGIONS, only("mass"))])
def test_classes_that_a_case_does_not_annotate_have_no_scores(labels, case):
    mapping, mask, truth = LabelMapping.same(labels), drawn(range(4)), drawn(range(4), 1)
    volume = {"voxels": lambda predicted, true, spacing: float(predicted.sum())}
    whole, found = score(mapping, mask, truth, extra=volume), score(mapping, mask, truth, case, extra=volume)
    assert list(found) == list(labels.classes[1:])
    for name, scores in found.items():
        assert list(scores) == [*metrics.METRICS, "voxels"]
        if name in case.annotated:
            np.testing.assert_equal(scores, whole[name])
        else:
            assert all(math.isnan(value) for value in scores.values())


def test_another_data_set_with_other_names_and_numbers():
    theirs = LabelSpec.plain(("background", "Ader", "left", "liver", "right", "artery"), (0, 2, 3, 4, 6, 8))
    ours = LabelSpec.plain(("background", "artery", "vein", "kidney", "spleen"))
    mapping = label_mapping(theirs, ours, ("Ader=vein", "left=kidney", "right=kidney"), "there")
    assert mapping.annotated == ("artery", "vein", "kidney")
    mask, stored = drawn(range(5)), drawn(range(6), 1)
    wanted = {
        "artery": expected(mask == 1, stored == 5),
        "vein": expected(mask == 2, stored == 1),
        "kidney": expected(mask == 3, np.isin(stored, (2, 4))),
    }
    assert_same(score(mapping, mask, stored), wanted)
    np.testing.assert_array_equal(mapping.shown(stored), np.array([0, 2, 3, 0, 3, 1])[stored])
    assert mapping.annotated_by(only("Ader", "left", "liver")) == ("vein",)  # half of the kidneys is unknown
    assert mapping.annotated_by(only("left", "right")) == ("kidney",)


def test_regions_scored_on_a_data_set_of_classes_and_the_other_way_round():
    classes = LabelSpec.plain(("background", "cyst", "tumor"), (0, 1, 2))
    mask, stored = drawn(range(4)), drawn(range(3), 1)
    there = label_mapping(classes, REGIONS, ("cyst=mass",), "there")
    assert_same(
        score(there, mask, stored),
        {
            "mass": expected(np.isin(mask, (2, 3)), stored == 1),  # its values 3 and 2 are those of classes 2 and 3
            "tumor": expected(mask == 3, stored == 2),
        },
    )
    back = label_mapping(REGIONS, classes, ("mass=cyst",), "there")
    mask, stored = drawn(range(3)), drawn([0, 1, 2, 3, IGNORE], 1)
    seen = stored != IGNORE
    assert_same(
        score(back, mask, stored),
        {
            "cyst": expected((mask == 1) & seen, np.isin(stored, (2, 3))),
            "tumor": expected((mask == 2) & seen, stored == 2),
        },
    )


@pytest.mark.parametrize(
    ("names", "parts"),
    [
        (("veine=vein",), ["'veine=vein'", "of there"]),
        (("artery=liver",), ["'artery=liver'"]),
        (("background=vein",), ["'background=vein'"]),
        (("artery=background",), ["'artery=background'"]),
    ],
)
def test_names_that_nobody_has(names, parts):
    with pytest.raises(UserError) as caught:
        label_mapping(PLAIN, PLAIN, names, "there")
    assert all(part in str(caught.value) for part in parts)


def test_no_class_in_common():
    with pytest.raises(UserError, match=r"data set there has the classes .*name those that are the same"):
        label_mapping(PLAIN, LabelSpec.plain(("background", "liver")), (), "there")
