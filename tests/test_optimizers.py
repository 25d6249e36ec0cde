"""Learning rates at chosen steps; Adam is optax's."""

import math

import jax
import numpy as np
import optax
import pytest

from autocontext_jax.training.optimizers import SCHEDULES, OptimizerConfig, learning_rate, make_optimizer

PARAMS = {"kernel": np.array([[1.0], [-2.0], [3.0]], np.float32), "bias": np.array([0.5], np.float32)}


@pytest.mark.parametrize(
    ("schedule", "step", "share"),
    [
        ("constant", 0, 1),
        ("constant", 99, 1),
        ("cosine", 0, 1),
        ("cosine", 50, 0.5),
        ("cosine", 25, (1 + math.cos(math.pi / 4)) / 2),
        ("cosine", 100, 0),
        ("cosine", 200, 0),
        ("polynomial", 0, 1),
        ("polynomial", 40, 0.6**0.9),
        ("polynomial", 100, 0),
    ],
)
def test_schedules(schedule, step, share):
    rate = learning_rate(OptimizerConfig(learning_rate=0.02, schedule=schedule), 100)
    assert rate(step) == pytest.approx(0.02 * share, abs=1e-8)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warmup_rises_from_zero_and_the_schedule_still_ends_at_the_runs_end(schedule):
    rate = learning_rate(OptimizerConfig(learning_rate=0.02, schedule=schedule, warmup=20), 100)
    plain = learning_rate(OptimizerConfig(learning_rate=0.02, schedule=schedule), 80)
    assert [rate(step) for step in (0, 5, 10)] == pytest.approx([0, 0.005, 0.01])
    assert [rate(step) for step in (20, 60, 100)] == pytest.approx([plain(s) for s in (0, 40, 80)], abs=1e-8)


def test_a_run_no_longer_than_its_warmup():
    rate = learning_rate(OptimizerConfig(schedule="cosine", warmup=10), 10)
    assert [rate(step) for step in (0, 10)] == pytest.approx([0, 1e-3])


def walk(optimizer: optax.GradientTransformation, **rate: float) -> list:
    params, state, path = PARAMS, optimizer.init(PARAMS), []
    for _ in range(4):
        gradients = jax.tree.map(lambda p: 2 * p, params)
        updates, state = optimizer.update(gradients, state, params, **rate)
        params = optax.apply_updates(params, updates)
        path.append(np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(params)]))
    return path


@pytest.mark.parametrize(
    ("schedule", "theirs"),
    [
        ("constant", optax.constant_schedule(0.02)),
        ("cosine", optax.cosine_decay_schedule(0.02, 90)),
        ("polynomial", optax.polynomial_schedule(0.02, 0.0, 0.9, 90)),
    ],
)
def test_schedules_are_those_of_optax(schedule, theirs):
    rate = learning_rate(OptimizerConfig(learning_rate=0.02, schedule=schedule, warmup=10), 100)
    theirs = optax.join_schedules([optax.linear_schedule(0.0, 0.02, 10), theirs], [10])
    steps = range(0, 120, 7)
    np.testing.assert_allclose([rate(step) for step in steps], [theirs(step) for step in steps], rtol=1e-5, atol=1e-9)


def test_states_of_older_checkpoints_fit():
    """In them the schedule was a part of the optimizer."""
    older = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(optax.constant_schedule(0.1), weight_decay=0.5, mask={"kernel": True, "bias": False}),
    )
    ours = make_optimizer(OptimizerConfig(clip=1.0, weight_decay=0.5))
    assert jax.tree.structure(ours.init(PARAMS)) == jax.tree.structure(older.init(PARAMS))


def test_the_default_is_plain_adam():
    np.testing.assert_allclose(walk(make_optimizer(OptimizerConfig()), rate=1e-3), walk(optax.adam(1e-3)), rtol=1e-7)


def test_weight_decay_is_adamws():
    config = OptimizerConfig(learning_rate=0.1, weight_decay=0.5)
    adamw = optax.adamw(0.1, weight_decay=0.5, mask={"kernel": True, "bias": False})
    np.testing.assert_allclose(walk(make_optimizer(config), rate=0.1), walk(adamw), rtol=1e-7)


def test_scales_and_biases_do_not_decay():
    """They set what normalisation gives; decay would pull it towards 0."""
    optimizer = make_optimizer(OptimizerConfig(weight_decay=0.5))
    still = jax.tree.map(np.zeros_like, PARAMS)
    updates, _ = optimizer.update(still, optimizer.init(PARAMS), PARAMS, rate=0.1)
    np.testing.assert_allclose(updates["kernel"], -0.1 * 0.5 * PARAMS["kernel"], rtol=1e-6)
    np.testing.assert_array_equal(updates["bias"], 0)


def test_gradients_beyond_the_largest_norm_are_clipped():
    optimizer = make_optimizer(OptimizerConfig(clip=1.0))
    state = optimizer.init(PARAMS)
    _, state = optimizer.update(jax.tree.map(lambda p: 100 * p, PARAMS), state, PARAMS, rate=1e-3)
    norm = math.sqrt(sum(float((p**2).sum()) for p in PARAMS.values()))
    first_moment = optax.tree.get(state, "mu")
    np.testing.assert_allclose(first_moment["kernel"], 0.1 * PARAMS["kernel"] / norm, rtol=1e-5)
