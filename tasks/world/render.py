"""Pixels of the scale world: a spec and times in, frames out.

The drawing is written once against the functions that numpy and torch share, so that the mp4 files
(numpy) and training batches on a GPU (torch) show the same world. Letters: N frames, K objects,
H/W pixels, C colour channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from internvideo3.tasks.world import difficulty as d
from internvideo3.tasks.world.scenes import Scene, VideoSpec

_COLOUR_ID = {name: index for index, name in enumerate(d.COLOURS)}
_SHAPE_ID = {name: index for index, name in enumerate(d.SHAPES)}
_PLACE_ID = {name: index for index, name in enumerate(d.PLACES)}
PALETTE: NDArray[np.float32] = np.array(list(d.COLOURS.values()), dtype=np.float32)

SLOTS = 8
"""Objects drawn in one frame at most: two scenes of four during a dissolve."""


class Tracks(NamedTuple):
    """What each frame shows, as arrays (numpy, or torch after `Tracks(*map(to_torch, t))`)."""

    object_NK5: Any
    """Per object: centre x, centre y, radius, opacity (0 = absent), and an unused zero."""
    kind_NK2: Any
    """Per object: shape index, colour index (integers)."""
    place_N2: Any
    """Place index of the new and of the fading scene (integers)."""
    light_N3: Any
    """Brightness of the new and the fading scene, and the new scene's share of the picture."""
    flash_N: Any
    """Colour index of the flashing frame, -1 where there is none."""
    sway_N2: Any
    """Camera offset x, y in picture widths."""


def frame_times(spec: VideoSpec, fps: float = d.FILE_FPS) -> NDArray[np.float64]:
    """Times in seconds of all frames of the file."""
    return np.arange(round(spec.length_s * fps)) / fps


def tracks(spec: VideoSpec, times_s: Sequence[float] | NDArray[np.float64]) -> Tracks:
    """What the video shows at the given times (seconds)."""
    count = len(times_s)
    object_NK5 = np.zeros((count, SLOTS, 5), dtype=np.float32)
    kind_NK2 = np.zeros((count, SLOTS, 2), dtype=np.int64)
    place_N2 = np.zeros((count, 2), dtype=np.int64)
    light_N3 = np.zeros((count, 3), dtype=np.float32)
    flash_N = np.full(count, -1, dtype=np.int64)
    sway_N2 = np.zeros((count, 2), dtype=np.float32)
    for n, time_s in enumerate(float(t) for t in times_s):
        index = _scene_index(spec, time_s)
        scene = spec.scenes[index]
        fading = _fading_scene(spec, index, time_s)
        share = 1.0 if fading is None else 0.5
        other = fading or scene
        place_N2[n] = _PLACE_ID[scene.place], _PLACE_ID[other.place]
        light_N3[n] = scene.brightness, other.brightness, share
        shown = [(t, share) for t in scene.things if t.enter_s <= time_s < t.leave_s]
        if fading is not None:
            shown += [(t, 1 - share) for t in fading.things if t.leave_s == fading.end_s]
        for k, (thing, opacity) in enumerate(shown):
            object_NK5[n, k, :4] = *thing.state(time_s), opacity
            kind_NK2[n, k] = _SHAPE_ID[thing.shape], _COLOUR_ID[thing.colour]
        if any(flash.start_s <= time_s < flash.end_s for flash in spec.flashes):
            flash_N[n] = _COLOUR_ID[spec.flash_colour]
        sway_N2[n] = spec.sway(time_s)
    return Tracks(object_NK5, kind_NK2, place_N2, light_N3, flash_N, sway_N2)


def _scene_index(spec: VideoSpec, time_s: float) -> int:
    for index, scene in enumerate(spec.scenes):
        if time_s < scene.end_s:
            return index
    return len(spec.scenes) - 1


def _fading_scene(spec: VideoSpec, index: int, time_s: float) -> Scene | None:
    """The previous scene while it still shines through: half a second after a dissolve starts."""
    scene = spec.scenes[index]
    if scene.dissolve_in and time_s < scene.start_s + 0.5:
        return spec.scenes[index - 1]
    return None


def render(
    spec: VideoSpec,
    times_s: Sequence[float] | NDArray[np.float64],
    size_px: int | None = None,
) -> NDArray[np.uint8]:
    """Frames of a video at given times.

    Args:
        spec: The video.
        times_s: Times in seconds.
        size_px: Side of the square frames; the spec's own size where it is None.

    Returns:
        Frames `[N,H,W,3]`, 8 bits a channel, RGB.
    """
    side = size_px or spec.size_px
    pieces = [
        draw(tracks(spec, times_s[start : start + 64]), side, np)
        for start in range(0, len(times_s), 64)
    ]
    frames_NHWC: NDArray[np.uint8] = np.rint(np.concatenate(pieces) * 255).astype(np.uint8)
    return frames_NHWC


