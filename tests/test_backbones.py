"""The U-Net's published size, and what holds for every backbone."""

import itertools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from random_models import with_random_weights

from autocontext_jax.models.blocks import NORMS, NetworkConfig
from autocontext_jax.models.fcn import FCN
from autocontext_jax.models.residual_unet import ResidualUNet
from autocontext_jax.models.unet import UNet
from autocontext_jax.training.losses import dice_loss

pytestmark = pytest.mark.usefixtures("compiled_quickly")

BACKBONES = (UNet, ResidualUNet, FCN)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


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
    for norm in ("instance", "group"):
        own = abstract(UNet, inputs, classes, NetworkConfig(base_channels=width, depth=depth, norm=norm))
        assert jax.tree.map(jnp.shape, nnx.state(own)) == jax.tree.map(jnp.shape, nnx.state(model, nnx.Param))


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


@pytest.mark.parametrize(
    ("backbone", "norm"),
    [*itertools.product(BACKBONES, ["batch", "none"]), (FCN, "instance")],
)
def test_every_parameter_of_a_backbone_learns(backbone, norm):
    model = with_random_weights(
        lambda: backbone(2, 3, NetworkConfig(base_channels=2, depth=3, norm=norm), rngs=nnx.Rngs(0)), seed=0
    )
    graph, params, statistics = nnx.split(model, nnx.Param, ...)
    x, labels = normal(1, 1, 8, 8, 8, 2), np.random.default_rng(0).integers(0, 3, (1, 8, 8, 8))
    gradients = jax.jit(jax.grad(lambda p: dice_loss(nnx.merge(graph, p, statistics, copy=True)(x), labels)))(params)
    assert all(np.isfinite(leaf).all() and np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradients))


def test_a_tile_of_background_has_finite_logits_and_gradients():
    """Each sample has statistics of its own, here of a single value; noise of rounding's size changes little."""
    config = NetworkConfig(base_channels=2, depth=2, norm="instance")
    model = with_random_weights(lambda: UNet(1, 3, config, rngs=nnx.Rngs(0)), seed=0)
    graph, params = nnx.split(model)

    @jax.jit
    def run(params, x):
        def total(params):
            logits = nnx.merge(graph, params, copy=True)(x)
            return jnp.sum(logits[..., 0] ** 2), logits

        (_, logits), gradients = jax.value_and_grad(total, has_aux=True)(params)
        return logits, gradients

    constant = np.full((2, 12, 8, 8, 1), -1, np.float32)
    noisy = constant + 1e-6 * np.random.default_rng(0).normal(size=constant.shape).astype(np.float32)
    (logits, gradients), (others, _) = run(params, constant), run(params, noisy)
    assert all(np.isfinite(leaf).all() for leaf in (logits, *jax.tree.leaves(gradients)))
    assert np.abs(logits - others).max() < 1e-2


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", [(1, 64, 64, 64), (3, 16, 40, 24)])
def test_output_has_the_inputs_size(backbone, norm, shape):
    graph, state = nnx.split(abstract(backbone, 2, 5, NetworkConfig(norm=norm, dtype="bfloat16")))
    image = jax.ShapeDtypeStruct((*shape, 2), jnp.float32)
    logits = jax.eval_shape(lambda state, x: nnx.merge(graph, state)(x), state, image)
    assert logits.shape == (*shape, 5)
    assert logits.dtype == jnp.float32


def test_divisor():
    assert [NetworkConfig(depth=depth).divisor for depth in (1, 2, 4)] == [(1, 1, 1), (2, 2, 2), (8, 8, 8)]


def test_bfloat16_logits_are_float32_and_near():
    x = normal(0, 2, 8, 8, 8, 1)
    logits = {}
    for dtype in ("float32", "bfloat16"):
        config = NetworkConfig(base_channels=2, depth=2, dtype=dtype)
        model = with_random_weights(lambda config=config: UNet(1, 3, config, rngs=nnx.Rngs(0)), seed=0)
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


@pytest.mark.parametrize("backbone", BACKBONES)
def test_several_networks_at_once_and_in_other_programs(backbone):
    """`jax.vmap` over networks, as of an ensemble, and `jax.export`, both on CPUs too."""
    config = NetworkConfig(base_channels=2, depth=2)
    x = normal(0, 1, 8, 8, 8, 1)
    models = [with_random_weights(lambda: backbone(1, 3, config, rngs=nnx.Rngs(0)), seed=seed) for seed in (1, 2)]
    models = [nnx.view(model, use_running_average=True, raise_if_not_found=False) for model in models]
    graph = nnx.graphdef(models[0])
    states = [nnx.state(model) for model in models]

    def logits(state, x):
        return nnx.merge(graph, state, copy=True)(x)

    together = jax.vmap(logits, (0, None))(jax.tree.map(lambda *leaves: jnp.stack(leaves), *states), x)
    alone = jnp.stack([logits(state, x) for state in states])
    np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-4 * np.abs(alone).max())
    exported = jax.export.export(jax.jit(lambda x: logits(states[0], x)))(x)
    assert "custom_call @onednn" not in exported.mlir_module()
    np.testing.assert_allclose(exported.call(x), alone[0], rtol=1e-4, atol=1e-4 * np.abs(alone).max())
