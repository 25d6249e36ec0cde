"""Held-out patches: what the validation step gets, and the names of what it measured."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from autocontext_jax.training.dice import overlap_counts
from autocontext_jax.training.sharding import batch_sharding, make_mesh
from autocontext_jax.training.state import Metrics
from autocontext_jax.training.targets import CLASSES, Targets
from autocontext_jax.training.validation import validate


def batches(known: list[np.ndarray | None]) -> list[dict]:
    """One level of noise; its images are the logits' seeds."""
    rng = np.random.default_rng(0)
    shape = (2, 4, 4, 4)
    made = [{"images": (np.full(shape, n, np.float32),), "labels": (rng.integers(0, 3, shape),)} for n in range(2)]
    return [batch | ({} if some is None else {"known": some}) for batch, some in zip(made, known, strict=True)]


def validated(held_out: list[dict], targets: Targets, classes: list[str]):
    """The values, and the batches that the step got."""
    fed = []

    def step(state, batch):
        fed.append(batch)
        seed = int(batch.images[0][0, 0, 0, 0])
        logits = jax.random.normal(jax.random.key(seed), (2, 4, 4, 4, 2 if targets.regions else 3))
        counts = overlap_counts(logits, batch.labels[0], targets=targets, known=batch.known)
        return Metrics(jnp.float32(seed), jnp.full(1, seed, jnp.float32), counts[None], jnp.zeros(())), (logits[:, 2],)

    sharding = batch_sharding(make_mesh(2))
    values, _ = validate(step, None, held_out, sharding, [2], classes)
    return values, fed


@pytest.mark.parametrize("regions", [(), ((1, 2), (2,))], ids=["classes", "regions"])
def test_what_a_case_annotates_goes_with_its_patches(regions):
    known = [np.array([[1, 1, 0], [1, 1, 0]], bool), np.array([[1, 1, 0], [1, 0, 0]], bool)]
    targets = Targets(regions) if regions else CLASSES
    values, fed = validated(batches(known), targets, ["liver", "spleen"])
    for batch, expected in zip(fed, known, strict=True):
        np.testing.assert_array_equal(batch.known, expected)
        assert batch.known.dtype == bool
    assert values["validation_loss"] == 0.5
    assert values["validation_dice_level_2_liver"] == values["validation_dice_level_2"]
    assert "validation_dice_level_2_spleen" not in values  # no held-out case annotates it
    every, fed = validated(batches([None, None]), targets, ["liver", "spleen"])
    assert [batch.known for batch in fed] == [None, None]
    assert every["validation_dice_level_2_spleen"] > 0
    assert every["validation_dice_level_2_liver"] != values["validation_dice_level_2_liver"]
    said, fed = validated([batch | {"known": None} for batch in batches([None, None])], targets, ["liver", "spleen"])
    assert [batch.known for batch in fed] == [None, None]
    assert said == every
