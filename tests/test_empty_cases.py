"""Cases without any organ, organs in no case, organs of a single voxel: prepared, drawn from, trained on and scored."""

import json
import logging
from pathlib import Path

import nibabel
import numpy as np
import pytest
import zarr

from autocontext_jax.data import preparation
from autocontext_jax.data.datasets import Case
from autocontext_jax.data.labels import LabelSpec
from autocontext_jax.data.loader import LoaderConfig, host_batches
from autocontext_jax.data.sampling import SAMPLING, draw_centre
from autocontext_jax.data.store.level_grids import LevelGrids
from autocontext_jax.data.store.reader import PreparedCase
from autocontext_jax.errors import UserError
from autocontext_jax.geometry import cube
from autocontext_jax.jobs.config_files import default_config, from_config_dict
from autocontext_jax.jobs.evaluate import evaluate
from autocontext_jax.jobs.prepare import prepare
from autocontext_jax.jobs.run_config import RunConfig
from autocontext_jax.jobs.run_folder import open_data
from autocontext_jax.jobs.train import train
from autocontext_jax.training.validation import validation_batches

pytestmark = pytest.mark.usefixtures("compiled_once", "prepared_here")

SIZE = (16, 18, 20)  # x, y, z as nibabel has them
LABELS = ("background", "liver", "spleen", "duct")


def label_of(**boxes: tuple[slice, slice, slice]) -> np.ndarray:
    label = np.zeros(SIZE, np.uint8)
    for name, box in boxes.items():
        label[box] = LABELS.index(name)
    return label


LIVER = (slice(2, 9), slice(3, 10), slice(4, 12))
SPLEEN = (slice(10, 15), slice(11, 16), slice(4, 12))
VOXEL = (slice(12, 13), slice(4, 5), slice(15, 16))


def write(path: Path, array: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, np.diag([-2.0, -2.0, 2.0, 1.0])), path)
    return path


def data_set(root: Path, labels: dict[str, np.ndarray], side: str = "Tr", names=LABELS) -> Path:
    """Noise, in which every organ is 300 HU brighter."""
    rng = np.random.default_rng(0)
    for name, label in labels.items():
        image = rng.integers(-900, -700, SIZE) + 300 * label.astype(int)
        write(root / f"images{side}/{name}_0000.nii.gz", image.astype(np.int16))
        write(root / f"labels{side}/{name}.nii.gz", label)
    counts = {"numTraining": len(labels) * (side == "Tr"), "numTest": len(labels) * (side == "Ts")}
    description = {"channel_names": {"0": "CT"}, "labels": {name: k for k, name in enumerate(names)}, **counts}
    (root / "dataset.json").write_text(json.dumps({**description, "file_ending": ".nii.gz"}), encoding="utf-8")
    return root


def prepared(folder: Path, name: str, label: np.ndarray, factors=(2, 1)) -> PreparedCase:
    data_set(folder, {name: label})
    case = Case(name, (folder / f"imagesTr/{name}_0000.nii.gz",), folder / f"labelsTr/{name}.nii.gz")
    preparation.prepare_case(case, str(folder / "store"), LevelGrids(factors), LabelSpec.plain(LABELS))
    return PreparedCase.open(str(folder / "store"), name)


def small(root: Path, **sections) -> RunConfig:
    config = default_config()
    config.update(
        {
            "data": {"root": str(root), "workers": 1, "validation_fraction": 0.4},
            "levels": {"factors": (2, 1)},
            "loader": {"patch_size": (8,), "batch_size": 2},
            "model": {"base_channels": 2, "depth": 1},
            "predict": {"tile": (16,)},
            "train": {"steps": 4, "checkpoint_every": 2, "log_every": 1, "validation_patches": 4},
        }
    )
    config.update(sections)
    return from_config_dict(config)


