"""Names of videos by what they show, so that a copy at another size or bit rate is found.

The steps in brightness from each patch of a small grey picture to the one on its right, for a few
frames. Two videos are one where these steps correlate almost perfectly: re-encoding and scaling
hardly change them. What a fixed camera sees all the time would alone make its clips alike, so what
moves before it is compared as well.

Axes: T frames, H rows, W columns, S steps, V videos, B those of a block,
F first ones of their kind.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

FRAMES = 8
SIDE = 8
ALIKE = 0.9
"""Correlation. Of 80 videos of the scale world no two reached 0.7, and no copy at 60 kbit/s fell
below 0.99; with every third frame left out as well 79 of the 80 reached this."""
MOVES = 0.005
"""Share of a fingerprint's energy that changes with time, from which a video moves; coarse noise of
a still one has a fiftieth of it."""
ALIKE_MOVING = 0.5
"""Correlation of what changes, where a video moves: 0.81 and more for the same copies, 0.65 and
more for clips that begin a second later, and below 0.5 for 460 of 466 pairs of different clips of
one drawn camera that `ALIKE` alone took for one video."""

CLOSE = 1e-4
"""More than the rounding by which a matrix product and `likeness` differ."""
BLOCK, COLUMNS = 1024, 16384
"""Videos and first ones that are compared at once, in 64 MiB."""

Steps = NDArray[np.float32]


def fingerprint(pixels_THWC: NDArray[np.uint8]) -> Steps:
    """Steps of `FRAMES` frames spread evenly over a video, `[S]`."""
    chosen = np.linspace(0, len(pixels_THWC) - 1, FRAMES).round().astype(int)
    rows = []
    for index in chosen:
        grey = Image.fromarray(pixels_THWC[index]).convert("L")
        small = np.asarray(grey.resize((SIDE + 1, SIDE), Image.Resampling.BOX), np.float32)
        rows.append((small[:, :-1] - small[:, 1:]).ravel())
    return np.concatenate(rows)


def likeness(a_S: Steps, b_S: Steps) -> float:
    """Correlation of two fingerprints; of blank videos 1 with each other and 0 with others."""
    norm_a, norm_b = float(np.linalg.norm(a_S)), float(np.linalg.norm(b_S))
    if norm_a == 0 or norm_b == 0:
        return float(norm_a == norm_b)
    return float(a_S @ b_S) / (norm_a * norm_b)


def same(a_S: Steps, b_S: Steps) -> bool:
    """Whether two fingerprints are of one video: alike in all, and in what moves if much does."""
    if likeness(a_S, b_S) < ALIKE:
        return False
    moving_a, moving_b = _moving(a_S), _moving(b_S)
    moves = any(
        np.linalg.norm(moving) ** 2 >= MOVES * np.linalg.norm(whole) ** 2 > 0
        for moving, whole in ((moving_a, a_S), (moving_b, b_S))
    )
    return not moves or likeness(moving_a, moving_b) >= ALIKE_MOVING


def _moving(steps_S: Steps) -> Steps:
    """Steps of each frame without those of the mean frame."""
    frames_TS = steps_S.reshape(FRAMES, -1)
    moving_TS: Steps = frames_TS - frames_TS.mean(0)
    return moving_TS.ravel()


def named(prints: Mapping[str, Steps]) -> dict[str, str]:
    """Each video → the first video that shows the same.

    A matrix product finds the pairs that may be alike, `same` decides them: the result is that of
    asking `same` of every video and the first ones before it, in turn.
    """
    keys, steps = list(prints), list(prints.values())
    unit_VS = _unit(steps)
    unit_FS = np.empty_like(unit_VS)
    firsts: list[int] = []
    blanks: list[int] = []
    first_of: list[int] = []
    for start in range(0, len(keys), BLOCK):
        block_BS = unit_VS[start : start + BLOCK]
        earlier = _near(block_BS, unit_FS[: len(firsts)])
        within_BB = block_BS @ block_BS.T >= ALIKE - CLOSE
        for place, mine_S in enumerate(steps[start : start + BLOCK]):
            near = [firsts[one] for one in earlier.get(place, ())]
            inside = (start + int(one) for one in np.flatnonzero(within_BB[place, :place]))
            near += [one for one in inside if first_of[one] == one]
            kind = near if block_BS[place].any() else blanks
            twin = next((one for one in kind if same(steps[one], mine_S)), None)
            if twin is None:
                unit_FS[len(firsts)] = block_BS[place]
                firsts.append(start + place)
            first_of.append(start + place if twin is None else twin)
            blanks += [start + place] if kind is blanks else []
    return {key: keys[first] for key, first in zip(keys, first_of, strict=True)}


def shown_in(prints: Mapping[str, Steps], others: Mapping[str, Steps]) -> dict[str, str]:
    """Each video that shows what one of the others does → the first such other.

    Every pair is compared: that two show the same as a third does not mean that they do.
    """
    keys, theirs = list(others), list(others.values())
    unit_FS = _unit(theirs)
    blanks = [place for place, steps in enumerate(theirs) if not steps.any()]
    names, mine = list(prints), list(prints.values())
    unit_VS = _unit(mine)
    found: dict[str, str] = {}
    for start in range(0, len(mine) if keys else 0, BLOCK):
        near = _near(unit_VS[start : start + BLOCK], unit_FS)
        for place, steps in enumerate(mine[start : start + BLOCK]):
            those = near.get(place, []) if steps.any() else blanks
            twin = next((one for one in those if same(theirs[one], steps)), None)
            if twin is not None:
                found[names[start + place]] = keys[twin]
    return found


def _unit(steps: Sequence[Steps]) -> NDArray[np.float32]:
    """Fingerprints of length 1, `[V,S]`; of blank videos 0."""
    if not steps:
        return np.zeros((0, 0), np.float32)
    all_VS = np.stack(steps).astype(np.float32)
    norm_V1 = np.linalg.norm(all_VS, axis=1, keepdims=True)
    return (all_VS / np.where(norm_V1 > 0, norm_V1, 1)).astype(np.float32, copy=False)


def _near(block_BS: NDArray[np.float32], unit_FS: NDArray[np.float32]) -> dict[int, list[int]]:
    """Place in a block → the first videos that may be alike, in their order."""
    found: dict[int, list[int]] = {}
    for start in range(0, len(unit_FS), COLUMNS):
        near_BF = block_BS @ unit_FS[start : start + COLUMNS].T >= ALIKE - CLOSE
        for place, first in np.argwhere(near_BF):
            found.setdefault(int(place), []).append(start + int(first))
    return found
