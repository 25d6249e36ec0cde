"""What mean Dice on held-out scans does each method reach in the same training time?

    python benchmarks/accuracy_at_time.py --data FOLDER --method pyramid|level_1|monai|nnunet --results FILE
        [--minutes 30] [--steps N] [--config configs/openkbp.py] [--workdir FOLDER] [--config.key=value ...]

One method a call, alone on the machine; FILE gathers the results, a JSON line a call, and the table shows all of them.
Where a data set has no labelled test scans, those are scored that --config holds out (with data.folds, one fold), and
no method trains on them.

`pyramid` and `level_1` are the command line with --config, the latter with the coarsest level only. Their learning rate
falls to zero over the run, so the number of steps has to be known: a short run is timed first, and as many steps are
taken as fit, or N are. The clock covers the whole train process: start, compilation, validation and checkpoints too;
what it showed is in the table, as `used`.

`monai` is what a MONAI user gets: UNet (16, 32, 64, 128, 256; two residual units; batch norm), DiceCELoss, Adam 1e-3,
RandCropByLabelClasses of 64^3 (32^3 of smaller scans) with equal ratios and 4 samples a scan, RandAffine, and a
Gaussian sliding window, in float32, until the time is up; reading the scans and importing are not counted. It sees CT
scaled from [-500, 500] HU to [-1, 1], and other channels normalised as nnU-Net does it.

`nnunet` is nnU-Net itself with its own plan, `3d_fullres`, on all training cases. Its schedule is shortened to the
epochs that fit, of a tenth of its 250 steps, so that the learning rate falls as it does there; a few steps are timed
first. Planning, preprocessing and importing are not counted. It predicts without mirroring.

All are scored by the same function on the scans' own grids.
"""

import argparse
import dataclasses
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from common import load_config, machine, report
from tqdm import tqdm

from autocontext_jax.data.datasets import Case, Dataset, read_dataset
from autocontext_jax.data.folds import draw_folds
from autocontext_jax.data.label_maps import read_label_map
from autocontext_jax.data.labels import LabelSpec
from autocontext_jax.data.split import draw_validation
from autocontext_jax.evaluation import metrics
from autocontext_jax.evaluation.statistics import summarise
from autocontext_jax.images import scans
from autocontext_jax.images.spec import ImageSpec, image_spec

ROOT = Path(__file__).parent.parent
EDGE = 64  # voxels of MONAI's patches


def main() -> None:
    """Trains and scores one method, and prints every result so far."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a data set")
    parser.add_argument("--method", required=True, choices=["pyramid", "level_1", "monai", "nnunet"])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--steps", type=int, help="of ours, where it is known how many fit; timed unless given")
    parser.add_argument("--config", default=str(ROOT / "configs/openkbp.py"))
    parser.add_argument("--workdir", help="where ours leaves its run; a temporary folder unless given")
    flags, keys = parser.parse_known_args()
    if wrong := [key for key in keys if not key.startswith("--config.")]:
        parser.error(f"unknown: {' '.join(wrong)}")
    with tempfile.TemporaryDirectory() as folder:
        if flags.method == "monai":
            result = monai(flags, with_test_cases(flags, keys))
            versions = machine("monai", "torch")
        elif flags.method == "nnunet":
            result = nnunet(flags, with_test_cases(flags, keys), Path(flags.workdir or folder))
            versions = machine("nnunetv2", "torch")
        else:
            result = ours(flags, keys, Path(flags.workdir or folder))
            versions = machine()
    result = {"method": flags.method, "minutes": flags.minutes, **result, "machine": versions}
    with flags.results.open("a", encoding="utf-8") as file:
        file.write(json.dumps(result) + "\n")
    rows = [json.loads(line) for line in flags.results.read_bytes().splitlines()]
    report([{key: value for key, value in row.items() if key != "machine"} for row in rows], machine=versions)


def with_test_cases(flags: argparse.Namespace, keys: list[str]) -> Dataset:
    """The data set; without labelled test cases, those that the configuration holds out are its test cases."""
    dataset = read_dataset(Path(flags.data))
    if any(case.label for case in dataset.test):
        return dataset
    config = load_config(flags.config, keys)
    if config.data.folds:
        if not 0 <= config.data.fold < config.data.folds:
            raise SystemExit(f"data.fold is {config.data.fold}; expected one of 0 to {config.data.folds - 1}")
        known = {case.name: case for case in dataset.training}
        fold = draw_folds(known, config.data.folds, flags.data)[config.data.fold]
        training, held_out = (tuple(known[name] for name in names) for names in (fold.training, fold.validation))
    else:
        fraction = config.data.validation_fraction
        training, held_out = draw_validation(dataset.training, fraction=fraction, seed=config.seed)
    return dataclasses.replace(dataset, training=training, test=held_out)


def line(summary: dict[str, Any], *, seconds: float, steps: int) -> dict[str, Any]:
    """A line of the table from `statistics.summarise` of the test scans' Dice."""
    scores = {column: scores["dice"] for column, scores in summary.items()}
    mean = scores.pop("mean")
    organs = {organ: statistics["avg"] for organ, statistics in scores.items()}
    return {"used": seconds / 60, "steps": steps, "mean Dice": mean["avg"], "std over scans": mean["std"], **organs}


