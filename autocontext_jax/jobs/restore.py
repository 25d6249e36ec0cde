"""From a configuration to its model, and from a work directory to a trained predictor."""

import contextlib
import logging
from collections.abc import Sequence
from pathlib import Path

import jax
from flax import nnx
from ml_collections import ConfigDict

from autocontext_jax.errors import UserError
from autocontext_jax.inference.predictor import Predictor, PredictorConfig
from autocontext_jax.jobs.config import (
    BACKBONES,
    check_same_run,
    dataclass_of,
    mirror_classes,
    model_levels,
    read_config,
)
from autocontext_jax.models.blocks import NetworkConfig
from autocontext_jax.models.pyramid import Pyramid, PyramidConfig
from autocontext_jax.training.checkpoints import Checkpoints
from autocontext_jax.training.sharding import make_mesh, replicated
from autocontext_jax.training.state import inference_model

log = logging.getLogger(__name__)


def make_model(config: ConfigDict, classes: int) -> Pyramid:
    """The pyramid with fresh parameters drawn from `config.seed`."""
    rank, backbone = config.levels.rank, BACKBONES[config.model.backbone]
    network = dataclass_of(NetworkConfig, config.model, rank=rank)
    pyramid = dataclass_of(PyramidConfig, config.pyramid, levels=len(model_levels(config)), classes=classes, rank=rank)
    return Pyramid(
        pyramid, lambda inputs, rngs: backbone(inputs, classes, network, rngs=rngs), rngs=nnx.Rngs(config.seed)
    )


def restore_predictor(config: ConfigDict, workdir: Path) -> tuple[Predictor, Sequence[str]]:
    """The trained predictor of a work directory and its K class names, background first.

    Raises:
      UserError: there is no checkpoint, or it belongs to another configuration, or there are too few devices.
    """
    space, devices = config.predict.space, jax.local_device_count()
    if space > devices:
        raise UserError(f"config key predict.space is {space}; wanted at most the {devices} devices of this process")
    saved = read_config(workdir)
    if saved is None:
        raise UserError(f"work directory {workdir} has no config.json: train there first (--mode train)")
    labels = tuple(saved["data"]["labels"])
    config.data.labels = labels
    check_same_run(config, saved, workdir)
    graph, *like = nnx.split(nnx.eval_shape(lambda: make_model(config, len(labels))), nnx.Param, ...)
    # Restored to every device, whatever mesh it was trained on; each process then works on its own first one.
    everywhere = replicated(make_mesh(jax.device_count() if jax.process_count() > 1 else 1))
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere), like)
    with contextlib.closing(Checkpoints(workdir / "checkpoints", keep=config.train.keep)) as checkpoints:
        step = checkpoints.best if config.predict.checkpoint == "best" else checkpoints.latest
        if step is None:
            raise UserError(f"work directory {workdir} has no checkpoint: train there first (--mode train)")
        weights = checkpoints.restore_weights(step, *like)
    weights = jax.tree.map(lambda leaf: jax.device_put(leaf.addressable_data(0)), weights)
    log.info("restored step %d of %s", step, workdir)
    model = inference_model(graph, *weights)
    align = dataclass_of(NetworkConfig, config.model).divisor
    mirror = mirror_classes(config) if config.predict.mirror else ()
    tiles = dataclass_of(PredictorConfig, config.predict)
    return Predictor(model, tiles, align=align, mirror_classes=mirror), labels
