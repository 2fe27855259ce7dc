"""Scene-aware splitting (section 4.2.1): clips that never cross a cut."""

from __future__ import annotations

import math
from collections.abc import Sequence

from internvideo3.training.curation.records import Clip, DataError

SHORTEST_S = 1.0
LONGEST_S = 20.0


def clips_of(
    changes_s: Sequence[float],
    duration_s: float,
    shortest_s: float = SHORTEST_S,
    longest_s: float = LONGEST_S,
) -> tuple[Clip, ...]:
    """Cut a video where its scenes change.

    A scene shorter than `shortest_s` joins the one before it (the first one, the one after it): a
    flicker is no scene. A longer scene than `longest_s` becomes equal clips of one scene.

    Args:
        changes_s: Times of the changes, in any order; those outside of the video are left out.
        duration_s: Length of the video.
        shortest_s: Shortest scene.
        longest_s: Longest clip.

    Raises:
        DataError: The video has no length, or the limits make no sense.
    """
    if duration_s <= 0 or not 0 < shortest_s <= longest_s:
        raise DataError(
            f"cannot split {duration_s:g} s into clips of {shortest_s:g} to {longest_s:g} s"
        )
    ends = [0.0]
    for change in sorted(set(changes_s)):
        if change - ends[-1] >= shortest_s and duration_s - change >= shortest_s:
            ends.append(change)
    ends.append(duration_s)
    clips: list[Clip] = []
    for scene, (start, end) in enumerate(zip(ends, ends[1:], strict=False)):
        count = math.ceil((end - start) / longest_s - 1e-9)
        step = (end - start) / count
        clips += [
            Clip(scene=scene, start_s=start + n * step, end_s=start + (n + 1) * step)
            for n in range(count)
        ]
    return tuple(clips)
