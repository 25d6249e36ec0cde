"""Configurations: the shipped ones, the typed tree, refusals, and what a run folder keeps of them."""

import ast
import dataclasses
import json
import math
import runpy
from pathlib import Path

import jax
import pytest
from flax import nnx

from autocontext_jax.data.augmentation_ranges import AugmentationConfig, IntensityRanges, SpatialRanges
from autocontext_jax.data.labels import LabelSpec
from autocontext_jax.errors import UserError
from autocontext_jax.files import write_json
from autocontext_jax.images.spec import CT
from autocontext_jax.jobs import config_files as configuration
from autocontext_jax.jobs.config_files import default_config, from_config_dict, to_config_dict
from autocontext_jax.jobs.restore import make_model
from autocontext_jax.jobs.run_config import RunConfig, config_from_dict
from autocontext_jax.models.unet import UNet
from autocontext_jax.sections import as_dict, flat_keys

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.py"))


def changed(**values):
    """The defaults with dotted keys set; dots are written as double underscores."""
    config = default_config()
    with config.ignore_type():  # so that our own check is the one that is seen
        config.update_from_flattened_dict({key.replace("__", "."): value for key, value in values.items()})
    return from_config_dict(config)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_are_good(path):
    page = runpy.run_path(str(path))
    config = page["get_config"]()
    assert isinstance(from_config_dict(config), RunConfig)
    assert f"--config configs/{path.name}" in page["__doc__"]


def test_there_is_a_quickstart():
    assert "quickstart" in [path.stem for path in CONFIGS]


def test_the_typed_tree_survives_the_way_through_a_config_dict_and_json():
    config = changed(augmentation__flip_pairs=("a=b",), levels__finest_spacing=(2.5, 1, 1), seed=3)
    assert from_config_dict(to_config_dict(config)) == config
    assert config_from_dict(json.loads(json.dumps(as_dict(config)))) == config
    assert config.levels.finest_spacing == (2.5, 1.0, 1.0)


def test_nothing_can_change_a_configuration():
    config = RunConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.train.steps = 1


@pytest.mark.parametrize(
    ("section", "name", "nearest"), [("optimizer", "learning_rte", "learning_rate"), ("train", "step", "steps")]
)
def test_a_misspelt_key_in_a_config_file_is_refused_and_the_nearest_named(section, name, nearest):
    config = default_config()
    with pytest.raises(AttributeError, match=f'Did you mean "{nearest}"'):
        setattr(config[section], name, 1.0)


def test_keys_that_another_key_decides_are_no_keys():
    keys = flat_keys(as_dict(RunConfig()))
    assert "levels.spatial_dims" in keys
    assert not {"model.spacing", "pyramid.spacing", "pyramid.classes", "pyramid.levels"} & set(keys)


def test_augmentation_ranges_follow_their_keys():
    still = AugmentationConfig(rotation=0.0, translation=0.0, elastic_sigma=0.0)
    assert still.spatial(LabelSpec.plain(("background", "a"))) is None
    assert AugmentationConfig(probability=0.0).spatial(LabelSpec.plain(("background", "a"))) is None
    config = AugmentationConfig(rotation=1.0, scaling=0.1, probability=0.5, noise=2.0, intensity_scale=0.2)
    assert config.spatial(LabelSpec.plain(("background", "a"))) == SpatialRanges(1.0, scaling=0.1, probability=0.5)
    assert config.intensity() == IntensityRanges(2.0, 0.0, 0.2)


def test_classes_that_exchange_names_when_sides_are_exchanged():
    classes = LabelSpec.plain(("background", "liver", "right kidney", "left kidney"))
    assert AugmentationConfig(flip="x").flip_classes(classes) == (0, 1, 2, 3)
    pairs = ("right kidney=left kidney",)
    spatial = AugmentationConfig(flip="x", flip_pairs=pairs).spatial(classes)
    assert (spatial.flip_classes, spatial.flip_numbers) == ((0, 1, 3, 2), ())
    assert AugmentationConfig(flip="zy", flip_pairs=pairs).flip_classes(classes) == ()
    with pytest.raises(UserError, match=r"flip_pairs holds 'right kidney=left kidny'; expected RIGHT=LEFT"):
        AugmentationConfig(flip="x", flip_pairs=("right kidney=left kidny",)).flip_classes(classes)
    with pytest.raises(UserError, match=r"holds 'left kidney=liver'; expected each class in one pair"):
        AugmentationConfig(flip="x", flip_pairs=(*pairs, "left kidney=liver")).flip_classes(classes)


