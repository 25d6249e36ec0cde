"""One physical point has one value: in the store, in both levels' crops, through the context and the augmentation.

Every scan here is a linear ramp in mm with another slope along each axis, so a value tells its place, and a level or a
context that lies half a voxel off along any axis is off by more than the tolerance. Where a voxel lies in mm is taken
from the store's own OME-Zarr metadata, not from `geometry`.
"""

import itertools
import json
import math
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from autocontext_jax import geometry
from autocontext_jax.data import preparation
from autocontext_jax.data.augment import make_augment
from autocontext_jax.data.augmentation_ranges import IntensityRanges, SpatialRanges, crop_margins
from autocontext_jax.data.datasets import Case
from autocontext_jax.data.labels import LabelSpec
from autocontext_jax.data.loader import Loader, LoaderConfig, read_batch
from autocontext_jax.data.store.level_grids import LevelGrids
from autocontext_jax.data.store.reader import PreparedCase
from autocontext_jax.geometry import cube
from autocontext_jax.images import scans
from autocontext_jax.models.pyramid import context_of
from autocontext_jax.models.resizing import upsample_by_two

pytestmark = pytest.mark.usefixtures("compiled_quickly")

SIZE, SPACING = (61, 70, 67), (2.5, 0.8, 0.7)  # no size is a multiple of 2
SLOPE = np.array([11.0, 23.0, -31.0])  # HU / mm along z, y, x
EDGE = 8
SETTINGS = {
    "factors 4, 2": LevelGrids((4, 2)),
    "factors 2, 1": LevelGrids((2, 1)),
    "factors 4, 2, 1": LevelGrids((4, 2, 1)),
    # Native voxels per finest voxel: 0.64 (the scan is coarser), 2.5 and 2.
    "finest spacing": LevelGrids((4, 2), "mm", (1.6, 2.0, 1.4)),
}


class Level(NamedTuple):
    """Where a level lies: mm from the first native voxel's centre is first + spacing * voxel, (z, y, x)."""

    spacing: np.ndarray
    first: np.ndarray
    inside: tuple[np.ndarray, ...]  # for each axis, which voxels lie in the scan whole
    tolerance: float  # HU

    def places(self, start, size) -> np.ndarray:
        """[3, *size] mm of a crop's voxels."""
        voxels = np.moveaxis(np.indices(size), 0, -1) + np.array(start)
        return np.moveaxis(self.first + self.spacing * voxels, -1, 0)

    def whole(self, start, size) -> np.ndarray:
        """Bool [*size]: which voxels of a crop lie in the scan whole."""
        masks = []
        for inside, first, count in zip(self.inside, start, size, strict=True):
            voxels = np.arange(first, first + count)
            masks.append((voxels >= 0) & (voxels < len(inside)) & inside[np.clip(voxels, 0, len(inside) - 1)])
        return masks[0][:, None, None] & masks[1][:, None] & masks[2]


def ramp(places: np.ndarray) -> np.ndarray:
    """HU at [3, ...] mm."""
    middle = np.array(SPACING) * (np.array(SIZE) - 1) / 2
    return np.tensordot(SLOPE, places, 1) - SLOPE @ middle


@pytest.fixture(scope="module", params=SETTINGS)
def prepared(request, tmp_path_factory) -> tuple[PreparedCase, list[Level]]:
    """The ramp scan through files and store; its label is a small box in the middle."""
    folder: Path = tmp_path_factory.mktemp("ramp")
    voxels = np.rint(ramp(np.indices(SIZE) * np.array(SPACING)[:, None, None, None])).astype(np.int16)
    label = np.zeros(SIZE, np.uint8)
    label[28:33, 32:38, 30:36] = 1
    case = Case("ramp", (folder / "ramp.nii.gz",), folder / "ramp_label.nii.gz")
    scans.write_scan(case.images[0], voxels, SPACING)
    scans.write_scan(case.label, label, SPACING)
    root = str(folder / "store")
    preparation.prepare_case(case, root, SETTINGS[request.param], LabelSpec.plain(("background", "organ")))

    ome = json.loads((folder / "store" / "ramp.ome.zarr" / "zarr.json").read_bytes())["attributes"]["ome"]
    levels = {}
    for dataset in ome["multiscales"][0]["datasets"]:
        scale, translation = dataset["coordinateTransformations"]
        levels[dataset["path"]] = describe(np.array(scale["scale"][-3:]), np.array(translation["translation"][-3:]))
    opened = PreparedCase.open(root, "ramp")
    return opened, [levels[f"level_{level}"] for level in range(1, len(opened.shapes) + 1)]


