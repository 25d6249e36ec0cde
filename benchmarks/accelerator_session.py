"""What the parts of accelerator.py share: the sizes that they measure, compiled programs, how results are printed."""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from training_program import TrainingProgram, compile_training_step

from autocontext_jax.data.phantom.anatomy import ORGANS
from autocontext_jax.planning.devices import ACCELERATORS, GPUS, Accelerator


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is measured: the paper's configuration, or something that a CPU does in seconds.

    Attributes:
      matrix: edge of the square matrices multiplied.
      vector: numbers copied.
      check: arguments of `against_the_cpu`.
      width, depth, edge: of the network and its patches.
      batch: patches a step.
      batches: larger ones, of which the largest that fits is measured.
      steps: in a block of measurements.
      phantoms: number, size and spacing of the scans that the loader reads.
      scan: voxels of the scan that is predicted.
      tile: see `PredictorConfig`.
    """

    matrix: int = 8192
    vector: int = 2**27
    check: dict[str, int] = dataclasses.field(default_factory=lambda: {"width": 8, "depth": 3, "edge": 32, "batch": 2})
    width: int = 32
    depth: int = 4
    edge: int = 64
    batch: int = 3
    batches: tuple[int, ...] = (8,)
    steps: int = 10
    phantoms: tuple[int, tuple[int, int, int], tuple[float, float, float]] = (3, (96, 160, 160), (4.0, 2.4, 2.4))
    scan: tuple[int, int, int] = (300, 512, 512)
    tile: tuple[int, ...] = (0,)


SMALL = Sizes(
    matrix=128, vector=2**16, check={"width": 2, "depth": 1, "edge": 8, "batch": 1}, width=2, depth=1, edge=8, batch=1,
    batches=(2,), steps=1, phantoms=(2, (24, 24, 24), (12.0, 12.0, 12.0)), scan=(12, 24, 24), tile=(16,),
)  # fmt: skip


@dataclasses.dataclass
class Session:
    """What the parts share.

    Attributes:
      sizes: see there.
      folder: of the results.
      small: whether this is a trial.
      seconds_left: of the part that runs.
      programs: training steps compiled so far, by type, batch and whether they are deterministic.
      rates: FLOP a second of a large matrix product by type, as HLO names types; `copy` in bytes a second.
    """

    sizes: Sizes
    folder: Path
    small: bool
    seconds_left: Callable[[], float] = lambda: 0.0
    programs: dict[tuple[str, int, bool], TrainingProgram] = dataclasses.field(default_factory=dict)
    rates: dict[str, float] = dataclasses.field(default_factory=dict)

    def program(self, dtype: str, batch: int, *, deterministic: bool = False) -> TrainingProgram:
        """The training step, compiled once."""
        # Elsewhere the two are one program.
        deterministic &= jax.default_backend() == "gpu"
        key = dtype, batch, deterministic
        if key not in self.programs:
            size = {"width": self.sizes.width, "depth": self.sizes.depth, "edge": self.sizes.edge, "batch": batch}
            self.programs[key] = compile_training_step(
                **size, dtype=dtype, classes=len(ORGANS) + 1, deterministic=deterministic
            )
            print(f"compiled {key} in {self.programs[key].compile_seconds:.1f} s", file=sys.stderr, flush=True)
        return self.programs[key]

    def accelerator(self) -> Accelerator:
        """The device's data sheet; its measured rates where none is known."""
        kind = jax.devices()[0].device_kind
        name = next((name for name, gpu in GPUS.items() if gpu.title == kind), None)
        if name is not None:
            return ACCELERATORS[name]
        rates = self.rates or {"bf16": 1e12, "f32": 1e12, "copy": 1e11}
        return Accelerator("cuda", 0, rates["copy"], {"bf16": rates["bf16"], "f32": rates["f32"]}, 1e9)


def memory(which: str) -> float:
    """Bytes of the first device, by JAX's name of the figure; NaN where the device does not tell."""
    return float((jax.devices()[0].memory_stats() or {}).get(which, np.nan))


def nvidia_driver() -> str:
    """Version of the NVIDIA driver; empty where there is none."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, encoding="utf-8", timeout=20).stdout.strip()
    except OSError:
        return ""


def table(title: str, rows: Iterable[dict[str, Any]]) -> None:
    """Prints each row of a Markdown table, and as JSON, as soon as it is there."""
    print(f"\n**{title}**\n")
    columns: list[str] = []
    for row in rows:
        if not columns:
            columns = list(row)
            print("| " + " | ".join(columns) + " |")
            print("|" + " --- |" * len(columns))
        cells = [row.get(column, "") for column in columns]
        print("| " + " | ".join(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells) + " |")
        print(json.dumps({"table": title} | {name: None if cell != cell else cell for name, cell in row.items()}))
