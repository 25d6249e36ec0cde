"""A model file whose network is a matrix product, and changed copies of it."""

import json
import zipfile
from pathlib import Path

import numpy as np
from flax import nnx

from autocontext_jax.data.store.level_grids import LevelGrids
from autocontext_jax.images.spec import ct_image
from autocontext_jax.inference.description import ClassDescription, Description, NetworkDescription, Tiling
from autocontext_jax.inference.model_file import DESCRIPTION, _checksum, write_model
from autocontext_jax.models.pyramid import PyramidConfig


class Scale(nnx.Module):
    """The smallest network: a matrix product, dropout between."""

    def __init__(self, inputs, classes, config, *, rngs):
        self.matrix = nnx.Linear(inputs, classes, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        """[B, D, H, W, inputs] -> [B, D, H, W, classes]."""
        return self.matrix(self.dropout(x))


CLASSES = (ClassDescription("background", 0), ClassDescription("liver", 2, (1, 2, 3), "SCT:10200004:Liver"))
DESCRIPTION_OF_SCALE = Description(
    name="scale",
    license="CC0-1.0",
    classes=CLASSES,
    network=NetworkDescription(name="Scale", depth=1),
    pyramid=PyramidConfig(),
    image=ct_image((-100.0, 100.0)),
    levels=LevelGrids((2.0, 1.0)),
    trained_spacing=((1.0, 1.0, 1.0), (2.0, 2.0, 2.0)),
    tiling=Tiling((8,), 2, crop_to_body=True, flip=False),
    training={"steps": 3},
    evaluation={},
)
WEIGHTS_OF_SCALE = {
    "level_1/matrix/kernel": np.array([[0, 1]], np.float32),
    "level_1/matrix/bias": np.array([0, 0.25], np.float32),
    "level_2/matrix/kernel": np.array([[0, 2], [0, 0], [0, 0.5]], np.float32),
    "level_2/matrix/bias": np.array([0, -0.5], np.float32),
}
SCAN = np.linspace(-150, 150, 6 * 9 * 10).reshape(6, 9, 10).astype(np.int16)
NETWORKS = {"Scale": Scale}


def write_small_model(folder: Path) -> Path:
    """Writes the file, whose network is `Scale`."""
    path = folder / "scale.autocontext"
    write_model(path, DESCRIPTION_OF_SCALE, WEIGHTS_OF_SCALE, "# scale\n")
    return path


def repacked(file: Path, **changed: bytes | None) -> Path:
    """The file with other parts, by the beginning of their names; None leaves a part out."""
    with zipfile.ZipFile(file) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    for start, content in changed.items():
        name = next((name for name in parts if name.startswith(start)), start)
        parts[name] = content  # type: ignore[assignment]
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in parts.items():
            if content is not None:
                archive.writestr(zipfile.ZipInfo(name), content)
    return file


def described(file: Path, **changed) -> Path:
    """The file with another description, whose checksum is right."""
    content = json.loads(zipfile.ZipFile(file).read(DESCRIPTION))
    content.pop("checksum")
    for key, value in changed.items():
        *path, last = key.split("__")
        inner = content
        for name in path:
            inner = inner[name]
        inner[last] = value
    return repacked(file, model=json.dumps(content | {"checksum": _checksum(content)}).encode())
