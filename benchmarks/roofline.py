"""Will this configuration fit that accelerator, and what will bound it there?

    python benchmarks/roofline.py --device h100 [--program train|predict] [--width 32] [--edge 64] [--batch 3]
        [--space 1] [--levels 2] [--classes 8] [--dtype bfloat16] [--fit batch|edge] [--top 10] [--each]
        [--save HLO.txt]

Compiles the real training step (`--batch` pyramid patches on each device, or on each `--space` devices that share the
depth of theirs), or the predictor's program for a tile of `--level` (the finest unless given), for an accelerator that
need not be there; its compiler must: `pip install -e '.[cuda13]'` or `'.[tpu]'`. Devices: those of targets.py, several
as h100x8 or v5e-4. `--fit` first looks for the largest batch or edge that fits, compiling for each it tries.

What is counted (all of one device): FLOPs of convolutions and matrix products, two a multiply-add; bytes to and from
the device's memory as hlo.py counts them; memory without the workspace that cuDNN's chosen algorithms may ask for.
Times are a roofline's: each kernel takes the longer of its FLOPs at the peak and its bytes at the full bandwidth. No
real device is that fast, cuDNN's 3D convolutions least of all: a time here is a bound, not a forecast.

Prints the largest offenders around the convolutions by source line (`--each`: by kernel), the memory, a table by kind,
then one JSON line.
"""

import argparse
import collections
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hlo
import jax
import jax.numpy as jnp
import numpy as np
import optax
import targets
from common import machine, make_pyramid, report, run
from flax import nnx
from jax.sharding import AxisType, Mesh, Sharding, SingleDeviceSharding

from autocontext_jax.errors import UserError
from autocontext_jax.inference.predictor import Predictor, PredictorConfig
from autocontext_jax.runtime import compiler_options
from autocontext_jax.training.losses import LossConfig
from autocontext_jax.training.sharding import batch_sharding, replicated, state_sharding
from autocontext_jax.training.state import Batch, create_state, inference_model, make_train_step

FLOOR = (hlo.FORWARD, hlo.DATA, hlo.FILTER, hlo.PRODUCT)
BOOLEANS = {"true": True, "false": False}  # XLA refuses the words
EDGE_STEP = 16  # what --fit edge grows by: patches must halve three times, and their quarter be even


