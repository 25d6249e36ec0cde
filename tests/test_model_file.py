"""The model file: the same masks wherever it goes, one line for whatever is wrong with it, and nothing in it is run."""

import dataclasses
import pickle
import shutil
import zipfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from small_model import (
    CLASSES,
    DESCRIPTION_OF_SCALE,
    NETWORKS,
    SCAN,
    WEIGHTS_OF_SCALE,
    Scale,
    described,
    repacked,
    write_small_model,
)

import autocontext_jax as ac
from autocontext_jax.errors import InvalidField, UserError
from autocontext_jax.inference.description import ClassDescription, Tiling
from autocontext_jax.inference.model import load_file
from autocontext_jax.inference.model_file import CARD, DESCRIPTION, WEIGHTS, read_model, write_model
from autocontext_jax.inference.tiling import PredictorConfig
from autocontext_jax.jobs.saved_config import config_of_model


@pytest.fixture
def file(tmp_path) -> Path:
    return write_small_model(tmp_path)


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
        ({"model__tiling__tile": 9}, r"tile is \(9, 9, 9\); expected multiples of \(4, 4, 4\)"),
        ({"model__tiling__flip": True}, "has not learned from mirrored patches"),
        ({"model__tiling__flip_classes": [0, 0]}, "a permutation of the classes"),
        ({"model__tiling__flip_axes": "zx"}, "a permutation of the classes"),
        ({"model__tiling__flip_axes": "xz"}, r"key model\.tiling\.flip_axes is 'xz'; expected some of the letters"),
        ({"model__tiling__flip_axes": True}, r"key model\.tiling\.flip_axes is True; expected a text"),
        ({"model__tiling__margin": -2}, r"key model\.tiling\.margin is -2; expected a number from 0"),
        ({"model__network__norm": "group", "model__tiling__tile": 0}, "expected a tile with the norm group"),
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


def test_arrays_that_numpy_lacks_are_refused_when_they_are_written(tmp_path):
    weights = {"level_1/matrix/kernel": np.asarray(jnp.ones((1, 2), jnp.bfloat16))}
    with pytest.raises(UserError, match=r"level_1/matrix/kernel is bfloat16; expected float32"):
        write_model(tmp_path / "x.autocontext", DESCRIPTION_OF_SCALE, weights, "")


@pytest.mark.parametrize("members", [[(), (1,), ()], [(1,), (1, 2), (2,)], [(), (), (2,)]])
def test_members_of_some_regions_alone_are_refused(members):
    names = ("background", "whole", "core")
    classes = tuple(ClassDescription(*each) for each in zip(names, range(3), [()] * 3, [""] * 3, members, strict=True))
    with pytest.raises(InvalidField, match="members of all classes but the background, or of none"):
        dataclasses.replace(DESCRIPTION_OF_SCALE, classes=classes)


def test_a_model_of_regions_predicts_by_itself(tmp_path):
    """Two sigmoids, no output of the background; a mask shows the last region, with its value."""
    classes = (
        ClassDescription("background", 0),
        ClassDescription("whole", 7, members=(7, 420)),
        ClassDescription("core", 420, members=(420,)),
    )
    description = dataclasses.replace(DESCRIPTION_OF_SCALE, classes=classes)
    weights = WEIGHTS_OF_SCALE | {"level_2/matrix/bias": np.array([0.25, -0.5], np.float32)}
    weights["level_2/matrix/kernel"] = np.array([[1, 2], [0, 0], [0, 0.5]], np.float32)
    write_model(tmp_path / "regions.autocontext", description, weights, "# regions\n")
    model = ac.load(tmp_path / "regions.autocontext", networks=NETWORKS)
    assert model.description.regions
    assert model.classes == {"background": 0, "whole": 7, "core": 420}
    mask, maps = model.predict(SCAN, spacing=(1, 1, 1), probabilities=True, progress=False)
    assert (maps.shape, mask.dtype) == ((*SCAN.shape, 2), np.uint16)
    whole, core = np.moveaxis(maps > 0.5, -1, 0)
    np.testing.assert_array_equal(mask, np.where(core, 420, np.where(whole, 7, 0)))
    assert set(np.unique(mask)) == {0, 7, 420}
    np.testing.assert_array_equal(mask, model.predict(SCAN, spacing=(1, 1, 1), progress=False))
    model.save(tmp_path / "again.autocontext")
    assert read_model(tmp_path / "again.autocontext")[0].classes == classes
    card = zipfile.ZipFile(tmp_path / "again.autocontext").read(CARD).decode()
    assert "The classes are regions" in card


