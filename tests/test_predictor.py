"""Tiled prediction of whole scans: equal to untiled prediction, exact for pointwise models, few compilations."""

import contextlib
import gc
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from random_models import with_random_weights
from scipy import ndimage, special

from autocontext_jax.data.resampling import downsample_image
from autocontext_jax.inference import context as context_module
from autocontext_jax.inference import predictor as predictor_module
from autocontext_jax.inference import tile_programs
from autocontext_jax.inference.predictor import Predictor, crop
from autocontext_jax.inference.tile_programs import ONCE, Mirroring
from autocontext_jax.inference.tiling import Blend, PredictorConfig
from autocontext_jax.models.blocks import NetworkConfig
from autocontext_jax.models.pyramid import Pyramid, PyramidConfig
from autocontext_jax.models.unet import UNet
from autocontext_jax.training.state import inference_model

pytestmark = pytest.mark.usefixtures("compiled_once")

AIR = -1024


def cubed(*factors: float) -> tuple[tuple[float, float, float], ...]:
    return tuple((factor,) * 3 for factor in factors)


def scan(shape: tuple[int, int, int], seed: int = 0) -> np.ndarray:
    """Smooth HU between about -600 and 600."""
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), 1.5, mode="nearest")
    return (200 * noise / noise.std()).astype(np.int16)


@contextlib.contextmanager
def count_compilations():
    """Every program that XLA compiles inside, ours or not."""
    events: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(listener := lambda event, *_, **__: events.append(event))
    found: list[str] = []
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)
        found += [event for event in events if event.endswith("backend_compile_duration")]


# ---- tiled equals whole ----


# A U-Net of depth 2 sees 9 voxels to each side: two convolutions on the fine grid, two on the coarse, two on the fine,
# and one voxel where the coarse grid begins one earlier. Tile edges and their zero padding are out of its sight.
SIGHT = 9
CLASSES = 3


def trained_pyramid(
    levels: int, *, width: int = 2, depth: int = 2, norm: str = "batch", activation: str = "softmax"
) -> Pyramid:
    """As after training: running averages, scales and offsets differ from channel to channel."""
    config = NetworkConfig(base_channels=width, depth=depth, norm=norm)

    def make() -> Pyramid:
        return Pyramid(
            PyramidConfig(levels=levels, classes=CLASSES, activation=activation),
            lambda inputs, spacing, rngs: UNet(inputs, CLASSES, config, rngs=rngs),
            rngs=nnx.Rngs(0),
        )

    return inference_model(*nnx.split(with_random_weights(make, seed=3), nnx.Param, ...))


def unseen_border(tile: int, border: int) -> Blend:
    weights = np.zeros(tile, np.float32)
    weights[border : tile - border] = 1
    return Blend(weights, border)


class Recorder:
    """In the mask writer's place: keeps a level's finished maps."""

    levels: list = []  # noqa: RUF012 (one list for all levels)

    def __init__(self, native, box, level, factor, axes, *, classes, activation):
        self.chunks, self.axes = {}, axes
        Recorder.levels.append(self)

    def record(self, chunks):
        for z, chunk in chunks:
            self.chunks[z] = np.array(chunk)
            yield z, chunk

    def mask(self):
        return None

    def maps(self) -> np.ndarray:
        """Over the voxels that the level had to predict."""
        first = min(self.chunks)
        volume = np.concatenate([self.chunks[z] for z in sorted(self.chunks)])
        start = (first, int(self.axes[1].starts[0]), int(self.axes[2].starts[0]))
        window = tuple(slice(axis.low - s, axis.high - s) for axis, s in zip(self.axes, start, strict=True))
        return volume[window]


