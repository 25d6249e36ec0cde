"""The jitted steps on one tiny batch."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from autocontext_jax.data.labels import IGNORE
from autocontext_jax.models.blocks import NetworkConfig
from autocontext_jax.models.pyramid import Pyramid, PyramidConfig
from autocontext_jax.models.unet import UNet
from autocontext_jax.training.dice import overlap_counts
from autocontext_jax.training.losses import LossConfig, dice_loss, total_loss
from autocontext_jax.training.state import (
    Batch,
    create_state,
    freeze_batch_stats,
    inference_model,
    make_train_step,
    make_validation_step,
)
from autocontext_jax.training.targets import Targets

pytestmark = pytest.mark.usefixtures("compiled_quickly")


@pytest.fixture(scope="module")
def batch() -> Batch:
    """Bright balls in noise at two levels."""
    rng = np.random.default_rng(0)
    axis = np.arange(8) - 3.5
    distance = np.sqrt(sum(a**2 for a in np.meshgrid(axis, axis, axis, indexing="ij")))
    labels = [np.broadcast_to(distance < radius, (2, 8, 8, 8)).astype(np.uint8) for radius in (1.6, 3.2)]
    images = [(300.0 * label + rng.normal(0, 50, label.shape)).astype(np.float32)[..., None] for label in labels]
    return Batch(tuple(map(jnp.asarray, images)), tuple(map(jnp.asarray, labels)))


OPTIMIZER = optax.adam(1e-2)


@pytest.fixture(scope="module")
def made():
    """Static graph and the compiled step: one compilation for all tests."""
    graph, _ = new_state()
    return graph, make_train_step(graph, OPTIMIZER, LossConfig())


def new_state(
    norm: str = "batch",
    *,
    depth: int = 2,
    stop_gradient: bool = False,
    learning: list[int] | None = None,
    activation: str = "softmax",
):
    """Graph and state of step 0, with numpy's numbers: XLA takes seconds to compile each initialiser."""

    def make() -> Pyramid:
        network = NetworkConfig(base_channels=2, depth=depth, norm=norm, momentum=0.9)
        return Pyramid(
            PyramidConfig(levels=2, classes=2, stop_gradient=stop_gradient, activation=activation),
            lambda inputs, spacing, rngs: UNet(inputs, 2, network, rngs=rngs),
            rngs=nnx.Rngs(0),
        )

    graph, params, statistics = nnx.split(nnx.eval_shape(make), nnx.Param, ...)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0.1, 0.3, leaf.shape), jnp.float32), params)
    statistics = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), statistics)
    return create_state(nnx.merge(graph, params, statistics), OPTIMIZER, learning)


def leaves(tree) -> list[np.ndarray]:
    return [np.array(leaf) for leaf in jax.tree.leaves(tree)]


def test_a_step_changes_everything_and_donates_its_state(made, batch):
    _, step = made
    _, state = new_state()
    params, statistics = leaves(state.params), leaves(state.batch_stats)
    after, metrics = step(state, batch)
    assert int(after.step) == 1
    assert after.step.dtype == jnp.int32
    assert all((a != b).any() for a, b in zip(params, leaves(after.params), strict=True))
    assert all((a != b).any() for a, b in zip(statistics, leaves(after.batch_stats), strict=True))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((state.params, state.optimizer)))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(batch))
    assert metrics.losses.shape == (2,)
    assert metrics.counts.shape == (2, 3, 2)
    assert float(metrics.loss) == pytest.approx(float(metrics.losses.sum()))
    np.testing.assert_array_equal(metrics.counts[:, 1].sum(-1), [2 * 2 * 8**3] * 2)


def test_steps_reduce_the_loss_and_compile_once(made, batch):
    _, step = made
    _, state = new_state()
    losses = []
    for _ in range(30):
        state, metrics = step(state, batch)
        losses.append(float(metrics.loss))
    assert losses[-1] < losses[0] - 0.3
    assert int(state.step) == 30
    assert step._cache_size() == 1


