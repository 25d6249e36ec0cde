"""--mode train: from the prepared data set to checkpoints."""

import collections
import contextlib
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from tqdm import tqdm

from autocontext_jax import processes
from autocontext_jax.data.augmentation_ranges import AugmentationConfig
from autocontext_jax.data.labels import LabelSpec
from autocontext_jax.data.loader import Loader
from autocontext_jax.data.store.reader import PreparedCase
from autocontext_jax.errors import UserError, some
from autocontext_jax.evaluation import pictures
from autocontext_jax.jobs.config_files import check_same_run, read_config, write_config
from autocontext_jax.jobs.evaluations import remove_evaluations
from autocontext_jax.jobs.extensions import NO_EXTENSIONS, Extensions
from autocontext_jax.jobs.restore import make_model
from autocontext_jax.jobs.run_config import RunConfig
from autocontext_jax.jobs.run_folder import RunData
from autocontext_jax.jobs.signals import StopSignal
from autocontext_jax.planning.laterality import find_laterality
from autocontext_jax.training.checkpoints import Checkpoints
from autocontext_jax.training.logging import MetricsLog, StepLog
from autocontext_jax.training.optimizers import learning_rate, make_optimizer
from autocontext_jax.training.phases import Phase
from autocontext_jax.training.sharding import batch_sharding, make_mesh, place, replicated, state_sharding
from autocontext_jax.training.state import (
    Batch,
    Metrics,
    TrainState,
    create_state,
    freeze_batch_stats,
    make_train_step,
    make_validation_step,
)
from autocontext_jax.training.targets import Targets
from autocontext_jax.training.validation import validate, validation_batches

log = logging.getLogger(__name__)

# Steps that may be under way on the device while the host prepares the next: enough that it never waits.
IN_FLIGHT = 2


def train(config: RunConfig, workdir: Path, data: RunData, extensions: Extensions = NO_EXTENSIONS) -> bool:
    """Trains to the end, going on from the run folder's newest checkpoint.

    Returns:
      False if a signal (SIGTERM, Ctrl-C) ended it early; what was done is saved.

    Raises:
      UserError: the checkpoint belongs to another configuration; the loss is not finite.
    """
    # Closed on every way out: otherwise orbax's threads complain at exit, after the user's one clear line.
    with contextlib.closing(Checkpoints(workdir / "checkpoints", keep=config.train.keep)) as checkpoints:
        return _train(config, workdir, data, extensions, checkpoints)


def _train(config: RunConfig, workdir: Path, data: RunData, extensions: Extensions, checkpoints: Checkpoints) -> bool:
    # ---- is it the same run?
    checkpoints.set_damaged_aside()
    saved = processes.agree(lambda: read_config(workdir))
    done = checkpoints.latest or 0
    if saved is not None and done:
        check_same_run(config, saved, workdir)
        if changed := _changed_schedule(config, saved, done):
            log.warning("%s", changed)
    if not done:
        processes.first_does(lambda: remove_evaluations(config, workdir))
    processes.first_does(lambda: write_config(config, workdir))
    phases = config.phases()
    if done >= config.last_step:
        log.info("trained already: step %d of %d", done, config.last_step)
        return True
    warn_of_sides(config.augmentation, data.classes[1:])
    mesh = training_mesh(config)

    # ---- phases: each begins with what the one before saved last
    with contextlib.closing(StopSignal()) as stop, jax.set_mesh(mesh):
        return all(
            _train_phase(config, workdir, data, extensions, checkpoints, mesh, number, phase, stop)
            for number, phase in enumerate(phases)
            if (checkpoints.latest or 0) < (number + 1) * config.train.steps
        )


def warn_of_sides(augmentation: AugmentationConfig, classes: Sequence[str]) -> None:
    """Warns where left and right are exchanged in patches, but not the names of classes that have a side.

    Args:
      augmentation: of the run.
      classes: names, without the background.
    """
    if "x" not in augmentation.flip:
        return
    exchanged = {name for pair in augmentation.flip_pairs for name in pair.split("=")}
    sides = find_laterality(classes)
    named = [name for pair in sides.pairs for name in pair.split("=")] + list(sides.unpaired)
    if forgotten := [name for name in named if name not in exchanged]:
        log.warning(
            "augmentation.flip exchanges left and right, and by their names these classes have a side that does not "
            "change with it: %s: pair them in augmentation.flip_pairs, or leave x out", some(forgotten),
        )  # fmt: skip