@pytest.mark.parametrize(
    ("flip", "axes"), [("", ""), ("x", "x"), ("xyz", "zyx"), ("yzx", "zyx"), ("xz", "zx"), ("zy", "zy")]
)
def test_axes_to_mirror_along_may_have_any_order(flip, axes):
    config = changed(augmentation__flip=flip)
    assert config.augmentation.flip == axes
    assert config.augmentation == AugmentationConfig(flip=axes)
    spatial = AugmentationConfig(0.0, 0.0, 0.0, 0.0, flip=flip).spatial(LabelSpec.plain(("background", "a")))
    assert (spatial is None) == (flip == "")
    assert spatial is None or (spatial.flip, spatial.flip_classes) == (axes, (0, 1) if "x" in axes else ())


@pytest.mark.parametrize("flip", [True, False, "True", "xx", "X", "x,y", "axial"])
def test_other_axes_are_refused_and_the_message_says_what_true_was(flip):
    with pytest.raises(UserError, match=rf'augmentation\.flip is {flip!r}; expected axes .*"x" \(what True was\)'):
        changed(augmentation__flip=flip)


def test_slices_are_not_mirrored_along_z():
    with pytest.raises(UserError, match=r"flip is 'zx'; expected axes without z.*a patch is one slice: choose 'x'"):
        changed(augmentation__flip="xz", levels__spatial_dims=2)
    assert changed(augmentation__flip="yx", levels__spatial_dims=2).augmentation.flip == "yx"


def test_numbers_that_are_exchanged_with_sides():
    """Ignored voxels stay ignored; of regions the numbers of the pairs are exchanged, and other regions keep theirs."""
    config = AugmentationConfig(flip="x", flip_pairs=("right=left",))
    classes = LabelSpec.plain(("background", "right", "left"), ignore=9)
    assert config.spatial(classes).flip_classes == (0, 2, 1)
    assert config.spatial(classes).flip_numbers == (0, 2, 1, *range(3, 256))

    regions = LabelSpec(("background", "both", "left", "right"), (0, 4, 5, 6), ((0,), (1, 2), (2,), (1,)), (0, 4, 5, 6))
    assert config.spatial(regions).flip_classes == (0, 1, 3, 2)
    assert config.spatial(regions).flip_numbers == (0, 2, 1, *range(3, 256))
    assert AugmentationConfig(flip="x").spatial(regions).flip_numbers == tuple(range(256))
    with pytest.raises(UserError, match=r"holds 'both=left', and both is a region of several values; expected"):
        AugmentationConfig(flip="x", flip_pairs=("both=left",)).flip_classes(regions)
    one_side = dataclasses.replace(regions, members=((0,), (1, 3), (2,), (1,)))
    with pytest.raises(
        UserError, match=r"both is a region with one side of a pair alone.*leave x out of augmentation\.flip"
    ):
        config.flip_classes(one_side)


def test_a_phase_counts_the_losses_of_the_levels_that_learn():
    def weights(mode: str, **keys) -> list[tuple[float, ...]]:
        config = changed(train__mode=mode, **keys)
        return [config.phase_loss(phase).level_weights for phase in config.phases()]

    assert weights("end_to_end") == [(1, 1)]
    assert weights("end_to_end", loss__level_weights=(0.5, 2.0)) == [(0.5, 2)]
    assert weights("separate", loss__level_weights=(0.5, 2.0)) == [(0.5,), (0, 2)]
    assert weights("no_context", loss__level_weights=(0.5, 2.0)) == [(2,)]


def test_the_model_has_the_modes_levels():
    for mode, levels in (("separate", (1, 2)), ("first_level", (1,)), ("no_context", (2,))):
        assert changed(train__mode=mode, levels__factors=(4, 2)).model_levels() == levels


