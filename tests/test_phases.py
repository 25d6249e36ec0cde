"""Training modes as jobs: which levels are fed, trained, saved, restored and scored."""

import contextlib
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import SimpleITK as sitk
from flax import nnx

from autocontext_jax.data.labels import LabelSpec
from autocontext_jax.data.phantom.anatomy import ORGANS
from autocontext_jax.errors import UserError
from autocontext_jax.images.spec import CT
from autocontext_jax.jobs.config_files import check_same_run, default_config, from_config_dict, read_config
from autocontext_jax.jobs.evaluate import evaluate
from autocontext_jax.jobs.prepare import prepare
from autocontext_jax.jobs.restore import make_model
from autocontext_jax.jobs.run import Paths, run
from autocontext_jax.jobs.run_config import RunConfig
from autocontext_jax.jobs.run_folder import RunData
from autocontext_jax.jobs.train import train
from autocontext_jax.models.backbones import BACKBONES
from autocontext_jax.training.checkpoints import Checkpoints
from autocontext_jax.training.phases import MODES, Phase, phases

pytestmark = pytest.mark.usefixtures("compiled_once", "prepared_here")

STEPS = 4


def test_phases_of_three_levels():
    assert phases("end_to_end", 3) == (Phase((1, 2, 3), (1, 2, 3)),)
    assert phases("separate", 3) == (Phase((1,), (1,)), Phase((1, 2), (2,)), Phase((1, 2, 3), (3,)))
    assert phases("first_level", 3) == (Phase((1,), (1,)),)
    assert phases("no_context", 3) == (Phase((3,), (3,)),)


def test_with_one_level_all_modes_are_one():
    assert {phases(mode, 1) for mode in MODES} == {(Phase((1,), (1,)),)}


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    """One prepared data set for all modes."""
    folder = tmp_path_factory.mktemp("store")
    prepare(small_config(folder), folder)
    return folder


def small_config(folder: Path, mode: str = "end_to_end", *, steps: int = STEPS, frozen: float = 0.0) -> RunConfig:
    config = default_config()
    config.phantom.update({"training": 3, "test": 1, "size": (40, 40, 40), "spacing": (8.0, 8.0, 8.0)})
    config.data.root, config.data.prepared, config.data.workers = str(folder / "phantoms"), str(folder / "prepared"), 1
    config.levels.factors = (2, 1)
    config.loader.patch_size, config.loader.batch_size = (8,), 1
    config.model.base_channels, config.model.depth = 2, 1
    config.predict.tile = (16,)
    config.train.mode, config.train.steps, config.train.frozen_batch_stats = mode, steps, frozen
    config.train.keep, config.train.checkpoint_every = 4, STEPS // 2
    config.train.log_every, config.train.validation_patches = 1, 1
    return from_config_dict(config)


@pytest.fixture(scope="module")
def separate(store, tmp_path_factory) -> Path:
    """A finished run with checkpoints at steps 2, 4 | 6, 8."""
    workdir = tmp_path_factory.mktemp("separate")
    config = small_config(store, "separate")
    assert train(config, workdir, prepare(config, workdir))
    return workdir


def check_the_rest(config: RunConfig, workdir: Path, data: RunData, levels: list[int]) -> None:
    """The finished run restores, is scored at the model's levels, and predicts."""
    assert evaluate(config, workdir)
    (case,) = json.loads((workdir / "evaluation.json").read_bytes())["cases"].values()
    assert list(case) == [f"level_{level}" for level in levels]
    mask = workdir / "mask.nii.gz"
    assert run("predict", config, Paths(workdir, source=data.dataset.test[0].images[0], target=mask))
    assert sitk.ReadImage(str(mask)).GetSize() == (40, 40, 40)


def logged_levels(workdir: Path) -> list[list[int]]:
    """The levels that each logged step names; every step is logged."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_bytes().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [sorted(int(key[-1]) for key in row if key.startswith("loss_level")) for row in rows]


@pytest.mark.parametrize(("mode", "level"), [("first_level", 1), ("no_context", 2)])
def test_one_level_as_a_job(store, separate, tmp_path, mode, level):
    config = small_config(store, mode, frozen=0.5 if mode == "no_context" else 0.0)  # its last two steps
    data = prepare(config, tmp_path)
    assert train(config, tmp_path, data)
    assert logged_levels(tmp_path) == [[level]] * STEPS
    check_the_rest(config, tmp_path, data, [level])
    if mode == "no_context":
        before, after = (weights(tmp_path, config, step)[1] for step in (STEPS // 2, STEPS))
        assert all(map(np.array_equal, jax.tree.leaves(before), jax.tree.leaves(after)))
    else:  # the first phase of `separate` is this very run
        assert losses(tmp_path) == losses(separate)[:STEPS]


def test_separate_as_a_job(store, separate):
    assert logged_levels(separate) == [[1]] * STEPS + [[1, 2]] * STEPS
    config = small_config(store, "separate")
    check_the_rest(config, separate, prepare(config, separate), [1, 2])


def losses(workdir: Path) -> list[tuple[int, float]]:
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_bytes().splitlines()]
    return [(row["step"], row["loss"]) for row in rows]


def weights(workdir: Path, config, step: int):
    """Parameters and running averages."""
    labels, grids = LabelSpec.plain(("background", *ORGANS)), config.levels.with_spacing(config.phantom.spacing)
    model = make_model(config, grids, labels, CT, BACKBONES[config.model.backbone])
    _, params, statistics = nnx.split(model, nnx.Param, ...)
    with contextlib.closing(Checkpoints(workdir / "checkpoints", keep=4)) as checkpoints:
        return checkpoints.restore_weights(step, params, statistics)


def test_the_second_phase_leaves_the_first_level_as_it_was(store, separate):
    one, two = (weights(separate, small_config(store, "separate"), step) for step in (STEPS, 2 * STEPS))
    for before, after in zip(one, two, strict=True):
        pairs = [
            map(np.array_equal, *(jax.tree.leaves(tree["networks"][n]) for tree in (before, after))) for n in (0, 1)
        ]
        assert [all(pair) for pair in pairs] == [True, False]


def test_separate_goes_on_between_its_phases(store, separate, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(separate, workdir)
    for later in range(STEPS + 2, 2 * STEPS + 1, 2):
        shutil.rmtree(workdir / "checkpoints" / str(later))
    config = small_config(store, "separate")
    assert train(config, workdir, prepare(config, workdir))
    assert losses(workdir) == losses(separate)


def test_the_length_of_a_phase_stays(store, separate):
    config = small_config(store, "separate")
    saved = read_config(separate)
    assert saved is not None
    check_same_run(config, saved, separate)
    config = small_config(store, "separate", steps=2 * STEPS)
    with pytest.raises(UserError, match=r"train\.steps"):
        check_same_run(config, saved, separate)
