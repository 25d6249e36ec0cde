"""Checkpoints keep the newest and the best, restore to the bit, and say so when they are damaged."""

import json
import re
import shutil

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
    whole = {"params": state(1), "batch_stats": statistics, "optimizer": {"momentum": jnp.ones(7)}}
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


# Orbax leaves the reads behind the first that fails to a closed event loop, which complains when they are collected.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", ["a flipped bit", "cut", "empty"])
def test_no_damage_goes_unnoticed(tmp_path, damage):
    """Whichever file has it: the state is what was saved, or it is set aside and the checkpoint before counts."""
    checkpoints = Checkpoints(tmp_path / "run" / "c")
    for step in (1, 2):
        checkpoints.save(step, state(step), {"next_index": step}, dice=step / 10)
    checkpoints.close()
    placed = jax.jit(lambda: state(0), out_shardings=jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    rng = np.random.default_rng(0)
    files = [path for path in sorted((tmp_path / "run" / "c" / "2").rglob("*")) if path.stat().st_size]
    outcomes = set()
    for number, path in enumerate(path for path in files if path.is_file()):
        copy = tmp_path / str(number)
        shutil.copytree(tmp_path / "run", copy)
        damaged = bytearray(path.read_bytes())
        place = int(rng.integers(len(damaged)))
        if damage == "a flipped bit":
            damaged[place] ^= 1 << int(rng.integers(8))
        else:
            del damaged[place if damage == "cut" else 0 :]
        (copy / path.relative_to(tmp_path / "run")).write_bytes(damaged)
        try:
            again = Checkpoints(copy / "c")
        except UserError as error:  # of a note without which orbax opens none
            assert f"{copy}/c" in str(error)  # noqa: PT017 # either may be right
            continue
        again.set_damaged_aside()
        assert again.latest is not None
        restored, position = again.restore(again.latest, jax.eval_shape(placed))
        jax.tree.map(np.testing.assert_array_equal, restored, state(again.latest))
        assert position == {"next_index": again.latest}
        assert (copy / "damaged" / "2").exists() == (again.latest == 1)
        outcomes.add(again.latest)
        again.close()
    assert outcomes == {1, 2}  # some files only say again what others do


def test_a_damaged_array_is_told_in_one_line(tmp_path):
    """The first bytes of whatever is compressed: of an array that cannot be read orbax raises a bare Exception."""
    one = {"kernel": jnp.arange(2000.0)}
    checkpoints = Checkpoints(tmp_path / "c")
    checkpoints.save(1, {"params": one}, {})
    checkpoints.close()
    magic = b"\x28\xb5\x2f\xfd"  # of a Zstandard frame
    files = [(path, path.read_bytes()) for path in (tmp_path / "c/1/state").rglob("d/*")]
    frames = [(*file, match.start()) for file in files for match in re.finditer(re.escape(magic), file[1])]
    told = []
    for path, whole, start in frames:
        for place in range(start, start + 10):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :])
            again = Checkpoints(tmp_path / "c")
            try:
                restored, _ = again.restore_weights(1, one, {})
                np.testing.assert_array_equal(restored["kernel"], one["kernel"])  # the file says again what others do
            except UserError as error:
                told.append(str(error))
            again.close()
        path.write_bytes(whole)
    assert len(told) >= 10
    assert all(
        re.fullmatch(r"checkpoint .*c/1 .*: delete that folder, and the one before counts", line) for line in told
    )


def test_numbers_that_orbax_would_have_passed_on_are_noticed(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c")
    checkpoints.save(1, state(1), {})
    checkpoints.close()
    again = Checkpoints(tmp_path / "c")
    record = again._record(1)
    record["checksums"]["kernel"] ^= 1
    with pytest.raises(UserError, match=r"c/1 holds numbers that are not those saved, in kernel"):
        again._verify(1, state(1), record["checksums"])
    again.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # as above
@pytest.mark.parametrize(
    "note", [b"[]", b'{"init_timestamp_nsecs": "late"}', b'{"tree_metadata": 1}', b"3.5", b"{\xff"]
)
@pytest.mark.parametrize("name", ["_CHECKPOINT_METADATA", "state/_METADATA", "state/_sharding", "record/metadata"])
def test_orbaxs_own_notes_may_be_anything(tmp_path, name, note):
    checkpoints = Checkpoints(tmp_path / "c")
    checkpoints.save(3, state(3), {})
    checkpoints.close()
    (tmp_path / "c" / "3" / name).write_bytes(note)
    try:
        again = Checkpoints(tmp_path / "c")
        again.set_damaged_aside()
        restored, _ = again.restore(3, jax.eval_shape(lambda: state(0)))
    except UserError as error:
        assert str(tmp_path / "c") in str(error)  # noqa: PT017 # either may be right
    else:
        jax.tree.map(np.testing.assert_array_equal, restored, state(3))
        again.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # as above
@pytest.mark.parametrize("damage", ["left out", "misspelt"])
def test_an_array_that_orbax_no_longer_knows_of_is_noticed(tmp_path, damage):
    """By its own note of the tree: orbax then leaves the array as it was asked for."""
    checkpoints = Checkpoints(tmp_path / "run" / "c")
    for step in (1, 2):
        checkpoints.save(step, {"params": state(step)}, {})
    checkpoints.close()
    note = tmp_path / "run" / "c" / "2" / "state" / "_METADATA"
    tree = json.loads(note.read_bytes())
    (name,) = (name for name in tree["tree_metadata"] if "kernel" in name)
    array = tree["tree_metadata"].pop(name)
    if damage == "misspelt":
        tree["tree_metadata"] |= json.loads(json.dumps({name: array}).replace("kernel", "kermel"))
    note.write_text(json.dumps(tree), encoding="utf-8")
    again = Checkpoints(tmp_path / "run" / "c")
    told = r"checkpoint .*c/2 .*(kernel|kermel).*: delete that folder, and the one before counts"
    like = jax.eval_shape(lambda: state(0))
    with pytest.raises(UserError, match=told):
        again.restore(2, {"params": like})
    with pytest.raises(UserError, match=told):
        again.restore_weights(2, like, {})
    again.set_damaged_aside()
    assert again.latest == 1
    again.close()


def test_nothing_whole_is_left(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c")
    checkpoints.save(1, state(1), {})
    checkpoints.close()
    (tmp_path / "c" / "1" / "record" / "metadata").write_text("{}", encoding="utf-8")
    again = Checkpoints(tmp_path / "c")
    with pytest.raises(UserError, match=r"no whole checkpoint left, see .*damaged; .*start again in another --workdir"):
        again.set_damaged_aside()
    again.close()