def main() -> None:
    """Compiles, reads, prints."""
    flags = parse_flags()
    # Nothing here runs on a device of this machine, and without one JAX would not load the CUDA plug-in.
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
    jax.config.update("jax_platforms", "cpu")
    accelerator, count = targets.parse(flags.device)
    devices = targets.devices(flags.device)
    if flags.fit:
        fit(flags, devices, accelerator)

    compiled, elsewhere = compile_program(flags, devices)
    text = compiled.as_text()
    if flags.save:
        flags.save.write_text(text, encoding="utf-8")
    module = hlo.parse(text)
    costs = hlo.costs(module)
    seconds = [roofline_seconds(cost, accelerator, count) for cost in costs]

    found = offenders(module, costs, seconds, each=flags.each)[: flags.top]
    print_table(found)
    temporary = compiled.memory_analysis().temp_size_in_bytes
    peak = needed_bytes(compiled) + elsewhere
    print(f"\nMemory: {peak / 1e9:.2f} GB at the peak, of it {temporary / 1e9:.2f} GB temporary.", end=" ")
    print(f"{flags.device} has {accelerator.memory / 1e9:.1f} GB, JAX takes {accelerator.usable / 1e9:.1f} GB of it.\n")
    report(
        table(costs, seconds),
        offenders=found,
        flags={name: flag for name, flag in vars(flags).items() if name != "save"},
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


def compile_program(flags: argparse.Namespace, devices: np.ndarray) -> tuple[Any, int]:
    """The compiled program, and bytes that lie on the device beside it while it runs."""
    lower = {"train": lower_train_step, "predict": lower_add_tile}[flags.program]
    lowered, elsewhere = lower(flags, devices)
    # Without a device there is nothing to time kernels on.
    platform = devices.flat[0].platform
    options: dict[str, Any] = {} if platform == "tpu" else {"xla_gpu_autotune_level": "0"}
    options |= compiler_options(platform)
    options |= {name: BOOLEANS.get(value, value) for name, value in (option.split("=", 1) for option in flags.xla)}
    return lowered.compile(compiler_options=options), elsewhere


def lower_train_step(flags: argparse.Namespace, devices: np.ndarray) -> tuple[Any, int]:
    """The training step over all devices."""
    optimizer = optax.adam(1e-3)
    graphs = []

    def create():
        model = make_pyramid(levels=flags.levels, classes=flags.classes, width=flags.width, dtype=flags.dtype)
        graph, state = create_state(model, optimizer)
        graphs.append(graph)
        return state

    state = jax.eval_shape(create)
    mesh = Mesh(devices.reshape(-1, flags.space), ("data", "space"), axis_types=(AxisType.Auto,) * 2)
    shape = (flags.batch * mesh.shape["data"], *(flags.edge,) * 3)
    images, labels = jax.ShapeDtypeStruct(shape, jnp.float32), jax.ShapeDtypeStruct(shape, jnp.uint8)
    batch = Batch((images,) * flags.levels, (labels,) * flags.levels)
    whole = replicated(mesh)
    step = make_train_step(graphs[0], optimizer, LossConfig(), sharding=(state_sharding(mesh, state), whole))
    with jax.set_mesh(mesh):
        return step.lower(placed(state, whole), placed(batch, batch_sharding(mesh))), 0


def lower_add_tile(flags: argparse.Namespace, devices: np.ndarray) -> tuple[Any, int]:
    """The predictor's program for one tile, on the first device; the other levels' slabs lie beside it."""
    model = make_pyramid(levels=flags.levels, classes=flags.classes, width=flags.width, dtype=flags.dtype)
    model = inference_model(*nnx.split(model, nnx.Param, ...))
    predictor = Predictor(model, PredictorConfig(tile=flags.edge, plane=flags.plane), align=8)

    # The predictor itself says what it calls its programs with: it meets a scan, and they do nothing.
    programs = predictor._add_tile
    calls: dict[int, tuple[Any, ...]] = {}

    def recorder(level: int) -> Callable[..., Any]:
        def record(slabs, *rest):
            calls.setdefault(level, (slabs, *rest))
            return slabs

        return record

    levels = range(1, flags.levels + 1)
    predictor._add_tile = [recorder(level) for level in levels]
    factors = tuple((2.0 ** (flags.levels - level + 1),) * 3 for level in levels)
    predictor.masks(np.zeros((flags.edge, flags.plane, flags.plane), np.int16), factors)

    level = flags.level or flags.levels
    slabs = {level: sum(slab.nbytes for slab in arguments[0]) for level, arguments in calls.items()}
    arguments = placed(calls[level], SingleDeviceSharding(devices[0]))
    return programs[level - 1].lower(*arguments), sum(slabs.values()) - slabs[level]


def placed(tree: Any, sharding: Sharding) -> Any:
    """Shapes as they lie on devices."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)


def needed_bytes(compiled: Any) -> int:
    """Memory of a program: arguments, results that do not take an argument's place, temporaries, code."""
    memory = compiled.memory_analysis()
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.argument_size_in_bytes + results + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes


def fit(flags: argparse.Namespace, devices: np.ndarray, accelerator: targets.Accelerator) -> None:
    """Sets the batch or edge to the largest that fits, or ends with a line that says that none does.

    Near the device's size XLA sets about saving memory, so that the need grows only roughly with the batch: what comes
    out fits, but a step or two above it may fit too.
    """
    unit = EDGE_STEP if flags.fit == "edge" else 1

    def fits(number: int) -> bool:
        setattr(flags, flags.fit, unit * number)
        try:
            compiled, elsewhere = compile_program(flags, devices)
        except jax.errors.JaxRuntimeError as error:  # some compilers refuse what does not fit
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            needed = "more than there is"
            good = False
        else:
            size = needed_bytes(compiled) + elsewhere
            needed, good = f"{size / 1e9:.2f} GB", size <= accelerator.usable
        print(f"{flags.fit} {unit * number}: {needed}{'' if good else ', does not fit'}", flush=True)
        return good

    number = largest(fits, start=max(1, getattr(flags, flags.fit) // unit))
    if not number:
        raise UserError(f"--fit {flags.fit}: not even {unit} fits {flags.device} ({accelerator.usable / 1e9:.1f} GB)")
    setattr(flags, flags.fit, unit * number)
    print(f"Largest {flags.fit} that fits {accelerator.usable / 1e9:.1f} GB: {unit * number}\n")


def largest(fits: Callable[[int], bool], start: int) -> int:
    """The largest number that fits, 0 if not even 1 does: doubled from `start` until one does not, then bisected."""
    low, high = 0, start
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def roofline_seconds(cost: hlo.Cost, accelerator: targets.Accelerator, count: int) -> float:
    """The longest of computing, moving, and sending (in a ring each share passes all other devices twice)."""
    peak = accelerator.peak.get(cost.dtype, min(accelerator.peak.values()))
    sending = 2 * (count - 1) / count * cost.link_bytes / accelerator.link
    return max(cost.flops / peak, cost.bytes / accelerator.bandwidth, sending)


def table(costs: Sequence[hlo.Cost], seconds: Sequence[float]) -> list[dict[str, Any]]:
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

    around = [kind for kind in hlo.KINDS if kind not in FLOOR]
    rows = [row(kind, [kind]) for kind in hlo.KINDS]
    rows += [row("total", hlo.KINDS), row("floor: convolutions and products alone", FLOOR), row("around them", around)]
    for line in rows:
        line["times the floor"] = line["roofline ms"] / rows[-2]["roofline ms"]
    return rows


def offenders(
    module: hlo.Module, costs: Sequence[hlo.Cost], seconds: Sequence[float], *, each: bool
) -> list[dict[str, Any]]:
    """What moves bytes around the floor, most first: a row a source line and kind, or a row a kernel."""
    groups: dict[tuple[str, ...], list[int]] = collections.defaultdict(list)
    for number, cost in enumerate(costs):
        if cost.kind not in FLOOR:
            name = cost.instruction.name if each else ""
            groups[cost.kind, where(module, cost), name].append(number)
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


def where(module: hlo.Module, cost: hlo.Cost) -> str:
    """The innermost line in this package, the line in another file that led there, and whether going backward."""
    frames = [frame for frame in module.source(cost.origin) if "autocontext_jax/" in frame[0]]
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