def test_the_number_of_dimensions_reaches_the_model():
    config = changed(levels__spatial_dims=2, levels__unit="voxels", model__base_channels=2)
    model = nnx.eval_shape(
        lambda: make_model(config, config.levels, LabelSpec.plain(("background", "a", "b")), CT, UNet)
    )
    assert model.config.spacing == (math.inf, 1, 1)
    kernels = [leaf.shape for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)) if len(leaf.shape) == 5]
    # [O, 1, k, k, C], and [1, 2, 2, O, C] of deconvolutions.
    assert kernels
    assert all(shape[1] == 1 or shape[:3] == (1, 2, 2) for shape in kernels)


BAD = [
    ("predict.flip", True),
    ("mesh.space", 0),
    ("augmentation.scaling", -0.1),
    ("augmentation.scaling", 1.0),
    ("loader.patch_size", (30,)),
    ("loader.patch_size", (0,)),
    ("loader.patch_size", (-8,)),
    ("loader.patch_size", (36,)),  # a multiple of 4, not of 2^3
    ("predict.tile", (100,)),
    ("predict.tile", (-4,)),
    ("predict.tile", ()),
    ("predict.tile", (64, 64)),
    ("predict.tile", (0, 64, 64)),
    ("predict.tile", (64, 64, 4104)),
    ("predict.tile", 64),
    ("train.mode", "all"),
    ("levels.factors", ()),
    ("levels.factors", (4, 3)),
    ("levels.factors", (2, 4)),
    ("levels.factors", (0, 0)),
    ("levels.factors", (-2, -1)),
    ("levels.finest_spacing", (1.0, 1.0)),
    ("levels.spatial_dims", 1),
    ("levels.spatial_dims", 4),
    ("experiment", ("separate", "together")),
    ("loss.level_weights", (1.0,)),
    ("loader.sampling", "middle"),
    ("loader.background_fraction", -0.1),
    ("loader.background_fraction", 1.5),
    ("train.frozen_batch_stats", 2.0),
    ("augmentation.probability", 1.1),
    ("pyramid.context", "hard"),
    ("model.norm", "layer"),
    ("model.dtype", "float16"),
    ("optimizer.schedule", "step"),
    ("predict.checkpoint", "newest"),
    ("loader.batch_size", 0),
    ("train.steps", 0),
    ("train.log_every", 0),
    ("train.checkpoint_every", 0),
    ("train.keep", 0),
    ("train.validation_patches", 0),
    ("model.base_channels", 0),
    ("model.depth", 0),
    ("predict.margin", -1),
    ("predict.memory", -0.1),
    ("mesh.space", 3),
    ("mesh.space", 16),  # 4 planes each, and the network halves three times
    ("train.non_finite", "ignore"),
    ("data.validation_fraction", 0.0),
    ("data.validation_fraction", 1.0),
    ("optimizer.learning_rate", -1e-3),
    ("optimizer.learning_rate", 0.0),
    ("optimizer.learning_rate", float("nan")),
    ("optimizer.weight_decay", -1.0),
    ("loss.dice", 0.0),
    ("loss.dice", -1.0),
    ("loss.level_weights", (0.0, 0.0)),
    ("data.window", (3.0, 3.0)),
    ("data.new_cases", "validate"),
    ("phantom.size", (0, 1, 1)),
    ("seed", -1),
    ("train.steps", 2.5),
    ("train.steps", True),
    ("train.steps", "many"),
    ("augmentation.flip", 1),
    ("data.root", 3),
    ("levels.factors", "42"),
    ("phantom.size", (3, 3)),
]


@pytest.mark.parametrize(("key", "value"), BAD)
def test_bad_values_are_refused_by_name(key, value):
    with pytest.raises(UserError) as refusal:
        changed(**{key.replace(".", "__"): value})
    message = str(refusal.value)
    assert f"config key {key} is" in message
    assert str(value).strip("()") in message.replace(".0", "") or repr(value) in message
    assert "expected" in message
    assert "\n" not in message


@pytest.mark.parametrize("key", ["loader__patch_size", "predict__tile"])
def test_the_size_that_a_refusal_proposes_is_good(key):
    thick = {"levels__unit": "mm", "levels__finest_spacing": (5.0, 1.0, 1.0)}
    flat = {"levels__spatial_dims": 2, "levels__unit": "voxels"}
    for size, others in (((36,), {}), ((100,), {}), ((4, 36, 96), thick), ((3, 40, 40), thick), ((4, 48, 40), flat)):
        with pytest.raises(UserError) as refusal:
            changed(**{key: size}, **others)
        good = ast.literal_eval(str(refusal.value).rpartition("choose ")[2])
        config = changed(**{key: good}, **others)
        assert config.patch_shape == good or config.predict.tile == good


