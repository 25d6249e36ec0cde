"""Tiled prediction of whole scans: equal to untiled prediction, exact for pointwise models, compiled once."""

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
from autocontext_jax.geometry import level_shape
from autocontext_jax.inference import context as context_module
from autocontext_jax.inference import predictor as predictor_module
from autocontext_jax.inference.predictor import Predictor, crop
from autocontext_jax.inference.tiling import Blend, PredictorConfig, cubes, pyramid_tiles
from autocontext_jax.models.blocks import NetworkConfig
from autocontext_jax.models.pyramid import Pyramid, PyramidConfig
from autocontext_jax.models.unet import UNet
from autocontext_jax.training.state import inference_model

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


def trained_pyramid(levels: int, *, width: int = 2, depth: int = 2, norm: str = "batch") -> Pyramid:
    """As after training: running averages, scales and offsets differ from channel to channel."""
    config = NetworkConfig(base_channels=width, depth=depth, norm=norm)

    def make() -> Pyramid:
        return Pyramid(
            PyramidConfig(levels=levels, classes=CLASSES),
            lambda inputs, rngs: UNet(inputs, CLASSES, config, rngs=rngs),
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

    def __init__(self, native, level, factor, axes, plane, *, classes):
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
    """Every level's maps; the context between levels in single precision unless `half`, as it really is."""
    Recorder.levels = []
    with monkeypatch.context() as patch:
        patch.setattr(predictor_module, "MaskWriter", Recorder)
        if not half:
            patch.setattr(context_module, "CONTEXT_DTYPE", jnp.float32)
        predictor.masks(voxels, factors, levels=tuple(range(1, len(factors) + 1)))
    return [level.maps() for level in Recorder.levels]


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
        logits = forward(level, image[None], context)
        inside = tuple(slice(a.low - b, a.high - b) for a, b in zip(axis, begin, strict=True))
        maps = np.asarray(jax.nn.softmax(logits))[0][inside]
        low = np.array([a.low for a in axis])
        expected.append(maps)
    return expected


@pytest.mark.parametrize(
    ("factors", "overlap", "shape"),
    [(((1.5, 0.75, 1.1),), 0.5, (26, 17, 33)), (cubed(2, 1), 0.0, (15, 21, 30))],
    ids=["one level", "pyramid"],
)
def test_tiled_prediction_equals_whole_scan_prediction(factors, overlap, shape, monkeypatch):
    levels = len(factors)
    model, voxels = trained_pyramid(levels), scan(shape)
    config, blend = PredictorConfig(32, overlap, plane=48), unseen_border(32, SIGHT)
    predictor = Predictor(model, config, align=2, blend=blend)
    tiled = tiled_maps(predictor, voxels, factors, monkeypatch)
    axes = pyramid_tiles(level_shape(shape, factors[-1]), levels, cubes(blend, predictor._stride), align=2)
    assert all(len(axis.starts) > 1 for axis in axes[-1])
    whole = whole_maps(model, voxels, factors, axes)
    for maps, expected in zip(tiled, whole, strict=True):
        assert maps.shape == expected.shape
        assert expected.std(axis=(0, 1, 2)).min() > 0.005  # there is something to see
        np.testing.assert_allclose(maps, expected, rtol=0, atol=1e-5)
    if levels > 1:
        # Maps cross from level to level in half precision: that is all that is lost.
        rounded = tiled_maps(predictor, voxels, factors, monkeypatch, half=True)
        np.testing.assert_allclose(rounded[-1], whole[-1], rtol=0, atol=1e-3)
    else:
        # The equality is not for free: with a narrower border tile edges do show.
        narrower = Predictor(model, config, align=2, blend=unseen_border(32, 3))
        assert np.abs(tiled_maps(narrower, voxels, factors, monkeypatch)[0] - whole[0]).max() > 1e-3


def test_seen_in_a_mirror_too_a_mirrored_scan_gives_mirrored_maps(monkeypatch):
    """In whole pairs of voxels on both levels, so that pooling meets the same ones."""
    factors, voxels, classes = cubed(2, 1), scan((15, 21, 32)), (0, 2, 1)
    model, config, blend = trained_pyramid(2), PredictorConfig(32, 0.0, plane=48), unseen_border(32, SIGHT)

    def finest(voxels, mirror_classes):
        predictor = Predictor(model, config, align=2, blend=blend, mirror_classes=mirror_classes)
        return tiled_maps(predictor, voxels, factors, monkeypatch)[-1]

    maps, turned = finest(voxels, classes), finest(voxels[:, :, ::-1], classes)
    np.testing.assert_allclose(turned[:, :, ::-1, classes], maps, rtol=0, atol=1e-5)
    assert np.abs(maps - finest(voxels, ())).max() > 1e-3


# ---- a model that looks at one voxel only ----


class Pointwise(nnx.Module):
    """Three classes by HU, about: below -100, between, above 150."""

    def __init__(self, levels: int):
        self.config = PyramidConfig(levels=levels, classes=3)

    def level(self, level, image, maps):
        x = image.astype(jnp.float32)
        return jnp.stack([-(x + 100) / 40, jnp.zeros_like(x), (x - 150) / 60], axis=-1)


def pointwise_maps(image: np.ndarray) -> np.ndarray:
    x = image.astype(float)
    return special.softmax(np.stack([-(x + 100) / 40, 0 * x, (x - 150) / 60], axis=-1), axis=-1)


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
    "wider than the plane": ((9, 30, 70), cubed(2)),
}