def draw(shown: Tracks, size_px: int, xp: Any) -> Any:
    """Frames `[N,H,W,3]` in 0-1 of what the tracks show.

    Args:
        shown: Arrays of the module `xp`.
        size_px: Side of the square frames.
        xp: `numpy` or `torch`.
    """
    like = shown.object_NK5
    axis = (_arange(size_px, like, xp) + 0.5) / size_px
    x_W, y_H = axis[None, None, :], axis[None, :, None]
    image_NHWC = _background(shown, x_W, y_H, xp)[..., None] * xp.ones_like(like[:1, :1, None, :3])
    sway_N2 = shown.sway_N2
    palette = _asarray(PALETTE, like, xp)
    for k in range(_used_slots(like)):
        object_N5 = like[:, k]
        dx_NHW = x_W - (object_N5[:, 0] + sway_N2[:, 0])[:, None, None]
        dy_NHW = y_H - (object_N5[:, 1] + sway_N2[:, 1])[:, None, None]
        radius_N = xp.maximum(object_N5[:, 2], 0 * object_N5[:, 2] + 1e-3)
        edge_NHW = _edge(dx_NHW, dy_NHW, radius_N[:, None, None], shown.kind_NK2[:, k, 0], xp)
        cover_NHW = _clip01(0.5 - edge_NHW * size_px, xp) * object_N5[:, 3][:, None, None]
        colour_N3 = palette[shown.kind_NK2[:, k, 1]]
        image_NHWC = image_NHWC + cover_NHW[..., None] * (colour_N3[:, None, None] - image_NHWC)
    inside_HW = xp.minimum(xp.minimum(x_W, 1 - x_W), xp.minimum(y_H, 1 - y_H))
    frame_NHW = (inside_HW < d.FLASH_BORDER) & (shown.flash_N >= 0)[:, None, None]
    flash_N3 = palette[shown.flash_N * (shown.flash_N >= 0)]
    return xp.where(frame_NHW[..., None], flash_N3[:, None, None], image_NHWC)


def _background(shown: Tracks, x_W: Any, y_H: Any, xp: Any) -> Any:
    x_NHW = x_W - shown.sway_N2[:, 0][:, None, None]
    y_NHW = y_H - shown.sway_N2[:, 1][:, None, None]
    new_NHW = _texture(shown.place_N2[:, 0], x_NHW, y_NHW, xp) * shown.light_N3[:, 0][:, None, None]
    old_NHW = _texture(shown.place_N2[:, 1], x_NHW, y_NHW, xp) * shown.light_N3[:, 1][:, None, None]
    share_NHW = shown.light_N3[:, 2][:, None, None]
    return share_NHW * new_NHW + (1 - share_NHW) * old_NHW


def _texture(place_N: Any, x_NHW: Any, y_NHW: Any, xp: Any) -> Any:
    """Grey factor around 1 of each place, `[N,H,W]`."""
    wave = 2 * np.pi
    place_NHW = place_N[:, None, None]
    rows = xp.sin(wave * 6 * y_NHW) + 0 * x_NHW
    columns = xp.sin(wave * 6 * x_NHW) + 0 * y_NHW
    waves = xp.sin(wave * 4 * (x_NHW + y_NHW))
    pattern = xp.where(place_NHW == 1, _square(rows), 0 * rows)
    pattern = xp.where(place_NHW == 2, _square(rows) * _square(columns), pattern)
    pattern = xp.where(place_NHW == 3, _square(rows * columns - 0.45), pattern)
    pattern = xp.where(place_NHW == 4, waves, pattern)
    return 1 + 0.45 * pattern


def _square(value: Any) -> Any:
    """Sign as -1 or 1."""
    return 2.0 * (value > 0) - 1.0


def _edge(dx: Any, dy: Any, radius: Any, shape_N: Any, xp: Any) -> Any:
    """Signed distance to each shape's outline in picture widths, negative inside; `[N,H,W]`."""
    ax, ay = xp.abs(dx), xp.abs(dy)
    far = xp.sqrt(dx * dx + dy * dy)
    circle = far - radius
    square = xp.maximum(ax, ay) - 0.85 * radius
    diamond = (ax + ay) * 0.7071 - 0.78 * radius
    triangle = xp.maximum(dy - 0.7 * radius, 0.894 * ax - 0.447 * dy - 0.5 * radius)
    arm = 0.36 * radius
    cross = xp.minimum(xp.maximum(ax - radius, ay - arm), xp.maximum(ay - radius, ax - arm))
    ring = xp.abs(far - 0.75 * radius) - 0.25 * radius
    by_id = (circle, square, triangle, cross, ring, diamond)
    chosen = circle
    for index in range(1, len(by_id)):
        chosen = xp.where((shape_N == index)[:, None, None], by_id[index], chosen)
    return chosen


def _used_slots(object_NK5: Any) -> int:
    """How many slots any frame uses; objects fill the slots from the front."""
    return int((object_NK5[:, :, 3] > 0).any(0).sum())


def _clip01(value: Any, xp: Any) -> Any:
    return xp.minimum(xp.maximum(value, 0 * value), 0 * value + 1)


def _arange(count: int, like: Any, xp: Any) -> Any:
    if xp is np:
        return np.arange(count, dtype=like.dtype)
    return xp.arange(count, dtype=like.dtype, device=like.device)


def _asarray(value: NDArray[np.float32], like: Any, xp: Any) -> Any:
    if xp is np:
        return value
    return xp.as_tensor(value, dtype=like.dtype, device=like.device)
