"""The model file: the same masks wherever it goes, one line for whatever is wrong with it, and nothing in it is run."""

import functools
import json
import pickle
import shutil
import zipfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

import autocontext_jax as ac
from autocontext_jax.data.store.level_grids import LevelGrids
from autocontext_jax.errors import UserError
from autocontext_jax.images import scans
from autocontext_jax.inference.model import load_file
from autocontext_jax.inference.model_file import (
    CARD,
    DESCRIPTION,
    WEIGHTS,
    ClassDescription,
    Description,
    NetworkDescription,
    Tiling,
    _checksum,
    read_model,
    write_model,
)
from autocontext_jax.models.pyramid import PyramidConfig


class Scale(nnx.Module):
    """The smallest network: a matrix product, dropout between."""

    def __init__(self, inputs, classes, config, *, rngs):
        self.matrix = nnx.Linear(inputs, classes, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.matrix(self.dropout(x))


CLASSES = (ClassDescription("background", 0), ClassDescription("liver", 2, (1, 2, 3), "SCT:10200004:Liver"))
DESCRIPTION_OF_SCALE = Description(
    name="scale",
    license="CC0-1.0",
    classes=CLASSES,
    network=NetworkDescription(name="Scale", depth=1),
    pyramid=PyramidConfig(window=(-100.0, 100.0)),
    levels=LevelGrids((2.0, 1.0)),
    trained_spacing=((1.0, 1.0, 1.0), (2.0, 2.0, 2.0)),
    tiling=Tiling(8, 0.5, 16, flip=False),
    training={"steps": 3},
    evaluation={},
)
WEIGHTS_OF_SCALE = {
    "level_1/matrix/kernel": np.array([[0, 1]], np.float32),
    "level_1/matrix/bias": np.array([0, 0.25], np.float32),
    "level_2/matrix/kernel": np.array([[0, 2], [0, 0], [0, 0.5]], np.float32),
    "level_2/matrix/bias": np.array([0, -0.5], np.float32),
}
SCAN = np.linspace(-150, 150, 6 * 9 * 10).reshape(6, 9, 10).astype(np.int16)
NETWORKS = {"Scale": Scale}


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "scale.autocontext"
    write_model(path, DESCRIPTION_OF_SCALE, WEIGHTS_OF_SCALE, "# scale\n")
    return path


def repacked(file: Path, **changed: bytes | None) -> Path:
    """The file with other parts, by the beginning of their names; None leaves a part out."""
    with zipfile.ZipFile(file) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    for start, content in changed.items():
        name = next((name for name in parts if name.startswith(start)), start)
        parts[name] = content  # type: ignore[assignment]
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in parts.items():
            if content is not None:
                archive.writestr(zipfile.ZipInfo(name), content)
    return file


def described(file: Path, **changed) -> Path:
    """The file with another description, whose checksum is right."""
    content = json.loads(zipfile.ZipFile(file).read(DESCRIPTION))
    content.pop("checksum")
    for key, value in changed.items():
        *path, last = key.split("__")
        inner = content
        for name in path:
            inner = inner[name]
        inner[last] = value
    return repacked(file, model=json.dumps(content | {"checksum": _checksum(content)}).encode())


def test_what_was_written_is_read(file):
    description, weights = read_model(file)
    assert description == DESCRIPTION_OF_SCALE
    assert weights.keys() == WEIGHTS_OF_SCALE.keys()
    for name, array in weights.items():
        np.testing.assert_array_equal(array, WEIGHTS_OF_SCALE[name])
    with zipfile.ZipFile(file) as archive:
        assert archive.testzip() is None
        assert archive.namelist() == [DESCRIPTION, WEIGHTS, CARD]
        safetensors.numpy.load(archive.read(WEIGHTS))  # as any other program reads it
    before = file.read_bytes()
    write_model(file, DESCRIPTION_OF_SCALE, WEIGHTS_OF_SCALE, "# scale\n")
    assert file.read_bytes() == before


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


def test_a_saved_model_is_the_same(file, tmp_path):
    model = ac.load(file, networks=NETWORKS)
    model.save(tmp_path / "again.autocontext")
    description, weights = read_model(tmp_path / "again.autocontext")
    assert description.name == "again"
    assert (description.training, description.classes) == (DESCRIPTION_OF_SCALE.training, CLASSES)
    for name, array in weights.items():
        np.testing.assert_array_equal(array, WEIGHTS_OF_SCALE[name])
    card = zipfile.ZipFile(tmp_path / "again.autocontext").read(CARD).decode()
    assert "| 2 | liver | #010203 | SCT:10200004:Liver |" in card
    assert "CC0-1.0" in card


def test_a_network_from_outside_is_named_and_never_imported(file):
    with pytest.raises(UserError, match=r'needs the network Scale.*load\(PATH, networks=\{"Scale": Scale\}\)'):
        ac.load(file)
    with pytest.raises(UserError, match="needs the network os:system"):
        ac.load(described(file, model__network__name="os:system"))


def test_another_network_of_that_name_is_refused(file):
    class Wider(Scale):
        def __init__(self, inputs, classes, config, *, rngs):
            super().__init__(inputs + 1, classes, config, rngs=rngs)

    with pytest.raises(UserError, match=r"array level_1/matrix/kernel is float32\[1, 2\]; expected float32\[2, 2\]"):
        ac.load(file, networks={"Scale": Wider})


class Trap:
    """Unpickled, it leaves a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickle_and_a_python_file_in_it_are_not_executed(file, tmp_path, monkeypatch):
    trap = tmp_path / "executed"
    code = f"import pathlib; pathlib.Path({str(trap)!r}).touch()"
    planted = {name: pickle.dumps(Trap(trap)) for name in ("data.pkl", "weights.pt")}
    planted |= {name: code.encode() for name in ("__init__.py", "model.py", "Scale.py", "sitecustomize.py")}
    monkeypatch.chdir(tmp_path)
    model = ac.load(repacked(file, **planted), networks=NETWORKS)
    model.predict(SCAN, spacing=(1, 1, 1), progress=False)
    assert not trap.exists()
    for name in ("model", "weights", "README"):
        with pytest.raises(UserError, match="is no whole model file"):
            ac.load(repacked(Path(shutil.copy(file, tmp_path / "b.autocontext")), **{name: pickle.dumps(Trap(trap))}))
    assert not trap.exists()


@pytest.mark.parametrize("part", ["model", "weights", "README"])
def test_a_missing_part_is_named(file, part):
    with pytest.raises(UserError, match=rf"0 parts of the name {part}.*export it again"):
        read_model(repacked(file, **{part: None}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, r"has the format 2; expected 1: use the version of autocontext_jax"),
        (
            {"model__levels__factors": [3, 1]},
            r"key model\.levels\.factors is \(3\.0, 1\.0\); expected factors that halve",
        ),
        ({"model__classes": []}, "expected 2 to 256 classes"),
        ({"model__classes__1__value": 0}, "classes of different values"),
        ({"model__classes__1__color": [1, 2, 300]}, "three numbers from 0 to 255"),
        ({"model__network__depth": "4"}, r"key model\.network\.depth is '4'; expected a whole number"),
        ({"model__tiling__tile": 9}, "tile is 9; expected a multiple of 4"),
        ({"model__tiling__flip": True}, "has not learned from exchanged sides"),
        ({"model__tiling__flip_classes": [0, 0]}, "a permutation of the classes"),
        ({"model__tiling__overlap": 2.0}, r"key model\.tiling\.overlap is 2\.0; expected a fraction"),
        ({"model__tiling__plane": 0}, r"key model\.tiling\.plane is 0; expected a number from 1"),
        ({"model__planted": 1}, r"key model\.planted is unknown"),
        ({"model": 3}, "expected a section"),
        ({"parts": None}, "is not what was written"),
    ],
)
def test_a_wrong_description_is_told_in_one_line(file, change, message):
    # Lists are reached by their numbers.
    numbered = {key: value for key, value in change.items() if "__1__" in key}
    if numbered:
        ((key, value),) = numbered.items()
        classes = [{"name": c.name, "value": c.value, "color": list(c.color), "code": c.code} for c in CLASSES]
        classes[1][key.rpartition("__")[2]] = value
        change = {"model__classes": classes}
    with pytest.raises(UserError, match=message):
        load_file(described(file, **change), NETWORKS, {})


def test_damage_is_told_in_one_line(file, tmp_path):
    whole = file.read_bytes()
    for end in (0, 10, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:end])
        with pytest.raises(UserError, match="is no whole model file"):
            read_model(file)
    for place in range(0, len(whole) - 300, 37):  # before zip's own list at the end, parts of which nobody reads
        changed = bytearray(whole)
        changed[place] ^= 1
        file.write_bytes(changed)
        try:
            description, weights = read_model(file)
        except UserError:
            continue
        assert description == DESCRIPTION_OF_SCALE, place
        assert all((weights[name] == array).all() for name, array in WEIGHTS_OF_SCALE.items())
    with pytest.raises(UserError, match="does not exist"):
        ac.load(tmp_path / "none.autocontext")
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in (DESCRIPTION, WEIGHTS, CARD):
            archive.writestr(name, b"0" * 10_000_000)
    with pytest.raises(UserError, match="is packed"):
        read_model(file)


def test_options_are_checked(file):
    assert ac.load(file, networks=NETWORKS, tile=12).description.tiling.tile == 12
    with pytest.raises(UserError, match=r"option tyle is unknown; expected one of .*tile"):
        ac.load(file, networks=NETWORKS, tyle=12)
    with pytest.raises(UserError, match=r"predict\.overlap is 1\.5; expected a fraction"):
        ac.load(file, networks=NETWORKS, overlap=1.5)


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
    model = ac.load(file, networks=NETWORKS, tile=np.int64(12), overlap=np.float32(0.25), flip=np.bool_(False))
    assert (model.description.tiling.tile, model.description.tiling.overlap) == (12, 0.25)
    with pytest.raises(UserError, match="option checkpoint is given with a model file"):
        ac.load(file, networks=NETWORKS, checkpoint="best")


def test_names_of_the_package_are_not_taken_over(file):
    with pytest.raises(UserError, match="networks holds the name 'unet', which is the package's own"):
        ac.load(file, networks={"unet": Scale})


def test_a_network_may_be_anything_that_makes_one(file):
    model = ac.load(file, networks={"Scale": functools.partial(Scale)})
    assert model.predict(SCAN, spacing=(1, 1, 1), progress=False).shape == SCAN.shape


def test_arrays_that_numpy_lacks_are_refused_when_they_are_written(tmp_path):
    weights = {"level_1/matrix/kernel": np.asarray(jnp.ones((1, 2), jnp.bfloat16))}
    with pytest.raises(UserError, match=r"level_1/matrix/kernel is bfloat16; expected float32"):
        write_model(tmp_path / "x.autocontext", DESCRIPTION_OF_SCALE, weights, "")


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
