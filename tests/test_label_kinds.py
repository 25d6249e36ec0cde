"""Each kind of labels through the whole of a run: masks have the data set's own values, wherever they are written."""

import dataclasses
import json
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest

import autocontext_jax as ac
from autocontext_jax.jobs.config_files import default_config, from_config_dict
from autocontext_jax.jobs.evaluate import evaluate
from autocontext_jax.jobs.prepare import prepare
from autocontext_jax.jobs.report import report
from autocontext_jax.jobs.run import Paths, run
from autocontext_jax.jobs.run_config import RunConfig
from autocontext_jax.jobs.train import train

pytestmark = pytest.mark.usefixtures("compiled_once", "prepared_here")

SIZE = (18, 20, 16)  # x, y, z as nibabel has them
AFFINE = np.diag([-2.0, -2.0, 2.0, 1.0])


def write(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, AFFINE), path)


def read(path: Path) -> np.ndarray:
    return np.asarray(nibabel.load(path).dataobj)


def data_set(root: Path, names: str, values: tuple[int, int, int], labels: dict, *, hidden: int = 0, **more) -> Path:
    """Two nested boxes, brighter than what is around them, of the last two values; the last case is for testing.

    Args:
      root: of the data set.
      names: of the cases.
      values: of the background, the outer and the inner box in the label files.
      labels: of `dataset.json`.
      hidden: value of some planes, if it is not 0.
      more: further keys of `dataset.json`.
    """
    rng = np.random.default_rng(len(names))
    for name in names:
        places = np.zeros(SIZE, int)
        x, y, z = rng.integers(2, 5, 3)
        places[x : x + 11, y : y + 12, z : z + 10] = 1
        places[x + 3 : x + 8, y + 3 : y + 9, z + 3 : z + 8] = 2
        image = rng.integers(-900, -700, SIZE) + 500 * places
        label = np.array(values)[places]
        if hidden:
            label[:, 9:11] = hidden
        side = "Ts" if name == names[-1] else "Tr"
        write(root / f"images{side}/{name}_0000.nii.gz", image.astype(np.int16))
        write(root / f"labels{side}/{name}.nii.gz", label.astype(np.uint16))
    description = {"channel_names": {"0": "CT"}, "labels": labels, "file_ending": ".nii.gz", **more}
    (root / "dataset.json").write_text(json.dumps(description), encoding="utf-8")
    return root


def config_of(root: str, factors: tuple[int, ...], steps: int) -> RunConfig:
    config = default_config()
    config.update(
        {
            "data": {"root": root, "workers": 1, "validation_fraction": 0.2},
            "levels": {"factors": factors},
            "loader": {"patch_size": (8,), "batch_size": 2, "sampling": "classes", "background_fraction": 0.3},
            "augmentation": {"rotation": 0.0, "translation": 0.0, "elastic_sigma": 0.0, "flip": "yx"},
            "model": {"base_channels": 4, "depth": 1},
            "optimizer": {"learning_rate": 0.01},
            "predict": {"tile": (16,), "flip": True},
            "train": {
                "steps": steps,
                "frozen_batch_stats": 0.3,
                "checkpoint_every": steps,
                "log_every": steps,
                "validation_patches": 2,
            },
        }
    )
    return from_config_dict(config)


def trained(config: RunConfig, workdir: Path) -> RunConfig:
    data = prepare(config, workdir)
    assert train(config, workdir, data)
    assert evaluate(config, workdir)
    return config


def evaluation(workdir: Path) -> dict:
    return json.loads((workdir / "evaluation.json").read_bytes())


def dice(prediction: np.ndarray, truth: np.ndarray) -> float:
    return 2 * (prediction & truth).sum() / (prediction.sum() + truth.sum())


def check_masks(config: RunConfig, workdir: Path, root: Path, name: str) -> np.ndarray:
    """The mask of a run's evaluation is that of `predict`, of the exported model, and of the same in Python."""
    scan, mask = root / f"imagesTs/{name}_0000.nii.gz", read(workdir / f"predictions/{name}.nii.gz")
    assert run("predict", config, Paths(workdir, source=scan, target=workdir / "mask.nii.gz"))
    np.testing.assert_array_equal(read(workdir / "mask.nii.gz"), mask)
    assert run("export", config, Paths(workdir, target=workdir / "own.autocontext"))
    model = ac.load(workdir / "own.autocontext")
    model.predict(scan, output=workdir / "other.nii.gz", progress=False)
    np.testing.assert_array_equal(read(workdir / "other.nii.gz"), mask)
    assert set(np.unique(mask)) <= set(model.classes.values())
    return mask


