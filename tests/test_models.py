"""Layers against independent references, the U-Net's golden sizes, the pyramid's gradients."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from scipy import ndimage

from autocontext_jax.models import layers
from autocontext_jax.models.fcn import FCN
from autocontext_jax.models.network import NetworkConfig
from autocontext_jax.models.pyramid import Pyramid, PyramidConfig, context_of
from autocontext_jax.models.residual_unet import ResidualUNet
from autocontext_jax.models.unet import UNet
from autocontext_jax.training.losses import dice_loss
from autocontext_jax.training.state import inference_model

BACKBONES = (UNet, ResidualUNet, FCN)
TINY = NetworkConfig(base_channels=2, depth=1, norm="none")


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def drawn(make: Callable[[], nnx.Module], seed: int) -> nnx.Module:
    """The module that `make` makes, with numpy's numbers: XLA takes seconds to compile each initialiser.

    Kernels are He-normal; scales, offsets and running averages lie between 0.5 and 1, so that all of them matter.
    """
    rng = np.random.default_rng(seed)

    def draw(leaf):
        fan_in = leaf.shape[-1] if leaf.shape[:3] == (2, 2, 2) else np.prod(leaf.shape[1:])
        values = rng.normal(0, np.sqrt(2 / fan_in), leaf.shape) if leaf.ndim > 1 else rng.uniform(0.5, 1, leaf.shape)
        return jnp.asarray(values, leaf.dtype)

    graph, state = nnx.split(nnx.eval_shape(make))
    return nnx.merge(graph, jax.tree.map(draw, state))


def assert_close(value, wanted, relative=1e-5):
    value, wanted = np.asarray(value), np.asarray(wanted)
    assert value.shape == wanted.shape
    assert np.abs(value - wanted).max() <= relative * np.abs(wanted).max()


# ---- layers ----

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
        for function in (layers.convolution, layers.direct_convolution):
            value, pullback = jax.vjp(function, x, weights)
            results.append((value, *pullback(cotangent)))
        return results

    for value, wanted in zip(*both(x, weights, cotangent), strict=True):
        assert_close(value, wanted)


@pytest.mark.parametrize("function", [layers.convolution, layers.direct_convolution])
@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_convolution_equals_scipys_correlation(function, kernel):
    x, weights = normal(0, 2, 4, 6, 5, 3), normal(1, 2, kernel, kernel, kernel, 3)
    wanted = np.zeros((2, 4, 6, 5, 2))
    for b, i, o in np.ndindex(2, 3, 2):
        wanted[b, ..., o] += ndimage.correlate(x[b, ..., i].astype(float), weights[o, ..., i], mode="constant")
    assert_close(jax.jit(function)(x, weights), wanted)


def test_gradient_of_a_bias_in_bfloat16_adds_up_in_float32():
    """Its terms nearly cancel: summed in bfloat16 the gradient of the head's bias was wrong by as much as itself."""
    layer = layers.Convolution(1, 1, size=1, bias=True, rngs=nnx.Rngs(0))
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
        return jax.vjp(layers.convolution, x, kernel)[1](cotangent)[1]

    value = gradient(x, kernel, cotangent)
    assert value.dtype == jnp.bfloat16
    exact = gradient(*(array.astype(jnp.float32) for array in (x, kernel, cotangent)))
    assert_close(value.astype(jnp.float32), exact, 2**-8)  # bfloat16's own rounding


@pytest.mark.parametrize("way", ["as the processor can", "widened", "without oneDNN"])
def test_convolution_of_bfloat16_is_float32s_rounded(way, monkeypatch):
    if way == "widened":
        monkeypatch.setattr(layers, "multiplies_bfloat16", lambda: False)
    if way == "without oneDNN":
        monkeypatch.setattr(layers, "onednn_type", lambda dtype: None)
    jax.clear_caches()
    arrays = normal(0, 2, 6, 5, 7, 16), normal(1, 8, 3, 3, 3, 16), normal(2, 2, 6, 5, 7, 8)

    @jax.jit
    def both_directions(x, weights, cotangent):
        value, pullback = jax.vjp(layers.convolution, x, weights)
        return value, *pullback(cotangent)

    narrow = [jnp.asarray(array, jnp.bfloat16) for array in arrays]
    exact = both_directions(*(array.astype(jnp.float32) for array in narrow))
    for value, wanted in zip(both_directions(*narrow), exact, strict=True):
        assert value.dtype == jnp.bfloat16
        assert_close(value.astype(jnp.float32), wanted, 2**-7)  # sums of three planes may be rounded before they meet


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("bias", [False, True])
def test_convolution_module_adds_its_bias(size, bias):
    module = layers.Convolution(3, 4, size, bias=bias, rngs=nnx.Rngs(0))
    x, offset = normal(0, 1, 4, 3, 5, 3), np.zeros(4, np.float32)
    if bias:
        offset = normal(1, 4)
        module.bias[...] = jnp.asarray(offset)
    assert_close(module(x), layers.direct_convolution(x, module.kernel[...]) + offset)