# ---- ours


def ours(flags: argparse.Namespace, keys: list[str], workdir: Path) -> dict[str, Any]:
    """Runs the jobs one after the other, each a process of its own."""
    common = [f"--config={flags.config}", *keys, f"--config.data.root={flags.data}"]
    common.append(f"--config.data.prepared={workdir / 'prepared'}")
    if flags.method == "level_1":
        common.append("--config.train.mode=first_level")

    def job(mode: str, folder: str, *more: str) -> float:
        command = [sys.executable, "-m", "autocontext_jax.main", f"--mode={mode}", f"--workdir={workdir / folder}"]
        started = time.monotonic()
        subprocess.run([*command, *common, *more], check=True, stdout=subprocess.DEVNULL)
        return time.monotonic() - started

    def steps_that_fit() -> int:
        timed = 200
        seconds = job("train", "timed", f"--config.train.steps={timed}")
        run = next((workdir / "timed").glob("fold_*"), workdir / "timed")
        logged = [json.loads(text) for text in (run / "metrics.jsonl").read_bytes().splitlines()]
        batch = json.loads((run / "config.json").read_bytes())["config"]["loader"]["batch_size"]
        step = batch / float(np.median([row["patches_per_second"] for row in logged[1:]]))
        # A twentieth is left for noise and for the nine validations on the way: the timed run had only the last.
        return max(1, int(0.95 * (60 * flags.minutes - (seconds - timed * step)) / step))

    job("prepare", "prepare")
    steps = flags.steps or steps_that_fit()
    chosen = f"--config.train.steps={steps}", f"--config.train.checkpoint_every={-(-steps // 10)}"
    seconds = job("train", "run", *chosen)
    job("evaluate", "run", *chosen)
    evaluation = json.loads((workdir / "run" / "evaluation.json").read_bytes())
    return line(evaluation["summary"][max(evaluation["summary"])], seconds=seconds, steps=steps)


# ---- MONAI's


def monai(flags: argparse.Namespace, dataset: Dataset) -> dict[str, Any]:
    """Trains for the given time and scores the test cases."""
    import torch
    from monai import data, transforms
    from monai.inferers import SlidingWindowInferer
    from monai.losses import DiceCELoss
    from monai.networks.nets import UNet
    from monai.utils import set_determinism

    set_determinism(0)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    classes, pair, image = len(dataset.labels.classes), ("image", "label"), spec_of(dataset)
    training = [read(case, image, dataset.labels) for case in dataset.training]
    edge = EDGE if min(min(case["label"].shape[1:]) for case in training) >= EDGE else EDGE // 2
    pad = transforms.SpatialPadd(pair, (edge,) * 3)
    once = transforms.Compose([pad, transforms.ClassesToIndicesd("label", num_classes=classes)])
    crop = transforms.RandCropByLabelClassesd(
        pair, "label", (edge,) * 3, num_classes=classes, num_samples=4, indices_key="label_cls_indices"
    )
    turn = transforms.RandAffined(
        pair, prob=1, rotate_range=(np.deg2rad(10),) * 3, scale_range=(0.1,) * 3, mode=("bilinear", "nearest"),
        padding_mode="border",
    )  # fmt: skip
    cases = data.Dataset([once(case) for case in training], transforms.Compose([crop, turn]))
    loader = data.DataLoader(cases, batch_size=1, shuffle=True)
    inputs = len(image.channels)
    network = UNet(3, inputs, classes, (16, 32, 64, 128, 256), (2, 2, 2, 2), num_res_units=2, norm="batch")
    criterion = DiceCELoss(to_onehot_y=True, softmax=True)
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)

    steps, started, minutes = 0, time.monotonic(), flags.minutes
    with tqdm(total=round(60 * minutes), desc="train", unit="s", mininterval=1) as bar:
        for batch in itertools.chain.from_iterable(itertools.repeat(loader)):
            optimizer.zero_grad()
            loss = criterion(network(batch["image"]), batch["label"])
            loss.backward()
            optimizer.step()
            steps += 1
            seconds = time.monotonic() - started
            bar.set_postfix(step=steps, loss=loss.item(), refresh=False)
            bar.update(min(round(seconds), bar.total) - bar.n)
            if seconds >= 60 * minutes:
                break

    network.eval()
    inferer = SlidingWindowInferer((edge,) * 3, sw_batch_size=4, overlap=0.5, mode="gaussian")

    def predict(case: Case) -> np.ndarray:
        with torch.inference_mode():
            return inferer(read(case, image, dataset.labels)["image"][None], network)[0].argmax(0).numpy()

    return line(scored(dataset, predict), seconds=seconds, steps=steps)


