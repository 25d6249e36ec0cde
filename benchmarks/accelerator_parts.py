"""Parts 1 to 6 of accelerator.py, run one after the other in a process that accelerator.py starts and may stop.

A line that begins with `@@` tells of a part's begin, end or failure; a line of JSON goes to results.jsonl; every other
line belongs to the tables.
"""

import argparse
import functools
import importlib.metadata
import importlib.util
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from accelerator import MARK, box_seconds, numbers
from accelerator_checks import MODELS, against_the_cpu, price_of_determinism, repeatability
from accelerator_session import SMALL, Session, Sizes, memory, nvidia_driver, table
from common import machine, make_pyramid, median_ratio
from flax import nnx
from kernel_times import Profile, profiled
from roofline import source_lines
from training_program import TrainingProgram, in_turn, wait_for

from autocontext_jax.data.augmentation_ranges import SpatialRanges
from autocontext_jax.data.labels import LabelSpec
from autocontext_jax.data.loader import Loader, LoaderConfig
from autocontext_jax.data.phantom.anatomy import ORGANS
from autocontext_jax.data.phantom.painting import make_phantom
from autocontext_jax.data.store.level_grids import LevelGrids
from autocontext_jax.data.store.reader import PreparedCase
from autocontext_jax.data.store.writer import write_case
from autocontext_jax.geometry import cube
from autocontext_jax.inference.predictor import Predictor
from autocontext_jax.inference.tiling import PredictorConfig
from autocontext_jax.planning import hlo_text
from autocontext_jax.planning.compiled import needed_bytes
from autocontext_jax.planning.costs import ELEMENTWISE, KINDS, LAYOUT, PRODUCT, instruction_costs, roofline_seconds
from autocontext_jax.runtime import disable_asynchronous_dispatch
from autocontext_jax.training.sharding import batch_sharding, make_mesh
from autocontext_jax.training.state import Batch, inference_model