def test_deconvolution_equals_xlas_transposed_convolution():
    module = layers.Deconvolution(3, 5, rngs=nnx.Rngs(0))
    x, kernel = normal(0, 2, 2, 4, 3, 3), np.asarray(module.kernel[...])
    wanted = np.zeros((2, 4, 8, 6, 5))
    for z, y, x_ in np.ndindex(2, 2, 2):
        wanted[:, z::2, y::2, x_::2] = np.einsum("bdhwi,oi->bdhwo", x, kernel[z, y, x_])
    value = layers.from_blocks(module(x))
    assert_close(value, wanted)
    flipped = kernel.swapaxes(3, 4)[::-1, ::-1, ::-1]  # XLA correlates with the dilated input
    xlas = lax.conv_transpose(x, flipped, (2, 2, 2), "VALID", dimension_numbers=("NDHWC", "DHWIO", "NDHWC"))
    assert_close(value, xlas)


def test_max_pool_equals_reduce_window():
    x = normal(0, 2, 4, 6, 8, 3)
    wanted = lax.reduce_window(x, -np.inf, lax.max, (1, 2, 2, 2, 1), (1, 2, 2, 2, 1), "VALID")
    np.testing.assert_array_equal(layers.max_pool(x), wanted)


def test_max_pools_gradient_goes_to_the_first_largest_voxel():
    x = np.zeros((1, 2, 2, 4, 1), np.float32)  # two blocks beside each other
    x[0, 0, 1, 0] = x[0, 1, 1, 1] = 3.0  # a tie in the first; the second is all equal
    gradient = jax.vjp(layers.max_pool, x)[1](np.array([5.0, 7.0], np.float32).reshape(1, 1, 1, 2, 1))[0]
    wanted = np.zeros_like(x)
    wanted[0, 0, 1, 0], wanted[0, 0, 0, 2] = 5.0, 7.0
    np.testing.assert_array_equal(gradient, wanted)


def test_max_pools_gradient_equals_reduce_windows_without_ties():
    x, cotangent = normal(0, 2, 4, 6, 8, 3), normal(1, 2, 2, 3, 4, 3)

    def window(x):
        return lax.reduce_window(x, -np.inf, lax.max, (1, 2, 2, 2, 1), (1, 2, 2, 2, 1), "VALID")

    wanted = jax.vjp(window, x)[1](cotangent)[0]
    np.testing.assert_array_equal(jax.vjp(layers.max_pool, x)[1](cotangent)[0], wanted)


def test_batch_norm_relu_equals_flaxs_with_its_gradients():
    x, cotangent = 3 + 2 * normal(0, 2, 3, 4, 5, 6), normal(1, 2, 3, 4, 5, 6)
    scale, bias = normal(2, 6), normal(3, 6)
    flax = nnx.BatchNorm(6, use_running_average=False, epsilon=layers.EPSILON, momentum=0.9, rngs=nnx.Rngs(0))
    ours = layers.BatchNormReLU(6, momentum=0.9)
    graph, statistics = nnx.split(flax, nnx.BatchStat, ...)[:2]

    def reference(x, scale, bias):
        model = nnx.merge(graph, statistics, nnx.State({"scale": nnx.Param(scale), "bias": nnx.Param(bias)}), copy=True)
        return jax.nn.relu(model(x))

    wanted, wanted_pullback = jax.vjp(reference, x, scale, bias)
    value, pullback = jax.vjp(lambda *arguments: layers.batch_norm_relu(*arguments)[0], x, scale, bias)
    assert_close(value, wanted)
    for gradient, wanted_gradient in zip(pullback(cotangent), wanted_pullback(cotangent), strict=True):
        assert_close(gradient, wanted_gradient)
    flax(x)
    ours(jnp.asarray(x))
    assert_close(ours.mean[...], flax.mean[...])
    assert_close(ours.var[...], flax.var[...])