def test_values_that_are_no_numbers_of_classes(tmp_path):
    root = data_set(tmp_path / "data", "abcd", (0, 205, 420), {"inner": 420, "background": 0, "outer": 205})
    config, workdir = config_of(str(root), (1,), 80), tmp_path / "run"
    trained(config, workdir)
    mask, truth = check_masks(config, workdir, root, "d"), read(root / "labelsTs/d.nii.gz")
    assert mask.dtype == np.uint16
    assert set(np.unique(mask)) == {0, 205, 420}
    scores = evaluation(workdir)["cases"]["d"]["level_1"]
    assert list(scores) == ["outer", "inner"]
    for organ, value in (("outer", 205), ("inner", 420)):
        assert scores[organ]["dice"] == pytest.approx(dice(mask == value, truth == value))
        assert scores[organ]["dice"] > 0.6
    other = shutil.copytree(root, tmp_path / "other")  # the same run scores a data set with other values
    write(other / "labelsTs/d.nii.gz", np.select([truth == 205, truth == 420], [1, 7]).astype(np.uint8))
    shutil.rmtree(other / "imagesTr"), shutil.rmtree(other / "labelsTr")
    names = {"background": 0, "outer": 1, "inner": 7}
    description = {"channel_names": {"0": "CT"}, "labels": names, "file_ending": ".nii.gz"}
    (other / "dataset.json").write_text(json.dumps(description), encoding="utf-8")
    assert run("evaluate", with_other(config, other), Paths(workdir))
    assert evaluation(workdir / "on_other")["cases"]["d"]["level_1"] == scores
    assert read(workdir / "on_other/predictions/d.nii.gz").tolist() == mask.tolist()


def with_other(config: RunConfig, root: Path) -> RunConfig:
    return dataclasses.replace(config, evaluate=dataclasses.replace(config.evaluate, root=str(root)))


def test_regions_with_ignored_voxels(tmp_path):
    root = data_set(
        tmp_path / "data", "abcd", (0, 5, 300), {"background": 0, "whole": [5, 300], "core": [300], "ignore": 1000},
        hidden=1000, regions_class_order=[5, 300],
    )  # fmt: skip
    config, workdir = config_of(str(root), (2, 1), 80), tmp_path / "run"
    trained(config, workdir)
    mask, truth = check_masks(config, workdir, root, "d"), read(root / "labelsTs/d.nii.gz")
    assert set(np.unique(mask)) == {0, 5, 300}
    scores, seen = evaluation(workdir)["cases"]["d"]["level_2"], truth != 1000
    for region, values in (("whole", (5, 300)), ("core", (300,))):
        predicted, true = (np.isin(each, values) & seen for each in (mask, truth))
        assert scores[region]["dice"] == pytest.approx(dice(predicted, true))
        assert scores[region]["dice"] > 0.6
    model = ac.load(workdir)
    _, maps = model.predict(root / "imagesTs/d_0000.nii.gz", probabilities=True, progress=False)
    assert maps.GetNumberOfComponentsPerPixel() == 2
    report(config, workdir)
    assert (workdir / "report.html").exists()


def test_two_data_sets_that_annotate_one_class_each(tmp_path):
    """What one of them does not annotate is unknown in its cases: there is no score of it."""
    first = data_set(tmp_path / "A", "abc", (0, 2, 0), {"background": 0, "outer": 2})
    second = data_set(tmp_path / "B", "axy", (0, 0, 9), {"background": 0, "inner": 9}, annotated={"x": ["inner"]})
    config, workdir = config_of(f"{first},{second}", (1,), 80), tmp_path / "run"
    trained(config, workdir)
    split = json.loads((workdir / "split.json").read_bytes())
    assert split["classes"] == ["background", "outer", "inner"]
    assert {name: case.get("annotated") for name, case in split["cases"].items()} == {
        "A_a": ["outer"], "b": ["outer"], "c": ["outer"], "B_a": ["inner"], "x": ["inner"], "y": ["inner"],
    }  # fmt: skip
    result = evaluation(workdir)
    for name, root, known, unknown, value in (("c", first, "outer", "inner", 2), ("y", second, "inner", "outer", 9)):
        scores = result["cases"][name]["level_1"]
        assert all(value is None for value in scores[unknown].values())
        mask, truth = check_masks(config, workdir, root, name), read(root / f"labelsTs/{name}.nii.gz")
        assert scores[known]["dice"] == pytest.approx(dice(mask == value, truth == value))
        assert scores[known]["dice"] > 0.5
        assert set(np.unique(mask)) == {0, 2, 9}  # both are found, though no case shows both
    summary = result["summary"]["level_1"]
    assert {name: summary[name]["dice"]["cases"] for name in ("outer", "inner")} == {"outer": 1, "inner": 1}
    report(config, workdir)
