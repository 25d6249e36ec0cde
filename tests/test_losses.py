"""The losses against numpy written from the paper's formulas, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from autocontext_jax.training.losses import (
    LossConfig,
    cross_entropy_loss,
    dice_loss,
    total_loss,
)

pytestmark = pytest.mark.usefixtures("compiled_once")


def random_pair(seed: int, *shape: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(0, 2, (*shape, classes)).astype(np.float32), rng.integers(0, classes, shape)


def sure_of(labels: np.ndarray, classes: int) -> np.ndarray:
    """Logits whose softmax is one-hot to within float32."""
    return 200 * np.eye(classes, dtype=np.float32)[labels]


def soft_dice(logits, labels, *, per_sample=False, background=True, logarithm=False) -> float:
    eps = 1e-5
    probabilities = special.softmax(logits.astype(float), axis=-1)
    samples = range(len(logits))
    scores = []
    for part in [[b] for b in samples] if per_sample else [list(samples)]:
        for k in range(0 if background else 1, logits.shape[-1]):
            p, l = probabilities[part, ..., k], labels[part] == k
            scores.append((2 * (p * l).sum() + eps) / (p.sum() + l.sum() + eps))
            if logarithm:
                scores[-1] = np.log(scores[-1]) if l.any() else 0
    return -np.mean(scores)


CASES = {
    "random": random_pair(0, 3, 4, 5, 6, classes=4),
    "absent class": (random_pair(2, 2, 4, 4, 4, classes=4)[0], random_pair(2, 2, 4, 4, 4, classes=3)[1]),
    "only background": (random_pair(3, 2, 4, 4, 4, classes=3)[0], np.zeros((2, 4, 4, 4), int)),
    "perfect": (sure_of(random_pair(4, 2, 4, 4, 4, classes=3)[1], 3), random_pair(4, 2, 4, 4, 4, classes=3)[1]),
    "all wrong": (sure_of((random_pair(5, 2, 4, 4, 4, classes=3)[1] + 1) % 3, 3),
                  random_pair(5, 2, 4, 4, 4, classes=3)[1]),
    "absent and not predicted": (sure_of(np.zeros((2, 4, 4, 4), int), 4), np.zeros((2, 4, 4, 4), int)),
    "one class": random_pair(1, 2, 4, 4, 4, classes=1),  # last: without background no class is left
}  # fmt: skip


@pytest.mark.parametrize(
    ("case", "background"), [(case, background) for case in CASES for background in (True, False)][:-1]
)
@pytest.mark.parametrize("per_sample", [False, True])
def test_dice_loss_equals_the_formula(case, per_sample, background):
    logits, labels = CASES[case]
    value = float(dice_loss(logits, labels, per_sample=per_sample, background=background))
    assert value == pytest.approx(soft_dice(logits, labels, per_sample=per_sample, background=background), abs=1e-6)
    assert -1 - 1e-6 <= value <= 0


@pytest.mark.parametrize("case", list(CASES)[:-1])
@pytest.mark.parametrize("per_sample", [False, True])
def test_its_logarithm_equals_the_formula(case, per_sample):
    options = {"per_sample": per_sample, "background": False, "logarithm": True}
    logits, labels = CASES[case]
    value, gradient = jax.value_and_grad(dice_loss)(jnp.asarray(logits), labels, **options)
    assert float(value) == pytest.approx(soft_dice(logits, labels, **options), rel=1e-5, abs=1e-6)
    assert np.isfinite(gradient).all()


def test_the_logarithm_pulls_a_vanishing_organ_back():
    labels = np.zeros((1, 16, 16, 16), int)
    labels[0, :4] = 1

    def pull(probability: float, *, logarithm: bool) -> float:
        """What the gradient adds, over all of the organ's own voxels, to its logits."""
        logits = np.zeros((1, 16, 16, 16, 2), np.float32)
        logits[..., 1] = special.logit(probability)
        return -float(jax.grad(dice_loss)(jnp.asarray(logits), labels, logarithm=logarithm)[0, :4, ..., 1].sum())

    assert pull(1e-6, logarithm=True) > 0.9 * pull(0.1, logarithm=True)
    assert pull(1e-6, logarithm=False) < 1e-4 * pull(0.1, logarithm=False)


