"""Cross-validation as a job: a run folder for each fold, every case scored once by the model that has not seen it."""

import dataclasses
import json
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from refusals import refused

import autocontext_jax as ac
from autocontext_jax.data.folds import as_text, draw_folds, read_folds
from autocontext_jax.data.phantom.dataset import write_dataset
from autocontext_jax.evaluation import surface_meshes
from autocontext_jax.jobs import folds
from autocontext_jax.jobs.config_files import default_config, from_config_dict, read_config, write_config
from autocontext_jax.jobs.evaluations import remove_evaluations
from autocontext_jax.jobs.lock import locked
from autocontext_jax.jobs.run import Paths, run
from autocontext_jax.jobs.run_config import RunConfig
from autocontext_jax.jobs.run_folder import read_split
from autocontext_jax.jobs.signals import StopSignal

pytestmark = pytest.mark.usefixtures("compiled_once", "prepared_here")


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("phantoms") / "data"
    write_dataset(root, training=5, test=1, size=(24, 24, 24), spacing=(12.0, 12.0, 12.0), seed=0)
    return root


def small(root: Path, fold: int = -1, *, number: int = 2, splits: str = "", **sections) -> RunConfig:
    config = default_config()
    config.update(
        {
            "data": {"root": str(root), "workers": 1, "folds": number, "fold": fold, "splits": splits},
            "levels": {"factors": (1,)},
            "loader": {"patch_size": (8,), "batch_size": 1},
            "augmentation": {"rotation": 0.0, "translation": 0.0, "elastic_sigma": 0.0},
            "model": {"base_channels": 2, "depth": 1},
            "predict": {"tile": (16,), "checkpoint": "latest"},
            "train": {"steps": 4, "checkpoint_every": 2, "log_every": 1, "validation_patches": 1},
        }
    )
    config.update(sections)
    return from_config_dict(config)


def stop_after(monkeypatch, last: int) -> None:
    monkeypatch.setattr(StopSignal, "requested", lambda self, step: step == last)


def evaluation(folder: Path) -> dict:
    return json.loads((folder / "evaluation.json").read_bytes())


def losses(folder: Path) -> list[tuple[int, float]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_bytes().splitlines()]
    return [(row["step"], row["loss"]) for row in rows]


def sides(folder: Path) -> dict[str, str]:
    return {name: case.side for name, case in read_split(folder).cases.items()}


def times(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.suffix != ".lock"}


@pytest.fixture(scope="module")
def whole(phantoms, tmp_path_factory) -> Path:
    """A cross-validation: fold 1 first, then all; fold 0 is stopped and goes on, and then both are scored anew."""
    workdir = tmp_path_factory.mktemp("folds") / "run"
    assert run("all", small(phantoms, 1), Paths(workdir))
    assert sorted(path.name for path in workdir.glob("fold_*")) == ["fold_1"]
    result, validated = evaluation(workdir), json.loads((workdir / "splits_final.json").read_bytes())[1]["val"]
    assert list(result["cases"]) == validated
    sentence = f"{len(validated)} of 5 cases, each scored by the model of the fold that was not trained on it; "
    assert result["cases_are"] == sentence + "missing: fold 0"

    prepared = times(workdir / "prepared")
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 2)
        assert run("all", small(phantoms), Paths(workdir))
        assert [step for step, _ in losses(workdir / "fold_0")] == [1, 2]
        assert not (workdir / "fold_0" / "validation").exists()
        assert evaluation(workdir) == result
    assert run("train", small(phantoms), Paths(workdir))
    assert times(workdir / "prepared") == prepared
    assert ac.evaluate(workdir, tolerance=20.0) == evaluation(workdir)
    return workdir


def test_every_case_is_scored_once_by_the_model_that_has_not_seen_it(whole, phantoms):
    names = [f"phantom_00{number}" for number in range(5)]
    written = (whole / "splits_final.json").read_text(encoding="utf-8")
    assert written == as_text(draw_folds(names, 2, "D"))
    result = evaluation(whole)
    assert list(result["cases"]) == names  # and not phantom_005, a labelled test case
    assert result["cases_are"] == "5 cases, each scored by the model of the fold that was not trained on it"
    for name in names:
        folder = whole / f"fold_{result['folds'][name]}"
        assert sides(folder)[name] == "validation"
        own = evaluation(folder / "validation")
        assert own["cases"][name] == result["cases"][name]
        assert (own["settings"]["step"], own["tolerance"]) == (4, 20)
        truth = sitk.GetArrayFromImage(sitk.ReadImage(phantoms / "labelsTr" / f"{name}.nii.gz")) == 3
        mask = sitk.GetArrayFromImage(sitk.ReadImage(folder / "validation/predictions" / f"{name}.nii.gz")) == 3
        dice = 2 * (mask & truth).sum() / (mask.sum() + truth.sum())
        assert result["cases"][name]["level_1"]["liver"]["dice"] == pytest.approx(dice)
    dice = [scores["level_1"]["liver"]["dice"] for scores in result["cases"].values()]
    assert result["summary"]["level_1"]["liver"]["dice"]["avg"] == pytest.approx(np.mean(dice))
    assert "5 cases, each scored by the model" in (whole / "table.md").read_text(encoding="utf-8")
    assert (whole / "table.csv").exists()


