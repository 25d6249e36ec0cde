"""Instance normalisation through the whole of a run: whole scans are predicted in tiles of the training patch."""

import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
from scipy import ndimage

import autocontext_jax as ac
from autocontext_jax.jobs.config_files import default_config, from_config_dict
from autocontext_jax.jobs.evaluate import evaluate
from autocontext_jax.jobs.prepare import prepare
from autocontext_jax.jobs.run import Paths, run
from autocontext_jax.jobs.run_config import RunConfig
from autocontext_jax.jobs.train import train

pytestmark = pytest.mark.usefixtures("compiled_quickly")

SIZE, PATCH, STEPS = (28, 32, 24), (12, 16, 20), 60


def write_cases(root: Path) -> None:
    """Bright blobs wherever a patch may lie: five cases, the last of which is for testing."""
    rng = np.random.default_rng(0)
    for name in "abcde":
        field = ndimage.gaussian_filter(rng.normal(size=SIZE), 3)
        label = (field > 0.5 * field.std()).astype(np.uint8)
        image = 300.0 * label + rng.normal(0, 60, SIZE)
        side = "Ts" if name == "e" else "Tr"
        for kind, array in ((f"images{side}/{name}_0000", image.astype(np.int16)), (f"labels{side}/{name}", label)):
            path = root / f"{kind}.nii.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            nibabel.save(nibabel.Nifti1Image(array, np.diag([-2.0, -2.0, 2.0, 1.0])), path)
    labels = {"background": 0, "blob": 1}
    description = {"channel_names": {"0": "CT"}, "labels": labels, "file_ending": ".nii.gz"}
    (root / "dataset.json").write_text(json.dumps(description), encoding="utf-8")


def config_of(root: Path) -> RunConfig:
    config = default_config()
    config.data.root, config.data.workers, config.data.validation_fraction = str(root), 1, 0.25
    config.data.window = (-500.0, 500.0)
    config.levels.factors = (1,)
    config.loader.patch_size, config.loader.batch_size, config.loader.sampling = PATCH, 1, "classes"
    config.augmentation.rotation = config.augmentation.translation = config.augmentation.elastic_sigma = 0.0
    config.model.norm, config.model.base_channels, config.model.depth = "instance", 4, 2
    config.optimizer.learning_rate, config.optimizer.schedule = 0.01, "cosine"
    # It would be the last quarter of the steps with batch norm. Here all steps are the same.
    config.train.frozen_batch_stats = 0.25
    config.train.steps = config.train.checkpoint_every = config.train.log_every = STEPS
    config.train.validation_patches = 4
    return from_config_dict(config)


def test_whole_scans_reach_what_validation_reached(tmp_path):
    write_cases(tmp_path / "data")
    config, workdir = config_of(tmp_path / "data"), tmp_path / "run"
    assert train(config, workdir, prepare(config, workdir))
    validation = json.loads((workdir / "metrics.jsonl").read_bytes().splitlines()[-1])
    assert evaluate(config, workdir)
    found = json.loads((workdir / "evaluation.json").read_bytes())["summary"]["level_1"]
    assert validation["validation_dice_level_1_blob"] > 0.7
    assert found["blob"]["dice"]["avg"] > validation["validation_dice_level_1_blob"] - 0.05

    # The same mask again, of the run and of its model file, whatever memory there is and whatever scan came before.
    voxels, mask = (
        np.asarray(nibabel.load(path).dataobj).T
        for path in (tmp_path / "data/imagesTs/e_0000.nii.gz", workdir / "predictions/e.nii.gz")
    )
    file = tmp_path / "own.autocontext"
    assert run("export", config, Paths(workdir, target=file))
    seen = []
    for place, options in ((workdir, {"memory": 0.5}), (file, {"tile": 0})):
        model = ac.load(place, **options)
        assert model.description.tiling.tile == PATCH
        model.predict(voxels[:20], spacing=(2, 2, 2), progress=False)
        found, maps = model.predict(voxels, spacing=(2, 2, 2), probabilities=True, progress=False)
        np.testing.assert_array_equal(found, mask)
        seen.append(maps)
    np.testing.assert_array_equal(*seen)
