"""Only the box around the body is predicted, and nothing of the body is lost."""

import itertools

import numpy as np
import pytest
from test_predictor import SIGHT, Context, Pointwise, PointwiseRegions, cubed, plan_of, scan, trained_pyramid

from autocontext_jax.data import preparation
from autocontext_jax.data.body import MARGIN, body_box
from autocontext_jax.data.labels import LabelSpec
from autocontext_jax.data.layouts import Case
from autocontext_jax.data.store.level_grids import LevelGrids
from autocontext_jax.images import scans
from autocontext_jax.inference.predictor import Predictor
from autocontext_jax.inference.tiling import PredictorConfig

pytestmark = pytest.mark.usefixtures("compiled_quickly")

AIR = -1000


def in_air(shape, *places) -> np.ndarray:
    """Air with soft tissue in some boxes."""
    image = np.full(shape, AIR, np.int16)
    for place in places:
        image[tuple(slice(*interval) for interval in place)] = 40
    return image


def test_the_box_has_a_margin_and_ends_with_the_scan():
    image = in_air((30, 60, 70), ((0, 20), (10, 40), (30, 65)))
    assert body_box(image) == ((0, 20 + MARGIN), (10 - MARGIN, 40 + MARGIN), (30 - MARGIN, 65 + MARGIN))


def test_lungs_are_inside():
    image = in_air((20, 60, 60), ((0, 20), (10, 50), (10, 50)))
    image[:, 15:45, 15:45] = -850
    assert body_box(image)[1:] == ((10 - MARGIN, 50 + MARGIN),) * 2


def test_two_legs_are_both_kept_and_specks_are_not():
    legs = ((0, 40), (20, 40), (5, 25)), ((0, 40), (20, 40), (40, 58))
    image = in_air((40, 60, 64), *legs, ((3, 4), (1, 2), (1, 3)))
    assert body_box(image) == ((0, 40), (20 - MARGIN, 40 + MARGIN), (5 - MARGIN, 58 + MARGIN))


