"""Scans of thick slices: which axes are halved, and that levels, networks, augmentation and predictor agree on it."""

import itertools
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_predictor import unseen_border

import autocontext_jax as ac
from autocontext_jax import geometry
from autocontext_jax.data import augment
from autocontext_jax.data.augmentation_ranges import IntensityRanges, SpatialRanges, crop_margins
from autocontext_jax.data.phantom.dataset import write_dataset
from autocontext_jax.data.store.level_grids import LevelGrids
from autocontext_jax.errors import UserError
from autocontext_jax.files import write_json
from autocontext_jax.geometry import PyramidPatch, halvings
from autocontext_jax.images import scans
from autocontext_jax.inference.predictor import Predictor
from autocontext_jax.inference.tiling import PredictorConfig, tile_shape
from autocontext_jax.jobs.config_files import default_config, from_config_dict, read_config, write_config
from autocontext_jax.jobs.evaluate import evaluate
from autocontext_jax.jobs.prepare import prepare
from autocontext_jax.jobs.run import Paths, run
from autocontext_jax.jobs.train import train
from autocontext_jax.models.blocks import NetworkConfig
from autocontext_jax.models.pyramid import Pyramid, PyramidConfig, divisor, make_pyramid
from autocontext_jax.models.unet import UNet
from autocontext_jax.training.state import inference_model

pytestmark = pytest.mark.usefixtures("compiled_once", "prepared_here")

THICK = (5.0, 0.8, 0.8)
SPACINGS = [THICK, (1.0, 1.0, 1.0), (0.7, 3.0, 0.7), (2.0, 1.0, 1.0), (3.0, 1.0, 1.9), (8.0, 2.5, 1.0)]


def test_thick_slices_are_halved_last():
    assert halvings(THICK, 4) == ((1, 2, 2), (1, 2, 2), (2, 2, 2), (2, 2, 2))
    assert halvings((2.0, 1.0, 1.0), 2) == ((1, 2, 2), (2, 2, 2))  # twice is not less than twice
    assert halvings((1.9999999, 1.0, 1.0), 1) == ((1, 2, 2),)  # as a header rounds it
    assert halvings(geometry.SLICE_BY_SLICE, 3) == ((1, 2, 2),) * 3
    assert halvings(THICK, 0) == ()


@pytest.mark.parametrize("spacing", SPACINGS)
def test_networks_pool_and_convolve_as_nnunets(spacing):
    planner = pytest.importorskip("nnunetv2.experiment_planning.experiment_planners.network_topology")
    depth = 5
    _, pools, kernels, _, _ = planner.get_pool_and_conv_props(spacing, (512, 512, 512), 4, 99)
    network = NetworkConfig(depth=depth, spacing=spacing)
    assert list(map(tuple, pools[1:depth])) == list(network.steps)
    assert list(map(tuple, kernels[:depth])) == list(network.kernels)


def test_grids_in_mm():
    grids = LevelGrids((4, 2, 1), "mm").with_spacing(THICK)
    assert grids.finest_spacing == THICK
    assert grids.level_factors(THICK) == ((1, 4, 4), (1, 2, 2), (1, 1, 1))
    assert grids.level_factors((10.0, 0.8, 1.6)) == ((0.5, 4, 2), (0.5, 2, 1), (0.5, 1, 0.5))
    # A finest level that is coarser than the scans halves the same axes.
    assert LevelGrids((16, 8), "mm").with_spacing(THICK).finest_spacing == pytest.approx((10, 6.4, 6.4))
    assert LevelGrids((6, 3), "mm").with_spacing(THICK).finest_spacing == pytest.approx((5, 2.4, 2.4))
    assert LevelGrids((1, 0.5), "mm").with_spacing(THICK).finest_spacing == pytest.approx((5, 0.4, 0.4))
    cubes = LevelGrids((4, 2), "mm", anisotropic=False).with_spacing(THICK)
    assert cubes.finest_spacing == (10, 1.6, 1.6)
    assert cubes.level_factors(THICK) == ((4, 4, 4), (2, 2, 2))
    assert LevelGrids((4, 2)).level_factors(THICK) == ((4, 4, 4), (2, 2, 2))  # of each scan's own voxels


