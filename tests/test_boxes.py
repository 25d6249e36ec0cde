"""Tiles as boxes: few voxels computed, within the memory, the same result; and nothing outside the body."""

import functools
import gc
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_predictor import (
    AIR,
    CLASSES,
    SCANS,
    SIGHT,
    WHOLE,
    Pointwise,
    borders,
    count_compilations,
    cubed,
    enlarged,
    plan_of,
    pointwise_maps,
    scan,
    tiled_maps,
    trained_pyramid,
    whole_maps,
)

from autocontext_jax.data.resampling import downsample_image
from autocontext_jax.errors import UserError
from autocontext_jax.inference import boxes, scan_tiles
from autocontext_jax.inference.boxes import SMALL, box_sizes, choose_box
from autocontext_jax.inference.predictor import Predictor
from autocontext_jax.inference.tile_memory import bytes_a_voxel, row_bytes
from autocontext_jax.inference.tiling import PredictorConfig, crop, gaussian
from autocontext_jax.models import onednn
from autocontext_jax.models.pyramid import PyramidConfig

pytestmark = pytest.mark.usefixtures("compiled_once")


def counts_of(box) -> list[int]:
    """Tiles along each axis."""
    return [
        1 + (extent - size) // stride for extent, size, stride in zip(box.extent, box.size, box.stride, strict=True)
    ]


def computed(box) -> int:
    """Voxels that all tiles of a level have together."""
    return math.prod(box.size) * math.prod(counts_of(box))


@pytest.mark.parametrize("align", [2, 8, 16, 32])
def test_box_sizes_are_few_and_their_steps_small(align):
    sizes = box_sizes(align, 1024)
    assert sizes[-1] >= 1024
    assert all(size % align == 0 for size in sizes)
    assert len([size for size in sizes if size >= 64]) <= 40
    for low, high in itertools.pairwise(sizes):
        if low >= 64:
            assert high <= max(1.125 * low, low + align)
    assert set(box_sizes(align, 1024, 4)) <= set(sizes)


@pytest.mark.parametrize("size", [(50, 256, 256), (75, 128, 128), (1, 40, 30), (20, 20, 20), (96, 96, 96)])
def test_a_level_that_fits_is_one_tile(size):
    box = choose_box([(0, n) for n in size], margin=8, align=(8,) * 3, blend=gaussian, fits=lambda _: True)
    assert counts_of(box) == [1, 1, 1]
    assert box.size == box.stride == box.extent
    assert computed(box) <= 1.2 * np.prod([max(32, n) for n in size])


@pytest.mark.parametrize(
    ("size", "expected"), [((36, 50, 35), (64, 64, 64)), ((20, 90, 120), (64, 96, 128)), ((128, 1, 65), (128, 64, 96))]
)
@pytest.mark.parametrize("align", [2, 8, 16])
def test_on_accelerators_small_levels_share_few_sizes(size, expected, align):
    arguments = {"margin": 8, "align": (align,) * 3, "blend": gaussian, "step": 4}
    regions = [(0, n) for n in size]
    box = choose_box(regions, **arguments, fits=lambda _: True, small=SMALL)
    assert box.size == box.extent == expected
    assert counts_of(box) == [1, 1, 1]
    # Where the memory is too small, and for larger levels, they change nothing.
    tight = choose_box(regions, **arguments, fits=lambda box: computed(box) < 64**3, small=SMALL)
    assert tight == choose_box(regions, **arguments, fits=lambda box: computed(box) < 64**3)
    large = [(0, n) for n in (129, 60, 60)]
    assert choose_box(large, **arguments, fits=lambda _: True, small=SMALL) == choose_box(
        large, **arguments, fits=lambda _: True
    )


