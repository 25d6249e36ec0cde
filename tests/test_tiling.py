"""Where tiles lie and how they blend."""

import itertools

import numpy as np
import pytest

from autocontext_jax.inference.tiling import (
    Blend,
    axis_tiles,
    gaussian,
    map_chunk,
    native_lookup,
    pyramid_tiles,
)


def same(blend: Blend, stride: int):
    """The same tiles along each axis, whatever there is to cover."""
    return lambda regions: [(blend, stride)] * len(regions)


def flat(tile: int, border: int) -> Blend:
    weights = np.ones(tile, np.float32)
    weights[:border] = weights[tile - border :] = 0
    return Blend(weights, border)


BLENDS = [gaussian(16), flat(16, 0), flat(16, 3), gaussian(32), flat(40, 9)]


def tilings():
    for blend, align in itertools.product(BLENDS, (2, 4, 8)):
        useful = len(blend.weights) - 2 * blend.border
        for stride in sorted({align, useful // 2 // align * align, useful // align * align} - {0}):
            if stride <= useful:
                yield pytest.param(blend, stride, align, id=f"{len(blend.weights)}-{blend.border}-{stride}-{align}")


@pytest.mark.parametrize(("blend", "stride", "align"), list(tilings()))
def test_weights_add_up_to_one_at_every_voxel_to_cover(blend, stride, align):
    tile = len(blend.weights)
    for low, size in itertools.product((-13, -4, 0, 1, 6), (1, 2, 7, 8, 15, 16, 17, 31, 40, 41, 63, 100)):
        axis = axis_tiles(low, low + size, blend, stride=stride, align=align)
        assert (axis.low, axis.high) == (low, low + size)
        assert (axis.starts % align == 0).all()
        assert (np.diff(axis.starts) == stride).all()
        assert axis.weights.shape == (len(axis.starts), tile)
        assert axis.weights.dtype == np.float32
        assert (axis.weights >= 0).all()
        assert (axis.weights[:, : blend.border] == 0).all()
        assert (axis.weights[:, tile - blend.border :] == 0).all()
        assert axis.extent == axis.starts[-1] + tile - axis.starts[0]
        total = np.zeros(axis.extent)
        for start, weights in zip(axis.starts, axis.weights, strict=True):
            total[start - axis.starts[0] :][:tile] += weights
        # Their border is not theirs to predict.
        begin = low - axis.starts[0]
        assert begin >= blend.border
        assert begin + size <= axis.extent - blend.border
        np.testing.assert_allclose(total[begin : begin + size], 1, atol=1e-6)
        assert total.max() <= 1 + 1e-6


@pytest.mark.parametrize(("blend", "stride", "align"), list(tilings()))
def test_tiles_are_few_and_centred(blend, stride, align):
    useful = len(blend.weights) - 2 * blend.border
    for low, size in itertools.product((-3, 0), range(1, 80)):
        axis = axis_tiles(low, low + size, blend, stride=stride, align=align)
        n = len(axis.starts)
        # With one tile fewer no aligned start covers both ends.
        reach = useful + stride * (n - 2)
        begins = range(-200 + blend.border, 200, align)
        covering = [begin for begin in begins if begin <= low and begin + reach >= low + size]
        assert n == 1 or not covering
        before = low - (axis.starts[0] + blend.border)
        after = axis.starts[-1] + blend.border + useful - (low + size)
        assert abs(before - after) <= 2 * align


def test_a_scan_of_a_tiles_size_takes_one_tile():
    for size in range(1, 33):
        assert axis_tiles(0, size, gaussian(32), stride=16, align=8).starts.tolist()[1:] == []


@pytest.mark.parametrize(("stride", "align"), [(0, 2), (3, 2), (12, 2)])
def test_impossible_strides_are_refused(stride, align):
    with pytest.raises(ValueError, match=f"stride {stride} must be"):
        axis_tiles(0, 10, flat(16, 3), stride=stride, align=align)


def test_gaussian_is_symmetric_and_never_zero():
    blend = gaussian(96)
    np.testing.assert_array_equal(blend.weights, blend.weights[::-1])
    assert blend.weights.min() > 0
    assert blend.weights.argmax() in (47, 48)
    # An eighth of the tile from the centre is one standard deviation.
    assert blend.weights[47 - 12] == pytest.approx(np.exp(-0.5 * (12.5 / 12) ** 2))
    assert blend.border == 0


def halving(levels: int) -> list[tuple[int, int, int]]:
    """The steps of levels that halve all axes."""
    return [(1, 1, 1), *[(2, 2, 2)] * (levels - 1)]


@pytest.mark.parametrize("levels", [1, 2, 3])
@pytest.mark.parametrize("blend", [gaussian(16), flat(24, 5)])
def test_every_tile_finds_its_context(levels, blend):
    tile, finest = len(blend.weights), (5, 40, 33)
    align = (8 if blend.border == 0 else 2,) * 3
    plan = pyramid_tiles([(0, size) for size in finest], halving(levels), same(blend, 8), align=align)
    assert len(plan) == levels
    assert [(axis.low, axis.high) for axis in plan[-1]] == [(0, size) for size in finest]
    for coarser, finer in itertools.pairwise(plan):
        for below, above in zip(coarser, finer, strict=True):
            for start in above.starts:
                assert start % 2 == 0
                assert start // 2 - 1 >= below.low
                assert start // 2 + tile // 2 + 1 <= below.high
            # The coarser level covers the scan too, so that it has a mask of the whole scan.
            assert below.low <= 0
            assert below.high >= -(-above.high // 2)


@pytest.mark.parametrize("levels", [2, 5])
@pytest.mark.parametrize(("tile", "stride"), [(16, 8), (32, 16), (64, 48)])
def test_no_tile_lies_beyond_the_scan(levels, tile, stride):
    """So that none is computed for nothing, though coarser levels cover the context of tiles that reach beyond it."""
    for size in range(1, 130):
        plan = pyramid_tiles([(0, size)] * 3, halving(levels), same(gaussian(tile), stride), align=(8,) * 3)
        for level, (_, _, axis) in enumerate(plan, start=1):
            voxels = -(-size // 2 ** (levels - level))
            assert (axis.starts < voxels).all()
            assert (axis.starts + tile > 0).all()


@pytest.mark.parametrize(("size", "stride"), [(96, 80), (104, 104), (160, 144), (4, 4), (64, 8), (272, 240), (18, 14)])
def test_chunks_are_few_and_hold_little_more_than_a_tile(size, stride):
    depth = map_chunk(size, stride)
    assert stride % depth == 0
    count = -(-size // depth)
    assert count <= 8 or depth == stride
    assert count * depth < size + stride


@pytest.mark.parametrize("native", [1, 2, 5, 24])
@pytest.mark.parametrize("factor", [1, 2, 4, 1.7, 0.5, 3.3])
def test_native_lookup_is_linear_interpolation_between_centres(native, factor):
    level = max(1, int(np.ceil(native / factor - 1e-6)))
    values = np.random.default_rng(0).normal(size=level)
    low, weight = native_lookup(native, factor, level)
    assert low.dtype == np.int32
    assert weight.dtype == np.float32
    assert low.shape == weight.shape == (native,)
    assert (low >= 0).all()
    assert (low + 1 < level).all() or level == 1
    after = values[np.minimum(low + 1, level - 1)]
    centres = factor * (np.arange(level) + 0.5) - 0.5
    np.testing.assert_allclose(
        (1 - weight) * values[low] + weight * after, np.interp(np.arange(native), centres, values), atol=1e-6
    )
