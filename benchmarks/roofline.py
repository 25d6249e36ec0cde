"""Will this configuration fit that accelerator, and what will bound it there?

    python benchmarks/roofline.py --device h100 [--program train|predict] [--width 32] [--edge 64] [--batch 3]
        [--space 1] [--levels 2] [--classes 8] [--dtype bfloat16] [--fit batch|edge] [--top 10] [--each]
        [--save HLO.txt]

Compiles the real training step (`--batch` pyramid patches on each device, or on each `--space` devices that share the
depth of theirs), or the predictor's program for a tile of `--level` (the finest unless given). The accelerator may be
absent, but its compiler must be installed: `pip install -e '.[cuda13]'` or `'.[tpu]'`. `planning/devices.py` lists the
devices; several are h100x8 or v5e-4. `--fit` first looks for the largest batch or edge that fits; it compiles each size
that it tries.

What is counted, for one device: FLOPs of convolutions and matrix products, two for each multiply-add; bytes to and from
the device's memory as `planning/costs.py` counts them; memory without the workspace of cuDNN's chosen algorithms. Times
are those of a roofline: each kernel takes the longer of its FLOPs at the peak and its bytes at the full bandwidth. No
real device is that fast, least of all in cuDNN's 3D convolutions: a time is a lower bound, not a forecast.

Prints the largest offenders around the convolutions by source line (`--each`: by kernel), the memory, a table by kind,
then one JSON line.
"""

import argparse
import collections
import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import machine, make_pyramid, report, run

from autocontext_jax.errors import UserError
from autocontext_jax.planning import costs as kinds
from autocontext_jax.planning import hlo_text
from autocontext_jax.planning.compiled import (
    Program,
    TilePrediction,
    TrainingStep,
    compile_program,
    largest_that_fits,
)
from autocontext_jax.planning.costs import Cost, instruction_costs, roofline_seconds
from autocontext_jax.planning.devices import absent_devices, accelerator_and_count
from autocontext_jax.runtime import compile_for_absent_devices

FLOOR = (kinds.FORWARD, kinds.DATA, kinds.FILTER, kinds.PRODUCT)
BOOLEANS: dict[str, bool | str] = {"true": True, "false": False}  # XLA refuses the words
EDGE_STEP = 16  # what --fit edge grows by: patches must halve three times, and their quarter be even


def main() -> None:
    """Compiles, reads, prints."""
    flags = parse_flags()
    compile_for_absent_devices()
    accelerator, count = accelerator_and_count(flags.device)
    devices = absent_devices(flags.device)
    options = {name: BOOLEANS.get(value, value) for name, value in (option.split("=", 1) for option in flags.xla)}
    made = program(flags)
    if flags.fit:
        made = fit(made, flags, devices, accelerator.usable, options)

    compiled = compile_program(made, devices, options=options)
    if flags.save:
        flags.save.write_text(compiled.text, encoding="utf-8")
    module = hlo_text.parse(compiled.text)
    costs = instruction_costs(module)
    seconds = [roofline_seconds(cost, accelerator, count) for cost in costs]

    found = offenders(module, costs, seconds, each=flags.each)[: flags.top]
    print_table(found)
    temporary, peak = compiled.temporary_bytes, compiled.needed_bytes
    print(f"\nMemory: {peak / 1e9:.2f} GB at the peak, of it {temporary / 1e9:.2f} GB temporary.", end=" ")
    print(f"{flags.device} has {accelerator.memory / 1e9:.1f} GB, JAX takes {accelerator.usable / 1e9:.1f} GB of it.\n")
    report(
        table(costs, seconds),
        offenders=found,
        flags={name: flag for name, flag in vars(flags).items() if name != "save"},
        program={key: value for key, value in dataclasses.asdict(made).items() if key != "make_model"},
        peak_gb=peak / 1e9,
        temporary_gb=temporary / 1e9,
        usable_gb=accelerator.usable / 1e9,
        compiled_on=machine("jaxlib", "optax"),
    )


