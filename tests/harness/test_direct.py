"""Answering by groups: what the model is shown, how often a video is read, which batches form.

pytest tests/harness/test_direct.py
"""

import hashlib
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from qwen_vl_utils import process_vision_info

from internvideo3.harness.direct import Answerer, Clip, Question, decoders, shuffle_frames
from internvideo3.harness.settings import Settings, pixel_range
from internvideo3.model.fitting import fit_frames, fit_pixels
from internvideo3.tasks.decoder import IsolatedReader
from internvideo3.tasks.video import Frames, read_frames

SCALE = Settings(min_pixels=4096, max_pixels=4096, max_new_tokens=4)


@pytest.fixture(scope="module")
def answerer(checkpoint: Path) -> Answerer:
    import torch

    from internvideo3.model.checkpoint import load_model

    torch.set_num_threads(1)
    return Answerer(*load_model(checkpoint, "cpu", "float32"), SCALE)


def ask(key: str, video: Path, text: str = "What is it?") -> Question:
    content = [{"type": "video"}, {"type": "text", "text": f"{text} {key}"}]
    return Question(
        id=key,
        messages=({"role": "user", "content": content},),
        clips=(Clip(path=str(video)),),
        max_new_tokens=2,
    )


def videos(world: Path) -> list[Path]:
    return sorted((world / "test/videos").glob("world_short-*.mp4"))


def a_video(height: int, width: int) -> Frames:
    pixels = np.random.default_rng(0).integers(0, 256, (4, height, width, 3), dtype=np.uint8)
    return Frames(pixels, (0, 1, 2, 3), 2.0, 4, 2.0, "digest")


@pytest.mark.parametrize("budget", [(4096, 4096), (4096, 65536), (262144, 262144), (3000, 9000)])
def test_frames_have_the_pixels_of_stock(world: Path, budget: tuple[int, int]) -> None:
    for video in videos(world):
        part = {"type": "video", "video": str(video), "fps": 2.0, "max_frames": 768}
        part |= {"min_pixels": budget[0], "max_pixels": budget[1]}
        _, (expected_TCHW,) = process_vision_info(
            [{"role": "user", "content": [part]}], image_patch_size=16
        )
        fitted = fit_frames(
            read_frames(video), factor=32, min_pixels=budget[0], max_pixels=budget[1]
        )
        ours_TCHW = fitted.pixels_THWC.transpose(0, 3, 1, 2)
        assert np.array_equal(ours_TCHW, expected_TCHW.numpy())


@settings(max_examples=40, deadline=None)
@given(st.integers(16, 400), st.integers(16, 400), st.integers(1, 40), st.booleans())
def test_fitted_sides_are_whole_patches_and_keep_to_the_budget(
    height: int, width: int, patches: int, shrink: bool
) -> None:
    budget = patches * 32 * 32
    low, high = (32 * 32, budget) if shrink else (budget, 10**9)
    fitted = fit_frames(a_video(height, width), factor=32, min_pixels=low, max_pixels=high)
    rows, columns = fitted.pixels_THWC.shape[1:3]
    assert rows % 32 == 0 and columns % 32 == 0
    if shrink:
        # A side is never less than one patch, whatever the budget.
        assert rows * columns <= budget or 32 in (rows, columns)
    else:
        assert rows * columns >= budget
    assert fitted.indices == (0, 1, 2, 3) and fitted.source_fps == 2.0


@pytest.mark.parametrize(("height", "width"), [(65, 97), (240, 426), (360, 640), (1080, 1920)])
def test_frames_fitted_a_few_at_a_time_have_the_same_bits(height: int, width: int) -> None:
    pixels_THWC = np.random.default_rng(0).integers(0, 256, (7, height, width, 3), np.uint8)
    for budget in (4096, 60_000, 786_432):
        how = {"factor": 32, "min_pixels": budget, "max_pixels": budget}
        whole = fit_pixels(pixels_THWC, **how)
        for size in (1, 2, 5):
            parts = [fit_pixels(pixels_THWC[at : at + size], **how) for at in range(0, 7, size)]
            assert np.array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 8])
def test_shuffled_frames_are_never_in_their_own_order(count: int) -> None:
    """By chance half of all pairs were. What is on record besides is as it was."""
    pixels_THWC = np.arange(count, dtype=np.uint8)[:, None, None, None].repeat(3, 3)
    orders = set()
    for seed in range(500):
        digest = hashlib.sha256(str(seed).encode()).hexdigest()
        frames = Frames(pixels_THWC, tuple(range(count)), 2.0, count, count / 2, digest)
        order = shuffle_frames(frames).pixels_THWC[:, 0, 0, 0].tolist()
        drawn = np.random.default_rng(int(digest[:16], 16)).permutation(count).tolist()
        assert sorted(order) == list(range(count))
        assert order == drawn if drawn != sorted(drawn) else count == 1 or order != drawn
        orders.add(tuple(order))
    assert len(orders) > 1 or count < 3


