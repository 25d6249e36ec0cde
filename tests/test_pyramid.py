"""The pyramid: what each level sees, which gradients pass between levels, its running averages."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from random_models import with_random_weights

from autocontext_jax.images.spec import ct_image
from autocontext_jax.models.blocks import NetworkConfig
from autocontext_jax.models.pyramid import Pyramid, PyramidConfig, context_of
from autocontext_jax.models.unet import UNet
from autocontext_jax.training.losses import dice_loss
from autocontext_jax.training.state import inference_model

pytestmark = pytest.mark.usefixtures("compiled_quickly")

TINY = NetworkConfig(base_channels=2, depth=1, norm="none")


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def pyramid(levels: int, *, classes: int = 3, network: NetworkConfig = TINY, **config) -> Pyramid:
    def make() -> Pyramid:
        return Pyramid(
            PyramidConfig(levels=levels, classes=classes, **config),
            lambda inputs, spacing, rngs: UNet(inputs, classes, network, rngs=rngs),
            rngs=nnx.Rngs(0),
        )

    return with_random_weights(make, seed=1)


def images(levels: int, edge: int = 8) -> tuple[np.ndarray, ...]:
    return tuple(200 * normal(level, 2, edge, edge, edge, 1) for level in range(levels))


def test_running_averages_are_updated_in_training_and_used_in_inference():
    model = pyramid(1, classes=2, network=NetworkConfig(base_channels=2, depth=1, momentum=0.75))
    graph, params, statistics = nnx.split(model, nnx.Param, ...)
    image = 300 * normal(0, 2, 6, 6, 6, 1)

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
    x = first.layer(np.clip(image / 500, -1, 1))
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


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("context", ["softmax", "onehot", "none"])
def test_what_the_finer_level_sees(context, activation):
    """A network that hands its input through: level 2's input is its clipped image, then the enlarged maps."""

    class Through(nnx.Module):
        def __call__(self, x):
            return x if x.shape[-1] > 1 else jnp.concatenate([x, -2 * x, x**2], axis=-1)

    config = PyramidConfig(2, 3, context=context, image=ct_image((-100.0, 300.0)), activation=activation)
    model = Pyramid(config, lambda inputs, spacing, rngs: Through(), rngs=nnx.Rngs(0))
    pair = images(2)
    coarse, fine = model(pair)
    scaled = np.clip((pair[1] + 100) / 200 - 1, -1, 1)
    if context == "none":
        np.testing.assert_allclose(fine[..., :1], scaled, atol=1e-6)
        return
    maps = jax.nn.softmax(coarse) if activation == "softmax" else 1 / (1 + np.exp(-coarse))
    if context == "onehot":
        maps = jax.nn.one_hot(jnp.argmax(maps, -1), 3) if activation == "softmax" else coarse > 0
    enlarged = jax.image.resize(jnp.asarray(maps, jnp.float32), (2, 16, 16, 16, 3), "linear")[:, 4:12, 4:12, 4:12]
    np.testing.assert_allclose(fine, np.concatenate([scaled, enlarged], -1), atol=1e-6)


def test_context_starts_a_quarter_into_the_patch():
    logits = normal(0, 1, 16, 16, 16, 2)
    maps = context_of(logits)
    assert maps.shape == (1, 10, 10, 10, 2)
    np.testing.assert_allclose(maps[0, 1, 2, 3], jax.nn.softmax(logits[0, 4, 5, 6]), rtol=1e-6)


def test_an_unknown_context_is_refused():
    with pytest.raises(ValueError, match="soft"):
        pyramid(2, context="soft")
    with pytest.raises(ValueError, match="relu"):
        pyramid(2, activation="relu")
