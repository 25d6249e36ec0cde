"""Batch, instance and group normalisation with their ReLU and gradient, against Flax's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from autocontext_jax.geometry import CUBES, SLICE_BY_SLICE
from autocontext_jax.models.blocks import NetworkConfig, make_norm
from autocontext_jax.models.normalization import EPSILON, BatchNormReLU, group_size, norm_relu

pytestmark = pytest.mark.usefixtures("compiled_once")

CHANNELS = 12


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def assert_close(value, expected, relative=1e-5):
    value, expected = np.asarray(value, np.float32), np.asarray(expected, np.float32)
    assert value.shape == expected.shape
    assert np.abs(value - expected).max() <= relative * np.abs(expected).max()


def flaxs(kind: str) -> nnx.Module:
    """Flax's normalisation over all axes but the first and the last; of the batch over the first too."""
    rngs = nnx.Rngs(0)
    if kind == "batch":
        return nnx.BatchNorm(CHANNELS, use_running_average=False, epsilon=EPSILON, momentum=0.9, rngs=rngs)
    if kind == "instance":
        return nnx.InstanceNorm(CHANNELS, epsilon=EPSILON, rngs=rngs)
    return nnx.GroupNorm(CHANNELS, num_groups=CHANNELS // group_size(CHANNELS), epsilon=EPSILON, rngs=rngs)


def flaxs_relu(kind: str, sample_axes: int):
    """(x, scale, bias) -> relu of Flax's normalisation."""
    graph, others = nnx.split(flaxs(kind), nnx.BatchStat, ...)[:2]

    def reference(x, scale, bias):
        parameters = nnx.State({"scale": nnx.Param(scale), "bias": nnx.Param(bias)})
        model = nnx.merge(graph, others, parameters, copy=True)
        samples = x.reshape(-1, *x.shape[max(1, sample_axes) :])  # in 2D one for each slice
        return jax.nn.relu(model(samples)).reshape(x.shape)

    return reference


VOXELS, BLOCKS = (2, 3, 4, 5, CHANNELS), (2, 3, 2, 3, 8, CHANNELS)
CASES = [
    ("batch", 0, VOXELS, "float32"), ("instance", 1, VOXELS, "float32"), ("group", 1, VOXELS, "float32"),
    ("instance", 2, VOXELS, "float32"), ("group", 2, VOXELS, "float32"),
    ("batch", 0, BLOCKS, "bfloat16"), ("instance", 1, BLOCKS, "bfloat16"), ("group", 2, BLOCKS, "bfloat16"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "sample_axes", "shape", "dtype"), CASES)
def test_norm_relu_equals_flaxs_with_its_gradients(kind, sample_axes, shape, dtype):
    tolerance = 1e-5 if dtype == "float32" else 2**-7
    # Each sample, slice and channel has values of its own, so that statistics of others show.
    x = (3 + 2 * normal(0, *shape)) * np.exp(normal(4, *shape[:2], *(1,) * (len(shape) - 3), CHANNELS))
    x, cotangent = jnp.asarray(x, dtype), jnp.asarray(normal(1, *shape), dtype)
    scale, bias = normal(2, CHANNELS), normal(3, CHANNELS)
    group = group_size(CHANNELS) if kind == "group" else 1

    def ours(x, scale, bias):
        return norm_relu(x, scale, bias, sample_axes, group)[0]

    def with_gradients(function):
        def both(x, cotangent):
            value, pullback = jax.vjp(function, x, scale, bias)
            return value, pullback(cotangent)

        return jax.jit(both)

    wide = x.astype(jnp.float32), cotangent.astype(jnp.float32)
    expected, expected_gradients = with_gradients(flaxs_relu(kind, sample_axes))(*wide)
    value, gradients = with_gradients(ours)(x, cotangent)
    assert value.dtype == dtype
    assert_close(value, expected, tolerance)
    assert [gradient.dtype for gradient in gradients] == [dtype, jnp.float32, jnp.float32]
    for gradient, expected_gradient, close in zip(gradients, expected_gradients, (tolerance, 1e-5, 1e-5), strict=True):
        assert_close(gradient, expected_gradient, close)


def test_running_averages_are_flaxs():
    x = 3 + 2 * normal(0, 2, 3, 4, 5, CHANNELS)
    flax, ours = flaxs("batch"), BatchNormReLU(CHANNELS, momentum=0.9)
    flax(x)
    ours(jnp.asarray(x))
    assert_close(ours.mean[...], flax.mean[...])
    assert_close(ours.var[...], flax.var[...])


@pytest.mark.parametrize("sample_axes", [0, 1, 2])
def test_norm_relu_of_a_constant_channel_is_its_bias(sample_axes):
    """Rounding could make the variance negative. What is left of a value is as epsilon lets its rounding grow."""
    x = np.broadcast_to(np.float32([1000.1, 1.1]), (1, 4, 4, 4, 2))

    @jax.jit
    def with_gradient(x):
        value, pullback = jax.vjp(lambda x: norm_relu(x, np.ones(2), np.ones(2), sample_axes)[0], x)
        return value, pullback(jnp.ones_like(value))[0]

    value, gradient = with_gradient(x)
    assert np.isfinite(gradient).all()
    for channel, near in ((0, 0.5), (1, 1e-3)):
        np.testing.assert_allclose(value[..., channel], 1, rtol=0, atol=near)
    np.testing.assert_allclose(gradient[..., 1], 0, rtol=0, atol=1e-2)


@pytest.mark.parametrize("group", [1, 6])
def test_noise_far_below_epsilon_is_not_made_as_large_as_a_signal(group):
    """A tile of background: its deviation of 1e-4 becomes 1e-4 / sqrt(1e-5 + 1e-8), not 1."""
    x = 1.1 + 1e-4 * normal(0, 1, 12, 12, 12, CHANNELS)
    value, _, _ = jax.jit(norm_relu, static_argnums=(3, 4))(x, np.ones(CHANNELS), np.ones(CHANNELS), 1, group)
    np.testing.assert_allclose(np.std(value, axis=(0, 1, 2, 3)), 0.0316, rtol=0.05)


def test_groups_have_up_to_eight_channels_and_divide_them():
    sizes = {channels: group_size(channels) for channels in (1, 2, 3, 4, 7, 8, 11, 12, 16, 20, 30, 32, 320, 512)}
    assert sizes == {
        1: 1, 2: 2, 3: 3, 4: 4, 7: 7, 8: 8, 11: 1, 12: 6, 16: 8, 20: 5, 30: 6, 32: 8, 320: 8, 512: 8,
    }  # fmt: skip


def test_a_group_is_of_consecutive_channels():
    x = normal(0, 1, 4, 4, 4, 16)
    changed = x.copy()
    changed[..., 3] *= 5
    norm = jax.jit(make_norm(16, NetworkConfig(norm="group")))
    differs = (np.asarray(norm(x)) != np.asarray(norm(changed))).any(axis=(0, 1, 2, 3))
    assert differs.tolist() == [True] * 8 + [False] * 8


@pytest.mark.parametrize("norm", ["instance", "group"])
@pytest.mark.parametrize("spacing", [CUBES, SLICE_BY_SLICE])
def test_nothing_but_the_sample_counts(norm, spacing):
    """To the bit; in 2D each slice is a sample."""
    layer = jax.jit(make_norm(CHANNELS, NetworkConfig(norm=norm, spacing=spacing)))
    x = jnp.asarray(normal(0, 2, 3, 4, 5, CHANNELS))
    together = layer(x)
    np.testing.assert_array_equal(together[1:], layer(x[1:]))
    slices = jnp.concatenate([layer(x[:, number : number + 1]) for number in range(3)], axis=1)
    assert (np.asarray(together) == np.asarray(slices)).all() == (spacing == SLICE_BY_SLICE)


@pytest.mark.parametrize(("sample_axes", "group"), [(1, 1), (1, 6)])
def test_sample_statistics_need_no_more_memory_or_passes_than_the_batchs(sample_axes, group):
    """A wider array that is kept, or one pass more, would add an eighth and more."""
    x = jax.ShapeDtypeStruct((2, 16, 16, 16, CHANNELS), jnp.bfloat16)
    ones = np.ones(CHANNELS, np.float32)

    def compiled(*how):
        def gradients(x):
            return jax.vjp(lambda x, scale, bias: norm_relu(x, scale, bias, *how)[0], x, ones, ones)[1](x)

        return jax.jit(gradients).lower(x).compile()

    batch, own = compiled(), compiled(sample_axes, group)
    assert own.cost_analysis()["bytes accessed"] < 1.02 * batch.cost_analysis()["bytes accessed"]
    temporary = [program.memory_analysis().temp_size_in_bytes for program in (own, batch)]
    assert temporary[0] < 1.02 * temporary[1] + 4096


def test_under_vmap():
    x, scale, bias = normal(0, 3, 2, 2, 3, 2, CHANNELS), normal(1, 3, CHANNELS), normal(2, 3, CHANNELS)

    def total(x, scale, bias):
        return jnp.sum(norm_relu(x, scale, bias, 1, 6)[0] ** 2)

    gradient = jax.jit(jax.grad(total, (0, 1, 2)))
    together = jax.jit(jax.vmap(gradient))(x, scale, bias)
    for number in range(3):
        for several, alone in zip(together, gradient(x[number], scale[number], bias[number]), strict=True):
            assert_close(several[number], alone)
