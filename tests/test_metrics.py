"""Scores and their summary against plain loops and against other libraries."""

import itertools
import math

import numpy as np
import pytest
import SimpleITK as sitk
from scipy import ndimage, stats

from autocontext_jax.evaluation.metrics import confusion_matrix, scores, surface
from autocontext_jax.evaluation.statistics import compare, holm, summarise

CLASSES = ("artery", "vein", "liver")
DISTANCES = ("hausdorff_95", "surface_distance")
SPACING = (2.5, 0.7, 1.1)


def blobs(seed: int, shape: tuple[int, int, int] = (20, 24, 22)) -> np.ndarray:
    """Three smooth classes with rough edges that touch each other and the scan's border."""
    rng = np.random.default_rng(seed)
    fields = [ndimage.gaussian_filter(rng.normal(size=shape), 2.0) for _ in range(4)]
    return np.argmax([fields[0] + 0.05, *fields[1:]], axis=0).astype(np.uint8)


def test_overlaps_equal_their_definitions_on_sets():
    rng = np.random.default_rng(0)
    prediction, truth = (rng.integers(0, 4, (5, 6, 7)).astype(np.uint8) for _ in range(2))
    result = scores(prediction, truth, CLASSES, SPACING, tolerance=1.0)
    for k, name in enumerate(CLASSES, start=1):
        p, t = ({tuple(v) for v in np.argwhere(mask == k)} for mask in (prediction, truth))
        expected = {
            "dice": 2 * len(p & t) / (len(p) + len(t)),
            "jaccard": len(p & t) / len(p | t),
            "volume_difference": (len(p) - len(t)) * 2.5 * 0.7 * 1.1 / 1000,
            "true_positives": len(p & t),
            "false_positives": len(p - t),
            "false_negatives": len(t - p),
        }
        assert {metric: result[name][metric] for metric in expected} == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("seed", [0, 1])