def warned(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


# ---- preparing ----


def test_a_case_without_any_organ_is_prepared(tmp_path):
    case = prepared(tmp_path, "none", label_of())
    assert case.foreground_offsets == (0, 0, 0, 0)
    image, label = case.read(2, (0, 0, 0), case.shapes[1]).result()
    truth = np.asarray(nibabel.load(tmp_path / "imagesTr/none_0000.nii.gz").dataobj)
    assert sorted(image.ravel()) == sorted(truth.ravel())
    assert not label.any()
    group = zarr.open_group(tmp_path / "store/none.ome.zarr", mode="r")  # as any other reader sees it
    assert group["foreground"].shape == (0,)
    assert not group["labels/classes/level_2"][:].any()
    np.testing.assert_array_equal(group["level_2"][:], image)


def test_an_organ_of_a_single_voxel_is_prepared(tmp_path):
    case = prepared(tmp_path, "one", label_of(liver=LIVER, duct=VOXEL))
    assert case.foreground_offsets[-1] - case.foreground_offsets[-2] == 1
    z, y, x = case.foreground_voxel(case.foreground_offsets[-2])
    _, label = case.read(2, (0, 0, 0), case.shapes[1]).result()
    assert np.argwhere(label == 3).tolist() == [[z, y, x]]


def test_an_organ_too_small_for_the_finest_level_is_named(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        case = prepared(tmp_path, "one", label_of(duct=VOXEL), factors=(4, 2))
    assert case.foreground_offsets == (0, 0, 0, 0)
    (line,) = warned(caplog)
    assert line == "case one: duct has 1 voxel, and none is left at the finest level's 4 × 4 × 4 mm"


# ---- sampling ----


@pytest.mark.parametrize("sampling", SAMPLING)
def test_a_centre_takes_six_numbers_and_is_anywhere_without_foreground(sampling):
    options = {"sampling": sampling, "background_fraction": 0.25}
    for offsets in ([0, 0, 0], [0, 5, 9]):
        rng = np.random.default_rng(3)
        draw_centre(offsets, (5, 6, 7), rng, **options)
        assert rng.random() == np.random.default_rng(3).random(7)[6]
    rng = np.random.default_rng(0)
    centres = {draw_centre([0, 0, 0], (2, 3, 4), rng, **options) for _ in range(500)}
    assert centres == set(np.ndindex(2, 3, 4))
    with_foreground = [draw_centre([0, 5, 9], (2, 3, 4), rng, **options) for _ in range(2000)]
    assert np.mean([isinstance(centre, tuple) for centre in with_foreground]) == pytest.approx(0.25, abs=0.05)


@pytest.mark.parametrize("fraction", [0.0, 0.5])
@pytest.mark.parametrize("sampling", SAMPLING)
def test_patches_of_a_case_without_organs(tmp_path, sampling, fraction):
    cases = [prepared(tmp_path, "none", label_of()), prepared(tmp_path, "some", label_of(liver=LIVER))]
    margins = [((0, 0, 0), (0, 0, 0))] * 2
    config = LoaderConfig(2, (8,), sampling=sampling, background_fraction=fraction)
    batches = host_batches(cases, config, cube(8, 2), margins, seed=0)
    labelled = np.array([batch["labels"][-1].any(axis=(1, 2, 3)) for _, batch in zip(range(20), batches, strict=False)])
    batches.close()
    counts = labelled.sum(axis=1)  # of the two patches of a batch, one of each case
    assert counts.max() == 1
    assert fraction or counts.min() == 1


def test_validation_patches_of_a_case_without_organs(tmp_path):
    case = prepared(tmp_path, "none", label_of())
    options = {"batch_size": 2, "patch": cube(8, 2), "levels": (1, 2), "seed": 0}
    batches = validation_batches([case], patches=4, **options)
    assert [batch["labels"][1].shape for batch in batches] == [(2, 8, 8, 8)] * 2
    assert not any(batch["labels"][1].any() for batch in batches)


# ---- the whole job ----


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[RunConfig, Path]:
    """A trained run with a case without organs on either side; no case has a duct."""
    folder = tmp_path_factory.mktemp("run")
    labels = {f"full_{n}": label_of(liver=LIVER, spleen=SPLEEN) for n in range(3)}
    root = data_set(folder / "data", {**labels, "none_0": label_of(), "none_1": label_of()})
    folds = [{"train": ["full_0", "full_1", "none_0"], "val": ["full_2", "none_1"]}]
    (folder / "splits_final.json").write_text(json.dumps(folds), encoding="utf-8")
    config = small(root, data={"splits": str(folder / "splits_final.json"), "fold": 0}, loader={"sampling": "classes"})
    assert train(config, folder / "run", prepare(config, folder / "run"))
    return config, folder / "run"


def test_a_run_with_cases_without_organs_trains(run, caplog):
    config, workdir = run
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_bytes().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(np.isfinite(row["loss"]) for row in rows)
    assert all(np.isfinite(row["validation_loss"]) for row in rows[1::2])
    with caplog.at_level(logging.WARNING):
        prepare(config, workdir)
    empty, absent = warned(caplog)
    assert empty.endswith("trained on as background: none_0")
    assert absent.endswith("no training case has these classes, which cannot be learned: duct")


def test_validation_on_cases_without_organs_alone(run, tmp_path):
    config, _ = run
    folds = [{"train": ["full_0", "full_1"], "val": ["none_0", "none_1"]}]
    (tmp_path / "splits.json").write_text(json.dumps(folds), encoding="utf-8")
    config = small(Path(config.data.root), data={"splits": str(tmp_path / "splits.json"), "fold": 0})
    assert train(config, tmp_path / "run", prepare(config, tmp_path / "run"))
    assert evaluate(config, tmp_path / "run")
    cases = json.loads((tmp_path / "run/evaluation.json").read_bytes())["cases"]
    assert sorted(cases) == ["none_0", "none_1"]


def test_a_run_of_cases_without_organs_alone_is_refused(tmp_path):
    root = data_set(tmp_path / "data", {name: label_of() for name in "abc"})
    with pytest.raises(UserError) as caught:
        prepare(small(root), tmp_path / "run")
    assert str(root) in str(caught.value)
    assert "no voxel is labelled" in str(caught.value)
    assert "liver, spleen, duct" in str(caught.value)


# ---- test cases alone ----


def test_test_cases_alone_are_scored_and_not_trained_on(run, tmp_path):
    config, workdir = run
    names = ("background", "spleen", "liver")  # the other way round than in the run
    theirs = np.array([0, 2, 1, 0], np.uint8)
    labels = {"both": label_of(liver=LIVER, spleen=SPLEEN), "liver": label_of(liver=LIVER), "none": label_of()}
    root = data_set(tmp_path / "ts", {name: theirs[label] for name, label in labels.items()}, side="Ts", names=names)
    with pytest.raises(UserError, match=r"no training case, only test cases.*--config\.evaluate\.root="):
        open_data(small(root), tmp_path / "other")

    assert evaluate(small(Path(config.data.root), evaluate={"root": str(root)}), workdir)
    result = json.loads((workdir / "on_ts/evaluation.json").read_bytes())
    assert result["classes"] == ["liver", "spleen"]
    assert result["cases_are"] == "3 labelled cases of ts"
    for name, label in labels.items():
        mask = np.asarray(nibabel.load(workdir / f"on_ts/predictions/{name}.nii.gz").dataobj)
        for value, organ in ((1, "liver"), (2, "spleen")):
            true, found = label == value, mask == value
            expected = 2 * (true & found).sum() / (true.sum() + found.sum()) if (true | found).any() else None
            scores = result["cases"][name]["level_2"][organ]
            assert scores["dice"] == pytest.approx(expected)
            if true.any() != found.any():
                assert (scores["dice"], scores["hausdorff_95"]) == (0, "inf")


def test_a_data_set_without_labels_is_not_scored(run, tmp_path):
    config, workdir = run
    root = data_set(tmp_path / "ts", {"a": label_of()}, side="Ts")
    (root / "labelsTs/a.nii.gz").unlink()
    with pytest.raises(UserError, match="has no case with a label"):
        evaluate(small(Path(config.data.root), evaluate={"root": str(root)}), workdir)
