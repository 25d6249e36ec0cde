"""Dice from counts that add up, against the confusion matrix."""

import jax.numpy as jnp
import numpy as np
import pytest

from autocontext_jax.training.dice import class_dice, mean_dice, overlap_counts


def test_counts_are_those_of_the_confusion_matrix():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(3, 4, 5, 6, 4)).astype(np.float32), rng.integers(0, 4, (3, 4, 5, 6))
    confusion = np.zeros((4, 4), int)
    np.add.at(confusion, (labels, logits.argmax(-1)), 1)
    counts = overlap_counts(logits, labels)
    assert counts.dtype == jnp.float32
    np.testing.assert_array_equal(counts, [2 * np.diag(confusion), confusion.sum(0) + confusion.sum(1)])
    # Counts of parts add up to the whole's.
    parts = overlap_counts(logits[:1], labels[:1]) + overlap_counts(logits[1:], labels[1:])
    np.testing.assert_array_equal(parts, counts)
    expected = [2 * confusion[k, k] / (confusion[k].sum() + confusion[:, k].sum()) for k in (1, 2, 3)]
    np.testing.assert_allclose(class_dice(counts), expected, rtol=1e-6)
    assert float(mean_dice(counts)) == pytest.approx(np.mean(expected), rel=1e-6)


def test_classes_that_do_not_occur_have_no_dice_and_are_left_out_of_the_mean():
    counts = jnp.array([
        [[90.0, 4, 0, 0], [100, 8, 0, 10]],  # 0.5, absent, 0
        [[100.0, 0, 0, 0], [100, 0, 0, 0]],  # background alone
        [[0.0, 2, 4, 6], [0, 2, 4, 6]],
    ])  # fmt: skip
    np.testing.assert_allclose(class_dice(counts), [[0.5, np.nan, 0], [np.nan] * 3, [1, 1, 1]])
    np.testing.assert_allclose(mean_dice(counts), [0.25, np.nan, 1])
