"""The planner as a job: a plan is made once, kept, and used by every later start; what the user has set stays."""

import contextlib
import dataclasses
import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import nibabel
import numpy as np
import pytest
from channel_sets import write_pictures
from refusals import refused

import autocontext_jax as ac
from autocontext_jax.api import _change as change
from autocontext_jax.data.phantom.dataset import write_dataset
from autocontext_jax.jobs import plan as job
from autocontext_jax.jobs import timing
from autocontext_jax.jobs.config_files import (
    config_from_flat,
    default_config,
    for_inference,
    from_config_dict,
    read_config,
    to_config_dict,
)
from autocontext_jax.jobs.extensions import NO_EXTENSIONS, Extensions
from autocontext_jax.jobs.plan import make_plan, read_plan
from autocontext_jax.jobs.run import Paths, run
from autocontext_jax.jobs.run_config import RunConfig
from autocontext_jax.jobs.run_folder import open_data, read_fingerprint
from autocontext_jax.planning.compiled import TrainingStep
from autocontext_jax.planning.measured import measure_step
from autocontext_jax.planning.step_size import Measured
from autocontext_jax.sections import as_dict, flat_keys

pytestmark = pytest.mark.usefixtures("compiled_quickly", "prepared_here")

ROOT = Path(__file__).parent.parent
SMALL = {
    "model.base_channels": 2,
    "loader.patch_size": (16, 16, 16),
    "loader.batch_size": 2,
    "model.depth": 2,
    "data.workers": 1,
}


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("phantoms") / "data"
    write_dataset(root, training=4, test=2, size=(24, 24, 24), spacing=(12.0, 12.0, 12.0), seed=0)
    return root


@pytest.fixture
def quick(monkeypatch) -> list[TrainingStep]:
    """Steps are not compiled but for a size of which the time is said to be a microsecond a voxel; those measured."""
    asked = []

    def measure(step: TrainingStep, device: object) -> Measured:
        asked.append(step)
        return Measured(1e-6 * np.prod(step.patch_size) * step.batch_size, 1e3)

    monkeypatch.setattr(job, "measure_step", measure)
    return asked


def automatic(root: Path, **keys) -> RunConfig:
    config = config_from_flat(from_config_dict(default_config()), {"plan.automatic": True, "data.root": str(root)})
    return config_from_flat(config, {key.replace("__", "."): value for key, value in keys.items()})


def planned(config: RunConfig, workdir: Path) -> RunConfig:
    return make_plan(config, workdir, open_data(config, workdir), NO_EXTENSIONS)


# ---- the whole job


def test_a_folder_is_enough_and_the_job_ends_in_time(phantoms, tmp_path, caplog):
    """Plan, prepare, train and evaluate by the command line; a second start finds all done."""
    caplog.set_level(logging.INFO)
    workdir = tmp_path / "run"
    command = [sys.executable, "-m", "autocontext_jax.main", "--config=configs/auto.py", f"--workdir={workdir}"]
    command += [f"--config.data.root={phantoms}"]
    command += [f"--config.{key}={value}" for key, value in SMALL.items()]
    cached = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    for minutes in (1, 2, 4):  # on a slow machine the first ones leave nothing for training
        timed = [*command, f"--config.plan.minutes={minutes}"]
        cached["JAX_COMPILATION_CACHE_DIR"] = str(tmp_path / f"programs_{minutes}")
        done = subprocess.run(
            timed, cwd=ROOT, capture_output=True, encoding="utf-8", check=False, env={**os.environ, **cached}
        )
        if "nothing of it is left for training" not in done.stderr:
            break
        assert done.returncode == 2
    assert done.returncode == 0, done.stderr
    assert "timing the training and the evaluation" in done.stderr
    plan, config = read_plan(workdir), read_config(workdir)
    # The plan's step, both steps of the training and the validation: the training itself compiles none of them again.
    assert len(list((tmp_path / f"programs_{minutes}").glob("jit_step-*-cache"))) == 4
    assert plan.timed
    assert plan.values["train.steps"] == config.train.steps
    assert f"{minutes} minutes in all" in plan.choices["train.steps"].reason
    assert SMALL.keys() <= plan.given.keys()
    assert not SMALL.keys() & plan.values.keys()
    assert len(json.loads((workdir / "evaluation.json").read_bytes())["cases"]) == 2
    assert not (workdir / "timing").exists()
    assert read_fingerprint(config, workdir).survey.cases == 4  # what was learned of CT later leaves it there
    again = automatic(
        phantoms, plan__minutes=minutes, **{key.replace(".", "__"): value for key, value in SMALL.items()}
    )
    assert run("train", again, Paths(workdir))
    assert "trained already" in caplog.text
    assert read_plan(workdir) == plan
    refused(lambda: ac.load(workdir, tile=31), "config key predict.tile is (31, 31, 31)")
    used = config_from_flat(from_config_dict(default_config()), {"plan.automatic": True})
    assert for_inference(used, config, workdir) == config
    # What is named counts, though it is the default.
    named = config_from_flat(used, {"plan.keep": ("predict.checkpoint",)})
    assert (config.predict.checkpoint, for_inference(named, config, workdir).predict.checkpoint) == ("latest", "best")
    as_file = to_config_dict(config)
    change(as_file, {"checkpoint": "best"}, ("predict",))
    assert for_inference(from_config_dict(as_file), config, workdir).predict.checkpoint == "best"


