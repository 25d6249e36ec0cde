"""Tiles as boxes: few voxels computed, within the memory, the same result."""

import gc
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_predictor import (
    AIR,
    CLASSES,
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
from autocontext_jax.inference.boxes import box_sizes, choose_box
from autocontext_jax.inference.context import context_size
from autocontext_jax.inference.predictor import Predictor
from autocontext_jax.inference.tile_memory import bytes_a_voxel
from autocontext_jax.inference.tiling import PredictorConfig, axis_count, crop, pyramid_tiles


def computed(regions, box, align):
    """Voxels that all tiles of a level have together."""
    counts = [
        axis_count(low, high, size, stride=stride, align=align)
        for (low, high), size, stride in zip(regions, box.size, box.stride, strict=True)
    ]
    return int(np.prod([count * size for count, size in zip(counts, box.size, strict=True)])), counts


@pytest.mark.parametrize("align", [2, 8, 16, 32])
def test_box_sizes_are_few_and_their_steps_small(align):
    sizes = box_sizes(align, 1024)
    assert sizes[-1] >= 1024
    assert all(size % align == 0 for size in sizes)
    assert len(sizes) <= 40
    for low, high in itertools.pairwise(sizes):
        if low >= 64:
            assert high <= max(1.25 * low, low + align)


@pytest.mark.parametrize("size", [(50, 256, 256), (75, 128, 128), (1, 40, 30), (20, 20, 20), (96, 96, 96)])
def test_a_level_that_fits_is_one_tile(size):
    box = choose_box([(0, n) for n in size], margin=16, align=8, fits=lambda *_: True)
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
    box = choose_box(regions, margin=16, align=8, fits=lambda box, _: np.prod(box.size) <= most)
    voxels, _ = computed(regions, box, 8)
    assert np.prod(box.size) <= most
    assert voxels <= times * np.prod(size)


def test_no_box_within_the_memory_gives_the_smallest():
    box = choose_box([(0, 500)] * 3, margin=8, align=8, fits=lambda *_: False)
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


def test_a_tile_takes_no_more_memory_than_it_may(monkeypatch):
    """By the compiled program's own figure, with the maps of a row of tiles."""
    monkeypatch.setattr("autocontext_jax.inference.predictor.FITS", 0)
    predictor = Predictor(trained_pyramid(1, width=2), PredictorConfig(memory=0.2), align=2)
    ((z, y, x),) = pyramid_tiles((300, 130, 140), 1, predictor._boxes, align=2)
    assert len(z.starts) > 1
    slabs = -(-z.weights.shape[1] // z.stride) * z.stride * y.extent * x.extent * CLASSES * 4
    voxels = np.prod([axis.weights.shape[1] for axis in (z, y, x)])
    assert 0.05e9 < voxels * predictor._bytes_a_voxel + slabs <= 0.2e9


def test_the_bytes_of_a_voxel_hardly_depend_on_the_tile():
    predictor = Predictor(trained_pyramid(2, width=4), PredictorConfig(), align=2)
    larger = (96, 64, 128)
    found = bytes_a_voxel(
        predictor._add_tile[-1], predictor._state, larger, context_size(larger, 3), CLASSES
    )  # fmt: skip
    assert predictor._bytes_a_voxel == pytest.approx(found, rel=0.05)


def test_device_memory_does_not_grow_with_the_scan(monkeypatch):
    small_boxes(monkeypatch)
    monkeypatch.setattr(Predictor, "_bytes_a_voxel", 100.0)
    monkeypatch.setattr(Predictor, "_limit", 4e6)
    predictor = Predictor(Pointwise(2), PredictorConfig(margin=4), align=2)

    def most_alive(depth: int) -> int:
        gc.collect()  # what other tests left behind
        seen: list[int] = []
        predictor.masks(
            scan((depth, 30, 32)), cubed(2, 1), levels=(1, 2),
            progress=lambda *_: seen.append(sum(array.nbytes for array in jax.live_arrays())),
        )  # fmt: skip
        return max(seen)

    most_alive(200)  # warms up
    assert most_alive(800) <= 1.1 * most_alive(200)
