"""What every benchmark shares: the model it measures, side-by-side timing, and how results are printed."""

import ast
import contextlib
import importlib
import importlib.metadata
import json
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from flax import nnx

from autocontext_jax.data.store.level_grids import LevelGrids
from autocontext_jax.data.store.reader import PreparedCase
from autocontext_jax.errors import UserError
from autocontext_jax.models.blocks import NetworkConfig
from autocontext_jax.models.pyramid import Pyramid, PyramidConfig
from autocontext_jax.models.unet import UNet

if TYPE_CHECKING:
    from autocontext_jax.jobs.run_config import RunConfig


def make_pyramid(*, levels: int, classes: int, width: int, depth: int = 4, dtype: str = "float32") -> Pyramid:
    """The pyramid of 3D U-Nets that the jobs train, with fresh parameters."""
    network = NetworkConfig(base_channels=width, depth=depth, dtype=dtype)
    config = PyramidConfig(levels=levels, classes=classes)
    return Pyramid(config, lambda inputs, spacing, rngs: UNet(inputs, classes, network, rngs=rngs), rngs=nnx.Rngs(0))


def prepared_cases(data: str, factors: tuple[float, ...], folder: Path) -> list[PreparedCase]:
    """The cases of a prepared store; a data set's folder, or `phantoms`, is prepared in `folder` first."""
    # Here, as it needs SimpleITK, which not every machine with an accelerator has.
    from autocontext_jax.data.phantom.dataset import PhantomConfig
    from autocontext_jax.jobs.data_config import DataConfig
    from autocontext_jax.jobs.prepare import prepare
    from autocontext_jax.jobs.run_config import RunConfig

    levels = LevelGrids(tuple(map(float, factors)))
    if data == "phantoms":
        phantoms = PhantomConfig(training=4, size=(128, 192, 192), spacing=(3.0, 2.0, 2.0))
        data = prepare(RunConfig(levels=levels, phantom=phantoms), folder).store
    elif (Path(data) / "dataset.json").exists():
        data = prepare(RunConfig(levels=levels, data=DataConfig(root=data)), folder).store
    names = sorted(path.name.removesuffix(".ome.zarr") for path in Path(data).glob("*.ome.zarr"))
    return [PreparedCase.open(data, name, 2**28) for name in names]


def load_config(path: str, keys: Sequence[str]) -> "RunConfig":
    """The configuration of a config file, changed by flags of the form --config.key=value."""
    from autocontext_jax.jobs.config_files import from_config_dict

    place = Path(path).absolute()
    sys.path.insert(0, str(place.parent))
    config = importlib.import_module(place.stem).get_config()
    for key in keys:
        name, _, value = key.removeprefix("--config.").partition("=")
        with contextlib.suppress(ValueError, SyntaxError):  # a text
            value = ast.literal_eval(value)
        config.update_from_flattened_dict({name: value})
    return from_config_dict(config)


def side_by_side(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each call, taken in turn (A B A B ...) after one call each to warm up, so that noise meets all alike.

    What a call returns is waited for if it is a JAX array or holds some.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(repeats + 1):
        for name, call in calls.items():
            started = time.perf_counter()
            jax.block_until_ready(call())
            if number:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def median_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """How many times as fast ours is: the median over rounds of theirs / ours."""
    return float(np.median(np.divide(theirs, ours)))


def peak_gb() -> float:
    """Largest resident memory of this process so far, GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def machine(*packages: str) -> dict[str, str]:
    """What the numbers were measured on: processor, device, versions of Python, JAX and the given packages."""
    names = ("jax", "flax", *packages)
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    processor = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return {
        "processor": f"{processor or platform.processor()}, {len(os.sched_getaffinity(0))} cores",
        "device": jax.devices()[0].device_kind,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in names},
    }


def report(rows: Sequence[dict[str, Any]], **about: Any) -> None:
    """Prints rows as a Markdown table (columns are the first row's keys), then everything as one line of JSON."""
    columns = list(rows[0])
    print("| " + " | ".join(columns) + " |")
    print("|" + " --- |" * len(columns))
    for row in rows:
        print("| " + " | ".join(_cell(row.get(column, "")) for column in columns) + " |")
    print(json.dumps({**about, "rows": list(rows)}))


def run(main: Callable[[], None]) -> None:
    """Runs a script whose user may be mistaken: as the package does, in one line and status 2."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
