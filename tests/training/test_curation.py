"""Curation on real files and a real server: `pytest tests/training/test_curation.py`."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from internvideo3.harness.data import (
    CurateOptions,
    check_rows,
    curate,
    describe,
    filter_rows,
    mix_rows,
)
from internvideo3.harness.locks import lock
from internvideo3.harness.rollouts import RolloutsOptions, write_rollouts
from internvideo3.harness.sample import SampleOptions, write_samples
from internvideo3.harness.video_files import found_videos
from internvideo3.tasks.video import Frames, read_frames
from internvideo3.training.curation import filters, fingerprints, synthesis
from internvideo3.training.curation.distribution import distribution, figure5, table1
from internvideo3.training.curation.fingerprints import fingerprint, named, same
from internvideo3.training.curation.mixing import told_apart
from internvideo3.training.curation.narrative import entity_fault, order_fault
from internvideo3.training.curation.pipeline import Curation
from internvideo3.training.curation.records import (
    Asked,
    Clip,
    DataError,
    Narrative,
    chat_row,
    keys_of,
    moved,
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
            row("by a tenth", "a man cuts", "a man", reference=text),
        ]  # fmt: skip
        kept = filters.by_gap(rows)
        assert [one["id"] for one in kept.rows] == ["gap", "fuller", "by a tenth"]
        assert kept.dropped["neither"] == "the teacher is wrong"

    def test_what_no_rule_scores_is_dropped_with_the_reason(self, tmp_path: Path) -> None:
        """A description among questions ends no filter; a file of no rollouts does."""
        hot: Any = {"temperature": 1.0, "teacher": "circle", "student": "cross"}
        told = self.rollout("told", "a cat", "a dog", answer="a cat sits", **hot)
        told["doc"] |= {"answer_type": "span", "options": None}
        mixed = self.rollout("mixed", "circle", "square", answer="circle", **hot)
        span = self.rollout("span", "10 - 15")
        once = told | {"predictions": ["a cat"]}
        path, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
        for kind, *rows in (("mixed", told, mixed), ("gap", told, mixed), ("iou", once, span)):
            write_rows(path, rows)
            kept, dropped = filter_rows(kind, path, out, None, 0)
            assert kept == 1 and dropped.keys() == {"told"}
            assert dropped["told"].startswith("cannot be scored: ")
            assert "a cat sits" in dropped["told"]
        with pytest.raises(DataError, match="kept none of 1 rows; reasons: cannot be scored"):
            filters.by_mixed_answers([told]).or_fail("it")
        bare = {"id": "b", "predictions": ["x", "y"], "temperature": 1.0}
        with pytest.raises(DataError, match="row b has no benchmark and no doc to be scored by"):
            filters.by_mixed_answers([mixed, bare])

    @pytest.mark.parametrize(
        ("benchmark", "asked", "repeats"),
        [
            ("What colour is it?", "What colour is it?", True),
            ("Who wins the race?", "Who wins the race?", True),
            ("Who wins the race?", "<VIDEO_CONTEXT>Watch the video. Who wins the race?", True),
            ("Who wins the race?", "Question: who wins the race", True),
            ("Who wins the race?\nA. Ann\nB. Bob", "Who wins the race?", True),
            ("Who wins the race? (A) Ann (B) Bob", "Who wins the race?", True),
            ("Look closely. Who wins?", "Look closely. Who wins?", True),
            ("\u8c01\u8d62\u4e86\uff1f", "\u8c01\u8d62\u4e86\uff1f", True),
            ("Who wins the race?", "Who loses the race?", False),
            ("Who wins the race?", "Who wins the race of the two red cars at the end?", False),
            ("Who wins?", "Who wins the race?", False),
            ("a ripe tomato?", "What does he cut?", False),
            ("Which man cuts the red onion first?\nA. Tom\nB. Bob",
             "Tell me, which man cuts the red onion first?", True),
            ("Which man cuts the red onion first?", "Which man washes the red pan last?", False),
        ],
    )  # fmt: skip
    def test_a_benchmarks_question_is_found_among_options_and_others_are_not(
        self, benchmark: str, asked: str, repeats: bool
    ) -> None:
        options = ("a ripe tomato", "a green pepper")
        made = Asked(category="Plot Understanding", question=asked, options=options,
                     answer=options[0], evidence_s=(0, 1))  # fmt: skip
        rows = [chat_row("k", STORY, made)]
        found = filters.without_benchmarks(rows, {"k": ("v",)}, {}, {"b/1": benchmark})
        assert found.dropped == ({"k": "repeats the question b/1"} if repeats else {})

    @pytest.mark.parametrize(
        "options",
        [
            "\nA: red\nB: blue\nC: green\nD: grey", "\nA:red\nB:blue", "\nA.red\nB.blue",
            "\n(a) red\n(b) blue\n(c) green", "\na. red\nb. blue", "\na) red\nb) blue",
            "\n1. red\n2. blue\n3. green", "\n(1) red\n(2) blue", "\n1) red\n2) blue",
            " A. red B. blue", " A. a red one B. a blue one C. a green one", " A: red B: blue",
            " A) red B) blue", " (a) red (b) blue", " Options: A. red B. blue",
            " Options: ['a red one', 'a blue one']", '\nChoices: ["red", "blue"]',
            "\nOptions:\nA. red\nB. blue", "\n".join(["", *(f"{c}. {c}{c}" for c in "ABCDEFGHIJ")]),
        ],
    )  # fmt: skip
    @pytest.mark.parametrize(
        "question",
        ["What is red?", "What colour is the ball that the boy kicks first?"],
        ids=["short", "long"],
    )
    def test_options_of_any_form_hide_no_question(self, question: str, options: str) -> None:
        assert filters.stem(question + options) == question
        rows = [{"id": "k", "messages": [{"role": "user", "content": question}]}]
        found = filters.without_benchmarks(rows, {"k": ()}, {}, {"b/1": question + options})
        assert found.dropped == {"k": "repeats the question b/1"}

    @staticmethod
    def listed(form: str) -> str:
        """Four options behind a question, each in a form such as `\n[{letter}] {text}`."""
        texts = ("red like the sea", "blue like a house", "green as the grass", "grey as a star")
        return "".join(
            form.format(letter="ABCD"[n], number=n, next=n + 1, text=text)
            for n, text in enumerate(texts)
        )

    @pytest.mark.parametrize("tail", ["", "\nAnswer with the option's letter from the list above."])
    @pytest.mark.parametrize(
        "form",
        [
            " {next}. {text}", " ({next}) {text}", "\n**{letter}.** {text}", "\n[{letter}] {text}",
            "\n- {text}", "\nOption {letter}: {text}", "\n{letter} - {text}", "\n{letter} {text}",
            "\n- {letter}. {text}", "\n{letter}\u3001{text}", "\n{number}. {text}", "\n* {text}?",
            "\n{letter}. {text}", "\n\u2460 {text}", "; {text}",
        ],
    )  # fmt: skip
    def test_a_benchmarks_bare_question_is_found_however_its_options_are_written(
        self, form: str, tail: str
    ) -> None:
        """Also by a row that has options of its own, in whatever form."""
        question = "What colour is the ring that the man lifts after the second cut of the film?"
        context = "A man in a red coat enters a kitchen and takes a knife. He cuts two onions. "
        asked = {
            "bare": question, "list": f"{question}\n- a\n- b b b b b b b b b",
            "told": f"Pick the best of the options below by what you see.\n{question}{tail}",
        }  # fmt: skip
        rows = [{"id": key, "messages": [{"role": "user", "content": text}]}
                for key, text in asked.items()]  # fmt: skip
        benchmark = {"b/1": question + self.listed(form) + tail}
        found = filters.without_benchmarks(rows, dict.fromkeys(asked, ()), {}, benchmark)
        assert found.dropped == dict.fromkeys(asked, "repeats the question b/1")
        benchmark = {"b/1": context + question + self.listed(form) + tail}
        found = filters.without_benchmarks(rows, dict.fromkeys(asked, ()), {}, benchmark)
        assert found.dropped == dict.fromkeys(asked, "repeats the question b/1")

    def test_a_benchmarks_request_without_a_question_mark_is_found_before_a_list(self) -> None:
        text = "Name the colour of the ring that the man lifts after the cut"
        rows = [{"id": "k", "messages": [{"role": "user", "content": text}]}]
        for form in ("\n- {text}", "\n[{letter}] {text}", "\nOption {letter}: {text}"):
            found = filters.without_benchmarks(
                rows, {"k": ()}, {}, {"b/1": text + self.listed(form)}
            )
            assert found.dropped == {"k": "repeats the question b/1"}

    @pytest.mark.parametrize(
        "asked",
        [
            "What is the man doing in the video?",
            "Watch the video. What is the man doing in the video?\n- he cuts\n- he fries",
            "Which of the following statements is correct?\n- he cuts\n- he fries",
            "Who wins it?\n- he\n- she\nAnswer with the option's letter from the list above.",
            "Describe the video in detail.", "What happens after the second cut of the film?",
            "What is the man in the red coat doing?", "Pick the best of the options below.",
        ],
    )  # fmt: skip
    @pytest.mark.parametrize("form", ["\n- {text}", "\n[{letter}] {text}", "\n{letter}. {text}"])
    def test_what_is_part_of_a_longer_question_repeats_none(self, asked: str, form: str) -> None:
        """Common questions and instructions are in many a benchmark's question, and none of it."""
        tail = self.listed(form) + "\nAnswer with the option's letter from the list above."
        questions = [
            "What is the man doing in the video when the woman in the blue dress opens the door?",
            "What is the man in the red coat doing while the woman in blue opens the door to the "
            "garden after the second cut of the film?",
            "The dog runs out of the house. Which of the following statements is correct?",
            "The cat stays in the warm kitchen. Which of the following statements is correct?",
            "Describe the video in detail. Then tell what colour the ring has that he lifts there.",
            "Describe the video in detail. Then count the onions that the man cuts in the kitchen.",
            "Pick the best of the options below.\nHow many onions lie on the table at the end?",
        ]
        rows = [{"id": "k", "messages": [{"role": "user", "content": asked}]}]
        benchmark = {f"b/{n}": question + tail for n, question in enumerate(questions)}
        assert filters.without_benchmarks(rows, {"k": ()}, {}, benchmark).dropped == {}

    @pytest.mark.parametrize(
        "text",
        [
            "Did A. Smith meet B. Jones before the race began?",
            "Watch the video.\n1. What does he cut?\n2. What does he fry?",
            "At 1. 30 he left. When did he come back?", "Who says 'a' and 'b'?",
            "Note 3: he left at 2: 15. Why?",
        ],
    )  # fmt: skip
    def test_what_looks_like_options_and_is_none_stays(self, text: str) -> None:
        assert filters.stem(text) == text

    def test_events_that_letters_put_in_order_are_part_of_the_question(self) -> None:
        events = "In which order does it happen?\n1. he cuts\n2. he fries\n3. he eats"
        assert filters.stem(f"{events}\nA. 1-2-3\nB. 3-2-1") == events

    def test_long_options_alone_make_no_repeated_question(self) -> None:
        options = tuple(f"the {one} runner who came to the start in a car" for one in "abcd")
        rows = [
            chat_row(key, STORY, Asked(category="Plot Understanding", question=question,
                                       options=options, answer=options[0], evidence_s=(0, 1)))
            for key, question in {"wins": "Who wins it?", "loses": "Who loses it?",
                                  "again": "Who wins it??"}.items()
        ]  # fmt: skip
        found = filters.without_repeats(rows, dict.fromkeys(("wins", "loses", "again"), ("v",)))
        assert found.dropped == {"again": "asks what wins asks of the same video"}

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

    @staticmethod
    def source(folder: Path, name: str, videos: int, questions: int = 1) -> Path:
        """A file with questions about videos of its own."""
        rows = [
            {"id": f"{name}/{n}/{q}", "messages": [{"role": "user", "content": [
                {"type": "video_url", "video_url": {"url": f"{name}{n}.mp4"}}]}]}
            for n in range(videos) for q in range(questions)
        ]  # fmt: skip
        write_rows(folder / f"{name}.jsonl", rows)
        return folder / f"{name}.jsonl"

    def test_the_papers_sft_shares_mix_files_exactly(self, tmp_path: Path) -> None:
        shares = synthesis.PUBLISHED["sft"]["shares"]
        files = {name: self.source(tmp_path, f"s{n}", 400) for n, name in enumerate(shares)}
        more = self.source(tmp_path, "more", 400)
        sources = [f"{name}={file}" for name, file in files.items()]
        # A source may have several files, and be named by its beginning.
        sources = [*sources[:-1], f"every={files['everything else']}", f"Everything={more}"]
        out = tmp_path / "out" / "sft.jsonl"
        out.parent.mkdir()
        assert mix_rows(sources, out, 1000, 0, "sft") == 1000
        rows = read_rows(out)
        found = Counter(row["source"] for row in rows)
        assert found == {name: round(1000 * share) for name, share in shares.items()}
        files_of_last = {row["id"][:3] for row in rows if row["source"] == "everything else"}
        assert files_of_last == {"s5/", "mor"}
        shown = rows[0]["messages"][0]["content"][0]["video_url"]["url"]
        assert Path(shown).parent == tmp_path, "the mixture is elsewhere, its videos are not"

    def test_the_papers_long_videos_are_shares_of_videos(self, tmp_path: Path) -> None:
        """A video brings all its questions, of which sources have different numbers."""
        files = [
            self.source(tmp_path, name, 200, questions)
            for name, questions in (("InternVid", 3), ("YouTube", 1), ("V-MME", 2))
        ]
        sources = [f"{file.stem}={file}" for file in files]
        out = tmp_path / "long.jsonl"
        assert mix_rows(sources, out, 380, 0, "long_video") == 188 * 3 + 115 + 77 * 2
        rows = read_rows(out)
        videos = {row["messages"][0]["content"][0]["video_url"]["url"] for row in rows}
        found = Counter(re.split(r"\d", video)[0] for video in videos)
        assert found == {"InternVid": 188, "YouTube": 115, "V-MME": 77}
        with pytest.raises(DataError, match="InternVid has 200 videos and 248 are wanted"):
            mix_rows(sources, out, 500, 0, "long_video")

    def test_sources_that_a_preset_lacks_or_does_not_know_are_named(self, tmp_path: Path) -> None:
        file = self.source(tmp_path, "a", 5)
        out = tmp_path / "out.jsonl"
        for given, said in {
            f"InternVid={file}": "without a file: YouTube, reasoning; V-MME-style",
            f"Vimeo={file}": "'Vimeo' is no source of the preset: InternVid; YouTube",
            str(file): "is not SOURCE=FILE, such as 'InternVid=rows.jsonl'",
        }.items():
            with pytest.raises(DataError, match=re.escape(said)):
                mix_rows([given], out, 3, 0, "long_video")
        with pytest.raises(DataError, match="no preset 'long'.*known: cpt, sft, long_video"):
            mix_rows([], out, 3, 0, "long")
        assert not out.exists()

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
        write_rows(tmp_path / "odd.jsonl", [{"messages": []}, {"messages": "text"}])
        with pytest.raises(DataError, match=r"odd\.jsonl, row 2, is not in the chat form"):
            mix_rows([f"{tmp_path}/odd.jsonl=1"], out, 1, seed=1)

    def test_rows_of_a_mixture_are_told_apart_by_their_ids(self, tmp_path: Path) -> None:
        """Also files of one name, rows that share an id within a file, and rows without one."""
        files = {
            Path("a/rows.jsonl"): [{"id": 1}, {"id": "x"}, {"id": "own"}, {"id": 7}],
            Path("b/rows.jsonl"): [{"id": "1"}, {}, {"id": "rows/x"}],
            Path("c.jsonl"): [{"id": 1}, {"id": "x"}, {"id": "twice"}, {"id": "twice"}],
        }
        made = told_apart(files)
        assert [[row["id"] for row in rows] for rows in made.values()] == [
            ["a/rows.jsonl/1/1", "a/rows.jsonl/2/x", "own", 7],
            ["b/rows.jsonl/1/1", "rows/2", "rows/rows/x"],
            ["c/1", "c/x", "c.jsonl/3/twice", "c.jsonl/4/twice"],
        ]
        assert files[Path("c.jsonl")][0] == {"id": 1}
        file = self.source(tmp_path, "a", 5)
        given = [f"InternVid={file}", f"YouTube={tmp_path}/../{tmp_path.name}/a.jsonl"]
        with pytest.raises(DataError, match="is given twice, and no row is drawn twice"):
            mix_rows(given, tmp_path / "out.jsonl", 3, 0, "long_video")


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

    def test_clips_of_one_fixed_camera_are_different_videos(self) -> None:
        """What stands still is most of them; a copy of one is found all the same."""
        rng = np.random.default_rng(0)
        coarse = Image.fromarray(rng.integers(0, 255, (6, 8, 3), dtype=np.uint8))
        room_HWC = np.asarray(coarse.resize((320, 180), Image.Resampling.BICUBIC))

        def clip(seed: int, later_s: float = 0.0, noise: float = 0.0) -> Any:
            rng = np.random.default_rng(seed)
            (x, y), speed = rng.integers(0, (280, 120)), rng.integers(-15, 15, 2)
            colour = rng.integers(0, 255, 3)
            pixels_THWC = np.repeat(room_HWC[None], 16, 0)
            for second, frame_HWC in enumerate(pixels_THWC):
                at = np.clip((x, y) + speed * (second + later_s), 0, (280, 120)).astype(int)
                frame_HWC[at[1] : at[1] + 60, at[0] : at[0] + 40] = colour
            noisy = pixels_THWC + rng.normal(0, noise, pixels_THWC.shape)
            return fingerprint(np.clip(noisy, 0, 255).astype(np.uint8))

        clips = {str(seed): clip(seed) for seed in range(12)}
        alike = [fingerprints.likeness(a, b) for a in clips.values() for b in clips.values()]
        assert float(np.median(alike)) > fingerprints.ALIKE
        names = named(clips)
        assert len(set(names.values())) >= 11
        copies = {f"copy of {n}": clip(int(n), later_s=0.25, noise=8) for n in clips}
        assert fingerprints.shown_in(copies, clips) == {
            f"copy of {n}": name for n, name in names.items()
        }
        still = np.repeat(room_HWC[None], 16, 0)
        shaken = [np.clip(still + rng.normal(0, 8, still.shape), 0, 255) for _ in "ab"]
        one, other = (fingerprint(frames.astype(np.uint8)) for frames in shaken)
        assert same(one, other), "noise is no motion"

    def test_a_copy_of_a_benchmarks_second_video_is_found_where_the_first_is_like_that(
        self, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Likeness does not carry over: what the second is like need not be like the first."""
        one, other = np.eye(512, dtype=np.float32)[:2]
        turned = {
            name: np.float32(np.cos(angle)) * one + np.float32(np.sin(angle)) * other
            for name, angle in {"v0.mp4": 0.0, "v1.mp4": 0.43, "v2.mp4": 0.6, "v3.mp4": 2.0}.items()
        }
        assert same(turned["v0.mp4"], turned["v1.mp4"]) and same(turned["v1.mp4"], turned["v2.mp4"])
        assert not same(turned["v0.mp4"], turned["v2.mp4"])
        held = tmp_path / "held"
        held.mkdir()
        for name in ("v0.mp4", "v1.mp4"):
            (held / name).write_bytes(b"")
        reads = lambda self, path: turned[path.name]  # noqa: E731
        monkeypatch.setattr("internvideo3.harness.data._Prints._read", reads)
        asked = Asked(category="Plot Understanding", question="Why?", evidence_s=(0, 1),
                      options=("a", "b"), answer="a")  # fmt: skip
        rows = [chat_row(name, replace(STORY, video=str(tmp_path / name)), asked)
                for name in ("v2.mp4", "v3.mp4")]  # fmt: skip
        write_rows(tmp_path / "rows.jsonl", rows)
        kept, dropped = check_rows(tmp_path / "rows.jsonl", tmp_path / "clean.jsonl", held, None)
        assert kept == 1 and dropped == {"v2.mp4": f"its video is benchmark {held / 'v1.mp4'}"}

    def test_every_video_is_compared_with_every_other_one(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Also across blocks, and for blank videos."""
        monkeypatch.setattr(fingerprints, "BLOCK", 16)
        monkeypatch.setattr(fingerprints, "COLUMNS", 24)
        rng = np.random.default_rng(0)
        held = {f"b{n}": rng.normal(0, 2, 8).astype(np.float32) for n in range(60)}
        held["blank"] = np.zeros(8, np.float32)
        mine = {f"v{n}": steps + rng.normal(0, 1, 8).astype(np.float32)
                for n, steps in enumerate(list(held.values())[:60])}  # fmt: skip
        mine["black"] = np.zeros(8, np.float32)
        truth = {
            key: first for key, steps in mine.items()
            if (first := next((k for k, one in held.items() if same(one, steps)), None))
        }  # fmt: skip
        assert fingerprints.shown_in(mine, held) == truth and truth["black"] == "blank"
        assert 5 < len(truth) < 60 and fingerprints.shown_in(mine, {}) == {}

    @pytest.mark.parametrize("width", [8, 64, 512])
    def test_names_are_those_of_comparing_every_pair(
        self, width: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Also across blocks, for copies of copies near the border, and for blank videos."""
        monkeypatch.setattr(fingerprints, "BLOCK", 16)
        monkeypatch.setattr(fingerprints, "COLUMNS", 24)
        rng = np.random.default_rng(width)
        drawn: dict[str, Any] = {}
        for n in range(300):
            new = rng.normal(0, 2, width)
            if drawn and rng.random() < 0.7:
                copied = list(drawn.values())[rng.integers(len(drawn))]
                new = copied * rng.uniform(0.5, 2) + rng.normal(0, rng.uniform(0, 1.2), width)
            drawn[f"v{n}"] = (new * (rng.random() > 0.03)).astype(np.float32)
        names: dict[str, str] = {}
        for key, mine in drawn.items():
            firsts = (one for one, name in names.items() if one == name)
            names[key] = next((one for one in firsts if same(drawn[one], mine)), key)
        assert named(drawn) == names
        assert 50 < len(set(names.values())) < 250
        assert named({}) == {}


class TestPipeline:
    """With a reader and a writer that know nothing of videos."""

    @staticmethod
    def curate(out: Path, videos: Any, question: str = json.dumps(GOOD), **more: Any) -> Any:
        def write(prompt: str, pictures: Any) -> str:
            if "Write [n]" in prompt:
                return "A man cooks [1]."
            return question if "Reply with JSON" in prompt else "A man cooks."

        def read(path: Path, **_: Any) -> Frames:
            return Frames(pixels_THWC=np.zeros((2, 8, 8, 3), np.uint8), indices=(0, 1),
                          source_fps=1.0, total_frames=20, duration_s=20.0, digest="x")  # fmt: skip

        told = Curation(out=out, changes=lambda video: [], read=read, write=write, per_video=1)
        return replace(told, **more).run(videos, lambda *_: None)

    @staticmethod
    def files(folder: Path, *names: str) -> list[Path]:
        for name in names:
            (folder / name).write_bytes(name.encode(errors="surrogateescape"))
        return sorted(folder.iterdir())

    def test_videos_of_odd_names_end_no_run(self, tmp_path: Path) -> None:
        """A name may be as long as a file's, and of bytes that are no text."""
        (tmp_path / "in").mkdir()
        long = "é" * 125 + ".mp4"
        videos = self.files(tmp_path / "in", "a.mp4", long, "caf\udce9.mp4")
        rows = self.curate(tmp_path / "out", videos, most_failures=0.5)
        shown = [row["messages"][0]["content"][0]["video_url"]["url"] for row in rows]
        assert [Path(one).name for one in shown] == ["a.mp4", long]
        keys_of(tmp_path / "out" / "questions.jsonl", rows)
        (drop,) = read_rows(tmp_path / "out" / "dropped.jsonl")
        assert r"caf\udce9.mp4': that is no UTF-8; rename it" in drop["reason"]
        usual = tmp_path / "in" / "a.mp4"
        digest = hashlib.sha256(str(usual.resolve()).encode()).hexdigest()[:8]
        assert rows[0]["id"] == f"a-{digest}/0", "folders of earlier versions have these names"

    @pytest.mark.parametrize(
        "reply",
        [
            '{"question": ' + "[" * 20_000,
            json.dumps(GOOD).replace('"start_s": 2', '"start_s": 2' + "0" * 400),
            json.dumps(GOOD | {"question": "What is \ud83d cut?"}),
            json.dumps(GOOD | {"distractors": ["a \udc00 leek", "a green pepper", "a carrot"]}),
        ],
        ids=["brackets", "digits", "half a character", "half a character in an option"],
    )
    def test_a_degenerate_reply_costs_one_question(self, reply: str, tmp_path: Path) -> None:
        (tmp_path / "in").mkdir()
        assert self.curate(tmp_path / "out", self.files(tmp_path / "in", "a.mp4"), reply) == []
        (drop,) = read_rows(tmp_path / "out" / "dropped.jsonl")
        assert "the reply is not the JSON that was asked for" in drop["reason"]

    def test_videos_that_are_added_are_dealt_the_next_categories(self, tmp_path: Path) -> None:
        """Whatever their names are; also where an earlier version wrote down no places."""
        (tmp_path / "in").mkdir()
        out = tmp_path / "out"
        self.curate(out, self.files(tmp_path / "in", *(f"{name}.mp4" for name in "klmnop")))
        for path in (out / "asked").iterdir():
            kept = json.loads(path.read_text())
            path.write_text(json.dumps({"rows": kept["rows"], "dropped": kept["dropped"]}))
        self.curate(out, self.files(tmp_path / "in", "a.mp4", "z.mp4"))
        rows = self.curate(out, self.files(tmp_path / "in", "b.mp4", "c.mp4"))
        wanted = Counter(synthesis.category_at(n) for n in range(10))
        assert Counter(row["category"] for row in rows) == wanted
        # One that is gone leaves its place to the next one.
        (tmp_path / "in" / "a.mp4").unlink()
        rows = self.curate(out, self.files(tmp_path / "in", "d.mp4"))
        assert Counter(row["category"] for row in rows) == wanted

    def test_a_video_that_was_replaced_is_curated_anew(self, tmp_path: Path) -> None:
        (tmp_path / "in").mkdir()
        videos = self.files(tmp_path / "in", "a.mp4", "b.mp4")
        self.curate(tmp_path / "out", videos)
        other = json.dumps(GOOD | {"question": "What does he cut last?"})
        videos[0].touch()
        asked = self.asked(self.curate(tmp_path / "out", videos, other))
        assert asked == [GOOD["question"]] * 2, "the same file with another time is no other one"
        videos[0].write_bytes(b"b.mp4")  # as long as before
        asked = self.asked(self.curate(tmp_path / "out", videos, other))
        assert asked == ["What does he cut last?", GOOD["question"]]

    @staticmethod
    def asked(rows: Any) -> list[str]:
        return [row["messages"][0]["content"][1]["text"].split("\n")[0] for row in rows]


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

    def test_a_folder_that_other_options_made_is_refused_and_its_card_stays_true(
        self, videos: Path, tmp_path: Path, teacher: Any
    ) -> None:
        first = self.options(videos, tmp_path, teacher, guesser=None, per_video=1)
        first = replace(first, writer=replace(first.writer, model="writer-A"))
        curate(first, lambda *_: None)
        card = (tmp_path / "card.md").read_text()
        assert "- writer: writer-A" in card and "- checked blind: False" in card
        asked = len(teacher.requests)
        writer = replace(first.writer, model="writer-B")
        other = replace(first, writer=writer, guesser=writer, per_video=3)
        with pytest.raises(DataError) as refused:
            curate(other, lambda *_: None)
        assert 'writer: "writer-A" there, "writer-B" now' in str(refused.value)
        assert "checked blind: false there, true now" in str(refused.value)
        assert "questions of a video: 1 there, 3 now" in str(refused.value)
        assert len(teacher.requests) == asked and (tmp_path / "card.md").read_text() == card
        # Where the server is, and how many may fail, decides no question.
        moved = replace(first.writer, url=first.writer.url.replace("127.0.0.1", "localhost"))
        curate(replace(first, writer=moved, most_failures=0.5), lambda *_: None)
        assert len(teacher.requests) == asked
        describe(tmp_path / "questions.jsonl", tmp_path / "report", ("again",))
        told = (tmp_path / "report" / "card.md").read_text()
        assert "- writer: writer-A" in told and "- command: again" in told
        (tmp_path / "curation.json").unlink()
        with pytest.raises(DataError, match=r"no curation\.json that says with what options"):
            curate(first, lambda *_: None)

    def test_a_folder_in_which_nothing_was_made_may_be_taken_over(
        self, videos: Path, tmp_path: Path, teacher: Any
    ) -> None:
        teacher.failures = [400]
        options = self.options(videos, tmp_path, teacher, guesser=None)
        with pytest.raises(EndpointError, match="refused"):
            curate(options, lambda *_: None)
        curate(replace(options, per_video=1), lambda *_: None)
        assert "- questions of a video: 1" in (tmp_path / "card.md").read_text()

    @pytest.mark.slow
    def test_scenes_are_found_by_the_real_detector(
        self, make_video: Any, tmp_path: Path, teacher: Any
    ) -> None:
        """Every cut of the video ends a clip; the detector may see a flash as one more."""
        (tmp_path / "in").mkdir()
        spec = make_video(tmp_path / "in" / "v.mp4", 1, 16)
        cuts = [scene.start_s for scene in spec.scenes[1:]]
        made = self.options(tmp_path / "in", tmp_path / "out", teacher, changes=None)
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

    def test_a_video_in_which_no_scenes_can_be_found_is_dropped(
        self, tmp_path: Path, teacher: Any
    ) -> None:
        """Its first and last pictures can be read, and one in the middle cannot."""
        import av

        path = tmp_path / "in" / "damaged.mp4"
        path.parent.mkdir()
        with av.open(str(path), "w") as container:
            stream: Any = container.add_stream("libx264", rate=10)
            stream.width, stream.height, stream.pix_fmt, stream.gop_size = 64, 64, "yuv420p", 10
            for number in range(400):
                frame = av.VideoFrame.from_ndarray(
                    np.full((64, 64, 3), number % 200, np.uint8), format="rgb24"
                )
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        with av.open(str(path)) as container:
            at = [packet.pos for packet in container.demux(video=0) if packet.size][206]
        damaged = bytearray(path.read_bytes())
        damaged[at : at + 4] = b"\xff" * 4
        path.write_bytes(bytes(damaged))
        options = CurateOptions(
            videos=(path,), out=tmp_path / "out", writer=patient(teacher), guesser=None,
            most_failures=1.0,
        )  # fmt: skip
        with pytest.raises(DataError, match="no question passed the checks"):
            curate(options, lambda *_: None)
        (drop,) = read_rows(tmp_path / "out" / "dropped.jsonl")
        assert "damaged.mp4 cannot be found: video_segmentation: " in drop["reason"]

    def test_rows_with_broken_videos_are_dropped_within_a_budget(
        self, videos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        def row(key: str, video: str) -> Any:
            asked = Asked(category="Plot Understanding", question=f"What of {key}?",
                          options=("a", "b"), answer="a", evidence_s=(0, 1))  # fmt: skip
            return chat_row(key, replace(STORY, video=video), asked)

        (tmp_path / "in").mkdir()
        (tmp_path / "in" / "broken.mp4").write_bytes(b"no video")
        (tmp_path / "in" / "v0.mp4").write_bytes((videos / "v0.mp4").read_bytes())
        rows = [row(f"good {n}", "v0.mp4") for n in range(200)]
        write_rows(tmp_path / "in" / "rows.jsonl", [*rows[:7], row("bad", "broken.mp4"), *rows[7:]])
        out = tmp_path / "clean.jsonl"
        kept, dropped = check_rows(tmp_path / "in" / "rows.jsonl", out, None, None)
        assert kept == 200 and "broken.mp4" in dropped["bad"]
        assert "rows.jsonl, row 8 (id bad) is left out" in caplog.text
        (drop,) = read_rows(tmp_path / "clean.dropped.jsonl")
        assert drop == {"id": "bad", "reason": dropped["bad"]}
        shown = read_rows(out)[0]["messages"][0]["content"][0]["video_url"]["url"]
        assert Path(shown).is_file(), "a path into the folder of the rows is one from here as well"
        many = [*rows, *(row(f"bad {n}", "broken.mp4") for n in range(20))]
        write_rows(tmp_path / "in" / "rows.jsonl", many)
        with pytest.raises(
            DataError, match=r"11 of 220 rows .* more than 1%; the last one, row 21"
        ):
            check_rows(tmp_path / "in" / "rows.jsonl", tmp_path / "none.jsonl", None, None)
        assert not (tmp_path / "none.jsonl").exists()
        made = check_rows(tmp_path / "in" / "rows.jsonl", tmp_path / "some.jsonl", None, None, 0.1)
        assert (made[0], len(made[1])) == (200, 20)

    def test_rows_are_told_apart_by_ids_and_a_broken_benchmark_is_an_error(
        self, videos: Path, tmp_path: Path
    ) -> None:
        rows = tmp_path / "rows.jsonl"
        for ids, said in {
            (1, None): r"rows\.jsonl, row 2, has no `id`",
            (1, 2, "1"): r"rows\.jsonl, rows 1 and 3, have the same id '1'",
        }.items():
            write_rows(rows, [{"id": one, "messages": []} for one in ids])
            for command in (
                lambda: check_rows(rows, tmp_path / "out.jsonl", None, None),
                lambda: filter_rows("gap", rows, tmp_path / "out.jsonl", None, 0),
            ):
                with pytest.raises(DataError, match=said):
                    command()
        write_rows(rows, [{"id": 1, "messages": []}])
        (tmp_path / "held").mkdir()
        (tmp_path / "held" / "lost.mp4").write_bytes(b"no video")
        with pytest.raises(DataError, match=r"benchmark's video .*lost\.mp4 cannot be compared"):
            check_rows(rows, tmp_path / "out.jsonl", tmp_path / "held", None)
        write_rows(tmp_path / "asked.jsonl", [{"id": 1, "text": "Why?"}])
        with pytest.raises(DataError, match=r"asked\.jsonl, row 1, has no `question`"):
            check_rows(rows, tmp_path / "out.jsonl", None, tmp_path / "asked.jsonl")

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

    def test_a_benchmarks_videos_are_found_whatever_they_are_called_and_linked(
        self, videos: Path, tmp_path: Path
    ) -> None:
        def row(number: int) -> Any:
            asked = Asked(category="Plot Understanding", question=f"What of {number}?",
                          options=("a", "b"), answer="a", evidence_s=(0, 1))  # fmt: skip
            story = replace(STORY, video=str(videos / f"v{number}.mp4"))
            return chat_row(str(number), story, asked)

        write_rows(tmp_path / "rows.jsonl", [row(n) for n in range(4)])
        held, away = tmp_path / "held", tmp_path / "away"
        for folder in (held, away):
            folder.mkdir()
        names = held / "a.M4V", held / "b1946ac9", away / "c.ts"
        for number, name in enumerate(names):
            name.write_bytes((videos / f"v{number}.mp4").read_bytes())
        moving = [Image.new("L", (32, 32), shade) for shade in (0, 90, 30, 200, 10)]
        moving[0].save(held / "d.gif", save_all=True, append_images=moving[1:], duration=400)
        (held / "linked").symlink_to(away)
        (away / "round").symlink_to(held)
        (held / "notes.txt").write_text("no video")
        (held / "parts.zip").write_bytes(b"no video")
        told: list[str] = []
        kept, dropped = check_rows(
            tmp_path / "rows.jsonl", tmp_path / "clean.jsonl", held, None, tell=told.append
        )
        assert kept == 1 and dropped.keys() == {"0", "1", "2"}
        assert told == [
            f"{held}: compared with 4 of its files; not with 1 that no decoder reads (parts.zip), "
            "nor with 1 texts, pictures and the like."
        ]

    def test_videos_are_found_once(self, videos: Path, tmp_path: Path) -> None:
        """Named and in the folder, by a link, in another writing; a named one by any ending."""
        (tmp_path / "again.mp4").symlink_to(videos / "v0.mp4")
        (tmp_path / "all").symlink_to(videos)
        (tmp_path / "clip.dat").write_bytes(b"")
        found = found_videos((videos / "v1.mp4", videos, tmp_path, videos / ".." / videos.name))
        assert [path.name for path in found] == ["v1.mp4", "v0.mp4", "v2.mp4", "v3.mp4"]
        assert found_videos((tmp_path / "clip.dat",)) == [tmp_path / "clip.dat"]
        with pytest.raises(DataError, match="vidoes is not there"):
            found_videos((videos, tmp_path / "vidoes"))

    def test_the_place_of_results_is_made_before_the_work(self, tmp_path: Path) -> None:
        commands: dict[str, Any] = {
            "check": lambda rows, out: check_rows(rows, out, None, None),
            "filter": lambda rows, out: filter_rows("iou", rows, out, None, 0),
            "mix": lambda rows, out: mix_rows([f"{rows}=1"], out, 1, 0),
        }
        rows = tmp_path / "rows.jsonl"
        (tmp_path / "folder.jsonl").mkdir()
        for name, command in commands.items():
            with pytest.raises(DataError, match=r"out\.csv must end in \.jsonl or \.parquet"):
                command(rows, tmp_path / "out.csv")
            with pytest.raises(DataError, match=r"folder\.jsonl is a folder; give a file"):
                command(rows, tmp_path / "folder.jsonl")
            with pytest.raises(DataError, match=r"rows\.jsonl does not exist"):
                command(rows, tmp_path / "new" / name / "out.jsonl")
            assert (tmp_path / "new" / name).is_dir()
        write_rows(rows, [TestFilters.rollout("half", "10 - 15")])
        commands["filter"](rows, tmp_path / "newer" / "kept.jsonl")
        assert len(read_rows(tmp_path / "newer" / "kept.jsonl")) == 1

    def test_two_commands_do_not_write_to_one_place(self, videos: Path, tmp_path: Path) -> None:
        out = tmp_path / "out.jsonl"
        nobody = Endpoint(url="http://127.0.0.1:9/v1", model="m", attempts=1)
        rows, asking = tmp_path / "rows.jsonl", Any
        curated = self.options(videos, tmp_path, nobody, writer=nobody, guesser=None)
        sampled = SampleOptions(rows=rows, out=out, model="none")
        rollouts = RolloutsOptions(rows=rows, out=out, asking=asking)  # type: ignore[arg-type]
        commands: dict[str, Any] = {
            "curate": lambda: curate(curated, lambda *_: None),
            "sample": lambda: write_samples(sampled, lambda *_: None),
            "rollouts": lambda: write_rollouts(rollouts, lambda *_: None),
        }
        for name, command in commands.items():
            path = tmp_path / (".lock" if name == "curate" else ".out.jsonl.lock")
            with lock(path), pytest.raises(DataError, match="another command is writing to"):
                command()
            with pytest.raises(ValueError, match=r"did not answer|does not exist|no checkpoint"):
                command()
            assert not path.exists()

    def test_rows_of_different_pictures_are_no_repeats(self, tmp_path: Path) -> None:
        def row(key: str, *shown: str, kind: str = "image_url") -> Any:
            parts = [{"type": kind, kind: {"url": one}} for one in shown]
            said = {"type": "text", "text": "What is seen here?"}
            return {"id": key, "messages": [{"role": "user", "content": [*parts, said]}]}

        for n in range(4):
            Image.new("RGB", (8, 8), (40 * n, 0, 0)).save(tmp_path / f"{n}.png")
        (tmp_path / "copy.png").write_bytes((tmp_path / "0.png").read_bytes())
        web = "https://host/a.png"
        rows = [
            *(row(str(n), f"{n}.png") for n in range(4)), row("copied", "copy.png"),
            row("pair", "0.png", "1.png"), row("turned", "1.png", "0.png"),
            row("pair again", "copy.png", "1.png"), row("web", web), row("web again", web),
            row("lost", "none.png"), row("text"), row("text again"),
            row("heard", "a.wav", kind="audio_url"), row("heard else", "b.wav", kind="audio_url"),
        ]  # fmt: skip
        write_rows(tmp_path / "rows.jsonl", rows)
        _, dropped = check_rows(tmp_path / "rows.jsonl", tmp_path / "clean.jsonl", None, None)
        assert f"cannot read the picture {tmp_path / 'none.png'}: " in dropped.pop("lost")
        assert dropped == {
            "copied": "asks what 0 asks of the same picture",
            "pair again": "asks what pair asks of the same pictures",
            "web again": "asks what web asks of the same picture",
            "text again": "asks what text asks",
        }
        unnamed = filters.without_repeats(rows[:2], {"0": (), "1": ()})
        assert not unnamed.dropped, "rows with media of which nothing is known are no repeats"

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

    def test_half_a_character_becomes_one_that_can_be_written(self, teacher: Any) -> None:
        teacher.answer = lambda prompt, pictures: "A man \ud83d"
        assert patient(teacher).write("x") == "A man ?"

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
    write_rows(tmp_path / "lines.jsonl", [{"id": "a\u2028b\x85c"}])
    assert read_rows(tmp_path / "lines.jsonl") == [{"id": "a\u2028b\x85c"}]
    (tmp_path / "bad.jsonl").write_text('{"id": 1}\n{"id": \n')
    with pytest.raises(DataError, match="line 2, is no JSON"):
        read_rows(tmp_path / "bad.jsonl")


def test_a_parquet_file_holds_what_any_of_its_rows_has(tmp_path: Path) -> None:
    """Texts beside videos, of one id a number and of the other a text; all comes back as it was."""
    said = [{"role": "user", "content": "Say red."}]
    rows = [
        {"id": 1, "messages": said, "answer": "red"},
        {"id": "v", "messages": said, "answer": 3, "options": ["a", "b"], "category": "c"},
        {"id": 2.0, "messages": said, "answer": [2.5, 7], "options": None, "doc": {"x": {}}},
        {"id": 2**70, "messages": said, "predictions": ["a", "b"], "doc": {"z": None}, "n": 1},
        {"id": "w", "messages": said, "n": 2, "duration_s": 2.5, "options": [], "ok": True},
    ]
    path = tmp_path / "rows.parquet"
    write_rows(path, rows)
    read = read_rows(path)
    assert read == rows, "what a row has not is absent, and what is null in it is null"
    kinds = [[type(value) for value in (row["id"], row.get("answer"))] for row in read]
    assert kinds == [[type(value) for value in (row["id"], row.get("answer"))] for row in rows]
    write_rows(path, [])
    assert read_rows(path) == []


def test_plain_columns_of_a_parquet_file_are_plain_to_others(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "rows.parquet"
    write_rows(path, [{"id": "a", "n": 1}, {"id": "b", "x": 0.5, "predictions": ["p"]}])
    told = {field.name: str(field.type) for field in pyarrow.parquet.read_schema(path)}
    assert told["id"] == "string" and told["n"] == "int64" and told["x"] == "double"
    assert told["predictions"].startswith("list<")
    said = [{"role": "user", "content": "Say red."}]
    theirs = pyarrow.table({"id": ["a", "b"], "messages": [said, said], "answer": ["x", None]})
    pyarrow.parquet.write_table(theirs, path)
    assert read_rows(path) == [{"id": "a", "messages": said, "answer": "x"},
                               {"id": "b", "messages": said}]  # fmt: skip


def test_values_and_files_that_cannot_be_held_are_told(tmp_path: Path) -> None:
    for name in ("x.jsonl", "x.parquet"):
        with pytest.raises(DataError, match=rf"{name}, row 2, has what JSON cannot hold .*bytes"):
            write_rows(tmp_path / name, [{"id": 1}, {"id": 2, "answer": b"bytes"}])
    with pytest.raises(DataError, match=r"must end in \.jsonl or \.parquet"):
        write_rows(tmp_path / "x.csv", [{"id": 1}])
    assert not list(tmp_path.iterdir())
    (tmp_path / "x.parquet").write_bytes(b"no table")
    with pytest.raises(DataError, match="is no Parquet file"):
        read_rows(tmp_path / "x.parquet")


@pytest.mark.parametrize("kind", ["video_url", "image_url"])
@pytest.mark.parametrize(
    ("url", "is_path"),
    [
        ("https://host/v.mp4", False), ("S3://bucket/v.mp4", False), ("data:x;base64,aa", False),
        ("v.mp4", True), ("part 1: hall.mp4", True), ("take:2.mp4", True), ("../v.mp4", True),
    ],
)  # fmt: skip
def test_paths_move_with_their_rows_and_addresses_stay(
    kind: str, url: str, is_path: bool, tmp_path: Path
) -> None:
    row = {"messages": [{"role": "user", "content": [{"type": kind, kind: {"url": url}}]}]}
    (message,) = moved(row, tmp_path / "in", tmp_path / "out")["messages"]
    assert message["content"][0][kind]["url"] == (str(tmp_path / "in" / url) if is_path else url)
    assert moved(row, tmp_path / "in", tmp_path / "x" / ".." / "in") == row


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
