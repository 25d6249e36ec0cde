"""Only the box around the body is predicted, and nothing of the body is lost."""

import itertools

import numpy as np
import pytest
from test_predictor import Pointwise, cubed, plan_of, pointwise_maps, scan

from autocontext_jax.inference.body import MARGIN, body_box
from autocontext_jax.inference.predictor import Predictor
from autocontext_jax.inference.tiling import PredictorConfig

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
    predictor = Predictor(Pointwise(2), PredictorConfig(), align=2)
    masks = predictor.masks(image, cubed(2, 1), levels=(1, 2))
    assert list(masks) == [1, 2]
    assert "nothing in it is above -500 HU" in caplog.text
    for mask in masks.values():
        assert mask.shape == image.shape
        assert mask.dtype == np.uint8
        assert not mask.any()
    mask, maps = predictor.mask_and_maps(image, cubed(2, 1))
    assert not mask.any()
    np.testing.assert_array_equal(maps, np.broadcast_to([1, 0, 0], (4, 5, 6, 3)))
    # Without the crop the network is asked, which here calls air the first class too.
    asked = Predictor(Pointwise(2), PredictorConfig(crop_to_body=False), align=2)
    assert asked.tiles.plan(image.shape, cubed(2, 1), image) is not None
    assert not asked.masks(image, cubed(2, 1))[2].any()


@pytest.mark.parametrize("factors", [cubed(1), cubed(2, 1), ((3.0, 2.2, 2.2), (1.5, 1.1, 1.1)), cubed(1, 0.5)])
def test_the_crop_changes_no_voxel_of_the_body(factors):
    voxels = np.full((40, 90, 100), AIR, np.int16)
    place = (slice(8, 33), slice(31, 70), slice(22, 61))
    voxels[place] = np.clip(scan((25, 39, 39)), -400, 600)
    whole, cropped = (
        Predictor(Pointwise(len(factors)), PredictorConfig(crop_to_body=crop), align=4) for crop in (False, True)
    )
    level = len(factors)
    expected, (found, maps) = whole.masks(voxels, factors)[level], cropped.mask_and_maps(voxels, factors)
    np.testing.assert_array_equal(found, expected)
    assert {0, 1, 2} == set(np.unique(found[place]))
    np.testing.assert_allclose(maps.sum(-1), 1, atol=1e-5)
    size = [np.prod([axis.extent for axis in plan_of(each, voxels, factors)[-1]]) for each in (whole, cropped)]
    assert size[1] < 0.5 * size[0]
    if factors == cubed(1):
        np.testing.assert_allclose(maps, np.where(found[..., None] >= 0, pointwise_maps(voxels), 0), atol=2e-3)