@pytest.mark.parametrize("size", [128, 129, 300, 512])
def test_a_coarse_search_misses_nothing(size):
    """Every body of a few voxels or more lies in its box, wherever it is."""
    for low, length in itertools.product((0, 1, size // 3, size - 40), (8, 23, 40)):
        image = in_air((3, size, size), ((0, 3), (low, low + length), (5, size - 5)))
        _, (first, last), _ = body_box(image)
        assert first <= low
        assert last >= low + length
        assert last - first <= length + 12 * -(-size // 128)


def test_images_of_other_kinds_are_all_body():
    image = np.zeros((5, 6, 7), np.int16)
    image[2, 3, 4] = 900
    assert body_box(image) == ((0, 5), (0, 6), (0, 7))


def test_air_alone_has_no_body_and_its_mask_is_background(caplog):
    image = np.full((4, 5, 6), AIR, np.int16)
    assert body_box(image) is None
    predictor = Predictor(Pointwise(2), PredictorConfig(), align=(2,) * 3)
    masks = predictor.masks(image[None], cubed(2, 1), levels=(1, 2))
    assert list(masks) == [1, 2]
    assert "nothing in it is above -500 HU" in caplog.text
    for mask in masks.values():
        assert mask.shape == image.shape
        assert mask.dtype == np.uint8
        assert not mask.any()
    mask, maps = predictor.mask_and_maps(image[None], cubed(2, 1))
    assert not mask.any()
    np.testing.assert_array_equal(maps, np.broadcast_to([1, 0, 0], (4, 5, 6, 3)))
    # Without the crop the network is asked, which here calls air the first class too.
    asked = Predictor(Pointwise(2), PredictorConfig(crop_to_body=False), align=(2,) * 3)
    assert asked.tiles.plan(image.shape, cubed(2, 1), image) is not None
    assert not asked.masks(image[None], cubed(2, 1))[2].any()


def body_in_air() -> np.ndarray:
    voxels = np.full((40, 90, 100), AIR, np.int16)
    voxels[PLACE] = np.clip(scan((25, 39, 39)), -400, 600)
    return voxels


PLACE = (slice(8, 33), slice(31, 70), slice(22, 61))
FACTORS = [cubed(1), cubed(2, 1), ((3.0, 2.2, 2.2), (1.5, 1.1, 1.1)), cubed(1, 0.5)]


@pytest.mark.parametrize("factors", FACTORS)
def test_the_crop_changes_no_voxel_of_the_body(factors):
    voxels, levels = body_in_air(), tuple(range(1, len(factors) + 1))
    whole, cropped = (
        Predictor(Pointwise(len(factors)), PredictorConfig(crop_to_body=crop), align=(4,) * 3) for crop in (False, True)
    )
    expected, found = (each.masks(voxels[None], factors, levels=levels) for each in (whole, cropped))
    for level in levels:
        np.testing.assert_array_equal(found[level], expected[level])
        assert {0, 1, 2} == set(np.unique(found[level][PLACE]))
    mask, maps = cropped.mask_and_maps(voxels[None], factors)
    np.testing.assert_array_equal(mask, found[levels[-1]])
    np.testing.assert_allclose(maps.sum(-1), 1, atol=1e-5)
    size = [np.prod([axis.extent for axis in plan_of(each, voxels, factors)[-1]]) for each in (whole, cropped)]
    assert size[1] < 0.5 * size[0]


def test_regions_have_no_map_of_the_background():
    """Beyond the box and in a scan of air all maps are 0."""
    predictor = Predictor(PointwiseRegions(1), PredictorConfig(), align=(4,) * 3)
    voxels = body_in_air()
    mask, maps = predictor.mask_and_maps(voxels[None], cubed(1))
    _, box = predictor.tiles.plan(voxels.shape, cubed(1), voxels)
    beyond = np.ones(voxels.shape, bool)
    beyond[tuple(slice(*interval) for interval in box)] = False
    assert beyond.mean() > 0.5
    np.testing.assert_array_equal(maps[beyond], 0)
    assert not mask[beyond].any()
    assert set(np.unique(mask[PLACE])) == {0, 1, 2, 3}
    mask, maps = predictor.mask_and_maps(np.full((1, 4, 5, 6), AIR, np.int16), cubed(1))
    assert maps.shape == (4, 5, 6, 3)
    assert not maps.any()
    assert not mask.any()


@pytest.mark.parametrize("factors", [cubed(2, 1), cubed(4, 2), ((3.0, 2.2, 2.2), (1.5, 1.1, 1.1))])
def test_the_context_of_a_cropped_box_lies_where_it_belongs(factors):
    voxels = body_in_air()
    expected, found = (
        Predictor(Context(), PredictorConfig(crop_to_body=crop), align=(4,) * 3).masks(voxels[None], factors)[2]
        for crop in (False, True)
    )
    assert {0, 1, 2} == set(np.unique(found[PLACE]))
    assert np.mean(found[PLACE] != expected[PLACE]) < 2e-3  # rounding where maps tie


def test_a_network_sees_the_air_around_the_body_as_before():
    """With a box that is wider than the body by more than the network sees nothing changes, skin or not."""
    voxels = body_in_air()
    model = trained_pyramid(1)
    expected, found = (
        Predictor(model, PredictorConfig(crop_to_body=crop), align=(2,) * 3).masks(voxels[None], cubed(1))[1]
        for crop in (False, True)
    )
    inner = tuple(slice(part.start + SIGHT, part.stop - SIGHT) for part in PLACE)
    assert len(np.unique(found[inner])) > 1
    np.testing.assert_array_equal(found[inner], expected[inner])


def test_vessels_in_a_lung_are_no_body():
    image = in_air(
        (60, 60, 60), *(((z, z + 2), (3, 57), (y, y + 2)) for z in range(5, 50, 12) for y in range(5, 50, 12))
    )
    image[30, 3:5, 5:50] = 40  # they hang together
    image[5:50, 3:5, 5] = 40
    assert body_box(image) == ((0, 60),) * 3


def test_labels_outside_the_body_are_named_once_when_they_are_prepared(tmp_path, caplog):
    """The couch, say: prediction would lose them."""
    for name, row in (("inside", 30), ("outside", 1)):
        image, label = body_in_air(), np.zeros((40, 90, 100), np.uint8)
        label[20, row + 5, 40:45] = 1
        label[20, 1, :] = 2  # nobody labelled these: there is nothing to lose
        files = tuple(tmp_path / f"{name}_{kind}.nii.gz" for kind in ("image", "label"))
        for file, voxels in zip(files, (image, label), strict=True):
            scans.write_scan(file, voxels, (1.0, 1.0, 1.0))
        for _ in range(2):
            preparation.prepare_case(
                Case(name, files[:1], files[1]),
                str(tmp_path),
                LevelGrids((2, 1)),
                LabelSpec.plain(("background", "organ"), ignore=2),
            )
    (line,) = [record.getMessage() for record in caplog.records if "outside the box" in record.getMessage()]
    assert "case outside: 5 labelled voxels" in line
    assert "--config.predict.crop_to_body=False" in line