def test_a_finished_cross_validation_does_nothing_anew(whole, phantoms):
    before = {path: time for path, time in times(whole).items() if path.name in ("metrics.jsonl", "evaluation.json")}
    assert run("all", small(phantoms, evaluate={"tolerance": 20.0}), Paths(whole))
    after = times(whole)
    changed = [path for path, time in before.items() if after[path] != time]
    assert changed == [whole / "evaluation.json"]


def test_a_fold_is_the_run_that_its_split_alone_makes(whole, phantoms, tmp_path):
    """And a folder in which an earlier version began that run goes on as it is: the fold has no folder of its own."""
    splits = str(shutil.copy(whole / "splits_final.json", tmp_path / "mine.json"))
    workdir = tmp_path / "run"
    workdir.mkdir()
    write_config(small(phantoms, 0, number=0, splits=splits), workdir)
    assert run("train", small(phantoms, number=0, splits=splits), Paths(workdir))
    assert not list(workdir.glob("fold_*"))
    assert sides(workdir) == sides(whole / "fold_0")
    resumed = losses(whole / "fold_0")
    assert losses(workdir) == resumed
    assert [step for step, _ in resumed] == [1, 2, 3, 4]
    assert losses(whole / "fold_1") != resumed
    other = small(phantoms, 1, number=0, splits=splits)
    refused(lambda: run("train", other, Paths(workdir)), "data.fold is 1; expected 0", "is the run")


def test_the_table_says_whether_its_scores_are_optimistic():
    text = folds._cases_are(5, 5, [], best=True)
    assert text.endswith("not trained on it; the cases also chose the checkpoints: scores are optimistic")


def test_without_a_table_of_all_folds_python_says_where_the_scores_are(whole, tmp_path, monkeypatch):
    """As where two folds validate the same case."""
    shutil.copy(whole / "config.json", tmp_path)
    monkeypatch.setattr("autocontext_jax.jobs.run.run", lambda *arguments: True)
    refused(lambda: ac.evaluate(tmp_path), "has no table of all folds", "fold_N/validation/evaluation.json")


def test_test_cases_are_scored_by_one_fold_beside_its_validation_cases(whole, tmp_path):
    folder = shutil.copytree(whole / "fold_1", tmp_path / "fold_1")
    before = evaluation(folder / "validation")
    assert ac.evaluate(folder)["cases_are"] == "1 test case"
    assert evaluation(folder / "validation") == before


def test_a_report_of_all_folds(whole, tmp_path, monkeypatch):
    workdir = shutil.copytree(whole, tmp_path / "run")
    monkeypatch.setattr(surface_meshes, "figure", lambda path, *_, **__: path.write_bytes(b"drawn elsewhere"))
    run("report", read_config(workdir), Paths(workdir))
    text = (workdir / "report.html").read_text(encoding="utf-8")
    assert "fold_0" in text
    assert "fold_1" in text
    assert len(list(workdir.glob("fold_*/validation/pictures/*_surfaces.png"))) == 3


