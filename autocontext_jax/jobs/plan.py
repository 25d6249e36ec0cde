"""--mode plan: from a data set to a complete configuration, with the step compiled and timed on the device at hand.

WORKDIR/plan.py      the configuration, each key with its reason; it is a config file
WORKDIR/plan.json    the same for later starts, which take it from there
"""

import dataclasses
import functools
import hashlib
import json
import logging
import math
import re
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from autocontext_jax import processes, runtime
from autocontext_jax.data.survey import LABEL_MAPS, Survey, survey
from autocontext_jax.data.survey_table import survey_table
from autocontext_jax.errors import UserError, counted
from autocontext_jax.files import read_json, write_json, write_whole
from autocontext_jax.images.spec import ImageSpec, fixed_window
from autocontext_jax.jobs.config_files import config_from_flat
from autocontext_jax.jobs.extensions import Extensions
from autocontext_jax.jobs.restore import make_model
from autocontext_jax.jobs.run_config import RunConfig
from autocontext_jax.jobs.run_folder import RunData, has_begun, read_fingerprint, write_learned
from autocontext_jax.models.convolution import multiplies_bfloat16
from autocontext_jax.planning import choices as topics
from autocontext_jax.planning.compiled import TrainingStep
from autocontext_jax.planning.grids import Geometry, plan_geometry, spatial_dims
from autocontext_jax.planning.measured import measure_step
from autocontext_jax.planning.plan import FORMAT, Choices, Plan, config_file, plan_table
from autocontext_jax.planning.step_size import SECONDS, Measured, Size, largest_size, sizes
from autocontext_jax.sections import as_dict, flat_keys
from autocontext_jax.training.targets import Targets

log = logging.getLogger(__name__)

DAY = 1440.0  # minutes that a run may take where nothing is said
TRAINED = 0.85  # share of the time that is left for training before it is known what the rest takes
SPARE = 0.5  # share of a computer's free memory that a training step may take; accelerators give all of theirs
UNPLANNED = "plan."  # keys that a plan does not list


def make_plan(config: RunConfig, workdir: Path, data: RunData, extensions: Extensions, *, runs: int = 1) -> RunConfig:
    """The configuration as planned for a data set. A plan that was made for the same is taken from the run folder.

    Args:
      config: with `plan.automatic`. Keys that differ from the defaults, and those of `plan.keep`, stay as they are.
      workdir: the run folder.
      data: of the run.
      extensions: networks and losses from outside the package.
      runs: how many share the minutes, such as the folds that are trained.

    Raises:
      UserError: a scan cannot be read; the device is too small.
    """
    given = given_keys(config)

    def plan() -> None:
        known = read_plan(workdir)
        if has_begun(workdir):
            if known is None:
                raise UserError(
                    f"--workdir {workdir} was begun without a plan; expected the configuration with which it began, or "
                    "another --workdir"
                )
            return
        found = _surveyed(config, workdir, data)
        made_from = _made_from(config, given, found, runs)
        if known is None or known.made_from != made_from:
            log.info("%s", survey_table(found))
            made = dataclasses.replace(_plan(config, data, found, extensions, given, runs), made_from=made_from)
            apply_plan(made, config)  # before it is written: what is set may contradict it
            write_plan(made, workdir)
            log.info("plan:\n%s", plan_table(made))

    processes.first_does(plan)
    made = processes.agree(lambda: read_plan(workdir))
    assert made is not None
    return apply_plan(made, config)


def given_keys(config: RunConfig) -> dict[str, Any]:
    """The keys that the user has set, with their values: they differ from the defaults, or `plan.keep` names them."""
    default = flat_keys(as_dict(RunConfig()))
    now = flat_keys(as_dict(config))
    return {key: value for key, value in now.items()
            if not key.startswith(UNPLANNED) and (value != default[key] or key in config.plan.keep)}  # fmt: skip


def apply_plan(plan: Plan, config: RunConfig) -> RunConfig:
    """The configuration with the values of a plan, but for keys that are given.

    Raises:
      UserError: a given key contradicts another, or what was planned.
    """
    given = given_keys(config)
    planned = config_from_flat(config, {key: value for key, value in plan.values.items() if key not in given})
    planned.check_sections()
    return planned