def _train_phase(
    config: RunConfig,
    workdir: Path,
    data: RunData,
    extensions: Extensions,
    checkpoints: Checkpoints,
    mesh: Mesh,
    number: int,
    phase: Phase,
    stop: StopSignal,
) -> bool:
    """Trains phase `number` (from 0), from its newest checkpoint or the end of the phase before; False if stopped."""
    start, end = number * config.train.steps, (number + 1) * config.train.steps
    first = checkpoints.latest or 0
    sharding, everywhere = batch_sharding(mesh), replicated(mesh)

    # ---- data
    cache = config.data.cache_mib * 2**20
    training, validation = processes.agree(
        lambda: tuple(
            [PreparedCase.open(data.store, case.name, cache) for case in cases]
            for cases in (data.training, data.validation)
        )
    )
    if (
        data.image.dtype != np.int16
        and data.image.ct
        and (config.augmentation.noise or config.augmentation.intensity_shift)
    ):
        raise UserError(
            "config keys augmentation.noise and augmentation.intensity_shift are "
            f"{config.augmentation.noise:g} and {config.augmentation.intensity_shift:g}; expected 0, as the channels "
            f"{data.image.names} are stored in different units, HU of CT and normalised values of the others"
        )
    grids = config.levels.with_spacing(data.fingerprint.spacing)
    patch = grids.patch(config.patch_shape)
    loader = Loader(
        training,
        config.loader,
        patch,
        seed=config.seed,
        sharding=sharding,
        spatial=config.augmentation.spatial(data.labels),
        intensity=config.augmentation.intensity(),
        levels=phase.levels,
        deterministic=config.train.deterministic,
    )
    held_out = processes.agree(
        lambda: validation_batches(
            validation,
            patches=config.train.validation_patches,
            batch_size=config.loader.batch_size,
            patch=patch,
            levels=phase.levels,
            seed=config.seed,
        )
    )

    # ---- model, optimiser, steps
    network, extra_losses = extensions.network(config), extensions.extra_losses(config)
    targets = Targets(data.labels.regions, ignore=data.labels.ignore >= 0)
    levels = config.model_levels()
    learning = [levels.index(level) + 1 for level in phase.learning]  # counted in this model
    optimizer, rate = make_optimizer(config.optimizer), learning_rate(config.optimizer, config.train.steps)
    loss = config.phase_loss(phase)
    model = nnx.eval_shape(lambda: make_model(config, grids, data.labels, data.image, network))
    graph, shapes = create_state(model, optimizer, learning)
    frozen_graph = freeze_batch_stats(graph, shapes.params, shapes.batch_stats)

    def create() -> TrainState:
        return create_state(make_model(config, grids, data.labels, data.image, network), optimizer, learning)[1]

    placement = state_sharding(mesh, jax.eval_shape(create), split_optimizer=config.mesh.split_optimizer)
    fresh = jax.jit(create, out_shardings=placement)
    deterministic = config.train.deterministic
    train_step, frozen_step = (
        make_train_step(
            kind,
            optimizer,
            loss,
            learning,
            (placement, everywhere),
            extra_losses=extra_losses,
            targets=targets,
            seed=config.seed,
            deterministic=deterministic,
        )
        for kind in (graph, frozen_graph)
    )
    # Without running averages both steps are the same: a second one would only be compiled.
    frozen_share = config.train.frozen_batch_stats if jax.tree.leaves(shapes.batch_stats) else 0.0
    frozen_after = end - round(frozen_share * config.train.steps)
    validation_step = make_validation_step(
        graph, loss, everywhere, extra_losses=extra_losses, targets=targets, deterministic=deterministic
    )

    # ---- restore
    skipped = 0
    if first > start:
        state, progress = checkpoints.restore(first, jax.eval_shape(fresh))
        loader.set_state(progress["loader"])
        skipped = progress["skipped"]
    else:
        state = fresh()
        if first:
            params, batch_stats = checkpoints.restore_weights(first, state.params, state.batch_stats)
            state = state.replace(
                step=place(np.array(first, np.int32), everywhere), params=params, batch_stats=batch_stats
            )
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    log.info(
        "%d training and %d validation cases, %d parameters, %d %s device(s), from step %d",
        len(training), len(validation), parameters, mesh.size, jax.default_backend(), first,
    )  # fmt: skip

    # ---- loop
    metrics_log = MetricsLog(workdir, step=first) if processes.is_first() else None
    bar = tqdm(initial=first, total=end, desc="train", unit="step", mininterval=1, disable=not processes.is_first())
    steps = StepLog(metrics_log, bar, levels=phase.levels, batch_size=config.loader.batch_size, step=first)
    in_flight: collections.deque[tuple[int, Metrics]] = collections.deque()

    def finish(step: int, metrics: Metrics) -> int:
        """Waits for a step and checks that it was finite: 1 if it was not, and therefore changed nothing."""
        found, norm = jax.device_get((metrics.loss, metrics.gradient_norm))
        if math.isfinite(found) and math.isfinite(norm):
            return 0
        cases = ", ".join(loader.cases_of(step - start - 1))
        what = f"step {step} of cases {cases} has loss {found} and a gradient of norm {norm}"
        if config.train.non_finite == "stop":
            raise UserError(
                f"{what}; expected finite numbers: look at these scans, lower optimizer.learning_rate or set "
                "optimizer.clip and start in another --workdir, or go on without such steps, "
                "--config.train.non_finite=skip"
            )
        log.warning("%s: skipped, %d so far", what, skipped + 1)
        return 1

    try:
        for step in range(first + 1, end + 1):
            batch = Batch(*next(loader))
            take_step = frozen_step if step > frozen_after else train_step
            state, metrics = take_step(state, batch, np.float32(rate(step - start - 1)))
            in_flight.append((step, metrics))
            stopping = stop.requested(step)  # read once: a signal between here and the break must not skip the save
            scheduled = step == end or step % config.train.checkpoint_every == 0
            while len(in_flight) > (0 if stopping or scheduled else IN_FLIGHT):
                skipped += finish(*in_flight.popleft())
            bar.update()

            if step % config.train.log_every == 0 or stopping or scheduled:
                steps.add(step, metrics, skipped)
            if stopping or scheduled:
                validated: dict[str, float] = {}
                if held_out and scheduled:
                    validated, slices = validate(
                        validation_step, state, held_out, sharding, phase.levels, data.classes[1:]
                    )
                    if metrics_log is not None:
                        metrics_log.image(step, "validation", validation_picture(held_out[0], slices, data.labels))
                steps.flush(validated)
                # None before the last phase: the finest level is what the best is chosen by.
                finest = validated.get(f"validation_dice_level_{levels[-1]}")
                # The loader stands before the next batch: state and position belong together.
                checkpoints.save(step, state, {"loader": loader.get_state(), "skipped": skipped}, dice=finest)
                steps.restart_clock()  # validation is not training speed
            if stopping:
                log.info("stopped by a signal at step %d, saved; the same command goes on from there", step)
                return False
    finally:
        bar.close()
        loader.close()
        if metrics_log is not None:
            metrics_log.close()
    return True


