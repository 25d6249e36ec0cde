"""How many scans a minute does preparing a data set take, in how much memory, and how does nnU-Net compare?

    python benchmarks/prepare.py [--data FOLDER] [--cases 4] [--size 100 512 512] [--spacing 2.5 0.75 0.75]
        [--factors 4 2] [--workers 2] [--rounds 2] [--peers]

--data is a data set's folder in the nnU-Net v2 layout; without it, --cases phantoms of --size voxels are generated.
Each side is the command that its user types, from start to end, in a process of its own and in turn: ours `--mode
prepare`, which writes every level, its labels and the list of foreground voxels; theirs `nnUNetv2_plan_and_preprocess`
(fingerprint, plan, preprocess) for 3d_fullres alone, its usual choice. Both get the same number of workers.

Seconds are by the clock, starting Python and its libraries included; CPU seconds are of all processes together, which
other work on the machine disturbs less. Memory is the largest sum over a command's processes of what they have
allocated and hold; pages of files, such as libraries, do not count. It is sampled, so short peaks may be missed. Linux
alone.
"""

import argparse
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import machine, median_ratio, report

from autocontext_jax.data.datasets import read_dataset
from autocontext_jax.data.phantom.dataset import write_dataset

CONFIG = Path(__file__).parent.parent / "configs" / "abdomen_ct.py"
PEER = "nnunetv2"
DATASET = "Dataset001_Benchmark"  # nnU-Net finds data sets by such a name in its folder of raw ones


def main() -> None:
    """Runs the commands in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--cases", type=int, default=4)
    parser.add_argument("--size", type=int, nargs=3, default=(100, 512, 512), help="voxels, z y x")
    parser.add_argument("--spacing", type=float, nargs=3, default=(2.5, 0.75, 0.75), help="mm, z y x")
    parser.add_argument("--factors", type=float, nargs="+", default=(4.0, 2.0))
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--peers", action="store_true")
    flags = parser.parse_args()
    peer = flags.peers and importlib.util.find_spec(PEER) is not None
    if flags.peers and not peer:
        print(f"not installed, so left out: {PEER} (pip install -e '.[peers]')")

    with tempfile.TemporaryDirectory() as temporary:
        folder, data = Path(temporary), flags.data
        if data is None:
            data, size, spacing = folder / "phantoms", tuple(flags.size), tuple(flags.spacing)
            write_dataset(data, training=flags.cases, test=0, size=size, spacing=spacing, seed=0)
        cases = len(read_dataset(data).training)
        commands = {"ours": ours} | ({PEER: nnunet} if peer else {})
        runs: dict[str, list[tuple[float, float, float]]] = {name: [] for name in commands}
        for number in range(flags.rounds):
            for name, command in commands.items():
                with tempfile.TemporaryDirectory(dir=folder) as output:
                    arguments, environment = command(data.resolve(), Path(output), flags.workers, flags.factors)
                    runs[name].append(measure(arguments, environment))
                print(f"round {number + 1}, {name}: {runs[name][-1][0]:.1f} s", file=sys.stderr)

    rows = []
    for name, measured in runs.items():
        seconds, cpu, peak = np.median(measured, axis=0).tolist()
        speeds = [median_ratio(*([run[kind] for run in runs[side]] for side in ("ours", name))) for kind in (0, 1)]
        rows.append(
            {
                "side": name,
                "scans a minute": 60 * cases / seconds,
                "seconds a scan": seconds / cases,
                "CPU seconds a scan": cpu / cases,
                "peak GB": peak,
                "ours is": "" if name == "ours" else f"{speeds[0]:.1f} times as fast, {speeds[1]:.1f} by CPU seconds",
            }
        )
    about: dict[str, Any] = vars(flags) | {"data": flags.data and str(flags.data), "cases": cases}
    report(rows, machine=machine(*([PEER] if peer else [])), flags=about)


def ours(data: Path, output: Path, workers: int, factors: list[float]) -> tuple[list[str], dict[str, str]]:
    """Command and environment of `--mode prepare`."""
    flags = [f"--config.data.root={data}", f"--config.data.workers={workers}", f"--config.levels.factors={(*factors,)}"]
    run = [sys.executable, "-m", "autocontext_jax.main", "--mode", "prepare", "--config", str(CONFIG)]
    return [*run, "--workdir", str(output), *flags], {}


def nnunet(data: Path, output: Path, workers: int, factors: list[float]) -> tuple[list[str], dict[str, str]]:
    """Command and environment of nnU-Net's preprocessing; its grids are its own choice, not `factors`."""
    folders = {f"nnUNet_{kind}": str(output / kind) for kind in ("raw", "preprocessed", "results")}
    (output / "raw").mkdir()
    (output / "raw" / DATASET).symlink_to(data)
    flags = ["-d", "1", "-c", "3d_fullres", "-np", str(workers), "-npfp", str(workers), "--no_pbar"]
    return [sys.executable, "-m", f"{PEER}.experiment_planning.plan_and_preprocess_entrypoints", *flags], folders


def measure(arguments: list[str], environment: dict[str, str]) -> tuple[float, float, float]:
    """Runs a command; returns its seconds, the CPU seconds and the peak memory in GB of all its processes together."""
    peak, started = 0.0, time.perf_counter()
    with tempfile.TemporaryFile("w+", encoding="utf-8") as log:
        command = subprocess.Popen(arguments, env=os.environ | environment, stdout=log, stderr=log)
        # `wait4` alone tells what the command's own children used, once they have ended.
        while not (ended := os.wait4(command.pid, os.WNOHANG))[0]:
            peak = max(peak, sum(map(memory_gb, tree(command.pid))))
            time.sleep(0.1)
        command.returncode = os.waitstatus_to_exitcode(ended[1])
        if command.returncode:
            log.seek(0)
            sys.exit(f"{' '.join(arguments)} ended with {command.returncode}:\n{log.read()}")
    return time.perf_counter() - started, ended[2].ru_utime + ended[2].ru_stime, peak


def tree(process: int) -> list[int]:
    """A process and all that descend from it."""
    try:
        lists = [path.read_text(encoding="utf-8") for path in Path(f"/proc/{process}/task").glob("*/children")]
    except OSError:  # it has just ended
        lists = []
    return [process, *(below for line in lists for child in line.split() for below in tree(int(child)))]


def memory_gb(process: int) -> float:
    """Resident memory that a process has allocated, GB; 0 once it has ended. Cheap to ask, unlike exact shares."""
    try:
        lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")) * 1024 / 1e9


if __name__ == "__main__":
    main()
