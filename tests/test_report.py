"""What an evaluation writes: JSON, table, pictures."""

import csv
import json
import math

import matplotlib.image
import numpy as np
import pytest

from autocontext_jax.evaluation import metrics, pictures, report
from autocontext_jax.jobs.experiment import side_by_side

CLASSES = ("artery", "vein")


def scored(dice: float, distance: float = math.nan) -> dict[str, float]:
    """What `metrics.scores` gives for a class, in part made up."""
    here = math.nan if math.isnan(dice) else 1.0
    distances = {"hausdorff_95": distance, "surface_distance": distance, "surface_dice": 0.75 * here}
    return {"dice": dice, "jaccard": 0.25 * here, "volume_difference": -1.5 * here, **distances}


CASES = {
    "one": {"level_1": {"artery": scored(0.5, math.inf), "vein": scored(math.nan)},
            "level_2": {"artery": scored(0.8125, 2.0), "vein": scored(math.nan)}},
    "two": {"level_1": {"artery": scored(0.6, 3.25), "vein": scored(math.nan)},
            "level_2": {"artery": scored(0.9, 2.0), "vein": scored(1.0, 5.0)}},
}  # fmt: skip

TABLE = """\
| Level 1: Dice (%) | artery | vein | mean |
| --- | ---: | ---: | ---: |
| avg | 55.0 | – | 55.0 |
| std | 5.0 | – | 5.0 |
| min | 50.0 | – | 50.0 |
| max | 60.0 | – | 60.0 |

| Level 2: Dice (%) | artery | vein | mean |
| --- | ---: | ---: | ---: |
| avg | 85.6 | 100.0 | 88.1 |
| std | 4.4 | 0.0 | 6.9 |
| min | 81.2 | 100.0 | 81.2 |
| max | 90.0 | 100.0 | 95.0 |

| Difference in Dice (%), p (Wilcoxon, Holm) | artery | vein | mean |
| --- | ---: | ---: | ---: |
| Level 2 − Level 1 | +30.6 (1) | – | +33.1 (1) |

| Mean over classes, avg ± std | Jaccard (%) | absolute volume difference (mL) | 95 % Hausdorff (mm) \
| surface distance (mm) | surface Dice at 1.5 mm (%) |
| --- | ---: | ---: | ---: | ---: | ---: |
| Level 1 | 25.0 ± 0.0 | 1.50 ± 0.00 | 3.25 ± 0.00 (1 of 2 missed) | 3.25 ± 0.00 (1 of 2 missed) | 75.0 ± 0.0 |
| Level 2 | 25.0 ± 0.0 | 1.50 ± 0.00 | 2.75 ± 0.75 | 2.75 ± 0.75 | 75.0 ± 0.0 |

"m of n missed": in m of n scans at least one class is in the truth or in the prediction but not in both. \
Such a class has no distance. The average leaves these m scans out; do not compare it with an average over other \
scans. Dice, Jaccard and surface Dice count a missed class as 0. Missed by Level 1: artery in 1 of 2.

2 test cases. Each scan was scored on its own grid.
"""


def test_table():
    result = report.evaluation(CASES, CLASSES, cases_are="2 test cases", tolerance=1.5, pairs=[("level_2", "level_1")])
    assert report.table(result) == TABLE


def test_written_files(tmp_path):
    result = report.evaluation(CASES, CLASSES, cases_are="2 test cases", tolerance=1.5, pairs=[("level_2", "level_1")])
    report.write(result, tmp_path)
    report.write(result, tmp_path)  # again, over the first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evaluation.json", "table.csv", "table.md"]
    assert (tmp_path / "table.md").read_text(encoding="utf-8") == TABLE

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    read = json.loads((tmp_path / "evaluation.json").read_bytes(), parse_constant=refuse)
    assert read["classes"] == ["artery", "vein"]
    assert read["cases_are"] == "2 test cases"
    assert list(read["cases"]) == ["one", "two"]
    assert read["cases"]["one"]["level_2"]["vein"]["dice"] is None
    assert read["cases"]["one"]["level_1"]["artery"]["hausdorff_95"] == "inf"
    assert read["cases"]["one"]["level_2"]["artery"]["dice"] == 0.8125
    assert read["cases"]["one"]["level_2"]["artery"]["volume_difference"] == -1.5
    nothing = {"avg": None, "std": None, "min": None, "max": None, "cases": 0, "missed": 0}
    assert read["summary"]["level_1"]["vein"]["dice"] == nothing
    assert read["summary"]["level_2"]["mean"]["dice"]["max"] == 0.95
    (comparison,) = read["comparisons"].values()
    assert comparison["artery"] == {"difference": pytest.approx(0.30625), "p": 0.5, "cases": 2, "p_holm": 1}
    assert comparison["vein"]["p"] is None

    # What was read is what was written, NaN and infinity too.
    assert repr(report.read_cases(tmp_path / "evaluation.json")) == repr(CASES)
    with (tmp_path / "table.csv").open(newline="") as file:
        rows = {(row["block"], row["class"], row["metric"]): row for row in csv.DictReader(file)}
    assert float(rows["level_2", "mean", "dice"]["max"]) == 0.95
    assert rows["level_1", "vein", "dice"]["avg"] == ""
    assert float(rows["level_2 - level_1", "artery", "dice"]["p"]) == 0.5
    assert rows["level_2 - level_1", "artery", "dice"]["avg"] == ""


