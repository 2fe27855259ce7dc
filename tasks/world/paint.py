"""Whole videos of the scale world on a CPU: the frames of `render.render`, several times faster.

`render.draw` works on every pixel of every frame, which suits a GPU. A file's frames are mostly
background that does not change, so this draws each background once and each object only inside its
own box, with render's formulas. A test holds the two equal to the byte.

Letters: T frames, H rows, W columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from internvideo3.tasks.world import difficulty as d
from internvideo3.tasks.world import render
from internvideo3.tasks.world.render import PALETTE, Tracks, tracks
from internvideo3.tasks.world.scenes import VideoSpec

_REACH: Final = 1.2
"""Half a box's side in radii; the farthest outline, a triangle's tip, is at 1.12."""
_BLUR_PX: Final = 2.0
"""What smoothing adds to a box's half side."""


def paint(
    spec: VideoSpec, times_s: Sequence[float] | NDArray[np.float64], size_px: int | None = None
) -> NDArray[np.uint8]:
    """Frames of a video at given times, equal to `render.render(spec, times_s, size_px)`.

    Args:
        spec: The video.
        times_s: Times in seconds.
        size_px: Side of the square frames; the spec's own size where it is None.

    Returns:
        Frames `[T,H,W,3]`, 8 bits a channel, RGB.
    """
    side = size_px or spec.size_px
    shown = tracks(spec, times_s)
    canvas = _Canvas(side)
    frames_THW3 = np.empty((len(times_s), side, side, 3), np.uint8)
    done: dict[tuple[bytes, ...], int] = {}
    for t in range(len(times_s)):
        one = Tracks(*(values[t : t + 1] for values in shown))
        twin = done.setdefault(tuple(values.tobytes() for values in one), t)
        frames_THW3[t] = frames_THW3[twin] if twin < t else canvas.frame(one)
    return frames_THW3


class _Canvas:
    """Draws single frames of one size; keeps the last background."""

    def __init__(self, side: int) -> None:
        self.side = side
        self.axis = (np.arange(side, dtype=np.float32) + 0.5) / side
        inside = np.minimum(self.axis, 1 - self.axis)
        self.border_HW = np.minimum(inside[:, None], inside[None]) < d.FLASH_BORDER
        self._key: tuple[bytes, ...] = ()
        self._background_HW3: NDArray[np.float64] = np.zeros(0)

    def frame(self, one: Tracks) -> NDArray[np.uint8]:
        """The picture `[H,W,3]` of one frame's tracks."""
        image_HW3 = self._background(one).copy()
        for k in range(one.object_NK5.shape[1]):
            if one.object_NK5[0, k, 3] > 0:
                self._draw_object(image_HW3, one, k)
        if one.flash_N[0] >= 0:
            image_HW3[self.border_HW] = PALETTE[one.flash_N[0]]
        return np.rint(image_HW3 * 255).astype(np.uint8)

    def _background(self, one: Tracks) -> NDArray[np.float64]:
        key = tuple(values.tobytes() for values in (one.place_N2, one.light_N3, one.sway_N2))
        if key != self._key:
            grey_HW = self._grey(one)
            self._background_HW3 = np.repeat(grey_HW[..., None], 3, axis=-1)
            self._key = key
        return self._background_HW3

    def _grey(self, one: Tracks) -> Any:
        """The background `[H,W]`; one texture where nothing fades, which is nearly always."""
        x_W, y_H = self.axis[None, None, :], self.axis[None, :, None]
        if one.light_N3[0, 2] < 1:
            return render._background(one, x_W, y_H, np)[0]
        x_1HW, y_1HW = x_W - one.sway_N2[0, 0], y_H - one.sway_N2[0, 1]
        return render._texture(one.place_N2[:, 0], x_1HW, y_1HW, np)[0] * one.light_N3[0, 0]

    def _draw_object(self, image_HW3: NDArray[np.float64], one: Tracks, k: int) -> None:
        x, y, radius, opacity, _ = one.object_NK5[0, k]
        x, y = x + one.sway_N2[0, 0], y + one.sway_N2[0, 1]
        rows, columns = self._box(y, radius), self._box(x, radius)
        dx_1HW = (self.axis[columns] - x)[None, None, :]
        dy_1HW = (self.axis[rows] - y)[None, :, None]
        edge_HW = render._edge(dx_1HW, dy_1HW, radius, one.kind_NK2[:, k, 0], np)[0]
        cover_HW1 = (np.clip(0.5 - edge_HW * self.side, 0, 1) * opacity)[..., None]
        patch_HW3 = image_HW3[rows, columns]
        patch_HW3 += cover_HW1 * (PALETTE[one.kind_NK2[0, k, 1]] - patch_HW3)

    def _box(self, centre: float, radius: float) -> slice:
        half = _REACH * float(radius) * self.side + _BLUR_PX
        middle = float(centre) * self.side
        return slice(max(0, int(middle - half)), max(0, int(middle + half) + 1))
