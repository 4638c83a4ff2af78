"""The canvas of the procedural body: solids in millimetres painted into a volume and a mask of any voxel grid."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy.interpolate import PchipInterpolator

from modeling_fvlm.organs import TOTALSEGMENTATOR_V2

LABELS = {name: position + 1 for position, name in enumerate(TOTALSEGMENTATOR_V2)}


def label_table(names: Sequence[str], background: bool = False) -> np.ndarray:
    """Table `(256,)` that is true at the labels of the named classes: what a solid may be painted over."""
    table = np.zeros(256, dtype=bool)
    table[[LABELS[name] for name in names]] = True
    table[0] = background
    return table


class Profile:
    """Centre and radii of a column as smooth functions of z.

    Args:
        knots: Rows `(z, center y, center x, radius y, radius x)` in mm, z growing.
    """

    def __init__(self, knots: Sequence[Sequence[float]]):
        knots = np.asarray(knots, dtype=np.float64)
        self.z = np.linspace(knots[0, 0], knots[-1, 0], max(2, int((knots[-1, 0] - knots[0, 0]) / 4)))
        # Unlike a spline it never leaves the range of its knots: no radius falls below zero.
        self.limits = tuple(PchipInterpolator(knots[:, 0], knots[:, 1:])(self.z).T)

    def at(self, z: np.ndarray) -> list[np.ndarray]:
        """Center y, center x, radius y, radius x at heights z, float32."""
        return [np.interp(z, self.z, values).astype(np.float32) for values in self.limits]


def within(distance: np.ndarray, limit: float | np.ndarray) -> np.ndarray:
    """Voxels whose `distance` is below `limit`; the nearest one where none is."""
    inside = distance < limit
    if inside.size < 64 and not inside.any():  # no larger box can miss its solid
        inside.flat[np.argmin(distance)] = True
    return inside


class Canvas:
    """A volume and a mask, and the voxel centres in the frame of the body.

    A solid is evaluated inside its own box only. Its radii are never below 0.55 voxel and it takes at least the voxel
    nearest to it, so that the smallest thing is met, however thick the slices.
    """

    def __init__(self, axes_mm: Sequence[np.ndarray]):
        self.axes_mm = tuple(axis.astype(np.float32) for axis in axes_mm)
        self.pitch_mm = np.array([axis[1] - axis[0] for axis in axes_mm])
        self._starts = [(float(axis[0]), float(axis[1] - axis[0]), len(axis)) for axis in axes_mm]
        shape = tuple(len(axis) for axis in self.axes_mm)
        self.volume = np.full(shape, -1000.0, dtype=np.float32)
        self.mask = np.zeros(shape, dtype=np.uint8)

    def box(self, low: Sequence[float], high: Sequence[float]) -> tuple[slice, slice, slice] | None:
        """Slices of the voxels whose centres lie between two corners; None where there are none."""
        box = []
        for (start, step, size), bottom, top in zip(self._starts, low, high):
            first = max(0, math.ceil((bottom - start) / step))
            stop = min(size, math.floor((top - start) / step) + 1)
            if first >= stop:
                return None
            box.append(slice(first, stop))
        return tuple(box)

    def grid(self, box: tuple[slice, slice, slice]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Coordinates of a box as arrays (depth, 1, 1), (1, height, 1), (1, 1, width)."""
        z, y, x = (axis[part] for axis, part in zip(self.axes_mm, box))
        return z[:, None, None], y[None, :, None], x[None, None, :]

    def fill(self, box, inside: np.ndarray, hu: float | None, label: str | int | None, only: np.ndarray | None) -> None:
        """Paint the voxels `inside` of a box: HU, class, or both; `only` says which classes may be painted over."""
        if only is not None:
            inside = inside & only[self.mask[box]]
        if hu is not None:
            np.copyto(self.volume[box], np.float32(hu), where=inside)
        if label is not None:
            np.copyto(self.mask[box], np.uint8(LABELS[label] if isinstance(label, str) else label), where=inside)

    def ellipsoid(
        self,
        center: Sequence[float],
        radii: Sequence[float],
        hu: float | None,
        label: str | int | None = None,
        only: np.ndarray | None = None,
        bumps: np.ndarray | None = None,
        tilt: tuple[int, int, float] | None = None,
    ) -> None:
        """Paint an ellipsoid.

        Args:
            center, radii: `(z, y, x)` in mm.
            hu, label, only: As in `fill`.
            bumps: Six numbers in [0, 1) that make the surface uneven; None leaves it smooth.
            tilt: `(axis, along, slope)`: the centre moves along `axis` by `slope` mm per mm of the axis `along`.
        """
        center = np.asarray(center, dtype=np.float64)
        radii = np.maximum(np.asarray(radii, dtype=np.float64), 0.55 * self.pitch_mm)
        reach = radii * (1.0 if bumps is None else 1.15)
        if tilt is not None:
            reach = reach.copy()
            reach[tilt[0]] += abs(tilt[2]) * reach[tilt[1]]
        box = self.box(center - reach, center + reach)
        if box is None:
            return
        offsets = [axis - middle for axis, middle in zip(self.grid(box), center.astype(np.float32))]
        if tilt is not None:
            offsets[tilt[0]] = offsets[tilt[0]] - np.float32(tilt[2]) * offsets[tilt[1]]
        z, y, x = (offset / np.float32(radius) for offset, radius in zip(offsets, radii))
        distance = z * z + (y * y + x * x)
        if bumps is not None:
            phases, waves = 6.28 * bumps[:3], 1.5 + 1.5 * bumps[3:]
            z, y, x = (np.float32(0.09) * np.sin(k * axis + p) for k, p, axis in zip(waves, phases, (z, y, x)))
            distance *= (1 + z) + (y + x)
        self.fill(box, within(distance, 1), hu, label, only)

    def tube(
        self,
        points: Sequence[Sequence[float]],
        radii: float | Sequence[float],
        hu: float | Sequence[float] | None,
        label: str | int | None = None,
        only: np.ndarray | None = None,
    ) -> None:
        """Paint a chain of rounded cones through `points`; one radius (mm) per point, one HU per piece or for all."""
        points = np.asarray(points, dtype=np.float64)
        radii = [float(radius) for radius in radii] if np.ndim(radii) else [float(radii)] * len(points)
        values = hu if isinstance(hu, (list, tuple)) else [hu] * (len(points) - 1)
        for start, stop, r0, r1, value in zip(points[:-1], points[1:], radii[:-1], radii[1:], values):
            reach = np.maximum(max(r0, r1), 0.55 * self.pitch_mm)
            box = self.box(np.minimum(start, stop) - reach, np.maximum(start, stop) + reach)
            if box is None:
                continue
            # Lengths in units of the larger radius, axis by axis: a thick slice stretches the tube along its own axis.
            z, y, x = ((axis - np.float32(p)) / np.float32(r) for axis, p, r in zip(self.grid(box), start, reach))
            dz, dy, dx = ((stop - start) / reach).astype(np.float32)
            length = dz * dz + dy * dy + dx * dx
            projection = z * (dz / length) + (y * (dy / length) + x * (dx / length))
            share = np.minimum(np.maximum(projection, 0), 1)
            # |p - share d|^2 = |p|^2 + |d|^2 share (share - 2 projection)
            projection *= -2
            projection += share
            projection *= share
            projection *= length
            projection += z * z + (y * y + x * x)
            limit = 1 if r0 == r1 else np.square((r0 + share * (r1 - r0)) / max(r0, r1))
            self.fill(box, within(projection, limit), value, label, only)

    def column(
        self,
        profile: Profile,
        hu: float | None,
        label: str | int | None = None,
        only: np.ndarray | None = None,
        grow_mm: float = 0.0,
        mirror: int = 1,
        offset: tuple[float, float] = (0.0, 0.0),
    ) -> None:
        """Paint a column of elliptic cross sections; `mirror=-1` puts it on the other side of the midline."""
        region = self.column_region(profile, grow_mm, mirror, offset)
        if region is not None:
            self.fill(*region, hu, label, only)

    def column_region(self, profile: Profile, grow_mm: float = 0.0, mirror: int = 1, offset=(0.0, 0.0)):
        """`(box, inside)` of a column, or None outside of the scan."""
        cy, cx, ry, rx = profile.limits
        cx, cy = mirror * cx + offset[1], cy + offset[0]
        low = (profile.z[0], cy.min() - ry.max() - grow_mm, cx.min() - rx.max() - grow_mm)
        high = (profile.z[-1], cy.max() + ry.max() + grow_mm, cx.max() + rx.max() + grow_mm)
        box = self.box(low, high)
        if box is None:
            return None
        z, y, x = self.grid(box)
        cy, cx, ry, rx = (values[:, None, None] for values in profile.at(z[:, 0, 0]))
        y = (y - (cy + np.float32(offset[0]))) / np.maximum(ry + grow_mm, 0.55 * self.pitch_mm[1]).astype(np.float32)
        x = (x - (mirror * cx + np.float32(offset[1]))) / np.maximum(rx + grow_mm, 0.55 * self.pitch_mm[2]).astype(
            np.float32
        )
        return box, y * y + x * x < 1
