"""A trained model in use: whatever scan it is given, the mask lies on that scan, or one line says why not."""

import functools
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from small_model import (
    NETWORKS,
    SCAN,
    Scale,
    described,
    write_small_model,
)

import autocontext_jax as ac
from autocontext_jax.errors import UserError
from autocontext_jax.images import scans

pytestmark = pytest.mark.usefixtures("compiled_once")


@pytest.fixture
def file(tmp_path) -> Path:
    return write_small_model(tmp_path)


def test_a_loaded_model_has_these_weights_and_values(file):
    model = ac.load(file, networks=NETWORKS)
    assert model.classes == {"background": 0, "liver": 2}
    mask, maps = model.predict(SCAN, spacing=(1, 1, 1), probabilities=True, progress=False)
    assert set(np.unique(mask)) == {0, 2}
    np.testing.assert_array_equal(mask, 2 * maps.argmax(-1))
    np.testing.assert_allclose(maps.sum(-1), 1, atol=1e-5)
    # Level 2 by hand where a voxel lies inside: its own intensity and level 1's map of the same intensity.
    x = np.clip(SCAN / 100, -1, 1)
    p = 1 / (1 + np.exp(-(x + 0.25)))
    expected = 1 / (1 + np.exp(-(2 * x + 0.5 * p - 0.5)))
    assert np.abs(maps[2:4, 3:6, 3:7, 1] - expected[2:4, 3:6, 3:7]).max() < 0.05  # level 1 sees averages of 8 voxels
    np.testing.assert_array_equal(mask, model.predict(SCAN, spacing=(1, 1, 1), progress=False))


def test_options_are_checked(file):
    assert ac.load(file, networks=NETWORKS, tile=12).description.tiling.tile == (12,)
    with pytest.raises(UserError, match=r"option tyle is unknown; expected one of .*tile"):
        ac.load(file, networks=NETWORKS, tyle=12)
    with pytest.raises(UserError, match=r"margin is -1; expected a number from 0"):
        ac.load(file, networks=NETWORKS, margin=-1)


def test_arrays_are_read_in_their_own_orientation(file):
    """A scan that is turned in memory gives a mask that is turned the same way."""
    model = ac.load(file, networks=NETWORKS)
    rng = np.random.default_rng(0)
    scan = rng.integers(-150, 150, (6, 9, 10)).astype(np.float32)
    upright = model.predict(scan, spacing=(3, 1, 2), progress=False)
    turned = scan.transpose(2, 0, 1)[::-1]
    direction = np.zeros((3, 3))
    direction[2, 0], direction[0, 1], direction[1, 2] = -1, 1, 1  # its axes run to the right, up and backwards
    mask = model.predict(turned, spacing=(2, 3, 1), direction=direction, progress=False)
    np.testing.assert_array_equal(mask, upright.transpose(2, 0, 1)[::-1])
    np.testing.assert_array_equal(model.predict(jnp.asarray(scan), spacing=(3, 1, 2), progress=False), upright)


@pytest.mark.parametrize(
    ("scan", "options", "message"),
    [
        (SCAN, {}, "without its spacing"),
        (SCAN[0], {"spacing": (1, 1, 1)}, r"shape \(9, 10\); expected a scan"),
        (SCAN, {"spacing": (1, 1)}, r"spacing of the array is \(1, 1\)"),
        (SCAN, {"spacing": (1, 0, 1)}, "above 0"),
        (SCAN > 0, {"spacing": (1, 1, 1)}, "type bool"),
        (SCAN, {"spacing": (1, 1, 1), "direction": np.zeros((3, 3))}, "unit vectors|right angles"),
        (SCAN, {"spacing": (1, 1, 1), "direction": [[1, 1, 0], [0, 1, 0], [0, 0, 1]]}, "right angles"),
        (np.full((4, 4, 4), np.nan), {"spacing": (1, 1, 1)}, "64 voxels that are not finite"),
        ("scan.nii.gz", {"spacing": (1, 1, 1)}, "the scan has its own"),
        (SCAN, {"spacing": (1, 1, 1), "output": "x.mhd"}, r"x\.mhd cannot be written"),
        (SCAN, {"spacing": (1, 1, 1), "output": "x.png"}, r"x\.png cannot hold a mask of \d+ slices"),
    ],
)
def test_scans_that_cannot_be_predicted_are_refused(file, scan, options, message):
    model = ac.load(file, networks=NETWORKS)
    with pytest.raises(UserError, match=message):
        model.predict(scan, progress=False, **options)


def test_a_scan_is_not_overwritten_by_its_mask(file, tmp_path, caplog):
    model = ac.load(file, networks=NETWORKS)
    path = tmp_path / "scan.nii.gz"
    scans.write_scan(path, SCAN, (1, 1, 1))
    before = path.read_bytes()
    with pytest.raises(UserError, match="would overwrite the scan"):
        model.predict(path, output=str(tmp_path / "." / "scan.nii.gz"), progress=False)
    with pytest.raises(UserError, match="all masks would go there"):
        list(model.predict_many([path], output=tmp_path / "mask.nii.gz"))
    assert path.read_bytes() == before
    assert not caplog.messages
    model.predict(np.random.default_rng(0).random((6, 9, 10)), spacing=(1, 1, 1), progress=False)
    assert caplog.messages == ["the scan does not look like CT in HU: its values are 0 to 1"]


