"""What a plan chooses from a survey: levels, patches, networks, the size of a step, and all other keys."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
from surveys import ARTERY, LIVER, make_survey

from autocontext_jax.data.labels import LabelSpec, parse_labels
from autocontext_jax.errors import UserError
from autocontext_jax.images.spec import Channel, ImageSpec, ct_image
from autocontext_jax.jobs.config_files import config_from_flat
from autocontext_jax.jobs.run_config import RunConfig
from autocontext_jax.planning import choices as topics
from autocontext_jax.planning.grids import SHARE_SEEN, plan_geometry, target_spacing
from autocontext_jax.planning.plan import Choice, Choices, Plan, config_file, plan_table
from autocontext_jax.planning.step_size import Measured, Size, largest_size, sizes

CT = make_survey((400, 512, 512), (1, 0.75, 0.75), [LIVER, ARTERY])
SETS = {
    "CT": CT,
    "thick CT": make_survey((60, 512, 512), (5, 0.8, 0.8), [LIVER, ARTERY]),
    "hippocampus": make_survey((36, 50, 35), (1, 1, 1), [("anterior", 0.03, (14, 16, 22), (7, 7, 9))]),
    "whole body": make_survey((1200, 512, 512), (1.5, 1, 1), [("vertebra", 0.001, (30, 60, 60), (20, 30, 30))]),
    "few slices": make_survey((3, 256, 256), (8, 1, 1), [("cyst", 0.1, (10, 20, 20), (10, 10, 10))]),
    "smaller than any patch": make_survey((5, 6, 7), (1, 1, 1), [("cell", 0.1, (1, 1, 1), (1, 1, 1))]),
    "no class found": make_survey((100, 100, 100), (1, 1, 1), []),
    "prostate": make_survey((20, 320, 320), (3.6, 0.6, 0.6), [("zone", 0.02, (40, 40, 50), (20, 10, 15))]),
    "slices": make_survey((1, 512, 512), (1, 0.5, 0.5), [("cell", 0.1, (1, 20, 20), (1, 10, 10))]),
}


def geometry_keys(survey, edge, given=None):
    choices = Choices(given or {})
    topics.choose_grids(choices, survey, plan_geometry(survey, edge, given or {}))
    return {key: choice.value for key, choice in choices.made.items()}


# ---- levels and patches


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("edge", [32, 48, 64, 96, 128])
def test_every_geometry_is_a_valid_configuration(name, edge):
    survey = SETS[name]
    edge = 4 * edge if name == "slices" else edge
    made = plan_geometry(survey, edge, {})
    config = config_from_flat(RunConfig(), geometry_keys(survey, edge))
    config.check_patch(config.levels.with_spacing(tuple(each.median for each in survey.spacing)))
    assert config.patch_shape == made.patch
    assert config.model.depth == made.depth
    # Patches are no longer than a scan, but for what its networks must halve.
    units = [max(4, 2**made.depth)] * 3
    assert all(size < scan + unit for size, scan, unit in zip(made.patch, made.scan, units, strict=True))
    assert math.prod(made.patch) <= 1.6 * edge ** (2 if name == "slices" else 3)


@pytest.mark.parametrize(
    ("name", "edge", "factors"),
    [
        ("CT", 64, (8, 4, 2)),
        ("CT", 128, (4, 2)),
        ("hippocampus", 32, (1,)),
        ("whole body", 128, (2, 1)),
        ("thick CT", 128, (2, 1)),
        ("slices", 512, (1,)),
    ],
)
def test_levels_are_as_many_as_the_scan_or_its_classes_need(name, edge, factors):
    assert plan_geometry(SETS[name], edge, {}).levels.factors == factors


def test_the_coarsest_level_sees_enough():
    for survey in (CT, SETS["thick CT"], SETS["prostate"], SETS["no class found"]):
        made = plan_geometry(survey, 64, {})
        assert made.share[1] >= SHARE_SEEN
        assert made.share[0] == pytest.approx(
            math.prod(min(1, size / scan) for size, scan in zip(made.patch, made.scan, strict=True))
        )


def test_a_class_of_two_voxels_thickness_keeps_the_scans_own_grid():
    thin = make_survey((400, 512, 512), (1, 0.75, 0.75), [LIVER, ("nerve", 0.001, (200, 60, 60), (40, 2, 2))])
    assert plan_geometry(thin, 64, {}).levels.factors == (8, 4, 2, 1)
    assert plan_geometry(CT, 64, {}).levels.factors == (8, 4, 2)


def test_thick_slices_stay_thick_and_patches_are_as_long_in_mm():
    made = plan_geometry(SETS["thick CT"], 128, {})
    assert made.levels.scales == ((1, 2, 2), (1, 1, 1))
    z, y, x = (size * mm for size, mm in zip(made.patch, made.spacing, strict=True))
    assert y == x
    assert z == pytest.approx(y, rel=0.1)


def test_the_spacing_along_thick_slices_is_that_of_the_thinner_ones():
    """As nnU-Net's ExperimentPlanner.determine_fullres_target_spacing has it."""
    assert target_spacing(CT) == ((1, 0.75, 0.75), False)
    thick = make_survey((30, 512, 512), (5, 0.8, 0.8), [LIVER], thin=(3.0, 0.8, 0.8))
    assert target_spacing(thick) == ((3, 0.8, 0.8), True)
    thinner = make_survey((30, 512, 512), (5, 0.8, 0.8), [LIVER], thin=(0.5, 0.8, 0.8))
    assert target_spacing(thinner) == ((0.8, 0.8, 0.8), True)  # not below the other axes
    many = make_survey((300, 512, 512), (5, 0.8, 0.8), [LIVER], thin=(3.0, 0.8, 0.8))
    assert target_spacing(many) == ((5, 0.8, 0.8), False)