def test_a_signal_while_the_training_is_timed_ends_the_job(phantoms, tmp_path, quick, monkeypatch):
    monkeypatch.setattr(timing, "train", lambda *arguments: False)
    monkeypatch.setattr("autocontext_jax.jobs.train.train", None)  # is not reached
    assert run("all", automatic(phantoms, plan__minutes=5.0, data__workers=1), Paths(tmp_path))
    assert not read_plan(tmp_path).timed
    assert not (tmp_path / timing.FOLDER).exists()


@pytest.mark.parametrize("kept", [True, False])
def test_the_clock_stands_still_while_a_program_compiles_that_is_kept(kept, tmp_path):
    """By an event of JAX, under a name that another version may change."""
    before = jax.config.values["jax_compilation_cache_dir"]
    jax.config.update("jax_compilation_cache_dir", str(tmp_path) if kept else None)
    try:
        with timing._clock() as seconds_passed:
            started = time.monotonic()
            jax.jit(lambda x: x + kept).lower(1.0).compile()
            wall = time.monotonic() - started
            assert (seconds_passed() < wall) == kept
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


@pytest.mark.parametrize(("scoring", "runs"), [(0.0, 1), (100.0, 1), (50.0, 2)])
def test_the_steps_are_those_that_the_rest_of_the_time_allows(phantoms, tmp_path, quick, monkeypatch, scoring, runs):
    config = automatic(phantoms, plan__minutes=10.0)
    data = open_data(config, tmp_path)
    config = make_plan(config, tmp_path, data, NO_EXTENSIONS, runs=runs)
    monkeypatch.setattr(timing, "_time_training", lambda *arguments: (0.25, 11.0, 1.0))  # ten checkpoints
    monkeypatch.setattr(timing, "_time_evaluation", lambda *arguments: scoring)
    started = time.monotonic() - 60  # planning and preparing took a minute
    fitted = timing.fit_minutes(
        config, tmp_path, data, NO_EXTENSIONS, started=started, runs=runs, evaluates="run" if scoring else ""
    )
    expected = (0.97 * (540 / runs - scoring) - 20) / 0.25
    assert fitted.train.steps == pytest.approx(expected, abs=4)
    assert fitted.train.checkpoint_every == -(-fitted.train.steps // 10)
    again = timing.fit_minutes(fitted, tmp_path, data, NO_EXTENSIONS, started=started - 100, runs=runs)
    assert again == fitted  # timed once


@pytest.mark.parametrize(("given", "beside"), [({}, 20), ({"train__checkpoint_every": 4}, 11)])
def test_too_few_minutes_are_refused_before_the_training(phantoms, tmp_path, quick, monkeypatch, given, beside):
    config = automatic(phantoms, plan__minutes=10.0, **given)
    data = open_data(config, tmp_path)
    config = make_plan(config, tmp_path, data, NO_EXTENSIONS)
    monkeypatch.setattr(timing, "_time_training", lambda *arguments: (0.25, 11.0, 1.0))
    started = time.monotonic() - 590  # less is left than is taken beside the steps
    refused(
        lambda: timing.fit_minutes(config, tmp_path, data, NO_EXTENSIONS, started=started),
        "plan.minutes is 10, and nothing of it is left for training: 590 s have passed",
        f"each run takes {beside} s beside its steps",
    )
    assert not read_plan(tmp_path).timed
    assert timing.fit_minutes(config, tmp_path, data, NO_EXTENSIONS, started=time.monotonic()).train.steps > 1000


def test_checkpoints_that_are_given_take_their_time(phantoms, tmp_path, quick, monkeypatch):
    config = automatic(phantoms, plan__minutes=10.0, train__checkpoint_every=4)
    data = open_data(config, tmp_path)
    config = make_plan(config, tmp_path, data, NO_EXTENSIONS)
    monkeypatch.setattr(timing, "_time_training", lambda *arguments: (0.25, 11.0, 1.0))
    fitted = timing.fit_minutes(config, tmp_path, data, NO_EXTENSIONS, started=time.monotonic())
    assert fitted.train.checkpoint_every == 4
    assert fitted.train.steps == pytest.approx((0.97 * 600 - 11) / (0.25 + 1 / 4), abs=4)


def test_each_phase_of_levels_that_are_trained_one_by_one_is_timed(phantoms, tmp_path, quick, monkeypatch):
    config = automatic(phantoms, plan__minutes=10.0, train__mode="separate", levels__factors=(2.0, 1.0))
    data = open_data(config, tmp_path)
    config = make_plan(config, tmp_path, data, NO_EXTENSIONS)
    steps = []

    def train(short, folder, *rest):
        steps.append(short.train.steps)
        seconds = [1.0] * timing.ROWS + [3.0] * timing.ROWS  # of a step, in both phases
        rows = [json.dumps({"patches_per_second": config.loader.batch_size / each}) for each in seconds]
        (folder / "metrics.jsonl").write_text("\n".join(rows), encoding="utf-8")
        return True

    monkeypatch.setattr(timing, "train", train)
    clock = contextlib.nullcontext(lambda: steps[0] * (1.0 + 3.0) + 2 * 5.0)
    monkeypatch.setattr(timing, "_clock", lambda: clock)
    step, beside, _ = timing._time_training(config, tmp_path / timing.FOLDER, data, NO_EXTENSIONS)
    assert (step, beside) == pytest.approx((2.0, 5.0))


def test_the_config_file_of_a_plan_is_the_planned_configuration(phantoms, tmp_path, quick):
    given = default_config()
    given.data.root, given.plan.minutes = str(phantoms), 10.0
    made = ac.plan(given, tmp_path)
    assert not given.plan.automatic  # the argument stays as it was
    names: dict = {}
    exec(compile((tmp_path / "plan.py").read_bytes(), "plan.py", "exec"), names)
    assert names["get_config"]() == made
    assert made.train.steps < RunConfig().train.steps
    assert len(quick) > 1


# ---- what a plan depends on


def test_a_plan_is_made_once_and_again_if_what_it_depends_on_changes(phantoms, tmp_path, quick):
    first = planned(automatic(phantoms), tmp_path)
    asked = len(quick)
    assert planned(automatic(phantoms), tmp_path) == first
    assert len(quick) == asked
    other = planned(automatic(phantoms, model__depth=2), tmp_path)
    assert other.model.depth == 2
    assert len(quick) > asked
    assert read_plan(tmp_path).given["model.depth"] == 2


def test_label_maps_are_read_once(phantoms, tmp_path, quick, monkeypatch):
    planned(automatic(phantoms), tmp_path)
    monkeypatch.setattr(job, "survey", None)
    assert planned(automatic(phantoms, model__depth=2), tmp_path).model.depth == 2


def test_a_run_that_has_begun_keeps_its_plan(phantoms, tmp_path, quick):
    first = planned(automatic(phantoms), tmp_path)
    (tmp_path / "checkpoints" / "5").mkdir(parents=True)
    asked = len(quick)
    again = planned(automatic(phantoms, plan__minutes=3), tmp_path)
    assert dataclasses.replace(again, plan=first.plan) == first
    assert len(quick) == asked


def test_a_run_that_began_without_a_plan_is_not_planned(phantoms, tmp_path, quick):
    (tmp_path / "checkpoints" / "5").mkdir(parents=True)
    refused(lambda: planned(automatic(phantoms), tmp_path), "was begun without a plan")
    assert not (tmp_path / "plan.json").exists()


def test_keys_that_are_named_stay_though_they_have_their_default(phantoms, tmp_path, quick):
    free = planned(automatic(phantoms), tmp_path / "free")
    kept = planned(automatic(phantoms, plan__keep=("loss.cross_entropy",)), tmp_path / "kept")
    assert free.loss.cross_entropy > 0
    assert kept.loss.cross_entropy == RunConfig().loss.cross_entropy
    assert "loss.cross_entropy" in read_plan(tmp_path / "kept").given


def test_a_short_run_gets_a_smaller_step(phantoms, tmp_path, quick):
    short = planned(automatic(phantoms, plan__minutes=0.001), tmp_path / "short")
    long = planned(automatic(phantoms), tmp_path / "long")
    assert short.model.base_channels == 8
    assert long.model.base_channels == 32
    assert long.train.steps == RunConfig().train.steps > short.train.steps


# ---- data sets that have little


def test_one_case_one_class_and_one_voxel(tmp_path, quick):
    root = tmp_path / "data"
    for folder, voxel in (("imagesTr", 500), ("labelsTr", 1)):
        array = np.zeros((12, 14, 16), np.int16)
        array[6, 7, 8] = voxel
        (root / folder).mkdir(parents=True)
        name = "case_1.nii.gz" if folder == "labelsTr" else "case_1_0000.nii.gz"
        nibabel.save(nibabel.Nifti1Image(array, np.diag([1.0, 1.0, 4.0, 1.0])), root / folder / name)
    description = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "stone": 1}, "numTraining": 1}
    (root / "dataset.json").write_text(json.dumps({**description, "file_ending": ".nii.gz"}), encoding="utf-8")
    config = planned(automatic(root), tmp_path / "run")
    assert config.levels.factors == (1,)
    assert config.patch_shape == (16, 14, 12)
    assert read_plan(tmp_path / "run").choices["loss.log_dice"].value == 0.1


