"""A video as single pictures with its subtitles between them, as LongVideoBench's loader has it.

Source: longvideobench/LongVideoBench@2aa4f91:longvideobench/longvideobench_dataset.py
(`load_video`, `insert_subtitles_into_frames`). A cue stands behind the last picture that is not
later than the cue's middle, and only if some picture lies within the cue, which counts as at least
one second.
"""

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from internvideo3.tasks.decoder import IsolatedReader

SHORTEST_S = 1.0
"""A shorter cue counts as this long around its middle."""


class Cue(NamedTuple):
    """A subtitle; times in seconds of the video."""

    start_s: float
    end_s: float
    text: str


def read_cues(path: Path, starts_at_s: float, length_s: float, *, whole: bool = False) -> list[Cue]:
    """The subtitles of a file in either of the two published layouts.

    Args:
        path: JSON: a list of `{start, end, line}` with clock times or of `{timestamp, text}` with
            seconds.
        starts_at_s: where the video starts in the time of its subtitles.
        length_s: the video's length, which ends a cue without an end.
        whole: whether ends that are whole numbers count; officially they are none.

    Raises:
        ValueError: the file is in another layout.
        OSError: it cannot be read.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        return [_cue(row, starts_at_s, length_s, (float, int) if whole else float) for row in rows]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} holds no subtitles in a published layout: {error!r}") from error


def _cue(
    row: Mapping[str, Any], starts_at_s: float, length_s: float, ends: type | tuple[type, ...]
) -> Cue:
    if "timestamp" in row:
        start_s, end_s = row["timestamp"]
        end_s = end_s if isinstance(end_s, ends) else length_s
        text = row["text"]
    else:
        start_s, end_s, text = _clock_s(row["start"]), _clock_s(row["end"]), row["line"]
    return Cue(float(start_s) - starts_at_s, float(end_s) - starts_at_s, str(text))


def _clock_s(clock: str) -> float:
    hours, minutes, seconds = clock.split(":")
    return 3600 * int(hours) + 60 * int(minutes) + float(seconds)


def interleave(times_s: Sequence[float], cues: Sequence[Cue]) -> Iterator[int | str]:
    """Numbers of pictures and texts of cues, in the order in which they are shown.

    Args:
        times_s: times of the pictures, ascending.
        cues: the subtitles, in the file's order.
    """
    shown = 0
    for cue in cues:
        middle_s = (cue.start_s + cue.end_s) / 2
        while shown < len(times_s) and times_s[shown] <= middle_s:
            yield shown
            shown += 1
        start_s, end_s = cue.start_s, cue.end_s
        if end_s - start_s < SHORTEST_S:
            start_s, end_s = middle_s - SHORTEST_S / 2, middle_s + SHORTEST_S / 2
        if any(start_s < time_s < end_s for time_s in times_s):
            yield cue.text
    yield from range(shown, len(times_s))


def doc_to_messages(
    doc: Mapping[str, Any], lmms_eval_specific_kwargs: Mapping[str, Any] | None = None
) -> list[dict[str, Any]]:
    """A user's turn: pictures and subtitles in the order of time, then the question.

    Raises:
        VideoError: the video cannot be read.
        ValueError: the subtitles are in another layout.
        OSError: the subtitles cannot be read.
    """
    from PIL import Image

    between = json.loads(doc["iv3_between"])
    video = doc.get("iv3_shown") or json.loads(doc["iv3_media"])[0]
    frames = _reader().read(
        video,
        max_frames=int(doc.get("iv3_max_frames") or between["max_frames"]),
        steps_over_s=between["length_s"],
        time_limit_s=doc.get("iv3_decode_limit_s"),
    )
    times_s = [index / frames.source_fps for index in frames.indices]
    cues = read_cues(Path(between["path"]), between["starts_at_s"], between["length_s"])
    content: list[dict[str, Any]] = [
        {"type": "text", "text": f"{part}\n"}
        if isinstance(part, str)
        else {"type": "image", "url": Image.fromarray(frames.pixels_THWC[part])}
        for part in interleave(times_s, cues)
    ]
    content.append({"type": "text", "text": str(doc["iv3_prompt"])})
    return [{"role": "user", "content": content}]


@functools.cache
def _reader() -> IsolatedReader:
    """One decoding process for all documents; it ends with this one."""
    return IsolatedReader()
