"""The whole job learns: from phantoms with two classes to masks of scans that it has not seen."""

import json
from pathlib import Path

import numpy as np
import pytest

from autocontext_jax.data.phantom.anatomy import ORGANS
from autocontext_jax.data.phantom.painting import make_phantom
from autocontext_jax.images import scans
from autocontext_jax.jobs.config_files import default_config, from_config_dict
from autocontext_jax.jobs.run import Paths, run

pytestmark = pytest.mark.usefixtures("compiled_quickly")

SIZE, SPACING = (40, 40, 40), (8.0, 8.0, 8.0)
CLASSES = ("background", "liver", "spleen")


def write_phantoms(root: Path, *, training: int, test: int) -> None:
    numbers = np.zeros(len(ORGANS) + 1, np.uint8)
    for number, name in enumerate(CLASSES):
        if number:
            numbers[1 + ORGANS.index(name)] = number
    for case in range(training + test):
        image, label = make_phantom(np.random.default_rng([0, case]), size=SIZE, spacing=SPACING)
        side = "Tr" if case < training else "Ts"
        scans.write_scan(root / f"images{side}" / f"c{case:02d}_0000.nii.gz", image, SPACING)
        scans.write_scan(root / f"labels{side}" / f"c{case:02d}.nii.gz", numbers[label], SPACING)
    description = {
        "channel_names": {"0": "CT"},
        "labels": {name: number for number, name in enumerate(CLASSES)},
        "numTraining": training,
        "numTest": test,
        "file_ending": ".nii.gz",
    }
    (root / "dataset.json").write_text(json.dumps(description), encoding="utf-8")


def learn(folder: Path, *, learning_rate: float) -> dict:
    """Trains on ten phantoms, scores two others, and returns the evaluation."""
    write_phantoms(folder / "data", training=10, test=2)
    config = default_config()
    config.data.root, config.data.workers = str(folder / "data"), 1
    config.levels.factors = (2, 1)
    config.loader.patch_size, config.loader.batch_size, config.loader.sampling = (16,), 2, "classes"
    config.loader.background_fraction = 0.2
    config.augmentation.probability = 0.5
    config.model.base_channels, config.model.depth, config.model.momentum = 4, 2, 0.95
    config.loss.log_dice = config.loss.cross_entropy = 0.1
    config.optimizer.learning_rate, config.optimizer.schedule = learning_rate, "cosine"
    config.train.steps = config.train.checkpoint_every = 300
    config.train.validation_patches = 2
    config.predict.tile = (32,)
    assert run("all", from_config_dict(config), Paths(folder / "run"))
    return json.loads((folder / "run" / "evaluation.json").read_bytes())


def test_a_trained_pyramid_finds_liver_and_spleen_in_scans_that_it_has_not_seen(tmp_path):
    """With a learning rate of 1e-9 the Dice of both classes is below 0.12 at both levels."""
    evaluation = learn(tmp_path, learning_rate=5e-3)
    assert evaluation["cases_are"] == "2 test cases"
    for level, lowest in (("level_1", 0.5), ("level_2", 0.55)):
        found = {name: evaluation["summary"][level][name]["dice"]["min"] for name in CLASSES[1:]}
        assert all(dice > lowest for dice in found.values()), (level, found)
