"""Subtitles between pictures: the order and the pictures of LongVideoBench's own loader.

Run with: pytest tests/tasks/test_interleaved.py -q.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from internvideo3.tasks.benchmarks import interleaved
from internvideo3.tasks.benchmarks.interleaved import Cue, interleave, read_cues
from internvideo3.tasks.sampling import step_indices
from internvideo3.tasks.video import VideoError, read_frames
from internvideo3.tasks.world.media import encode_video

TIMES = st.floats(0, 60).map(lambda seconds: round(seconds, 1))
CUES = st.lists(st.tuples(TIMES, st.sampled_from([0.0, 0.2, 0.9, 1.0, 3.5, 12.0])), max_size=8)


@settings(max_examples=150, deadline=None)
@given(cues=CUES, times=st.lists(TIMES, max_size=8, unique=True).map(sorted), start=st.just(0.5))
def test_the_order_is_that_of_lmms_evals_copy_of_the_loader(
    cues: list[tuple[float, float]], times: list[float], start: float
) -> None:
    from lmms_eval.tasks.longvideobench.utils import insert_subtitles_into_frames

    rows = [
        {"timestamp": [begin, float(begin + long)], "text": f"cue {number}"}
        for number, (begin, long) in enumerate(cues)
    ]
    theirs = insert_subtitles_into_frames(times, rows, start, 60.0).split("\n")
    moved = [
        Cue(b - start, float(b + long) - start, f"cue {n}") for n, (b, long) in enumerate(cues)
    ]
    ours = list(interleave(times, moved))
    assert ["<image>" if isinstance(one, int) else one for one in ours] == [*filter(None, theirs)]
    assert [one for one in ours if isinstance(one, int)] == list(range(len(times)))


def test_both_published_layouts_are_read(tmp_path: Path) -> None:
    file = tmp_path / "cues.json"
    clocks = {"start": "00:01:02.500", "end": "00:01:04.000", "line": "Look."}
    seconds = {"timestamp": [61.0, None], "text": "No end."}
    file.write_text(json.dumps([clocks, seconds]))
    assert read_cues(file, 60.0, 90.0) == [Cue(2.5, 4.0, "Look."), Cue(1.0, 30.0, "No end.")]


@pytest.mark.parametrize("content", ['{"a": 1}', "[1]", '[{"start": "1", "end": "2", "line": ""}]',
                                     "["])  # fmt: skip
def test_another_layout_names_the_file(content: str, tmp_path: Path) -> None:
    (tmp_path / "cues.json").write_text(content)
    with pytest.raises(ValueError, match=r"cues\.json holds no subtitles"):
        read_cues(tmp_path / "cues.json", 0.0, 9.0)


@pytest.mark.parametrize(
    ("total", "fps", "most", "length_s", "expected"),
    [
        (250, 25.0, 4, 10.0, (0, 62, 124, 186)),
        (250, 25.0, 64, 10.0, tuple(range(0, 250, 25))),
        (75, 29.97, 64, 2.6, (0, 38)),
        # The annotated length is longer than the file.
        (50, 25.0, 4, 10.0, (0,)),
    ],
)
def test_pictures_stand_at_equal_whole_steps(
    total: int, fps: float, most: int, length_s: float, expected: tuple[int, ...]
) -> None:
    assert step_indices(total, fps, max_frames=most, length_s=length_s) == expected


def test_the_commands_limit_of_decoding_holds_for_pictures_too(tmp_path: Path) -> None:
    file = tmp_path / "clip.mp4"
    file.write_bytes(encode_video(np.zeros((24, 64, 64, 3), np.uint8), fps=8))
    between = {"max_frames": 4, "length_s": 3.0, "path": "none", "starts_at_s": 0.0}
    doc = {"iv3_between": json.dumps(between), "iv3_media": json.dumps([str(file)])}
    with pytest.raises(VideoError, match="reached its time limit of 1e-06 s"):
        interleaved.doc_to_messages(doc | {"iv3_decode_limit_s": 1e-6})


def test_pictures_are_decoded_at_those_steps(tmp_path: Path) -> None:
    file = tmp_path / "clip.mp4"
    pixels_THWC = np.repeat(np.arange(0, 240, 10, dtype=np.uint8), 64 * 64 * 3)
    file.write_bytes(encode_video(pixels_THWC.reshape(24, 64, 64, 3), fps=8))
    found: Any = read_frames(file, max_frames=5, steps_over_s=3.0)
    assert found.indices == (0, 8, 16)
    assert found.pixels_THWC.mean(axis=(1, 2, 3)) == pytest.approx([0, 80, 160], abs=4)
    with pytest.raises(ValueError, match="no whole second"):
        read_frames(file, steps_over_s=0.5)
