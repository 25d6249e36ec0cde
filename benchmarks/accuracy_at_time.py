"""What mean Dice on held-out scans does each method reach in the same training time?

    python benchmarks/accuracy_at_time.py --data FOLDER --method pyramid|level_1|monai --minutes 30 --results FILE
        [--steps N] [--config configs/openkbp.py] [--workdir FOLDER] [--config.key=value ...]

One method a call, alone on the machine; FILE gathers the results, a JSON line a call, and the table shows all of them.

`pyramid` and `level_1` are the command line with --config, the latter with the coarsest level only. Their learning rate
falls to zero over the run, so the number of steps has to be known: a short run is timed first, and as many steps are
taken as fit, or N are. The clock covers the whole train process: start, compilation, validation and checkpoints too;
what it showed is in the table, as `used`.

`monai` is what a MONAI user gets: UNet (16, 32, 64, 128, 256; two residual units; batch norm), DiceCELoss, Adam 1e-3,
RandCropByLabelClasses of 64^3 with equal ratios and 4 samples a scan, RandAffine, and a Gaussian sliding window, in
float32. It trains on every training case, ours hold out what --config says, until the time is up; reading the scans and
importing are not counted. All are scored by the same function on the scans' own grids.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import machine, report
from tqdm import tqdm

from autocontext_jax.data.datasets import Case, Dataset, read_dataset
from autocontext_jax.data.label_maps import read_label_map
from autocontext_jax.data.labels import LabelSpec
from autocontext_jax.evaluation import metrics
from autocontext_jax.evaluation.statistics import summarise
from autocontext_jax.images import scans

ROOT = Path(__file__).parent.parent
EDGE = 64  # voxels of MONAI's patches


def main() -> None:
    """Trains and scores one method, and prints every result so far."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a data set with labelled test scans")
    parser.add_argument("--method", required=True, choices=["pyramid", "level_1", "monai"])
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
            result = monai(read_dataset(Path(flags.data)), flags.minutes)
            versions = machine("monai", "torch")
        else:
            result = ours(flags, keys, Path(flags.workdir or folder))
            versions = machine()
    result = {"method": flags.method, "minutes": flags.minutes, **result, "machine": versions}
    with flags.results.open("a", encoding="utf-8") as file:
        file.write(json.dumps(result) + "\n")
    rows = [json.loads(line) for line in flags.results.read_bytes().splitlines()]
    report([{key: value for key, value in row.items() if key != "machine"} for row in rows], machine=versions)


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
        logged = [json.loads(text) for text in (workdir / "timed" / "metrics.jsonl").read_bytes().splitlines()]
        batch = json.loads((workdir / "timed" / "config.json").read_bytes())["config"]["loader"]["batch_size"]
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


def monai(dataset: Dataset, minutes: float) -> dict[str, Any]:
    """Trains for the given time and scores the test cases."""
    import torch
    from monai import data, transforms
    from monai.inferers import SlidingWindowInferer
    from monai.losses import DiceCELoss
    from monai.networks.nets import UNet
    from monai.utils import set_determinism

    set_determinism(0)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    classes, pair = len(dataset.labels.classes), ("image", "label")
    window = transforms.ScaleIntensityRanged("image", -500, 500, -1, 1, clip=True)
    once = transforms.Compose([window, transforms.ClassesToIndicesd("label", num_classes=classes)])
    crop = transforms.RandCropByLabelClassesd(
        pair, "label", (EDGE,) * 3, num_classes=classes, num_samples=4, indices_key="label_cls_indices"
    )
    turn = transforms.RandAffined(
        pair, prob=1, rotate_range=(np.deg2rad(10),) * 3, scale_range=(0.1,) * 3, mode=("bilinear", "nearest"),
        padding_mode="border",
    )  # fmt: skip
    training = data.Dataset(
        [once(read(case, dataset.labels)) for case in dataset.training], transforms.Compose([crop, turn])
    )
    loader = data.DataLoader(training, batch_size=1, shuffle=True)
    network = UNet(3, 1, classes, (16, 32, 64, 128, 256), (2, 2, 2, 2), num_res_units=2, norm="batch")
    criterion = DiceCELoss(to_onehot_y=True, softmax=True)
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)

    steps, started = 0, time.monotonic()
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
    inferer = SlidingWindowInferer((EDGE,) * 3, sw_batch_size=4, overlap=0.5, mode="gaussian")
    organs, scores = dataset.labels.classes[1:], {}
    for case in dataset.test:
        scan = read(case, dataset.labels)
        with torch.inference_mode():
            mask = inferer(window(scan)["image"][None], network)[0].argmax(0).numpy()
        # Of these only the Dice is shown; it knows no spacing.
        scores[case.name] = metrics.scores(mask, scan["label"][0].numpy(), organs, (1, 1, 1), tolerance=1)
    return line(summarise(scores, organs), seconds=seconds, steps=steps)


def read(case: Case, labels: LabelSpec) -> dict[str, Any]:
    """Image float32 HU and label, [1, D, H, W] each, as PyTorch has them."""
    import torch

    scan = scans.read_scan(case.image)
    label = read_label_map(case, labels, scan.grid)
    return {"image": torch.from_numpy(scan.voxels.astype(np.float32))[None], "label": torch.from_numpy(label)[None]}


if __name__ == "__main__":
    main()