@pytest.mark.parametrize(
    ("size", "most", "times"),
    [
        ((100, 512, 512), 8e6, 1.20),
        ((300, 512, 512), 8e6, 1.30),
        ((800, 512, 512), 8e6, 1.35),
        ((300, 512, 512), 2e6, 1.65),
    ],
)
def test_boxes_compute_few_voxels_within_the_memory(size, most, times):
    """Cubes of 96 voxels that overlap by half compute 6.7 times the voxels of such scans."""
    regions = [(0, n) for n in size]
    box = choose_box(regions, margin=8, align=(8,) * 3, blend=gaussian, fits=lambda box: math.prod(box.size) <= most)
    assert math.prod(box.size) <= most
    assert computed(box) <= times * math.prod(size)


def test_no_box_within_the_memory_gives_the_smallest():
    box = choose_box([(0, 500)] * 3, margin=8, align=(8,) * 3, blend=gaussian, fits=lambda _: False)
    assert max(box.size) < boxes.SMALLEST + 2 * 8


def test_networks_that_halve_often_have_boxes_beyond_the_largest():
    """Of depth 8: no box with an overlap holds fewer voxels than `LARGEST`."""
    regions = [(0, 200), (0, 256), (0, 600)]
    box = choose_box(regions, margin=8, align=(128,) * 3, blend=gaussian, fits=lambda _: True)
    assert box.size == (256, 256, 256)
    assert box.stride[2] == 128


@pytest.fixture
def small(monkeypatch):
    """Boxes from 16 voxels on, of which a voxel takes a byte; gives a function that limits a tile's voxels."""
    monkeypatch.setattr(boxes, "SMALLEST", 16)
    monkeypatch.setattr(scan_tiles, "FITS", 0)
    monkeypatch.setattr(Predictor, "_bytes_a_voxel", lambda self: 1.0)
    monkeypatch.setattr(scan_tiles, "row_bytes", lambda *_, step: 0)
    return lambda voxels: monkeypatch.setattr(scan_tiles, "free_bytes", lambda: voxels)


@pytest.mark.parametrize("name", list(SCANS))
@pytest.mark.parametrize("voxels_of_a_tile", [24**3, 10**9])
def test_masks_of_a_pointwise_model_are_exact(name, voxels_of_a_tile, small):
    small(voxels_of_a_tile)
    shape, factors = SCANS[name]
    voxels = scan(shape)
    predictor = Predictor(Pointwise(len(factors)), PredictorConfig(margin=4), align=(4,) * 3)
    masks = predictor.masks(voxels[None], factors, levels=tuple(range(1, len(factors) + 1)))
    for level, factor in enumerate(factors, start=1):
        maps = enlarged(pointwise_maps(downsample_image(voxels, factor)), factor, shape)
        lead = np.sort(maps, axis=-1)[..., -1] - np.sort(maps, axis=-1)[..., -2]
        clear = lead > 2e-3
        np.testing.assert_array_equal(masks[level][clear], maps.argmax(-1)[clear])


@pytest.mark.parametrize(
    ("factors", "shape"), [(cubed(1), (31, 60, 47)), (cubed(2, 1), (23, 60, 41))], ids=["one level", "pyramid"]
)
def test_boxes_with_the_margin_of_the_field_of_view_equal_the_whole_scan(factors, shape, small, monkeypatch):
    """And with weights that vanish within it."""
    small(32 * 40 * 48)
    model, voxels = trained_pyramid(len(factors)), scan(shape)
    config = PredictorConfig(margin=SIGHT, **WHOLE)
    axes = plan_of(Predictor(model, config, align=(2,) * 3, blend=borders), voxels, factors)
    assert len(axes[-1][1].starts) > 1
    tiled = tiled_maps(Predictor(model, config, align=(2,) * 3, blend=borders), voxels, factors, monkeypatch)
    for maps, expected in zip(tiled, whole_maps(model, voxels, factors, axes), strict=True):
        np.testing.assert_allclose(maps, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("backend", "spacing", "few"),
    [
        ("cpu", (1.0, 1.0, 1.0), False),
        ("gpu", (1.0, 1.0, 1.0), True),
        ("tpu", (math.inf, 1.0, 1.0), False),  # slices are small anyway
    ],
)
def test_small_sizes_are_those_of_accelerators(backend, spacing, few, monkeypatch):
    """Also where the body begins anywhere in the scan."""
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    tiles = scan_tiles.ScanTiles(
        PredictorConfig(), PyramidConfig(levels=1, classes=CLASSES, spacing=spacing), align=(2, 8, 8), blend=gaussian,
        bytes_a_voxel=lambda: pytest.fail("a small box is not measured"),
    )  # fmt: skip
    for low in (-1, 0, 5):
        chosen = tiles._choose([(low, low + 20), (low, low + 45), (low, low + 33)])
        sizes = [len(blend.weights) for blend, _ in chosen]
        assert sizes == [64] * 3 if few else max(sizes) < 64