def test_given_keys_stay_and_the_rest_follows_them():
    given = {"levels.factors": (4.0, 2.0), "loader.patch_size": (64,)}
    made = plan_geometry(CT, 32, given)
    assert made.levels.factors == (4, 2)
    assert made.patch == (64, 64, 64)
    assert made.depth == 4
    assert not {"levels.factors", "loader.patch_size"} & geometry_keys(CT, 32, given).keys()
    voxels = plan_geometry(CT, 32, {"levels.unit": "voxels"})
    assert voxels.levels.unit == "voxels"
    assert "levels.finest_spacing" not in geometry_keys(CT, 32, {"levels.unit": "voxels"})
    assert voxels.levels.factors == (8, 4, 2, 1)
    assert plan_geometry(SETS["hippocampus"], 32, {"levels.unit": "voxels"}).levels.factors == (1,)
    assert plan_geometry(SETS["hippocampus"], 32, {"levels.finest_spacing": (1.0, 1.0, 1.0)}).levels.factors == (1,)
    coarse = plan_geometry(CT, 32, {"levels.finest_spacing": (2.0, 2.0, 2.0)})
    assert coarse.spacing == (2, 2, 2)
    assert coarse.share[1] >= SHARE_SEEN
    shared = plan_geometry(CT, 40, {"mesh.space": 2})
    assert shared.patch[0] % (2 * 2 ** (shared.depth - 1)) == 0


def test_volumes_seen_slice_by_slice_need_the_levels_of_a_slice():
    for name in ("hippocampus", "CT"):
        made = plan_geometry(SETS[name], 256, {"levels.spatial_dims": 2})
        assert made.patch[0] == 1
        assert made.share[1] >= SHARE_SEEN
    slices = plan_geometry(SETS["hippocampus"], 256, {"levels.spatial_dims": 2})
    assert slices.levels.factors == (1,)
    assert made_by(topics.choose_sampling, slices)["loader.background_fraction"] == 0.2  # of all slices
    assert "loss.per_sample" not in made_by(topics.choose_loss, SETS["hippocampus"], slices)


# ---- the size of a step


def cost_of(size):
    return size.edge**3 * size.batch_size * size.base_channels**2