def test_the_folder_of_all_folds_is_the_ensemble_of_their_models(whole, phantoms, tmp_path):
    folds = [ac.load(whole / f"fold_{number}") for number in range(2)]
    expected = ac.ensemble(folds, name=whole.name)
    together = ac.load(whole)
    assert [member.name for member in together.description.members] == ["fold_0", "fold_1"]
    windows = [member.image.channels[0].window for member in together.description.members]
    assert windows == [fold.description.image.channels[0].window for fold in folds]
    scores = together.description.evaluation
    assert scores["cases_are"] == "1 test case, predicted by the ensemble of fold_0, fold_1"
    assert scores["dice"]["liver"]["avg"] == evaluation(whole / "test")["summary"]["level_1"]["liver"]["dice"]["avg"]
    assert dataclasses.replace(together.description, evaluation={}) == expected.description
    scan = next((phantoms / "imagesTs").glob("*.nii.gz"))
    mask, maps = (sitk.GetArrayFromImage(made) for made in together.predict(scan, probabilities=True, progress=False))
    average = sum(sitk.GetArrayFromImage(fold.predict(scan, probabilities=True, progress=False)[1]) for fold in folds)
    np.testing.assert_allclose(maps, average / 2, atol=3e-3)
    config, file = read_config(whole), tmp_path / "x.autocontext"
    run("export", config, Paths(whole, target=file))
    exported = ac.load(file)
    assert exported.description == dataclasses.replace(together.description, name="x")
    np.testing.assert_array_equal(sitk.GetArrayFromImage(exported.predict(scan, progress=False)), mask)
    assert run("predict", config, Paths(whole, source=phantoms / "imagesTs", target=tmp_path / "masks"))
    (written,) = (tmp_path / "masks").glob("*")
    np.testing.assert_array_equal(sitk.GetArrayFromImage(sitk.ReadImage(written)), mask)
    scored = whole / "test" / "predictions" / written.name
    np.testing.assert_array_equal(sitk.GetArrayFromImage(sitk.ReadImage(scored)), mask)


def test_a_table_of_other_models_is_not_the_evaluation_of_the_ensemble(whole, tmp_path):
    workdir = shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(workdir / "test")
    scores = ac.load(workdir).description.evaluation
    sentence = "5 cases, each scored by the model of the fold that was not trained on it"
    assert scores["cases_are"] == f"{sentence}; these are scores of the members, not of the ensemble"
    assert scores["dice"]["liver"]["avg"] == evaluation(whole)["summary"]["level_1"]["liver"]["dice"]["avg"]
    assert ac.load(workdir, margin=4).description.evaluation == {}  # they would predict otherwise
    table = evaluation(workdir)
    table["cases"]["phantom_000"]["level_1"]["liver"]["dice"] = 0.5
    (workdir / "evaluation.json").write_text(json.dumps(table))
    assert ac.load(workdir).description.evaluation == {}


def test_one_fold_is_used_by_its_number(whole, phantoms, tmp_path):
    run("export", small(phantoms, 1), Paths(whole, target=tmp_path / "one.autocontext"))
    found, expected = ac.load(tmp_path / "one.autocontext").description, ac.load(whole / "fold_1").description
    assert (found.members, found.training) == ((), expected.training)
    workdir = shutil.copytree(whole, tmp_path / "run")
    assert run("evaluate", small(phantoms, 1, evaluate={"root": str(phantoms)}), Paths(workdir))
    assert "predicted" not in evaluation(workdir / "fold_1" / "on_data")["cases_are"]
    assert not (workdir / "on_data").exists()
    scan = phantoms / "imagesTs" / "phantom_005_0000.nii.gz"
    assert run("predict", small(phantoms, 1), Paths(whole, source=scan, target=tmp_path / "mask.nii.gz"))
    mask = sitk.GetArrayFromImage(sitk.ReadImage(tmp_path / "mask.nii.gz"))
    alone = ac.load(whole / "fold_1").predict(scan, progress=False)
    np.testing.assert_array_equal(mask, sitk.GetArrayFromImage(alone))


def test_a_fold_that_is_trained_anew_takes_the_scores_of_its_ensembles_away(whole, phantoms, tmp_path):
    workdir = shutil.copytree(whole, tmp_path / "run")
    shutil.copytree(workdir / "test", workdir / "on_other")
    scores = evaluation(workdir / "on_other")
    scores["settings"]["step"] = {"fold_0": 4}
    (workdir / "on_other" / "evaluation.json").write_text(json.dumps(scores))
    remove_evaluations(small(phantoms, 1), workdir / "fold_1")
    assert not (workdir / "test" / "evaluation.json").exists()
    assert not (workdir / "evaluation.json").exists()
    assert evaluation(workdir / "on_other") == scores  # of an ensemble without it


def test_test_cases_that_could_not_be_read_are_tried_again(whole, tmp_path):
    workdir = shutil.copytree(whole, tmp_path / "run")
    scores = evaluation(workdir / "test")
    (workdir / "test" / "evaluation.json").write_text(json.dumps(scores | {"cases": {}}))
    ac.evaluate(workdir, tolerance=20.0)
    assert evaluation(workdir / "test") == scores


