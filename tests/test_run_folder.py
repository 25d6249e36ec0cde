"""A run folder knows its data: what happens to a run when its data set changes, and who may look at it meanwhile."""

import dataclasses
import json
import logging
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import SimpleITK as sitk

from autocontext_jax import processes, runtime
from autocontext_jax.data.datasets import Case
from autocontext_jax.data.phantom.dataset import write_dataset
from autocontext_jax.errors import UserError
from autocontext_jax.images import scans
from autocontext_jax.inference.model import Model
from autocontext_jax.jobs import train as training
from autocontext_jax.jobs.config_files import config_from_flat, default_config, from_config_dict, write_config
from autocontext_jax.jobs.evaluate import evaluation_folder
from autocontext_jax.jobs.evaluations import settings_of
from autocontext_jax.jobs.experiment import side_by_side
from autocontext_jax.jobs.lock import locked
from autocontext_jax.jobs.prepare import prepare
from autocontext_jax.jobs.run import Paths, run
from autocontext_jax.jobs.run_config import RunConfig
from autocontext_jax.jobs.run_folder import has_begun, open_data, read_data, read_split
from autocontext_jax.jobs.signals import StopSignal
from autocontext_jax.jobs.train import train
from autocontext_jax.training.checkpoints import Checkpoints
from autocontext_jax.training.phases import MODES, Mode, Phase

pytestmark = pytest.mark.usefixtures("compiled_once", "prepared_here")


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("phantoms") / "data"
    write_dataset(root, training=5, test=1, size=(24, 24, 24), spacing=(12.0, 12.0, 12.0), seed=0)
    return root


@pytest.fixture
def root(phantoms, tmp_path) -> Path:
    """A data set that a test may change."""
    shutil.copytree(phantoms, tmp_path / "data")
    return tmp_path / "data"


def small(root: Path, **sections) -> RunConfig:
    config = default_config()
    config.update(
        {
            "data": {"root": str(root), "workers": 1, "validation_fraction": 0.2},
            "levels": {"factors": (2, 1)},
            "loader": {"patch_size": (8,), "batch_size": 1},
            "model": {"base_channels": 2, "depth": 1},
            "predict": {"tile": (16,)},
            "train": {"steps": 4, "checkpoint_every": 2, "log_every": 1, "validation_patches": 1, "keep": 4},
        }
    )
    config.update(sections)
    return from_config_dict(config)


