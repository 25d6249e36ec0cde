"""Masks as surfaces, as in the paper's figures 2 and 3: to be turned in a browser, or printed."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.colors import LightSource
from matplotlib.figure import Figure
from scipy import ndimage
from skimage.measure import marching_cubes

from autocontext_jax.evaluation.pictures import PALETTE, save

# Voxels along an organ's longest side beyond which it is shown coarser: a browser turns some 100,000 triangles.
LARGEST = 72


@dataclasses.dataclass(frozen=True)
class Surface:
    """Triangles.

    Attributes:
      vertices: [n, 3] float32, mm (z, y, x) from the scan's first voxel.
      faces: [m, 3] int32, numbers of vertices.
    """

    vertices: np.ndarray
    faces: np.ndarray


def organ_surfaces(mask: np.ndarray, organs: Sequence[str], spacing: tuple[float, float, float]) -> dict[str, Surface]:
    """The surface of each organ that the mask holds.

    Args:
      mask: [D, H, W] integers, canonical.
      organs: names; class k is organs[k - 1].
      spacing: mm, (z, y, x).
    """
    boxes = ndimage.find_objects(mask, max_label=len(organs))
    return {
        organ: _surface(mask[box] == number, np.array([along.start for along in box]), np.array(spacing))
        for number, (organ, box) in enumerate(zip(organs, boxes, strict=True), start=1)
        if box is not None
    }


def _surface(mask: np.ndarray, corner: np.ndarray, spacing: np.ndarray) -> Surface:
    """Marching cubes (Lewiner et al., 2003) over the share of the organ in blocks of voxels, a little smoothed.

    Args:
      mask: [D, H, W] bool, the organ's box.
      corner: the box's first voxel in the scan, (z, y, x).
      spacing: mm, (z, y, x).
    """
    block = -(-max(mask.shape) // LARGEST)
    padded = np.pad(mask.astype(np.float32), [(2 * block, 2 * block + -size % block) for size in mask.shape])
    d, h, w = (size // block for size in padded.shape)
    shares = padded.reshape(d, block, h, block, w, block).mean((1, 3, 5))
    smooth = ndimage.gaussian_filter(shares, 0.6)
    # A structure thinner than a block must not vanish.
    level = min(0.5, 0.5 * float(smooth.max()))
    vertices, faces, _, _ = marching_cubes(smooth, level)
    voxels = (vertices + 0.5) * block - 0.5 - 2 * block + corner
    return Surface((voxels * spacing).astype(np.float32), faces.astype(np.int32))


def figure(path: Path, columns: Mapping[str, Mapping[str, Surface]], organs: Sequence[str], *, title: str = "") -> None:
    """Writes a PNG: a column for each mask, its surfaces seen from the front.

    Args:
      path: of the PNG.
      columns: {column's name: `organ_surfaces`}.
      organs: all names, for the colours.
      title: above all.
    """
    canvas = Figure(figsize=(4 * len(columns), 4.4), layout="constrained", facecolor="white")
    everything = np.concatenate(
        [surface.vertices for surfaces in columns.values() for surface in surfaces.values()] or [np.zeros((1, 3))]
    )
    low, high = everything.min(0), everything.max(0)
    light = LightSource(azdeg=225, altdeg=45)
    for number, (name, surfaces) in enumerate(columns.items()):
        axes = canvas.add_subplot(1, len(columns), number + 1, projection="3d")
        for organ, surface in surfaces.items():
            z, y, x = surface.vertices.T
            colour = PALETTE[organs.index(organ) % len(PALETTE)] / 255
            # Matplotlib looks along +y from an elevation of 0 at azimuth -90: from the patient's front.
            axes.plot_trisurf(x, y, z, triangles=surface.faces, color=colour, lightsource=light, linewidth=0)
        axes.set(xlim=(low[2], high[2]), ylim=(low[1], high[1]), zlim=(low[0], high[0]), title=name)
        axes.set_box_aspect(np.maximum(high - low, 1)[::-1])
        axes.view_init(elev=10, azim=-90)
        axes.set_axis_off()
    canvas.suptitle(title)
    save(path, canvas)