@pytest.mark.parametrize("key", ["loader.patch_size", "predict.tile"])
def test_instance_norm_needs_more_than_one_voxel(key):
    """At the lowest of four resolutions a patch of 8 voxels is a single one, which is its own mean."""
    thick = {"levels__unit": "mm", "levels__finest_spacing": (5.0, 1.0, 1.0)}
    flat = {"levels__spatial_dims": 2, "levels__unit": "voxels"}
    for single, others in (((8,), {}), ((8, 8, 8), {}), ((4, 8, 8), thick), ((1, 8, 8), flat)):
        key_of_size = {key.replace(".", "__"): single}
        for norm in ("batch", "group"):
            changed(**key_of_size, **others, model__norm=norm)
        with pytest.raises(UserError, match=rf"config key {key} is .* expected a larger.*norm is instance") as refusal:
            changed(**key_of_size, **others, model__norm="instance")
        larger = ast.literal_eval(str(refusal.value).rpartition("choose ")[2])
        for enough in (larger, (single[0], 8, 16) if others else larger):
            changed(**{key.replace(".", "__"): enough}, **others, model__norm="instance")


@pytest.mark.parametrize(
    ("norm", "tile", "expected"),
    [("instance", 0, 48), ("group", 0, 48), ("batch", 0, 0), ("none", 0, 0), ("instance", 96, 96), ("batch", 96, 96)],
)
def test_the_tile_is_the_training_patch_where_results_depend_on_it(norm, tile, expected):
    config = changed(model__norm=norm, loader__patch_size=(48, 48, 48), predict__tile=(tile,), predict__margin=5)
    shape = (48, 48, 48) if expected == 48 else (expected,)
    assert config.tiling() == dataclasses.replace(config.predict, tile=shape)


def test_a_tile_that_is_the_training_patch_has_its_shape():
    thick = changed(model__norm="instance", loader__patch_size=(12, 64, 48))
    assert thick.tiling().tile == (12, 64, 48)
    flat = changed(model__norm="group", loader__patch_size=(48,), levels__spatial_dims=2)
    assert flat.tiling().tile == (1, 48, 48)


# ---- run folders ----


def test_a_written_config_is_read_back(tmp_path):
    assert configuration.read_config(tmp_path) is None
    config = changed(data__root="somewhere", phantom__size=(3, 4, 5))
    configuration.write_config(config, tmp_path)
    assert configuration.read_config(tmp_path) == config
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_run_folder_from_before_a_key_was_added_is_read(tmp_path):
    configuration.write_config(changed(data__root="somewhere"), tmp_path)
    content = json.loads((tmp_path / "config.json").read_bytes())
    del content["config"]["data"]["outside_paths"], content["checksum"]
    write_json(tmp_path / "config.json", content)
    assert configuration.read_config(tmp_path) == changed(data__root="somewhere")


@pytest.mark.parametrize(("old", "axes"), [(True, "x"), (False, "")])
def test_a_run_folder_from_before_axes_had_names_mirrors_as_it_did(tmp_path, old, axes):
    config = changed(augmentation__flip=axes, augmentation__flip_pairs=("a=b",), predict__flip=old)
    content = {"format": configuration.FORMAT, "config": as_dict(config)}
    content["config"]["augmentation"]["flip"] = old
    write_json(tmp_path / "config.json", content)
    saved = configuration.read_config(tmp_path)
    assert saved == config
    configuration.check_same_run(config, saved, tmp_path)
    other = changed(augmentation__flip="zyx", augmentation__flip_pairs=("a=b",))
    with pytest.raises(UserError, match=rf"augmentation\.flip \(the run has {axes}, given is zyx\)"):
        configuration.check_same_run(other, saved, tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not JSON"),
        (b"\xff\xfe\x00", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"[]", "has no checksum"),
        (b'{"format": 1, "config": {}, "checksum": 1}', "is damaged or was edited"),
    ],
)
def test_a_damaged_config_is_a_users_error(tmp_path, content, message):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=rf"config\.json {message}"):
        configuration.read_config(tmp_path)