@pytest.mark.parametrize("sizes", [(), SMALL], ids=["on a CPU", "on accelerators"])
def test_one_box_equals_the_whole_scan(sizes, monkeypatch):
    """Where a level is one tile, nothing is blended, and the maps are those of the network on the padded level."""
    shape, factors = (15, 21, 30), cubed(2, 1)
    model, voxels = trained_pyramid(2), scan(shape)
    predictor = Predictor(model, PredictorConfig(**WHOLE), align=(2,) * 3)
    monkeypatch.setattr(predictor.tiles, "_small", sizes)
    tiled = tiled_maps(predictor, voxels, factors, monkeypatch)
    plan = plan_of(predictor, voxels, factors)
    assert all(len(axis.starts) == 1 and (not sizes or axis.size == 64) for axes in plan for axis in axes)
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
        logits = np.asarray(model.level(level, jnp.asarray(image)[None, ..., None], context))[0]
        powers = np.exp(logits - logits.max(-1, keepdims=True))
        maps, low = powers / powers.sum(-1, keepdims=True), start
        inside = tuple(slice(axis.low - s, axis.high - s) for axis, s in zip(axes, start, strict=True))
        np.testing.assert_allclose(tiled[level - 1], maps[inside], rtol=0, atol=1e-5)


def test_scans_of_similar_sizes_share_their_programs():
    predictor = Predictor(trained_pyramid(2, width=1, depth=1), PredictorConfig(), align=(8,) * 3)
    with count_compilations() as first:
        predictor.masks(scan((30, 41, 52))[None], cubed(2, 1))
    with count_compilations() as later:
        for shape in ((29, 41, 50), (31, 45, 55), (26, 47, 53)):
            assert predictor.masks(scan(shape)[None], cubed(2, 1))[2].shape == shape
    assert first
    assert later == []


def test_tiles_take_no_more_memory_than_they_may(monkeypatch):
    """By the compiled program's own figure, with the maps beside it."""
    monkeypatch.setattr(scan_tiles, "FITS", 0)
    predictor = Predictor(trained_pyramid(1, width=2), PredictorConfig(memory=0.15), align=(2,) * 3)
    ((z, y, x),) = plan_of(predictor, np.zeros((300, 130, 140), np.int16), cubed(1))
    assert len(z.starts) > 1
    slabs = row_bytes(z.size, z.stride, (y.extent, x.extent), CLASSES)
    tile = (z.size, y.size, x.size)
    needed = math.prod(tile) * bytes_a_voxel(
        predictor._programs[0], predictor._state, tile, pyramid=predictor._pyramid, level=1
    )
    assert 0.08e9 < needed + slabs <= 0.155e9