def describe(spacing: np.ndarray, first: np.ndarray) -> Level:
    tolerance, inside = 1.01, []  # two roundings to int16: of the scan, of the level
    for axis in range(3):
        factor = spacing[axis] / SPACING[axis]
        count = math.ceil(SIZE[axis] / factor - 1e-3)
        centre = (first[axis] + spacing[axis] * np.arange(count)) / SPACING[axis]
        reach = max(factor, 1) / 2 if factor >= 1 else 0  # an average needs its area, an interpolation its centre
        limit = 0.5 if factor >= 1 else 0
        inside.append((centre - reach > -limit - 1e-3) & (centre + reach < SIZE[axis] - 1 + limit + 1e-3))
        if factor >= 1 and abs(factor - round(factor)) > 1e-3:
            # Mean over an area of a ramp that is constant within a native voxel.
            tolerance += abs(SLOPE[axis]) * SPACING[axis] / (8 * factor)
    return Level(spacing, first, tuple(inside), tolerance)


def half_voxel(level: Level) -> float:
    """The smallest change of the ramp over half a voxel of a level along one axis, HU."""
    return float(np.abs(SLOPE * level.spacing).min() / 2)


def over_next_patch(maps: np.ndarray) -> np.ndarray:
    """The model's own way of a level's map [N, N, N] in (0, 1) to the next level's patch: context_of and upsample."""
    logits = jnp.stack([jnp.log(1 - maps), jnp.log(maps)], axis=-1)[None].astype(jnp.float32)
    return np.array(upsample_by_two(context_of(logits)))[0, ..., 1]


def context_hu(values: np.ndarray) -> np.ndarray:
    """`over_next_patch` of a ramp in HU."""
    return (over_next_patch(0.5 + values / 10_000) - 0.5) * 10_000