def test_an_ensemble_is_scored_on_another_data_set(whole, phantoms, tmp_path):
    workdir = shutil.copytree(whole, tmp_path / "run")
    before = times(workdir)
    assert ac.evaluate(workdir, tolerance=20.0) == evaluation(workdir)
    after = times(workdir)  # no case is scored again
    assert [path for path in before if after[path] != before[path] and path.name == "evaluation.json"] == [
        workdir / "evaluation.json"
    ]
    result = ac.evaluate(workdir, root=str(phantoms))
    assert result["cases_are"] == "6 labelled cases of data, predicted by the ensemble of fold_0, fold_1"
    assert result["settings"]["step"] == {"fold_0": 4, "fold_1": 4}
    assert evaluation(workdir / "on_data") == result
    assert evaluation(workdir) == evaluation(whole)


def test_folds_that_are_not_trained_are_named(whole, tmp_path, caplog):
    workdir = shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(workdir / "fold_0" / "checkpoints")
    model = ac.load(workdir)
    assert "the ensemble has 1 of 2 folds; not trained to their end: 0" in caplog.text
    assert model.description.members == ()
    assert model.description.evaluation["cases_are"] == "2 validation cases"
    shutil.rmtree(workdir / "fold_1" / "checkpoints")
    refused(lambda: ac.load(workdir), "no fold of", "is trained to its end: train there first")


def test_a_fold_is_no_run_of_its_own(whole, phantoms):
    refused(
        lambda: run("train", small(phantoms, 1), Paths(whole / "fold_1")),
        "is fold 1 of a cross-validation", f"--workdir {whole.resolve()} --config.data.fold=1",
    )  # fmt: skip
    model = ac.load(whole / "fold_1")
    assert model.description.evaluation["cases_are"] == "2 validation cases"
    assert model.description.training["validation_cases"] == 2


def test_other_folds_or_another_kind_of_run_in_the_same_folder_are_refused(whole, phantoms, tmp_path):
    before = times(whole)
    other = tmp_path / "splits.json"
    other.write_text(as_text(draw_folds([f"phantom_00{n}" for n in range(5)], 3, "D")), encoding="utf-8")
    for config, part in (
        (small(phantoms, number=0), "holds the folds of a cross-validation (splits_final.json); expected their number"),
        (small(phantoms, number=3), "data.folds is 3; expected 2, as"),
        (small(phantoms, number=0, splits=str(other)), "which has other folds than"),
        (
            small(phantoms, 2, number=0, splits=str(whole / "splits_final.json")),
            "data.fold is 2; expected one of 0 to 1",
        ),
        (small(phantoms, seed=1), "seed (the run has 0, given is 1)"),
    ):
        refused(lambda config=config: run("all", config, Paths(whole)), part)
    assert {path: time for path, time in times(whole).items() if path.suffix == ".json"} == {
        path: time for path, time in before.items() if path.suffix == ".json"
    }
    run("prepare", small(phantoms, number=0), Paths(tmp_path / "plain"))
    refused(lambda: run("all", small(phantoms), Paths(tmp_path / "plain")), "belongs to a run without folds")


# ---- what the folds share, and what they do not


@pytest.fixture
def untrained(monkeypatch) -> None:
    """Cross-validations that write all but the training."""
    monkeypatch.setattr(folds, "train", lambda *arguments: True)


@pytest.fixture
def root(phantoms, tmp_path) -> Path:
    """A data set that a test may change."""
    shutil.copytree(phantoms, tmp_path / "data")
    return tmp_path / "data"


def describe(root: Path, **changes) -> None:
    path = root / "dataset.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | changes), encoding="utf-8")


def test_folds_share_their_grids_and_learn_intensities_of_their_own(root, tmp_path, untrained):
    """Each fold's own median spacing would be another one, and every case would have to be prepared for each."""
    for number, spacing in enumerate((8.0, 9.0, 10.0, 11.0, 12.0)):
        for path in root.glob(f"*Tr/phantom_00{number}*"):
            image = sitk.ReadImage(path)
            image.SetSpacing((spacing, spacing, spacing))
            if path.parent.name == "imagesTr":
                image += 20 * number
            sitk.WriteImage(image, path)
    workdir = tmp_path / "run"
    assert run("train", small(root, data={"root": str(root), "folds": 5}), Paths(workdir))
    found = [json.loads((workdir / f"fold_{number}/fingerprint.json").read_bytes()) for number in range(5)]
    assert {tuple(each["spacing"]) for each in found} == {(10.0, 10.0, 10.0)}
    assert {path.name for path in workdir.glob("**/prepared")} == {"prepared"}
    assert len(list(workdir.glob("**/prepared"))) == 1
    means = {}
    for number in range(5):
        image, label = (
            sitk.GetArrayFromImage(sitk.ReadImage(root / path))
            for path in (f"imagesTr/phantom_00{number}_0000.nii.gz", f"labelsTr/phantom_00{number}.nii.gz")
        )
        means[f"phantom_00{number}"] = image[label > 0].mean()
    for number, each in enumerate(found):
        training = [name for name, side in sides(workdir / f"fold_{number}").items() if side == "training"]
        assert len(training) == 4
        (channel,) = each["image"]["channels"]
        assert channel["mean"] == pytest.approx(np.mean([means[name] for name in training]))
    assert len({each["image"]["channels"][0]["mean"] for each in found}) == 5


