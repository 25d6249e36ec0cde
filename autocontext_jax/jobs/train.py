"""--mode train: from the prepared data set to checkpoints."""

import collections
import contextlib
import dataclasses
import logging
import math
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict
from tqdm import tqdm

from autocontext_jax import processes
from autocontext_jax.data.pipeline import Feed, read_batch
from autocontext_jax.data.sampling import draw_entry
from autocontext_jax.data.store.reader import PreparedCase
from autocontext_jax.errors import UserError
from autocontext_jax.evaluation import pictures
from autocontext_jax.jobs import config as configuration
from autocontext_jax.jobs.prepare import Data
from autocontext_jax.jobs.restore import make_model
from autocontext_jax.training.checkpoints import Checkpoints
from autocontext_jax.training.dice import class_dice, mean_dice
from autocontext_jax.training.logging import MetricsLog
from autocontext_jax.training.optimizers import OptimizerConfig, make_optimizer
from autocontext_jax.training.phases import Phase
from autocontext_jax.training.sharding import batch_sharding, make_mesh, place, replicated, state_sharding
from autocontext_jax.training.state import (
    Batch,
    Metrics,
    TrainState,
    create_state,
    inference_model,
    make_train_step,
    make_validation_step,
)

log = logging.getLogger(__name__)

# Steps that may be under way on the device while the host prepares the next: enough that it never waits.
IN_FLIGHT = 2


def train(config: ConfigDict, workdir: Path, data: Data) -> bool:
    """Trains to the end, going on from the work directory's newest checkpoint.

    Returns:
      False if a signal (SIGTERM, Ctrl-C) ended it early; what was done is saved.

    Raises:
      UserError: the checkpoint belongs to another configuration; the loss is not finite.
    """
    # Closed on every way out: orbax's threads else complain at exit, after the user's one clear line.
    with contextlib.closing(Checkpoints(workdir / "checkpoints", keep=config.train.keep)) as checkpoints:
        return _train(config, workdir, data, checkpoints)


def _train(config: ConfigDict, workdir: Path, data: Data, checkpoints: Checkpoints) -> bool:
    # ---- the configuration, as resolved
    config.data.labels = data.dataset.labels
    checkpoints.set_damaged_aside()
    saved = configuration.read_config(workdir)
    if saved is not None and checkpoints.latest is not None:
        configuration.check_same_run(config, saved, workdir)
    if processes.is_first():
        configuration.write_config(config, workdir)
    phases = configuration.training_phases(config)
    if (checkpoints.latest or 0) >= len(phases) * config.train.steps:
        log.info("trained already: step %d of %d", checkpoints.latest, len(phases) * config.train.steps)
        return True
    mesh = training_mesh(config)

    # ---- phases: each begins with what the one before saved last
    with contextlib.closing(_StopSignal()) as stop, jax.set_mesh(mesh):
        return all(
            _train_phase(config, workdir, data, checkpoints, mesh, number, phase, stop)
            for number, phase in enumerate(phases)
            if (checkpoints.latest or 0) < (number + 1) * config.train.steps
        )