def test_files_from_before_there_were_regions_are_read(file):
    classes = [{"name": c.name, "value": c.value, "color": list(c.color), "code": c.code} for c in CLASSES]
    assert read_model(described(file, model__classes=classes))[0] == DESCRIPTION_OF_SCALE


def test_files_from_before_tiles_were_boxes_are_read(file):
    tiling = {"tile": 8, "overlap": 0.5, "plane": 16, "flip": False, "flip_classes": []}
    model = load_file(described(file, model__tiling=tiling), NETWORKS, {})
    found = model.description.tiling
    assert (found.tile, found.margin, found.crop_to_body) == ((8,), PredictorConfig.margin, False)
    mask = model.predict(SCAN, spacing=(1, 1, 1), progress=False)
    for tile, same in (([8, 8, 8], True), ([4, 8, 12], False)):
        model = load_file(described(file, model__tiling=tiling | {"tile": tile}), NETWORKS, {})
        assert model.description.tiling.tile == tuple(tile)
        assert np.array_equal(mask, model.predict(SCAN, spacing=(1, 1, 1), progress=False)) or not same


@pytest.mark.parametrize("flip", [False, True])
def test_files_from_before_axes_had_names_mirror_left_and_right(file, flip):
    """Classes that change sides with it show it: both then have one half everywhere."""
    tiling = {"tile": 8, "margin": 2, "crop_to_body": False, "flip": flip, "flip_classes": [1, 0]}
    description, _ = read_model(described(file, model__tiling=tiling))
    assert (description.tiling.flip, description.tiling.flip_axes) == (flip, "x")
    assert config_of_model(file).augmentation.flip == "x"
    for options in ({}, {"flip": not flip}):
        model = load_file(file, NETWORKS, options)
        _, maps = model.predict(SCAN, spacing=(1, 1, 1), probabilities=True, progress=False)
        assert (np.abs(maps - 0.5).max() < 1e-3) == model.description.tiling.flip == options.get("flip", flip)
    tiling["flip_classes"] = []
    with pytest.raises(UserError, match="has not learned from mirrored patches"):
        load_file(described(file, model__tiling=tiling | {"flip": True}), NETWORKS, {})
    assert read_model(described(file, model__tiling=tiling | {"flip": False}))[0].tiling.flip_axes == ""


def test_regions_change_sides_without_the_background(tmp_path):
    classes = (
        ClassDescription("background", 0),
        *(ClassDescription(n, v, members=(v,)) for n, v in (("a", 1), ("b", 2))),
    )
    tiling = Tiling((8,), 2, crop_to_body=False, flip=True, flip_classes=(0, 2, 1), flip_axes="zyx")
    description = dataclasses.replace(DESCRIPTION_OF_SCALE, classes=classes, tiling=tiling)
    write_model(tmp_path / "m.autocontext", description, WEIGHTS_OF_SCALE, "")
    assert read_model(tmp_path / "m.autocontext")[0] == description
    both, one = (
        load_file(tmp_path / "m.autocontext", NETWORKS, {"flip": flip}).predict(
            SCAN, spacing=(1, 1, 1), probabilities=True, progress=False
        )[1]
        for flip in (True, False)
    )
    assert np.abs(one[..., 0] - one[..., 1]).max() > 0.2
    np.testing.assert_allclose(both[..., 0], both[..., 1], atol=1e-3)
