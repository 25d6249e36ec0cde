"""A network from outside with dropout: random in training, the same when a step is repeated, absent at inference."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from autocontext_jax.models.blocks import NetworkConfig
from autocontext_jax.models.pyramid import Pyramid, PyramidConfig
from autocontext_jax.models.unet import UNet
from autocontext_jax.training.checkpoints import Checkpoints
from autocontext_jax.training.losses import LossConfig
from autocontext_jax.training.state import Batch, create_state, inference_model, make_train_step, make_validation_step

pytestmark = pytest.mark.usefixtures("compiled_quickly")

STANDING_STILL = optax.sgd(0.0)


class DropoutUNet(nnx.Module):
    """A U-Net whose last features are dropped at random."""

    def __init__(self, inputs: int, classes: int, config: NetworkConfig, *, rngs: nnx.Rngs):
        self.unet = UNet(inputs, 4, config, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(4, classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(self.dropout(self.unet(x)))


def new_pyramid(norm: str = "batch") -> Pyramid:
    config = NetworkConfig(base_channels=2, depth=1, norm=norm)
    return Pyramid(
        PyramidConfig(levels=2, classes=2),
        lambda inputs, spacing, rngs: DropoutUNet(inputs, 2, config, rngs=rngs),
        rngs=nnx.Rngs(0),
    )


@pytest.fixture(scope="module")
def batch() -> Batch:
    images = tuple(
        np.random.default_rng(level).normal(0, 200, (2, 8, 8, 8, 1)).astype(np.float32) for level in range(2)
    )
    return Batch(tuple(map(jnp.asarray, images)), tuple(jnp.asarray(image[..., 0] > 0, jnp.uint8) for image in images))


@pytest.fixture(scope="module", params=["batch", "none"])
def made(request):
    """Static graph, a function that makes the state of step 0, and the compiled step."""
    graph, state = create_state(new_pyramid(request.param), STANDING_STILL)
    copy = jax.tree.map(np.array, state)
    return graph, lambda: jax.tree.map(jnp.array, copy), make_train_step(graph, STANDING_STILL, LossConfig())


def losses_of(step, state, batch, count: int):
    losses = []
    for _ in range(count):
        state, metrics = step(state, batch)
        losses.append(float(metrics.loss))
    return state, losses


def test_the_state_holds_numbers_alone(made):
    _, new_state, _ = made
    assert {leaf.dtype for leaf in jax.tree.leaves(new_state().params)} == {jnp.dtype("float32")}
    assert {leaf.dtype for leaf in jax.tree.leaves(new_state().batch_stats)} <= {jnp.dtype("float32")}


def test_every_step_drops_others_and_a_repeated_step_the_same(made, batch):
    _, new_state, step = made
    _, losses = losses_of(step, new_state(), batch, 3)
    assert len(set(losses)) == 3  # the parameters stand still, so only dropout changes
    assert losses_of(step, new_state(), batch, 3)[1] == losses
    assert step._cache_size() == 1


def test_a_restored_run_repeats_the_losses(made, batch, tmp_path):
    _, new_state, step = made
    state, _ = losses_of(step, new_state(), batch, 2)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(2, state, {})
    checkpoints.wait()
    _, expected = losses_of(step, state, batch, 2)
    restored, _ = checkpoints.restore(2, jax.eval_shape(new_state))
    like = jax.eval_shape(new_state)
    params, _ = checkpoints.restore_weights(2, like.params, like.batch_stats)
    checkpoints.close()
    jax.tree.map(np.testing.assert_array_equal, params, restored.params)
    assert losses_of(step, restored, batch, 2)[1] == expected


def test_inference_and_validation_drop_nothing(made, batch):
    graph, new_state, step = made
    state = new_state()
    model = inference_model(graph, state.params, state.batch_stats)
    first, second = model(batch.images), model(batch.images)
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)

    training = nnx.merge(graph, state.params, state.batch_stats, copy=True)
    training.reseed(jax.random.key(0))
    assert all(np.abs(a - b).max() > 1e-3 for a, b in zip(training(batch.images), first, strict=True))

    validate = make_validation_step(graph, LossConfig())
    losses = [float(validate(state.replace(step=jnp.int32(number)), batch)[0].loss) for number in (0, 1)]
    assert losses[0] == losses[1]
    assert losses[0] != float(step(state, batch)[1].loss)


def test_a_frozen_level_drops_nothing(batch):
    """The second phase trains on the maps that inference will give."""
    graph, state = create_state(new_pyramid(), STANDING_STILL, learning=[2])
    expected = inference_model(graph, state.params, state.batch_stats)(batch.images)
    logits = []
    for seed in range(2):
        model = nnx.merge(graph, state.params, state.batch_stats, copy=True)
        model.reseed(jax.random.key(seed))
        logits.append(model(batch.images))
    np.testing.assert_array_equal(logits[0][0], expected[0])
    np.testing.assert_array_equal(logits[1][0], expected[0])
    assert np.abs(logits[0][1] - logits[1][1]).max() > 1e-3


def test_levels_and_copies_of_a_module_drop_differently(batch):
    """A module made by `nnx.vmap` has as many keys as copies."""

    class Noise(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            make = nnx.vmap(lambda rngs: nnx.Dropout(0.5, rngs=rngs), in_axes=0, out_axes=0)
            self.dropouts = make(rngs.split(2))

        def __call__(self, x: jax.Array) -> jax.Array:
            ones = jnp.ones((2, *x.shape[:4]))
            return jnp.moveaxis(nnx.vmap(lambda dropout, x: dropout(x))(self.dropouts, ones), 0, -1)

    model = Pyramid(PyramidConfig(2, 2), lambda inputs, spacing, rngs: Noise(rngs), rngs=nnx.Rngs(0))
    assert jax.tree.leaves(nnx.state(model)) == []
    model.reseed(jax.random.key(0))
    maps = [level[..., copy] for level in model(batch.images) for copy in range(2)]
    assert all((a != b).any() for number, a in enumerate(maps) for b in maps[:number])
