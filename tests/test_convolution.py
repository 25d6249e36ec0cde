"""Each way of computing convolutions and deconvolutions, against XLA's own and scipy's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from scipy import ndimage

from autocontext_jax.models import convolution
from autocontext_jax.models.resizing import depth_to_space

pytestmark = pytest.mark.usefixtures("compiled_quickly")


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def assert_close(value, expected, relative=1e-5):
    value, expected = np.asarray(value), np.asarray(expected)
    assert value.shape == expected.shape
    assert np.abs(value - expected).max() <= relative * np.abs(expected).max()


SHAPES = [
    # batch, size, kernel, inputs, outputs
    (1, (6, 6, 6), 1, 3, 4),
    (2, (5, 8, 7), 3, 1, 2),
    (1, (1, 3, 2), 3, 2, 3),
    (2, (4, 6, 9), 3, 5, 1),
    (1, (7, 6, 5), 5, 3, 2),
    (1, (3, 4, 5), 3, 128, 136),
    (1, (3, 4, 3), 1, 128, 128),
]


@pytest.mark.parametrize(("batch", "size", "kernel", "inputs", "outputs"), SHAPES)
def test_convolution_equals_xlas_own(batch, size, kernel, inputs, outputs):
    x = normal(0, batch, *size, inputs)
    weights = normal(1, outputs, kernel, kernel, kernel, inputs)
    cotangent = normal(2, batch, *size, outputs)

    @jax.jit
    def both(x, weights, cotangent):
        results = []
        for function in (convolution.convolution, convolution.direct_convolution):
            value, pullback = jax.vjp(function, x, weights)
            results.append((value, *pullback(cotangent)))
        return results

    for value, expected in zip(*both(x, weights, cotangent), strict=True):
        assert_close(value, expected)


@pytest.mark.parametrize("function", [convolution.convolution, convolution.direct_convolution])
@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_convolution_equals_scipys_correlation(function, kernel):
    x, weights = normal(0, 2, 4, 6, 5, 3), normal(1, 2, kernel, kernel, kernel, 3)
    expected = np.zeros((2, 4, 6, 5, 2))
    for b, i, o in np.ndindex(2, 3, 2):
        expected[b, ..., o] += ndimage.correlate(x[b, ..., i].astype(float), weights[o, ..., i], mode="constant")
    assert_close(jax.jit(function)(x, weights), expected)


def test_gradient_of_a_bias_in_bfloat16_adds_up_in_float32():
    """Its terms nearly cancel: summed in bfloat16 the gradient of the head's bias was wrong by as much as itself."""
    layer = convolution.Convolution(1, 1, size=(1, 1, 1), bias=True, rngs=nnx.Rngs(0))
    graph, state = nnx.split(layer)
    x = jnp.zeros((2, 32, 32, 32, 1), jnp.bfloat16)
    cotangent = jnp.asarray(normal(0, *x.shape) + 0.01, jnp.bfloat16)
    _, gradient = jax.vjp(lambda state: nnx.merge(graph, state)(x), state)
    exact = np.sum(np.asarray(cotangent, np.float64))
    np.testing.assert_allclose(jax.jit(gradient)(cotangent)[0]["bias"][...], [exact], rtol=1e-4)


def test_filter_gradient_of_bfloat16_adds_up_in_float32():
    """Sums of one sign are where rounding at every plane would show."""
    x, cotangent = (jnp.asarray(np.abs(normal(seed, 1, 64, 6, 6, 2)), jnp.bfloat16) for seed in (0, 1))
    kernel = jnp.zeros((2, 3, 3, 3, 2), jnp.bfloat16)

    @jax.jit
    def gradient(x, kernel, cotangent):
        return jax.vjp(convolution.convolution, x, kernel)[1](cotangent)[1]

    value = gradient(x, kernel, cotangent)
    assert value.dtype == jnp.bfloat16
    exact = gradient(*(array.astype(jnp.float32) for array in (x, kernel, cotangent)))
    assert_close(value.astype(jnp.float32), exact, 2**-8)  # bfloat16's own rounding


@pytest.mark.parametrize("way", ["as the processor can", "widened", "without oneDNN"])
def test_convolution_of_bfloat16_is_float32s_rounded(way, monkeypatch):
    if way == "widened":
        monkeypatch.setattr(convolution, "multiplies_bfloat16", lambda: False)
    if way == "without oneDNN":
        monkeypatch.setattr(convolution, "onednn_type", lambda dtype: None)
    jax.clear_caches()
    arrays = normal(0, 2, 6, 5, 7, 16), normal(1, 8, 3, 3, 3, 16), normal(2, 2, 6, 5, 7, 8)

    @jax.jit
    def both_directions(x, weights, cotangent):
        value, pullback = jax.vjp(convolution.convolution, x, weights)
        return value, *pullback(cotangent)

    narrow = [jnp.asarray(array, jnp.bfloat16) for array in arrays]
    exact = both_directions(*(array.astype(jnp.float32) for array in narrow))
    for value, expected in zip(both_directions(*narrow), exact, strict=True):
        assert value.dtype == jnp.bfloat16
        assert_close(value.astype(jnp.float32), expected, 2**-7)  # sums of three planes may be rounded before they meet


@pytest.mark.parametrize("size", [1, 3, 5])
def test_convolution_without_onednn_is_the_same(size, monkeypatch):
    """On other processors, and where the library is missing."""
    x, weights, cotangent = normal(0, 2, 6, 5, 7, 3), normal(1, 4, *(size,) * 3, 3), normal(2, 2, 6, 5, 7, 4)

    def both_directions():
        value, pullback = jax.vjp(lambda x, w: convolution.convolution(x, w), x, weights)
        return value, *pullback(cotangent)

    with_onednn = both_directions()
    monkeypatch.setattr(convolution, "onednn_type", lambda dtype: None)
    jax.clear_caches()
    for value, expected in zip(both_directions(), with_onednn, strict=True):
        assert_close(value, expected)


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("bias", [False, True])
def test_convolution_module_adds_its_bias(size, bias):
    module = convolution.Convolution(3, 4, (size,) * 3, bias=bias, rngs=nnx.Rngs(0))
    x, offset = normal(0, 1, 4, 3, 5, 3), np.zeros(4, np.float32)
    if bias:
        offset = normal(1, 4)
        module.bias[...] = jnp.asarray(offset)
    assert_close(module(x), convolution.direct_convolution(x, module.kernel[...]) + offset)


def test_deconvolution_equals_xlas_transposed_convolution():
    module = convolution.Deconvolution(3, 5, rngs=nnx.Rngs(0))
    x, kernel = normal(0, 2, 2, 4, 3, 3), np.asarray(module.kernel[...])
    expected = np.zeros((2, 4, 8, 6, 5))
    for z, y, x_ in np.ndindex(2, 2, 2):
        expected[:, z::2, y::2, x_::2] = np.einsum("bdhwi,oi->bdhwo", x, kernel[z, y, x_])
    value = depth_to_space(module(x))
    assert_close(value, expected)
    flipped = kernel.swapaxes(3, 4)[::-1, ::-1, ::-1]  # XLA correlates with the dilated input
    xlas = lax.conv_transpose(x, flipped, (2, 2, 2), "VALID", dimension_numbers=("NDHWC", "DHWIO", "NDHWC"))
    assert_close(value, xlas)