@pytest.fixture(scope="module")
def trained_once(phantoms, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("trained") / "run"
    config = small(phantoms)
    assert train(config, workdir, prepare(config, workdir))
    return workdir


@pytest.fixture
def trained(trained_once, tmp_path) -> Path:
    """A trained run that a test may change."""
    shutil.copytree(trained_once, tmp_path / "run")
    return tmp_path / "run"


def describe(root: Path, **changes) -> None:
    path = root / "dataset.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | changes), encoding="utf-8")


def add_case(root: Path) -> None:
    for folder, end in (("imagesTr", "_0000.nii.gz"), ("labelsTr", ".nii.gz")):
        shutil.copy(root / folder / f"phantom_000{end}", root / folder / f"another{end}")
    describe(root, numTraining=6)


def correct_label(path: Path) -> None:
    image = sitk.ReadImage(path)
    image[0, 0, 0] = 1
    sitk.WriteImage(image, path)


def sides(workdir: Path) -> dict[str, str]:
    return {name: case.side for name, case in read_split(workdir).cases.items()}


def rows(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_bytes().splitlines()]


# ---- a data set that changes ----


def test_a_case_that_is_added_is_named_and_changes_no_side(root, tmp_path, caplog):
    """Before, the split was drawn anew, and cases that were trained on were scored as held out."""
    config = small(root)
    open_data(config, tmp_path / "run")
    before = sides(tmp_path / "run")
    assert sorted(before.values()) == ["test", "training", "training", "training", "training", "validation"]
    add_case(root)
    with caplog.at_level(logging.WARNING):
        open_data(config, tmp_path / "run")
    assert sides(tmp_path / "run") == before
    (record,) = caplog.records
    assert "1 case was added since the run began" in record.getMessage()
    assert "another" in record.getMessage()
    assert "--config.data.new_cases=train" in record.getMessage()

    taken = small(root, data={"new_cases": "train"})
    open_data(taken, tmp_path / "run")
    assert sides(tmp_path / "run") == before | {"another": "training"}


def test_corrected_labels_are_named_and_prepared_again(root, tmp_path, caplog):
    config, workdir = small(root), tmp_path / "run"
    data = prepare(config, workdir)
    case = data.training[0]
    prepared = tmp_path / "run" / "prepared" / f"{case.name}.ome.zarr" / "zarr.json"
    other = tmp_path / "run" / "prepared" / f"{data.training[1].name}.ome.zarr" / "zarr.json"
    before = prepared.stat().st_mtime_ns, other.stat().st_mtime_ns
    correct_label(case.label)
    with caplog.at_level(logging.WARNING):
        prepare(config, workdir)
    (message,) = [record.getMessage() for record in caplog.records if "changed since" in record.getMessage()]
    assert case.name in message
    assert "what was trained so far has seen the old ones" in message
    assert prepared.stat().st_mtime_ns > before[0]
    assert other.stat().st_mtime_ns == before[1]


def test_a_start_on_a_prepared_set_reads_no_voxel_of_it(root, tmp_path):
    """The files' content is exchanged for garbage of the same size and time: nobody notices, as nobody reads."""
    config, workdir = small(root), tmp_path / "run"
    prepare(config, workdir)

    def times() -> dict[Path, int]:
        files = (workdir / "prepared").rglob("*")
        return {path: path.stat().st_mtime_ns for path in files if path.suffix != ".lock"}

    before = times()
    for path in root.rglob("*.nii.gz"):
        status = path.stat()
        path.write_bytes(b"\0" * status.st_size)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    prepare(config, workdir)
    assert times() == before


def test_a_test_case_that_is_added_is_named_without_advice_that_does_not_help(root, tmp_path, caplog):
    for folder, end in (("imagesTs", "_0000.nii.gz"), ("labelsTs", ".nii.gz")):
        (root / folder / f"phantom_005{end}").rename(tmp_path / f"{folder}{end}")
    describe(root, numTest=0)
    open_data(small(root), tmp_path / "run")
    for folder, end in (("imagesTs", "_0000.nii.gz"), ("labelsTs", ".nii.gz")):
        (tmp_path / f"{folder}{end}").rename(root / folder / f"phantom_005{end}")
    describe(root, numTest=1)
    with caplog.at_level(logging.WARNING):
        open_data(small(root, data={"new_cases": "train"}), tmp_path / "run")
    (record,) = caplog.records
    assert record.getMessage().endswith("neither trained on nor scored: phantom_005")


def test_what_is_odd_in_a_data_set_is_told_once(root, tmp_path, caplog):
    describe(root, colour="red")
    with caplog.at_level(logging.WARNING):
        open_data(small(root), tmp_path / "run")
    (record,) = caplog.records
    assert record.getMessage().endswith("these keys are not known and have no effect: colour")


def test_the_same_data_set_in_another_folder_is_the_same(root, tmp_path, caplog):
    workdir = tmp_path / "run"
    open_data(small(root), workdir)
    moved = root.rename(tmp_path / "moved")
    with caplog.at_level(logging.WARNING):
        data = open_data(small(moved), workdir)
    assert caplog.records == []
    assert all(moved in case.images[0].parents for case in data.training)


@pytest.mark.parametrize("look", [open_data, read_data])
def test_a_case_that_is_lost_is_named(root, tmp_path, look):
    config, workdir = small(root), tmp_path / "run"
    lost = open_data(config, workdir).training[0].name
    before = (workdir / "split.json").read_bytes()
    for path in root.rglob(f"{lost}*"):
        path.unlink()
    describe(root, numTraining=4)
    with pytest.raises(UserError, match=f"lacks {lost}, which .*split.json names: bring it back"):
        look(config, workdir)
    assert (workdir / "split.json").read_bytes() == before


def test_when_the_last_label_of_the_test_cases_vanishes_no_other_cases_are_scored(root, trained):
    """Before, the validation cases were scored in their place with no more than a warning."""
    config, workdir = small(root), trained
    for path in (root / "labelsTs").glob("*"):
        path.unlink()
    with pytest.raises(UserError, match=r"lacks the label of phantom_005, which .*split\.json names"):
        run("evaluate", config, Paths(workdir))
    assert not (workdir / "evaluation.json").exists()


def test_the_table_says_which_cases_were_scored(root, tmp_path):
    cases, cases_are = open_data(small(root), tmp_path / "run").scored(best=True)
    assert ([case.name for case in cases], cases_are(1)) == (["phantom_005"], "1 test case")
    for folder in ("imagesTs", "labelsTs"):
        shutil.rmtree(root / folder)
    describe(root, numTest=0)
    cases, cases_are = open_data(small(root), tmp_path / "other").scored(best=True)
    assert len(cases) == 1
    assert cases_are(1) == "1 validation case, which also chose the checkpoint: scores are optimistic"
    _, cases_are = open_data(small(root), tmp_path / "other").scored(best=False)
    assert cases_are(2) == "2 validation cases"


def test_masks_of_different_evaluations_are_never_mixed(root, trained):
    config, workdir = small(root), trained
    stray = workdir / "predictions" / "of_an_earlier_evaluation.nii.gz"
    stray.parent.mkdir()
    stray.write_bytes(b"")
    assert run("evaluate", config, Paths(workdir))
    assert [path.name for path in (workdir / "predictions").glob("*.nii.gz")] == ["phantom_005.nii.gz"]


# ---- using a run ----


def test_looking_at_a_run_changes_nothing_in_it(root, trained, tmp_path):
    config, workdir = small(root), trained
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    scan = next((root / "imagesTs").iterdir())
    assert run("predict", config, Paths(workdir, source=scan, target=tmp_path / "mask.nii.gz"))
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*")} == before
    assert scans.read_grid(tmp_path / "mask.nii.gz") == scans.read_grid(scan)


def test_a_checkpoint_that_is_being_saved_survives_whoever_only_reads(tmp_path):
    """A manager that is opened for writing removes it, and the training run ended with an error."""
    state = {"params": {"w": jnp.arange(3.0)}}
    writer = Checkpoints(tmp_path / "checkpoints")
    writer.save(1, state, {})
    writer.wait()
    saving = tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp-17"
    saving.mkdir()
    reader = Checkpoints(tmp_path / "checkpoints", read_only=True)
    assert reader.latest == 1
    params, _ = reader.restore_weights(1, jax.eval_shape(lambda: state["params"]), {})
    np.testing.assert_array_equal(params["w"], [0, 1, 2])
    reader.close()
    assert saving.exists()
    writer.close()
    resumed = Checkpoints(tmp_path / "checkpoints")
    resumed.save(3, state, {})  # orbax removes it in a thread of its own, and ends that before it saves
    resumed.wait()
    resumed.close()
    assert not saving.exists()


def test_a_mask_that_no_format_is_written_for_is_refused_before_the_prediction(root, tmp_path):
    scan = next((root / "imagesTs").iterdir())
    with pytest.raises(UserError, match=r"x\.mhd cannot be written"):  # the run does not even exist
        run("predict", small(root), Paths(tmp_path / "no run", source=scan, target=tmp_path / "x.mhd"))


def test_a_picture_for_a_scan_of_many_slices_is_refused_before_the_prediction(root, trained, tmp_path, monkeypatch):
    scan = next((root / "imagesTs").iterdir())
    monkeypatch.setattr(Model, "mask", lambda *_: pytest.fail("predicted"))
    with pytest.raises(UserError, match=r"x\.png cannot hold a mask of \d+ slices"):
        run("predict", small(root), Paths(trained, source=scan, target=tmp_path / "x.png"))


# ---- going on ----


def test_a_run_that_is_stopped_goes_on_where_it_was(root, tmp_path, monkeypatch):
    """A signal at a checkpoint step does not skip its validation, and skipped steps are counted on."""
    config, workdir = small(root, train={"non_finite": "skip"}), tmp_path / "run"
    real = training.make_train_step

    def with_broken_steps(*arguments, **keywords):
        step = real(*arguments, **keywords)

        def take(state, batch, rate):
            state, metrics = step(state, batch, rate)
            return state, metrics.replace(loss=jnp.nan) if int(state.step) in (1, 3) else metrics

        return take

    monkeypatch.setattr(training, "make_train_step", with_broken_steps)
    monkeypatch.setattr(StopSignal, "requested", lambda self, step: step == 2)
    assert not train(config, workdir, prepare(config, workdir))
    assert [row["step"] for row in rows(workdir) if "validation_loss" in row] == [2]
    assert rows(workdir)[-1]["skipped_steps"] == 1
    monkeypatch.setattr(StopSignal, "requested", lambda self, step: step == 3)
    assert not train(config, workdir, prepare(config, workdir))
    assert [row["step"] for row in rows(workdir) if "validation_loss" in row] == [2]
    assert rows(workdir)[-1]["skipped_steps"] == 2


def test_another_number_of_steps_in_the_middle_of_a_schedule_is_told(root):
    cosine = small(root, optimizer={"schedule": "cosine"})
    longer = dataclasses.replace(cosine, train=dataclasses.replace(cosine.train, steps=8))
    told = training._changed_schedule(longer, cosine, 2)
    assert "train.steps is 8; it was 4" in told
    assert "from step 2 on the learning rate is 0.000854 in place of 0.0005" in told
    assert training._changed_schedule(cosine, cosine, 2) == ""
    constant = small(root)
    longer = dataclasses.replace(constant, train=dataclasses.replace(constant.train, steps=8))
    assert training._changed_schedule(longer, constant, 2) == ""


def test_a_new_training_mode_is_in_the_table_of_an_experiment(monkeypatch):
    monkeypatch.setitem(MODES, "new", Mode(lambda levels: (Phase((1,), (1,)),), lambda levels: {1: "A new mode"}))
    scores = {"dice": 0.5, "jaccard": 0.4, "volume_difference": 0.0, "hausdorff_95": 1.0, "surface_distance": 1.0,
              "surface_dice": 0.5, "true_positives": 1, "false_positives": 1, "false_negatives": 1}  # fmt: skip
    cases = {mode: {"case": {f"level_{level}": {"liver": scores} for level in (1, 2)}} for mode in MODES}
    table = side_by_side(cases, 2, ["liver"], cases_are="1 test case", tolerance=2.0)
    assert list(table["summary"]) == ["Level 1", "Level 2 auto-context", "End-to-end", "No auto-context", "A new mode"]


# ---- several processes, few processors ----


def test_one_processes_mistake_is_every_processes(monkeypatch):
    """Before, the others waited for it, for up to a day."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(processes, "gather", lambda value: [value, "case 7 cannot be read"])
    with pytest.raises(UserError, match="case 7 cannot be read"):
        processes.agree(lambda: "fine")
    monkeypatch.setattr(processes, "gather", lambda value: ["", value])

    def mistake():
        raise UserError("mine")

    with pytest.raises(UserError, match="mine"):
        processes.agree(mistake)
    assert processes.agree(lambda: "fine") == "fine"


@pytest.mark.parametrize(
    ("files", "count"),
    [
        ({"/proc/self/cgroup": "0::/\n", "/sys/fs/cgroup/cpu.max": "50000 100000\n"}, 1),
        ({"/proc/self/cgroup": "0::/\n", "/sys/fs/cgroup/cpu.max": "max 100000\n"}, 3),
        ({"/proc/self/cgroup": "0::/\n", "/sys/fs/cgroup/cpu.max": "250000 100000\n"}, 3),
        ({"/proc/self/cgroup": "0::/job/step\n", "/sys/fs/cgroup/job/cpu.max": "200000 100000\n"}, 2),
        ({"/proc/self/cgroup": "0::/job/step\n", "/sys/fs/cgroup/job/step/cpu.max": "90000 100000\n"}, 1),
        ({"/proc/self/cgroup": "0::/outside\n", "/sys/fs/cgroup/cpu.max": "200000 100000\n"}, 2),
        (
            {
                "/proc/self/cgroup": "5:memory:/job\n4:cpu,cpuacct:/job\n0::/\n",
                "/sys/fs/cgroup/cpu/job/cpu.cfs_quota_us": "200000\n",
                "/sys/fs/cgroup/cpu/job/cpu.cfs_period_us": "100000\n",
                "/sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "/sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            2,
        ),
        ({}, 3),
    ],
)
def test_workers_are_as_many_as_the_container_allows(monkeypatch, files, count):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 2})

    def read(path, encoding):
        if str(path) in files:
            return files[str(path)]
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", read)
    assert runtime.available_cpus() == count


def test_a_run_has_begun_with_a_checkpoint_or_while_a_fold_is_trained(tmp_path):
    (tmp_path / "timing/checkpoints/7").mkdir(parents=True)  # of a start that was killed
    (tmp_path / "fold_0").mkdir()
    assert not has_begun(tmp_path)
    with locked(tmp_path / "fold_0"):
        assert has_begun(tmp_path)
    assert not has_begun(tmp_path)
    (tmp_path / "separate/checkpoints/7").mkdir(parents=True)
    assert has_begun(tmp_path)


def test_data_sets_of_one_name_are_scored_in_different_folders(tmp_path):
    def folder(root: str) -> Path:
        return evaluation_folder(config_from_flat(RunConfig(), {"evaluate.root": str(tmp_path / root)}), tmp_path)

    assert folder("a/heart") == tmp_path / "on_heart"
    folder("a/heart").mkdir()
    settings = {"root": str((tmp_path / "a/heart").resolve())}
    (tmp_path / "on_heart/evaluation.json").write_text(json.dumps({"settings": settings}), encoding="utf-8")
    assert folder("a/heart") == tmp_path / "on_heart"
    assert folder("b/heart") == tmp_path / "on_heart_2"
    folder("b/heart").mkdir()
    settings = {"root": str((tmp_path / "b/heart").resolve())}
    (tmp_path / "on_heart_2/evaluation.json").write_text(json.dumps({"settings": settings}), encoding="utf-8")
    (tmp_path / "on_heart/evaluation.json").unlink()  # an evaluation that was killed
    assert folder("b/heart") == tmp_path / "on_heart_2"
    assert folder("a/heart") == tmp_path / "on_heart"


def test_a_training_that_begins_anew_removes_the_results_of_another_model(root, trained, tmp_path):
    shutil.rmtree(trained / "checkpoints")
    results = [trained / place / "evaluation.json" for place in ("", "validation", "on_heart")]
    for result in results:
        result.parent.mkdir(exist_ok=True)
        result.write_text("{}", encoding="utf-8")
    config = small(root)
    assert train(config, trained, prepare(config, trained))
    assert not any(result.exists() for result in results)


def test_a_file_that_cannot_be_read_does_not_stop_the_scores_of_another_data_set(tmp_path):
    """What is written of its cases is known without reading them."""
    config = config_from_flat(RunConfig(), {"evaluate.root": str(tmp_path)})
    settings = settings_of(config, 1, [Case("a", (tmp_path / "none.nii.gz",), tmp_path / "none.nii.gz")])
    assert (settings["cases"], settings["root"]) == ({"a": ""}, str(tmp_path.resolve()))


def test_a_scan_that_is_trained_on_and_held_out_is_named(root, tmp_path, caplog):
    name = open_data(small(root), tmp_path / "before").training[0].name
    assert "same scan" not in caplog.text
    for folder, end in (("images{}", "_0000.nii.gz"), ("labels{}", ".nii.gz")):
        shutil.copy(root / folder.format("Tr") / f"{name}{end}", root / folder.format("Ts") / f"copy{end}")
    describe(root, numTest=2)
    open_data(small(root), tmp_path / "run")
    assert f"the training case {name} and the test case copy have the same scan" in caplog.text


def test_a_damaged_split_is_told_in_one_line(root, tmp_path):
    config, workdir = small(root), tmp_path / "run"
    open_data(config, workdir)
    path = workdir / "split.json"
    path.write_text(path.read_text(encoding="utf-8").replace('"training"', '"validation"', 1), encoding="utf-8")
    with pytest.raises(UserError, match=r"split\.json is damaged or was edited"):
        open_data(config, workdir)


def test_a_run_without_split_or_config_says_so(tmp_path):
    with pytest.raises(UserError, match=r"has no config\.json"):
        run("evaluate", RunConfig(), Paths(tmp_path))
    write_config(RunConfig(), tmp_path)
    with pytest.raises(UserError, match=r"has no split\.json"):
        run("evaluate", RunConfig(), Paths(tmp_path))
