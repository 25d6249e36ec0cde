"""From logits to maps, and regions that overlap in one map."""

import numpy as np
from scipy import special

from autocontext_jax.models.activations import activate, last_region


def test_maps_are_those_of_the_formulas():
    logits = np.random.default_rng(0).normal(0, 3, (2, 3, 4)).astype(np.float32)
    np.testing.assert_allclose(activate(logits, "softmax"), special.softmax(logits.astype(float), axis=-1), rtol=1e-5)
    np.testing.assert_allclose(activate(logits, "sigmoid"), special.expit(logits.astype(float)), rtol=1e-5)


def test_later_regions_overwrite_earlier_ones():
    inside = np.random.default_rng(0).random((5, 6, 7, 4)) < 0.4
    expected = np.zeros(inside.shape[:-1], int)
    for region in range(4):  # as nnU-Net writes them
        expected[inside[..., region]] = region + 1
    found = last_region(inside)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, expected)
    assert set(np.unique(found)) == {0, 1, 2, 3, 4}


def test_the_last_of_very_many_regions():
    inside = np.zeros((2, 255), bool)
    inside[1, [3, 254]] = True
    np.testing.assert_array_equal(last_region(inside), [0, 255])