def test_a_class_that_is_often_missed_is_seen_beside_every_average_of_its_distances(tmp_path):
    """A method that finds the class in one scan of ten, exactly there, beside one that is 5 mm off in all ten.

    The average of the first one's distances is 0 mm: the better one, were it not for the nine scans that it leaves out.
    """
    truth = np.zeros((12, 24, 24), np.uint8)
    truth[3:9, 6:16, 6:16] = 1
    predictions = {"finds_one": [truth] + 9 * [np.zeros_like(truth)], "finds_all": 10 * [np.roll(truth, 5, axis=2)]}
    cases = {
        f"scan {i}": {
            method: metrics.scores(masks[i], truth, ["pancreas"], (1.0, 1.0, 1.0), tolerance=2.0)
            for method, masks in predictions.items()
        }
        for i in range(10)
    }
    result = report.evaluation(cases, ["pancreas"], cases_are="test cases", tolerance=2.0)
    for column in ("pancreas", "mean"):
        for method, avg, missed in (("finds_one", 0, 9), ("finds_all", 5, 0)):
            distance = result["summary"][method][column]["hausdorff_95"]
            assert (distance["avg"], distance["cases"], distance["missed"]) == (avg, 10, missed)
    report.write(result, tmp_path)
    lines = (tmp_path / "table.md").read_text(encoding="utf-8").splitlines()
    (one,) = [line for line in lines if line.startswith("| Finds one |")]
    assert one.count(" 0.00 ± 0.00 (9 of 10 missed) |") == 2
    assert one.count("missed") == 2  # the other metrics count these scans
    (every,) = [line for line in lines if line.startswith("| Finds all |")]
    assert "missed" not in every
    (note,) = [line for line in lines if line.startswith('"m of n missed": ')]
    assert note.endswith("Missed by Finds one: pancreas in 9 of 10.")
    with (tmp_path / "table.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["metric"] == "hausdorff_95" and row["block"] == "finds_one"]
    assert [(row["class"], row["avg"], row["cases"], row["missed"]) for row in rows] == [
        ("pancreas", "0.0", "10", "9"), ("mean", "0.0", "10", "9")
    ]  # fmt: skip


def test_distances_to_a_class_that_is_never_found():
    always = {"one": {"level_1": {"artery": scored(0.0, math.inf), "vein": scored(1.0, 1.0)}}}
    text = report.table(report.evaluation(always, CLASSES, cases_are="test cases", tolerance=2.0))
    assert text.count(" – (1 of 1 missed) |") == 2


def test_surplus_and_deficit_of_volume_do_not_cancel():
    cases = {
        name: {"level_1": {"artery": {**scored(0.5, 1.0), "volume_difference": difference}}}
        for name, difference in (("one", 50.0), ("two", -50.0), ("three", -20.0))
    }
    result = report.evaluation(cases, ["artery"], cases_are="test cases", tolerance=2.0)
    assert "volume_difference" not in result["summary"]["level_1"]["artery"]
    for column in ("artery", "mean"):
        assert result["summary"]["level_1"][column]["absolute_volume_difference"]["avg"] == 40
    assert result["cases"]["two"]["level_1"]["artery"]["volume_difference"] == -50
    assert "| absolute volume difference (mL) |" in report.table(result)


def test_overlay_paints_outlines_in_full_and_insides_faintly():
    image = np.full((9, 9), 40, np.int16)  # the middle of the window
    image[0, 0], image[0, 1] = -1000, 3000
    mask = np.zeros((9, 9), np.uint8)
    mask[2:7, 2:7] = 1
    picture = pictures.overlay(image, mask)
    assert picture.shape == (9, 9, 3)
    assert picture.dtype == np.uint8
    assert picture[0, 0].tolist() == [0, 0, 0]
    assert picture[0, 1].tolist() == [255, 255, 255]
    assert picture[8, 8].tolist() == [128, 128, 128]
    assert picture[2, 4].tolist() == pictures.PALETTE[0].tolist()
    assert picture[4, 4].tolist() == np.round(0.7 * 127.5 + 0.3 * pictures.PALETTE[0]).tolist()
    # A mask that leaves the picture has no outline there.
    mask[2:7, 7:] = 1
    assert pictures.overlay(image, mask)[4, 8].tolist() == picture[4, 4].tolist()


def test_overlay_repeats_its_colours():
    mask = np.array([[1, 1 + len(pictures.PALETTE), 255]], np.uint8)
    picture = pictures.overlay(np.zeros((1, 3), np.int16), mask)
    assert picture[0, 0].tolist() == picture[0, 1].tolist()


def test_side_by_side():
    row = pictures.side_by_side([np.zeros((4, 3, 3), np.uint8), np.zeros((4, 5, 3), np.uint8)])
    assert row.shape == (4, 10, 3)
    assert row[0, :, 0].tolist() == [0, 0, 0, 255, 255, 0, 0, 0, 0, 0]


def test_figure_is_a_picture_of_the_masks(tmp_path):
    image = np.random.default_rng(0).normal(0, 100, (12, 20, 16)).astype(np.int16)
    truth = np.zeros(image.shape, np.uint8)
    truth[4:8, 5:15, 3:12] = 1
    truth[9:11, 2:5, 2:6] = 2
    masks = {"truth": truth, "level 1": np.zeros_like(truth), "level 2": truth}
    path = tmp_path / "picture.png"
    pictures.figure(path, image, masks, CLASSES, (3.0, 1.0, 1.0), title="case")
    pixels = matplotlib.image.imread(path)
    # Three columns of 3 inches; rows in the planes' own proportions (20, 36, 36 mm by 16, 16, 20 mm); 1 for the legend.
    assert pixels.shape[:2] == (round(100 * (3 * (20 / 16 + 36 / 16 + 36 / 20) + 1)), 900)
    assert pixels[..., :3].std() > 0.05
    orange = np.abs(pixels[..., :3] * 255 - pictures.PALETTE[0]).max(-1) < 2
    thirds = orange[:1560].reshape(1560, 3, 300).sum((0, 2))
    assert thirds[0] > 100
    assert thirds[2] > 100
    assert thirds[1] < thirds[0] / 10

    pictures.figure(path, image, {"truth": np.zeros_like(truth)}, CLASSES, (3.0, 1.0, 1.0))  # nothing to centre on
    assert matplotlib.image.imread(path).shape[1] == 300

    in_air = np.full((12, 40, 40), -1000, np.int16)
    in_air[:, 10:20, 10:20] = 0  # the picture shows this and 3 voxels around it
    pictures.figure(path, in_air, {"truth": np.zeros_like(in_air)}, CLASSES, (1.0, 1.0, 1.0))
    assert matplotlib.image.imread(path).shape[:2] == (round(100 * (3 * (1 + 2 * 12 / 16) + 1)), 300)


def test_the_blocks_of_table_1():
    """Each mode's own scores under the paper's names, over the cases that all modes have, and every pair once."""

    def cases(start, levels=2):
        return {
            case: {f"level_{level}": {"artery": scored(start + 0.01 * level)} for level in range(1, levels + 1)}
            for case in ("one", "two")
        }

    modes = {"end_to_end": cases(0.5), "separate": cases(0.3) | {"three": {}}, "no_context": cases(0.1)}
    result = side_by_side(modes, 2, ["artery"], cases_are="2 test cases", tolerance=2.0)
    assert list(result["cases"]) == ["one", "two"]
    assert result["cases_are"] == "2 test cases"
    averages = {block: summary["mean"]["dice"]["avg"] for block, summary in result["summary"].items()}
    assert averages == pytest.approx(
        {"Level 1": 0.31, "Level 2 auto-context": 0.32, "End-to-end": 0.52, "No auto-context": 0.12}
    )
    assert len(result["comparisons"]) == 6
    assert result["comparisons"]["End-to-end - Level 2 auto-context"]["artery"]["difference"] == pytest.approx(0.2)
    alone = side_by_side({"first_level": cases(0.1, 1)}, 2, ["artery"], cases_are="2 test cases", tolerance=2.0)
    assert list(alone["summary"]) == ["Level 1"]
