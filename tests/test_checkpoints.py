"""Checkpoints keep the newest and the best, restore to the bit, and say so when they are damaged."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from autocontext_jax.errors import UserError
from autocontext_jax.training.checkpoints import Checkpoints


def state(seed: int) -> dict[str, jax.Array]:
    key = jax.random.key(seed)
    return {"kernel": jax.random.normal(key, (3, 5)), "step": jnp.asarray(seed, jnp.int32)}


def test_keeps_the_newest_and_the_best(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c", keep=2)
    assert checkpoints.latest is None
    assert checkpoints.best is None
    for step, dice in ((1, 0.3), (2, 0.9), (3, float("nan")), (4, 0.5), (5, None)):
        checkpoints.save(step, state(step), {"next_index": step}, dice=dice)
    checkpoints.close()
    again = Checkpoints(tmp_path / "c", keep=2)
    assert (again.latest, again.best) == (5, 2)
    assert sorted(int(path.name) for path in (tmp_path / "c").iterdir()) == [2, 4, 5]
    restored, position = again.restore(2, jax.eval_shape(lambda: state(0)))
    jax.tree.map(np.testing.assert_array_equal, restored, state(2))
    assert position == {"next_index": 2}
    again.close()


@pytest.mark.parametrize("statistics", [{"mean": jnp.arange(3.0)}, {}])
def test_weights_are_restored_whatever_the_optimiser_was(tmp_path, statistics):
    whole = {"params": state(1), "statistics": statistics, "optimizer": {"momentum": jnp.ones(7)}}
    checkpoints = Checkpoints(tmp_path / "c")
    checkpoints.save(3, whole, {})
    for _ in range(2):  # by what saved it, and by another
        like = jax.eval_shape(lambda: (state(0), statistics))
        restored = checkpoints.restore_weights(3, *like)
        jax.tree.map(np.testing.assert_array_equal, restored, (state(1), statistics))
        checkpoints.close()
        checkpoints = Checkpoints(tmp_path / "c")
    checkpoints.close()


def test_without_validation_the_best_is_the_newest(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c")
    checkpoints.save(7, state(7), {})
    assert checkpoints.best == checkpoints.latest == 7
    checkpoints.close()


def test_saves_what_the_state_was_though_its_memory_is_given_away(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c")
    change = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf * 0 - 1, tree), donate_argnums=0)
    current = {"big": jnp.arange(2_000_000, dtype=jnp.float32)}
    checkpoints.save(1, current, {})
    jax.block_until_ready(change(current))
    checkpoints.close()
    again = Checkpoints(tmp_path / "c")
    restored, _ = again.restore(1, {"big": jax.ShapeDtypeStruct((2_000_000,), jnp.float32)})
    np.testing.assert_array_equal(restored["big"], np.arange(2_000_000, dtype=np.float32))
    again.close()


def test_a_damaged_checkpoint_is_named(tmp_path):
    # One leaf: with several, orbax leaves the reads behind the first failure to a closed event loop, which complains.
    one = {"kernel": state(1)["kernel"]}
    checkpoints = Checkpoints(tmp_path / "c")
    checkpoints.save(1, one, {})
    checkpoints.close()
    for path in (tmp_path / "c" / "1" / "state").rglob("*"):
        if path.is_file() and path.parent.name == "d":
            path.write_bytes(b"")
    again = Checkpoints(tmp_path / "c")
    with pytest.raises(UserError, match=r"checkpoint .*c/1 cannot be read .*delete that folder"):
        again.restore(1, jax.eval_shape(lambda: one))
    again.close()
