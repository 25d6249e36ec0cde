"""Surfaces of masks, as in the paper's figures 2 and 3: for the interactive report or as a picture."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.colors import LightSource
from matplotlib.figure import Figure
from scipy import ndimage
from skimage.measure import marching_cubes

from autocontext_jax.evaluation.pictures import PALETTE, save

# Classes that are longer than this, in voxels, are shown at a lower resolution: a browser can rotate about 100,000
# triangles smoothly.
LARGEST = 72


@dataclasses.dataclass(frozen=True)
class Surface:
    """A triangle mesh.

    Attributes:
      vertices: [n, 3] float32, mm (z, y, x) from the centre of the scan's first voxel.
      faces: [m, 3] int32, each row the indices of a triangle's vertices.
    """

    vertices: np.ndarray
    faces: np.ndarray


def class_surfaces(mask: np.ndarray, classes: Sequence[str], spacing: tuple[float, float, float]) -> dict[str, Surface]:
    """The surface of each class that the mask contains.

    Args:
      mask: [D, H, W], integers, in canonical orientation.
      classes: names without the background; value k is `classes[k - 1]`.
      spacing: mm, (z, y, x).
    """
    boxes = ndimage.find_objects(mask, max_label=len(classes))
    return {
        name: _surface(mask[box] == number, np.array([along.start for along in box]), np.array(spacing))
        for number, (name, box) in enumerate(zip(classes, boxes, strict=True), start=1)
        if box is not None
    }


def _surface(mask: np.ndarray, corner: np.ndarray, spacing: np.ndarray) -> Surface:
    """Marching cubes (Lewiner et al., 2003) at reduced resolution.

    The isosurface is that of a slightly smoothed map, which holds for each block of voxels the fraction that the class
    fills. Blocks are as large as `LARGEST` requires.

    Args:
      mask: [D, H, W] bool, the class in its bounding box.
      corner: first voxel of the box in the scan, (z, y, x).
      spacing: mm, (z, y, x).
    """
    block = -(-max(mask.shape) // LARGEST)
    padded = np.pad(mask.astype(np.float32), [(2 * block, 2 * block + -size % block) for size in mask.shape])
    d, h, w = (size // block for size in padded.shape)
    fractions = padded.reshape(d, block, h, block, w, block).mean((1, 3, 5))
    smooth = ndimage.gaussian_filter(fractions, 0.6)
    # The level is lower for structures thinner than a block, so that they do not disappear.
    level = min(0.5, 0.5 * float(smooth.max()))
    vertices, faces, _, _ = marching_cubes(smooth, level)
    voxels = (vertices + 0.5) * block - 0.5 - 2 * block + corner
    return Surface((voxels * spacing).astype(np.float32), faces.astype(np.int32))


def figure(
    path: Path, columns: Mapping[str, Mapping[str, Surface]], classes: Sequence[str], *, title: str = ""
) -> None:
    """Writes a PNG with a column for each mask: its surfaces from the patient's front.

    Args:
      path: of the PNG.
      columns: {title of the column: result of `class_surfaces`}.
      classes: all names without the background; they determine the colours.
      title: of the figure.
    """
    canvas = Figure(figsize=(4 * len(columns), 4.4), layout="constrained", facecolor="white")
    everything = np.concatenate(
        [surface.vertices for surfaces in columns.values() for surface in surfaces.values()] or [np.zeros((1, 3))]
    )
    low, high = everything.min(0), everything.max(0)
    light = LightSource(azdeg=225, altdeg=45)
    for number, (column, surfaces) in enumerate(columns.items()):
        axes = canvas.add_subplot(1, len(columns), number + 1, projection="3d")
        for name, surface in surfaces.items():
            z, y, x = surface.vertices.T
            colour = PALETTE[classes.index(name) % len(PALETTE)] / 255
            # At azimuth -90 Matplotlib looks along +y: from the patient's front.
            axes.plot_trisurf(x, y, z, triangles=surface.faces, color=colour, lightsource=light, linewidth=0)
        axes.set(xlim=(low[2], high[2]), ylim=(low[1], high[1]), zlim=(low[0], high[0]), title=column)
        axes.set_box_aspect(np.maximum(high - low, 1)[::-1])
        axes.view_init(elev=10, azim=-90)
        axes.set_axis_off()
    canvas.suptitle(title)
    save(path, canvas)