def test_sizes_grow_in_cost_and_none_is_there_twice():
    path = sizes(cost_of, lambda size: size)
    costs = [cost_of(size) for size in path]
    assert costs == sorted(costs)
    assert len(set(path)) == len(path)
    clipped = sizes(lambda size: cost_of(Size(size.base_channels, 32, size.batch_size)), lambda size: (
        size.base_channels, size.batch_size))  # fmt: skip
    assert {size.batch_size for size in clipped if size.base_channels == 8} == {2, 3, 4, 6}
    assert len({(size.base_channels, size.batch_size) for size in clipped}) == len(clipped)


@pytest.mark.parametrize("seconds", [0.0, 0.01, 0.31, 1.01, 30.3, 1e9])
@pytest.mark.parametrize("usable", [1.01, 5.1, 1e9])
@pytest.mark.parametrize("power", [0.7, 1.0, 1.2])
def test_the_largest_size_is_within_time_and_memory(seconds, usable, power):
    path = sizes(cost_of, lambda size: size)
    looked = []

    def measure(size):
        looked.append(size)
        times = cost_of(size) / cost_of(path[0])
        return Measured(0.1 * times**power, 0.5 * times**power)

    size, measured = largest_size(path, cost_of, measure, seconds=seconds, usable=usable)
    assert len(looked) == len(set(looked)) <= 8
    good = [other for other in path if measure(other).seconds <= seconds and measure(other).bytes <= usable]
    assert size == path[0] or size in good
    if power == 1:
        assert size == (good or path[:1])[-1]
    assert measured == measure(size)


def test_a_device_that_refuses_a_size_gets_a_smaller_one():
    path = sizes(cost_of, lambda size: size)
    limit = cost_of(path[5])
    size, _ = largest_size(
        path, cost_of, lambda size: Measured(1e-9, 1.0) if cost_of(size) <= limit else None, seconds=1, usable=1e9
    )
    assert size == path[5]
    with pytest.raises(UserError, match="the smallest training step needs more memory than there is"):
        largest_size(path, cost_of, lambda size: None, seconds=1, usable=2**30)
    with pytest.raises(UserError, match=r"the smallest training step needs 2\.0 GiB; expected at most 1\.0 GiB"):
        largest_size(path, cost_of, lambda size: Measured(1, 2 * 2**30), seconds=1, usable=2**30)


# ---- all other keys


def flips(classes, survey=CT, edge=64, given=None):
    choices = Choices(given or {})
    labels = classes if isinstance(classes, LabelSpec) else LabelSpec.plain(("background", *classes))
    topics.choose_flip(choices, labels, plan_geometry(survey, edge, {}))
    return {key: choice.value for key, choice in choices.made.items()}


def test_left_and_right_are_exchanged_only_where_the_names_allow_it():
    pairs = ("kidney_right=kidney_left",)
    assert flips(["kidney_left", "kidney_right", "liver"]) == {
        "augmentation.flip": "x", "augmentation.flip_pairs": pairs, "predict.flip": True,
    }  # fmt: skip
    assert flips(["kidney_left", "liver"]) == {"augmentation.flip": ""}
    assert flips(["spleen", "liver"]) == {"augmentation.flip": ""}
    assert flips(["anterior"], SETS["hippocampus"], 32)["augmentation.flip"] == "x"
    assert flips(["kidney_left", "kidney_right"], given={"augmentation.flip": ""}) == {}


def test_regions_of_several_values_are_not_exchanged():
    values = {"background": 0, "left lung": [1, 2], "right lung": [3, 4, 5]}
    regions = parse_labels(Path("dataset.json"), values, [1, 3])
    assert flips(regions) == {"augmentation.flip": ""}


