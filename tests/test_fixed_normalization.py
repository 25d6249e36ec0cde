"""Convolutions with fixed normalisation and ReLU in one operation: the values and gradients of the separate ones."""

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from random_models import with_random_weights

from autocontext_jax.models import convolution as convolution_module
from autocontext_jax.models.blocks import NetworkConfig
from autocontext_jax.models.convolution import direct_convolution
from autocontext_jax.models.fixed_normalization import convolution_relu, deconvolution_relu
from autocontext_jax.models.unet import UNet

pytestmark = pytest.mark.usefixtures("compiled_quickly")


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def expected_convolution(xs, kernel, slope, shift):
    with jax.default_matmul_precision("highest"):
        y = direct_convolution(jnp.concatenate(xs, axis=-1), kernel)
    return jnp.maximum(y * slope + shift, 0)


def expected_deconvolution(x, kernel, slope, shift):
    """Block by block, by its definition."""
    b, d, h, w, _ = x.shape
    deep, _, _, outputs, _ = kernel.shape
    y = np.zeros((b, deep * d, 2 * h, 2 * w, outputs), np.float32)
    for i, j, k in np.ndindex(*kernel.shape[:3]):
        y[:, i::deep, j::2, k::2] = np.asarray(x, np.float32) @ np.asarray(kernel[i, j, k], np.float32).T
    return np.maximum(y * np.asarray(slope) + np.asarray(shift), 0)


CONVOLUTIONS = [
    ((1, 8, 6, 10), (16,), 24, (3, 3, 3)),
    ((2, 4, 6, 8), (32, 16), 16, (3, 3, 3)),
    ((1, 4, 4, 4), (5, 3, 2), 7, (3, 3, 3)),
    ((2, 3, 5, 7), (4, 4), 3, (1, 3, 3)),
    ((1, 1, 1, 1), (1,), 1, (3, 3, 3)),
]


def close(value, expected, tolerance):
    value, expected = np.asarray(value, np.float32), np.asarray(expected, np.float32)
    assert value.shape == expected.shape
    np.testing.assert_allclose(value, expected, rtol=0, atol=tolerance * max(np.abs(expected).max(), 1e-3))


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 2**-6)])
@pytest.mark.parametrize("case", CONVOLUTIONS)
@pytest.mark.parametrize("way", ["onednn", "without"])
def test_a_convolution(case, dtype, tolerance, way, monkeypatch):
    if way == "without":
        monkeypatch.setattr(convolution_module.onednn, "version", lambda: None)
    shape, channels, outputs, size = case
    xs = [normal(number, *shape, count).astype(dtype) for number, count in enumerate(channels)]
    kernel, slope, shift = normal(7, outputs, *size, sum(channels)), normal(8, outputs), normal(9, outputs)
    value = jax.jit(lambda *arguments: convolution_relu(*arguments))(xs, kernel, slope, shift)
    assert value.dtype == dtype
    close(value, expected_convolution([x.astype(jnp.float32) for x in xs], kernel, slope, shift), tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 2**-6)])
@pytest.mark.parametrize("size", [(2, 2, 2), (1, 2, 2)])
@pytest.mark.parametrize("way", ["onednn", "without"])
def test_a_deconvolution(size, dtype, tolerance, way, monkeypatch):
    if way == "without":
        monkeypatch.setattr(convolution_module.onednn, "version", lambda: None)
    x, kernel = normal(0, 2, 3, 4, 5, 8).astype(dtype), normal(1, *size, 6, 8)
    slope, shift = normal(2, 6), normal(3, 6)
    value = jax.jit(lambda *arguments: deconvolution_relu(*arguments))(x, kernel, slope, shift)
    assert value.dtype == dtype
    close(value, expected_deconvolution(x, kernel, slope, shift), tolerance)


def test_gradients_are_those_of_the_separate_operations():
    """A network learns with fixed statistics too (`train.frozen_batch_stats`)."""
    xs, kernel = [normal(0, 1, 4, 6, 4, 3), normal(1, 1, 4, 6, 4, 2)], normal(2, 4, 3, 3, 3, 5)
    slope, shift = normal(3, 4), normal(4, 4)
    weights = normal(5, 1, 4, 6, 4, 4)

    def total(function):
        return jax.grad(lambda *arguments: jnp.sum(weights * function(*arguments)), argnums=(0, 1, 2, 3))

    found, expected = (total(f)(xs, kernel, slope, shift) for f in (convolution_relu, expected_convolution))
    jax.tree.map(lambda a, b: close(a, b, 1e-5), found, expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_network_at_inference_is_the_network_with_fixed_statistics(dtype, monkeypatch):
    """The one operation against convolution, normalisation and ReLU apart, through a whole U-Net; also under vmap."""
    config = NetworkConfig(base_channels=4, depth=3, dtype=dtype)
    model = with_random_weights(lambda: UNet(2, 3, config, rngs=nnx.Rngs(0)), seed=1)
    graph, state = nnx.split(nnx.view(model, use_running_average=True))
    images = normal(0, 3, 1, 8, 12, 16, 2)

    def forward(state, image):
        return nnx.merge(graph, state, copy=True)(image)

    together = jax.jit(jax.vmap(forward, (None, 0)))(state, images)
    one_by_one = jnp.stack([jax.jit(forward)(state, image) for image in images])
    monkeypatch.setattr(convolution_module.onednn, "version", lambda: None)
    apart = jnp.stack([jax.jit(lambda *a: forward(*a))(state, image) for image in images])
    tolerance = 1e-5 if dtype == "float32" else 3e-2
    close(one_by_one, apart, tolerance)
    close(together, one_by_one, 1e-6)


def test_exported_programs_have_the_same_values_without_onednn():
    xs, x = [normal(0, 1, 4, 6, 4, 3), normal(1, 1, 4, 6, 4, 2)], normal(5, 2, 3, 4, 5, 8)
    kernel, deep = normal(2, 4, 3, 3, 3, 5), normal(6, 2, 2, 2, 4, 8)
    slope, shift = normal(3, 4), normal(4, 4)

    def function(xs, x):
        return convolution_relu(xs, kernel, slope, shift), deconvolution_relu(x, deep, slope, shift)

    program = jax.export.export(jax.jit(function), platforms=["cpu", "cuda"])(xs, x)
    assert "custom_call @onednn" not in program.mlir_module()
    for value, expected in zip(program.call(xs, x), jax.jit(function)(xs, x), strict=True):
        close(value, expected, 1e-5)