def tiled_maps(predictor: Predictor, voxels, factors, monkeypatch, *, half: bool = False) -> list[np.ndarray]:
    """Every level's maps, in single precision unless `half`, as they really are; of a predictor not used before."""
    Recorder.levels = []
    with monkeypatch.context() as patch:
        patch.setattr(predictor_module, "MaskWriter", Recorder)
        if not half:
            for module in (context_module, predictor_module, tile_programs):
                patch.setattr(module, "MAP_DTYPE", jnp.float32)
        predictor.masks(voxels[None], factors, levels=tuple(range(1, len(factors) + 1)))
    return [level.maps() for level in Recorder.levels]


def plan_of(predictor: Predictor, voxels, factors):
    """The tiles of each level."""
    tiles, _ = predictor.tiles.plan(voxels.shape, factors, downsample_image(voxels, factors[0]))
    return tiles


def whole_maps(model: Pyramid, voxels, factors, axes) -> list[np.ndarray]:
    """The same maps without tiles: one pass a level over the scan and as much air around it as the model sees."""
    forward = jax.jit(lambda level, image, maps: model.level(level, image, maps), static_argnums=0)
    maps, low = None, None
    expected = []
    for level, (factor, axis) in enumerate(zip(factors, axes, strict=True), start=1):
        begin = np.array([(a.low - SIGHT) // 2 * 2 for a in axis])  # even: pooling starts where the tiles' does
        end = np.array([-(-(a.high + SIGHT) // 2) * 2 for a in axis])
        image = crop(downsample_image(voxels, factor), tuple(begin), tuple(end - begin), AIR)
        context = None
        if maps is not None:
            first, size = begin // 2 - 1 - low, (end - begin) // 2 + 2
            assert (first >= 0).all()
            assert (first + size <= maps.shape[:3]).all()
            context = maps[tuple(slice(f, f + s) for f, s in zip(first, size, strict=True))][None]
        logits = forward(level, image[None, ..., None], context)
        inside = tuple(slice(a.low - b, a.high - b) for a, b in zip(axis, begin, strict=True))
        activate = {"softmax": jax.nn.softmax, "sigmoid": jax.nn.sigmoid}[model.config.activation]
        maps = np.asarray(activate(logits))[0][inside]
        low = np.array([a.low for a in axis])
        expected.append(maps)
    return expected


WHOLE = {"crop_to_body": False}


def borders(size: int) -> Blend:
    return unseen_border(size, SIGHT)


@pytest.mark.parametrize(
    ("factors", "shape", "activation"),
    [(((1.5, 0.75, 1.1),), (37, 17, 33), "softmax"), (cubed(2, 1), (15, 31, 30), "softmax"),
     (cubed(2, 1), (15, 31, 30), "sigmoid")],
    ids=["one level", "pyramid", "pyramid of regions"],
)  # fmt: skip
def test_tiled_prediction_equals_whole_scan_prediction(factors, shape, activation, monkeypatch):
    levels = len(factors)
    model, voxels = trained_pyramid(levels, activation=activation), scan(shape)

    def predictor(blend=borders) -> Predictor:
        return Predictor(model, PredictorConfig((40,), SIGHT, **WHOLE), align=(2,) * 3, blend=blend)

    tiled = tiled_maps(predictor(), voxels, factors, monkeypatch)
    axes = plan_of(predictor(), voxels, factors)
    assert all(len(axis.starts) > 1 for axis in axes[-1][1:])
    whole = whole_maps(model, voxels, factors, axes)
    for maps, expected in zip(tiled, whole, strict=True):
        assert maps.shape == expected.shape
        assert expected.std(axis=(0, 1, 2)).min() > 0.005  # there is something to see
        np.testing.assert_allclose(maps, expected, rtol=0, atol=1e-5)
    # Maps are kept in half precision: that is all that is lost.
    rounded = tiled_maps(predictor(), voxels, factors, monkeypatch, half=True)
    np.testing.assert_allclose(rounded[-1], whole[-1], rtol=0, atol=1e-3)
    # The equality is not for free: with a narrower border tile edges do show.
    narrower = predictor(lambda size: unseen_border(size, 3))
    assert np.abs(tiled_maps(narrower, voxels, factors, monkeypatch)[-1] - whole[-1]).max() > 1e-3


def test_with_statistics_of_each_sample_a_tile_is_what_the_network_gives_for_it(monkeypatch):
    """A scan of one tile; of two tiles, in blocks that do not overlap, each as if it were alone."""
    model, factors = trained_pyramid(1, norm="instance"), cubed(1)
    voxels = scan((16, 16, 32))

    def whole_weight(size: int) -> Blend:
        return Blend(np.ones(size))

    def tile_maps(voxels):
        predictor = Predictor(model, PredictorConfig((16,), 0, **WHOLE), align=(2,) * 3, blend=whole_weight)
        return tiled_maps(predictor, voxels, factors, monkeypatch)[0]

    halves = voxels[..., :16], voxels[..., 16:]
    forward = jax.jit(lambda images: jax.nn.softmax(model.level(1, images, None)))
    expected = np.asarray(forward(np.stack(halves)[..., None]))
    assert expected.std(axis=(0, 1, 2, 3)).min() > 0.005
    np.testing.assert_allclose(tile_maps(halves[0]), expected[0], rtol=0, atol=1e-5)
    np.testing.assert_allclose(tile_maps(voxels), np.concatenate(expected, axis=2), rtol=0, atol=1e-5)
    # The statistics are the tile's own: those of both halves together are others.
    together = forward(voxels[None, ..., None])[0]
    assert np.abs(together - np.concatenate(expected, axis=2)).max() > 1e-3


@pytest.mark.parametrize(("axes", "activation"), [("zyx", "softmax"), ("zy", "sigmoid")])
def test_seen_in_a_mirror_too_a_mirrored_scan_gives_mirrored_maps(axes, activation, monkeypatch):
    """In whole pairs of voxels on both levels, so that pooling meets the same ones."""
    factors, voxels, classes = cubed(2, 1), scan((16, 20, 32)), (0, 2, 1) if "x" in axes else (0, 1, 2)
    model, config = trained_pyramid(2, activation=activation), PredictorConfig((40,), SIGHT, **WHOLE)

    def finest(voxels, mirroring=ONCE):
        predictor = Predictor(model, config, align=(2,) * 3, blend=borders, mirroring=mirroring)
        return tiled_maps(predictor, voxels, factors, monkeypatch)[-1]

    maps = finest(voxels, Mirroring(axes, classes))
    assert np.abs(maps - finest(voxels)).max() > 1e-3
    for axis in ("z", "x"):
        place = "zyx".index(axis)
        turned = np.flip(finest(np.flip(voxels, place), Mirroring(axes, classes)), place)
        if axis in axes:
            np.testing.assert_allclose(turned[..., classes] if axis == "x" else turned, maps, rtol=0, atol=1e-5)
        else:
            assert np.abs(turned - maps).max() > 1e-3


# ---- a model that looks at one voxel only ----


class Pointwise(nnx.Module):
    """Three classes by HU, about: below -100, between, above 150."""

    def __init__(self, levels: int):
        self.config = PyramidConfig(levels=levels, classes=3)

    def level(self, level, image, maps):
        x = image[..., 0].astype(jnp.float32)
        return jnp.stack([-(x + 100) / 40, jnp.zeros_like(x), (x - 150) / 60], axis=-1)


def pointwise_maps(image: np.ndarray) -> np.ndarray:
    x = image.astype(float)
    return special.softmax(np.stack([-(x + 100) / 40, 0 * x, (x - 150) / 60], axis=-1), axis=-1)


class PointwiseRegions(nnx.Module):
    """Three regions by HU, about: above -100; above 150, inside it; 0 to 200, which overlaps the second in part."""

    def __init__(self, levels: int):
        self.config = PyramidConfig(levels=levels, classes=3, activation="sigmoid")

    def level(self, level, image, maps):
        x = image[..., 0].astype(jnp.float32)
        return jnp.stack([(x + 100) / 40, (x - 150) / 60, 2 - jnp.abs(x - 100) / 50], axis=-1)


def pointwise_regions(image: np.ndarray) -> np.ndarray:
    x = image.astype(float)
    return special.expit(np.stack([(x + 100) / 40, (x - 150) / 60, 2 - np.abs(x - 100) / 50], axis=-1))


def enlarged(maps: np.ndarray, factor, shape) -> np.ndarray:
    """Linear interpolation between voxel centres, constant beyond the outermost."""
    centres = [(np.arange(n) + 0.5) / f - 0.5 for n, f in zip(shape, factor, strict=True)]
    where = np.meshgrid(*centres, indexing="ij")
    return np.stack([ndimage.map_coordinates(m, where, order=1, mode="nearest") for m in np.moveaxis(maps, -1, 0)], -1)


SCANS = {
    "smaller than a tile": ((5, 9, 11), cubed(2, 1)),
    "one slice": ((1, 40, 30), cubed(2, 1)),
    "several tiles": ((37, 25, 44), cubed(4, 2)),
    "long": ((90, 17, 21), cubed(2, 1)),
    "three levels": ((30, 41, 27), cubed(4, 2, 1)),
    "anisotropic": ((13, 50, 46), ((1.6, 5.0, 4.4), (0.8, 2.5, 2.2))),
    "wide": ((9, 30, 70), cubed(2)),
}


@pytest.mark.parametrize(
    ("name", "margin"),
    [("several tiles", 0), ("several tiles", 4), ("several tiles", 2), ("smaller than a tile", 0),
     ("one slice", 4), ("long", 0), ("three levels", 4), ("anisotropic", 4), ("wide", 0)],
)  # fmt: skip
def test_masks_of_a_pointwise_model_are_exact(name, margin):
    shape, factors = SCANS[name]
    levels, voxels = len(factors), scan(shape)
    predictor = Predictor(Pointwise(levels), PredictorConfig((16,), margin), align=(4,) * 3)
    masks = predictor.masks(voxels[None], factors, levels=tuple(range(1, levels + 1)))
    assert list(masks) == list(range(1, levels + 1))
    for level, factor in enumerate(factors, start=1):
        maps = enlarged(pointwise_maps(downsample_image(voxels, factor)), factor, shape)
        mask = masks[level]
        assert mask.shape == shape
        assert mask.dtype == np.uint8
        lead = np.sort(maps, axis=-1)[..., -1] - np.sort(maps, axis=-1)[..., -2]
        clear = lead > 2e-3  # maps are kept in half precision
        assert clear.mean() > 0.97
        np.testing.assert_array_equal(mask[clear], maps.argmax(-1)[clear])
    if min(shape) > 1:
        assert set(np.unique(masks[levels])) == {0, 1, 2}


@pytest.mark.parametrize(("name", "margin"), [("several tiles", 4), ("three levels", 2), ("anisotropic", 4)])
def test_masks_of_regions_are_exact_and_the_last_in_order_wins(name, margin):
    shape, factors = SCANS[name]
    levels, voxels = len(factors), scan(shape)
    predictor = Predictor(PointwiseRegions(levels), PredictorConfig((16,), margin), align=(4,) * 3)
    masks = predictor.masks(voxels[None], factors, levels=tuple(range(1, levels + 1)))
    for level, factor in enumerate(factors, start=1):
        maps = enlarged(pointwise_regions(downsample_image(voxels, factor)), factor, shape)
        expected = np.zeros(shape, np.uint8)
        for region in range(3):
            expected[maps[..., region] > 0.5] = region + 1
        clear = (np.abs(maps - 0.5) > 1e-3).all(-1)  # maps are kept in half precision
        assert clear.mean() > 0.95
        np.testing.assert_array_equal(masks[level][clear], expected[clear])
    assert ((maps[..., 1] > 0.5) & (expected == 3)).any()  # regions do overlap
    assert {0, 1, 2, 3} == set(np.unique(masks[levels]))
    mask, found = predictor.mask_and_maps(voxels[None], factors)
    np.testing.assert_array_equal(mask, masks[levels])
    inside = np.isclose(found, maps, rtol=0, atol=2e-3).all(-1)  # tiles are added up in half precision
    outside = (found == 0).all(-1)  # the box around the body
    assert (inside | outside).all()
    assert inside.mean() > 0.9
    assert found.max() <= 1


def test_levels_default_to_the_finest():
    voxels, factors = scan((12, 20, 18)), cubed(4, 2)
    predictor = Predictor(Pointwise(2), PredictorConfig((16,)), align=(2,) * 3)
    every = predictor.masks(voxels[None], factors, levels=(1, 2))
    assert (every[1] != every[2]).any()
    for levels in (None, ()):
        masks = predictor.masks(voxels[None], factors, levels=levels)
        assert list(masks) == [2]
        np.testing.assert_array_equal(masks[2], every[2])
    np.testing.assert_array_equal(predictor.masks(voxels[None], factors, levels=(1,))[1], every[1])


def test_progress_counts_tiles_to_their_total():
    seen = []
    predictor = Predictor(Pointwise(2), PredictorConfig((16,)), align=(2,) * 3)
    predictor.masks(scan((12, 20, 18))[None], cubed(2, 1), progress=lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] > 2
    assert seen == sorted(seen)
    assert len({total for _, total in seen}) == 1


class Context(nnx.Module):
    """Level 1 knows the classes; level 2 sees nothing but the maps under its tile and repeats them."""

    def __init__(self):
        self.config = PyramidConfig(levels=2, classes=3)

    def level(self, level, image, maps):
        if level == 1:
            return Pointwise.level(self, level, image, maps)
        size = (2 * (n // 2 + 2) for n in image.shape[1:4])
        fine = jax.image.resize(maps.astype(jnp.float32), (1, *size, 3), "linear")
        return jnp.log(fine[:, 2:-2, 2:-2, 2:-2] + 1e-6)


@pytest.mark.parametrize(("shape", "margin"), [((21, 35, 28), 4), ((40, 10, 33), 0)])
def test_context_lies_where_it_belongs(shape, margin):
    """Beyond the scan the coarser level says air, not its outermost voxel: hence the padding before enlarging."""
    voxels, factors = scan(shape), cubed(2, 1)
    predictor = Predictor(Context(), PredictorConfig((16,), margin), align=(4,) * 3)
    mask = predictor.masks(voxels[None], factors)[2]
    coarse = np.pad(downsample_image(voxels, factors[0]), 2, constant_values=AIR)
    maps = enlarged(pointwise_maps(coarse), factors[0], [n + 8 for n in shape])[tuple(slice(4, 4 + n) for n in shape)]
    ordered = np.sort(maps, axis=-1)
    clear = ordered[..., -1] - ordered[..., -2] > 5e-3  # maps cross in half precision
    assert clear.mean() > 0.95
    np.testing.assert_array_equal(mask[clear], maps.argmax(-1)[clear])


# ---- compiled once ----


@pytest.mark.parametrize("factors", [cubed(2, 1), cubed(4, 2), ((6.0, 2.6, 2.6), (3.0, 1.3, 1.3))])
def test_scans_of_any_length_compile_nothing_after_the_first(factors):
    predictor = Predictor(trained_pyramid(2, width=1, depth=1), PredictorConfig((16,)), align=(2,) * 3)
    with count_compilations() as first:
        predictor.masks(scan((30, 41, 52))[None], factors, levels=(1, 2))
    assert first  # the count does count
    programs = predictor.compilations()
    with count_compilations() as later:
        for depth in (9, 71, 3, 10, 140):
            masks = predictor.masks(scan((depth, 41, 52))[None], factors, levels=(1, 2))
            assert [mask.shape for mask in masks.values()] == [(depth, 41, 52)] * 2
    assert later == []
    assert predictor.compilations() == programs


def test_device_memory_does_not_grow_with_the_scan():
    predictor = Predictor(Pointwise(2), PredictorConfig((16,)), align=(2,) * 3)

    def most_alive(depth: int) -> int:
        gc.collect()  # what other tests left behind
        seen = []
        predictor.masks(
            scan((depth, 30, 32))[None],
            cubed(2, 1),
            levels=(1, 2),
            progress=lambda *_: seen.append(sum(array.nbytes for array in jax.live_arrays())),
        )
        return max(seen)

    most_alive(80)  # warms up
    assert most_alive(320) == most_alive(80)


def test_without_norm_there_is_nothing_to_average():
    voxels = scan((9, 12, 10))
    model = trained_pyramid(1, width=1, depth=1, norm="none")
    predictor = Predictor(model, PredictorConfig((16,)), align=(2,) * 3)
    assert predictor.masks(voxels[None], cubed(1))[1].shape == voxels.shape


# ---- pieces ----


@pytest.mark.parametrize("start", [(0, 0, 0), (-3, 2, -1), (3, 4, 5), (-9, 0, 0), (7, 0, 0), (-2, -2, -2)])
def test_crop_fills_what_lies_outside(start):
    volume = np.arange(4 * 5 * 6, dtype=np.int16).reshape(4, 5, 6)
    size = (3, 9, 4)
    piece = crop(volume, start, size, AIR)
    expected = np.pad(volume, 20, constant_values=AIR)[
        tuple(slice(s + 20, s + 20 + n) for s, n in zip(start, size, strict=True))
    ]
    np.testing.assert_array_equal(piece, expected)
    piece[...] = 0
    assert volume[3, 4, 5] == 119


# ---- several devices ----


def masks_of_several_devices() -> None:
    """What the subprocess runs: each tile of a row on a device of its own gives what one device gives."""
    model = inference_model(*nnx.split(trained_pyramid(2), nnx.Param, ...))
    voxels = scan((50, 48, 44))
    boxes = Predictor(model, PredictorConfig(), align=(2,) * 3)
    expected_of_boxes = boxes.masks(voxels[None], cubed(2, 1))[2]
    several = Predictor(model, PredictorConfig(tile=(32,)), align=(2,) * 3, mirroring=Mirroring("x", (0, 2, 1)))
    found = several.masks(voxels[None], cubed(2, 1), levels=(1, 2))
    programs = several.compilations()
    several.masks(voxels[None], cubed(2, 1), levels=(1, 2))
    assert several.compilations() == programs
    devices = jax.local_devices()
    assert len(devices) == 3
    jax.local_devices = lambda: devices[:1]
    alone = Predictor(model, PredictorConfig(tile=(32,)), align=(2,) * 3, mirroring=Mirroring("x", (0, 2, 1)))
    for level, mask in alone.masks(voxels[None], cubed(2, 1), levels=(1, 2)).items():
        np.testing.assert_array_equal(found[level], mask)
    alone = Predictor(model, PredictorConfig(), align=(2,) * 3)
    np.testing.assert_array_equal(alone.masks(voxels[None], cubed(2, 1))[2], expected_of_boxes)
    assert 0.8 < boxes._bytes_a_voxel() / alone._bytes_a_voxel() < 1.3  # each of them takes a tile
    print("equal")


def test_devices_that_share_the_tiles_of_a_row_give_the_masks_of_one():
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=3", "JAX_PLATFORMS": "cpu"}
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", "import test_predictor; test_predictor.masks_of_several_devices()"],
        cwd=Path(__file__).parent, env=environment, capture_output=True, encoding="utf-8", check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stdout == "equal\n"