def training_mesh(config: RunConfig) -> Mesh:
    """The devices that a run works on.

    Raises:
      UserError: fewer devices than `mesh.space`; several processes of which some would have nothing to do.
    """
    devices, batch_size, space = jax.device_count(), config.loader.batch_size, config.mesh.space
    if space > devices:
        raise UserError(f"config key mesh.space is {space}; expected at most the {devices} devices that there are")
    mesh = make_mesh(batch_size, space)
    if mesh.size == devices:
        return mesh
    keys = f"config keys loader.batch_size {batch_size} and mesh.space {space}"
    advice = f"{keys} let {mesh.size} of {devices} devices work"
    remedy = f"choose a multiple of {max(1, devices // space)} for loader.batch_size to use all"
    if jax.process_count() > 1:
        raise UserError(f"{advice}, and every process must: {remedy}")
    log.warning("%s: %s", advice, remedy)
    return mesh


def validation_picture(batch: dict[str, Any], slices: Sequence[np.ndarray], labels: LabelSpec) -> np.ndarray:
    """The first held-out patch's middle slice at each level: image, truth, prediction; [H, W, 3] uint8."""
    rows = []
    for images, truth, predicted in zip(batch["images"], batch["labels"], slices, strict=True):
        middle = truth.shape[1] // 2
        image, window = images[0, 0], None if images.dtype == np.int16 else pictures.contrast(images[0, 0])
        masks = (np.zeros_like(predicted), labels.drawn[truth[0, middle]], predicted)
        rows.append(pictures.side_by_side([pictures.overlay(image[middle], mask, window=window) for mask in masks]))
    return np.concatenate(rows)


def _changed_schedule(config: RunConfig, saved: RunConfig, step: int) -> str:
    """What another number of steps changes in the middle of a run; "" if nothing."""
    now, before = config.train.steps, saved.train.steps
    if now == before or not 0 < step < before:
        return ""
    rates = [learning_rate(config.optimizer, steps)(step) for steps in (before, now)]
    if rates[0] == rates[1] and not config.train.frozen_batch_stats:
        return ""
    return (
        f"train.steps is {now}; it was {before} when the run began: from step {step} on the learning rate is "
        f"{rates[1]:.3g} in place of {rates[0]:.3g}, and its whole schedule ends at step {now}"
    )
