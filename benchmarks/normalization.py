"""Which normalisation learns best from few patches a step?

    python benchmarks/normalization.py [--config configs/quickstart.py] [--seeds 3] [--recipes batch,instance]
        [--workdir FOLDER] [--config.key=value ...]

Trains --config with each of these, one after the other, and scores each on the test scans of --config:

`batch`: `model.norm=batch`, and no step with frozen statistics.
`frozen`: `model.norm=batch`, and the last 0.3 of the steps with frozen statistics (`train.frozen_batch_stats`).
`instance`, `group`: `model.norm`.

The table shows the mean Dice of each level, that of each class at the finest level, and seconds of training and of
evaluation, both with start and compilation; the first run of a seed prepares the data too. All runs of a seed share
their data; with another seed phantoms, split and first weights are others. With --workdir a run that was stopped goes
on, and one that is finished is only scored again.
"""

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import load_config, machine, report
from common import run as run_script
from tqdm import tqdm

from autocontext_jax.errors import UserError

ROOT = Path(__file__).parent.parent
RECIPES = {
    "batch": ("--config.model.norm=batch", "--config.train.frozen_batch_stats=0.0"),
    "frozen": ("--config.model.norm=batch", "--config.train.frozen_batch_stats=0.3"),
    "instance": ("--config.model.norm=instance",),
    "group": ("--config.model.norm=group",),
}


def main() -> None:
    """Trains and scores every recipe with every seed, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(ROOT / "configs/quickstart.py"))
    parser.add_argument("--recipes", default=",".join(RECIPES), help="some of these, with commas between them")
    parser.add_argument("--seeds", type=int, default=1, help="how many runs of each recipe")
    parser.add_argument("--workdir", help="where the data set and the runs stay; a temporary folder unless given")
    flags, keys = parser.parse_known_args()
    recipes = flags.recipes.split(",")
    if unknown := [name for name in recipes if name not in RECIPES]:
        raise UserError(f"--recipes names {unknown[0]!r}; expected some of {','.join(RECIPES)}")
    config = load_config(flags.config, keys)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(flags.workdir or temporary).absolute()
        seeds = range(config.seed, config.seed + flags.seeds)
        rows = []
        for seed, name in tqdm(list(itertools.product(seeds, recipes)), desc="train", unit="run"):
            own = [f"--config={flags.config}", *keys, *RECIPES[name], f"--config.seed={seed}"]
            own.append(f"--config.data.prepared={folder / f'prepared_{seed}'}")
            if not config.data.root:
                own.append(f"--config.data.root={folder / f'phantoms_{seed}'}")
            rows.append({"recipe": name, "seed": seed, **scores(folder / f"{name}_{seed}", own)})
    report(rows, machine=machine(), config=flags.config, keys=keys)


def scores(workdir: Path, flags: Sequence[str]) -> dict[str, Any]:
    """Trains a run, or goes on with it, and scores it."""
    seconds = {}
    for mode in ("train", "evaluate"):
        command = [sys.executable, "-m", "autocontext_jax.main", f"--workdir={workdir}", f"--mode={mode}"]
        started = time.perf_counter()
        subprocess.run([*command, *(flags if mode == "train" else [])], check=True, stdout=subprocess.DEVNULL)
        seconds[f"{mode} s"] = time.perf_counter() - started
    summary = json.loads((workdir / "evaluation.json").read_bytes())["summary"]
    means = {f"{name} mean Dice": found["mean"]["dice"]["avg"] for name, found in summary.items()}
    finest = summary[max(summary)]
    return means | {name: found["dice"]["avg"] for name, found in finest.items() if name != "mean"} | seconds


if __name__ == "__main__":
    run_script(main)