def _train_phase(
    config: ConfigDict,
    workdir: Path,
    data: Data,
    checkpoints: Checkpoints,
    mesh: Mesh,
    number: int,
    phase: Phase,
    stop: "_StopSignal",
) -> bool:
    """Trains phase `number` (from 0), from its newest checkpoint or the end of the phase before; False if stopped."""
    start, end = number * config.train.steps, (number + 1) * config.train.steps
    first = checkpoints.latest or 0

    # ---- data
    cache_bytes = config.data.cache_mib * 2**20 // (len(data.training) + len(data.validation))
    training, validation = (
        [PreparedCase.open(data.store, case.name, cache_bytes) for case in cases]
        for cases in (data.training, data.validation)
    )
    exact = {"deterministic": config.train.deterministic}
    feed = Feed(training, configuration.feed(config, phase), seed=config.seed, sharding=batch_sharding(mesh), **exact)
    held_out = validation_batches(validation, config, phase)

    # ---- model, optimiser, steps
    classes, organs = len(data.dataset.labels), data.dataset.labels[1:]
    ladder = configuration.model_levels(config)
    learning = [ladder.index(level) for level in phase.learning]
    optimizer = make_optimizer(configuration.dataclass_of(OptimizerConfig, config.optimizer), config.train.steps)
    loss = configuration.loss(config, phase)
    model = nnx.eval_shape(lambda: make_model(config, classes))
    graph, _ = create_state(model, optimizer, learning)
    frozen_graph = nnx.graphdef(inference_model(*nnx.split(model, nnx.Param, ...)))

    def create() -> TrainState:
        return create_state(make_model(config, classes), optimizer, learning)[1]

    everywhere = replicated(mesh)
    placement = state_sharding(mesh, jax.eval_shape(create), split_optimizer=config.mesh.split_optimizer)
    fresh = jax.jit(create, out_shardings=placement)
    train_step = make_train_step(graph, optimizer, loss, learning, (placement, everywhere), **exact)
    frozen_norm_step = make_train_step(frozen_graph, optimizer, loss, learning, (placement, everywhere), **exact)
    frozen_norm_after = end - round(config.train.frozen_norm * config.train.steps)
    validation_step = make_validation_step(graph, loss, everywhere, **exact)

    # ---- restore
    if first > start:
        state, position = checkpoints.restore(first, jax.eval_shape(fresh))
        feed.set_state(position)
    else:
        state = fresh()
        if first:
            params, statistics = checkpoints.restore_weights(first, state.params, state.statistics)
            state = state.replace(
                step=place(np.array(first, np.int32), everywhere), params=params, statistics=statistics
            )
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    log.info(
        "%d training and %d validation cases, %d parameters, %d %s device(s), from step %d",
        len(training), len(validation), parameters, mesh.size, jax.default_backend(), first,
    )  # fmt: skip

    # ---- loop
    metrics_log = MetricsLog(workdir, step=first) if processes.is_first() else None
    in_flight: collections.deque[tuple[int, Metrics]] = collections.deque()
    skipped = 0
    waiting: tuple[int, Metrics, float] | None = None  # a logged step whose numbers are still on the device
    since, since_step = time.monotonic(), first
    bar = tqdm(initial=first, total=end, desc="train", unit="step", mininterval=1, disable=not processes.is_first())

    def write(row: tuple[int, Metrics, float], validated: dict[str, float]) -> None:
        step, metrics, speed = row
        metrics = jax.device_get(metrics)
        values = _values(metrics, phase.levels) | {"gradient_norm": float(metrics.gradient_norm)}
        if skipped:
            values["skipped_steps"] = skipped
        if metrics_log is not None:
            metrics_log.scalars(step, {**values, "pairs_per_second": speed, **validated})
        shown = {key: f"{value:.3f}" for key, value in values.items() if key == "loss" or key.startswith("dice")}
        bar.set_postfix({**shown, "pairs/s": f"{speed:.1f}"}, refresh=False)

    def finish(step: int, metrics: Metrics) -> None:
        """Waits for a step and looks whether it was finite; if not, it changed nothing (`make_train_step`)."""
        nonlocal skipped
        found, norm = jax.device_get((metrics.loss, metrics.gradient_norm))
        if math.isfinite(found) and math.isfinite(norm):
            return
        cases = ", ".join(feed.cases_of(step - start - 1))
        what = f"step {step} of cases {cases} has loss {found} and a gradient of norm {norm}"
        if config.train.non_finite == "stop":
            raise UserError(
                f"{what}; wanted finite numbers: look at these scans, lower optimizer.learning_rate or set "
                "optimizer.clip and start in another --workdir, or go on without such steps, "
                "--config.train.non_finite=skip"
            )
        skipped += 1
        log.warning("%s: skipped, %d so far", what, skipped)

    try:
        for step in range(first + 1, end + 1):
            images, labels = next(feed)
            take_step = frozen_norm_step if step > frozen_norm_after else train_step
            state, metrics = take_step(state, Batch(images, labels))
            in_flight.append((step, metrics))
            stopping = stop.requested(step)  # read once: a signal between here and the break must not skip the save
            checkpoint = stopping or step == end or step % config.train.checkpoint_every == 0
            while len(in_flight) > (0 if checkpoint else IN_FLIGHT):
                finish(*in_flight.popleft())
            bar.update()

            if step % config.train.log_every == 0 or checkpoint:
                if waiting is not None:
                    write(waiting, {})
                now = time.monotonic()
                speed = config.feed.batch * (step - since_step) / (now - since)
                waiting, since, since_step = (step, metrics, speed), now, step
            if checkpoint and waiting is not None:
                validated: dict[str, float] = {}
                if held_out and not stopping:
                    validated, picture = validate(
                        validation_step, state, held_out, batch_sharding(mesh), phase.levels, organs
                    )
                    if metrics_log is not None:
                        metrics_log.image(step, "validation", picture)
                write(waiting, validated)
                waiting = None
                # None before the last phase: the finest level is what the best is chosen by.
                finest = validated.get(f"validation_dice_level_{ladder[-1]}")
                # The feed stands before the next batch: state and position belong together.
                checkpoints.save(step, state, feed.get_state(), dice=finest)
                since = time.monotonic()  # validation is not training speed
            if stopping:
                log.info("stopped by a signal at step %d, saved; the same command goes on from there", step)
                return False
    finally:
        bar.close()
        feed.close()
        if metrics_log is not None:
            metrics_log.close()
    return True