def parse_flags() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="h100", help="h100, h100x8, a100, v5e-4, ...")
    parser.add_argument("--program", default="train", choices=["train", "predict"])
    for name, default in (
        ("width", 32),
        ("edge", 64),
        ("batch", 3),
        ("space", 1),
        ("levels", 2),
        ("classes", 8),
        ("top", 10),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--level", type=int, help="of the predictor, 1 = coarsest")
    parser.add_argument("--plane", type=int, default=512, help="native voxels in plane that the predictor is made for")
    parser.add_argument("--fit", choices=["batch", "edge"], help="find the largest that fits")
    parser.add_argument("--each", action="store_true", help="list kernels, not source lines")
    parser.add_argument("--save", type=Path, help="write the compiled program's text here")
    parser.add_argument("--xla", action="append", default=[], metavar="FLAG=VALUE", help="a compiler option")
    return parser.parse_args()


def program(flags: argparse.Namespace) -> Program:
    """The program that the command line describes."""
    make_model = functools.partial(
        make_pyramid, levels=flags.levels, classes=flags.classes, width=flags.width, dtype=flags.dtype
    )
    if flags.program == "train":
        return TrainingStep(make_model, patch_size=(flags.edge,) * 3, batch_size=flags.batch, space=flags.space)
    return TilePrediction(make_model, tile=(flags.edge,) * 3, plane=flags.plane, level=flags.level)


def with_size(made: Program, what: str, size: int) -> Program:
    """A program with another batch size (`what` is "batch"), patch size or tile ("edge")."""
    if isinstance(made, TilePrediction):
        if what == "batch":
            raise UserError("--fit batch: a tile is predicted alone, without a batch; use --fit edge")
        return dataclasses.replace(made, tile=(size,) * 3)
    if what == "batch":
        return dataclasses.replace(made, batch_size=size)
    return dataclasses.replace(made, patch_size=(size,) * 3)


def fit(
    made: Program, flags: argparse.Namespace, devices: np.ndarray, usable: float, options: dict[str, bool | str]
) -> Program:
    """The program with the largest batch or edge that fits.

    Raises:
      UserError: none fits.
    """
    unit = EDGE_STEP if flags.fit == "edge" else 1

    def tried(size: int, needed: int | None) -> None:
        told = "more than there is" if needed is None else f"{needed / 1e9:.2f} GB"
        print(f"{flags.fit} {size}: {told}{'' if needed and needed <= usable else ', does not fit'}", flush=True)

    start = getattr(flags, flags.fit)
    size = largest_that_fits(
        lambda size: with_size(made, flags.fit, size),
        devices, usable, start=start, unit=unit, options=options, tried=tried,
    )  # fmt: skip
    if not size:
        raise UserError(f"--fit {flags.fit}: not even {unit} fits {flags.device} ({usable / 1e9:.1f} GB)")
    print(f"Largest {flags.fit} that fits {usable / 1e9:.1f} GB: {size}\n")
    return with_size(made, flags.fit, size)


def table(costs: Sequence[Cost], seconds: Sequence[float]) -> list[dict[str, Any]]:
    """Each kind's share, the total, the floor and what stands around it."""

    def row(name: str, kinds: Sequence[str]) -> dict[str, Any]:
        members = [number for number, cost in enumerate(costs) if cost.kind in kinds]
        return {
            "kind": name,
            "kernels": len(members),
            "GFLOP": sum(costs[number].flops for number in members) / 1e9,
            "GB": sum(costs[number].bytes for number in members) / 1e9,
            "roofline ms": sum(seconds[number] for number in members) * 1e3,
        }

    around = [kind for kind in kinds.KINDS if kind not in FLOOR]
    rows = [row(kind, [kind]) for kind in kinds.KINDS]
    rows += [
        row("total", kinds.KINDS),
        row("floor: convolutions and products alone", FLOOR),
        row("around them", around),
    ]
    for line in rows:
        line["times the floor"] = line["roofline ms"] / rows[-2]["roofline ms"]
    return rows


def offenders(
    module: hlo_text.Module, costs: Sequence[Cost], seconds: Sequence[float], *, each: bool
) -> list[dict[str, Any]]:
    """What moves bytes around the floor, most first: a row a source line and kind, or a row a kernel."""
    groups: dict[tuple[str, ...], list[int]] = collections.defaultdict(list)
    for number, cost in enumerate(costs):
        if cost.kind not in FLOOR:
            name = cost.instruction.name if each else ""
            groups[cost.kind, source_lines(module, cost), name].append(number)
    rows = []
    for (kind, source, name), members in groups.items():
        heaviest = max((costs[number] for number in members), key=lambda cost: cost.bytes).instruction
        rows.append(
            {
                "GB": sum(costs[number].bytes for number in members) / 1e9,
                "roofline ms": sum(seconds[number] for number in members) * 1e3,
                "kernels": name or len(members),
                "kind": kind,
                "source": source,
                "largest writes": " ".join(f"{a.dtype}[{','.join(map(str, a.dims))}]" for a in heaviest.outputs[:3]),
            }
        )
    return sorted(rows, key=lambda row: -row["GB"])


def source_lines(module: hlo_text.Module, cost: Cost) -> str:
    """The innermost line in this package, the line in another file that led there, and whether going backward."""
    frames = [frame for frame in module.source(cost.origin) if "autocontext_jax/" in frame[0]]
    frames = [frame for frame in frames if "/planning/" not in frame[0]]  # there the program is compiled
    if not frames:
        return cost.origin.op_name or f"the compiler's own {cost.instruction.opcode}"
    called = next((frame for frame in frames if frame[0] != frames[0][0]), None)
    places = [
        f"{Path(file).name}:{line} {function.split('.<')[0]}"
        for file, line, function in filter(None, (frames[0], called))
    ]
    return ("backward of " if "transpose(" in cost.origin.op_name else "") + " < ".join(places)


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """Markdown, as `report` prints it."""
    print(*(f"| {' | '.join(line)} |" for line in (list(rows[0]), ["---"] * len(rows[0]))), sep="\n")
    for row in rows:
        print("|", " | ".join(f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row.values()), "|")


if __name__ == "__main__":
    run(main)