def test_batch_norm_relu_of_a_constant_channel_is_finite():
    """Rounding could make the variance negative."""
    x = np.full((1, 4, 4, 4, 2), 1000.1, np.float32)
    value, pullback = jax.vjp(lambda x: layers.batch_norm_relu(x, np.ones(2), np.ones(2))[0], x)
    assert np.isfinite(value).all()
    assert np.isfinite(pullback(jnp.ones_like(value))[0]).all()


@pytest.mark.parametrize("size", [1, 3, 5])
def test_convolution_without_onednn_is_the_same(size, monkeypatch):
    """On other processors, and where the library is missing."""
    x, weights, cotangent = normal(0, 2, 6, 5, 7, 3), normal(1, 4, *(size,) * 3, 3), normal(2, 2, 6, 5, 7, 4)

    def both_directions():
        value, pullback = jax.vjp(lambda x, w: layers.convolution(x, w), x, weights)
        return value, *pullback(cotangent)

    with_onednn = both_directions()
    monkeypatch.setattr(layers, "onednn_type", lambda dtype: None)
    jax.clear_caches()
    for value, wanted in zip(both_directions(), with_onednn, strict=True):
        assert_close(value, wanted)


def test_upsampling_keeps_a_linear_ramp():
    n = 4
    coarse = np.arange(-1, n + 1) + 0.5  # centres in coarse voxels, with the halo
    fine = (np.arange(2 * n) + 0.5) / 2
    slopes = (1.0, -2.0, 0.5)
    ramp, wanted = (
        sum(a * g for a, g in zip(slopes, np.meshgrid(c, c, c, indexing="ij"), strict=True)) for c in (coarse, fine)
    )
    value = layers.upsample_by_two(jnp.asarray(ramp, jnp.float32)[None, ..., None])
    np.testing.assert_array_equal(value[0, ..., 0], wanted)  # quarters are exact in binary


def test_upsampling_equals_jaxs_resize_in_the_interior():
    x = normal(0, 2, 5, 7, 6, 3)
    resized = jax.image.resize(x, (2, 10, 14, 12, 3), "linear")
    assert_close(layers.upsample_by_two(x), resized[:, 2:-2, 2:-2, 2:-2], 1e-6)


# ---- the U-Net ----


def count(model: nnx.Module, kind=nnx.Param) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, kind)))


def abstract(backbone: type, inputs: int, classes: int, config: NetworkConfig) -> nnx.Module:
    return nnx.eval_shape(lambda: backbone(inputs, classes, config, rngs=nnx.Rngs(0)))


def test_parameters_without_norm_are_the_published_number():
    assert count(abstract(UNet, 3, 3, NetworkConfig(norm="none"))) == 19_069_955