def test_empty_cases_and_classes_that_never_occur(tmp_path, quick):
    root = tmp_path / "data"
    write_dataset(root, training=2, test=0, size=(12, 12, 12), spacing=(20.0, 20.0, 20.0), seed=0)
    for path in (root / "labelsTr").iterdir():
        label = nibabel.load(path)
        nibabel.save(nibabel.Nifti1Image(np.zeros(label.shape, np.uint8), label.affine), path)
    assert planned(automatic(root), tmp_path / "run").levels.factors == (1,)


def test_a_thousand_cases_are_planned_by_their_headers_and_a_part_of_the_label_maps(tmp_path, quick):
    """No scan has a voxel in its file, and every size is another one."""
    root, shapes = tmp_path / "data", np.random.default_rng(0).integers(4, 16, (1000, 3))
    (root / "imagesTr").mkdir(parents=True)
    (root / "labelsTr").mkdir()
    for number, shape in enumerate(shapes):
        label = np.zeros(shape, np.uint8)
        label[1:3, 1:3, 1:3] = 1
        file = nibabel.Nifti1Image(label, np.diag([2.0, 2.0, 2.0 + number % 3, 1.0])).to_bytes()
        (root / f"labelsTr/case_{number:04}.nii").write_bytes(file)
        (root / f"imagesTr/case_{number:04}_0000.nii").write_bytes(file[:352])
    description = {"channel_names": {"0": "MR"}, "labels": {"background": 0, "stone": 1}, "numTraining": 1000}
    (root / "dataset.json").write_text(json.dumps({**description, "file_ending": ".nii"}), encoding="utf-8")
    config = planned(automatic(root), tmp_path / "run")
    found = read_fingerprint(config, tmp_path / "run").survey
    assert (found.cases, found.label_maps) == (1000, 200)
    assert [(axis.smallest, axis.largest) for axis in found.shape] == [(4, 15)] * 3
    assert config.levels.finest_spacing == (3.0, 2.0, 2.0)
    assert config.levels.factors == (1,)


