"""Where does the time go when `--mode predict` is given one small scan?

    python benchmarks/start_up.py [--size 96] [--width 8] [--depth 4] [--rounds 3]

A model file with random weights, two levels and eight classes predicts one scan, in a process of its own each time: the
whole command, without kept programs and with them, in turn; and its parts, each measured by itself within one process.
`compile` is the first prediction less the second. Seconds, the median of the rounds.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from common import machine, report

PARTS = """
import json, sys, time
times, begun = {}, time.perf_counter()
def mark(name):
    global begun
    times[name], begun = time.perf_counter() - begun, time.perf_counter()
import pathlib
from autocontext_jax import main
from autocontext_jax.jobs import predict, run
from autocontext_jax.inference.model import load_file
from autocontext_jax.images import scans
from autocontext_jax import runtime
runtime.set_up(training=False, dtype="float32")
runtime.keep_compiled_programs()
mark("import")
model = load_file(pathlib.Path(sys.argv[1]), {}, {})
mark("load the model")
scan = scans.read_scan(pathlib.Path(sys.argv[2]))
mark("read the scan")
model.mask(scan)
mark("compile")
mask = model.mask(scan)
mark("predict")
scans.write_mask(pathlib.Path(sys.argv[3]), mask, scan.grid)
mark("write the mask")
times["compile"] -= times["predict"]
print(json.dumps(times))
"""


def main() -> None:
    """Measures in turn and prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("size", 96), ("width", 8), ("depth", 4), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_files(folder, flags.size, flags.width, flags.depth)
        files = [str(folder / file) for file in ("model.autocontext", "scan.nii.gz", "mask.nii.gz")]
        kinds = {
            "without kept programs": {"JAX_COMPILATION_CACHE_DIR": ""},
            "with kept programs": {"XDG_CACHE_HOME": str(folder / "cache")},
        }
        run_parts(files, kinds["with kept programs"])  # keeps them
        whole: dict[str, list[float]] = {kind: [] for kind in kinds}
        parts: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
        for _ in range(flags.rounds):
            for kind, environment in kinds.items():
                command = ["-m", "autocontext_jax.main", "--mode=predict"]
                command += [f"--{flag}={file}" for flag, file in zip(("model", "input", "output"), files, strict=True)]
                begun = time.perf_counter()
                start(command, environment)
                whole[kind].append(time.perf_counter() - begun)
                parts[kind].append(run_parts(files, environment))
        rows = [
            {"": kind, "whole command": float(np.median(whole[kind]))}
            | {part: float(np.median([found[part] for found in parts[kind]])) for part in parts[kind][0]}
            for kind in kinds
        ]
    report(rows, machine=machine(), flags=vars(flags))


def make_files(folder: Path, size: int, width: int, depth: int) -> None:
    """A model file and a scan."""
    import jax
    from flax import nnx

    from autocontext_jax.data.store.level_grids import LevelGrids
    from autocontext_jax.images import scans
    from autocontext_jax.images.spec import ct_image
    from autocontext_jax.inference.description import ClassDescription, Description, NetworkDescription, Tiling
    from autocontext_jax.inference.model import Model
    from autocontext_jax.inference.tiling import PredictorConfig
    from autocontext_jax.models.pyramid import PyramidConfig, make_pyramid
    from autocontext_jax.models.unet import UNet
    from autocontext_jax.training.state import inference_model

    jax.config.update("jax_platforms", "cpu")
    description = Description(
        name="model", license="CC0-1.0", classes=tuple(ClassDescription(f"class {n}", n) for n in range(8)),
        network=NetworkDescription(name="unet", base_channels=width, depth=depth), pyramid=PyramidConfig(),
        image=ct_image(), levels=LevelGrids((2.0, 1.0)), trained_spacing=((1.0,) * 3, (1.0,) * 3),
        tiling=Tiling((0,), PredictorConfig.margin, crop_to_body=True, flip=False), training={}, evaluation={},
    )  # fmt: skip
    pyramid = make_pyramid(UNet, description.network.alone(), description.full_pyramid, seed=0)
    pyramid = inference_model(*nnx.split(pyramid, nnx.Param, ...))
    Model(description, [pyramid], PredictorConfig()).save(folder / "model.autocontext")
    voxels = np.random.default_rng(0).integers(-300, 300, (size,) * 3, dtype=np.int16)
    scans.write_scan(folder / "scan.nii.gz", voxels, (1.0, 1.0, 1.0), origin=(0.0, 0.0, 0.0))


def start(command: list[str], environment: dict[str, str]) -> str:
    """Runs Python; gives what it printed."""
    run = subprocess.run(
        [sys.executable, *command], env=os.environ | environment, capture_output=True, encoding="utf-8", check=True
    )
    return run.stdout


def run_parts(files: list[str], environment: dict[str, str]) -> dict[str, float]:
    """Seconds of each part, measured in one process."""
    return json.loads(start(["-c", PARTS, *files], environment).splitlines()[-1])


if __name__ == "__main__":
    main()
