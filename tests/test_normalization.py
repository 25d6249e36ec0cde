"""Batch normalisation with its ReLU and their gradient, against Flax's."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from autocontext_jax.models.normalization import EPSILON, BatchNormReLU, batch_norm_relu


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def assert_close(value, expected, relative=1e-5):
    value, expected = np.asarray(value), np.asarray(expected)
    assert value.shape == expected.shape
    assert np.abs(value - expected).max() <= relative * np.abs(expected).max()


def test_batch_norm_relu_equals_flaxs_with_its_gradients():
    x, cotangent = 3 + 2 * normal(0, 2, 3, 4, 5, 6), normal(1, 2, 3, 4, 5, 6)
    scale, bias = normal(2, 6), normal(3, 6)
    flax = nnx.BatchNorm(6, use_running_average=False, epsilon=EPSILON, momentum=0.9, rngs=nnx.Rngs(0))
    ours = BatchNormReLU(6, momentum=0.9)
    graph, statistics = nnx.split(flax, nnx.BatchStat, ...)[:2]

    def reference(x, scale, bias):
        model = nnx.merge(graph, statistics, nnx.State({"scale": nnx.Param(scale), "bias": nnx.Param(bias)}), copy=True)
        return jax.nn.relu(model(x))

    expected, expected_pullback = jax.vjp(reference, x, scale, bias)
    value, pullback = jax.vjp(lambda *arguments: batch_norm_relu(*arguments)[0], x, scale, bias)
    assert_close(value, expected)
    for gradient, expected_gradient in zip(pullback(cotangent), expected_pullback(cotangent), strict=True):
        assert_close(gradient, expected_gradient)
    flax(x)
    ours(jnp.asarray(x))
    assert_close(ours.mean[...], flax.mean[...])
    assert_close(ours.var[...], flax.var[...])


def test_batch_norm_relu_of_a_constant_channel_is_finite():
    """Rounding could make the variance negative."""
    x = np.full((1, 4, 4, 4, 2), 1000.1, np.float32)
    value, pullback = jax.vjp(lambda x: batch_norm_relu(x, np.ones(2), np.ones(2))[0], x)
    assert np.isfinite(value).all()
    assert np.isfinite(pullback(jnp.ones_like(value))[0]).all()
