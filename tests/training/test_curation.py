"""Curation on real files and a real server: `pytest tests/training/test_curation.py`."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from internvideo3.harness.data import (
    CurateOptions,
    check_rows,
    curate,
    filter_rows,
    mix_rows,
    scene_changes,
)
from internvideo3.tasks.video import read_frames
from internvideo3.training.curation import filters, synthesis
from internvideo3.training.curation.distribution import distribution, figure5, table1
from internvideo3.training.curation.fingerprints import fingerprint, named, same
from internvideo3.training.curation.narrative import entity_fault, order_fault
from internvideo3.training.curation.records import (
    Asked,
    Clip,
    DataError,
    Narrative,
    chat_row,
    read_rows,
    write_rows,
)
from internvideo3.training.curation.splitting import clips_of
from internvideo3.training.curation.synthesis import RejectedError, guessed, synthesise
from internvideo3.training.endpoint import Endpoint, EndpointError
from internvideo3.training.mixture import counts, dealt
from internvideo3.training.recipe import RecipeError

STORY = Narrative(
    video="v.mp4", duration_s=30.0, clips=(Clip(scene=0, start_s=0.0, end_s=30.0, caption="x"),),
    scenes=("x",), text="A man cooks.",
)  # fmt: skip
GOOD = {
    "question": "What does the man cut first?", "answer": "a red onion",
    "distractors": ["a ripe tomato", "a green pepper", "a long carrot"], "start_s": 2, "end_s": 5,
}  # fmt: skip


def patient(teacher: Any, **changed: Any) -> Endpoint:
    waits: list[float] = []
    made = Endpoint(url=teacher.url, model="m", sleep=waits.append, timeout_s=10, **changed)
    object.__setattr__(made, "waits", waits)
    return made


class TestSplitting:
    def test_clips_tile_the_video_and_never_cross_a_cut(self) -> None:
        clips = clips_of([30.0, 10.0, 10.4], 75.0)
        assert clips[0].start_s == 0 and clips[-1].end_s == 75.0
        assert all(a.end_s == b.start_s for a, b in zip(clips, clips[1:], strict=False))
        assert {10.0, 30.0} <= {clip.end_s for clip in clips}
        assert max(clip.end_s - clip.start_s for clip in clips) <= 20.0
        assert [clip.scene for clip in clips] == [0, 1, 2, 2, 2]

    def test_a_flicker_is_no_scene_and_senseless_limits_are_told(self) -> None:
        assert [c.end_s for c in clips_of([0.2, 5.0, 5.5, 9.8], 10.0)] == [5.0, 10.0]
        with pytest.raises(DataError, match="cannot split 0 s"):
            clips_of([], 0.0)


class TestNarrative:
    def test_order_of_scenes_is_checked(self) -> None:
        assert order_fault("He cooks [1]. He eats [2].", 2) is None
        assert order_fault("He eats [2]. He cooks [1].", 2) == "tells scenes out of order: [2, 1]"
        assert order_fault("He eats [3].", 2) == "speaks of scenes [3], of 2"
        assert order_fault("He eats.", 2) == "has no scene marks [n]"

    def test_names_that_no_scene_has_are_found(self) -> None:
        assert entity_fault("Then Anna waves.", ["Anna is in a park."]) is None
        fault = entity_fault("Then Anna meets Bob.", ["Anna is in a park."])
        assert fault == "names Bob, which no scene does"


class TestSynthesis:
    def test_seventeen_categories_have_table_1s_shares_in_every_thousand(self) -> None:
        shares = synthesis.shares()
        assert len(shares) == 17 and len(synthesis.DIMENSIONS) == 4
        found = Counter(synthesis.category_at(n) for n in range(1000))
        assert all(abs(found[name] - 1000 * share) <= 1 for name, share in shares.items())

    def test_a_question_is_read_out_of_a_reply(self) -> None:
        asked = synthesise(
            STORY, "Object Recognition", lambda *_: f"Sure!\n{json.dumps(GOOD)}", "a"
        )
        assert set(asked.options) == {GOOD["answer"], *GOOD["distractors"]}
        places = {
            synthesise(STORY, "Plot Understanding", lambda *_: json.dumps(GOOD), str(n))
            .options.index("a red onion") for n in range(40)
        }  # fmt: skip
        assert places == {0, 1, 2, 3}

    @pytest.mark.parametrize(
        ("changed", "said"),
        [
            ({"answer": "a red onion "}, None),
            ({"question": "Why is a red onion cut?"}, "the question says its answer"),
            ({"question": " "}, "there is no question"),
            ({"distractors": ["a ripe tomato", "a leek"]}, "3 options"),
            ({"distractors": ["A red onion.", "a leek", "a nut"]}, "two options say the same"),
            ({"distractors": ["red onion", "a leek", "a nut"]}, "a part of it"),
            ({"distractors": ["all of the above", "a leek", "a nut"]}, "about the other options"),
            ({"answer": "a red onion that he took from the old fridge"}, "length of the right"),
            ({"end_s": 99}, "evidence at 2 to 99 s"),
            ({"start_s": 6}, "evidence at 6 to 5 s"),
            ({"start_s": "soon"}, "not the JSON"),
        ],
    )
    def test_each_check_refuses_what_it_is_for(self, changed: Any, said: str | None) -> None:
        reply = json.dumps(GOOD | changed)
        if said is None:
            synthesise(STORY, "Object Recognition", lambda *_: reply, "a")
        else:
            with pytest.raises(RejectedError, match=said):
                synthesise(STORY, "Object Recognition", lambda *_: reply, "a")

    def test_a_question_that_is_always_guessed_is_known(self) -> None:
        asked = Asked(category="c", question="q", options=("a b", "c d"), answer="a b",
                      evidence_s=(0, 1))  # fmt: skip
        assert guessed(asked, ["A b.", "It is a b"]) and not guessed(asked, ["a b", "c d"])
        assert not guessed(asked, [])


class TestFilters:
    @staticmethod
    def rollout(key: str, *predictions: str, answer: str = "10 - 20", **more: Any) -> Any:
        family = "ground_object" if "-" in answer else "shape"
        kind = "span" if "-" in answer else "choice"
        options = None if kind == "span" else ["square", "circle", "cross"]
        doc = {"id": key, "family": family, "answer": answer, "answer_type": kind,
               "options": options, "length_s": 60.0}  # fmt: skip
        return {"id": key, "benchmark": "world_manyq", "doc": doc,
                "predictions": list(predictions), **more}  # fmt: skip

    def test_iou_from_a_tenth_to_seven_tenths_both_included(self) -> None:
        spans = {"none": "30 - 40", "low": "10 - 11", "half": "10 - 15", "high": "10 - 17",
                 "solved": "10 - 18", "unreadable": "early on"}  # fmt: skip
        kept = filters.by_iou([self.rollout(key, span) for key, span in spans.items()])
        assert [row["id"] for row in kept.rows] == ["low", "half", "high"]
        assert kept.dropped["solved"] == "IoU 0.800 above 0.7: solved"
        assert kept.dropped["unreadable"].startswith("IoU 0.000 below")

    def test_mixed_answers_at_temperature_one(self) -> None:
        hot: Any = {"temperature": 1.0, "answer": "circle"}
        rows = [
            self.rollout("mixed", "circle", "square", **hot),
            self.rollout("right", "circle", "B", **hot),
            self.rollout("wrong", "square", "cross", **hot),
        ]
        kept = filters.by_mixed_answers(rows)
        assert [row["id"] for row in kept.rows] == ["mixed"]
        assert kept.dropped == {
            "right": "right in all 2 samples",
            "wrong": "wrong in all 2 samples",
        }
        with pytest.raises(DataError, match="temperature 0.7; sample at 1"):
            filters.by_mixed_answers([self.rollout("a", "x", "y", temperature=0.7)])

    def test_distillation_wants_a_gap(self) -> None:
        def row(key: str, teacher: str, student: str, **more: Any) -> Any:
            return self.rollout(key, answer="circle", teacher=teacher, student=student, **more)

        text = "a man cuts red onions then fries them in butter"
        rows = [
            row("gap", "circle", "cross"), row("both", "circle", "circle"),
            row("neither", "cross", "circle"),
            row("fuller", text, "a man fries", reference=text),
            row("no fuller", "a man", "a man cuts onions", reference=text),
        ]  # fmt: skip
        kept = filters.by_gap(rows)
        assert [one["id"] for one in kept.rows] == ["gap", "fuller"]
        assert kept.dropped["neither"] == "the teacher is wrong"

    def test_an_empty_result_is_an_error_that_says_why(self, tmp_path: Path) -> None:
        write_rows(tmp_path / "r.jsonl", [self.rollout("a", "10 - 20")])
        with pytest.raises(DataError, match="kept none of 1 rows; reasons: IoU 1.000 above"):
            filter_rows("iou", tmp_path / "r.jsonl", tmp_path / "out.jsonl", None, 0)
        assert not (tmp_path / "out.jsonl").exists()

    def test_a_draw_is_the_same_for_the_same_seed(self) -> None:
        rows = [{"id": str(n)} for n in range(50)]
        ones = [filters.sampled(rows, 20, seed) for seed in (1, 1, 2)]
        assert ones[0] == ones[1] != ones[2] and len(ones[0].rows) == 20


class TestMixtures:
    def test_shares_are_exact_and_spread(self) -> None:
        shares = {"text": 0.299, "image": 0.549, "video": 0.152}
        assert counts(shares, 1000) == {"text": 299, "image": 549, "video": 152}
        order = dealt(shares, 1000)
        for n in range(1, 1000, 7):
            seen = Counter(order[:n])
            assert all(abs(seen[kind] - share * n) < 1.5 for kind, share in shares.items())
        with pytest.raises(RecipeError, match=r"sum to 1, got .* with the sum 0.9"):
            counts({"a": 0.5, "b": 0.4}, 10)

    def test_the_published_shares_are_presets(self) -> None:
        told = synthesis.PUBLISHED
        assert sum(told["sft"]["shares"].values()) == pytest.approx(1.0)
        sources = told["long_video_sources"]
        assert (sources["InternVid"], sources["YouTube, reasoning"], sources["V-MME-style"]) == (
            188_000, 115_000, 77_000,
        )  # fmt: skip

    def test_files_are_mixed_without_repeating_a_row(self, tmp_path: Path) -> None:
        for name, count in (("a", 30), ("b", 8)):
            rows = [{"id": f"{name}{n}", "messages": []} for n in range(count)]
            write_rows(tmp_path / f"{name}.jsonl", rows)
        sources = [f"{tmp_path}/a.jsonl=0.75", f"{tmp_path}/b.jsonl=0.25"]
        out = tmp_path / "mixed.parquet"
        assert mix_rows(sources, out, 32, seed=1) == 32
        rows = read_rows(out)
        assert len({row["id"] for row in rows}) == 32
        assert Counter(row["source"] for row in rows)[f"{tmp_path}/b.jsonl"] == 8
        with pytest.raises(DataError, match="8 rows and 10 are wanted; .* at most 32 rows"):
            mix_rows(sources, out, 40, seed=1)


class TestFingerprints:
    def test_a_copy_at_a_lower_quality_is_the_same_video_and_others_are_not(
        self, videos: Path, tmp_path: Path
    ) -> None:
        import av

        prints = {p.name: fingerprint(read_frames(p, fps=1.0).pixels_THWC)
                  for p in sorted(videos.glob("*.mp4"))}  # fmt: skip
        copy = tmp_path / "copy.mp4"
        whole = read_frames(videos / "v0.mp4", fps=60.0)
        with av.open(str(copy), "w") as container:
            stream: Any = container.add_stream("mpeg4", rate=round(whole.source_fps))
            stream.width = stream.height = 96
            stream.pix_fmt, stream.bit_rate = "yuv420p", 60_000
            for picture in whole.pixels_THWC:
                for packet in stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")):
                    container.mux(packet)
            for packet in stream.encode():
                container.mux(packet)
        copied = fingerprint(read_frames(copy, fps=1.0).pixels_THWC)
        assert same(copied, prints["v0.mp4"])
        assert not any(same(copied, prints[f"v{n}.mp4"]) for n in (1, 2, 3))
        assert named(prints | {"copy": copied})["copy"] == "v0.mp4"

    def test_a_blank_video_is_like_blank_ones_only(self) -> None:
        blank = fingerprint(np.zeros((8, 32, 32, 3), np.uint8))
        grey = fingerprint(np.full((8, 32, 32, 3), 90, np.uint8))
        shown = fingerprint(np.random.default_rng(0).integers(0, 255, (8, 32, 32, 3), np.uint8))
        assert same(blank, grey) and not same(blank, shown)
        assert named({"blank": blank, "shown": shown, "grey": grey})["grey"] == "blank"


class TestCommands:
    def options(self, videos: Path, out: Path, teacher: Any, **changed: Any) -> CurateOptions:
        made = CurateOptions(
            videos=(videos,), out=out, writer=patient(teacher), guesser=patient(teacher),
            changes=lambda video: [4.0, 8.0], per_video=2,
            command=("internvideo3", "data", "curate"),
        )  # fmt: skip
        return replace(made, **changed)

    def test_videos_become_checked_questions_with_a_card(
        self, videos: Path, tmp_path: Path, teacher: Any
    ) -> None:
        told = curate(self.options(videos, tmp_path, teacher), lambda *_: None)
        rows = read_rows(tmp_path / "questions.jsonl")
        assert told["questions"] == len(rows) == 8 and told["videos"] == 4
        captions = {
            clip["caption"]
            for path in (tmp_path / "narratives").glob("*.json")
            for clip in json.loads(path.read_text())["clips"]
        }
        assert len(captions) > 4, "captions depend on the pixels that were sent"
        shown = [row["messages"][0]["content"][0]["video_url"]["url"] for row in rows]
        assert all(Path(one).is_absolute() and Path(one).is_file() for one in shown)
        assert "Action Recognition" in (tmp_path / "table1.md").read_text()
        card = (tmp_path / "card.md").read_text()
        assert "8 rows about 4 videos" in card and "internvideo3 data curate" in card
        assert (tmp_path / "figure5.svg").stat().st_size > 5000

    @pytest.mark.slow
    def test_scenes_are_found_by_the_real_detector(
        self, make_video: Any, tmp_path: Path, teacher: Any
    ) -> None:
        """Every cut of the video ends a clip; the detector may see a flash as one more."""
        (tmp_path / "in").mkdir()
        spec = make_video(tmp_path / "in" / "v.mp4", 1, 16)
        cuts = [scene.start_s for scene in spec.scenes[1:]]
        made = self.options(tmp_path / "in", tmp_path / "out", teacher, changes=scene_changes)
        curate(made, lambda *_: None)
        (path,) = (tmp_path / "out" / "narratives").glob("*.json")
        ends = [clip["end_s"] for clip in json.loads(path.read_text())["clips"]][:-1]
        assert cuts and len(ends) <= len(cuts) + len(spec.flashes)
        assert all(min(abs(end - cut) for end in ends) <= 0.6 for cut in cuts)

    def test_what_is_guessed_without_the_video_is_dropped(
        self, videos: Path, tmp_path: Path, teacher: Any
    ) -> None:
        usual = teacher.answer

        def knows(prompt: str, pictures: Any) -> str:
            blind = "even if you must guess" in prompt
            return "Tone dark grey." if blind else str(usual(prompt, pictures))

        teacher.answer = knows
        with pytest.raises(DataError, match="no question passed the checks"):
            curate(self.options(videos, tmp_path, teacher), lambda *_: None)
        reasons = [row["reason"] for row in read_rows(tmp_path / "dropped.jsonl")]
        assert len(reasons) == 8
        seeds = Counter(one["seed"] for one in teacher.requests if one["temperature"] == 1.0)
        assert seeds == {0: 8, 1: 8, 2: 8}, "three samples, not one three times"
        assert all("can be answered without the video" in reason for reason in reasons)

    def test_a_server_that_fails_stops_it_and_the_same_command_goes_on(
        self, videos: Path, tmp_path: Path, teacher: Any
    ) -> None:
        whole = tmp_path / "whole"
        curate(self.options(videos, whole, teacher), lambda *_: None)
        asked = len(teacher.requests)
        teacher.requests.clear()
        out, calls = tmp_path / "out", []

        def dies(prompt: str, pictures: Any) -> str:
            calls.append(prompt)
            if len(calls) == asked // 2:
                teacher.failures = [503] * 3
            return str(usual(prompt, pictures))

        usual, teacher.answer = teacher.answer, dies
        impatient = patient(teacher, attempts=3)
        options = self.options(videos, out, teacher, writer=impatient, guesser=impatient)
        with pytest.raises(EndpointError, match="did not answer in 3 attempts"):
            curate(options, lambda *_: None)
        curate(options, lambda *_: None)
        assert len(teacher.requests) < 2 * asked
        assert read_rows(out / "questions.jsonl") == read_rows(whole / "questions.jsonl")

    def test_a_corrupt_video_is_dropped_with_its_reason_within_a_budget(
        self, videos: Path, tmp_path: Path, teacher: Any
    ) -> None:
        folder = tmp_path / "some"
        folder.mkdir()
        for name in ("v0.mp4", "v1.mp4"):
            (folder / name).write_bytes((videos / name).read_bytes())
        (folder / "bad.mp4").write_bytes(b"\x00\x00\x00\x18ftypmp42" + bytes(500))
        options = self.options(folder, tmp_path / "out", teacher, most_failures=0.5)
        told = curate(options, lambda *_: None)
        assert told["videos"] == 2
        (drop,) = read_rows(tmp_path / "out" / "dropped.jsonl")
        assert drop["id"].startswith("bad-") and "bad.mp4" in drop["reason"]
        with pytest.raises(DataError, match="1 of 3 videos failed, more than 10%"):
            curate(replace(options, out=tmp_path / "strict", most_failures=0.1), lambda *_: None)

    def test_benchmark_videos_and_questions_are_found(self, videos: Path, tmp_path: Path) -> None:
        def row(key: str, video: str, question: str) -> Any:
            asked = Asked(category="Plot Understanding", question=question, evidence_s=(0, 1),
                          options=("a", "b"), answer="a")  # fmt: skip
            return chat_row(key, replace(STORY, video=str(videos / video)), asked)

        def beside(first: Any, video: str) -> Any:
            part = {"type": "video_url", "video_url": {"url": str(videos / video)}}
            first["messages"][0]["content"].insert(1, part)
            return first

        long = "Which of the shapes enters the striped room before the blue light flashes twice?"
        write_rows(tmp_path / "rows.jsonl", [
            row("good", "v1.mp4", "What moves through the room after the first light?"),
            row("again", "v1.mp4", "What moves through the room after the first light??"),
            row("seen", "v0.mp4", "Where does the circle go?"),
            row("copied", "v2.mp4", f"Tell me. {long}"),
            beside(row("pair", "v3.mp4", "Which room is larger?"), "v0.mp4"),
        ])  # fmt: skip
        held = tmp_path / "benchmark"
        held.mkdir()
        (held / "other-name.mp4").write_bytes((videos / "v0.mp4").read_bytes())
        write_rows(tmp_path / "asked.jsonl", [{"id": "videomme/7", "question": long}])
        kept, dropped = check_rows(
            tmp_path / "rows.jsonl", tmp_path / "clean.jsonl", held, tmp_path / "asked.jsonl"
        )
        assert kept == 1 and dropped["again"] == "asks what good asks of the same video"
        assert "other-name.mp4" in dropped["seen"] and "other-name.mp4" in dropped["pair"]
        assert dropped["copied"] == "repeats the question videomme/7"
        assert {r["id"] for r in read_rows(tmp_path / "clean.dropped.jsonl")} == set(dropped)

    def test_the_command_line_tells_a_mistake_in_a_sentence(self, tmp_path: Path) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "internvideo3.harness.cli", "data", "curate", str(tmp_path),
             "--endpoint", "http://127.0.0.1:9/v1", "--model", "m", "--out", str(tmp_path / "o")],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 1 and "no video among" in done.stderr
        assert "Traceback" not in done.stderr


class TestEndpoint:
    def test_asks_again_with_doubling_waits(self, teacher: Any) -> None:
        teacher.failures = [503, None, 429]
        endpoint = patient(teacher)
        picture = np.full((8, 8, 3), 200, np.uint8)
        assert (
            endpoint.write("look", [picture]) == "A room of tone 200 200 200 with shapes that move."
        )
        assert endpoint.waits == [1.0, 2.0, 4.0]  # type: ignore[attr-defined]

    def test_a_reply_that_breaks_off_is_asked_for_again(self, teacher: Any) -> None:
        teacher.missing = [10_000, 0]
        assert patient(teacher).write("x") == "I cannot know."
        assert not teacher.missing and len(teacher.requests) == 2

    def test_a_refusal_is_final_and_silence_ends(self, teacher: Any) -> None:
        teacher.failures = [400]
        with pytest.raises(EndpointError, match="refused the request, 400"):
            patient(teacher).write("x")
        assert len(teacher.requests) == 1
        nobody = replace(patient(teacher, attempts=2), url="http://127.0.0.1:9/v1")
        with pytest.raises(
            EndpointError, match="did not answer in 2 attempts; .* repeat the command"
        ):
            nobody.write("x")


def test_parquet_and_jsonl_hold_the_same_chat(tmp_path: Path) -> None:
    asked = Asked(category="Plot Understanding", question="Why?", options=("a", "b"), answer="a",
                  evidence_s=(0.0, 1.0))  # fmt: skip
    rows = [chat_row("k", STORY, asked)]
    for name in ("x.jsonl", "x.parquet"):
        write_rows(tmp_path / name, rows)
        assert read_rows(tmp_path / name) == rows
    rollouts = [{"id": "r", "predictions": ["a", "b"]}]
    write_rows(tmp_path / "rollouts.parquet", rollouts)
    assert read_rows(tmp_path / "rollouts.parquet") == rollouts
    (tmp_path / "bad.jsonl").write_text('{"id": 1}\n{"id": \n')
    with pytest.raises(DataError, match="line 2, is no JSON"):
        read_rows(tmp_path / "bad.jsonl")


def test_distribution_is_table_1_beside_the_papers(tmp_path: Path) -> None:
    rows = []
    for n in range(1000):
        asked = Asked(category=synthesis.category_at(n), question="Why so?", evidence_s=(0, 1),
                      options=("a", "b", "c", "d"), answer="abcd"[n % 4])  # fmt: skip
        rows.append(chat_row(str(n), replace(STORY, video=f"{n}.mp4"), asked))
    told = distribution(rows)
    assert told["total_variation_percent"] < 0.5
    assert told["dimensions"]["Perception & Recognition"]["percent"] == pytest.approx(35.4, abs=0.2)
    assert told["right_option"] == {"A": 250, "B": 250, "C": 250, "D": 250}
    assert "| **Holistic Semantics** | 131 | 13.1 | 13.1 |" in table1(told)
    figure5(rows, tmp_path / "figure5.svg")
    assert (tmp_path / "figure5.svg").stat().st_size > 5000