def test_slices_are_planned_in_2d(tmp_path, quick):
    root = write_pictures(tmp_path / "data", {"0": "grey"}, training=3, test=0)
    config = planned(automatic(root), tmp_path / "run")
    assert config.levels.spatial_dims == 2
    assert config.patch_shape[0] == 1


# ---- the step on this device


def test_a_measured_step_is_the_compiled_one(phantoms, tmp_path):
    config = config_from_flat(automatic(phantoms), {**SMALL, "levels.factors": (1.0,)})
    data = open_data(config, tmp_path)
    step = job._step(config, data, NO_EXTENSIONS)
    small, large = (measure_step(dataclasses.replace(step, batch_size=n), jax.local_devices()[0]) for n in (1, 6))
    assert small.seconds > 0
    assert small.bytes < large.bytes < 8 * small.bytes


def test_a_step_with_an_own_loss_is_measured(phantoms, tmp_path):
    keys = {**SMALL, "levels.factors": (1.0,), "loss.extra": (("mine", 0.5),)}
    config = config_from_flat(automatic(phantoms), keys)
    called = []

    def mine(logits, labels):
        called.append(labels.shape)
        return logits.mean()

    step = job._step(config, open_data(config, tmp_path), Extensions(losses={"mine": mine}))
    step.lower(np.array(jax.local_devices()[:1]))
    assert called


