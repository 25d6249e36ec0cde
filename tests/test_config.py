"""Configurations: the shipped ones, the defaults, refusals."""

import json
import runpy
from pathlib import Path

import jax
import pytest
from flax import nnx

from autocontext_jax.data.augment import IntensityLimits
from autocontext_jax.data.pipeline import FeedConfig
from autocontext_jax.errors import UserError
from autocontext_jax.geometry import SpatialLimits
from autocontext_jax.inference.predictor import PredictorConfig
from autocontext_jax.jobs import config as configuration
from autocontext_jax.jobs.checks import check
from autocontext_jax.jobs.config import dataclass_of, default_config
from autocontext_jax.jobs.restore import make_model
from autocontext_jax.models.blocks import NetworkConfig
from autocontext_jax.models.pyramid import PyramidConfig
from autocontext_jax.training.losses import LossConfig
from autocontext_jax.training.optimizers import OptimizerConfig

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.py"))


def changed(**values):
    """The defaults with dotted keys set; dots are written as double underscores."""
    config = default_config()
    config.update_from_flattened_dict({key.replace("__", "."): value for key, value in values.items()})
    return config


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_are_good(path):
    page = runpy.run_path(str(path))
    config = page["get_config"]()
    check(config)
    assert set(config.to_dict()) == set(default_config().to_dict())
    assert f"--config configs/{path.name}" in page["__doc__"]


def test_there_is_a_quickstart():
    assert "quickstart" in [path.stem for path in CONFIGS]


def test_default_sections_are_the_dataclasses():
    config = default_config()
    check(config)
    assert dataclass_of(SpatialLimits, config.spatial) == SpatialLimits()
    assert dataclass_of(IntensityLimits, config.intensity) == IntensityLimits()
    assert dataclass_of(NetworkConfig, config.model) == NetworkConfig()
    assert dataclass_of(LossConfig, config.loss) == LossConfig()
    assert dataclass_of(OptimizerConfig, config.optimizer) == OptimizerConfig()
    assert dataclass_of(PredictorConfig, config.predict) == PredictorConfig()
    assert dataclass_of(PyramidConfig, config.pyramid, levels=3, classes=5) == PyramidConfig(3, 5)
    (phase,) = configuration.training_phases(config)
    wanted = FeedConfig(3, 64, levels=(1, 2), spatial=SpatialLimits(), intensity=IntensityLimits())
    assert configuration.feed(config, phase) == wanted
    for kind, section in ((NetworkConfig, "model"), (LossConfig, "loss"), (OptimizerConfig, "optimizer")):
        assert set(config[section]) - {"backbone"} == set(kind.__dataclass_fields__) - {"rank"}


def test_settings_and_feed_follow_their_keys():
    assert configuration.settings(changed()).finest_spacing is None
    settings = configuration.settings(changed(levels__factors=(2, 1), levels__finest_spacing=(2.0, 1.0, 1.0)))
    assert settings.factors == (2, 1)
    assert settings.finest_spacing == (2.0, 1.0, 1.0)
    still = changed(spatial__rotation=0.0, spatial__translation=0.0, spatial__elastic_sigma=0.0)
    (phase,) = configuration.training_phases(still)
    assert configuration.feed(still, phase).spatial is None


def test_organs_that_change_names_in_a_mirror():
    config = changed(data__labels=("background", "liver", "right kidney", "left kidney"), spatial__mirror=True)
    assert configuration.mirror_classes(config) == (0, 1, 2, 3)
    config.spatial.mirror_pairs = ("right kidney=left kidney",)
    (phase,) = configuration.training_phases(config)
    assert configuration.feed(config, phase).spatial.mirror_classes == (0, 1, 3, 2)
    config.spatial.mirror = False
    assert configuration.mirror_classes(config) == ()
    config.spatial.update({"mirror": True, "mirror_pairs": ("right kidney=left kidny",)})
    with pytest.raises(UserError, match=r"mirror_pairs holds 'right kidney=left kidny'; wanted RIGHT=LEFT"):
        configuration.feed(config, phase)
    config.spatial.mirror_pairs = ("right kidney=left kidney", "left kidney=liver")
    with pytest.raises(UserError, match=r"holds 'left kidney=liver'; wanted each organ in one pair"):
        configuration.feed(config, phase)


def test_a_phase_counts_the_losses_of_the_levels_that_learn():
    def weights(mode: str, **keys) -> list[tuple[float, ...]]:
        config = changed(train__mode=mode, **keys)
        return [configuration.loss(config, phase).level_weights for phase in configuration.training_phases(config)]

    assert weights("end_to_end") == [(1, 1)]
    assert weights("end_to_end", loss__level_weights=(0.5, 2.0)) == [(0.5, 2)]
    assert weights("separate", loss__level_weights=(0.5, 2.0)) == [(0.5,), (0, 2)]
    assert weights("no_context", loss__level_weights=(0.5, 2.0)) == [(2,)]


def test_the_model_has_the_modes_levels_and_their_factors():
    for mode, levels, factors in (
        ("separate", (1, 2), (4, 2)),
        ("first_level", (1,), (4,)),
        ("no_context", (2,), (2,)),
    ):
        config = changed(train__mode=mode, levels__factors=(4, 2))
        assert configuration.model_levels(config) == levels
        assert configuration.model_factors(config, (1.0, 1.0, 1.0)) == tuple((factor,) * 3 for factor in factors)


