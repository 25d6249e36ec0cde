"""Regions, ignored voxels and partly annotated samples: maps and losses against numpy, a sample and class at a time."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from autocontext_jax.data.labels import IGNORE
from autocontext_jax.training.losses import LossConfig, cross_entropy_loss, dice_loss, total_loss
from autocontext_jax.training.targets import CLASSES, Targets, hard_maps, predicted_numbers, soft_maps, truth_maps

EPS, SHAPE, K = 1e-5, (3, 3, 4, 5), 4
REGIONS = ((1, 2, 3), (2, 3), (3,), (1, 4))  # nested, and two that overlap in part; number 5 is in none
KNOWN = {
    "classes": np.array([[1, 1, 0, 1], [1, 0, 0, 1], [1, 1, 0, 0]], bool),  # nobody knows class 2
    "regions": np.array([[1, 1, 0, 1, 1], [1, 0, 0, 1, 0], [1, 1, 0, 0, 0]], bool),
}
PAIRS = list(itertools.product(("classes", "regions"), (False, True)))
DICE = [
    {"per_sample": per_sample, "background": background, "logarithm": logarithm}
    for per_sample, background, logarithm in itertools.product((False, True), repeat=3)
]


def sample(kind: str, *, ignore: bool, seed: int = 0):
    """Logits, labels, what they mean, and what is known."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, (*SHAPE, K)).astype(np.float32)
    labels = rng.integers(0, K if kind == "classes" else 6, SHAPE).astype(np.uint8)
    labels[:, :, 0] = IGNORE if ignore else 0
    return logits, labels, Targets(REGIONS if kind == "regions" else (), ignore), KNOWN[kind]


def by_hand(logits, labels, targets, known):
    """For each sample the (probability, truth) of every output over its labelled voxels; None where not known.

    A class that is not known is merged with the background, label and probability alike.
    """
    found = []
    for z, l, row in zip(logits.astype(float), labels, known, strict=True):
        valid = l != IGNORE if targets.ignore else np.ones(l.shape, bool)
        z, l = z[valid], l[valid]
        if targets.regions:
            pairs = [(special.expit(z[:, r]), np.isin(l, some)) for r, some in enumerate(targets.regions)]
            found.append([pair if row[1 + r] else None for r, pair in enumerate(pairs)])
            continue
        p, merged = special.softmax(z, axis=-1), [k for k in range(K) if k == 0 or not row[k]]
        background = p[:, merged].sum(-1), np.isin(l, merged)
        found.append([background] + [(p[:, k], l == k) if row[k] else None for k in range(1, K)])
    return found


def dice_by_hand(samples, *, per_sample, background, logarithm, regions) -> float:
    scores = []
    for output in range(0 if background or regions else 1, K):
        known = [one[output] for one in samples if one[output] is not None]
        for group in [[pair] for pair in known] if per_sample else [known] if known else []:
            overlap = sum((p * l).sum() for p, l in group)
            true, total = sum(l.sum() for _, l in group), sum(p.sum() + l.sum() for p, l in group)
            score = (2 * overlap + EPS) / (total + EPS)
            scores.append((np.log(score) if true else 0) if logarithm else score)
    return -np.mean(scores)


def entropy_by_hand(samples, *, regions) -> float:
    terms = []
    for one in samples:
        known = [pair for pair in one if pair is not None]
        if regions:
            terms += [-np.log(np.where(l, p, 1 - p)) for p, l in known]
        else:
            terms.append(-np.log(sum(p * l for p, l in known)))
    return np.concatenate(terms).mean()


ALL = list(itertools.product(("classes", "regions"), (False, True), (False, True)))


