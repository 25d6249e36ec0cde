"""Multi-scale pyramids of 3D U-Nets with auto-context, trained end to end, for the segmentation of scans, in JAX.

    import autocontext_jax as ac

    model = ac.load("liver.autocontext")
    mask = model.predict("scan.nii.gz")

See `load`, `Model`, `ensemble`, `plan`, `train`, `evaluate`, `default_config`. A mistake of the user raises
`UserError`, with one line that says what is wrong and what to do.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__: str

if TYPE_CHECKING:
    from autocontext_jax.api import Model, default_config, ensemble, evaluate, load, plan, train
    from autocontext_jax.errors import UserError

__all__ = ["Model", "UserError", "default_config", "ensemble", "evaluate", "load", "plan", "train"]


def __getattr__(name: str) -> Any:
    """Imports what is exported when it is used: the package is imported by worker processes that need no JAX."""
    if name == "__version__":
        return importlib.import_module("autocontext_jax.runtime").package_version()
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "autocontext_jax.errors" if name == "UserError" else "autocontext_jax.api"
    return getattr(importlib.import_module(module), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__, "__version__"])
