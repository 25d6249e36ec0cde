"""The levels' voxels against sums written out one voxel at a time."""

import itertools

import numpy as np
import pytest

from autocontext_jax.data import resampling
from autocontext_jax.geometry import level_shape

FACTORS = [(2, 2, 2), (4, 4, 4), (3, 3, 3), (1, 2, 4), (1.5, 2.25, 1), (2.7, 1.3, 3.1), (0.5, 0.8, 1.25), (0.75, 1, 2)]
SIZES = [(8, 12, 16), (7, 13, 10), (1, 5, 23)]


def overlaps(native: int, factor: float) -> list[list[tuple[int, float]]]:
    """For each voxel of the level the native voxels below it and how much of it each covers, from edges alone."""
    (size, _, _) = level_shape((native, 1, 1), (factor, 1, 1))
    rows = []
    for i in range(size):
        if factor >= 1:
            shares = [(j, min(factor * (i + 1), j + 1) - max(factor * i, j)) for j in range(native)]
        else:
            centre = min(max(factor * (i + 0.5) - 0.5, 0.0), native - 1.0)
            shares = [(j, 1 - abs(centre - j)) for j in range(native)]
        shares = [(j, share) for j, share in shares if share > 1e-9]
        total = sum(share for _, share in shares)
        rows.append([(j, share / total) for j, share in shares])
    return rows


def area_per_class(labels: np.ndarray, factors: tuple[float, float, float], classes: int) -> np.ndarray:
    axes = [overlaps(native, factor) for native, factor in zip(labels.shape, factors, strict=True)]
    areas = np.zeros([*(len(axis) for axis in axes), classes])
    for voxel in np.ndindex(areas.shape[:-1]):
        for (z, a), (y, b), (x, c) in itertools.product(*(axis[i] for axis, i in zip(axes, voxel, strict=True))):
            areas[(*voxel, labels[z, y, x])] += a * b * c
    return areas


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("factors", FACTORS)
def test_image_is_the_mean_over_area(size, factors):
    voxels = np.random.default_rng(0).integers(-1024, 3071, size, np.int16)
    # A brute-force mean is the area of "class" b, summed with bit b's worth: no second implementation of the weights.
    unsigned = (voxels.astype(np.int64) + 1024).astype(np.uint16)
    mean = sum(area_per_class(unsigned >> bit & 1, factors, 2)[..., 1] * 2**bit for bit in range(12)) - 1024
    level = resampling.downsample_image(voxels, factors)
    assert level.dtype == np.int16
    assert level.shape == mean.shape == level_shape(size, factors)
    assert np.abs(level - mean).max() <= 0.5 + 1e-3


def test_image_halves_round_to_even():
    voxels = np.array([0, 1, 1, 2, -1, 0, 2, 3], np.int16).reshape(1, 1, 8)
    assert resampling.downsample_image(voxels, (1, 1, 2)).tolist() == [[[0, 2, 0, 2]]]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("factors", FACTORS)
def test_label_is_the_majority_and_ties_go_to_the_larger(size, factors):
    classes = 4
    labels = np.random.default_rng(1).integers(0, classes, size, np.uint8)
    areas = area_per_class(labels, factors, classes)
    # The last class within rounding of the largest area.
    expected = classes - 1 - np.argmax(areas[..., ::-1] >= areas.max(-1, keepdims=True) - 1e-9, -1)
    level = resampling.downsample_label(labels, factors, classes)
    assert level.dtype == np.uint8
    np.testing.assert_array_equal(level, expected)


def test_background_never_wins_a_tie():
    labels = np.zeros((2, 2, 2), np.uint8)
    labels[0] = 1
    assert resampling.downsample_label(labels, (2, 2, 2), 3).item() == 1
    labels[1] = 2
    assert resampling.downsample_label(labels, (2, 2, 2), 3).item() == 2
    labels[1, 0, 0] = 1
    assert resampling.downsample_label(labels, (2, 2, 2), 3).item() == 1
    labels[:] = 0
    labels[0, 0, 0] = 1
    assert resampling.downsample_label(labels, (2, 2, 2), 3).item() == 0


@pytest.mark.parametrize("factors", [(2, 2, 2), (1.7, 2.3, 1), (0.6, 1, 1)])
def test_slabs_join(factors):
    """A scan of many slabs equals the same scan handed over in one."""
    rng = np.random.default_rng(2)
    voxels, labels = rng.integers(-1024, 3071, (70, 9, 9), np.int16), rng.integers(0, 3, (70, 9, 9), np.uint8)
    many = resampling.downsample_image(voxels, factors), resampling.downsample_label(labels, factors, 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resampling, "_SLAB", 1000)
        one = resampling.downsample_image(voxels, factors), resampling.downsample_label(labels, factors, 3)
    np.testing.assert_allclose(many[0], one[0], atol=1)  # a half may round either way
    np.testing.assert_array_equal(many[1], one[1])


@pytest.mark.parametrize("factors", FACTORS)
def test_constant_stays(factors):
    assert (resampling.downsample_image(np.full((11, 10, 9), -777, np.int16), factors) == -777).all()
    assert (resampling.downsample_label(np.full((11, 10, 9), 2, np.uint8), factors, 3) == 2).all()


@pytest.mark.parametrize("factor", [1, 2, 3, 4, 1.5, 2.7, 0.5, 0.8])
def test_ramp_is_exact_at_the_centres(factor):
    """A ramp of native coordinates gives each level voxel's centre, f (i + 1/2) - 1/2, wherever it is whole."""
    native = 41
    found = resampling.axis_weights(native, factor).astype(np.float64) @ np.arange(native)
    centres = factor * (np.arange(len(found)) + 0.5) - 0.5
    whole = (factor * (np.arange(len(found)) + 1) <= native) & (centres >= 0) & (centres <= native - 1)
    assert whole.sum() >= native // 4 - 1
    # A cut voxel counts at its own centre, not at its part's: up to 1 / (8 f) of a voxel where factors are not whole.
    cut = 0 if factor <= 1 or factor == round(factor) else 1 / (8 * factor)
    np.testing.assert_allclose(found[whole], centres[whole], rtol=0, atol=cut + 1e-4)


@pytest.mark.parametrize("factor", [1, 2, 3, 7, 40, 100, 1.1, 2.7, 0.3, 0.99])
@pytest.mark.parametrize("native", [1, 2, 10, 33])
def test_weights_sum_to_one(native, factor):
    weights = resampling.axis_weights(native, factor)
    assert weights.dtype == np.float32
    assert weights.shape == (level_shape((native, 1, 1), (factor, 1, 1))[0], native)
    assert (weights >= 0).all()
    np.testing.assert_allclose(weights.sum(1), 1, atol=1e-6)


def test_factor_one_is_the_input():
    voxels, labels = np.zeros((3, 4, 5), np.int16), np.zeros((3, 4, 5), np.uint8)
    assert resampling.downsample_image(voxels, (1, 1, 1)) is voxels
    assert resampling.downsample_label(labels, (1.0, 1.0, 1.0), 2) is labels


@pytest.mark.parametrize("factors", [(2, 2, 2), (1.5, 2, 1), (3, 1, 0.75)])
def test_ignored_voxels_count_as_one_class_more(factors):
    """As if 255 were simply the next number."""
    labels = np.random.default_rng(0).integers(0, 4, (13, 14, 15), np.uint8)
    expected = resampling.downsample_label(labels, factors, 4)
    stored = np.where(labels == 3, 255, labels).astype(np.uint8)
    found = resampling.downsample_label(stored, factors, 3, ignore=True)
    np.testing.assert_array_equal(found, np.where(expected == 3, 255, expected))
