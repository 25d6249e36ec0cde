"""The real command line as a subprocess: the whole job, resuming, and the user's mistakes."""

import itertools
import json
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from forked_commands import Forked, ForkedCommands

from autocontext_jax.data.phantom.anatomy import ORGANS
from autocontext_jax.data.phantom.dataset import write_dataset
from autocontext_jax.images import scans
from autocontext_jax.jobs.config_files import read_config
from autocontext_jax.jobs.run_config import RunConfig
from autocontext_jax.sections import as_dict, flat_keys

pytestmark = pytest.mark.usefixtures("compiled_quickly")

ROOT = Path(__file__).parent.parent
COMMANDS: ForkedCommands
# The quick-start's own configuration, made small.
SMALL = [
    "--config.phantom.training=5",
    "--config.phantom.test=2",
    "--config.phantom.size=(40, 40, 40)",
    "--config.phantom.spacing=(8.0, 8.0, 8.0)",
    "--config.loader.patch_size=16",
    "--config.loader.batch_size=2",
    "--config.model.base_channels=2",
    "--config.model.depth=2",
    "--config.train.steps=24",
    "--config.train.checkpoint_every=8",
    "--config.train.log_every=1",
    "--config.train.validation_patches=4",
    "--config.predict.tile=32",
]


def command(*arguments: object, config: str = "configs/quickstart.py") -> list[str]:
    return [sys.executable, "-m", "autocontext_jax.main", "--config", config, *map(str, arguments)]


@pytest.fixture(scope="module", autouse=True)
def commands(compiled_quickly, tmp_path_factory):
    """Forks the commands of `run` and `use`; what one of them has compiled the others need not compile again."""
    global COMMANDS
    with ForkedCommands(ROOT, programs=tmp_path_factory.mktemp("programs")) as COMMANDS:
        yield


def start(*arguments: object) -> Forked:
    return COMMANDS.start("--config", "configs/quickstart.py", *arguments)


def run(*arguments: object, config: str = "configs/quickstart.py", **environment: str) -> subprocess.CompletedProcess:
    return COMMANDS.run("--config", config, *arguments, **environment)


