"""Responses for the filters, by real models about real videos:
`pytest tests/training/test_sampling.py`."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from internvideo3.harness import cli
from internvideo3.harness.data import check_rows, filter_rows, mix_rows
from internvideo3.harness.sample import SampleOptions, write_samples
from internvideo3.model.checkpoint import load_model
from internvideo3.tasks.world.media import encode_video
from internvideo3.tasks.world.paint import paint
from internvideo3.tasks.world.questions import draw_question
from internvideo3.tasks.world.render import frame_times
from internvideo3.tasks.world.scenes import draw_video
from internvideo3.training.chat import ChatDocuments
from internvideo3.training.curation.records import DataError, Row, read_rows, write_rows
from internvideo3.training.curation.sampling import is_description
from internvideo3.training.recipe import ChatData, Gspo, Optimiser
from internvideo3.training.train import limits_of

STORY = "A circle and a square cross the room, then a red light flashes."


def asked_of(seed: int, family: str) -> Row | None:
    """A question about a video of the fixture `videos`, which is drawn from the same seed."""
    question = draw_question(draw_video(seed, 12, "main"), random.Random(seed), family)
    if question is None:
        return None
    shown = {"type": "video_url", "video_url": {"url": f"v{seed}.mp4"}}
    said = {"type": "text", "text": f"<VIDEO_CONTEXT>{question.prompt}"}
    return {
        "id": f"{seed}/{family}", "options": list(question.options or ()),
        "answer_type": question.answer_type, "answer": question.answer, "category": family,
        "messages": [{"role": "user", "content": [shown, said]}],
    }  # fmt: skip


def write_asked(folder: Path, name: str, *families: str) -> Path:
    rows = [asked_of(seed, family) for seed in range(4) for family in families]
    write_rows(folder / name, [row for row in rows if row])
    return folder / name


def quiet(*_: Any) -> None:
    pass


def options(rows: Path, out: Path, **changed: Any) -> SampleOptions:
    made = SampleOptions(rows=rows, out=out, model="scale:m2la", samples=1, max_new_tokens=12)
    return replace(made, **changed)


def says(prediction: str, row: Row) -> bool:
    return prediction.strip() == row["answer"]


@pytest.fixture(scope="module")
def choices(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Questions with options, and four responses to each beside a teacher's."""
    rows = write_asked(videos, "choices.jsonl", "count", "attime", "needle")
    out = tmp_path_factory.mktemp("elsewhere") / "sampled.jsonl"
    done = CliRunner().invoke(
        cli.app,
        ["data", "sample", str(rows), "--out", str(out), "--samples", "4", "--teacher",
         "scale:teacher", "--max-new-tokens", "12"],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    return rows, out


def test_what_is_sampled_is_filtered_and_trains(choices: tuple[Path, Path], tmp_path: Path) -> None:
    asked, out = choices
    sampled = read_rows(out)
    assert [row["id"] for row in sampled] == [row["id"] for row in read_rows(asked)]
    assert len({text for row in sampled for text in row["predictions"]}) > 4
    for kind, fits in {
        "mixed": lambda row: 0 < sum(says(text, row) for text in row["predictions"]) < 4,
        "gap": lambda row: says(row["teacher"], row) and not says(row["student"], row),
    }.items():
        filter_rows(kind, out, tmp_path / f"{kind}.jsonl", None, 0)
        kept = read_rows(tmp_path / f"{kind}.jsonl")
        assert kept == [row for row in sampled if fits(row)] and 0 < len(kept) < len(sampled)
    _, processor = load_model("scale:m2la", "cpu", torch.float32)
    data = ChatData(files={str(tmp_path / "mixed.jsonl"): 1.0}, max_pixels=4096)
    documents = ChatDocuments(data, processor, 0)
    assert documents.prompt(0).doc["options"] and documents.taught(0).media and not documents.bad


def test_grounding_is_sampled_once_and_filtered_by_its_iou(videos: Path, tmp_path: Path) -> None:
    rows = write_asked(videos, "spans.jsonl", "ground_object", "ground_flash")
    out = tmp_path / "sampled.jsonl"
    write_samples(options(rows, out, samples=2), quiet)
    with pytest.raises(DataError, match="has 2 predictions; exactly one"):
        filter_rows("iou", out, tmp_path / "kept.jsonl", None, 0)
    write_samples(options(rows, tmp_path / "once.jsonl"), quiet)
    first, once = read_rows(out), read_rows(tmp_path / "once.jsonl")
    assert [row["predictions"][:1] for row in first] == [row["predictions"] for row in once]
    write_samples(options(rows, tmp_path / "other.jsonl", seed=1), quiet)
    other = read_rows(tmp_path / "other.jsonl")
    assert [row["predictions"] for row in other] != [row["predictions"] for row in once]
    kept, dropped = filter_rows("iou", tmp_path / "once.jsonl", tmp_path / "kept.jsonl", None, 0)
    assert kept and kept + len(dropped) == len(once)
    assert all(why.startswith("IoU ") for why in dropped.values())


def test_a_stopped_command_goes_on_to_the_same_rows(
    choices: tuple[Path, Path], tmp_path: Path
) -> None:
    asked, whole = choices
    out = tmp_path / "sampled.jsonl"
    again = options(asked, out, samples=4, limit=4)

    def stop(name: str, done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    def stop_at_once(*_: Any) -> None:
        raise KeyboardInterrupt

    for options_now, stopped in ((replace(again, samples=9), stop_at_once), (again, stop)):
        # Where nothing was sampled yet, other options may take the file.
        with pytest.raises(KeyboardInterrupt):
            write_samples(options_now, stopped)
    assert not out.exists()
    with pytest.raises(DataError, match=r"(?s)What differs:\n  seed: 0 there, 1 now"):
        write_samples(replace(again, seed=1), quiet)
    begun = tmp_path / "sampled.begun.jsonl"
    begun.write_bytes(begun.read_bytes() + b'{"id": "torn')
    made = write_samples(again, quiet)
    assert (made.rows, made.kept) == (4, 2) and not begun.exists()
    for row, before in zip(read_rows(out), read_rows(whole), strict=False):
        assert row == {key: one for key, one in before.items() if key not in ("teacher", "student")}
    with pytest.raises(DataError, match="is finished"):
        write_samples(again, quiet)


def test_rows_that_cannot_be_used_are_told_within_a_budget(videos: Path, tmp_path: Path) -> None:
    good = asked_of(0, "needle")
    assert good
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    shown = good["messages"][0]["content"]

    def about(key: str, video: str, **more: Any) -> Row:
        part = {"type": "video_url", "video_url": {"url": video}}
        return (
            good | {"id": key, "messages": [{"role": "user", "content": [part, shown[1]]}]} | more
        )

    rows = [
        about("broken", "broken.mp4"), about("good", str(videos / "v0.mp4")),
        {"id": "silent"}, about("unruled", str(videos / "v0.mp4"), benchmark="vidomme"),
        about("hidden", str(videos / "v0.mp4"), benchmark="motionbench",
              doc={"answer": "NA", "options": ["x", "y"]}),
    ]  # fmt: skip
    write_rows(tmp_path / "rows.jsonl", rows)
    made = write_samples(options(tmp_path / "rows.jsonl", tmp_path / "out.jsonl"), quiet)
    assert (made.rows, made.dropped) == (1, 4)
    why = {row["id"]: row["reason"] for row in read_rows(tmp_path / "out.dropped.jsonl")}
    assert "broken.mp4" in why["broken"] and why["silent"] == "cannot be used: has no 'messages'"
    assert "did you mean videomme" in why["unruled"]
    assert "no right answer that motionbench could score responses by" in why["hidden"]
    write_rows(tmp_path / "many.jsonl", [about(f"b{n}", "broken.mp4") for n in range(30)])
    with pytest.raises(DataError, match="11 of 30 rows of .* more than 1%"):
        write_samples(options(tmp_path / "many.jsonl", tmp_path / "none.jsonl"), quiet)
    write_rows(tmp_path / "nameless.jsonl", [rows[1], {"messages": []}])
    with pytest.raises(DataError, match=r"nameless\.jsonl, row 2, has no `id`"):
        write_samples(options(tmp_path / "nameless.jsonl", tmp_path / "none.jsonl"), quiet)


def test_another_teacher_that_nobody_named_does_not_go_on_with_the_first_ones_answers(
    videos: Path, tmp_path: Path, teacher: Any
) -> None:
    rows = write_asked(videos, "two.jsonl", "needle")

    def stop(name: str, done: int, total: int) -> None:
        if done == 1:
            raise KeyboardInterrupt

    first = options(rows, tmp_path / "out.jsonl", teacher=teacher.url)
    with pytest.raises(KeyboardInterrupt):
        write_samples(first, stop)
    with pytest.raises(DataError, match="What differs:\n  teacher: .*http://b:1/v1"):
        write_samples(replace(first, teacher="http://b:1/v1"), quiet)
    assert write_samples(first, quiet).kept == 1


def test_a_served_teacher_sees_the_video_and_describes_it_better(
    videos: Path, tmp_path: Path, teacher: Any
) -> None:
    """The answer of a description is what both are compared with."""
    question = {"role": "user", "content": [
        {"type": "video_url", "video_url": {"url": str(videos / "v1.mp4")}},
        {"type": "text", "text": "<VIDEO_CONTEXT>Describe the video."},
    ]}  # fmt: skip
    told = {"role": "assistant", "content": STORY}
    write_rows(tmp_path / "rows.jsonl", [{"id": "d", "messages": [question, told]}])
    teacher.answer = lambda prompt, pictures: STORY if len(pictures) == 6 else "Nothing."
    served = options(
        tmp_path / "rows.jsonl", tmp_path / "out.jsonl", teacher=teacher.url, max_frames=6
    )
    write_samples(served, quiet)
    (request,) = teacher.requests
    assert request["temperature"] == 1.0 and request["model"] == "teacher"
    assert request["messages"][0]["content"][-1]["text"] == "Describe the video."
    assert filter_rows("gap", tmp_path / "out.jsonl", tmp_path / "kept.jsonl", None, 0) == (1, {})
    (row,) = read_rows(tmp_path / "kept.jsonl")
    assert row["reference"] == row["teacher"] == STORY
    assert [row["student"]] == row["predictions"]


@pytest.mark.parametrize(
    ("row", "described"),
    [
        ({"answer": "a cat sits"}, True),
        ({"answer": "3 - 10"}, False),
        ({"answer": "3 - 10", "answer_type": "text"}, True),
        ({"answer": "a cat", "options": ["a cat", "a dog"]}, False),
        ({"answer": "a cat", "options": ["a cat", "a dog"], "reference": "a cat sits"}, True),
        ({"answer": "3 - 10", "reference": "a cat sits"}, True),
        ({"answer": "a cat sits", "reference": ""}, True),
        ({"answer": "a cat sits", "benchmark": "videomme"}, False),
    ],
)
def test_a_description_is_what_has_a_reference_or_no_rule(row: Row, described: bool) -> None:
    assert is_description(row) == described


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_mixture_of_files_with_equal_ids_is_checked_and_sampled(
    suffix: str, videos: Path, tmp_path: Path
) -> None:
    """Texts have neither answer nor options and are no question about a video: they are told."""
    asked = [row for seed in range(4) if (row := asked_of(seed, "needle"))]
    write_rows(videos / "asked.jsonl", [row | {"id": n} for n, row in enumerate(asked)])
    said = [{"role": "user", "content": "Say red."}, {"role": "assistant", "content": "red"}]
    write_rows(tmp_path / "texts.jsonl", [{"id": 0, "messages": said}])
    mixture, clean = tmp_path / f"mixed{suffix}", tmp_path / f"clean{suffix}"
    share = len(asked) / (len(asked) + 1)
    sources = [f"{tmp_path}/texts.jsonl={1 - share}", f"{videos}/asked.jsonl={share}"]
    mix_rows(sources, mixture, len(asked) + 1, 0)
    ids = {"texts/0", "asked/0", *range(1, len(asked))}
    assert {row["id"] for row in read_rows(mixture)} == ids
    assert check_rows(mixture, clean, None, None) == (len(ids), {})
    made = write_samples(options(clean, tmp_path / "out.jsonl", max_new_tokens=4), quiet)
    assert (made.rows, made.dropped) == (len(asked), 1)
    drops = read_rows(tmp_path / "out.dropped.jsonl")
    assert drops == [
        {"id": "texts/0", "reason": "cannot be used: a rollout needs exactly one video"}
    ]
    assert all(row["options"] for row in read_rows(tmp_path / "out.jsonl"))


@pytest.mark.parametrize(
    ("total_pixels", "pack_tokens", "group"),
    [(6 * 96 * 96, 4096, 2), (None, 600, 2), (None, 600, 12), (1 << 40, 4096, 2)],
)
def test_frames_are_those_of_a_recipes_rows(
    total_pixels: int | None, pack_tokens: int, group: int, tmp_path: Path, teacher: Any
) -> None:
    """A teacher is sent the student's frames: as large as this recipe's training shows them."""
    spec = draw_video(3, 4, "main")
    (tmp_path / "wide.mp4").write_bytes(encode_video(paint(spec, frame_times(spec), 512)))
    shown = {"type": "video_url", "video_url": {"url": "wide.mp4"}}
    said = [{"role": "user", "content": [shown, {"type": "text", "text": "What is it?"}]},
            {"role": "assistant", "content": "circle"}]  # fmt: skip
    rows = tmp_path / "rows.jsonl"
    write_rows(rows, [{"id": "w", "messages": said, "answer": "circle",
                       "options": ["circle", "square"]}])  # fmt: skip
    seen: list[Any] = []
    teacher.answer = lambda prompt, pictures: seen.extend(pictures) or "circle"
    given = ["--max-frames", "6", "--min-pixels", "4096", "--max-pixels", "262144",
             "--max-new-tokens", "12", "--samples", "1", "--teacher", teacher.url,
             "--pack-tokens", str(pack_tokens), "--group", str(group)]  # fmt: skip
    given += [] if total_pixels is None else ["--total-pixels", str(total_pixels)]
    done = CliRunner().invoke(
        cli.app, ["data", "sample", str(rows), "--out", str(tmp_path / "out.jsonl"), *given]
    )
    assert done.exit_code == 0, done.output
    data = ChatData(
        files={str(rows): 1.0}, max_frames=6, max_pixels=512 * 512, total_pixels=total_pixels
    )
    stage = Gspo(
        kind="gspo", steps=1, documents=1, data=data, optimiser=Optimiser(learning_rate=1e-4),
        pack_tokens=pack_tokens, group=group, max_new_tokens=12,
    )  # fmt: skip
    _, processor = load_model("scale:m2la", "cpu", torch.float32)
    documents = ChatDocuments(data, processor, 0, limits_of(stage))
    trained = documents.prompt(0).frames.pixels_THWC
    documents.reader.close()
    assert np.array_equal(np.stack(seen), trained)
    assert (trained.shape[1] < 512) == (total_pixels != 1 << 40), "a limit that says something"


def test_a_model_without_eyes_is_refused_before_anything_is_written(
    choices: tuple[Path, Path], tmp_path: Path
) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "config.json").write_text('{"model_type": "internvideo3_text"}')
    blind = options(choices[0], tmp_path / "out.jsonl", teacher=str(tmp_path / "text"))
    with pytest.raises(DataError, match="is a text model and sees no video"):
        write_samples(blind, quiet)
    with pytest.raises(DataError, match="--group 4 shares a row of --pack-tokens; give both"):
        write_samples(options(choices[0], tmp_path / "out.jsonl", group=4), quiet)
    assert not list(tmp_path.glob("out*"))