def test_uneven_frame_times_are_noted(answerer: Answerer, world: Path, tmp_path: Path) -> None:
    """The model is told a frame's number by the average rate, as the stock class tells it."""
    path = tmp_path / "uneven.mp4"
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=8)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for t in range(40):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), t, np.uint8), format="rgb24")
            frame.pts = 40 * t if t < 20 else 800 + 400 * (t - 20)
            frame.time_base = Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    (uneven,), (even,) = answerer.answer([ask("a", path), ask("b", videos(world)[0])])
    assert uneven.error is None and even.notes == ()
    assert len(uneven.notes) == 1 and uneven.notes[0].startswith("uneven frame times")


def test_each_video_is_read_and_encoded_once(
    answerer: Answerer, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    encoded: list[int] = []
    visual = answerer.model.model.visual.forward

    def counting_read(_: IsolatedReader, path: str, **options: Any) -> Frames:
        read.append(path)
        return read_frames(path, **options)

    def counting_encode(*args: Any, **options: Any) -> Any:
        encoded.append(1)
        return visual(*args, **options)

    monkeypatch.setattr(IsolatedReader, "read", counting_read)
    monkeypatch.setattr(answerer.model.model.visual, "forward", counting_encode)
    one, two = videos(world)[:2]
    questions = [ask("a", one), ask("b", two), ask("c", one), ask("d", two), ask("e", one)]
    batches = list(answerer.answer(questions))
    assert [[outcome.question.id for outcome in batch] for batch in batches] == [
        ["a", "c", "e"],
        ["b", "d"],
    ]
    assert read == [str(one), str(two)] and len(encoded) == 2
    assert all(outcome.error is None for batch in batches for outcome in batch)


def test_what_is_known_leaves_the_other_batches_as_they_were(
    answerer: Answerer, world: Path
) -> None:
    small = Answerer(answerer.model, answerer.processor, replace(SCALE, batch=2))
    one, two = videos(world)[:2]
    questions = [ask(key, one) for key in "abcde"] + [ask("f", two)]
    known = {"c", "d", "f"}
    batches = list(small.answer(questions, known.__contains__))
    assert [[one.question.id for one in batch] for batch in batches] == [["a", "b"], ["e"]]


def test_the_command_goes_before_the_task_for_the_length_of_answers(
    answerer: Answerer, world: Path
) -> None:
    question = ask("a", videos(world)[0])
    by_task = Answerer(answerer.model, answerer.processor, replace(SCALE, max_new_tokens=None))
    ((long,),) = answerer.answer([question])
    ((short,),) = by_task.answer([question])
    assert long.reply and short.reply
    assert short.reply.new_tokens <= 2
    assert long.reply.token_ids[: short.reply.new_tokens] == short.reply.token_ids


def test_a_question_without_video_needs_none(answerer: Answerer) -> None:
    content = [{"type": "text", "text": "Say something."}]
    question = Question(id="t", messages=({"role": "user", "content": content},))
    ((outcome,),) = answerer.answer([question])
    assert outcome.error is None and outcome.reply and outcome.seconds.encode_s == 0


def test_frame_sizes_come_from_the_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    assert pixel_range(checkpoint) == (4096, 4096)
    assert pixel_range(tmp_path) == (262144, 262144)
    large = '{"size": {"shortest_edge": 65536, "longest_edge": 16777216}}'
    (tmp_path / "preprocessor_config.json").write_text(large)
    assert pixel_range(tmp_path) == (65536, 262144)
    assert pixel_range(tmp_path, 1024, 2048) == (1024, 2048)
    with pytest.raises(ValueError, match="at least 9000 and at most 5000"):
        pixel_range(tmp_path, 9000, 5000)


@pytest.mark.parametrize("ahead", [1, 3])
def test_videos_are_decoded_ahead_and_never_more_than_that(
    answerer: Answerer, ahead: int, world: Path
) -> None:
    shown = videos(world)
    questions = [ask(f"{number}", shown[number % len(shown)]) for number in range(8)]
    one_by_one = {o.question.id: o.reply for batch in answerer.answer(questions) for o in batch}
    several = Answerer(answerer.model, answerer.processor, SCALE, ahead=ahead)
    decode, answered, started = several.decode, [0], []

    def counted(clips: tuple[Clip, ...]) -> Any:
        started.append((len(started), answered[0]))
        return decode(clips)

    several.decode = counted  # type: ignore[method-assign]
    found = {}
    for batch in several.answer(questions):
        found |= {one.question.id: one.reply for one in batch}
        answered[0] += 1
    several.reader.close()
    assert found == one_by_one and len(started) == len(shown)
    # The video of group n is started when group n - ahead - 1 has been answered, or sooner.
    assert all(number - done <= ahead for number, done in started)
    assert started[ahead][1] == 0


def test_one_decoder_for_four_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, expected in ((1, 1), (2, 1), (8, 2), (16, 4), (128, 4)):
        monkeypatch.setattr("os.sched_getaffinity", lambda _, n=cores: set(range(n)))
        assert decoders() == expected
    assert decoders(processes=32) == 1 and decoders(processes=16) == 2
