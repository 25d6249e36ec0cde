"""Networks, losses and metrics from outside the package, which a configuration names."""

import dataclasses
import importlib
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from autocontext_jax.errors import UserError
from autocontext_jax.evaluation.metrics import METRICS
from autocontext_jax.jobs.run_config import RunConfig
from autocontext_jax.models.backbones import BACKBONES


@dataclasses.dataclass(frozen=True)
class Extensions:
    """What the caller passes under names of their own.

    Attributes:
      networks: {name: class}. A Flax NNX module `Network(inputs, classes, config, *, rngs)`: numbers of channels of its
        input and of its logits, `models.blocks.NetworkConfig`, `nnx.Rngs`. It maps [B, D, H, W, inputs], float32, to
        logits [B, D, H, W, classes]. It is called at every level.
      losses: {name: function}, see `training.losses.Loss`.
      metrics: {name: function}, see `evaluation.metrics.Metric`.
    """

    networks: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    losses: Mapping[str, Callable[..., Any]] = dataclasses.field(default_factory=dict)
    metrics: Mapping[str, Callable[..., Any]] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        for kind, taken in (("networks", BACKBONES), ("metrics", METRICS)):
            if own := [name for name in getattr(self, kind) if name in taken]:
                raise UserError(f"{kind} holds the name {own[0]!r}, which is the package's own; expected another name")

    def network(self, config: RunConfig) -> Any:
        """The class that `model.backbone` names.

        Raises:
          UserError: there is none of this name.
        """
        name = config.model.backbone
        return _find(name, {**BACKBONES, **self.networks}, "model.backbone", "networks")

    def extra_losses(self, config: RunConfig) -> dict[str, Callable[..., Any]]:
        """The functions that `loss.extra` names, under these names.

        Raises:
          UserError: there is none of this name.
        """
        return {name: _find(name, self.losses, "loss.extra", "losses") for name, _ in config.loss.extra}

    def extra_metrics(self, config: RunConfig) -> dict[str, Callable[..., Any]]:
        """The functions that `evaluate.metrics` names, under their last names.

        Raises:
          UserError: there is none of this name.
        """
        found: dict[str, Callable[..., Any]] = {}
        for path in config.evaluate.metrics:
            name = path.rpartition(":")[2]
            if name in (*METRICS, *found):
                raise UserError(f"config key evaluate.metrics names {name!r}, which is taken; expected another name")
            found[name] = _find(path, self.metrics, "evaluate.metrics", "metrics")
        return found


NO_EXTENSIONS = Extensions()


def import_object(path: str, key: str) -> Any:
    """The object of an import path "package.module:Name". The current folder is searched too.

    Raises:
      UserError: it cannot be imported.
    """
    module, _, name = path.partition(":")
    if str(Path.cwd()) not in sys.path and "" not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise UserError(
            f"{key} is {path!r}, which cannot be imported ({error}); expected package.module:Name"
        ) from None


def _find(name: str, known: Mapping[str, Any], key: str, argument: str) -> Any:
    if name in known:
        return known[name]
    if ":" in name:
        return import_object(name, f"config key {key}")
    names = f"one of {', '.join(known)}, " if known else ""
    raise UserError(
        f"config key {key} names {name!r}; expected {names}package.module:Name, or a name that is passed to the Python "
        f'functions, {argument}={{"{name}": ...}}'
    )