@pytest.mark.parametrize(("width", "depth", "inputs", "classes"), [(32, 4, 1, 8), (32, 4, 9, 8), (2, 3, 1, 2)])
def test_parameters_with_batch_norm(width, depth, inputs, classes):
    ends = [width * 2 ** (r + 1) for r in range(depth)]  # channels that leave each resolution
    convolutions = []
    for r, end in enumerate(ends):
        convolutions += [(inputs if r == 0 else ends[r - 1], end // 2), (end // 2, end)]
    for below, end in zip(ends[1:], ends, strict=False):
        convolutions += [(below + end, end), (end, end)]
    kernels = sum(27 * a * b for a, b in convolutions) + sum(8 * c * c for c in ends[1:])
    normalised = sum(b for _, b in convolutions) + sum(ends[1:])
    model = abstract(UNet, inputs, classes, NetworkConfig(base_channels=width, depth=depth))
    assert count(model) == kernels + 2 * normalised + ends[0] * classes + classes
    assert count(model, nnx.BatchStat) == 2 * normalised


def test_parameters_of_the_other_backbones():
    """Width 32, depth 4, one channel in, 8 classes out."""
    widths = (32, 64, 128, 256)

    def normalised(kernel: int, inputs: int, outputs: int) -> int:
        return kernel * inputs * outputs + 2 * outputs

    def unit(inputs: int, outputs: int) -> int:
        inner = normalised(27, outputs, outputs)
        return normalised(27, inputs, outputs) + inner + 27 * outputs * outputs + outputs

    residual = sum(map(unit, (1, *widths), widths)) + sum(unit(width, width) for width in widths[:-1])
    residual += sum(normalised(8, below, below) + normalised(27, below, below // 2) for below in widths[1:])
    assert count(abstract(ResidualUNet, 1, 8, NetworkConfig())) == residual + 32 * 8 + 8

    ends = [2 * width for width in widths]
    plain = sum(
        normalised(27, start, end // 2) + normalised(27, end // 2, end)
        for start, end in zip((1, *ends), ends, strict=False)
    )
    plain += sum(normalised(8, below, below) + normalised(27, below, below // 2) for below in ends[1:])
    assert count(abstract(FCN, 1, 8, NetworkConfig())) == plain + 64 * 8 + 8


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("norm", ["batch", "none"])
def test_every_parameter_of_a_backbone_learns(backbone, norm):
    model = drawn(lambda: backbone(2, 3, NetworkConfig(base_channels=2, depth=3, norm=norm), rngs=nnx.Rngs(0)), seed=0)
    graph, params, statistics = nnx.split(model, nnx.Param, ...)
    x, labels = normal(1, 1, 8, 8, 8, 2), np.random.default_rng(0).integers(0, 3, (1, 8, 8, 8))
    gradients = jax.jit(jax.grad(lambda p: dice_loss(nnx.merge(graph, p, statistics, copy=True)(x), labels)))(params)
    assert all(np.isfinite(leaf).all() and np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradients))


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("norm", ["batch", "none"])
@pytest.mark.parametrize("shape", [(1, 64, 64, 64), (3, 16, 40, 24)])
def test_output_has_the_inputs_size(backbone, norm, shape):
    graph, state = nnx.split(abstract(backbone, 2, 5, NetworkConfig(norm=norm, dtype="bfloat16")))
    image = jax.ShapeDtypeStruct((*shape, 2), jnp.float32)
    logits = jax.eval_shape(lambda state, x: nnx.merge(graph, state)(x), state, image)
    assert logits.shape == (*shape, 5)
    assert logits.dtype == jnp.float32


def test_divisor():
    assert [NetworkConfig(depth=depth).divisor for depth in (1, 2, 4)] == [1, 2, 8]


def test_bfloat16_logits_are_float32_and_near():
    x = normal(0, 2, 8, 8, 8, 1)
    logits = {}
    for dtype in ("float32", "bfloat16"):
        config = NetworkConfig(base_channels=2, depth=2, dtype=dtype)
        model = drawn(lambda config=config: UNet(1, 3, config, rngs=nnx.Rngs(0)), seed=0)
        graph, state = nnx.split(model)
        assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))} == {jnp.dtype("float32")}
        logits[dtype], after = jax.jit(lambda s, x, graph=graph: run_training(graph, s, x))(state, x)
        assert {leaf.dtype for leaf in jax.tree.leaves(after)} == {jnp.dtype("float32")}
    assert logits["bfloat16"].dtype == jnp.float32
    assert 0 < np.abs(logits["bfloat16"] - logits["float32"]).max() < 0.05 * np.abs(logits["float32"]).max()


def run_training(graph, state, x):
    model = nnx.merge(graph, state, copy=True)
    logits = model(x)
    return logits, nnx.state(model, nnx.BatchStat)


def test_running_averages_are_updated_in_training_and_used_in_inference():
    model = pyramid(1, classes=2, network=NetworkConfig(base_channels=2, depth=1, momentum=0.75))
    graph, params, statistics = nnx.split(model, nnx.Param, ...)
    image = 300 * normal(0, 2, 6, 6, 6)

    @jax.jit
    def train(statistics):
        model = nnx.merge(graph, params, statistics, copy=True)
        logits = model((image,))[0]
        return logits, nnx.split(model, nnx.Param, ...)[2]

    @jax.jit
    def infer(statistics, image):
        model = inference_model(graph, params, statistics)
        logits = model((image,))[0]
        return logits, nnx.split(model, nnx.Param, ...)[2]

    training, updated = train(statistics)
    first = model.networks[0].analysis[0][0]
    before = first.norm
    x = first.layer(np.clip(image / 500, -1, 1)[..., None])
    stats = nnx.merge(graph, params, updated).networks[0].analysis[0][0].norm
    np.testing.assert_allclose(
        stats.mean[...], 0.75 * before.mean[...] + 0.25 * jnp.mean(x, (0, 1, 2, 3)), rtol=1e-4, atol=1e-6
    )
    np.testing.assert_allclose(stats.var[...], 0.75 * before.var[...] + 0.25 * jnp.var(x, (0, 1, 2, 3)), rtol=1e-4)

    logits, kept = infer(updated, image)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), kept, updated))
    assert np.abs(logits - training).max() > 1e-3
    # A sample's logits do not depend on its batch, unlike in training ...
    alone, _ = infer(updated, image[:1])
    np.testing.assert_allclose(alone, logits[:1], atol=1e-5)
    # ... and after many steps on one batch the averages are the batch's own.
    for _ in range(60):
        training, statistics = train(statistics)
    np.testing.assert_allclose(infer(statistics, image)[0], training, atol=2e-2)


