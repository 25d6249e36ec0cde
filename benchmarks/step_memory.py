"""Does a training step take the memory that the plan says, on this CPU?

    python benchmarks/step_memory.py

For six steps of different networks, patches, batches and levels: the compiler's number, by which `--mode plan` goes,
and the peak of the process's resident memory while the step runs, less what it had before the step's arrays were made.
Each is measured in a process of its own. What a run has beside it stands apart: a process that has imported and
compiled all (`before`), the cache of prepared cases (`data.cache_mib`) and batches that are read ahead.
"""

import argparse
import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import machine, make_pyramid, report

from autocontext_jax.planning.compiled import TrainingStep, compile_program
from autocontext_jax.runtime import set_up

STEPS: tuple[dict[str, Any], ...] = (
    {"levels": 1, "width": 8, "patch": (32, 32, 32), "batch": 4, "dtype": "float32"},
    {"levels": 2, "width": 8, "patch": (48, 48, 48), "batch": 3, "dtype": "bfloat16"},
    {"levels": 1, "width": 16, "patch": (32, 48, 32), "batch": 2, "dtype": "bfloat16"},
    {"levels": 2, "width": 16, "patch": (64, 64, 64), "batch": 2, "dtype": "bfloat16"},
    {"levels": 2, "width": 16, "patch": (64, 64, 64), "batch": 1, "dtype": "float32"},
    {"levels": 2, "width": 32, "patch": (64, 64, 64), "batch": 2, "dtype": "bfloat16"},
)


def main() -> None:
    """Measures each step in a process of its own, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--step", type=int, help="measure this one here, from 0")
    flags = parser.parse_args()
    if flags.step is not None:
        print(json.dumps(measure(**STEPS[flags.step])))
        return
    rows = []
    for number in range(len(STEPS)):
        command = [sys.executable, __file__, f"--step={number}"]
        done = subprocess.run(command, check=True, capture_output=True, encoding="utf-8")
        rows.append(json.loads(done.stdout.splitlines()[-1]))
    report(rows, machine=machine())


def measure(levels: int, width: int, patch: tuple[int, int, int], batch: int, dtype: str) -> dict[str, object]:
    """The memory of one step: predicted and at its peak, MiB."""
    set_up(training=True, dtype=dtype)
    make_model = functools.partial(make_pyramid, levels=levels, classes=8, width=width, dtype=dtype)
    compiled = compile_program(TrainingStep(make_model, patch, batch), np.array(jax.devices()[:1]))
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak counts from here
    arguments, _ = compiled.executable.in_avals
    state, patches = jax.tree.map(lambda like: jnp.zeros(like.shape, like.dtype), arguments)
    for _ in range(3):
        state, metrics = compiled.executable(state, patches)
        jax.block_until_ready((state, metrics))
    predicted, peak = compiled.needed_bytes / 2**20, memory("VmHWM") - before
    return {
        "levels": levels, "base channels": width, "patch": " x ".join(map(str, patch)), "batch": batch, "dtype": dtype,
        "predicted": predicted, "peak": peak, "predicted / peak": predicted / peak, "before": before,
    }  # fmt: skip


def memory(name: str) -> float:
    """A line of the process's status, MiB."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines())
    return int(lines[name].split()[0]) / 1024


if __name__ == "__main__":
    main()
