"""Names of videos by what they show, so that a copy at another size or bit rate is found.

The steps in brightness from each patch of a small grey picture to the one on its right, for a few
frames. Two videos are one where these steps correlate almost perfectly: re-encoding and scaling
hardly change them.

Axes: T frames, H rows, W columns, S steps, F first videos of their kind.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from PIL import Image

FRAMES = 8
SIDE = 8
ALIKE = 0.9
"""Correlation. Of 80 videos of the scale world no two reached 0.5, and no copy at 60 kbit/s and
three quarters of the size fell below 0.98."""

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
    """Whether two fingerprints are of one video."""
    return likeness(a_S, b_S) >= ALIKE


def named(prints: Mapping[str, Steps]) -> dict[str, str]:
    """Each video → the first video that shows the same."""
    names: dict[str, str] = {}
    firsts: list[str] = []
    for key, mine_S in prints.items():
        twin = next((first for first in firsts if same(prints[first], mine_S)), None)
        if twin is None:
            firsts.append(key)
        names[key] = twin or key
    return names
