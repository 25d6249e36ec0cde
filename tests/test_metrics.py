"""Scores and their summary against plain loops."""

import math

import numpy as np
import pytest

from autocontext_jax.evaluation.metrics import dice_scores
from autocontext_jax.evaluation.statistics import summarise

ORGANS = ("artery", "vein", "liver")


def test_dice_equals_its_definition_on_sets():
    rng = np.random.default_rng(0)
    prediction, truth = (rng.integers(0, 4, (5, 6, 7)).astype(np.uint8) for _ in range(2))
    scores = dice_scores(prediction, truth, ORGANS)
    for k, organ in enumerate(ORGANS, start=1):
        p, t = ({tuple(v) for v in np.argwhere(mask == k)} for mask in (prediction, truth))
        assert scores[organ] == pytest.approx(2 * len(p & t) / (len(p) + len(t)), rel=1e-12)


def test_dice_at_its_ends():
    truth = np.zeros((3, 3, 3), np.uint8)
    prediction = truth.copy()
    truth[0], prediction[1] = 1, 2
    truth[2], prediction[2] = 3, 3
    assert dice_scores(prediction, truth, ORGANS) == {"artery": 0, "vein": 0, "liver": 1}
    nothing = dice_scores(np.zeros_like(truth), np.zeros_like(truth), ORGANS)
    assert all(math.isnan(score) for score in nothing.values())
    assert all(type(score) is float for score in dice_scores(prediction, truth, ORGANS).values())


def test_many_classes_do_not_overflow_uint8():
    """Pairs of classes are numbered up to K squared."""
    organs = [f"organ {k}" for k in range(1, 40)]
    mask = np.arange(40, dtype=np.uint8).repeat(2).reshape(4, 4, 5)
    assert set(dice_scores(mask, mask, organs).values()) == {1.0}


def test_summary_leaves_nan_out():
    values = {"artery": (0.5, 0.7, math.nan), "vein": (math.nan,) * 3, "liver": (1.0, 0.1, 0.4)}
    cases = {
        f"case {i}": {organ: {"dice": row[i], "precision": row[i] / 2} for organ, row in values.items()}
        for i in range(3)
    }
    summary = summarise(cases, ORGANS)
    assert list(summary) == [*ORGANS, "mean"]
    assert summary["artery"]["dice"] == pytest.approx({"avg": 0.6, "std": 0.1, "min": 0.5, "max": 0.7})
    assert all(math.isnan(value) for value in summary["vein"]["dice"].values())
    assert summary["liver"]["dice"]["avg"] == pytest.approx(0.5)
    means = [0.75, 0.4, 0.4]  # each case over the organs it has
    wanted = {"avg": np.mean(means), "std": np.std(means), "min": 0.4, "max": 0.75}
    assert summary["mean"]["dice"] == pytest.approx(wanted)
    assert summary["mean"]["precision"]["max"] == pytest.approx(0.375)


def test_summary_where_nothing_counts():
    summary = summarise({"a": {"vein": {"dice": math.nan}}}, ["vein"])
    assert all(math.isnan(value) for column in summary.values() for value in column["dice"].values())