def test_one_level_is_not_a_patch_that_sees_most_of_a_scan():
    made = plan_geometry(CT, 32, {"levels.factors": (2.0,)})
    choices = Choices({})
    topics.choose_flip(choices, LabelSpec.plain(("background", "spleen")), made)
    assert choices.made["augmentation.flip"].value == ""
    large = make_survey((400, 512, 512), (1, 0.75, 0.75), [LIVER])  # no rare class
    one = plan_geometry(large, 32, {"levels.factors": (2.0,)})
    assert "loss.per_sample" not in made_by(topics.choose_loss, large, one)


def made_by(topic, *arguments):
    choices = Choices({})
    topic(choices, *arguments)
    return {key: choice.value for key, choice in choices.made.items()}


def test_rare_classes_get_what_brings_them_back():
    whole = plan_geometry(SETS["hippocampus"], 32, {})
    assert made_by(topics.choose_loss, CT, plan_geometry(CT, 64, {}))["loss.log_dice"] == 0.1
    common = made_by(topics.choose_loss, SETS["hippocampus"], whole)
    assert "loss.log_dice" not in common
    assert common["loss.per_sample"] is True
    missing = dataclasses.replace(SETS["hippocampus"], label_maps=11)  # one case has no such class
    assert "loss.per_sample" not in made_by(topics.choose_loss, missing, whole)


def test_intensities_change_in_the_units_that_are_stored():
    made = plan_geometry(CT, 64, {})
    mr, ct = ImageSpec((Channel("T2", "zscore"),)), ct_image()
    both = ImageSpec((*mr.channels, *ct.channels))
    assert made_by(topics.choose_augmentation, ct, made)["augmentation.noise"] == 10
    assert made_by(topics.choose_augmentation, mr, made)["augmentation.noise"] == 0.1
    assert "augmentation.noise" not in made_by(topics.choose_augmentation, both, made)  # training refuses it
    unit = ImageSpec((Channel("red", "rgb_to_0_1"), Channel("grey", "rescale_to_0_1")))
    assert made_by(topics.choose_augmentation, unit, made)["augmentation.noise"] == 0.02
    raw = ImageSpec((Channel("counts", "noNorm"),))
    assert "augmentation.noise" not in made_by(topics.choose_augmentation, raw, made)


def test_every_topic_makes_valid_keys():
    for survey in SETS.values():
        made = plan_geometry(survey, 32, {})
        choices = Choices({})
        topics.choose_augmentation(choices, ct_image(), made)
        topics.choose_sampling(choices, made)
        topics.choose_loss(choices, survey, made)
        topics.choose_norm(choices)
        topics.choose_optimizer(choices, 16)
        topics.choose_steps(choices, 7, "so many")
        values = {key: choice.value for key, choice in choices.made.items()}
        config = config_from_flat(RunConfig(), values)
        assert config.train.steps == 7
        assert config.optimizer.warmup == 1
        assert config.train.checkpoint_every == 1
        assert all(choice.reason.endswith((".", "so many")) for choice in choices.made.values())


# ---- the plan's texts


def test_a_plan_is_a_config_file_with_a_reason_for_each_key(tmp_path):
    choices = {"train.steps": Choice(5, "Few."), "loader.patch_size": Choice((32, 40, 48), "Fits.")}
    plan = Plan("here", choices, {"data.root": "a 'folder'", "levels.factors": (4.0, 2.0)}, ("Takes an hour.",))
    path = tmp_path / "plan.py"
    path.write_text(config_file(plan, title="Planned.", path=str(path)), encoding="utf-8")
    names = {}
    exec(compile(path.read_bytes(), str(path), "exec"), names)  # as ml_collections does
    config = names["get_config"]()
    assert (config.train.steps, config.loader.patch_size, config.levels.factors) == (5, (32, 40, 48), (4, 2))
    assert config.data.root == "a 'folder'"
    assert "# Few." in path.read_text(encoding="utf-8")
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    assert "train.steps = 5\n    Few." in plan_table(plan)
    assert "set by the user" in plan_table(plan)
    more = plan.with_choices({"train.steps": Choice(6, "Timed."), "data.root": Choice("x", "No.")}, timed=True)
    assert more.values["train.steps"] == 6
    assert "data.root" not in more.values
    assert more.timed