def add_case(root: Path) -> None:
    for folder, end in (("imagesTr", "_0000.nii.gz"), ("labelsTr", ".nii.gz")):
        shutil.copy(root / folder / f"phantom_000{end}", root / folder / f"another{end}")
    describe(root, numTraining=6)


def test_a_case_that_is_added_changes_no_fold(root, tmp_path, untrained):
    workdir = tmp_path / "run"
    run("train", small(root), Paths(workdir))
    before = [sides(workdir / f"fold_{number}") for number in range(2)]
    file = (workdir / "splits_final.json").read_bytes()
    add_case(root)
    run("train", small(root), Paths(workdir))
    assert [sides(workdir / f"fold_{number}") for number in range(2)] == before
    taken = small(root, data={"root": str(root), "folds": 2, "new_cases": "train"})
    run("train", taken, Paths(workdir))
    assert [sides(workdir / f"fold_{number}") for number in range(2)] == [
        each | {"another": "training"} for each in before
    ]
    assert (workdir / "splits_final.json").read_bytes() == file


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda one, two: [two, one], "fold_0/split.json has case phantom_00"),
        (lambda one, two: [one | {"val": one["val"][1:]}, two | {"train": two["train"][1:]}], "has for training"),
        (lambda one, two: [one], "data.folds is 2; expected 1"),
    ],
)
def test_a_file_of_folds_that_was_changed_is_refused(whole, phantoms, tmp_path, change, part):
    workdir, prepared = tmp_path / "run", str(whole / "prepared")
    shutil.copytree(whole, workdir, ignore=shutil.ignore_patterns("prepared", "checkpoints", "validation"))
    path = workdir / "splits_final.json"
    one, two = json.loads(path.read_bytes())
    assert one["val"][0] == two["train"][0]
    path.write_text(json.dumps(change(one, two)), encoding="utf-8")
    data = {"root": str(phantoms), "folds": 2, "prepared": prepared}
    refused(lambda: run("train", small(phantoms, data=data), Paths(workdir)), part)


def test_a_given_file_is_kept_and_what_it_leaves_out_is_not_prepared(root, tmp_path, untrained, caplog):
    given, workdir = tmp_path / "given.json", tmp_path / "run"
    one = {"train": ["phantom_000", "phantom_001"], "val": ["phantom_002"]}
    two = {"train": ["phantom_000"], "val": ["phantom_002", "phantom_003"]}
    given.write_text(json.dumps([one, two]), encoding="utf-8")
    config = small(root, number=0, splits=str(given))
    run("train", config, Paths(workdir))
    assert json.loads((workdir / "splits_final.json").read_bytes()) == [one, two]
    assert (read_config(workdir).data.folds, read_config(workdir).data.fold) == (2, -1)
    assert sides(workdir / "fold_1") == {
        "phantom_000": "training", "phantom_001": "unused", "phantom_002": "validation", "phantom_003": "validation",
        "phantom_004": "unused", "phantom_005": "test",
    }  # fmt: skip
    assert not list(workdir.glob("prepared/phantom_004*"))
    given.unlink()
    run("train", small(root), Paths(workdir))  # the folder's own file is enough
    of_file = read_folds(list(sides(workdir)), workdir / "splits_final.json")
    folds._write_table(small(root), workdir, None, of_file, None)
    assert "case phantom_002 is in val of folds 0 and 1" in caplog.text


def test_a_second_command_waits_for_the_first_to_prepare(tmp_path):
    entered = []

    def second() -> None:
        with locked(tmp_path, "folds", wait=True):
            entered.append(True)

    with locked(tmp_path, "folds"):
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.1)
        assert not entered
    thread.join(10)
    assert entered