def test_some_levels_are_those_of_all():
    grids = LevelGrids((8, 4, 2, 1), "mm").with_spacing(THICK)
    factors = grids.level_factors(THICK)
    for levels in ((1,), (2,), (1, 2), (2, 3, 4)):
        some = grids.only(levels)
        np.testing.assert_allclose(some.level_factors(THICK), [factors[level - 1] for level in levels])
        own = PyramidConfig(levels=len(levels), spacing=some.relative_spacing)
        whole = PyramidConfig(levels=4, spacing=grids.relative_spacing)
        for number, level in enumerate(levels, start=1):
            assert own.spacings[number - 1] == pytest.approx(whole.spacings[level - 1])


@pytest.mark.parametrize("spacing", SPACINGS)
def test_patches_share_their_centre(spacing):
    patch = PyramidPatch((12, 16, 20), 4, spacing)
    rng = np.random.default_rng(0)
    for centre in rng.integers(-40, 200, (50, 3)).tolist():
        starts = patch.starts(tuple(centre))
        middles = [
            (np.array(start) + np.array(patch.shape) / 2) * scale
            for start, scale in zip(starts, patch.scales, strict=True)
        ]
        for middle in middles:
            np.testing.assert_array_equal(middle, middles[-1])
        assert (np.abs(middles[-1] - centre - 0.5) <= np.array(patch.scales[0]) / 2).all()
        for start, finer, step in zip(starts, starts[1:], geometry.level_steps(spacing, 4)[1:], strict=False):
            assert finer == geometry.next_level_start(start, patch.shape, step)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_moved_levels_stay_together_within_their_margins(spacing):
    """Crops hold their own place along each axis in mm; a level's result is the mean of the next one's."""
    ranges = SpatialRanges(rotation=8, translation=3, elastic_sigma=1, elastic_spacing=20)
    patch = PyramidPatch((8, 16, 16), 2, spacing)
    margins = crop_margins(patch, spacing, ranges)
    run_augment = augment.make_augment(patch, margins, ranges, IntensityRanges())
    images = []
    for scale, margin in zip(patch.scales, margins, strict=True):
        places = [
            (np.arange(size + 2 * m) - (size - 1) / 2 - m) * step * mm
            for size, m, step, mm in zip(patch.shape, margin, scale, spacing, strict=True)
        ]
        images.append(np.stack(np.meshgrid(*places, indexing="ij")).astype(np.float32)[:, None])
    labels = tuple(np.zeros(image[:, 0].shape, np.uint8) for image in images)
    numbers, mm = np.full(3, 7, np.uint32), np.array([spacing] * 3, np.float32)
    moved, _ = run_augment(jax.random.key(0), numbers, mm, tuple(images), labels)
    coarse, fine = (np.asarray(image[..., 0]) for image in moved)
    step = geometry.level_steps(spacing, 2)[1]
    inner = tuple(
        slice(n // 4, 3 * n // 4) if by == 2 else slice(None) for n, by in zip(patch.shape, step, strict=True)
    )
    halved = [n // by for n, by in zip(patch.shape, step, strict=True)]
    blocks = fine.reshape(3, *(part for n, by in zip(halved, step, strict=True) for part in (n, by)))
    # The field bends a little within a coarse voxel; a level at another place would be off by half a voxel and more.
    np.testing.assert_allclose(coarse[(slice(None), *inner)], blocks.mean((2, 4, 6)), atol=0.1 * min(spacing))
    own = images[1][:, 0][(slice(None), *(slice(m, m + n) for m, n in zip(margins[1], patch.shape, strict=True)))]
    shift = np.abs(fine - own).max((1, 2, 3))
    assert (shift > 0.3 * min(spacing)).all()
    # In mm the slices move no further than the voxels of the other axes.
    assert shift.max() < (3 + 1.5) * min(spacing) + np.linalg.norm(np.multiply(patch.shape, spacing)) * 0.5 * 0.25


def trained_pyramid(spacing: geometry.Spacing, levels: int = 2, depth: int = 2) -> Pyramid:
    """With running averages that differ from channel to channel."""
    config = PyramidConfig(levels=levels, classes=3, spacing=spacing)
    model = make_pyramid(UNet, NetworkConfig(base_channels=2, depth=depth), config, seed=0)
    graph, params, statistics = nnx.split(model, nnx.Param, ...)
    rng = np.random.default_rng(0)
    statistics = jax.tree.map(lambda leaf: jnp.asarray(rng.uniform(0.05, 0.3, leaf.shape), leaf.dtype), statistics)
    return inference_model(graph, params, statistics)


@pytest.mark.parametrize(
    ("spacing", "divided"),
    [
        (THICK, [PredictorConfig(tile=(48, 64, 56), margin=24), PredictorConfig(margin=24, memory=0.001)]),
        ((1.0, 4.0, 1.0), [PredictorConfig(margin=24, memory=0.001)]),
    ],
)
def test_tiles_and_boxes_predict_what_one_tile_does(spacing, divided):
    """Beyond the field of view of the networks nothing depends on how a scan is divided."""
    model = trained_pyramid(spacing)
    pyramid, network = model.config, NetworkConfig(base_channels=2, depth=2)
    align = divisor(network, pyramid)
    factors = PyramidPatch((1, 1, 1), 2, spacing).scales
    scan = np.random.default_rng(1).normal(0, 300, (14, 70, 60)).astype(np.int16)
    found = []
    for config in (PredictorConfig(margin=24), *divided):
        predictor = Predictor(model, config, align=align, blend=lambda size: unseen_border(size, 12))
        found.append(predictor.mask_and_maps(scan[None], factors)[1])
        tiles, _ = predictor.tiles.plan(scan.shape, factors, scan)
        for axes in tiles:
            for axis, unit in zip(axes, align, strict=True):
                assert all(start % unit == 0 for start in axis.starts)
    assert found[0].std() > 0.01
    for maps in found[1:]:
        # Maps pass from level to level in half precision, which these networks amplify.
        assert np.abs(maps - found[0]).max() < 0.05
        assert np.abs(maps - found[0]).mean() < 2e-4


def test_where_nothing_halves_an_axis_a_tile_may_have_any_size_along_it():
    """These kernels are flat too, so that every number of planes gives the same."""
    spacing = (10.0, 1.0, 1.0)
    model = trained_pyramid(spacing)
    scan = np.random.default_rng(1).normal(0, 300, (7, 20, 36)).astype(np.int16)
    found = []
    for planes in (1, 3, 4):
        predictor = Predictor(
            model, PredictorConfig((planes, 16, 24)), align=divisor(NetworkConfig(depth=2), model.config)
        )
        factors = PyramidPatch((1, 1, 1), 2, spacing).scales
        found.append(predictor.mask_and_maps(scan[None], factors)[1])
        tiles, _ = predictor.tiles.plan(scan.shape, factors, scan)
        assert [tile_shape(axes) for axes in tiles] == [(planes, 16, 24)] * 2
    assert found[0].std() > 0.01
    for maps in found[1:]:
        # As above, maps pass on in half precision.
        assert np.abs(maps - found[0]).max() < 0.05
        assert np.abs(maps - found[0]).mean() < 2e-4


def test_the_first_kernels_are_flat():
    config = PyramidConfig(levels=2, classes=3, spacing=THICK)
    model = make_pyramid(UNet, NetworkConfig(base_channels=2, depth=3), config, seed=0)
    shapes = [[kernel.layer.kernel.shape[1:4] for kernel, _ in network.analysis] for network in model.networks]
    assert shapes == [[(1, 3, 3), (3, 3, 3), (3, 3, 3)], [(1, 3, 3), (1, 3, 3), (3, 3, 3)]]
    assert [network.synthesis[0][0].layer.kernel.shape[:3] for network in model.networks] == [(2, 2, 2), (1, 2, 2)]
    assert divisor(NetworkConfig(depth=4), config) == (4, 8, 8)


# ---- the whole job


def config_of(root: Path, **changes):
    config = default_config()
    config.data.root, config.data.window = str(root), (-500.0, 500.0)
    config.levels.factors = (2, 1)
    config.loader.patch_size, config.loader.batch_size = (4, 8, 8), 2
    config.model.base_channels, config.model.depth = 2, 2
    config.train.steps = config.train.checkpoint_every = 4
    config.train.validation_patches = 2
    config.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
    return from_config_dict(config)


@pytest.fixture(scope="module")
def thick_set(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("thick")
    write_dataset(root, training=3, test=1, size=(12, 32, 32), spacing=(15.0, 5.0, 5.0), seed=0)
    return root


def test_thick_phantoms_train_evaluate_predict_and_export(thick_set, tmp_path):
    config = config_of(thick_set, predict__tile=(2, 16, 12))
    data = prepare(config, tmp_path)
    assert train(config, tmp_path, data)
    assert evaluate(config, tmp_path)
    (scan,) = (thick_set / "imagesTs").glob("*.nii.gz")
    (mask,) = (tmp_path / "predictions").glob("*.nii.gz")
    assert run("export", config, Paths(tmp_path, target=tmp_path / "thick.autocontext"))
    model = ac.load(tmp_path / "thick.autocontext")
    grid = scans.read_grid(scan)
    expected = scans.read_label(mask, values=range(256), like=grid, case="mask")
    model.predict(scan, output=tmp_path / "mask.nii.gz", progress=False)
    found = scans.read_label(tmp_path / "mask.nii.gz", values=range(256), like=grid, case="mask")
    np.testing.assert_array_equal(found, expected)
    assert model.description.levels.relative_spacing == (15, 5, 5)
    assert model.description.tiling.tile == (2, 16, 12)


@pytest.mark.parametrize(
    ("key", "size", "nearest"),
    [
        ("loader.patch_size", (4, 8, 10), (4, 8, 8)),
        ("loader.patch_size", (3, 8, 8), (2, 8, 8)),
        ("predict.tile", (2, 16, 30), (2, 16, 28)),
        ("predict.tile", (1, 16, 16), (2, 16, 16)),
    ],
)
def test_a_size_that_cannot_be_halved_is_refused_when_the_scans_are_known(thick_set, tmp_path, key, size, nearest):
    with pytest.raises(UserError) as refusal:
        prepare(config_of(thick_set, **{key.replace(".", "__"): size}), tmp_path)
    assert f"config key {key} is {size}; expected multiples of (2, 4, 4) along (z, y, x)" in str(refusal.value)
    assert str(refusal.value).endswith(f"choose {nearest}")


def test_run_folders_of_before_are_read(tmp_path):
    """They have cubes of one number, and halved all axes."""
    config = default_config()
    write_config(from_config_dict(config), tmp_path)
    saved = json.loads((tmp_path / "config.json").read_bytes())
    del saved["checksum"], saved["config"]["levels"]["anisotropic"]
    saved["config"]["loader"]["patch_size"], saved["config"]["predict"]["tile"] = 32, 40
    write_json(tmp_path / "config.json", saved)
    for spacing, anisotropic in (((2.5, 1.3, 1.3), True), (THICK, False)):
        write_json(tmp_path / "fingerprint.json", {"format": 1, "spacing": spacing})
        read = read_config(tmp_path)
        assert (read.patch_shape, read.predict.tile) == ((32, 32, 32), (40,))
        assert read.levels.anisotropic is anisotropic


def test_scales_of_an_axis_that_is_not_seen():
    patch = PyramidPatch((1, 16, 16), 3, geometry.SLICE_BY_SLICE)
    assert patch.scales == ((1, 4, 4), (1, 2, 2), (1, 1, 1))
    assert patch.thickness == (math.inf, 1, 1)
    assert all(margin[0] == 0 for margin in crop_margins(patch, (1, 1, 1), SpatialRanges()))
    assert [a == b for a, b in itertools.pairwise(start[0] for start in patch.starts((7, 3, 9)))] == [True, True]