def read_plan(workdir: Path) -> Plan | None:
    """The plan of a run folder; None if it has none.

    Raises:
      UserError: `plan.json` is damaged.
    """
    path = workdir / "plan.json"
    return Plan.from_json(read_json(path, FORMAT)) if path.exists() else None


def write_plan(plan: Plan, workdir: Path) -> None:
    """Writes `plan.json` and `plan.py`."""
    write_json(workdir / "plan.json", plan.to_json())
    root = plan.given.get("data.root", "the data set")
    text = config_file(plan, title=f"Planned for {root} by `--mode plan`.", path=str(workdir / "plan.py"))
    write_whole(workdir / "plan.py", text)


def _surveyed(config: RunConfig, workdir: Path, data: RunData) -> Survey:
    """The survey of the training and validation cases, from `fingerprint.json` where it is the same still."""
    cases = [*data.training, *data.validation]
    known = read_fingerprint(config, workdir)
    if known.survey is not None and known.survey.is_of(cases, data.labels):
        return known.survey
    workers = config.data.workers or runtime.available_cpus()
    with tqdm(total=min(len(cases), LABEL_MAPS), desc="survey", unit="scan") as bar:

        def progress(name: str) -> None:
            bar.set_postfix_str(name, refresh=False)
            bar.update()

        found = survey(cases, data.labels, workers=workers, progress=progress)
    write_learned(workdir, known, survey=found)
    return found


def _made_from(config: RunConfig, given: dict[str, Any], found: Survey, runs: int) -> str:
    device = [jax.local_devices()[0].device_kind, jax.device_count()]
    content = [FORMAT, as_dict(config.plan), given, found.to_json(), device, runs]
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()


def _plan(
    config: RunConfig, data: RunData, found: Survey, extensions: Extensions, given: dict[str, Any], runs: int
) -> Plan:
    """The plan, without what it was made from."""
    choices = Choices(given)
    dtype = "bfloat16" if _multiplies_bfloat16() else "float32"
    reason = "This device multiplies it faster." if dtype == "bfloat16" else "This device does not multiply bfloat16."
    choices.choose("model.dtype", dtype, reason)

    # ---- the size of a step
    minutes = TRAINED * (config.plan.minutes or DAY) / runs / len(config.phases())
    seconds = SECONDS * math.sqrt(minutes)
    usable = _usable_bytes(config)

    @functools.cache
    def geometry(edge: int) -> Geometry:
        return plan_geometry(found, edge, given)

    def channels_and_batch(size: Size) -> tuple[int, int]:
        return given.get("model.base_channels", size.base_channels), given.get("loader.batch_size", size.batch_size)

    def cost(size: Size) -> float:
        channels, batch = channels_and_batch(size)
        return geometry(size.edge).voxels * batch * channels * (channels + 24)  # layers of few channels wait for memory

    def same(size: Size) -> object:
        made = geometry(size.edge)
        return made.patch, made.levels.factors, made.depth, *channels_and_batch(size)

    def measure(size: Size) -> Measured | None:
        trial = _with_size(Choices(given), found, size, geometry(size.edge))
        # Weights of levels do not change the time, and the sizes that are tried may have other numbers of levels.
        tried = {"model.dtype": dtype, "loss.level_weights": (), **{k: c.value for k, c in trial.made.items()}}
        planned = config_from_flat(config, tried)
        measured = measure_step(_step(planned, data, extensions), jax.local_devices()[0])
        shown = "more memory than there is" if measured is None else (
            f"{measured.seconds:.2g} s, {measured.bytes / 2**30:.2g} GiB")  # fmt: skip
        log.info("a step of %d base channels, patch %s, batch %d: %s", planned.model.base_channels,
                 planned.patch_shape, planned.loader.batch_size, shown)  # fmt: skip
        return measured

    size, measured = largest_size(
        sizes(cost, same, flat=spatial_dims(found, given) == 2), cost, measure, seconds=seconds, usable=usable
    )
    made = geometry(size.edge)
    _with_size(choices, found, size, made)
    if measured.seconds > seconds:
        log.warning(
            "even the smallest step takes %.2g s, where %.2g s would leave time for enough of them: raise "
            "plan.minutes, or take a faster device", measured.seconds, seconds,
        )  # fmt: skip

    # ---- all else
    topics.choose_flip(choices, data.labels, made)
    topics.choose_augmentation(choices, data.image, made)
    topics.choose_sampling(choices, made)
    topics.choose_loss(choices, found, made)
    topics.choose_norm(choices)
    topics.choose_optimizer(choices, channels_and_batch(size)[0])
    if config.plan.minutes:
        steps = max(1, int(60 * minutes / measured.seconds))
        topics.choose_steps(choices, steps, f"They take {minutes:.0f} minutes; timed again before training begins.")
    else:
        topics.choose_steps(choices, config.train.steps, "The default: plan.minutes sets another time.")
    steps = given.get("train.steps", choices.made["train.steps"].value if "train.steps" in choices.made else 0)
    return Plan("", choices.made, given, _needs(config, data, found, made, measured, steps))