def centres_of(case: PreparedCase) -> list[geometry.Triple]:
    z, y, x = case.shapes[-1]
    # The middle, both parities of each axis, the corners and beyond.
    return [
        (z // 2, y // 2, x // 2),
        (z // 2 + 1, y // 2 - 1, x // 3),
        (0, 0, 0),
        (z - 1, y - 1, x - 1),
        (3, y + 2, -2),
    ]


def test_levels_differ_by_two_and_share_their_corner(prepared):
    case, levels = prepared
    for coarse, fine in itertools.pairwise(levels):
        np.testing.assert_allclose(coarse.spacing, 2 * fine.spacing, rtol=1e-5)
        np.testing.assert_allclose(coarse.first - coarse.spacing / 2, fine.first - fine.spacing / 2, atol=1e-4)
        assert coarse.tolerance + fine.tolerance < 0.8 * half_voxel(fine)  # else no test here could tell
    np.testing.assert_allclose(levels[-1].spacing, case.spacing, rtol=1e-6)
    assert case.shapes == tuple(tuple(len(along) for along in level.inside) for level in levels)


@pytest.mark.parametrize("margin", [(0, 0, 0), (3, 1, 2)])
def test_crops_and_context_agree_at_the_same_millimetre(prepared, margin):
    case, levels = prepared
    margins = (margin,) + (tuple(2 * m for m in margin),) * (len(levels) - 1)
    centres = centres_of(case)
    batch = read_batch([(case, centre, margins) for centre in centres], cube(EDGE, len(levels)), margins)
    np.testing.assert_allclose(batch["spacing"], [levels[-1].spacing] * len(centres), rtol=1e-6)
    compared = 0
    for sample, centre in enumerate(centres):
        starts = cube(EDGE, len(levels)).starts(centre)
        patches = []
        for level, start, own, image in zip(levels, starts, margins, batch["images"], strict=True):
            # A level's crop has the ramp's value at each voxel's mm.
            first = np.array(start) - own
            whole = level.whole(first, image.shape[2:])
            difference = image[sample, 0] - ramp(level.places(first, image.shape[2:]))
            assert np.abs(difference[whole]).max(initial=0) <= level.tolerance
            patch = tuple(slice(m, m + EDGE) for m in own)
            patches.append((level, start, image[sample, 0][patch].astype(np.float64), whole[patch]))

        for (coarse, _, image, whole), (fine, start, finer, finer_whole) in itertools.pairwise(patches):
            # The context laid over the next level's patch: against the mm and against that level's own crop.
            context = context_hu(image)
            known = over_next_patch(np.where(whole, 0.75, 0.25)) > 0.7499
            difference = context - ramp(fine.places(start, finer.shape))
            assert np.abs(difference[known]).max(initial=0) <= coarse.tolerance + 0.05
            both = known & finer_whole
            assert np.abs(context - finer)[both].max(initial=0) <= coarse.tolerance + fine.tolerance + 0.05
            compared += both.sum()
    assert compared > EDGE**3  # the middle one at least


def test_the_label_lies_where_its_image_does(prepared):
    case, levels = prepared
    starts = cube(EDGE, len(levels)).starts(centres_of(case)[0])
    centroids = []
    for level, (start, where) in enumerate(zip(starts, levels, strict=True), start=1):
        _, label = case.read(level, (0, 0, 0), case.shapes[level - 1]).result()
        places = where.places((0, 0, 0), label.shape)
        centroids.append(places[:, label == 1].mean(axis=1))
        _, crop = case.read(level, start, (EDGE,) * 3).result()
        np.testing.assert_array_equal(
            crop, label[tuple(slice(first, first + EDGE) for first in start)], err_msg=f"level {level}"
        )
    # The box's centre is known, whatever the levels make of its edges.
    middle = np.array([30, 34.5, 32.5]) * SPACING
    for level, centroid in zip(levels, centroids, strict=True):
        assert (np.abs(centroid - middle) <= 0.5 * level.spacing + 1e-6).all()


def feed_differences(case: PreparedCase, levels: list[Level], spatial: SpatialRanges | None) -> list[np.ndarray]:
    """Context less image, HU, at each level after the first of a batch."""
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    patch = cube(EDGE, len(levels))
    loader = Loader([case], LoaderConfig(3, (EDGE,)), patch, seed=1, sharding=sharding, spatial=spatial)
    images, _, _ = next(loader)
    loader.close()
    images = [np.array(image[..., 0], np.float64) for image in images]
    return [np.stack([context_hu(before) for before in coarse]) - fine for coarse, fine in itertools.pairwise(images)]


def test_the_feed_keeps_levels_together(prepared):
    case, levels = prepared
    for coarse, fine, difference in zip(levels, levels[1:], feed_differences(case, levels, None), strict=False):
        assert np.abs(difference).max() <= coarse.tolerance + fine.tolerance + 0.05


@pytest.mark.parametrize("prepared", ["finest spacing"], indirect=True)
def test_the_augmented_feed_keeps_levels_together(prepared):
    case, levels = prepared
    [difference] = feed_differences(case, levels, SpatialRanges(5, 1, 0.5, 16))
    bend = 0.15 * half_voxel(levels[1])  # the context is linear between the coarse voxels, an elastic field is not
    assert np.abs(difference).max() <= levels[0].tolerance + levels[1].tolerance + bend


# --- The augmentation alone: crops that hold their own place, one sample for each axis -----------------------------

FINEST = (2.5, 0.8, 0.7)  # mm
GAIN = 200  # HU / mm


def moved_places(
    spatial: SpatialRanges | None, levels: int, edge: int, fields: int
) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
    """Where voxels of each level lie [3, N, N, N] and were read [fields, 3, N, N, N], both mm about the patch's centre.

    Last come the labels [fields, 3, N, N, N]; they were 1 at places > 0.
    """
    margins = crop_margins(cube(edge, levels), FINEST, spatial)
    run = make_augment(cube(edge, levels), margins, spatial, IntensityRanges())
    places, images, labels = [], [], []
    for level, margin in enumerate(margins, start=1):
        axes = []
        for mm, m in zip(FINEST, margin, strict=True):
            voxels = np.arange(edge + 2 * m) - (edge - 1) / 2 - m
            axes.append(voxels * mm * 2 ** (levels - level))
        crops = np.stack(np.meshgrid(*axes, indexing="ij"))
        places.append(crops[(slice(None), *(slice(m, m + edge) for m in margin))])
        images.append(np.rint(np.tile(crops, (fields, 1, 1, 1)) * GAIN).astype(np.int16)[:, None])
        labels.append((np.tile(crops, (fields, 1, 1, 1)) > 0).astype(np.uint8))
    # The same number for the samples of all three axes: the same field.
    numbers, spacing = np.repeat(np.arange(fields, dtype=np.uint32), 3), np.array([FINEST] * 3 * fields, np.float32)
    image_out, label_out = run(jax.random.key(3), numbers, spacing, tuple(images), tuple(labels))
    shape = (fields, 3, edge, edge, edge)
    read = [np.array(image, np.float64).reshape(shape) / GAIN for image in image_out]
    return places, read, [np.array(label).reshape(shape) for label in label_out]


def test_without_augmentation_nothing_moves():
    places, [read], _ = moved_places(None, 1, 8, 1)
    np.testing.assert_allclose(read[0], places[0], atol=0.51 / GAIN)


def test_a_translation_moves_all_levels_by_the_same_mm():
    levels = 2
    places, read, _ = moved_places(SpatialRanges(rotation=0, translation=4, elastic_sigma=0), levels, 8, 6)
    means = []
    for place, moved in zip(places, read, strict=True):
        shifts = (moved - place).mean(axis=(2, 3, 4), keepdims=True)
        assert np.abs(moved - place - shifts).max() < 1.01 / GAIN
        means.append(shifts[..., 0, 0, 0])
    np.testing.assert_allclose(means, np.broadcast_to(means[-1], (levels, 6, 3)), atol=1.01 / GAIN)
    assert (np.abs(means[-1]) <= 4 * np.array(FINEST) + 0.01).all()
    assert (np.ptp(means[-1], axis=0) > np.array(FINEST)).all()


def test_a_rotation_is_rigid_in_mm_about_the_common_centre():
    levels = 2
    places, read, _ = moved_places(SpatialRanges(rotation=10, translation=0, elastic_sigma=0), levels, 8, 1)
    matrices = []
    for place, moved in zip(places, read, strict=True):
        columns = np.concatenate([place.reshape(3, -1), np.ones((1, place[0].size))])
        fit, *_ = np.linalg.lstsq(columns.T, moved[0].reshape(3, -1).T)
        np.testing.assert_allclose(fit[3], 0, atol=0.01)  # the centre stays
        np.testing.assert_allclose(fit[:3].T @ fit[:3], np.eye(3), atol=2e-3)
        matrices.append(fit[:3])
    np.testing.assert_allclose(matrices, np.broadcast_to(matrices[-1], (levels, 3, 3)), atol=2e-3)
    assert np.abs(matrices[-1] - np.eye(3)).max() > 0.02


def test_the_full_field_is_one_field():
    levels, edge, fields = 3, 16, 3
    ranges = SpatialRanges(rotation=10, translation=4, elastic_sigma=4, elastic_spacing=32)
    places, read, labels = moved_places(ranges, levels, edge, fields)
    for place, moved in zip(places, read, strict=True):
        assert (np.abs(moved - place).max(axis=(1, 2, 3, 4)) > 0.5).all()
    for coarse, fine in itertools.pairwise(read):
        inner = slice(edge // 4, 3 * edge // 4)
        blocks = fine.reshape(fields, 3, edge // 2, 2, edge // 2, 2, edge // 2, 2).mean(axis=(3, 5, 7))
        # mm; the field bends a little within a block.
        off = np.abs(blocks - coarse[:, :, inner, inner, inner]).max(axis=(0, 2, 3, 4))
        assert (off < 0.06 * np.array(FINEST)).all(), off
    for level, (moved, label) in enumerate(zip(read, labels, strict=True), start=1):
        voxel = np.array(FINEST)[:, None, None, None] * 2 ** (levels - level)
        sure = np.abs(moved) > 0.51 * voxel
        np.testing.assert_array_equal(label[sure], (moved > 0)[sure])