def test_under_the_logarithm_an_absent_class_is_left_alone():
    labels = np.zeros((1, 4, 4, 4), int)
    logits = np.zeros((1, 4, 4, 4, 3), np.float32)
    gradient = jax.grad(dice_loss)(jnp.asarray(logits), labels, logarithm=True, background=False)
    np.testing.assert_array_equal(gradient, 0)


def test_dice_loss_at_its_ends():
    for case, expected in [("perfect", -1), ("all wrong", 0), ("absent and not predicted", -1), ("one class", -1)]:
        assert float(dice_loss(*CASES[case])) == pytest.approx(expected, abs=1e-6)


def test_dice_loss_does_not_depend_on_the_batchs_layout():
    logits, labels = random_pair(0, 4, 4, 4, 4, classes=3)
    whole = float(dice_loss(logits, labels))
    assert float(dice_loss(logits[::-1], labels[::-1])) == pytest.approx(whole, abs=1e-6)
    assert float(dice_loss(logits.reshape(1, 16, 4, 4, 3), labels.reshape(1, 16, 4, 4))) == pytest.approx(
        whole, abs=1e-6
    )
    assert float(dice_loss(logits, labels, per_sample=True)) != pytest.approx(whole, abs=1e-5)


def test_dice_loss_of_bfloat16_logits_is_computed_in_float32():
    logits, labels = random_pair(0, 2, 4, 4, 4, classes=3)
    half = jnp.asarray(logits, jnp.bfloat16)
    value = dice_loss(half, labels)
    assert value.dtype == jnp.float32
    assert float(value) == pytest.approx(soft_dice(np.asarray(half.astype(jnp.float32)), labels), abs=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_dice_loss_has_finite_gradients(case):
    assert np.isfinite(jax.grad(dice_loss)(jnp.asarray(CASES[case][0]), CASES[case][1])).all()


@pytest.mark.parametrize("case", ["random", "absent class", "perfect", "all wrong"])
def test_cross_entropy_equals_the_formula(case):
    logits, labels = CASES[case]
    expected = -np.take_along_axis(special.log_softmax(logits.astype(float), axis=-1), labels[..., None], -1).mean()
    assert float(cross_entropy_loss(logits, labels)) == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_total_loss_weighs_terms_and_levels():
    pairs = [random_pair(seed, 2, 4, 4, 4, classes=3) for seed in range(3)]
    logits, labels = zip(*pairs, strict=True)
    dice, entropy = (np.array([float(f(*pair)) for pair in pairs]) for f in (dice_loss, cross_entropy_loss))

    total, losses = total_loss(logits, labels, LossConfig())
    np.testing.assert_allclose(losses, dice, rtol=1e-6)
    assert float(total) == pytest.approx(dice.sum(), rel=1e-6)

    config = LossConfig(dice=0.5, cross_entropy=2.0, level_weights=(1.0, 0.0, 3.0))
    total, losses = total_loss(logits, labels, config)
    np.testing.assert_allclose(losses, 0.5 * dice + 2 * entropy, rtol=1e-6)
    assert float(total) == pytest.approx(np.dot((1, 0, 3), 0.5 * dice + 2 * entropy), rel=1e-6)

    total, _ = total_loss(logits, labels, LossConfig(dice=0.0, cross_entropy=1.0))
    assert float(total) == pytest.approx(entropy.sum(), rel=1e-6)

    total, _ = total_loss(logits, labels, LossConfig(log_dice=0.25, per_sample=True, background=False))
    options = {"per_sample": True, "background": False}
    expected = sum(soft_dice(*pair, **options) + 0.25 * soft_dice(*pair, **options, logarithm=True) for pair in pairs)
    assert float(total) == pytest.approx(expected, rel=1e-5)


def test_total_loss_refuses_levels_that_do_not_match():
    logits, labels = random_pair(0, 1, 4, 4, 4, classes=2)
    with pytest.raises(ValueError, match="zip"):
        total_loss([logits, logits], [labels], LossConfig())
    with pytest.raises((TypeError, ValueError)):
        total_loss([logits, logits], [labels, labels], LossConfig(level_weights=(1.0, 1.0, 1.0)))