def main() -> None:
    """Runs the parts that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--parts", type=numbers, required=True)
    parser.add_argument("--all-parts", type=numbers, required=True, help="share the minutes")
    parser.add_argument("--end", type=float, required=True, help="of all parts, as time.time() gives it")
    parser.add_argument("--small", action="store_true")
    flags = parser.parse_args()
    disable_asynchronous_dispatch()
    if jax.default_backend() != "cpu":
        jax.config.update("jax_compilation_cache_dir", str(flags.output.absolute() / "cache"))
    session = Session(SMALL if flags.small else Sizes(), flags.output, flags.small)
    for part in flags.parts:
        print(f"{MARK} begin {part}")
        stop = time.time() + box_seconds(part, flags.all_parts, flags.end)
        session.seconds_left = functools.partial(lambda stop: stop - time.time(), stop)
        try:
            PARTS[part](session)
        except Exception as error:  # whatever it is: the next part shall run
            traceback.print_exc()
            print(f"{MARK} fail {part} {type(error).__name__}: {' '.join(str(error).split())[:500]}")
        else:
            print(f"{MARK} end {part}")


def what_it_is(session: Session) -> None:
    """Part 1."""
    device, sizes = jax.devices()[0], session.sizes
    about = machine("jaxlib", "optax", "numpy") | {
        "platform": f"{jax.default_backend()}, {jax.device_count()} device(s)",
        "runtime": " ".join(device.client.platform_version.split())[:200],
        "driver": nvidia_driver(),
        "PyTorch": importlib.metadata.version("torch") if importlib.util.find_spec("torch") else "not installed",
        "memory": f"{memory('bytes_limit') / 1e9:.1f} GB that JAX may take",
    }
    table("Device", ({"what": name, "value": value} for name, value in about.items()))

    def rates() -> Iterable[dict[str, Any]]:
        for name, dtype, precision in (
            ("bf16", jnp.bfloat16, None), ("f32", jnp.float32, None), ("f32, highest precision", jnp.float32, "highest")
        ):  # fmt: skip
            matrix = jnp.ones((sizes.matrix, sizes.matrix), dtype)
            multiply = jax.jit(functools.partial(jnp.matmul, precision=precision))
            (seconds,) = in_turn({"": lambda: multiply(matrix, matrix)}, steps=5, lead_in=0, rounds=3).values()  # noqa: B023
            session.rates[name] = 2 * sizes.matrix**3 / float(np.median(seconds))
            yield {
                "what": f"product of {sizes.matrix}² matrices, {name}",
                "rate": session.rates[name] / 1e12,
                "unit": "TFLOP/s",
            }
        vector = jnp.ones(sizes.vector, jnp.float32)
        copy = jax.jit(lambda vector: vector + 1)
        (seconds,) = in_turn({"": lambda: copy(vector)}, steps=5, lead_in=0, rounds=3).values()
        session.rates["copy"] = 8 * sizes.vector / float(np.median(seconds))
        yield {"what": "copy on the device, read and written", "rate": session.rates["copy"] / 1e9, "unit": "GB/s"}

    table("Measured rates", rates())


def is_it_right(session: Session) -> None:
    """Part 2."""
    for name, kind in MODELS.items():
        table(f"Against the CPU: {name}", iter(against_the_cpu(kind, **session.sizes.check)))
    batch = session.sizes.batch

    def rows() -> Iterable[dict[str, Any]]:
        for name, deterministic in (("default", False), ("deterministic", True)):
            program = session.program("bfloat16", batch, deterministic=deterministic)
            folder = session.folder / f"checkpoints_{name}_{time.time_ns()}"
            yield repeatability(name, program, folder) | {"compile s": program.compile_seconds}

    table("Ten steps: saved, restored, repeated", rows())
    programs = [session.program("bfloat16", batch, deterministic=choice) for choice in (True, False)]
    table("The price of determinism", [price_of_determinism(*programs, steps=session.sizes.steps)])
    session.programs.pop(("bfloat16", batch, True), None)  # and its memory


def how_fast(session: Session) -> None:
    """Part 3."""
    sizes = session.sizes
    measured: list[tuple[str, int]] = []

    def rows() -> Iterable[dict[str, Any]]:
        first = session.program("bfloat16", sizes.batch)
        yield speed(session, first, "bfloat16", sizes.batch)
        measured.append(("bfloat16", sizes.batch))
        larger = largest_that_fits(session, first)
        # The larger batch last: the peak of memory only grows.
        for dtype, batch in [("float32", sizes.batch)] + ([("bfloat16", larger)] if larger else []):
            # Compilation tries cuDNN's algorithms, which takes longer for a larger batch.
            if session.seconds_left() < first.compile_seconds * batch / sizes.batch + 10:
                print(f"No time left to compile {dtype} at batch {batch}.")
                continue
            yield speed(session, session.program(dtype, batch), dtype, batch)
            measured.append((dtype, batch))

    table("The training step", rows())
    if importlib.util.find_spec("torch"):
        table("Beside PyTorch", (beside_pytorch(session, dtype, batch) for dtype, batch in measured))
    for dtype, batch in measured[1:]:
        del session.programs[dtype, batch, False]


def speed(session: Session, program: TrainingProgram, dtype: str, batch: int) -> dict[str, Any]:
    """One row: our step."""
    (seconds,) = in_turn({"": program.step}, steps=session.sizes.steps, lead_in=1, rounds=3).values()
    median = float(np.median(seconds))
    rate = session.rates.get({"bfloat16": "bf16", "float32": "f32"}[dtype])
    needed = needed_bytes(program.compiled)
    return {
        "type": "TF32 or float32" if dtype == "float32" else dtype,
        "batch": batch,
        "ms a step": 1e3 * median,
        "patches/s": batch / median,
        "TFLOP/s": program.flops / median / 1e12,
        "of the matrix rate": program.flops / median / rate if rate else "not measured",
        "compile s": program.compile_seconds,
        "GB predicted": needed / 1e9,
        "GB measured, peak": memory("peak_bytes_in_use") / 1e9,
        "GB between steps": memory("bytes_in_use") / 1e9,
    }


def beside_pytorch(session: Session, dtype: str, batch: int) -> dict[str, Any]:
    """One row: our step and PyTorch's, in turn."""
    from torch_pyramid import training_and_prediction

    program = session.program(dtype, batch)
    arguments = program.pyramid, program.images, program.labels, dtype
    theirs = training_and_prediction(*arguments, layouts=["NDHWC"])["train"]["NDHWC"]
    begun = time.perf_counter()
    wait_for(theirs())
    first = time.perf_counter() - begun
    seconds = in_turn({"ours": program.step, "PyTorch": theirs}, steps=session.sizes.steps, lead_in=1, rounds=3)
    return (
        {"type": dtype, "batch": batch, "PyTorch's first step, s": first}
        | {f"{name}, ms": 1e3 * float(np.median(times)) for name, times in seconds.items()}
        | {"times as fast": median_ratio(seconds["ours"], seconds["PyTorch"])}
    )