def spec_of(dataset: Dataset) -> ImageSpec:
    """The channels, of CT with the window that the networks of MONAI's users see."""
    spec = image_spec(dataset.channels, (), ())
    return image_spec(dataset.channels, (), (-500.0, 500.0) if spec.ct else ())


def read(case: Case, image: ImageSpec, labels: LabelSpec) -> dict[str, Any]:
    """Image float32, normalised, [C, D, H, W] and label [1, D, H, W], as PyTorch has them."""
    import torch

    scan = scans.read_scan(case.images, image)
    label = read_label_map(case, labels, scan.grid)
    low, gain, offset, bottom, top = (part[:, None, None, None] for part in image.scaling())
    voxels = np.clip((scan.voxels.astype(np.float32) - low) * gain + offset, bottom, top)
    return {"image": torch.from_numpy(voxels), "label": torch.from_numpy(label)[None]}


def scored(dataset: Dataset, predict: Callable[[Case], np.ndarray]) -> dict[str, Any]:
    """`statistics.summarise` of the test cases; `predict` gives the mask of one, canonical."""
    organs, scores = dataset.labels.classes[1:], {}
    for case in dataset.test:
        truth = read_label_map(case, dataset.labels, scans.read_grid(case.images))
        # Of these only the Dice is shown; it knows no spacing.
        scores[case.name] = metrics.scores(predict(case), truth, organs, (1, 1, 1), tolerance=1)
    return summarise(scores, organs)


# ---- nnU-Net's


def nnunet(flags: argparse.Namespace, dataset: Dataset, folder: Path) -> dict[str, Any]:
    """Plans, preprocesses, trains for the given time and scores the test cases."""
    for name in ("raw", "preprocessed", "results"):
        (folder / name).mkdir(parents=True, exist_ok=True)
        os.environ[f"nnUNet_{name}"] = str(folder / name)
    os.environ |= {"nnUNet_compile": "f"}
    import torch
    from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprints, plan_experiments, preprocess
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    raw = folder / "raw" / "Dataset500_Peer"
    _link(dataset, raw)
    extract_fingerprints([500], num_processes=2)
    plan_experiments([500])
    preprocess([500], configurations=["3d_fullres"], num_processes=[2])
    place = folder / "preprocessed" / raw.name
    plans, description = (json.loads((place / name).read_bytes()) for name in ("nnUNetPlans.json", "dataset.json"))

    def trainer(epochs: int) -> nnUNetTrainer:
        own = plans | {"continue_training": False}  # the trainer takes this entry out again
        made = nnUNetTrainer(own, "3d_fullres", "all", description, torch.device("cpu"))
        made.num_epochs, made.num_iterations_per_epoch, made.num_val_iterations_per_epoch = epochs, 25, 1
        made.save_every = 10**6
        return made

    def train(epochs: int) -> tuple[nnUNetTrainer, float]:
        made, started = trainer(epochs), time.monotonic()
        made.run_training()
        return made, time.monotonic() - started

    (_, two), (_, one) = train(2), train(1)
    epochs = max(1, int((60 * flags.minutes - (one - (two - one))) / (two - one)))
    made, seconds = train(epochs)

    predictor = nnUNetPredictor(use_mirroring=False, device=torch.device("cpu"), verbose=False, allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(made.output_folder_base, ("all",), "checkpoint_final.pth")
    names = {case.name: [str(path) for path in case.images] for case in dataset.test}
    results = folder / "predictions"
    results.mkdir()
    predictor.predict_from_files(
        list(names.values()), [str(results / name) for name in names], num_processes_preprocessing=1,
        num_processes_segmentation_export=1,
    )  # fmt: skip

    def predict(case: Case) -> np.ndarray:
        path = results / f"{case.name}.nii.gz"
        return scans.read_label(path, values=range(256), like=scans.read_grid(case.images), case=case.name)

    return line(scored(dataset, predict), seconds=seconds, steps=25 * epochs)


def _link(dataset: Dataset, raw: Path) -> None:
    """The training cases in nnU-Net's layout."""
    for case in dataset.training:
        assert case.label is not None
        for number, image in enumerate(case.images):
            _linked(raw / "imagesTr" / f"{case.name}_{number:04d}.nii.gz", image)
        _linked(raw / "labelsTr" / f"{case.name}.nii.gz", case.label)
    description = {
        "channel_names": {str(number): name for number, name in enumerate(dataset.channels)},
        "labels": dict(zip(dataset.labels.classes, dataset.labels.values, strict=True)),
        "numTraining": len(dataset.training),
        "file_ending": ".nii.gz",
    }
    (raw / "dataset.json").write_text(json.dumps(description), encoding="utf-8")


def _linked(path: Path, to: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(to.absolute())


if __name__ == "__main__":
    main()