def test_home_folders_and_odd_paths(file, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir("/")
    model = ac.load("~/scale.autocontext", networks=NETWORKS)
    model.save("~/new/again.autocontext")
    scans.write_scan(tmp_path / "scan.nii.gz", SCAN, (1, 1, 1))
    model.predict("~/scan.nii.gz", output="~/mask.nii.gz", progress=False)
    assert (tmp_path / "mask.nii.gz").exists()
    for path in ("~nobody_of_this_name/x", "x" * 300, "/proc/none"):
        with pytest.raises(UserError, match=r"does not exist|expected a path"):
            ac.load(path)
    for path in ("/proc/none/y.autocontext", tmp_path / "scan.nii.gz" / "y.autocontext"):
        with pytest.raises(UserError, match="cannot be written"):
            model.save(path)


@pytest.mark.parametrize("kind", ["<i2", ">i2", ">f4", "<f8", "f2", "g", "u1", "i8"])
def test_arrays_of_every_kind_of_number(file, kind):
    model = ac.load(file, networks=NETWORKS)
    scan = (SCAN % 100).astype(np.int16)
    expected = model.predict(scan, spacing=(1, 1, 1), progress=False)
    np.testing.assert_array_equal(model.predict(scan.astype(kind), spacing=np.ones(3), progress=False), expected)


def test_options_may_be_numbers_of_numpy(file):
    model = ac.load(file, networks=NETWORKS, tile=np.int64(12), margin=np.float32(4), flip=np.bool_(False))
    assert (model.description.tiling.tile, model.description.tiling.margin) == ((12,), 4)
    sizes = ac.load(file, networks=NETWORKS, tile=np.array([4, 8, 12]))
    assert sizes.description.tiling.tile == (4, 8, 12)
    with pytest.raises(UserError, match=r"predict\.tile is \(4, 8, 10\); expected multiples of \(4, 4, 4\)"):
        ac.load(file, networks=NETWORKS, tile=[4, 8, 10])
    with pytest.raises(UserError, match="option checkpoint is given with a model file"):
        ac.load(file, networks=NETWORKS, checkpoint="best")


def test_the_files_own_tile_is_the_default_where_results_depend_on_it(file):
    assert ac.load(file, networks=NETWORKS, tile=0).description.tiling.tile == (0,)  # batch norm: boxes
    own = described(file, model__network__norm="instance", model__network__depth=3)
    assert [ac.load(own, networks=NETWORKS, tile=tile).description.tiling.tile for tile in (0, 12)] == [(8,), (12,)]
    with pytest.raises(UserError, match=r"tile is \(4, 4, 4\); expected a larger one, since model\.norm is instance"):
        ac.load(own, networks=NETWORKS, tile=4)


def test_names_of_the_package_are_not_taken_over(file):
    with pytest.raises(UserError, match="networks holds the name 'unet', which is the package's own"):
        ac.load(file, networks={"unet": Scale})


def test_a_network_may_be_anything_that_makes_one(file):
    model = ac.load(file, networks={"Scale": functools.partial(Scale)})
    assert model.predict(SCAN, spacing=(1, 1, 1), progress=False).shape == SCAN.shape


def in_mm(file: Path) -> Path:
    return described(
        file, model__levels={"factors": [2, 1], "unit": "mm", "finest_spacing": [2, 2, 2], "spatial_dims": 3}
    )


def test_a_model_in_mm_sees_every_scan_at_its_own_spacing(file, caplog):
    model = ac.load(in_mm(file), networks=NETWORKS)
    smooth = np.add.outer(np.add.outer(np.sin(np.arange(24) / 4), np.cos(np.arange(26) / 5)), np.sin(np.arange(22) / 3))
    scan = (60 * smooth).astype(np.int16)
    fine = scan.repeat(2, 0).repeat(2, 1).repeat(2, 2)
    found = model.predict(scan, spacing=(2, 2, 2), progress=False)
    finer = model.predict(fine, spacing=(1, 1, 1), progress=False)
    assert (finer[::2, ::2, ::2] == found).mean() > 0.97  # but for voxels at an edge
    assert not [message for message in caplog.messages if "spacing" in message]


def test_a_model_in_voxels_warns_of_another_spacing(file, caplog):
    model = ac.load(file, networks=NETWORKS)
    for spacing, warned in (((1, 1, 1), False), ((2.1, 1, 1.5), False), ((2.5, 1, 1), True), ((1, 1, 0.5), True)):
        caplog.clear()
        model.predict(SCAN * 7, spacing=spacing, progress=False)
        assert [("outside that of the training scans" in message) for message in caplog.messages] == [True] * warned