def use(*arguments: object, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    """A job that only uses a run: without --config, as the run folder knows its own."""
    return COMMANDS.run(*arguments, cwd=cwd)


def run_anew(*arguments: object, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    """The same in a process that imports and compiles everything itself."""
    return subprocess.run(
        command(*arguments),
        cwd=ROOT, env=environment, capture_output=True, encoding="utf-8", timeout=300, check=False,
    )  # fmt: skip


def metrics(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_bytes().splitlines()]


def losses(workdir: Path) -> dict[int, tuple[float, float, float]]:
    return {row["step"]: (row["loss"], row["loss_level_1"], row["loss_level_2"]) for row in metrics(workdir)}


def one_line_error(result: subprocess.CompletedProcess) -> str:
    """The line of a user's mistake: status 2, no traceback, one line that begins with "error: "."""
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.stderr
    return lines[0]


@pytest.fixture(scope="module")
def whole_job(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    workdir = tmp_path_factory.mktemp("job")
    result = run_anew("--workdir", workdir, *SMALL, environment=COMMANDS.environment)  # keeps its programs for others
    assert result.returncode == 0, result.stderr
    return workdir, result


def test_whole_job_leaves_everything(whole_job):
    workdir, result = whole_job
    rows = metrics(workdir)
    assert [row["step"] for row in rows] == list(range(1, 25))
    assert all(np.isfinite(row["loss"]) and row["patches_per_second"] > 0 for row in rows)
    assert [row["step"] for row in rows if "validation_loss" in row] == [8, 16, 24]
    assert read_config(workdir).train.steps == 24
    split = json.loads((workdir / "split.json").read_bytes())
    assert split["classes"] == ["background", *ORGANS]
    sides = [case["side"] for case in split["cases"].values()]
    assert (sides.count("training"), sides.count("validation"), sides.count("test")) == (4, 1, 2)
    assert list((workdir / "tensorboard").iterdir())

    evaluation = json.loads((workdir / "evaluation.json").read_bytes())
    assert evaluation["classes"] == list(ORGANS)
    assert sorted(evaluation["cases"]) == ["phantom_005", "phantom_006"]
    for name, levels in evaluation["cases"].items():
        truth = scans.read_grid(workdir / "phantoms" / "labelsTs" / f"{name}.nii.gz")
        assert scans.read_grid(workdir / "predictions" / f"{name}.nii.gz") == truth
        assert (workdir / "pictures" / f"{name}.png").stat().st_size > 10_000
        assert levels.keys() == {"level_1", "level_2"}
        assert 0 <= levels["level_2"]["liver"]["dice"] <= 1
    mean = evaluation["summary"]["level_2"]["mean"]["dice"]
    assert mean["min"] <= mean["avg"] <= mean["max"]
    table = (workdir / "table.md").read_text(encoding="utf-8")
    assert table in result.stdout
    assert evaluation["cases_are"] == "2 test cases"
    assert "\n2 test cases. Each scan was scored on its own grid.\n" in table
    assert f"| avg | {100 * evaluation['summary']['level_1']['artery']['dice']['avg']:.1f} |" in table


def test_a_finished_run_only_evaluates_again(whole_job):
    workdir, _ = whole_job
    before = (workdir / "metrics.jsonl").read_text(encoding="utf-8")
    result = run("--workdir", workdir, *SMALL)
    assert result.returncode == 0, result.stderr
    assert (workdir / "metrics.jsonl").read_text(encoding="utf-8") == before


def test_killed_and_started_again_the_losses_are_the_same_to_the_bit(whole_job, tmp_path):
    workdir, _ = whole_job
    shutil.copytree(workdir / "phantoms", tmp_path / "phantoms")
    arguments = ["--workdir", tmp_path, "--mode", "train", *SMALL]
    first = start(*arguments)
    log, deadline = tmp_path / "metrics.jsonl", time.monotonic() + 240
    while time.monotonic() < deadline and first.poll() is None:
        if (tmp_path / "checkpoints" / "8").exists() and log.read_text(encoding="utf-8").count("\n") >= 10:
            break
        time.sleep(0.002)
    first.send_signal(signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL, "it ended before it could be killed"
    assert not (tmp_path / "checkpoints" / "24").exists()

    result = run_anew(*arguments)
    assert result.returncode == 0, result.stderr
    assert "from step 0" not in result.stderr
    assert losses(tmp_path) == losses(workdir)


def test_sigterm_saves_and_the_next_start_goes_on(whole_job, tmp_path):
    workdir, _ = whole_job
    shutil.copytree(workdir / "phantoms", tmp_path / "phantoms")
    arguments = ["--workdir", tmp_path, "--mode", "train", *SMALL, "--config.train.checkpoint_every=1000"]
    first = start(*arguments)
    log, deadline = tmp_path / "metrics.jsonl", time.monotonic() + 240
    while time.monotonic() < deadline and first.poll() is None:
        if log.exists() and log.read_text(encoding="utf-8").count("\n") >= 2:
            break
        time.sleep(0.01)
    first.send_signal(signal.SIGTERM)
    ended = first.ended()
    assert "stopped by a signal at step" in ended.stderr
    assert ended.returncode == 0
    stopped_at = metrics(tmp_path)[-1]["step"]
    assert (tmp_path / "checkpoints" / str(stopped_at)).exists()
    result = run(*arguments)
    assert f"from step {stopped_at}" in result.stderr
    assert losses(tmp_path) == losses(workdir)


def test_losses_do_not_depend_on_the_number_of_devices(whole_job, tmp_path):
    workdir, _ = whole_job
    shutil.copytree(workdir / "phantoms", tmp_path / "phantoms")
    arguments = ["--workdir", tmp_path, "--mode", "train", *SMALL, "--config.train.steps=3"]
    result = run(*arguments, XLA_FLAGS="--xla_force_host_platform_device_count=2")
    assert result.returncode == 0, result.stderr
    assert "2 cpu device(s)" in result.stderr
    for step, values in losses(tmp_path).items():
        # Adam's first steps divide by gradients near zero: rounding grows from step to step.
        assert values == pytest.approx(losses(workdir)[step], abs=1e-5 if step == 1 else 1e-3)


def test_numbers_that_are_not_finite_stop_the_run_or_are_skipped(whole_job, tmp_path):
    workdir, _ = whole_job
    shutil.copytree(workdir / "phantoms", tmp_path / "phantoms")
    wild = ["--config.model.norm=none", "--config.optimizer.learning_rate=2e9", "--config.train.steps=6"]
    arguments = ["--workdir", tmp_path, "--mode", "train", *SMALL, *wild, "--config.train.checkpoint_every=6"]
    error = one_line_error(run(*arguments))
    assert re.match(
        r"error: step \d of cases phantom_00\d, phantom_00\d has loss (nan|inf|-?\d.*) and a gradient", error
    )
    assert "--config.train.non_finite=skip" in error
    assert not (tmp_path / "checkpoints" / "6").exists()
    result = run(*arguments, "--config.train.non_finite=skip")
    assert result.returncode == 0, result.stderr
    assert "skipped, 1 so far" in result.stderr
    assert metrics(tmp_path)[-1]["skipped_steps"] >= 1


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is one of glibc")
@pytest.mark.parametrize("kept", [True, False])
def test_freed_memory_is_kept(kept):
    code = """if True:
        import resource
        import sys
        from autocontext_jax import runtime
        if sys.argv[1] == "True":
            runtime.keep_freed_memory()
        faults = [0]
        for _ in range(3):
            bytearray(2**31 + 2**26)  # more than any threshold that glibc takes
            faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
        print(faults[-1] - faults[-2])"""
    result = subprocess.run(
        [sys.executable, "-c", code, str(kept)], cwd=ROOT, capture_output=True, encoding="utf-8", check=True
    )
    assert (int(result.stdout) < 100) == kept  # 540,672 pages of 4 KiB, or 1,056 of 2 MiB


@pytest.mark.parametrize(
    ("dtype", "own", "passes"),
    [("float32", "", 1), ("bfloat16", "", 2), ("float32", "--xla_backend_extra_options=xla_none", 2)],
)
def test_programs_in_float32_compute_several_results_in_one_pass(tmp_path, dtype, own, passes):
    code = """if True:
        import sys
        from autocontext_jax import main
        main.main(["main", *sys.argv[1:]])
        import jax
        x = jax.numpy.ones((64, 64))
        print(jax.jit(lambda a, b: (2 * a + b, 3 * a * b)).lower(x, x).compile().as_text().count(" fusion("))"""
    nowhere = tmp_path / "nowhere"
    arguments = command(
        "--workdir", tmp_path, "--mode=prepare", "--config.phantom.training=0", f"--config.data.root={nowhere}"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments[3:], f"--config.model.dtype={dtype}"],
        cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": own},
        capture_output=True, encoding="utf-8", check=True,
    )  # fmt: skip
    assert f"{nowhere} is not a folder" in result.stderr
    assert int(result.stdout) == passes


def two_processes(*arguments: object, terminate_after: int = 0) -> list[tuple[int, str]]:
    """Status and standard error of each of two processes of one run; the second gets a SIGTERM after some steps."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        where = ["--coordinator", f"localhost:{free.getsockname()[1]}", "--processes", 2]
    running = [start(*arguments, *where, "--process", number) for number in range(2)]
    if terminate_after:
        log, deadline = Path(arguments[1]) / "metrics.jsonl", time.monotonic() + 240
        while time.monotonic() < deadline and all(process.poll() is None for process in running):
            if log.exists() and log.read_text(encoding="utf-8").count("\n") >= terminate_after:
                break
            time.sleep(0.01)
        running[1].send_signal(signal.SIGTERM)
    ended = [process.ended() for process in running]
    return [(process.returncode, process.stderr) for process in ended]


def test_two_processes_do_one_run(whole_job, tmp_path):
    """The same losses, one log; the SIGTERM of either stops both after one step, saved, and one process goes on."""
    workdir, _ = whole_job
    shutil.copytree(workdir / "phantoms", tmp_path / "phantoms")
    arguments = ["--workdir", tmp_path, *SMALL, "--config.train.checkpoint_every=1000"]
    for status, errors in two_processes(*arguments, terminate_after=2):
        assert status == 0, errors
    stopped_at = metrics(tmp_path)[-1]["step"]
    assert 2 <= stopped_at < 24
    assert [row["step"] for row in metrics(tmp_path)] == list(range(1, stopped_at + 1))
    assert (tmp_path / "checkpoints" / str(stopped_at)).exists()

    again = tmp_path / "again"  # by both to the end, with the scans shared between them; and by one alone
    shutil.copytree(tmp_path, again)
    for status, errors in two_processes("--workdir", again, *arguments[2:]):
        assert status == 0, errors
    assert json.loads((again / "evaluation.json").read_bytes())["cases"].keys() == {"phantom_005", "phantom_006"}
    assert sorted(path.name for path in (again / "predictions").glob("*.nii.gz")) == [
        "phantom_005.nii.gz", "phantom_006.nii.gz",
    ]  # fmt: skip
    result = run(*arguments, "--mode", "train")
    assert f"from step {stopped_at}" in result.stderr
    for step, values in losses(tmp_path).items():
        # Adam's first steps divide by gradients near zero: rounding grows from step to step.
        assert values == pytest.approx(losses(workdir)[step], abs=1e-5 if step == 1 else 1e-3 if step < 5 else 0.1)
        assert losses(again)[step] == pytest.approx(values, abs=1e-5 if step <= stopped_at + 1 else 0.1)


def test_predict_one_file_and_a_folder_with_a_bad_scan(whole_job, tmp_path):
    workdir, _ = whole_job
    good = workdir / "phantoms" / "imagesTs" / "phantom_005_0000.nii.gz"
    target = tmp_path / "out" / "mask.nii.gz"
    predict = ["--workdir", workdir, *SMALL, "--mode", "predict"]
    result = run(*predict, "--input", good, "--output", target)
    assert result.returncode == 0, result.stderr
    assert scans.read_grid(target) == scans.read_grid(good)
    predicted = sitk.GetArrayFromImage(sitk.ReadImage(target))
    stored = sitk.GetArrayFromImage(sitk.ReadImage(workdir / "predictions" / "phantom_005.nii.gz"))
    np.testing.assert_array_equal(predicted, stored)

    folder = tmp_path / "in"
    folder.mkdir()
    flipped = sitk.PermuteAxes(sitk.Flip(sitk.ReadImage(good), [True, False, True]), [2, 0, 1])
    sitk.WriteImage(flipped, folder / "a.nii.gz")
    (folder / "b.nii.gz").write_bytes(good.read_bytes()[:5000])
    sitk.WriteImage(sitk.ReadImage(good), folder / "c.mha")
    result = run(*predict, "--input", folder, "--output", tmp_path / "masks")
    assert result.returncode == 1, result.stderr
    assert "b.nii.gz" in result.stderr
    assert "1 of 3 scans could not be predicted" in result.stderr
    # However a scan's axes are stored, the mask is the same in physical space.
    again = sitk.ReadImage(tmp_path / "masks" / "a.nii.gz")
    assert again.GetSize() == flipped.GetSize()
    assert again.GetDirection() == pytest.approx(flipped.GetDirection())
    back = sitk.Resample(again, sitk.ReadImage(target), sitk.Transform(), sitk.sitkNearestNeighbor)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(back), predicted)
    other = sitk.ReadImage(tmp_path / "masks" / "c.nii.gz")
    np.testing.assert_array_equal(sitk.GetArrayFromImage(other), predicted)


def test_another_config_in_the_same_work_directory(whole_job):
    workdir, _ = whole_job
    message = one_line_error(run("--workdir", workdir, *SMALL, "--config.model.base_channels=3"))
    assert "model.base_channels (the run has 2, given is 3)" in message


def test_a_missing_config_file(tmp_path):
    assert "configs/nope.py" in one_line_error(run("--workdir", tmp_path, config="configs/nope.py"))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("config.augmentation.flip = True", "augmentation.flip is True; expected str: axes along which"),
        ("config.loader.patch_size = 64", "loader.patch_size is 64; expected tuple[int, ...]: (z, y, x) voxels of"),
    ],
)
def test_a_value_of_another_type_in_a_config_file(tmp_path, line, expected):
    (tmp_path / "old.py").write_text(
        "from autocontext_jax.jobs.config_files import default_config\n\n\n"
        f"def get_config():\n    config = default_config()\n    {line}\n    return config\n",
        encoding="utf-8",
    )
    assert f"config key {expected}" in one_line_error(run("--workdir", tmp_path, config=str(tmp_path / "old.py")))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--mode", "train"], ["--workdir"]),
        (["--wrokdir", "W"], ["wrokdir", "Did you mean: workdir"]),
        (["--workdir", "W", "--config.model.widht=8"], ["widht"]),
        (["--workdir", "W", "--config.model.base_channels=wide"], ["base_channels", "wide"]),
        (["--workdir", "W", "--config.loader.patch_size=30"], ["loader.patch_size", "30", "multiples of (8, 8, 8)"]),
        (
            ["--workdir", "W", "--config.loader.patch_size=36"],
            ["loader.patch_size", "36", "multiples of (8, 8, 8)"],
        ),
        (["--workdir", "W", "--mode", "fly"], ["mode", "fly"]),
        (["--workdir", "W", "--mode", "predict"], ["--input"]),
        (["--workdir", "W", "--mode", "evaluate", *SMALL], ["config.json"]),
        (["--workdir", "W", "--mode", "report"], ["config.json", "--mode train"]),
        (["--workdir", "W", "--config.phantom.training=0"], ["data.root"]),
        (["--workdir", "W", "--config.phantom.training=0", "--config.data.root=/no/such"], ["/no/such"]),
        (["--workdir", "/proc/no", *SMALL], ["/proc/no"]),
    ],
)
def test_mistakes_end_in_one_line(tmp_path, arguments, words):
    message = one_line_error(run(*[str(tmp_path / "w") if word == "W" else word for word in arguments]))
    assert all(word in message for word in words), message


def test_bad_cases_are_all_named_and_the_good_ones_prepared(tmp_path):
    root = tmp_path / "data"
    write_dataset(root, training=4, test=0, size=(40, 40, 40), spacing=(8.0, 8.0, 8.0), seed=0)
    labels = root / "labelsTr"
    label = sitk.ReadImage(labels / "phantom_000.nii.gz")
    sitk.WriteImage(label * 0, labels / "phantom_000.nii.gz")
    label.SetSpacing((8.0, 8.0, 9.0))
    sitk.WriteImage(label, labels / "phantom_001.nii.gz")
    (labels / "phantom_002.nii.gz").write_bytes(b"")
    result = run(
        "--workdir", tmp_path, "--mode", "prepare", "--config.phantom.training=0", f"--config.data.root={root}"
    )  # fmt: skip
    message = one_line_error(result)
    assert "2 of 4 cases" in message
    everything = result.stderr
    assert all(f"phantom_00{number}" in everything for number in (1, 2))
    assert "9" in everything
    prepared = sorted(path.parent.name for path in (tmp_path / "prepared").glob("*/zarr.json"))
    assert prepared == ["phantom_000.ome.zarr", "phantom_003.ome.zarr"]


def test_another_data_set_with_other_labels(whole_job, tmp_path):
    """It lacks organs, names and numbers others, and has one that is unknown here."""
    workdir, _ = whole_job
    root = tmp_path / "elsewhere"
    shutil.copytree(workdir / "phantoms", root)
    description = json.loads((root / "dataset.json").read_bytes())
    description["labels"] = {"background": 0, "kidney": 1, "spleen": 2, "Leber": 3}
    (root / "dataset.json").write_text(json.dumps(description), encoding="utf-8")
    there = np.array([0, 1, 0, 3, 2, 0, 0, 0], np.uint8)  # artery, liver and spleen are annotated
    for path in root.glob("labels*/*.nii.gz"):
        image = sitk.ReadImage(path)
        label = sitk.GetImageFromArray(there[sitk.GetArrayFromImage(image)])
        label.CopyInformation(image)
        sitk.WriteImage(label, path)
    arguments = ["--workdir", workdir, "--mode", "evaluate", f"--config.evaluate.root={root}"]
    result = use(*arguments, "--config.evaluate.label_mapping=('Leber=liver',)")
    assert result.returncode == 0, result.stderr
    own = json.loads((workdir / "evaluation.json").read_bytes())
    other = json.loads((workdir / "on_elsewhere" / "evaluation.json").read_bytes())
    assert other["classes"] == ["liver", "spleen"]
    assert other["cases_are"] == "7 labelled cases of elsewhere"
    assert len(other["cases"]) == 7  # all labelled cases: none of them was trained on, as far as it is known
    for name, levels in own["cases"].items():
        for level, organs in levels.items():
            assert other["cases"][name][level] == {organ: organs[organ] for organ in ("liver", "spleen")}
    message = one_line_error(use(*arguments, "--config.evaluate.label_mapping=('Leber=livre',)"))
    assert "Leber=livre" in message


def test_report_of_a_run(whole_job):
    workdir, _ = whole_job
    result = use("--workdir", workdir, "--mode", "report")
    assert result.returncode == 0, result.stderr
    text = (workdir / "report.html").read_text(encoding="utf-8")
    for case in ("phantom_005", "phantom_006"):
        assert f"{case}, Dice" in text
        assert (workdir / "pictures" / f"{case}_surfaces.png").stat().st_size > 10_000
    assert "Roth et al. (2018), end-to-end" in text
    assert (workdir / "dice.png").stat().st_size > 10_000


def test_an_experiment_compares_modes_and_goes_on(whole_job, tmp_path):
    workdir, _ = whole_job
    shutil.copytree(workdir / "phantoms", tmp_path / "phantoms")
    arguments = [*SMALL, "--config.train.steps=4", "--config.train.checkpoint_every=4"]
    experiment = "--config.experiment=('first_level', 'no_context')"
    result = run("--workdir", tmp_path, *arguments, experiment)
    assert result.returncode == 0, result.stderr
    evaluation = json.loads((tmp_path / "evaluation.json").read_bytes())
    blocks = ["Level 1", "No auto-context"]
    assert list(evaluation["summary"]) == blocks
    assert list(evaluation["comparisons"]) == ["No auto-context - Level 1"]
    assert (tmp_path / "table.md").read_text(encoding="utf-8") in result.stdout
    for block, mode, level in zip(blocks, ("first_level", "no_context"), (1, 2), strict=True):
        cases = json.loads((tmp_path / mode / "evaluation.json").read_bytes())["cases"]
        for name, scores in evaluation["cases"].items():
            assert scores[block] == cases[name][f"level_{level}"]
    assert [len(metrics(tmp_path / mode)) for mode in ("first_level", "no_context")] == [4, 4]

    # What is done is not done anew, but for a mode of which a scan could not be scored.
    before = (tmp_path / "first_level" / "evaluation.json").stat().st_mtime_ns
    incomplete = tmp_path / "no_context" / "evaluation.json"
    scored = json.loads(incomplete.read_bytes())
    del scored["cases"][next(iter(scored["cases"]))]
    incomplete.write_text(json.dumps(scored), encoding="utf-8")
    result = run("--workdir", tmp_path, *arguments, experiment)
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "evaluation.json").read_bytes()) == evaluation
    assert json.loads(incomplete.read_bytes())["cases"].keys() == evaluation["cases"].keys()
    assert (tmp_path / "first_level" / "evaluation.json").stat().st_mtime_ns == before

    # An evaluation under other settings is not the one that is there.
    result = run("--workdir", tmp_path, *arguments, experiment, "--config.evaluate.tolerance=20.0")
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "first_level" / "evaluation.json").read_bytes())["tolerance"] == 20
    assert "surface Dice at 20 mm" in result.stdout


def test_scans_slice_by_slice(whole_job, tmp_path):
    workdir, _ = whole_job
    shutil.copytree(workdir / "phantoms", tmp_path / "phantoms")
    result = run("--workdir", tmp_path, *SMALL, "--config.train.steps=4", config="configs/quickstart_2d.py")
    assert result.returncode == 0, result.stderr
    assert len(json.loads((tmp_path / "evaluation.json").read_bytes())["cases"]) == 2
    for path in (tmp_path / "predictions").glob("*.nii.gz"):
        assert scans.read_grid(path) == scans.read_grid(tmp_path / "phantoms" / "labelsTs" / path.name)


@pytest.mark.skipif(not (ROOT / "../shared/data/abdomen").exists(), reason="no real scans next to the checkout")
def test_real_scan_through_the_papers_config_made_small(tmp_path):
    root = (ROOT / "../shared/data/abdomen").resolve()
    small = [
        "--config.model.base_channels=2", "--config.model.depth=3", "--config.loader.patch_size=16",
        "--config.train.steps=2", "--config.predict.tile=32",
        f"--config.data.root={root}",
    ]  # fmt: skip
    config = "configs/abdomen_ct.py"
    result = run("--workdir", tmp_path, *small, config=config)
    assert result.returncode == 0, result.stderr
    assert "nothing is left to evaluate" in result.stderr
    scan = root / "imagesTr" / "abdomen_0000.nii.gz"
    # From another folder: the run folder alone is enough.
    result = use(
        "--workdir", tmp_path, "--mode", "predict", "--input", scan, "--output", tmp_path / "mask.nii.gz", cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    assert scans.read_grid(tmp_path / "mask.nii.gz") == scans.read_grid(scan)


def test_the_package_does_not_need_the_checkout(tmp_path):
    """The module is found from another folder, and says what it expects."""
    told = subprocess.run(
        [sys.executable, "-m", "autocontext_jax.main", "--mode", "train"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, encoding="utf-8", check=False,
    )  # fmt: skip
    message = one_line_error(told)
    assert "--workdir FOLDER" in message
    assert "--config FILE" in message


def test_help(tmp_path):
    script = Path(sys.executable).with_name("autocontext")  # as an installation makes it
    of_script = subprocess.run([script], cwd=tmp_path, capture_output=True, encoding="utf-8", check=True)
    for told in (of_script, use("--help"), use("-h"), use("--mode", "predict", "--help")):
        assert told.returncode == 0
        assert told.stdout.startswith("Trains multi-scale pyramids")
        assert told.stderr == ""
        for words in ("usage: autocontext", "--config.data.root=", "--help-keys", "  export  ", "  --coordinator"):
            assert words in told.stdout
    told = use("--version", cwd=tmp_path)
    assert (told.returncode, told.stdout) == (0, f"autocontext_jax {metadata.version('autocontext_jax')}\n")

    told = use("--help-keys", cwd=tmp_path)
    assert told.returncode == 0, told.stderr
    lines = told.stdout.splitlines()
    assert "loader.batch_size: int = 3" in lines
    assert "loss.extra: tuple[tuple[str, float], ...] = ()" in lines
    keys = flat_keys(as_dict(RunConfig()))
    described = {line.partition(":")[0]: after for line, after in itertools.pairwise(lines) if line[:1].strip()}
    assert described.keys() == keys.keys()
    assert all(meaning.startswith("    ") and len(meaning) > 10 for meaning in described.values())


def test_a_model_file_predicts_without_its_run(whole_job, tmp_path):
    workdir, _ = whole_job
    source = workdir / "phantoms" / "imagesTs" / "phantom_005_0000.nii.gz"
    expected = sitk.GetArrayFromImage(sitk.ReadImage(workdir / "predictions" / "phantom_005.nii.gz"))
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    result = use("--mode", "export", "--workdir", workdir, "--config.export.license=CC0-1.0",
                 "--config.export.codes=('liver=SCT:10200004:Liver',)", cwd=tmp_path)  # fmt: skip
    assert result.returncode == 0, result.stderr
    file = tmp_path / f"{workdir.name}.autocontext"
    assert str(file.name) in result.stdout
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*")} == before

    moved = tmp_path / "elsewhere" / "quick.autocontext"
    moved.parent.mkdir()
    file.rename(moved)
    for model, target in ((moved, "a.nii.gz"), (workdir, "b.nii.gz")):
        result = use("--mode", "predict", "--model", model, "--input", source, "--output", target, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        assert "liver = 3" in result.stdout
        np.testing.assert_array_equal(sitk.GetArrayFromImage(sitk.ReadImage(tmp_path / target)), expected)

    predict = ["--mode", "predict", "--model", moved, "--input", source, "--output", "c.nii.gz"]
    result = use(*predict, "--config.predict.tile=48", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    message = one_line_error(use(*predict, "--config.model.depth=3", cwd=tmp_path))
    assert "config key model.depth is given with --model" in message
    assert "tile is (30, 30, 30); expected multiples of (4, 4, 4)" in one_line_error(
        use(*predict, "--config.predict.tile=30", cwd=tmp_path)
    )
    moved.write_bytes(moved.read_bytes()[:-1000])
    assert "is no whole model file" in one_line_error(use(*predict, cwd=tmp_path))
    predict[3] = "none.autocontext"
    assert "none.autocontext" in one_line_error(use(*predict, cwd=tmp_path))
    assert "--model is given" in one_line_error(use("--mode", "train", "--model", workdir, cwd=tmp_path))