def test_surface_scores_equal_those_from_distance_maps(seed):
    """Of SimpleITK's contours, and of scipy's erosions: nearest surfaces by another algorithm each."""
    prediction, truth = blobs(seed), blobs(seed + 10)
    result = scores(prediction, truth, CLASSES, SPACING, tolerance=1.5)

    def itk(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        image = sitk.GetImageFromArray(np.pad(mask, 1).astype(np.uint8))
        image.SetSpacing(SPACING[::-1])
        contour = sitk.BinaryContour(image, fullyConnected=False)
        far = sitk.SignedMaurerDistanceMap(contour, squaredDistance=False, useImageSpacing=True)
        inner = (slice(1, -1),) * 3
        return sitk.GetArrayFromImage(contour)[inner] > 0, np.abs(sitk.GetArrayFromImage(far)[inner])

    def eroded(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        edge = mask & ~ndimage.binary_erosion(mask)
        return edge, ndimage.distance_transform_edt(~edge, sampling=SPACING)

    for k, name in enumerate(CLASSES, start=1):
        for reference in (itk, eroded):
            (p_edge, p_far), (t_edge, t_far) = reference(prediction == k), reference(truth == k)
            there, back = t_far[p_edge], p_far[t_edge]
            both = np.concatenate([there, back])
            expected = {
                "hausdorff_95": max(np.percentile(there, 95), np.percentile(back, 95)),
                "surface_distance": both.mean(),
                "surface_dice": (both <= 1.5).mean(),
            }
            assert {metric: result[name][metric] for metric in expected} == pytest.approx(expected, rel=1e-5)


def test_shifted_cube():
    truth = np.zeros((12, 12, 12), np.uint8)
    truth[3:7, 3:7, 3:7] = 3
    prediction = np.roll(truth, 1, axis=0)
    liver = scores(prediction, truth, CLASSES, (3.0, 1.0, 1.0), tolerance=2.9)["liver"]
    assert liver["dice"] == 0.75
    assert liver["jaccard"] == pytest.approx(0.6)
    assert liver["volume_difference"] == 0
    # The tops: 16 voxels each 3 mm away; the rings beside them coincide with rings of the other.
    assert liver["hausdorff_95"] == 3
    perfect = scores(truth, truth, CLASSES, (3.0, 1.0, 1.0), tolerance=0.0)["liver"]
    assert (perfect["surface_dice"], perfect["hausdorff_95"], perfect["surface_distance"]) == (1, 0, 0)


def test_the_surface_of_a_single_slice_is_its_contour():
    truth = np.zeros((1, 12, 12), np.uint8)
    truth[0, 3:9, 3:9] = 3
    prediction = np.zeros_like(truth)
    prediction[0, 1:11, 1:11] = 3
    liver = scores(prediction, truth, CLASSES, (1.0, 1.0, 1.0), tolerance=1.0)["liver"]
    assert liver["surface_dice"] == 0  # each is 2 mm inside the other
    assert liver["hausdorff_95"] >= 2
    # As of the cylinder of many such slices, seen in its middle.
    many = surface(np.repeat(truth, 5, axis=0), 3, (slice(0, 5), slice(3, 9), slice(3, 9)), (1.0, 1.0, 1.0))
    one = surface(truth, 3, (slice(0, 1), slice(3, 9), slice(3, 9)), (1.0, 1.0, 1.0))
    np.testing.assert_array_equal(one[:, 1:], many[many[:, 0] == 2][:, 1:])


def test_absent_classes():
    truth = np.zeros((3, 3, 3), np.uint8)
    prediction = truth.copy()
    truth[0], prediction[1] = 1, 2
    truth[2], prediction[2] = 3, 3
    result = scores(prediction, truth, CLASSES, SPACING, tolerance=1.0)
    for name in ("artery", "vein"):  # missed, invented
        assert (result[name]["dice"], result[name]["jaccard"], result[name]["surface_dice"]) == (0, 0, 0)
        assert all(result[name][metric] == math.inf for metric in DISTANCES)
    assert result["liver"]["dice"] == 1
    nothing = scores(np.zeros_like(truth), np.zeros_like(truth), CLASSES, SPACING, tolerance=1.0)
    assert all(math.isnan(value) for metrics in nothing.values() for value in metrics.values())


def test_many_classes_do_not_overflow_uint8():
    """Pairs of classes are numbered up to K squared."""
    classes = [f"class {k}" for k in range(1, 40)]
    mask = np.arange(40, dtype=np.uint8).repeat(2).reshape(4, 4, 5)
    assert {metrics["dice"] for metrics in scores(mask, mask, classes, SPACING, tolerance=1.0).values()} == {1.0}
    np.testing.assert_array_equal(confusion_matrix(mask, mask, 40), 2 * np.eye(40))


def test_summary_leaves_nan_out():
    values = {"artery": (0.5, 0.7, math.nan), "vein": (math.nan,) * 3, "liver": (1.0, 0.1, 0.4)}
    cases = {
        f"case {i}": {name: {"dice": row[i], "precision": row[i] / 2} for name, row in values.items()} for i in range(3)
    }
    summary = summarise(cases, CLASSES)
    assert list(summary) == [*CLASSES, "mean"]
    assert summary["artery"]["dice"] == pytest.approx(
        {"avg": 0.6, "std": 0.1, "min": 0.5, "max": 0.7, "cases": 2, "missed": 0}
    )
    assert [math.isnan(value) for value in summary["vein"]["dice"].values()] == [True] * 4 + [False] * 2
    assert summary["liver"]["dice"]["avg"] == pytest.approx(0.5)
    means = [0.75, 0.4, 0.4]  # each case over the classes it has
    expected = {"avg": np.mean(means), "std": np.std(means), "min": 0.4, "max": 0.75, "cases": 3, "missed": 0}
    assert summary["mean"]["dice"] == pytest.approx(expected)
    assert summary["mean"]["precision"]["max"] == pytest.approx(0.375)


def test_summary_counts_missed_cases_beside_averages_that_leave_them_out():
    values = (1.0, math.inf, 3.0, math.nan)
    cases = {
        f"case {i}": {"vein": {"distance": value, "dice": 0.5}, "artery": {"distance": 1.0, "dice": 0.5}}
        for i, value in enumerate(values)
    }
    cases["case 3"]["vein"]["dice"] = math.nan
    cases["case 0"]["artery"]["distance"] = math.inf
    summary = summarise(cases, ["vein", "artery"])
    found = {"avg": 2, "std": 1, "min": 1, "max": 3, "cases": 3, "missed": 1}
    assert summary["vein"]["distance"] == found
    # The same number for every metric, so that a Dice of 0 can be told from a wrong place.
    assert (summary["vein"]["dice"]["cases"], summary["vein"]["dice"]["missed"]) == (3, 1)
    # A scan counts once, however many of its classes are missed.
    assert summary["mean"]["distance"] == {"avg": 1.5, "std": 0.5, "min": 1, "max": 2, "cases": 4, "missed": 2}
    cases["case 1"]["artery"]["distance"] = math.inf
    assert summarise(cases, ["vein", "artery"])["mean"]["distance"]["missed"] == 2


def test_summary_where_nothing_counts():
    summary = summarise({"a": {"vein": {"dice": math.nan}}}, ["vein"])
    for column in summary.values():
        assert (column["dice"].pop("cases"), column["dice"].pop("missed")) == (0, 0)
        assert all(math.isnan(value) for value in column["dice"].values())


def signed_rank_p(differences: list[float]) -> float:
    """Two-sided, by trying every sign: what the test is, for distinct sizes."""
    ranks = stats.rankdata(np.abs(differences))
    sums = np.array([np.dot(signs, ranks) for signs in itertools.product((-1, 1), repeat=len(ranks))])
    return float(np.mean(np.abs(sums) >= abs(np.dot(np.sign(differences), ranks)) - 1e-9))


def test_comparison_is_the_signed_rank_test():
    rng = np.random.default_rng(0)
    a, b = (
        {f"case {i}": {name: {"dice": float(rng.uniform())} for name in ("artery", "vein")} for i in range(9)}
        for _ in range(2)
    )
    b["case 4"]["vein"]["dice"] = math.nan
    every = {"a": a, "b": b, "nobody": {}}
    result = compare(every, [("a", "b")], ["artery", "vein"])["a - b"]
    differences = [a[case]["artery"]["dice"] - b[case]["artery"]["dice"] for case in a]
    assert result["artery"]["p"] == pytest.approx(signed_rank_p(differences))
    assert result["artery"]["difference"] == pytest.approx(np.mean(differences))
    assert [result[column]["cases"] for column in ("artery", "vein", "mean")] == [9, 8, 9]
    assert compare(every, [("a", "a")], ["artery"])["a - a"]["artery"] == {
        "difference": 0, "p": 1, "p_holm": 1, "cases": 9
    }  # fmt: skip
    # Several pairs are one family of tests.
    both = compare(every, [("a", "b"), ("b", "a")], ["artery", "vein"])
    columns = [column for comparison in both.values() for column in comparison.values()]
    assert [column["p_holm"] for column in columns] == holm([column["p"] for column in columns])
    assert both["b - a"]["vein"]["p_holm"] > result["vein"]["p_holm"]
    with pytest.raises(ValueError, match="case 0"):
        compare(every, [("a", "nobody")], ["artery"])


def test_comparison_where_nothing_counts():
    nothing = {"one": {"vein": {"dice": math.nan}}}
    result = compare({"a": nothing, "b": nothing}, [("a", "b")], ["vein"])["a - b"]["vein"]
    assert result["cases"] == 0
    assert math.isnan(result["p"])
    assert math.isnan(result["difference"])


def test_holm_correction():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])  # as R's p.adjust has it
    assert holm([0.6, 0.9]) == [1, 1]
    corrected = holm([0.02, math.nan, 0.04])
    assert corrected[::2] == pytest.approx([0.04, 0.04])
    assert math.isnan(corrected[1])