def test_maps_of_many_classes_count_too():
    """Also where a box is so small that its own memory is not measured."""

    def taken(classes: int) -> tuple[int, int]:
        tiles = scan_tiles.ScanTiles(
            PredictorConfig(memory=0.6), PyramidConfig(levels=1, classes=classes), align=(8,) * 3, blend=gaussian,
            bytes_a_voxel=lambda: 1e9,
        )  # fmt: skip
        voxels = np.zeros((90, 350, 350), np.int16)
        ((z, y, x),), _ = tiles.plan(voxels.shape, cubed(1), voxels)
        assert z.size * y.size * x.size <= scan_tiles.FITS
        return z.size, row_bytes(z.size, z.stride, (y.extent, x.extent), classes)

    few, many = taken(3), taken(20)
    assert many[0] < few[0]
    assert max(few[1], many[1]) <= 0.6e9


def test_the_bytes_of_a_voxel_hardly_depend_on_the_tile():
    predictor = Predictor(trained_pyramid(2, width=4), PredictorConfig(), align=(2,) * 3)
    found = bytes_a_voxel(
        predictor._programs[-1],
        predictor._state,
        (96, 64, 128),
        pyramid=predictor._pyramid,
        level=2,
    )
    assert predictor._bytes_a_voxel() == pytest.approx(found, rel=0.05)


def test_device_memory_does_not_grow_with_the_scan(small):
    small(40_000)
    predictor = Predictor(Pointwise(2), PredictorConfig(margin=4), align=(2,) * 3)

    def most_alive(depth: int) -> int:
        gc.collect()  # what other tests left behind
        seen: list[int] = []
        predictor.masks(
            scan((depth, 30, 32))[None], cubed(2, 1), levels=(1, 2),
            progress=lambda *_: seen.append(sum(array.nbytes for array in jax.live_arrays())),
        )  # fmt: skip
        return max(seen)

    most_alive(200)  # warms up
    assert most_alive(800) <= 1.1 * most_alive(200)


@functools.cache
def paper_sized(levels: int) -> Predictor:
    """With networks as in the paper, but for their width; made once, as its programs are compiled to be measured."""
    pyramid = trained_pyramid(levels, width=8, depth=4)
    return Predictor(pyramid, PredictorConfig(memory=3.0), align=(8,) * 3)