def largest_that_fits(session: Session, program: TrainingProgram) -> int | None:
    """The largest batch whose memory, estimated from the small batch's measured peak, fits the device."""
    limit = memory("bytes_limit")
    if np.isnan(limit):
        return session.sizes.batches[0]
    needed = max(memory("peak_bytes_in_use"), needed_bytes(program.compiled)) / session.sizes.batch
    return next((batch for batch in session.sizes.batches if batch * needed < 0.9 * limit), None)


def where_the_time_goes(session: Session) -> None:
    """Part 4."""
    program, steps = session.program("bfloat16", session.sizes.batch), 3
    jax.block_until_ready(program.step())
    with profiled(session.folder / "trace") as profile:
        jax.block_until_ready([program.step() for _ in range(steps)])
    text = program.compiled.as_text()
    (session.folder / "step.hlo.txt").write_text(text, encoding="utf-8")
    module = hlo_text.parse(text)
    costs = instruction_costs(module)
    accelerator = session.accelerator()
    bounds = [roofline_seconds(cost, accelerator, 1) for cost in costs]
    times = {name: time / steps for name, time in profile.instructions.items()}

    def longest() -> Iterable[dict[str, Any]]:
        pairs = sorted(zip(costs, bounds, strict=True), key=lambda pair: -times.get(pair[0].instruction.name, 0.0))
        for cost, bound in pairs[:20]:
            measured = times.get(cost.instruction.name, 0.0) / 1e6
            yield {
                "ms a step": measured,
                "roofline ms": 1e3 * bound,
                "instruction": cost.instruction.name,
                "kind": cost.kind,
                "source": source_lines(module, cost),
                "writes": " ".join(f"{a.dtype}[{','.join(map(str, a.dims))}]" for a in cost.instruction.outputs[:2]),
            }

    def kinds() -> Iterable[dict[str, Any]]:
        for kind in KINDS:
            members = [(cost, bound) for cost, bound in zip(costs, bounds, strict=True) if cost.kind == kind]
            if members:
                measured = sum(times.get(cost.instruction.name, 0.0) for cost, _ in members)
                measured += sum(time for name, time in profile.unnamed.items() if kernel_kind(name) == kind) / steps
                bound = 1e3 * sum(bound for _, bound in members)
                yield {"kind": kind, "kernels": len(members), "ms a step": measured / 1e6, "roofline ms": bound}
        named = {cost.instruction.name for cost in costs}
        other = sum(time for name, time in times.items() if name not in named) / 1e6
        yield {"kind": "other instructions", "kernels": "", "ms a step": other, "roofline ms": ""}

    table("Kernels' time by kind", kinds())
    table("The twenty longest kernels", longest())
    print_profile(profile, steps)


