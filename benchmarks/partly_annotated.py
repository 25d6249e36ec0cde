"""What does a pyramid learn from two data sets that each annotate half of the classes?

    python benchmarks/partly_annotated.py [--config configs/quickstart.py] [--workdir FOLDER] [--config.key=value ...]

The phantoms of --config are trained on in three ways. All are scored on the same fully annotated test phantoms.

`full`: every case annotates all classes.
`two folders`: the first half of the cases in one data set, which annotates every second class, the second half in
another, which annotates the other classes: `--config.data.root=ONE,TWO`.
`as background`: these label files as one data set of all classes, as if what is not annotated were background.

The table shows the Dice of the finest level.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import load_config, machine, report
from tqdm import tqdm

from autocontext_jax.data.phantom.anatomy import ORGANS
from autocontext_jax.data.phantom.dataset import write_dataset
from autocontext_jax.images import scans

ROOT = Path(__file__).parent.parent
HALVES = ORGANS[::2], ORGANS[1::2]


def main() -> None:
    """Trains and scores all three, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(ROOT / "configs/quickstart.py"))
    parser.add_argument("--workdir", help="where the data sets and runs stay; a temporary folder unless given")
    parser.add_argument("--share", type=float, default=0.5, help="of the cases that are in the first of two folders")
    flags, keys = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(flags.workdir or temporary)
        write_sets(folder, flags.config, keys, flags.share)
        roots = {
            "full": f"{folder / 'full'}",
            "two folders": f"{folder / 'one'},{folder / 'two'}",
            "as background": f"{folder / 'background'}",
        }
        common = [f"--config={flags.config}", *keys, "--config.phantom.training=0"]
        rows = [
            {"trained on": name, **scores(folder / name.replace(" ", "_"), root, folder / "test", common)}
            for name, root in tqdm(roots.items(), desc="train", unit="run")
        ]
    report(rows, machine=machine())


def write_sets(folder: Path, path: str, keys: Sequence[str], share: float) -> None:
    """The data sets `full`, `one`, `two`, `background` and `test`."""
    config = load_config(path, keys)
    phantom = config.phantom
    base = folder / "phantoms"
    write_dataset(
        base, training=phantom.training, test=phantom.test, size=phantom.size, spacing=phantom.spacing,
        look_alikes=phantom.look_alikes, seed=config.seed,
    )  # fmt: skip
    names = [f"phantom_{number:03d}" for number in range(phantom.training)]
    number = round(share * len(names))
    first, second = names[:number], names[number:]
    sets: dict[str, list[tuple[list[str], tuple[str, ...]]]] = {
        "full": [(names, ORGANS)],
        "one": [(first, HALVES[0])],
        "two": [(second, HALVES[1])],
        "background": [(first, HALVES[0]), (second, HALVES[1])],
    }
    for name, parts in sets.items():
        described = [organ for organ in ORGANS if name in ("full", "background") or organ in parts[0][1]]
        for cases, organs in parts:
            for case in cases:
                link(folder / name / f"imagesTr/{case}_0000.nii.gz", base / f"imagesTr/{case}_0000.nii.gz")
                write_label(folder / name / f"labelsTr/{case}.nii.gz", base / f"labelsTr/{case}.nii.gz", organs)
        describe(folder / name, described)
    for part in ("imagesTs", "labelsTs"):
        for file in (base / part).iterdir():
            link(folder / "test" / part / file.name, file)
    describe(folder / "test", ORGANS)


def write_label(target: Path, source: Path, organs: Sequence[str]) -> None:
    """The label map with these organs alone."""
    grid = scans.read_grid(source)
    label = scans.read_label(source, values=range(len(ORGANS) + 1), like=grid, case=source.name)
    kept = np.array([0, *(number * (organ in organs) for number, organ in enumerate(ORGANS, 1))], np.uint8)
    scans.write_mask(target, kept[label], grid)


def link(target: Path, source: Path) -> None:
    """A link to a file, in a folder that is made."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.exists():
        os.symlink(source.absolute(), target)


def describe(root: Path, organs: Sequence[str]) -> None:
    """Writes `dataset.json`; each organ has the value that it has in all phantoms."""
    labels = {"background": 0} | {organ: 1 + ORGANS.index(organ) for organ in organs}
    description = {"channel_names": {"0": "CT"}, "labels": labels, "file_ending": ".nii.gz"}
    (root / "dataset.json").write_text(json.dumps(description), encoding="utf-8")


def scores(workdir: Path, root: str, test: Path, common: Sequence[str]) -> dict[str, Any]:
    """Trains a run, or goes on with it, and scores it on the test phantoms."""
    modes = [["--mode=train"], ["--mode=evaluate", f"--config.evaluate.root={test}"]]
    for mode in modes:
        command = [sys.executable, "-m", "autocontext_jax.main", f"--workdir={workdir}", *mode]
        flags = common if mode == modes[0] else []
        named = [f"--config.data.root={root}"] if mode == modes[0] else []
        subprocess.run([*command, *flags, *named], check=True, stdout=subprocess.DEVNULL)
    evaluation = json.loads((workdir / "on_test" / "evaluation.json").read_bytes())
    summary = evaluation["summary"][max(evaluation["summary"])]
    dice = {name: found["dice"]["avg"] for name, found in summary.items()}
    return {"mean Dice": dice.pop("mean"), **dice}


if __name__ == "__main__":
    main()
