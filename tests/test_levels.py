"""Any number of levels, of 3D and of 2D networks, of thick slices; in 2D no slice sees another."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from autocontext_jax.data import preparation
from autocontext_jax.data.augment import make_augment
from autocontext_jax.data.augmentation_ranges import IntensityRanges, SpatialRanges, crop_margins
from autocontext_jax.data.datasets import Case
from autocontext_jax.data.labels import LabelSpec
from autocontext_jax.data.loader import read_batch
from autocontext_jax.data.phantom.anatomy import ORGANS
from autocontext_jax.data.phantom.painting import make_phantom
from autocontext_jax.data.store.level_grids import LevelGrids
from autocontext_jax.data.store.reader import PreparedCase
from autocontext_jax.geometry import CUBES, SLICE_BY_SLICE, PyramidPatch, Spacing, cube, next_level_start
from autocontext_jax.images import scans
from autocontext_jax.images.spec import AIR
from autocontext_jax.inference.predictor import Predictor, crop
from autocontext_jax.inference.tiling import SLICES, PredictorConfig
from autocontext_jax.models import convolution
from autocontext_jax.models.blocks import NetworkConfig
from autocontext_jax.models.fcn import FCN
from autocontext_jax.models.pyramid import Pyramid, PyramidConfig, make_pyramid
from autocontext_jax.models.residual_unet import ResidualUNet
from autocontext_jax.models.resizing import depth_to_space, max_pool
from autocontext_jax.models.unet import UNet
from autocontext_jax.training.losses import LossConfig
from autocontext_jax.training.state import Batch, create_state, inference_model, make_train_step

pytestmark = pytest.mark.usefixtures("compiled_quickly")

EDGE, CLASSES = 16, 3
PATCH_2D = PyramidPatch((1, EDGE, EDGE), 2, SLICE_BY_SLICE)
FLAT = ((1.0, 2.0, 2.0), (1.0, 1.0, 1.0))  # native voxels per voxel of two levels in 2D


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def pyramid(levels: int, spacing: Spacing, backbone=UNet, depth: int = 2) -> Pyramid:
    network = NetworkConfig(base_channels=2, depth=depth)
    return make_pyramid(backbone, network, PyramidConfig(levels=levels, classes=CLASSES, spacing=spacing), seed=0)


def at_inference(model: Pyramid) -> Pyramid:
    """As after training: with running averages that differ from channel to channel."""
    graph, params, statistics = nnx.split(model, nnx.Param, ...)
    rng = np.random.default_rng(0)
    statistics = jax.tree.map(lambda leaf: jnp.asarray(rng.uniform(0.05, 0.3, leaf.shape), leaf.dtype), statistics)
    return inference_model(graph, params, statistics)


@pytest.mark.parametrize(
    ("levels", "spacing"),
    [(levels, spacing) for levels in (1, 2, 3) for spacing in (SLICE_BY_SLICE, CUBES)]
    + [(3, (6.0, 1.0, 1.0)), (2, (1.0, 3.0, 1.0))],
)
def test_any_levels_train_and_predict(levels, spacing):
    optimizer = optax.adam(1e-2)
    graph, state = create_state(pyramid(levels, spacing, depth=1), optimizer)
    before = jax.tree.map(np.array, state.params)
    deep = {math.inf: 1, 6.0: 4, 1.0: EDGE}[spacing[0]]
    shape = (2, deep, EDGE, EDGE)
    images = tuple(200 * normal(level, *shape, 1) for level in range(levels))
    labels = tuple(np.random.default_rng(level).integers(0, CLASSES, shape).astype(np.uint8) for level in range(levels))
    state, metrics = make_train_step(graph, optimizer, LossConfig())(state, Batch(images, labels))
    assert np.isfinite(metrics.losses).all()
    assert metrics.losses.shape == (levels,)
    for number in range(levels):
        old, new = before["networks"][number], state.params["networks"][number]
        assert any((np.asarray(a) != b).any() for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(old), strict=True))

    predictor = Predictor(
        inference_model(graph, state.params, state.batch_stats), PredictorConfig((EDGE,)), align=(2,) * 3
    )
    factors = PyramidPatch((deep, EDGE, EDGE), levels, spacing).scales
    scan = (200 * normal(9, 6, 20, 28)).astype(np.int16)
    masks = predictor.masks(scan[None], factors, levels=tuple(range(1, levels + 1)))
    assert {level: mask.shape for level, mask in masks.items()} == dict.fromkeys(range(1, levels + 1), scan.shape)
    assert len(np.unique(masks[levels])) > 1


# ---- spatial_dims 2 ----


@pytest.mark.parametrize("onednn", [True, False])
def test_a_flat_convolution_is_a_deep_one_with_zeros_around(onednn, monkeypatch):
    x, kernel, cotangent = normal(0, 2, 3, 6, 5, 4), normal(1, 5, 1, 3, 3, 4), normal(2, 2, 3, 6, 5, 5)
    if not onednn:
        monkeypatch.setattr(convolution, "onednn_type", lambda dtype: None)
        jax.clear_caches()
    value, pullback = jax.vjp(lambda x, w: convolution.convolution(x, w), x, kernel)
    deep = np.pad(kernel, ((0, 0), (1, 1), (0, 0), (0, 0), (0, 0)))
    expected, deep_pullback = jax.vjp(convolution.direct_convolution, x, deep)
    np.testing.assert_allclose(value, expected, atol=1e-4)
    (x_gradient, gradient), (wanted_x, expected_deep) = pullback(cotangent), deep_pullback(cotangent)
    np.testing.assert_allclose(x_gradient, wanted_x, atol=1e-4)
    np.testing.assert_allclose(gradient, expected_deep[:, 1:2], atol=1e-4)


def test_a_flat_pool_and_its_gradient():
    x = normal(0, 2, 3, 4, 6, 2)
    value, pullback = jax.vjp(lambda x: max_pool(x, (1, 2, 2)), x)
    blocks = x.reshape(2, 3, 2, 2, 3, 2, 2).transpose(0, 1, 2, 4, 3, 5, 6).reshape(2, 3, 2, 3, 4, 2)
    np.testing.assert_array_equal(value, blocks.max(4))
    (gradient,) = pullback(jnp.ones_like(value))
    largest = jnp.asarray(blocks == blocks.max(4, keepdims=True))
    np.testing.assert_array_equal(gradient, depth_to_space(largest, (1, 2, 2)))


@pytest.mark.parametrize("backbone", [UNet, ResidualUNet, FCN])
def test_no_slice_sees_another(backbone):
    model = at_inference(pyramid(2, SLICE_BY_SLICE, backbone))
    kernels = [leaf for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)) if leaf.ndim == 5]
    assert {kernel.shape[:3] for kernel in kernels if kernel.shape[:3] == (1, 2, 2)}  # deconvolutions
    assert all(1 in (kernel.shape[0], kernel.shape[1]) for kernel in kernels)
    images = tuple(200 * normal(level, 1, 3, EDGE, EDGE, 1) for level in range(2))
    graph, state = nnx.split(model)
    forward = jax.jit(lambda state, images: nnx.merge(graph, state)(images))
    together = forward(state, images)
    apart = [forward(state, tuple(image[:, z : z + 1] for image in images)) for z in range(3)]
    for level in range(2):
        assert together[level].shape == (1, 3, EDGE, EDGE, CLASSES)
        alone = np.concatenate([one[level] for one in apart], 1)
        # Rounding may differ, as the work is divided among threads by its size.
        np.testing.assert_allclose(together[level], alone, rtol=0, atol=1e-5 * np.abs(alone).max())


def test_patches_nest_in_plane_and_keep_their_slice():
    for centre in ((0, 0, 0), (7, 12, 31), (-3, 40, 5)):
        flat = PyramidPatch((1, EDGE, EDGE), 3, SLICE_BY_SLICE).starts(centre)
        deep = cube(EDGE, 3).starts(centre)
        assert [start[0] for start in flat] == [centre[0]] * 3
        assert [start[1:] for start in flat] == [start[1:] for start in deep]
        assert next_level_start(flat[0], (1, EDGE, EDGE), (1, 2, 2)) == flat[1]


@pytest.fixture(scope="module")
def case(tmp_path_factory) -> PreparedCase:
    folder = tmp_path_factory.mktemp("flat")
    image, label = make_phantom(np.random.default_rng(0), size=(24, 40, 44), spacing=(11.0, 8.0, 8.0))
    for name, voxels in (("image", image), ("label", label)):
        scans.write_scan(folder / f"{name}.nii.gz", voxels, (11.0, 8.0, 8.0), origin=(0.0, 0.0, 0.0))
    one = Case("one", (folder / "image.nii.gz",), folder / "label.nii.gz")
    settings = LevelGrids((2, 1), spatial_dims=2)
    assert settings.level_factors((11.0, 8.0, 8.0)) == FLAT
    assert LevelGrids((2, 1), "mm", (5.0, 4.0, 4.0), spatial_dims=2).level_factors((11.0, 8.0, 8.0)) == (
        (1, 1, 1),
        (1, 0.5, 0.5),
    )
    preparation.prepare_case(one, str(folder / "store"), settings, LabelSpec.plain(("background", *ORGANS)))
    return PreparedCase.open(str(folder / "store"), "one")


def test_levels_read_from_the_store_are_one_slice(case):
    assert case.shapes == ((24, 20, 22), (24, 40, 44))
    none = ((0, 0, 0),) * 2
    batch = read_batch([(case, centre, none) for centre in ((11, 20, 21), (12, 19, 24))], PATCH_2D, none)
    coarse, fine = (image[:, 0] for image in batch["images"])
    assert coarse.shape == fine.shape == (2, 1, EDGE, EDGE)
    inner = slice(EDGE // 4, 3 * EDGE // 4)
    means = fine.reshape(2, 1, EDGE // 2, 2, EDGE // 2, 2).mean((3, 5))
    np.testing.assert_allclose(coarse[:, :, inner, inner], means, atol=0.51)
    assert fine.std() > 50


def test_augmentation_stays_in_its_slice_and_moves_levels_together():
    limits, spacing = SpatialRanges(rotation=10, translation=3, elastic_sigma=2, elastic_spacing=16), (5.0, 1.0, 2.0)
    margins = crop_margins(PATCH_2D, spacing, limits)
    assert [margin[0] for margin in margins] == [0, 0]
    run = make_augment(PATCH_2D, margins, limits, IntensityRanges())
    # Crops that hold their own place along y (first sample) and x, in finest voxels: the same number, the same field.
    images = []
    for (_, y, x), step in zip(margins, (2, 1), strict=True):
        places = [(np.arange(EDGE + 2 * m) - (EDGE - 1) / 2 - m) * step for m in (y, x)]
        images.append(np.rint(100 * np.stack(np.meshgrid(*places, indexing="ij")))[:, None].astype(np.int16))
    labels = [(image > 0).astype(np.uint8) for image in images]
    channels = [image[:, None] for image in images]
    moved, _ = run(jax.random.key(1), np.zeros(2, np.uint32), np.array([spacing] * 2, np.float32), channels, labels)
    coarse, fine = (np.asarray(image[..., 0], np.float64) / 100 for image in moved)
    assert coarse.shape == fine.shape == (2, 1, EDGE, EDGE)
    own = images[1][(..., *(slice(m, m + EDGE) for m in margins[1][1:]))] / 100
    assert np.abs(fine - own).max() > 1
    inner = slice(EDGE // 4, 3 * EDGE // 4)
    means = fine.reshape(2, 1, EDGE // 2, 2, EDGE // 2, 2).mean((3, 5))
    np.testing.assert_allclose(coarse[:, :, inner, inner], means, atol=0.1)


@pytest.mark.parametrize("tile", [(1, EDGE, EDGE), (0,)])
def test_a_scan_is_predicted_slice_by_slice(tile):
    model = at_inference(pyramid(2, SLICE_BY_SLICE))
    scan = (300 * normal(5, SLICES + 2, 40, 30)).astype(np.int16)
    predictor = Predictor(model, PredictorConfig(tile), align=(1, 2, 2))
    whole = predictor.masks(scan[None], FLAT, levels=(1, 2))
    alone = [predictor.masks(scan[None, z : z + 1], FLAT, levels=(1, 2)) for z in range(len(scan))]
    for level in (1, 2):
        assert len(np.unique(whole[level])) > 1
        assert np.mean(whole[level] != np.concatenate([one[level] for one in alone])) < 1e-3  # rounding where maps tie


def test_one_tile_of_slices_is_the_model_itself():
    model = at_inference(pyramid(2, SLICE_BY_SLICE))
    scan = (300 * normal(6, SLICES, 32, 32)).astype(np.int16)
    predictor = Predictor(model, PredictorConfig((32,)), align=(1, 2, 2))
    (coarse, fine), _ = predictor.tiles.plan(scan.shape, FLAT, scan)
    assert [len(axis.starts) for axis in (*coarse, *fine)] == [1] * 6
    start = [int(axis.starts[0]) for axis in coarse]
    small = np.rint(scan.reshape(SLICES, 16, 2, 16, 2).astype(np.float32).mean((2, 4))).astype(np.int16)
    logits = model.level(1, crop(small, start, (SLICES, 32, 32), AIR)[None, ..., None], None)
    y, x = (slice(-1 - s, 17 - s) for s in start[1:])
    maps = jax.nn.softmax(logits)[:, :, y, x]
    expected = np.asarray(model.level(2, scan[None, ..., None], maps)[0])
    mask = predictor.masks(scan[None], FLAT)[2]
    best = np.sort(expected, axis=-1)
    sure = best[..., -1] - best[..., -2] > 0.02  # the context crosses in half precision
    assert sure.mean() > 0.5
    np.testing.assert_array_equal(mask[sure], expected.argmax(-1)[sure])
