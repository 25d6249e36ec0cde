"""From a patient's anatomy to a scan and its label on any grid.

One painter lays the parts over each other in the order of the table. The anatomy is in mm; the scan's grid only samples
it, so the same patient can be scanned on several grids.
"""

import itertools

import numpy as np

from autocontext_jax.data.phantom.anatomy import AIR, FAT, MUSCLE, ORGANS, Part, individual, small_rotation

_CAVITY = (78.0, 126.0)  # mm, semi-axes (y, x) of what the abdominal wall encloses
_CAVITY_AXIS = np.array([-1e4, 0, 0, 1]), np.array([1e4, 0, 0, 1]), np.array([1, *_CAVITY])  # as for `_distance`
_WALL = 14.0  # mm of muscle around it; fat and skin follow
_REACH = 112.0  # mm that a scan must show above and below the origin
_SLAB = 4_000_000  # voxels painted at once: memory for them is some 100 bytes each


class _Waves:
    """A smooth random field of `channels` values: a sum of plane waves with wavelengths of `mm`."""

    def __init__(self, rng: np.random.Generator, channels: int, mm: tuple[float, float], rms: float, count: int = 12):
        wave = rng.standard_normal((3, count))
        self.wave = wave / np.linalg.norm(wave, axis=0) * 2 * np.pi / rng.uniform(*mm, count)
        self.phase = rng.uniform(0, 2 * np.pi, count)
        self.weight = rms * np.sqrt(2 / count) * rng.standard_normal((channels, 1, count))

    def __call__(self, z: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
        """[channels, D, H, W] float32 on the grid of mm along each axis.

        cos(a + b) = cos a cos b - sin a sin b with a along z and b in the plane makes it one matrix product.
        """
        along = np.outer(z, self.wave[0]) + self.phase
        plane = self.wave[1, :, None, None] * y[:, None] + self.wave[2, :, None, None] * x
        left = np.concatenate([self.weight * np.cos(along), -self.weight * np.sin(along)], -1, dtype=np.float32)
        right = np.concatenate([np.cos(plane), np.sin(plane)], dtype=np.float32)
        return (left @ right.reshape(len(right), -1)).reshape(-1, len(z), len(y), len(x))


def _distance(p: np.ndarray, start: np.ndarray, end: np.ndarray, flat: np.ndarray) -> np.ndarray:
    """Signed distance in mm, negative inside, of points [3, ...] to a tapering tube between rows (z, y, x, radius)."""
    flat = flat.reshape(3, *(1,) * (p.ndim - 1)).astype(np.float32)
    axis, taper = ((end - start)[:3] / flat.ravel()).astype(np.float32), np.float32(end[3] - start[3])
    offset = (p - start[:3].reshape(flat.shape).astype(np.float32)) / flat
    along = np.clip(np.tensordot(axis / max(axis @ axis, 1e-6), offset, 1), 0, 1)
    offset -= axis.reshape(flat.shape) * along
    length = np.sqrt(np.sum(offset**2, 0)) + np.float32(1e-3)
    slope = np.sqrt(np.sum((offset / flat) ** 2, 0)) + np.float32(1e-3)  # of `length` against mm: equal where flat is 1
    return (length - np.float32(start[3]) - along * taper) * length / slope


def _paint(
    image: np.ndarray, label: np.ndarray, p: np.ndarray, parts: list[Part], edge: float, thinnest: float
) -> None:
    """Lays parts over image and label [D, H, W], in place, in the order they come.

    Args:
      image: HU, float32; blurred over `edge` mm at each surface, as by a scanner.
      label: uint8.
      p: [3, D, H, W] float32, where each voxel lies in the body.
      parts: with smooth curves.
      edge: mm.
      thinnest: mm, the least radius: a vessel thinner than the grid shows must not break up.
    """
    axes = [tuple(other for other in range(3) if other != axis) for axis in range(3)]
    lowest, highest = ([pick(p[axis], axes[axis]) for axis in range(3)] for pick in (np.min, np.max))

    def box(rows: np.ndarray, flat: np.ndarray, margin: float) -> tuple[slice, ...]:
        """The slices, lines and columns that come near the rows: all voxels within `margin` and some more."""
        reach = rows[:, 3:] * flat + margin
        low, high = (rows[:, :3] - reach).min(0), (rows[:, :3] + reach).max(0)
        near = [np.flatnonzero((highest[i] > low[i]) & (lowest[i] < high[i])) for i in range(3)]
        return tuple(slice(hits[0], hits[-1] + 1) if hits.size else slice(0) for hits in near)

    cavity = _distance(p, *_CAVITY_AXIS)
    distance = np.full_like(cavity, np.inf)
    for part in parts:
        flat = np.array(part.flat, float)
        rows = np.column_stack([part.curve[:, :3], np.maximum(part.curve[:, 3], thinnest)])
        here = box(rows, flat, part.rind + edge)
        if not distance[here].size:
            continue
        for pair in itertools.pairwise(rows) if len(rows) > 1 else [(rows[0], rows[0])]:
            near = box(np.array(pair), flat, part.rind + edge)
            distance[near] = np.minimum(distance[near], _distance(p[:, *near], *pair, flat))
        outer = distance[here].copy()
        distance[here] = np.inf
        if part.loose:
            outer = np.maximum(outer, cavity[here])  # flush with the wall
        thickness, hu = part.wall
        inner = outer + thickness
        level = float(np.min(rows[:, 1] - rows[:, 3] * flat[1])) + thickness + part.gas
        for inside, value in (
            *([(np.maximum(outer - part.rind, cavity[here]), FAT)] if part.rind else []),
            *([(outer, hu)] if thickness else []),
            (inner, part.hu),
            *([(np.maximum(inner, p[1][here] - level), AIR)] if part.gas else []),
        ):
            image[here] += np.clip(0.5 - inside / edge, 0, 1) * (value - image[here])
        label[here][outer < part.rind] = 0
        label[here][outer < 0] = ORGANS.index(part.name) + 1 if part.name in ORGANS else 0


def _noise(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Unit noise [D, H, W], correlated within slices, which a scanner reconstructs one by one."""
    noise = rng.standard_normal((shape[0], shape[1] + 1, shape[2] + 1), np.float32)
    return (noise[:, 1:, 1:] + noise[:, :-1, 1:] + noise[:, 1:, :-1] + noise[:, :-1, :-1]) / 2


def make_phantom(
    rng: np.random.Generator,
    *,
    size: tuple[int, int, int],
    spacing: tuple[float, float, float],
    look_alikes: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """One patient's scan. The same draws give the same patient on any grid; a grid too small for the body shrinks it.

    Args:
      rng: decides the anatomy, then the pose, the contrast and the noise.
      size: voxels, (z, y, x).
      spacing: mm, (z, y, x).
      look_alikes: of each kind, what only its place in the body tells from an organ: cysts, loops of bowel, vessels.

    Returns:
      Image [D, H, W] int16 in HU and label [D, H, W] uint8, the place in `ORGANS` counted from 1 or 0 for background.
      z grows to the head, y to the back, x to the patient's left.
    """
    parts = individual(rng, look_alikes)
    warp = _Waves(rng, 3, mm=(110, 300), rms=4)
    texture = _Waves(rng, 1, mm=(15, 50), rms=5)
    fat, sigma = rng.uniform(8, 30), rng.uniform(8, 20)
    stretch, turn, shift = np.exp(0.04 * rng.standard_normal(3)), small_rotation(rng, 2.5), 5 * rng.standard_normal(3)

    around = _WALL + fat + 8
    shown = 2 * stretch * [_REACH, _CAVITY[0] + around, _CAVITY[1] + around]
    fit = min(1, np.min(np.multiply(size, spacing) / shown))
    stretch, shift = fit * stretch, fit * shift
    grid = [(np.arange(n) - (n - 1) / 2) * mm for n, mm in zip(size, spacing, strict=True)]
    into = turn / stretch[:, None]  # mm in the scan to mm in the body
    edge, thinnest = max(float(np.mean(spacing)), 1.5), 0.75 * max(spacing) / float(stretch.min())
    wall = np.array([-1, 0, 4, 5, 6, 9, 10, 11, _WALL, _WALL + 1, *(_WALL + fat + np.array([0, 1, 2, 4]))])
    tissue = [FAT, *(MUSCLE, MUSCLE, 15, MUSCLE, MUSCLE, 15, MUSCLE, MUSCLE), FAT, FAT, 20, 20, AIR]

    image, label = np.empty(size, np.int16), np.zeros(size, np.uint8)
    slab = max(1, _SLAB // (size[1] * size[2]))
    for first in range(0, size[0], slab):
        z, y, x = grid[0][first : first + slab], grid[1], grid[2]
        p = warp(z, y, x)
        for along, mm in enumerate((z[:, None, None], y[:, None], x)):
            p += (into[:, along, None, None, None] * (mm - shift[along])).astype(np.float32)
        hu = np.interp(_distance(p, *_CAVITY_AXIS), wall, tissue).astype(np.float32)
        _paint(hu, label[first : first + slab], p, parts, edge, thinnest)
        hu += texture(z, y, x)[0] * (hu > -500)
        hu += sigma * _noise(rng, hu.shape)
        image[first : first + slab] = np.clip(np.rint(hu), -1024, 3071)
    return image, label
