"""Many points into one picture, in a few milliseconds: numpy writes the pixels, Qt only shows them.

A scatter item draws a picture for each point: 33 ms of a processor for 65,536 of them in one
colour, more in several. Here each pixel of a disc is one assignment for all points at once: 5 ms.
"""

from __future__ import annotations

from functools import cache

import numpy as np

PAD = 16  # pixels around the picture, so that discs at its edge need no clipping
LARGEST = 7.0  # radius of a point in pixels; below `PAD` with its ring


class Canvas:
    """A picture of `width` x `height` pixels, 0xffRRGGBB, with a margin of `PAD`."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = max(width, 1), max(height, 1)
        self.stride = self.width + 2 * PAD
        self.pixels = np.zeros((self.height + 2 * PAD, self.stride), np.uint32)

    @property
    def picture(self) -> np.ndarray:
        """uint32 [height, width], without the margin."""
        return self.pixels[PAD:-PAD, PAD:-PAD]

    def clear(self, colour: int) -> None:
        self.pixels.fill(colour)

    def place(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(which points can be seen, the pixel of each of those) of points at `x`, `y` [n]."""
        inside = (x > -PAD / 2) & (x < self.width + PAD / 2)
        inside &= (y > -PAD / 2) & (y < self.height + PAD / 2)
        seen = np.flatnonzero(inside)
        column = np.floor(x[seen]).astype(np.int64) + PAD
        row = np.floor(y[seen]).astype(np.int64) + PAD
        return seen, row * self.stride + column

    def discs(self, pixels: np.ndarray, colours: np.ndarray, soft: np.ndarray, r: float) -> None:
        """A disc of radius `r` at each of `pixels` [n]; its rim in the colours `soft` [n], under
        the cores of all."""
        flat = self.pixels.ravel()
        core, rim = disc(r)
        for dy, dx in rim:
            flat[pixels + (dy * self.stride + dx)] = soft
        for dy, dx in core:
            flat[pixels + (dy * self.stride + dx)] = colours

    def rings(self, pixels: np.ndarray, colour: int, r: float, corners: bool = False) -> None:
        """A ring around each of `pixels`, with `corners` a diamond: told by its shape."""
        flat = self.pixels.ravel()
        for dy, dx in ring(r, corners):
            flat[pixels + (dy * self.stride + dx)] = colour


@cache
def disc(r: float) -> tuple[tuple[tuple[int, int], ...], tuple[tuple[int, int], ...]]:
    """Offsets (dy, dx) of a disc's core and of its rim."""
    reach = int(r + 1)
    core, rim = [], []
    for dy in range(-reach, reach + 1):
        for dx in range(-reach, reach + 1):
            distance = (dx * dx + dy * dy) ** 0.5
            if distance <= r - 0.35:
                core.append((dy, dx))
            elif distance <= r + 0.45:
                rim.append((dy, dx))
    return tuple(core or [(0, 0)]), tuple(rim)


@cache
def ring(r: float, corners: bool) -> tuple[tuple[int, int], ...]:
    reach = int(r + 2)
    found = []
    for dy in range(-reach, reach + 1):
        for dx in range(-reach, reach + 1):
            distance = abs(dx) + abs(dy) if corners else (dx * dx + dy * dy) ** 0.5
            if r - (0.5 if corners else 0.8) <= distance <= r + (0.5 if corners else 0.8):
                found.append((dy, dx))
    return tuple(found)


def softened(palette: np.ndarray, background: int, share: float = 0.45) -> np.ndarray:
    """uint32, each colour at this opacity on the background."""
    found = np.full(palette.shape, 0xFF000000, np.uint32)
    for shift in (0, 8, 16):
        over = (palette >> np.uint32(shift)) & np.uint32(0xFF)
        under = (background >> shift) & 0xFF
        mixed = np.round(over * share + under * (1 - share)).astype(np.uint32)
        found |= mixed << np.uint32(shift)
    return found


def inside(x: np.ndarray, y: np.ndarray, polygon: np.ndarray) -> np.ndarray:
    """Bool [n]: whether each point is inside the polygon [m, 2], by the even-odd rule."""
    found = np.zeros(len(x), bool)
    if len(polygon) < 3:
        return found
    low, high = polygon.min(axis=0), polygon.max(axis=0)
    near = np.flatnonzero((x >= low[0]) & (x <= high[0]) & (y >= low[1]) & (y <= high[1]))
    px, py = x[near].astype(np.float64), y[near].astype(np.float64)
    odd = np.zeros(len(near), bool)
    before = polygon[-1].astype(np.float64)
    for corner in polygon.astype(np.float64):
        (x0, y0), (x1, y1) = before, corner
        if y0 != y1:
            crosses = (y0 > py) != (y1 > py)
            odd ^= crosses & (px < x0 + (py - y0) * (x1 - x0) / (y1 - y0))
        before = corner
    found[near] = odd
    return found