def training_mesh(config: ConfigDict) -> Mesh:
    """The devices that a run works on.

    Raises:
      UserError: fewer devices than `mesh.space`; several processes of which some would have nothing to do.
    """
    devices, batch, space = jax.device_count(), config.feed.batch, config.mesh.space
    try:
        mesh = make_mesh(batch, space)
    except ValueError as error:
        raise UserError(f"config key mesh.{error}") from None
    if mesh.size == devices:
        return mesh
    advice = f"config keys feed.batch {batch} and mesh.space {space} let {mesh.size} of {devices} devices work"
    wanted = f"choose a multiple of {max(1, devices // space)} for feed.batch to use all"
    if jax.process_count() > 1:
        raise UserError(f"{advice}, and every process must: {wanted}")
    log.warning("%s: %s", advice, wanted)
    return mesh


def validation_batches(cases: Sequence[PreparedCase], config: ConfigDict, phase: Phase) -> list[dict[str, Any]]:
    """Fixed patches of held-out cases, as `pipeline.read_batch` gives them; the organs are drawn equally often."""
    if not cases:
        return []
    rng = np.random.default_rng([config.seed, 1])
    batch = config.feed.batch
    count = -(-config.train.validation_patches // batch) * batch
    centres = []
    for number in range(count):
        case = cases[number % len(cases)]
        centres.append((case, case.foreground_voxel(draw_entry(case.foreground_offsets, rng, centre="classes"))))
    ladder = range(1, len(config.levels.factors) + 1)
    margins = tuple((0, 0, 0) if level in phase.levels else None for level in ladder)
    batches = [centres[start : start + batch] for start in range(0, count, batch)]
    return [read_batch(some, config.feed.edge, margins, config.levels.rank) for some in batches]


def validate(
    step, state, batches: Sequence[dict[str, Any]], sharding, levels: Sequence[int], organs: Sequence[str]
) -> tuple[dict[str, float], np.ndarray]:
    """Loss, Dice and each organ's Dice over all held-out patches, and a picture of the first: a row a level."""
    results = []
    for batch in batches:
        images, labels = (tuple(place(array, sharding) for array in batch[key]) for key in ("images", "labels"))
        results.append(step(state, Batch(images, labels)))
    metrics, slices = zip(*jax.device_get(results), strict=True)
    total = Metrics(
        np.mean([m.loss for m in metrics]),
        np.mean([m.losses for m in metrics], axis=0),
        np.sum([m.counts for m in metrics], axis=0),
        jnp.zeros(()),
    )
    middle = batches[0]["images"][0].shape[1] // 2
    rows = []
    for image, truth, predicted in zip(batches[0]["images"], batches[0]["labels"], slices[0], strict=True):
        masks = (np.zeros_like(predicted[0]), truth[0, middle], predicted[0])
        rows.append(pictures.side_by_side([pictures.overlay(image[0, middle], mask) for mask in masks]))
    values = _values(total, levels)
    for level, dice in zip(levels, class_dice(total.counts), strict=True):
        values |= {f"dice_level_{level}_{organ}": float(score) for organ, score in zip(organs, dice, strict=True)}
    finite = {f"validation_{key}": value for key, value in values.items() if math.isfinite(value)}
    return finite, np.concatenate(rows)


def _values(metrics: Metrics, levels: Sequence[int]) -> dict[str, float]:
    """Metrics on the host as named numbers."""
    values = {"loss": float(metrics.loss)}
    for level, loss, dice in zip(levels, metrics.losses, mean_dice(metrics.counts), strict=True):
        values[f"loss_level_{level}"] = float(loss)
        if np.isfinite(dice):  # no organ in prediction or truth: no Dice
            values[f"dice_level_{level}"] = float(dice)
    return values


@dataclasses.dataclass
class _StopSignal:
    """Turns SIGTERM and Ctrl-C into a request, answered after the step in hand; a second one ends at once."""

    received: bool = False

    def __post_init__(self):
        # Of several processes JAX itself hears the SIGTERM of any, and all agree on the step to stop after.
        self._before = {}
        if jax.process_count() > 1:
            return
        self._before = {number: signal.signal(number, self._request) for number in (signal.SIGTERM, signal.SIGINT)}

    def _request(self, number, frame):
        del number, frame
        self.received = True
        self.close()

    def requested(self, step: int) -> bool:
        """Whether to stop after this step; the processes ask at each step together."""
        return self.received if jax.process_count() == 1 else multihost_utils.reached_preemption_sync_point(step)

    def close(self) -> None:
        """Puts the handlers back that were there before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