def test_a_step_is_the_same_every_time(made, batch):
    _, step = made
    first, second = (step(new_state()[1], batch) for _ in range(2))
    assert all((a == b).all() for a, b in zip(leaves(first), leaves(second), strict=True))


def test_validation_uses_the_running_averages_and_leaves_the_state(made, batch):
    graph, step = made
    state, _ = step(new_state()[1], batch)
    before = leaves(state)
    validate = make_validation_step(graph, LossConfig())
    metrics, slices = validate(state, batch)
    assert all((a == b).all() for a, b in zip(before, leaves(state), strict=True))
    logits = jax.jit(lambda s, x: inference_model(graph, s.params, s.batch_stats)(x))(state, batch.images)
    expected = [float(dice_loss(*pair)) for pair in zip(logits, batch.labels, strict=True)]
    np.testing.assert_allclose(metrics.losses, expected, rtol=1e-5)
    for level, middle in zip(logits, slices, strict=True):
        assert middle.dtype == jnp.uint8
        np.testing.assert_array_equal(middle, level[:, 4].argmax(-1))


def test_without_norm_there_are_no_statistics(batch):
    graph, state = new_state("none", depth=1)
    assert jax.tree.leaves(state.batch_stats) == []
    logits = jax.jit(lambda s, x: inference_model(graph, s.params, s.batch_stats)(x))(state, batch.images)
    assert [level.shape for level in logits] == [(2, 8, 8, 8, 2)] * 2


FINEST, BOTH = (0.0, 1.0), (1.0, 1.0)


@pytest.mark.parametrize(
    ("learning", "weights", "stop_gradient", "params", "statistics"),
    [
        (None, FINEST, False, [True, True], [True, True]),  # end to end: level 1 learns through the context
        (None, FINEST, True, [False, True], [True, True]),
        (None, BOTH, True, [True, True], [True, True]),
        ([2], FINEST, False, [False, True], [False, True]),  # separate, second phase
        ([1], (1.0,), False, [True, False], [True, False]),  # separate, first phase: fed level 1 alone
    ],
)
def test_a_step_changes_exactly_what_learns(batch, learning, weights, stop_gradient, params, statistics):
    graph, state = new_state(depth=1, stop_gradient=stop_gradient, learning=learning)
    fed = Batch(batch.images[: len(weights)], batch.labels[: len(weights)])
    before = jax.tree.map(np.array, (state.params, state.batch_stats))
    after, _ = make_train_step(graph, OPTIMIZER, LossConfig(level_weights=weights), learning)(state, fed)

    def changed(old, new) -> list[bool]:
        pairs = [zip(leaves(old["networks"][n]), leaves(new["networks"][n]), strict=True) for n in (0, 1)]
        return [any((a != b).any() for a, b in network) for network in pairs]

    assert changed(before[0], after.params) == params
    assert changed(before[1], after.batch_stats) == statistics


def test_with_frozen_batch_stats_all_learn_and_the_running_averages_stay(batch):
    graph, state = new_state()
    graph = freeze_batch_stats(graph, state.params, state.batch_stats)
    before = jax.tree.map(np.array, (state.params, state.batch_stats))
    after, metrics = make_train_step(graph, OPTIMIZER, LossConfig())(state, batch)
    assert all((a != b).any() for a, b in zip(leaves(before[0]), leaves(after.params), strict=True))
    assert all((a == b).all() for a, b in zip(leaves(before[1]), leaves(after.batch_stats), strict=True))
    logits = jax.jit(lambda p, s, x: inference_model(graph, p, s)(x))(*before, batch.images)
    expected = [float(dice_loss(*pair)) for pair in zip(logits, batch.labels, strict=True)]
    np.testing.assert_allclose(metrics.losses, expected, rtol=1e-5)


