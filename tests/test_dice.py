"""Dice from counts that add up, against the confusion matrix."""

import jax.numpy as jnp
import numpy as np
import pytest

from autocontext_jax.data.labels import IGNORE
from autocontext_jax.training.dice import class_dice, mean_dice, overlap_counts
from autocontext_jax.training.targets import Targets


def test_counts_are_those_of_the_confusion_matrix():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(3, 4, 5, 6, 4)).astype(np.float32), rng.integers(0, 4, (3, 4, 5, 6))
    confusion = np.zeros((4, 4), int)
    np.add.at(confusion, (labels, logits.argmax(-1)), 1)
    counts = overlap_counts(logits, labels)
    assert counts.dtype == jnp.float32
    true, predicted = confusion.sum(1), confusion.sum(0)
    np.testing.assert_array_equal(counts, [2 * np.diag(confusion), predicted + true, true])
    # Counts of parts add up to the whole's.
    parts = overlap_counts(logits[:1], labels[:1]) + overlap_counts(logits[1:], labels[1:])
    np.testing.assert_array_equal(parts, counts)
    expected = [2 * confusion[k, k] / (confusion[k].sum() + confusion[:, k].sum()) for k in (1, 2, 3)]
    np.testing.assert_allclose(class_dice(counts), expected, rtol=1e-6)
    assert float(mean_dice(counts)) == pytest.approx(np.mean(expected), rel=1e-6)


def test_classes_that_no_label_shows_have_no_dice_and_are_left_out_of_the_mean():
    counts = jnp.array([
        [[90.0, 4, 0, 0], [100, 8, 0, 10], [50, 4, 0, 5]],  # 0.5, absent, 0
        [[90.0, 4, 0, 0], [100, 8, 7, 10], [50, 4, 0, 5]],  # the second is predicted where it is not: as before
        [[100.0, 0, 0, 0], [100, 0, 0, 0], [50, 0, 0, 0]],  # background alone
        [[0.0, 2, 4, 6], [0, 2, 4, 6], [0, 1, 2, 3]],
    ])  # fmt: skip
    np.testing.assert_allclose(class_dice(counts), [[0.5, np.nan, 0], [0.5, np.nan, 0], [np.nan] * 3, [1, 1, 1]])
    np.testing.assert_allclose(mean_dice(counts), [0.25, 0.25, np.nan, 1])


@pytest.mark.parametrize("ignore", [False, True])
def test_partly_annotated_samples_add_nothing_to_classes_that_they_do_not_know(ignore):
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(3, 4, 5, 6, 4)).astype(np.float32), rng.integers(0, 4, (3, 4, 5, 6))
    labels[:, 0] = IGNORE if ignore else 0
    known = np.array([[1, 1, 0, 1], [1, 0, 0, 1], [1, 1, 0, 0]], bool)  # nobody knows class 2
    expected = np.zeros((3, 4), int)
    for row, z, l in zip(known, logits, labels, strict=True):
        valid = l != IGNORE
        predicted, truth = z[valid].argmax(-1), l[valid]
        predicted, truth = (np.where(row[numbers], numbers, 0) for numbers in (predicted, truth))
        for k in range(4):
            p, t = predicted == k, truth == k
            expected[:, k] += 2 * (p & t).sum(), p.sum() + t.sum(), t.sum()
    counts = overlap_counts(logits, labels, targets=Targets(ignore=ignore), known=known)
    np.testing.assert_array_equal(counts, expected)
    assert counts[1].sum() == 2 * (labels != IGNORE).sum()
    dice = class_dice(counts)
    np.testing.assert_array_equal(np.isnan(dice), [False, True, False])
    # Another patch, whose case knows all, gives class 2 its score.
    more = counts + overlap_counts(logits, labels, targets=Targets(ignore=ignore), known=np.ones((3, 4), bool))
    assert np.isfinite(class_dice(more)).all()


@pytest.mark.parametrize(("ignore", "partly"), [(False, False), (True, False), (True, True)])
def test_regions_are_counted_each_for_itself_and_have_no_background(ignore, partly):
    regions = ((1, 2, 3), (2, 3), (1, 4))
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(3, 4, 5, 6, 3)).astype(np.float32), rng.integers(0, 6, (3, 4, 5, 6))
    labels[:, 0] = IGNORE if ignore else 0
    known = np.array([[1, 1, 0, 1], [1, 0, 0, 1], [1, 1, 0, 0]], bool) if partly else np.ones((3, 4), bool)
    expected = np.zeros((3, 4), int)
    for sample, region in np.argwhere(known[:, 1:]):
        valid = labels[sample] != IGNORE
        p, t = logits[sample, valid, region] > 0, np.isin(labels[sample][valid], regions[region])
        expected[:, 1 + region] += 2 * (p & t).sum(), p.sum() + t.sum(), t.sum()
    counts = overlap_counts(logits, labels, targets=Targets(regions, ignore), known=known if partly else None)
    np.testing.assert_array_equal(counts, expected)
    assert class_dice(counts).shape == (3,)


def test_a_batch_that_nobody_labelled_counts_nothing():
    logits, labels = np.random.default_rng(0).normal(size=(1, 2, 3, 4, 3)), np.full((1, 2, 3, 4), IGNORE)
    for targets in (Targets(ignore=True), Targets(((1,), (2,), (1, 2)), ignore=True)):
        counts = overlap_counts(logits, labels, targets=targets)
        np.testing.assert_array_equal(counts, 0)
        assert np.isnan(mean_dice(counts))