def test_gpus_that_do_not_multiply_bfloat16_are_known(monkeypatch):
    for capability, expected in (("7.0", False), ("7.5", False), ("8.0", True), ("10.0", True), ("gfx942", True)):
        device = SimpleNamespace(platform="gpu", compute_capability=capability)
        monkeypatch.setattr(jax, "local_devices", lambda device=device: [device])
        assert job._multiplies_bfloat16() is expected


def test_what_cannot_be_planned_is_said_in_one_line(phantoms, tmp_path, quick, monkeypatch):
    default = from_config_dict(default_config())
    refused(lambda: run("plan", default, Paths(tmp_path)), "--mode plan requires plan.automatic")
    refused(lambda: config_from_flat(RunConfig(), {"plan.minutes": 3.0}), "config key plan is")
    modes = ("end_to_end", "separate")
    expected = "plan.minutes is 3; expected 0 with an experiment"
    refused(lambda: automatic(phantoms, plan__minutes=3.0, experiment=modes), expected)
    monkeypatch.setattr(job, "measure_step", lambda step, device: Measured(1.0, 2.0**40))
    expected = "the smallest training step needs 1024.0 GiB; expected at most"
    refused(lambda: planned(automatic(phantoms), tmp_path / "large"), expected)


@pytest.mark.parametrize(
    ("given", "key", "planned_value"),
    [
        ({"predict__flip": True}, "augmentation.flip", "x"),
        ({"loss__level_weights": (1.0,)}, "levels.factors", (1.0,)),
        ({"loader__patch_size": (20,)}, "model.depth", 3),
        ({"loader__patch_size": (12,)}, "model.depth", 2),
        ({"predict__tile": (12,)}, "model.depth", 3),
    ],
)
def test_keys_are_compared_with_those_that_are_planned(phantoms, tmp_path, quick, given, key, planned_value):
    """By themselves they contradict the defaults, such as `model.depth` 4."""
    alone = {name.replace("__", "."): value for name, value in given.items()}
    refused(lambda: config_from_flat(from_config_dict(default_config()), alone), f"config key {next(iter(alone))} is")
    made = planned(automatic(phantoms, plan__minutes=10.0, **given), tmp_path)
    flat = flat_keys(as_dict(made))
    assert flat[key] == planned_value
    assert {name: flat[name] for name in alone} == alone


def test_folds_are_timed_too(phantoms, tmp_path, quick, monkeypatch):
    monkeypatch.setattr("autocontext_jax.jobs.folds.train", lambda *arguments: False)  # as if a signal ended it
    small = {key.replace(".", "__"): value for key, value in SMALL.items()}
    assert run("all", automatic(phantoms, plan__minutes=10.0, data__folds=2, **small), Paths(tmp_path))
    assert read_plan(tmp_path).timed


def test_weights_of_levels_may_be_those_of_the_plan_alone(tmp_path, monkeypatch):
    """The sizes that are tried on the way have other numbers of levels."""
    tried, root = [], tmp_path / "data"
    write_dataset(root, training=3, test=0, size=(80, 80, 80), spacing=(4.0, 4.0, 4.0), seed=0)

    def measure(step: TrainingStep, device: object) -> Measured:
        tried.append(step.loss.level_weights)
        return Measured(1e-7 * np.prod(step.patch_size), 1e3)

    monkeypatch.setattr(job, "measure_step", measure)
    config = automatic(root, plan__minutes=10.0, loss__level_weights=(1.0,))
    assert planned(config, tmp_path).loss.level_weights == (1.0,)
    assert len({len(weights) for weights in tried}) > 1


def test_keys_that_contradict_what_is_planned_are_refused(phantoms, tmp_path, quick):
    for given, message in (
        (
            {"loss__level_weights": (1.0,), "levels__factors": (2.0, 1.0)},
            "(1.0,); expected one number a level, 2 in all",
        ),
        ({"predict__flip": True, "plan__keep": ("augmentation.flip",)}, "expected augmentation.flip to name axes"),
    ):
        refused(lambda given=given: planned(automatic(phantoms, plan__minutes=10.0, **given), tmp_path), message)
        assert not (tmp_path / "plan.py").exists()
    config = automatic(phantoms, plan__minutes=10.0, loss__level_weights=(1.0, 1.0, 1.0))
    refused(
        lambda: planned(config, tmp_path),
        "config key loss.level_weights is (1.0, 1.0, 1.0); expected one number a level, 1 in all",
    )