def test_every_flipped_digit_of_a_config_is_noticed(tmp_path):
    configuration.write_config(RunConfig(), tmp_path)
    path = tmp_path / "config.json"
    whole = path.read_text(encoding="utf-8")
    digits = [place for place, char in enumerate(whole) if char.isdigit()]
    for place in digits:
        other = "1" if whole[place] != "1" else "2"
        path.write_text(whole[:place] + other + whole[place + 1 :], encoding="utf-8")
        with pytest.raises(UserError):
            configuration.read_config(tmp_path)


def test_a_run_goes_on_only_with_its_own_config(tmp_path):
    other = changed(seed=1, optimizer__learning_rate=0.5, levels__factors=(8, 4), train__steps=7)
    with pytest.raises(UserError) as refusal:
        configuration.check_same_run(other, RunConfig(), tmp_path)
    message = str(refusal.value)
    assert str(tmp_path) in message
    assert "seed (the run has 0, given is 1)" in message
    assert "optimizer.learning_rate (the run has 0.001, given is 0.5)" in message
    assert "levels.factors (the run has (4.0, 2.0), given is (8.0, 4.0))" in message
    assert "train.steps" not in message


CHANGEABLE = {
    "data__root": "elsewhere", "data__outside_paths": True, "data__prepared": "there", "data__workers": 3,
    "data__cache_mib": 1, "data__new_cases": "train", "loader__threads": 1, "loader__prefetch": 1,
    "predict__tile": (64,), "predict__margin": 8, "predict__crop_to_body": False, "predict__checkpoint": "latest",
    "train__steps": 5, "train__log_every": 1, "train__checkpoint_every": 2, "train__keep": 9,
    "train__deterministic": False,
}  # fmt: skip


def test_keys_that_a_later_start_may_change(tmp_path):
    configuration.check_same_run(changed(**CHANGEABLE), RunConfig(), tmp_path)
    separate = RunConfig(train=dataclasses.replace(RunConfig().train, mode="separate"))
    more = dataclasses.replace(separate, train=dataclasses.replace(separate.train, steps=5))
    with pytest.raises(UserError, match=r"train\.steps"):  # where one phase ends the next begins
        configuration.check_same_run(more, separate, tmp_path)


def test_inference_takes_the_runs_own_keys_but_those_it_may_change(tmp_path):
    saved = changed(loss__cross_entropy=0.5, optimizer__learning_rate=0.01, augmentation__flip="x")
    given = changed(predict__tile=(64,), evaluate__tolerance=3.0, data__root="moved", loader__batch_size=1)
    config = configuration.for_inference(given, saved, tmp_path)
    assert (config.predict.tile, config.evaluate.tolerance, config.data.root) == ((64,), 3.0, "moved")
    assert (config.loss, config.optimizer, config.loader) == (saved.loss, saved.optimizer, saved.loader)
    # A config file given again without --config.data.root does not take the run's data set away.
    at = changed(data__root="/data", augmentation__flip="x")
    assert configuration.for_inference(changed(), at, tmp_path).data.root == "/data"
    outside = changed(data__outside_paths=True, augmentation__flip="x")
    assert configuration.for_inference(changed(), outside, tmp_path).data.outside_paths
    assert configuration.for_inference(outside, at, tmp_path).data.outside_paths
    with pytest.raises(UserError, match=r"model\.base_channels \(the run has 32, given is 8\).*leave --config out"):
        configuration.for_inference(changed(model__base_channels=8), saved, tmp_path)


def test_configurations_from_before_tiles_were_boxes_are_read(tmp_path):
    content = {"format": configuration.FORMAT, "config": as_dict(RunConfig())}
    content["config"]["predict"] |= {"tile": 96, "overlap": 0.5, "plane": 512, "space": 1}
    for key in ("margin", "memory", "crop_to_body"):
        content["config"]["predict"].pop(key)
    write_json(tmp_path / "config.json", content)
    predict = configuration.read_config(tmp_path).predict
    assert (predict.tile, predict.margin, predict.crop_to_body) == ((96,), RunConfig().predict.margin, False)