@pytest.mark.parametrize(
    ("name", "overlap"),
    [("several tiles", 0), ("several tiles", 0.5), ("several tiles", 0.75), ("smaller than a tile", 0),
     ("one slice", 0.5), ("long", 0), ("three levels", 0.5), ("anisotropic", 0.5), ("wider than the plane", 0)],
)  # fmt: skip
def test_masks_of_a_pointwise_model_are_exact(name, overlap):
    shape, factors = SCANS[name]
    levels, voxels = len(factors), scan(shape)
    predictor = Predictor(Pointwise(levels), PredictorConfig(16, overlap, plane=50), align=4)
    masks = predictor.masks(voxels, factors, levels=tuple(range(1, levels + 1)))
    assert list(masks) == list(range(1, levels + 1))
    for level, factor in enumerate(factors, start=1):
        maps = enlarged(pointwise_maps(downsample_image(voxels, factor)), factor, shape)
        mask = masks[level]
        assert mask.shape == shape
        assert mask.dtype == np.uint8
        lead = np.sort(maps, axis=-1)[..., -1] - np.sort(maps, axis=-1)[..., -2]
        clear = lead > 1e-4
        assert clear.mean() > 0.99
        np.testing.assert_array_equal(mask[clear], maps.argmax(-1)[clear])
    if min(shape) > 1:
        assert set(np.unique(masks[levels])) == {0, 1, 2}


def test_levels_default_to_the_finest():
    voxels, factors = scan((12, 20, 18)), cubed(4, 2)
    predictor = Predictor(Pointwise(2), PredictorConfig(16, 0.5, plane=32), align=2)
    every = predictor.masks(voxels, factors, levels=(1, 2))
    assert (every[1] != every[2]).any()
    for levels in (None, ()):
        masks = predictor.masks(voxels, factors, levels=levels)
        assert list(masks) == [2]
        np.testing.assert_array_equal(masks[2], every[2])
    np.testing.assert_array_equal(predictor.masks(voxels, factors, levels=(1,))[1], every[1])


def test_progress_counts_tiles_to_their_total():
    seen = []
    predictor = Predictor(Pointwise(2), PredictorConfig(16, 0.5, plane=32), align=2)
    predictor.masks(scan((12, 20, 18)), cubed(2, 1), progress=lambda done, total: seen.append((done, total)))
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
        n = image.shape[1] // 2 + 2
        fine = jax.image.resize(maps.astype(jnp.float32), (1, 2 * n, 2 * n, 2 * n, 3), "linear")
        return jnp.log(fine[:, 2:-2, 2:-2, 2:-2] + 1e-6)