# ---- the pyramid ----


def pyramid(levels: int, *, classes: int = 3, network: NetworkConfig = TINY, **config) -> Pyramid:
    def make() -> Pyramid:
        return Pyramid(
            PyramidConfig(levels=levels, classes=classes, **config),
            lambda inputs, rngs: UNet(inputs, classes, network, rngs=rngs),
            rngs=nnx.Rngs(0),
        )

    return drawn(make, seed=1)


def images(levels: int, edge: int = 8) -> tuple[np.ndarray, ...]:
    return tuple(200 * normal(level, 2, edge, edge, edge) for level in range(levels))


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_pyramids_of_any_height_run(levels):
    graph, state = nnx.split(pyramid(levels))
    logits = jax.jit(lambda state, x: nnx.merge(graph, state)(x))(state, images(levels))
    assert [level.shape for level in logits] == [(2, 8, 8, 8, 3)] * levels
    assert all(np.isfinite(level).all() and level.dtype == jnp.float32 for level in logits)


@pytest.mark.parametrize(
    ("context", "stop_gradient", "reaches"),
    [("softmax", False, True), ("softmax", True, False), ("onehot", False, False), ("none", False, False)],
)
def test_finer_loss_trains_the_coarser_level_only_through_soft_context(context, stop_gradient, reaches):
    model = pyramid(2, context=context, stop_gradient=stop_gradient)
    graph, state = nnx.split(model)
    labels = np.random.default_rng(0).integers(0, 3, (2, 8, 8, 8))

    @jax.jit
    def gradient(state, x):
        return jax.grad(lambda state: dice_loss(nnx.merge(graph, state)(x)[1], labels))(state)

    gradients = gradient(state, images(2))
    coarse, fine = (jnp.concatenate([g.ravel() for g in jax.tree.leaves(gradients["networks"][i])]) for i in (0, 1))
    assert np.abs(fine).max() > 0
    assert (np.abs(coarse).max() > 0) == reaches


@pytest.mark.parametrize("context", ["softmax", "onehot", "none"])
def test_what_the_finer_level_sees(context):
    """A network that hands its input through: level 2's input is its clipped image, then the enlarged maps."""

    class Through(nnx.Module):
        def __call__(self, x):
            return x if x.shape[-1] > 1 else jnp.concatenate([x, -2 * x, x**2], axis=-1)

    model = Pyramid(
        PyramidConfig(2, 3, context=context, window=(-100.0, 300.0)), lambda inputs, rngs: Through(), rngs=nnx.Rngs(0)
    )
    pair = images(2)
    coarse, fine = model(pair)
    scaled = np.clip((pair[1] + 100) / 200 - 1, -1, 1)[..., None]
    if context == "none":
        np.testing.assert_allclose(fine[..., :1], scaled, atol=1e-6)
        return
    maps = jax.nn.softmax(coarse)
    if context == "onehot":
        maps = jax.nn.one_hot(jnp.argmax(maps, -1), 3)
    enlarged = jax.image.resize(maps, (2, 16, 16, 16, 3), "linear")[:, 4:12, 4:12, 4:12]
    np.testing.assert_allclose(fine, np.concatenate([scaled, enlarged], -1), atol=1e-6)


def test_context_starts_a_quarter_into_the_patch():
    logits = normal(0, 1, 16, 16, 16, 2)
    maps = context_of(logits)
    assert maps.shape == (1, 10, 10, 10, 2)
    np.testing.assert_allclose(maps[0, 1, 2, 3], jax.nn.softmax(logits[0, 4, 5, 6]), rtol=1e-6)


def test_an_unknown_context_is_refused():
    with pytest.raises(ValueError, match="soft"):
        pyramid(2, context="soft")