@pytest.mark.parametrize(("kind", "ignore", "partly"), ALL)
def test_losses_equal_those_counted_by_hand(kind, ignore, partly):
    logits, labels, targets, known = sample(kind, ignore=ignore)
    samples = by_hand(logits, labels, targets, known if partly else np.ones_like(known))
    given = {"targets": targets, "known": known if partly else None}
    for options in DICE:
        expected = dice_by_hand(samples, **options, regions=targets.regions)
        assert float(dice_loss(logits, labels, **options, **given)) == pytest.approx(expected, rel=1e-5, abs=1e-6)
    expected = entropy_by_hand(samples, regions=targets.regions)
    assert float(cross_entropy_loss(logits, labels, **given)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("options", [DICE[0], DICE[7]])
def test_a_class_that_no_sample_knows_is_as_if_it_were_merged_with_the_background(options):
    """Value and gradient are those of a network with one class less, whose background has the sum of both."""
    logits, labels, _, _ = sample("classes", ignore=False)
    known = np.broadcast_to([True, True, False, True], (3, K))

    def merged(loss):
        def call(logits):
            background = jnp.logaddexp(logits[..., 0], logits[..., 2])
            fewer = jnp.stack([background, logits[..., 1], logits[..., 3]], axis=-1)
            return loss(fewer, np.array([0, 1, 0, 2])[labels])

        return call

    for loss, rest in ((dice_loss, options), (cross_entropy_loss, {})):
        value, gradient = jax.value_and_grad(loss)(logits, labels, known=known, **rest)
        expected = jax.value_and_grad(merged(lambda z, l, loss=loss, rest=rest: loss(z, l, **rest)))(logits)
        assert float(value) == pytest.approx(float(expected[0]), rel=1e-6)
        np.testing.assert_allclose(gradient, expected[1], rtol=1e-4, atol=1e-8)
        assert np.abs(gradient[..., 2]).min() > 0  # it learns, as background


@pytest.mark.parametrize("ignore", [False, True])
def test_regions_are_learned_each_as_if_it_were_the_only_one(ignore):
    """Against two classes: of a logit and 0, the softmax is the sigmoid."""
    logits, labels, targets, _ = sample("regions", ignore=ignore)
    dice, entropy = [], []
    for region, members in enumerate(REGIONS):
        pair = jnp.stack([jnp.zeros(SHAPE), logits[..., region]], axis=-1)
        inside = np.isin(labels, members).astype(np.uint8)
        if ignore:
            inside[labels == IGNORE] = IGNORE
        alone = Targets(ignore=ignore)
        dice.append(float(dice_loss(pair, inside, background=False, targets=alone)))
        entropy.append(float(cross_entropy_loss(pair, inside, targets=alone)))
    assert float(dice_loss(logits, labels, targets=targets)) == pytest.approx(np.mean(dice), rel=1e-6)
    assert float(cross_entropy_loss(logits, labels, targets=targets)) == pytest.approx(np.mean(entropy), rel=1e-6)


EVERYTHING = LossConfig(dice=1.0, log_dice=0.5, cross_entropy=1.0)


def value_and_gradient(logits, labels, targets, known, config=EVERYTHING):
    def loss(logits):
        return total_loss([logits], [labels], config, targets=targets, known=known)[0]

    return jax.value_and_grad(loss)(jnp.asarray(logits))


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize(("kind", "partly"), PAIRS)
def test_nothing_pulls_at_ignored_voxels(kind, partly, per_sample):
    logits, labels, targets, known = sample(kind, ignore=True)
    config = LossConfig(dice=1.0, log_dice=0.5, cross_entropy=1.0, per_sample=per_sample)
    ignored = labels == IGNORE
    value, gradient = value_and_gradient(logits, labels, targets, known if partly else None, config)
    np.testing.assert_array_equal(gradient[ignored], 0)
    assert (np.abs(gradient[~ignored]).max(-1) > 0).all()
    other = np.where(ignored[..., None], 50 * logits[::-1], logits)
    assert value_and_gradient(other, labels, targets, known if partly else None, config)[0] == value
    # Told that there are none, or with another label in their place, they do pull.
    assert np.abs(value_and_gradient(logits, np.where(ignored, 1, labels), targets, None, config)[1][ignored]).max() > 0


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize(("kind", "partly"), PAIRS)
def test_a_batch_that_nobody_labelled(kind, partly, per_sample):
    logits, labels, targets, known = sample(kind, ignore=True)
    config = LossConfig(dice=1.0, log_dice=0.5, cross_entropy=1.0, per_sample=per_sample)
    labels = np.full_like(labels, IGNORE)
    value, gradient = value_and_gradient(logits, labels, targets, known if partly else None, config)
    assert np.isfinite(value)
    np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("kind", ["classes", "regions"])
def test_samples_that_annotate_nothing(kind):
    """With classes all is background: its Dice and cross-entropy are at their best. Regions have nothing to learn."""
    logits, labels, targets, known = sample(kind, ignore=False)
    nothing = np.zeros_like(known)
    nothing[:, 0] = True
    expected = -1 if kind == "classes" else 0
    value, gradient = value_and_gradient(logits, np.zeros_like(labels), targets, nothing)
    assert float(value) == pytest.approx(expected, abs=1e-5)
    np.testing.assert_allclose(gradient, 0, atol=1e-8)
    value, gradient = value_and_gradient(logits, labels, targets, nothing, LossConfig(background=False))
    assert float(value) == 0
    np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("kind", ["classes", "regions"])
def test_a_region_that_a_sample_does_not_know_is_left_alone(kind):
    """An unknown region has no gradient; an unknown class has one only through the background."""
    logits, labels, targets, known = sample(kind, ignore=False)
    _, gradient = value_and_gradient(logits, labels, targets, known)
    unknown = ~targets.annotated(known)
    found = np.abs(gradient).max((1, 2, 3))
    assert (found[~unknown] > 0).all()
    assert (found[unknown] == 0).all() == (kind == "regions")


@pytest.mark.parametrize("sure", [200.0, -200.0])
@pytest.mark.parametrize(("kind", "ignore"), PAIRS)
def test_gradients_are_finite_where_the_network_is_sure(kind, ignore, sure):
    logits, labels, targets, known = sample(kind, ignore=ignore)
    value, gradient = value_and_gradient(sure * np.sign(logits), labels, targets, known)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()
    half = jnp.asarray(logits, jnp.bfloat16)
    assert value_and_gradient(half, labels, targets, known)[0].dtype == jnp.float32


@pytest.mark.parametrize(("kind", "ignore"), PAIRS)
def test_all_annotated_is_the_same_as_nothing_said(kind, ignore):
    logits, labels, targets, known = sample(kind, ignore=ignore)
    expected, said = (value_and_gradient(logits, labels, targets, every) for every in (None, np.ones_like(known)))
    assert float(said[0]) == pytest.approx(float(expected[0]), rel=1e-6)
    np.testing.assert_allclose(said[1], expected[1], rtol=1e-4, atol=1e-9)


def test_maps_of_what_is_left_out_are_zero():
    logits, labels, targets, known = sample("classes", ignore=True)
    maps = [make(logits, labels, targets, known) for make in (soft_maps, hard_maps)]
    maps.append(truth_maps(labels, K, targets, known))
    for each in maps:
        np.testing.assert_array_equal(np.asarray(each)[labels == IGNORE], 0)
        np.testing.assert_allclose(np.asarray(each)[labels != IGNORE].sum(-1), 1, rtol=1e-6)
        for row, found in zip(known, each, strict=True):
            np.testing.assert_array_equal(found[..., ~row], 0)


def test_the_predicted_number_of_regions_is_the_last_in_order():
    logits = np.array([[-1, -1, -1], [2, 5, -1], [1, -3, 0.1], [-1, 1, 0]], np.float32)
    np.testing.assert_array_equal(predicted_numbers(logits, Targets(((1, 2), (2,), (3,)))), [0, 2, 3, 2])
    numbers = predicted_numbers(logits, CLASSES)
    assert numbers.dtype == np.uint8
    np.testing.assert_array_equal(numbers, [0, 1, 0, 1])


def test_losses_from_outside_see_labels_as_they_are_stored():
    logits, labels, targets, known = sample("classes", ignore=True)
    seen = []

    def own(logits, labels):
        seen.append((logits, labels))
        return jnp.mean(logits)

    config = LossConfig(dice=0.0, extra=(("own", 2.0),))
    total, _ = total_loss([logits], [labels], config, {"own": own}, targets=targets, known=known)
    assert float(total) == pytest.approx(2 * logits.mean(), rel=1e-4, abs=1e-6)
    assert seen[0][0] is logits
    assert seen[0][1] is labels


# ---- what it costs where all is as usual ----


def usual_loss(logits, labels):
    """The Dice loss and cross-entropy of classes, everything labelled: what is computed, and nothing besides."""
    probabilities = jax.nn.softmax(logits.astype(jnp.float32))
    truth = jax.nn.one_hot(labels, logits.shape[-1])
    overlap, true = jnp.sum(probabilities * truth, (0, 1, 2, 3)), jnp.sum(truth, (0, 1, 2, 3))
    scores = (2 * overlap + EPS) / (jnp.sum(probabilities, (0, 1, 2, 3)) + true + EPS)
    dice = -jnp.mean(scores)
    logs = jax.nn.log_softmax(logits.astype(jnp.float32))
    entropy = -jnp.mean(jnp.sum(logs * jax.nn.one_hot(labels, logits.shape[-1]), axis=-1))
    return dice + entropy


def test_usual_losses_are_the_usual_programs():
    logits, labels, _, known = sample("classes", ignore=False)

    def text(loss, *arguments):
        def program(*arguments):
            return jax.value_and_grad(loss)(*arguments)

        return jax.jit(program).lower(*arguments).as_text()

    def ours(logits, labels, known=None, targets=CLASSES):
        options = {"targets": targets, "known": known}
        return dice_loss(logits, labels, **options) + cross_entropy_loss(logits, labels, **options)

    expected = text(usual_loss, logits, labels)
    assert text(ours, logits, labels) == expected
    assert text(ours, logits, labels, known) != expected
    assert text(lambda *pair: ours(*pair, targets=Targets(ignore=True)), logits, labels) != expected