@pytest.mark.parametrize(
    ("shape", "factors", "tiles", "times"),
    [
        ((100, 512, 512), cubed(4, 2), [1, 1], [2.05, 1.14]),
        ((300, 512, 512), cubed(4, 2), [1, 2], [1.50, 1.14]),
        ((800, 512, 512), cubed(4, 2), [1, 4], [1.45, 1.14]),
        ((100, 512, 512), cubed(1), [4], [1.18]),
        ((300, 512, 512), cubed(1), [12], [1.27]),
        ((800, 512, 512), cubed(1), [35], [1.32]),
    ],
)
def test_what_scans_of_the_usual_sizes_cost(shape, factors, tiles, times):
    """Tiles and voxels computed for each voxel of a level, coarsest first. Cubes that overlap by half: 6.7.

    A coarse level holds the context of what the finer one's tiles hold beyond the scan.
    """
    predictor = paper_sized(len(factors))
    for level, axes in enumerate(plan_of(predictor, np.zeros(shape, np.int16), factors)):
        counts = [len(axis.starts) for axis in axes]
        voxels = math.prod(counts) * math.prod(axis.size for axis in axes)
        size = [-(-n // int(factor)) for n, factor in zip(shape, factors[level], strict=True)]
        assert math.prod(counts) <= tiles[level]
        assert voxels <= times[level] * math.prod(size)


@pytest.mark.skipif(onednn.version() is None, reason="other CPUs concatenate arrays for convolutions")
def test_what_a_voxel_of_a_tile_takes():
    """32 channels that were enlarged, 16 of the shortcut and 16 of the result, 4 bytes each, are 256."""
    assert paper_sized(1)._bytes_a_voxel() <= 275


# ---- a device with too little memory ----


def exhausted(size):
    def program(*arguments):
        raise jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: Out of memory allocating {size} bytes")

    return program


def test_smaller_tiles_are_used_where_the_memory_runs_out(small, monkeypatch, caplog):
    small(10**9)
    voxels, factors = scan((30, 60, 70)), cubed(2, 1)
    expected = Predictor(Pointwise(2), PredictorConfig(margin=4), align=(2,) * 3).masks(voxels[None], factors)[2]
    predictor = Predictor(Pointwise(2), PredictorConfig(margin=4), align=(2,) * 3)
    run, most = predictor._programs[-1], 20_000

    def program(state, images, *rest):
        return run(state, images, *rest) if images.size <= most else exhausted(images.size)()

    program._cache_size = run._cache_size
    predictor._programs[-1] = program
    seen = []
    mask = predictor.masks(voxels[None], factors, progress=lambda done, total: seen.append((done, total)))[2]
    assert (mask == expected).mean() > 0.999  # where classes tie, the sums of several tiles may round differently
    assert seen[-1][0] == seen[-1][1] > 1
    lines = [record.getMessage() for record in caplog.records]
    assert lines
    assert all("do not fit the memory: smaller ones are used" in line for line in lines)
    # The next scan begins with what fits.
    caplog.clear()
    predictor.masks(voxels[None], factors)
    assert not caplog.records


def test_a_device_that_holds_no_tile_is_told_in_one_line(small):
    predictor = Predictor(Pointwise(1), PredictorConfig(margin=4), align=(2,) * 3)
    small(10**9)
    predictor._programs = [exhausted(5)]
    with pytest.raises(UserError, match=r"too little free memory for a tile of \d+x\d+x\d+ voxels"):
        predictor.masks(scan((40, 40, 40))[None], cubed(1))
    cubes = Predictor(Pointwise(1), PredictorConfig(tile=(16,)), align=(2,) * 3)
    cubes._programs = [exhausted(5)]
    with pytest.raises(UserError, match=r"a tile of 16x16x16 voxels.*or a smaller predict\.tile"):
        cubes.masks(scan((40, 40, 40))[None], cubed(1))


def test_other_errors_of_the_device_are_not_hidden():
    predictor = Predictor(Pointwise(1), PredictorConfig(tile=(16,)), align=(2,) * 3)

    def fails(*arguments):
        raise jax.errors.JaxRuntimeError("INTERNAL: no")

    predictor._programs = [fails]
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL: no"):
        predictor.masks(scan((20, 20, 20))[None], cubed(1))


# ---- degenerate scans ----


@pytest.mark.parametrize("shape", [(1, 1, 2), (1, 90, 80), (2, 3, 700), (1200, 4, 5), (3, 1300, 6)])
def test_scans_of_extreme_shapes(shape, small):
    small(30_000)
    voxels = scan(shape)
    predictor = Predictor(Pointwise(2), PredictorConfig(margin=4), align=(4,) * 3)
    mask = predictor.masks(voxels[None], cubed(2, 1))[2]
    maps = pointwise_maps(voxels)
    clear = np.sort(maps, axis=-1)[..., -1] - np.sort(maps, axis=-1)[..., -2] > 2e-3
    np.testing.assert_array_equal(mask[clear], maps.argmax(-1)[clear])


def test_one_axis_larger_than_any_size_that_a_box_may_have():
    """A box holds at most `LARGEST` voxels, so that no single one covers this scan along z."""
    voxels = scan((2600, 60, 60))
    predictor = Predictor(Pointwise(1), PredictorConfig(), align=(8,) * 3)
    ((z, y, x),) = plan_of(predictor, voxels, cubed(1))
    assert (len(z.starts) > 1, len(y.starts), len(x.starts)) == (True, 1, 1)
    mask = predictor.masks(voxels[None], cubed(1))[1]
    maps = pointwise_maps(voxels)
    clear = np.sort(maps, axis=-1)[..., -1] - np.sort(maps, axis=-1)[..., -2] > 2e-3
    np.testing.assert_array_equal(mask[clear], maps.argmax(-1)[clear])