def _multiplies_bfloat16() -> bool:
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        return multiplies_bfloat16()
    # NVIDIA's GPUs before Ampere, such as V100 (7.0) and T4 (7.5), do not.
    return re.fullmatch(r"[1-7]\.\d", str(getattr(device, "compute_capability", ""))) is None


def _with_size(choices: Choices, found: Survey, size: Size, made: Geometry) -> Choices:
    """The choices with those of the size of a step."""
    topics.choose_grids(choices, found, made)
    reason = "The largest network, patch and batch, grown together, whose step is fast enough and fits the memory."
    choices.choose("model.base_channels", size.base_channels, reason)
    devices = jax.device_count()
    shared = f", on each of {counted(devices, 'device')}" if devices > 1 else ""
    choices.choose("loader.batch_size", size.batch_size * devices, f"See model.base_channels{shared}.")
    return choices


def _usable_bytes(config: RunConfig) -> float:
    """Bytes of a device that a training step may take."""
    if config.plan.memory:
        return config.plan.memory * 2**30
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        return SPARE * runtime.free_memory() - config.data.cache_mib * 2**20
    statistics = device.memory_stats() or {}
    return float(statistics.get("bytes_limit", math.inf))


def _step(config: RunConfig, data: RunData, extensions: Extensions) -> TrainingStep:
    """The training step of a configuration, on one device."""
    grids = config.levels.with_spacing(data.fingerprint.spacing)
    config.check_patch(grids)
    network, image = extensions.network(config), _known(data.image)
    return TrainingStep(
        lambda: make_model(config, grids, data.labels, image, network),
        patch_size=config.patch_shape,
        batch_size=max(1, config.loader.batch_size // jax.device_count()),
        loss=config.phase_loss(config.phases()[-1]),
        extra_losses=extensions.extra_losses(config),
        targets=Targets(data.labels.regions, ignore=data.labels.ignore >= 0),
        deterministic=config.train.deterministic,
    )


def _known(image: ImageSpec) -> ImageSpec:
    """An image whose CT has a window, whichever: it is learned later, and the step takes as long."""
    channels = (fixed_window(each, (-500.0, 500.0)) if each.is_ct and not each.window else each
                for each in image.channels)  # fmt: skip
    return dataclasses.replace(image, channels=tuple(channels))


def _needs(
    config: RunConfig, data: RunData, found: Survey, made: Geometry, measured: Measured, steps: int
) -> tuple[str, ...]:
    """What the run takes, in lines."""
    cases = len(data.training) + len(data.validation)
    levels = made.levels.scales
    voxels = sum(math.prod(made.scan) / math.prod(scale) for scale in levels)
    bytes_a_voxel = len(data.image.channels) * data.image.dtype.itemsize + 1
    disk = cases * voxels * bytes_a_voxel / 2**30
    hours = steps * measured.seconds * len(config.phases()) / 3600
    time = f"{hours:.1f} hours" if hours >= 1.5 else f"{60 * hours:.0f} minutes"
    return (
        f"A training step takes {measured.seconds:.2g} s and {measured.bytes / 2**30:.2g} GiB of the device's memory.",
        f"Beside it the host keeps up to {config.data.cache_mib / 1024:.2g} GiB of prepared cases "
        "(data.cache_mib), and a GiB for the program and for batches.",
        f"{counted(cases, 'prepared case')} take up to {disk:.2g} GiB of disk, less as they are compressed.",
        f"{steps * len(config.phases())} training steps take {time}, and preparing and evaluation come to it.",
    )
