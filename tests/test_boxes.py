"""Tiles as boxes: few voxels computed, within the memory, the same result."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from test_predictor import (
    AIR,
    SCANS,
    Pointwise,
    count_compilations,
    cubed,
    enlarged,
    pointwise_maps,
    scan,
    tiled_maps,
    trained_pyramid,
)

from autocontext_jax.data.resampling import downsample_image
from autocontext_jax.geometry import level_shape
from autocontext_jax.inference import boxes
from autocontext_jax.inference.boxes import choose_box, ladder
from autocontext_jax.inference.predictor import Predictor
from autocontext_jax.inference.tiling import PredictorConfig, axis_count, pyramid_tiles


def computed(regions, box, align):
    """Voxels that all tiles of a level have together."""
    counts = [
        axis_count(low, high, size, stride=stride, align=align)
        for (low, high), size, stride in zip(regions, box.size, box.stride, strict=True)
    ]
    return int(np.prod([count * size for count, size in zip(counts, box.size, strict=True)])), counts


@pytest.mark.parametrize("align", [2, 8, 16, 32])
def test_the_ladder_is_short_and_its_steps_are_small(align):
    sizes = ladder(align, 1024)
    assert sizes[-1] >= 1024
    assert all(size % align == 0 for size in sizes)
    assert len(sizes) <= 40
    for low, high in itertools.pairwise(sizes):
        if low >= 64:
            assert high <= max(1.25 * low, low + align)


@pytest.mark.parametrize("size", [(50, 256, 256), (75, 128, 128), (1, 40, 30), (20, 20, 20), (96, 96, 96)])
def test_a_level_that_fits_is_one_tile(size):
    box = choose_box([(0, n) for n in size], margin=16, align=8, fits=lambda _: True)
    voxels, counts = computed([(0, n) for n in size], box, 8)
    assert counts == [1, 1, 1]
    assert box.size == box.stride
    assert voxels <= 1.35 * np.prod([max(32, n) for n in size])


@pytest.mark.parametrize(
    ("size", "most", "times"),
    [
        ((100, 512, 512), 8e6, 1.42),
        ((300, 512, 512), 8e6, 1.63),
        ((800, 512, 512), 8e6, 1.55),
        ((300, 512, 512), 2e6, 2.15),
    ],
)
def test_boxes_compute_few_voxels_within_the_memory(size, most, times):
    """Cubes of 96 voxels that overlap by half compute 6 to 7 times the voxels of such scans."""
    regions = [(0, n) for n in size]
    box = choose_box(regions, margin=16, align=8, fits=lambda option: np.prod(option) <= most)
    voxels, _ = computed(regions, box, 8)
    assert np.prod(box.size) <= most
    assert voxels <= times * np.prod(size)


def test_no_box_within_the_memory_gives_the_smallest():
    box = choose_box([(0, 500)] * 3, margin=8, align=8, fits=lambda _: False)
    assert box.size == (boxes.SMALLEST,) * 3


def small_boxes(monkeypatch):
    monkeypatch.setattr(boxes, "SMALLEST", 16)
    monkeypatch.setattr("autocontext_jax.inference.predictor.FITS", 0)


@pytest.mark.parametrize("name", list(SCANS))
@pytest.mark.parametrize("voxels_of_a_tile", [16**3, 10**9])
def test_masks_of_a_pointwise_model_are_exact(name, voxels_of_a_tile, monkeypatch):
    small_boxes(monkeypatch)
    shape, factors = SCANS[name]
    voxels = scan(shape)
    predictor = Predictor(Pointwise(len(factors)), PredictorConfig(margin=4), align=4)
    monkeypatch.setattr(Predictor, "_bytes_a_voxel", 1.0)
    monkeypatch.setattr(Predictor, "_limit", voxels_of_a_tile)
    masks = predictor.masks(voxels, factors, levels=tuple(range(1, len(factors) + 1)))
    for level, factor in enumerate(factors, start=1):
        maps = enlarged(pointwise_maps(downsample_image(voxels, factor)), factor, shape)
        lead = np.sort(maps, axis=-1)[..., -1] - np.sort(maps, axis=-1)[..., -2]
        clear = lead > 1e-4
        np.testing.assert_array_equal(masks[level][clear], maps.argmax(-1)[clear])


def test_one_box_equals_the_whole_scan(monkeypatch):
    """Where a level is one tile, nothing is blended, and the maps are those of the network on the padded level."""
    shape, factors = (15, 21, 30), cubed(2, 1)
    model, voxels = trained_pyramid(2), scan(shape)
    predictor = Predictor(model, PredictorConfig(), align=2)
    tiled = tiled_maps(predictor, voxels, factors, monkeypatch)
    plan = pyramid_tiles(level_shape(shape, factors[-1]), 2, predictor._boxes, align=2)
    assert all(len(axis.starts) == 1 for axes in plan for axis in axes)
    low = None
    maps = None
    for level, (axes, factor) in enumerate(zip(plan, factors, strict=True), start=1):
        start = np.array([axis.starts[0] for axis in axes])
        size = np.array([axis.weights.shape[1] for axis in axes])
        from autocontext_jax.inference.tiling import crop

        image = crop(downsample_image(voxels, factor), tuple(start), tuple(size), AIR)
        context = None
        if maps is not None:
            first = start // 2 - 1 - low
            context = maps[tuple(slice(f, f + n) for f, n in zip(first, size // 2 + 2, strict=True))][None]
        logits = np.asarray(model.level(level, jnp.asarray(image)[None], context))[0]
        powers = np.exp(logits - logits.max(-1, keepdims=True))
        maps, low = powers / powers.sum(-1, keepdims=True), start
        inside = tuple(slice(axis.low - s, axis.high - s) for axis, s in zip(axes, start, strict=True))
        np.testing.assert_allclose(tiled[level - 1], maps[inside], rtol=0, atol=1e-5)


def test_scans_of_similar_sizes_share_their_programs(monkeypatch):
    predictor = Predictor(trained_pyramid(2, width=1, depth=1), PredictorConfig(), align=2)
    with count_compilations() as first:
        predictor.masks(scan((30, 41, 52)), cubed(2, 1))
    with count_compilations() as later:
        for shape in ((29, 41, 50), (31, 45, 60), (26, 47, 57)):
            assert predictor.masks(scan(shape), cubed(2, 1))[2].shape == shape
    assert first
    assert later == []


def test_a_tile_takes_no_more_memory_than_it_may():
    """By the compiled program's own figure."""
    predictor = Predictor(trained_pyramid(1, width=2), PredictorConfig(memory=0.02), align=2)
    plan = pyramid_tiles((120, 130, 140), 1, predictor._boxes, align=2)
    voxels = np.prod([axis.weights.shape[1] for axis in plan[0]])
    assert voxels * predictor._bytes_a_voxel <= max(0.02e9, boxes.FITS * predictor._bytes_a_voxel)


def test_memory_is_that_of_the_small_tile_times_its_voxels():
    predictor = Predictor(trained_pyramid(2, width=4), PredictorConfig(), align=2)
    assert 4 * 12 * 2 < predictor._bytes_a_voxel < 4 * 100 * 4
