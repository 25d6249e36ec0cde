"""Grids, nesting and margins, against sums written out and against the field that really moves the voxels."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from autocontext_jax import geometry
from autocontext_jax.data import augment
from autocontext_jax.data.augmentation_ranges import SpatialRanges, crop_margins, rotation_matrix

pytestmark = pytest.mark.usefixtures("compiled_quickly")

LEVELS = (1, 2, 3)
CENTRES = [*itertools.product((-7, -6, 0, 33), (-1, 20, 21), (5, 6, 7, 8)), (1000, -1000, 123)]
ANISOTROPIC = [(1.0, 1.0, 1.0), (5.0, 0.7, 0.8), (0.9, 3.0, 0.6), (0.7, 4.0, 4.0)]


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("edge", [4, 8, 12, 64])
def test_patches_nest(levels, edge):
    for centre in CENTRES:
        starts = geometry.cube(edge, levels).starts(centre)
        assert len(starts) == levels
        assert all(type(first) is int for start in starts for first in start)
        for coarse, fine in itertools.pairwise(starts):
            assert fine == tuple(2 * (first + edge // 4) for first in coarse)
            assert fine == geometry.next_level_start(coarse, (edge,) * 3, (2, 2, 2))


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("edge", [4, 12, 64])
@pytest.mark.parametrize("factor", [1, 2, 0.64])
def test_patches_share_one_centre_in_mm(levels, edge, factor):
    spacing = np.array([2.5, 0.8, 0.7])
    for centre in CENTRES:
        middles = []
        for level, start in enumerate(geometry.cube(edge, levels).starts(centre), start=1):
            own = factor * 2 ** (levels - level)
            # Mean of the centres of all the patch's voxels, from the first native voxel's centre.
            voxels = np.array(start)[:, None] + np.arange(edge)
            middles.append((own * (voxels + 0.5) - 0.5).mean(axis=1) * spacing)
        np.testing.assert_allclose(middles, np.broadcast_to(middles[-1], (levels, 3)), atol=1e-9)


@pytest.mark.parametrize("levels", LEVELS)
def test_the_centre_lies_in_the_central_block(levels):
    edge = 16
    block = max(2, 2 ** (levels - 1))
    seen = set()
    for centre in CENTRES:
        place = np.array(centre) - geometry.cube(edge, levels).starts(centre)[-1]
        assert (place >= edge // 2 - block // 2).all()
        assert (place < edge // 2 + block // 2).all()
        seen.update(place.tolist())
    if levels > 1:  # each place of the block serves a share of the centres: none is favoured
        assert len(seen) == block


@pytest.mark.parametrize(
    ("native", "factors", "expected"),
    [
        ((8, 12, 16), (4, 4, 4), (2, 3, 4)),
        ((61, 70, 67), (4, 2, 1), (16, 35, 67)),
        ((1, 2, 3), (4, 4, 4), (1, 1, 1)),
        ((100, 100, 100), (2.5 / 0.5, 0.3 / 0.1, 0.1), (20, 34, 1000)),
        ((10, 10, 10), (0.64, 2.25, 1.1), (16, 5, 10)),
        ((7, 7, 7), (0.7, 0.7 + 1e-9, 7.01), (10, 10, 1)),
    ],
)
def test_level_shape(native, factors, expected):
    shape = geometry.level_shape(native, factors)
    assert shape == expected
    for size, factor, voxels in zip(native, factors, shape, strict=True):
        assert factor * voxels >= size - 1e-5 * factor  # the grid covers the scan, and no voxel lies outside
        assert voxels == 1 or factor * (voxels - 1) < size


def test_round_half_up():
    assert [geometry.round_half_up(value) for value in (-1.5, -0.5, 0.49, 0.5, 1.5, 2.5)] == [-1, 0, 0, 1, 2, 3]


@pytest.mark.parametrize("angles", [(0, 0, 0), (0.3, 0, 0), (0, 0.3, 0), (0, 0, 0.3), (0.1, -0.7, 1.3), (3, 2, -1)])
def test_rotation_matrix(angles):
    matrix = rotation_matrix(np.array(angles))
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(3), atol=1e-12)
    assert np.linalg.det(matrix) == pytest.approx(1)
    # SciPy turns (first, second, third) vectors right-handedly: about the second axis that is third -> first.
    z, y, x = angles
    np.testing.assert_allclose(matrix, Rotation.from_euler("xyz", [z, -y, x]).as_matrix(), atol=1e-12)
    np.testing.assert_allclose(augment._rotation(jnp.array(angles, jnp.float32)), matrix, atol=1e-6)


def furthest_positions(edge: int, levels: int, ranges: SpatialRanges):
    """A jitted, vectorised function (turn, shift, elastic, spacing) -> [S, 3], voxels of each level from the centre.

    The field is augment's own; its draws are given, in units of the ranges (elastic: of sigma, the same at all points).
    """

    def furthest(turn, shift, elastic, spacing):
        draws = iter([turn, shift, 1.0])  # the largest size
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(jax.random, "uniform", lambda key, shape=(), *, minval, maxval: next(draws))
            patch.setattr(jax.random, "normal", lambda key, shape: jnp.full(shape, elastic))
            field = augment._draw_field(jax.random.key(0), ranges, geometry.cube(edge, levels), (1, 1, 1))
        scales = [2 ** (levels - level) for level in range(1, levels + 1)]
        moved = [jnp.stack(field(spacing, (scale,) * 3)) / scale for scale in scales]
        return jnp.stack([jnp.abs(position).max(axis=(1, 2, 3)) for position in moved])

    return jax.jit(jax.vmap(furthest, (0, 0, 0, None)))


@pytest.mark.parametrize(
    ("ranges", "levels"),
    [
        (SpatialRanges(), 2),
        (SpatialRanges(rotation=15, translation=2.5, elastic_sigma=1, elastic_spacing=7), 3),
        (SpatialRanges(rotation=5, scaling=0.2), 2),
        (SpatialRanges(rotation=40, translation=0, elastic_sigma=0), 1),
        (SpatialRanges(rotation=180, translation=0, elastic_sigma=0), 1),
        (SpatialRanges(rotation=0, translation=8, elastic_sigma=0), 2),
        (SpatialRanges(rotation=0, translation=0, elastic_sigma=3, elastic_spacing=16), 2),
    ],
)
def test_no_field_leaves_the_margins(ranges, levels):
    edge = 12
    rng = np.random.default_rng(0)
    extremes = np.array([(*turn, way) for turn in itertools.product((-1, 0, 1), repeat=3) for way in (-1, 1)])
    inner = rng.uniform(-1, 1, (400, 4))
    draws = np.concatenate([extremes, inner]).astype(np.float32)
    turn, way = draws[:, :3], draws[:, 3:]
    shift = np.broadcast_to(way, turn.shape)
    elastic = 100 * way[:, 0]  # far beyond the clip
    furthest = furthest_positions(edge, levels, ranges)
    for spacing in ANISOTROPIC:
        needed = np.array(furthest(turn, shift, elastic, jnp.array(spacing))).max(axis=0) - (edge - 1) / 2
        margins = np.array(crop_margins(geometry.cube(edge, levels), spacing, ranges))
        assert (needed <= margins).all(), (spacing, needed, margins)
        if ranges.rotation <= 5:
            assert (margins <= needed + 3).all(), "reads much more than it needs"


def test_no_augmentation_needs_no_margin():
    assert crop_margins(geometry.cube(8, 2), ANISOTROPIC[0], None) == ((0, 0, 0), (0, 0, 0))
    assert crop_margins(geometry.cube(8, 3), ANISOTROPIC[0], SpatialRanges(0, 0, 0)) == ((0, 0, 0),) * 3