def kernel_kind(name: str) -> str:
    """The kind of a kernel that only its name tells of: convolutions, which cuDNN runs, are never among these."""
    if "gemm" in name or name.startswith(("nvjet", "cublas", "cutlass")):
        return PRODUCT
    return LAYOUT if name.startswith(("wrapped_copy", "wrapped_transpose", "Memset", "Memcpy")) else ELEMENTWISE


def does_the_loader_keep_up(session: Session) -> None:
    """Part 5."""
    sizes, store = session.sizes, str(session.folder / f"store_{time.time_ns()}")
    count, size, spacing = sizes.phantoms
    cases = []
    for number in range(count):
        voxels, label = make_phantom(np.random.default_rng([0, number]), size=size, spacing=spacing)
        write_case(
            store,
            f"phantom_{number}",
            voxels[None],
            label,
            spacing,
            LevelGrids((2.0, 1.0)),
            LabelSpec.plain(("background", *ORGANS)),
        )
        cases.append(PreparedCase.open(store, f"phantom_{number}", 2**28))
    program = session.program("bfloat16", sizes.batch)
    config = LoaderConfig(batch_size=sizes.batch, patch_size=(sizes.edge,))
    sharding = batch_sharding(make_mesh(sizes.batch))
    loader = Loader(cases, config, cube(sizes.edge, 2), seed=0, sharding=sharding, spatial=SpatialRanges())
    batches = iter(loader)
    calls = {"synthetic": program.step, "fed": lambda: program.step(Batch(*next(batches)))}
    seconds = in_turn(calls, steps=2 * sizes.steps, lead_in=config.prefetch, rounds=3)
    loader.close()
    rates = {name: sizes.batch / float(np.median(times)) for name, times in seconds.items()}
    row = {f"patches/s, {name}": rate for name, rate in rates.items()}
    table("Fed by the loader", [row | {"fed over synthetic": 1 / median_ratio(seconds["synthetic"], seconds["fed"])}])


def whole_scans(session: Session) -> None:
    """Part 6."""
    sizes, levels = session.sizes, 2
    pyramid = make_pyramid(
        levels=levels, classes=len(ORGANS) + 1, width=sizes.width, depth=sizes.depth, dtype="bfloat16"
    )
    model = inference_model(*nnx.split(pyramid, nnx.Param, ...))
    predictor = Predictor(model, PredictorConfig(sizes.tile), align=(2 ** (sizes.depth - 1),) * 3)
    factors = tuple((2.0 ** (levels - level),) * 3 for level in range(levels))
    rng = np.random.default_rng(0)
    voxels = rng.integers(-500, 500, (1, *sizes.scan), dtype=np.int16)
    begun = time.perf_counter()
    predictor.masks(voxels[:, :8], factors)
    first = time.perf_counter() - begun
    begun = time.perf_counter()
    mask = predictor.masks(voxels, factors)[levels]
    seconds = time.perf_counter() - begun
    assert mask.shape == sizes.scan
    row = {"scan": "x".join(map(str, sizes.scan)), "s": seconds, "first scan s": first}
    table(
        "A whole scan",
        [row | {"device GB, peak": memory("peak_bytes_in_use") / 1e9, "compiled programs": predictor.compilations()}],
    )
    with profiled(session.folder / "trace_scan") as profile:
        predictor.masks(voxels, factors)
    print_profile(profile, 1)


def print_profile(profile: Profile, runs: int) -> None:
    """How busy the device was, and what went to it and came from it."""
    print(f"\nBusy {100 * profile.busy / max(profile.span, 1.0):.1f} % of {profile.span / 1e6 / runs:.2f} ms.")
    for direction, (count, nanoseconds) in profile.copies.items():
        print(f"Copies {direction}: {count / runs:.0f}, {nanoseconds / 1e6 / runs:.3f} ms.")


PARTS: dict[int, Callable[[Session], None]] = {
    1: what_it_is,
    2: is_it_right,
    3: how_fast,
    4: where_the_time_goes,
    5: does_the_loader_keep_up,
    6: whole_scans,
}

if __name__ == "__main__":
    main()