def test_the_rank_reaches_all_that_depend_on_it():
    config = changed(levels__rank=2, model__width=2)
    (phase,) = configuration.training_phases(config)
    assert configuration.settings(config).rank == 2
    assert configuration.feed(config, phase).rank == 2
    model = nnx.eval_shape(lambda: make_model(config, 3))
    assert model.config.rank == 2
    kernels = [leaf.shape for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)) if len(leaf.shape) == 5]
    # [O, 1, k, k, C], and [1, 2, 2, O, C] of deconvolutions.
    assert kernels
    assert all(shape[1] == 1 or shape[:3] == (1, 2, 2) for shape in kernels)


BAD = [
    ("predict.mirror", True),
    ("spatial.scaling", -0.1),
    ("spatial.scaling", 1.0),
    ("feed.edge", 30),
    ("feed.edge", 0),
    ("feed.edge", -8),
    ("feed.edge", 36),  # a multiple of 4, not of 2^3
    ("predict.tile", 100),
    ("predict.tile", 0),
    ("train.mode", "all"),
    ("levels.factors", ()),
    ("levels.factors", (4, 3)),
    ("levels.factors", (2, 4)),
    ("levels.factors", (0, 0)),
    ("levels.factors", (-2, -1)),
    ("levels.finest_spacing", (1.0, 1.0)),
    ("levels.rank", 1),
    ("levels.rank", 4),
    ("experiment", ("separate", "together")),
    ("loss.level_weights", (1.0,)),
    ("feed.centre", "middle"),
    ("feed.anywhere", -0.1),
    ("feed.anywhere", 1.5),
    ("train.frozen_norm", 2.0),
    ("spatial.unmoved", 1.1),
    ("pyramid.context", "hard"),
    ("model.backbone", "vnet"),
    ("model.norm", "group"),
    ("model.dtype", "float16"),
    ("optimizer.schedule", "step"),
    ("predict.checkpoint", "newest"),
    ("feed.batch", 0),
    ("train.steps", 0),
    ("train.log_every", 0),
    ("train.checkpoint_every", 0),
    ("train.keep", 0),
    ("train.validation_patches", 0),
    ("model.width", 0),
    ("model.depth", 0),
    ("predict.overlap", 1.0),
    ("predict.overlap", -0.1),
    ("mesh.space", 0),
    ("mesh.space", 3),
    ("mesh.space", 16),  # 4 planes each, and the network halves three times
    ("predict.space", 5),
    ("train.non_finite", "ignore"),
    ("data.validation_fraction", 0.0),
    ("data.validation_fraction", 1.0),
]


@pytest.mark.parametrize(("key", "value"), BAD)
def test_bad_values_are_refused_by_name(key, value):
    with pytest.raises(UserError) as refusal:
        check(changed(**{key.replace(".", "__"): value}))
    message = str(refusal.value)
    assert f"config key {key} is" in message
    assert str(value) in message
    assert "wanted" in message
    assert "\n" not in message


def test_the_edge_that_a_refusal_proposes_is_good():
    for edge in (30, 36, 5, 100):
        with pytest.raises(UserError) as refusal:
            check(changed(feed__edge=edge))
        check(changed(feed__edge=int(str(refusal.value).rsplit(" ", 1)[1])))


# ---- work directories ----


def test_a_written_config_is_read_back(tmp_path):
    assert configuration.read_config(tmp_path) is None
    config = changed(data__labels=("background", "vein"))
    configuration.write_config(config, tmp_path)
    saved = configuration.read_config(tmp_path)
    assert saved == json.loads(json.dumps(config.to_dict()))
    configuration.check_same_run(config, saved, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe\x00"])
def test_a_damaged_config_is_a_users_error(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=r"config\.json is not JSON"):
        configuration.read_config(tmp_path)


def test_a_run_goes_on_only_with_its_own_config(tmp_path):
    saved = json.loads(json.dumps(default_config().to_dict()))
    other = changed(seed=1, optimizer__learning_rate=0.5, levels__factors=(8, 4), train__steps=7)
    with pytest.raises(UserError) as refusal:
        configuration.check_same_run(other, saved, tmp_path)
    message = str(refusal.value)
    assert str(tmp_path) in message
    assert "seed (there 0, here 1)" in message
    assert "optimizer.learning_rate (there 0.001, here 0.5)" in message
    assert "levels.factors (there [4, 2], here [8, 4])" in message
    assert "train.steps" not in message


def test_a_key_that_one_side_lacks_differs(tmp_path):
    saved = json.loads(json.dumps(default_config().to_dict()))
    del saved["model"]["width"]
    saved["model"]["layers"] = 3
    with pytest.raises(
        UserError, match=r"model\.layers \(there 3, here absent\), model\.width \(there absent, here 32\)"
    ):
        configuration.check_same_run(default_config(), saved, tmp_path)


def test_free_keys_may_differ(tmp_path):
    saved = json.loads(json.dumps(default_config().to_dict()))
    config = changed(
        data__root="elsewhere",
        data__prepared="there",
        data__workers=3,
        data__cache_mib=1,
        feed__threads=1,
        feed__ahead=1,
        predict__tile=64,
        predict__overlap=0.25,
        predict__plane=256,
        predict__checkpoint="latest",
        train__steps=5,
        train__log_every=1,
        train__checkpoint_every=2,
        train__keep=9,
    )
    configuration.check_same_run(config, saved, tmp_path)
