"""From a configuration to its model, and from a run folder to a trained model."""

import contextlib
import dataclasses
import logging
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from autocontext_jax import processes
from autocontext_jax.data.labels import LabelSpec
from autocontext_jax.data.split import Split
from autocontext_jax.data.store.level_grids import LevelGrids
from autocontext_jax.errors import UserError
from autocontext_jax.images.spec import ImageSpec
from autocontext_jax.inference.ensemble import ensemble
from autocontext_jax.inference.model import Model
from autocontext_jax.jobs.config_files import read_config
from autocontext_jax.jobs.describe import describe, evaluation_of_folds
from autocontext_jax.jobs.extensions import Extensions
from autocontext_jax.jobs.run_config import RunConfig
from autocontext_jax.jobs.run_folder import fold_folder, known_split, read_fingerprint
from autocontext_jax.models.pyramid import Pyramid, make_pyramid
from autocontext_jax.training.checkpoints import Checkpoints
from autocontext_jax.training.sharding import make_mesh, replicated
from autocontext_jax.training.state import inference_model

log = logging.getLogger(__name__)


def make_model(config: RunConfig, grids: LevelGrids, labels: LabelSpec, image: ImageSpec, network: Any) -> Pyramid:
    """The pyramid with fresh parameters drawn from `config.seed`.

    Args:
      config: of the run.
      grids: of all its levels, see `LevelGrids.with_spacing`.
      labels: of its data set.
      image: of the channels.
      network: class of the networks.
    """
    levels = config.model_levels()
    return make_pyramid(
        network,
        config.model,
        dataclasses.replace(
            config.pyramid,
            levels=len(levels),
            classes=labels.outputs,
            image=image,
            spacing=grids.only(levels).relative_spacing,
            activation="sigmoid" if labels.regions else "softmax",
        ),
        seed=config.seed,
    )


def restore_model(config: RunConfig, workdir: Path, split: Split, extensions: Extensions) -> tuple[Model, int]:
    """The trained model of a run folder, and the step of its checkpoint. Nothing in the folder is changed.

    Args:
      config: the run's own, see `config_files.for_inference`.
      workdir: the run folder.
      split: the run's.
      extensions: networks from outside the package.

    Raises:
      UserError: there is no checkpoint, it is damaged, or there are too few devices.
    """
    return processes.agree(lambda: _restore_model(config, workdir, split, extensions))


def restore_ensemble(config: RunConfig, workdir: Path, extensions: Extensions) -> tuple[Model, dict[str, int]]:
    """The ensemble of the folds that are trained to their end, and the step of each by the name of its folder.

    Args:
      config: of all folds, see `config_files.for_inference`.
      workdir: of all folds; nothing in it is changed.
      extensions: networks from outside the package.

    Raises:
      UserError: no fold is trained to its end; as `restore_model`.
    """
    numbers = trained_folds(config, workdir)
    if missing := [str(number) for number in range(config.data.folds) if number not in numbers]:
        log.warning(
            "%s: the ensemble has %d of %d folds; not trained to their end: %s",
            workdir, len(numbers), config.data.folds, ", ".join(missing),
        )  # fmt: skip
    models, steps = [], {}
    for number in numbers:
        model, step = processes.agree(lambda number=number: _restore_fold(config, workdir, number, extensions))  # type: ignore[misc]
        models.append(model)
        steps[fold_folder(workdir, number).name] = step
    if config.predict.checkpoint == "latest" and len(set(steps.values())) > 1:
        log.warning("%s: the folds were trained for different numbers of steps: %s", workdir, steps)
    evaluation = evaluation_of_folds(config, workdir, steps) if len(steps) > 1 else {}
    return ensemble(models, name=workdir.resolve().name, evaluation=evaluation), steps


def trained_folds(config: RunConfig, workdir: Path) -> list[int]:
    """Numbers of the folds of a cross-validation that are trained to their end.

    Raises:
      UserError: none is.
    """
    numbers = [number for number in range(config.data.folds) if is_trained(config, fold_folder(workdir, number))]
    if not numbers:
        raise UserError(f"no fold of {workdir} is trained to its end: train there first (--mode train)")
    return numbers


