"""Does a long run grow? Trains the quick start for hours and watches its process from outside.

    python tests/campaigns/soak.py [--hours 1] [--workdir FOLDER] [--config configs/quickstart.py]
        [--config.key=value ...]

The real command line in a process of its own, with validation and checkpoints every 500 steps, ended by SIGTERM. Once
every five seconds: memory, open files, threads; step times are those of its `metrics.jsonl`. `allocated` is memory of
its own; `resident` counts the libraries' files too, which come and go as the system needs their place. The first tenth,
in which caches fill, is left out; a row is a quarter of the rest, by the clock. `growth` compares the last quarter with
the first.

Prints a table, then one JSON line; fails if the run did.
"""

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from results import print_results
from tqdm import tqdm

ROOT = Path(__file__).parents[2]
EVERY = 5  # seconds between two looks
QUARTERS = 4


def main() -> None:
    """Runs, watches, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hours", type=float, default=1.0)
    parser.add_argument("--workdir", default="", help="a new folder; a temporary one unless given")
    parser.add_argument("--config", default=str(ROOT / "configs/quickstart.py"))
    flags, overrides = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as temporary:
        workdir = Path(flags.workdir or temporary)
        command = [
            sys.executable, "-m", "autocontext_jax.main", "--config", flags.config, "--workdir", str(workdir),
            "--mode", "train", "--config.train.steps=1000000000", "--config.train.checkpoint_every=500", *overrides,
        ]  # fmt: skip
        with (workdir / "soak.log").open("w", encoding="utf-8") as log:
            process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
            looks = watch(process, workdir, 3600 * flags.hours)
            process.send_signal(signal.SIGTERM)
            status = process.wait()
        if status or len(looks) < 10 * QUARTERS:
            tail = (workdir / "soak.log").read_text(encoding="utf-8")[-2000:]
            sys.exit(f"error: the run ended with status {status} after {len(looks)} looks: {tail}")
        rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    print_results(table(looks, rows), packages=(), flags=vars(flags), overrides=overrides)


def watch(process: subprocess.Popen, workdir: Path, seconds: float) -> list[dict[str, float]]:
    """What the process holds, from its first logged step on, until the time is over or it ends."""
    metrics = workdir / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(1)
    looks: list[dict[str, float]] = []
    started = time.monotonic()
    with tqdm(total=round(seconds), desc="soak", unit="s") as bar:
        while process.poll() is None and (now := time.monotonic() - started) < seconds:
            bar.update(round(now) - bar.n)
            looks.append({"seconds": now, "step": last_step(metrics), **held(process.pid)})
            time.sleep(EVERY)
    return looks


def held(pid: int) -> dict[str, float]:
    """Memory in MB, open files and threads of a process, from Linux."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines())
    return {
        "allocated MB": int(status["RssAnon"].split()[0]) / 1e3,
        "resident MB": int(status["VmRSS"].split()[0]) / 1e3,
        "files": len(list(Path(f"/proc/{pid}/fd").iterdir())),
        "threads": int(status["Threads"]),
    }


def last_step(metrics: Path) -> int:
    """The last whole line's."""
    with metrics.open("rb") as file:
        file.seek(max(0, metrics.stat().st_size - 4000))
        lines = file.read().splitlines()[:-1]
    return json.loads(lines[-1])["step"] if len(lines) > 1 else 0


def table(looks: Sequence[dict[str, float]], rows: Sequence[dict[str, float]]) -> list[dict[str, Any]]:
    """A row a quarter of the time after the first tenth: medians, and the memory's peak."""
    end = looks[-1]["seconds"]
    edges = np.linspace(end / 10, end, QUARTERS + 1)
    quarters: list[dict[str, Any]] = []
    for number in range(QUARTERS):
        low, high = edges[number : number + 2]
        inside = [look for look in looks if low <= look["seconds"] <= high]
        first, last = inside[0]["step"], inside[-1]["step"]
        speeds = [row["patches_per_second"] for row in rows if first < row["step"] <= last]
        medians = {
            name: float(np.median([look[name] for look in inside]))
            for name in looks[0]
            if name not in ("seconds", "step")
        }
        quarters.append(
            {
                "part": f"{low / 3600:.2f} h to {high / 3600:.2f} h",
                "steps": int(last - first),
                **medians,
                "largest resident MB": max(look["resident MB"] for look in inside),
                "ms per pyramid patch": 1e3 / float(np.median(speeds)),
            }
        )
    growth = {
        name: f"{100 * (quarters[-1][name] / quarters[0][name] - 1):+.1f} %" for name in quarters[0] if name != "part"
    }
    return [*quarters, {"part": "growth", **growth}]


if __name__ == "__main__":
    main()
