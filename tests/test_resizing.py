"""Pooling and upsampling against independent references."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from autocontext_jax.models.resizing import max_pool, upsample_by_two


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def assert_close(value, expected, relative=1e-5):
    value, expected = np.asarray(value), np.asarray(expected)
    assert value.shape == expected.shape
    assert np.abs(value - expected).max() <= relative * np.abs(expected).max()


def test_max_pool_equals_reduce_window():
    x = normal(0, 2, 4, 6, 8, 3)
    expected = lax.reduce_window(x, -np.inf, lax.max, (1, 2, 2, 2, 1), (1, 2, 2, 2, 1), "VALID")
    np.testing.assert_array_equal(max_pool(x), expected)


def test_max_pools_gradient_goes_to_the_first_largest_voxel():
    x = np.zeros((1, 2, 2, 4, 1), np.float32)  # two blocks beside each other
    x[0, 0, 1, 0] = x[0, 1, 1, 1] = 3.0  # a tie in the first; the second is all equal
    gradient = jax.vjp(max_pool, x)[1](np.array([5.0, 7.0], np.float32).reshape(1, 1, 1, 2, 1))[0]
    expected = np.zeros_like(x)
    expected[0, 0, 1, 0], expected[0, 0, 0, 2] = 5.0, 7.0
    np.testing.assert_array_equal(gradient, expected)


def test_max_pools_gradient_equals_reduce_windows_without_ties():
    x, cotangent = normal(0, 2, 4, 6, 8, 3), normal(1, 2, 2, 3, 4, 3)

    def window(x):
        return lax.reduce_window(x, -np.inf, lax.max, (1, 2, 2, 2, 1), (1, 2, 2, 2, 1), "VALID")

    expected = jax.vjp(window, x)[1](cotangent)[0]
    np.testing.assert_array_equal(jax.vjp(max_pool, x)[1](cotangent)[0], expected)


def test_upsampling_keeps_a_linear_ramp():
    n = 4
    coarse = np.arange(-1, n + 1) + 0.5  # centres in coarse voxels, with the halo
    fine = (np.arange(2 * n) + 0.5) / 2
    slopes = (1.0, -2.0, 0.5)
    ramp, expected = (
        sum(a * g for a, g in zip(slopes, np.meshgrid(c, c, c, indexing="ij"), strict=True)) for c in (coarse, fine)
    )
    value = upsample_by_two(jnp.asarray(ramp, jnp.float32)[None, ..., None])
    np.testing.assert_array_equal(value[0, ..., 0], expected)  # quarters are exact in binary


def test_upsampling_equals_jaxs_resize_in_the_interior():
    x = normal(0, 2, 5, 7, 6, 3)
    resized = jax.image.resize(x, (2, 10, 14, 12, 3), "linear")
    assert_close(upsample_by_two(x), resized[:, 2:-2, 2:-2, 2:-2], 1e-6)