def test_a_frozen_level_uses_its_running_averages(batch):
    """The second phase trains on the maps that inference will give."""
    graph, state = new_state(learning=[2])
    logits = jax.jit(lambda s, x: nnx.merge(graph, s.params, s.batch_stats, copy=True)(x))(state, batch.images)
    expected = jax.jit(lambda s, x: inference_model(graph, s.params, s.batch_stats)(x))(state, batch.images)
    np.testing.assert_allclose(logits[0], expected[0], rtol=1e-5, atol=1e-5)
    assert np.abs(logits[1] - expected[1]).max() > 0.1


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_step_that_is_not_finite_changes_nothing_but_its_number(made, batch, bad):
    _, step = made
    _, state = new_state()
    before = leaves((state.params, state.batch_stats, state.optimizer))
    images = (batch.images[0].at[0, 0, 0, 0].set(bad), batch.images[1])
    # The window clips an infinite voxel; what is not a number goes through.
    after, metrics = step(state, Batch(images, batch.labels))
    assert after.step == 1
    assert np.isfinite(metrics.loss) == np.isinf(bad)
    assert np.isfinite(metrics.gradient_norm) == np.isinf(bad)
    changed = [
        not np.array_equal(a, b)
        for a, b in zip(before, leaves((after.params, after.batch_stats, after.optimizer)), strict=True)
    ]
    assert any(changed) == np.isinf(bad)
    again, metrics = step(after, batch)
    assert np.isfinite(metrics.loss)
    assert again.step == 2


def test_the_gradients_norm_is_that_of_all_of_them(batch):
    optimizer = optax.sgd(1.0)
    graph, state = new_state(depth=1)
    state = state.replace(optimizer=optimizer.init(state.params))
    before = leaves(state.params)
    after, metrics = make_train_step(graph, optimizer, LossConfig())(state, batch)
    squares = sum(np.sum(np.square(a - b, dtype=float)) for a, b in zip(before, leaves(after.params), strict=True))
    assert metrics.gradient_norm == pytest.approx(np.sqrt(squares), rel=1e-3)


@pytest.mark.parametrize("regions", [(), ((1, 2), (2,))], ids=["classes", "regions"])
def test_steps_of_partly_annotated_and_partly_labelled_batches(batch, regions):
    """Losses, counts and the picture are those of the functions, of the network's own logits."""
    targets = Targets(regions, ignore=True)
    labels = tuple(label.at[:, 2].set(2 if regions else 1).at[:, :2].set(IGNORE) for label in batch.labels)
    known = jnp.array([[True, True, True], [True, True, False]])[:, : 3 if regions else 2].at[1, 1].set(bool(regions))
    fed = Batch(batch.images, labels, known)
    graph, state = new_state(depth=1, activation=targets.activation)
    config = LossConfig(cross_entropy=1.0)
    metrics, slices = make_validation_step(graph, config, targets=targets)(state, fed)
    logits = jax.jit(lambda s, x: inference_model(graph, s.params, s.batch_stats)(x))(state, batch.images)
    _, expected = total_loss(logits, labels, config, targets=targets, known=known)
    np.testing.assert_allclose(metrics.losses, expected, rtol=1e-5)
    for level, label, counts, middle in zip(logits, labels, metrics.counts, slices, strict=True):
        np.testing.assert_array_equal(counts, overlap_counts(level, label, targets=targets, known=known))
        first, second = np.moveaxis(np.asarray(level[:, 4]), -1, 0)
        of_regions = np.where(second > 0, 2, np.where(first > 0, 1, 0))
        np.testing.assert_array_equal(middle, of_regions if regions else second > first)
    before = leaves(state.params)
    step = make_train_step(graph, OPTIMIZER, config, targets=targets)
    after, metrics = step(state, fed)
    assert np.isfinite(metrics.gradient_norm)
    assert metrics.counts.shape == (2, 3, 3 if regions else 2)
    assert all((a != b).any() for a, b in zip(before, leaves(after.params), strict=True))
    nobody = Batch(batch.images, tuple(jnp.full_like(label, IGNORE) for label in labels), known)
    _, metrics = step(after, nobody)
    assert metrics.gradient_norm == 0
    assert np.isfinite(metrics.loss)