def _restore_fold(config: RunConfig, workdir: Path, number: int, extensions: Extensions) -> tuple[Model, int]:
    """The model of a fold, which predicts as `config` says, and the step of its checkpoint."""
    folder = fold_folder(workdir, number)
    saved = read_config(folder)
    if saved is None:
        raise UserError(f"{folder} has no config.json: train that fold again, --config.data.fold={number}")
    own = dataclasses.replace(saved, predict=config.predict, export=config.export)
    return _restore_model(own, folder, known_split(folder), extensions)


def chosen_step(config: RunConfig, workdir: Path) -> int:
    """The step of the checkpoint that `predict.checkpoint` chooses. Nothing in the run folder is changed.

    Raises:
      UserError: there is no checkpoint, or it is damaged.
    """

    def choose() -> int:
        with contextlib.closing(Checkpoints(workdir / "checkpoints", read_only=True)) as checkpoints:
            return _chosen_step(config, workdir, checkpoints)

    return processes.agree(choose)


def chosen_steps(config: RunConfig, workdir: Path) -> dict[str, int]:
    """`chosen_step` of each fold that is trained to its end, by the name of its folder."""
    folders = [fold_folder(workdir, number) for number in trained_folds(config, workdir)]
    return {folder.name: chosen_step(config, folder) for folder in folders}


def latest_step(workdir: Path) -> int:
    """The step of the newest checkpoint, 0 if there is none. Nothing in the run folder is changed."""

    def look() -> int:
        if not (workdir / "checkpoints").exists():
            return 0
        with contextlib.closing(Checkpoints(workdir / "checkpoints", read_only=True)) as checkpoints:
            return checkpoints.latest or 0

    return processes.gather(processes.agree(look))[0]  # a run that trains may save one meanwhile


def is_trained(config: RunConfig, workdir: Path) -> bool:
    """Whether a run is trained to its end. Nothing in its folder is changed."""
    return latest_step(workdir) >= config.last_step


def _chosen_step(config: RunConfig, workdir: Path, checkpoints: Checkpoints) -> int:
    step = checkpoints.best if config.predict.checkpoint == "best" else checkpoints.latest
    if step is None:
        raise UserError(f"run folder {workdir} has no checkpoint: train there first (--mode train)")
    return step


def _restore_model(config: RunConfig, workdir: Path, split: Split, extensions: Extensions) -> tuple[Model, int]:
    network, learned = extensions.network(config), read_fingerprint(config, workdir)
    grids = config.levels.with_spacing(learned.spacing)
    config.check_tile(grids)
    pyramid = nnx.eval_shape(lambda: make_model(config, grids, split.labels, learned.image, network))
    graph, *like = nnx.split(pyramid, nnx.Param, ...)
    # Restored to every device, whatever mesh it was trained on; each process then works on its own first one.
    everywhere = replicated(make_mesh(jax.device_count() if jax.process_count() > 1 else 1))
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere), like)
    step, weights = _restore_weights(config, workdir, like)
    weights = jax.tree.map(lambda leaf: jax.device_put(leaf.addressable_data(0)), weights)
    log.info("restored step %d of %s", step, workdir)
    description = describe(config, workdir, split, learned, step)
    return Model(description, [inference_model(graph, *weights)], config.tiling()), step


def _restore_weights(config: RunConfig, workdir: Path, like: Any) -> tuple[int, Any]:
    """The chosen step and its weights; chosen again where a run that trains meanwhile has removed that checkpoint."""
    while True:
        with contextlib.closing(Checkpoints(workdir / "checkpoints", read_only=True)) as checkpoints:
            step = _chosen_step(config, workdir, checkpoints)
            try:
                return step, checkpoints.restore_weights(step, *like)
            except UserError:
                if checkpoints.exists(step):
                    raise