@pytest.mark.parametrize(("shape", "overlap"), [((21, 35, 28), 0.5), ((40, 10, 33), 0.0)])
def test_context_lies_where_it_belongs(shape, overlap):
    """Beyond the scan the coarser level says air, not its outermost voxel: hence the padding before enlarging."""
    voxels, factors = scan(shape), cubed(2, 1)
    predictor = Predictor(Context(), PredictorConfig(16, overlap, plane=48), align=4)
    mask = predictor.masks(voxels, factors)[2]
    coarse = np.pad(downsample_image(voxels, factors[0]), 2, constant_values=AIR)
    maps = enlarged(pointwise_maps(coarse), factors[0], [n + 8 for n in shape])[tuple(slice(4, 4 + n) for n in shape)]
    ordered = np.sort(maps, axis=-1)
    clear = ordered[..., -1] - ordered[..., -2] > 5e-3  # maps cross in half precision
    assert clear.mean() > 0.95
    np.testing.assert_array_equal(mask[clear], maps.argmax(-1)[clear])


# ---- compiled once ----


@pytest.mark.parametrize("factors", [cubed(2, 1), cubed(4, 2), ((6.0, 2.6, 2.6), (3.0, 1.3, 1.3))])
def test_scans_of_any_size_compile_nothing_after_the_first(factors):
    predictor = Predictor(trained_pyramid(2, width=1, depth=1), PredictorConfig(16, 0.5, plane=64), align=2)
    shapes = [(30, 41, 52), (9, 64, 33), (71, 23, 40), (3, 5, 7), (10, 63, 59)]
    with count_compilations() as first:
        masks = predictor.masks(scan(shapes[0]), factors, levels=(1, 2))
    assert first  # the count does count
    programs = predictor.compilations()
    with count_compilations() as later:
        for shape in shapes[1:]:
            masks = predictor.masks(scan(shape), factors, levels=(1, 2))
            assert [mask.shape for mask in masks.values()] == [shape] * 2
    assert later == []
    assert predictor.compilations() == programs


def test_a_larger_plane_costs_one_more_compilation_each():
    predictor = Predictor(Pointwise(1), PredictorConfig(16, 0.5, plane=32), align=2)
    predictor.masks(scan((4, 32, 20)), cubed(1))
    programs = predictor.compilations()
    predictor.masks(scan((4, 33, 20)), cubed(1))
    larger = predictor.compilations()
    assert larger > programs
    predictor.masks(scan((4, 64, 64)), cubed(1))
    predictor.masks(scan((4, 20, 20)), cubed(1))
    assert predictor.compilations() == larger


def test_device_memory_does_not_grow_with_the_scan():
    predictor = Predictor(Pointwise(2), PredictorConfig(16, 0.5, plane=32), align=2)

    def most_alive(depth: int) -> int:
        gc.collect()  # what other tests left behind
        seen = []
        predictor.masks(
            scan((depth, 30, 32)),
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
    predictor = Predictor(model, PredictorConfig(16, 0.5, plane=16), align=2)
    assert predictor.masks(voxels, cubed(1))[1].shape == voxels.shape


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


# ---- several devices share the depth of a tile ----


def masks_of_eight_devices() -> None:
    """What the subprocess runs: the masks for each number of devices, and the programs that were compiled for them."""
    model = inference_model(*nnx.split(trained_pyramid(2), nnx.Param, ...))
    voxels = scan((50, 48, 44))
    alone, *others = (Predictor(model, PredictorConfig(tile=32, plane=48, space=space), align=2) for space in (1, 2, 8))
    expected = alone.masks(voxels, cubed(2, 1), levels=(1, 2))
    for predictor in others:
        found = predictor.masks(voxels, cubed(2, 1), levels=(1, 2))
        assert predictor.compilations() == alone.compilations()
        for level, mask in expected.items():
            np.testing.assert_array_equal(found[level], mask)
    print("equal")


def test_devices_that_share_tiles_give_the_masks_of_one():
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", "import test_predictor; test_predictor.masks_of_eight_devices()"],
        cwd=Path(__file__).parent, env=environment, capture_output=True, encoding="utf-8", check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stdout == "equal\n"
