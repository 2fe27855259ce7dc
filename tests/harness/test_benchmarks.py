"""Every benchmark end to end, offline: published layouts, lmms-eval's engine, the real decoder.

pytest tests/harness/test_benchmarks.py
"""

import contextlib
import importlib
import importlib.util
import json
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from typer.testing import CliRunner

from internvideo3.harness import cli, evaluate
from internvideo3.harness.agent.budget import Budget
from internvideo3.harness.agent.setting import AgentSettings
from internvideo3.harness.check import Rates, check
from internvideo3.harness.direct import Answerer
from internvideo3.harness.options import EvalOptions
from internvideo3.harness.preflight import PreflightError, suite_names
from internvideo3.harness.recorder import ErrorBudgetError, SuiteRecorder
from internvideo3.harness.rescore import rescore
from internvideo3.harness.store import RunStore, read_rows
from internvideo3.reports.summary import summarise_paths
from internvideo3.tasks.benchmarks.catalogue import BENCHMARKS
from internvideo3.tasks.benchmarks.lmms import task_files
from internvideo3.tasks.benchmarks.local import DataError, load_local
from internvideo3.tasks.benchmarks.protocol import Benchmark, Raw
from internvideo3.tasks.benchmarks.wording import table
from internvideo3.tasks.brief import EVALUABLE
from internvideo3.tasks.scoring import aggregate, score
from internvideo3.tasks.scoring.result import Score

SMALL = {"max_frames": 4, "min_pixels": 4096, "max_pixels": 4096, "max_new_tokens": 8}
SUBTITLED = ("videomme_subtitles", "videomme_v2_subtitles", "longvideobench_subtitles")
SUITES = (*BENCHMARKS, *SUBTITLED)
HIDDEN = {"egoschema"}


def small_benchmarks() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "small_benchmarks", Path(__file__).with_name("small_benchmarks.py")
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    written: Path = small_benchmarks().write_all(tmp_path_factory.mktemp("data"))
    return written


@pytest.fixture(scope="module")
def options(data: Path, tmp_path_factory: pytest.TempPathFactory) -> EvalOptions:
    out = tmp_path_factory.mktemp("runs") / "paper"
    return EvalOptions(model="scale:base", suites=SUITES, out=out, data=data, **SMALL)


@contextlib.contextmanager
def remembered() -> Iterator[list[tuple[Any, str]]]:
    """Questions that the model is asked meanwhile, each with its prompt."""
    seen: list[tuple[Any, str]] = []
    render = Answerer._render

    def remember(self: Answerer, question: Any) -> Any:
        rendered = render(self, question)
        seen.append((question, rendered.prefix + rendered.tail))
        return rendered

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Answerer, "_render", remember)
        yield seen


@pytest.fixture(scope="module")
def asked(options: EvalOptions) -> dict[str, Any]:
    """Runs all suites once; what the model was asked, in order."""
    with remembered() as seen:
        evaluate.evaluate(options)
    return {"questions": seen}


def samples(options: EvalOptions, suite: str) -> list[dict[str, Any]]:
    return read_rows(options.out / "samples" / f"{suite}.jsonl")


@pytest.mark.parametrize("suite", SUITES)
def test_every_question_is_answered_and_scored(
    suite: str, options: EvalOptions, asked: dict[str, Any]
) -> None:
    rows = samples(options, suite)
    assert rows and all(row["error"] is None for row in rows)
    assert len({row["id"] for row in rows}) == len(rows)
    assert all("\n" not in row["id"] and row["id"].startswith(f"{suite}/") for row in rows)
    assert all(row["tokens"]["prompt"] > 20 for row in rows)
    scored = [(row["doc"], Score.from_dict(row["official"])) for row in rows]
    result = json.loads((options.out / "results.json").read_text())[suite]
    assert result["value"] == aggregate(rows[0]["benchmark"], scored).value
    outcomes = {row["official"]["outcome"] for row in rows}
    assert ("no_truth" in outcomes) == (suite in HIDDEN)


@pytest.mark.parametrize("suite", SUITES)
def test_the_recorded_answer_is_right_when_it_is_given(
    suite: str, options: EvalOptions, asked: dict[str, Any]
) -> None:
    for row in samples(options, suite):
        text = row["answer"]
        if row["answer_type"] == "windows":
            text = json.dumps([[*window, 1.0] for window in row["doc"]["relevant_windows"]])
        elif row["options"] and suite not in HIDDEN:
            text = "ABCDEFGH"[row["options"].index(text)]
        found = score(row["benchmark"], row["doc"], text, rule="plain")
        hidden = suite in HIDDEN or found.outcome == "judge_needed"
        assert found.value == (None if hidden else 1.0), (row["id"], text, found)


PROMPTS = {
    "videomme": "videomme.utils.videomme_doc_to_text",
    "videomme_v2": "videomme_v2.utils.videomme_v2_doc_to_text",
    "longvideobench": "longvideobench.utils.longvideobench_doc_to_text",
    "mlvu": "mlvu.utils.mlvu_doc_to_text",
    "lvbench": "lvbench.utils.lvbench_doc_to_text",
    "vrbench": "vrbench.utils.vrbench_doc_to_text",
    "egoschema": "egoschema.utils.egoschema_doc_to_text",
    "egoschema_subset": "egoschema.utils.egoschema_doc_to_text",
    "perceptiontest": "perceptiontest.val.utils.perceptiontest_val_doc_to_text",
    "vsibench": "vsibench.utils.vsibench_doc_to_text",
    "mmsi_bench": "mmsi_bench.utils.msr_doc_to_text",
    **{f"timelens_{part}": "timelens.utils.timelens_doc_to_text"
       for part in ("activitynet", "charades", "qvhighlights")},
}  # fmt: skip
"""Where lmms-eval builds the prompts that are reused."""
REUSED = [name for name, one in BENCHMARKS.items() if one.lmms and one.official.prompt is None]


def without(benchmark: Benchmark, field: str) -> Benchmark:
    def drop(raws: Sequence[Raw]) -> Iterator[Raw]:
        whole = benchmark.data.complete(raws) if benchmark.data.complete else iter(raws)
        yield from ({k: v for k, v in raw.items() if k != field} for raw in whole)

    return replace(benchmark, data=replace(benchmark.data, complete=drop))


@pytest.fixture(scope="module")
def prompt_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """(benchmark, its document in the task's file) → lmms-eval's own prompt."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hf")))

        def build(name: str, doc: dict[str, Any]) -> str:
            module, function = f"lmms_eval.tasks.{PROMPTS[name]}".rsplit(".", 1)
            settings = {"pre_prompt": "", "post_prompt": "", "mca_post_prompt": "",
                        "na_post_prompt": ""}  # fmt: skip
            made: str = getattr(importlib.import_module(module), function)(doc, settings)
            return made

        yield build


@pytest.mark.parametrize("name", REUSED)
def test_what_preflight_passes_can_be_asked_and_averaged(
    name: str, data: Path, tmp_path: Path, prompt_of: Any
) -> None:
    """Whatever field the annotations lack: it is said at once, or nothing needs it."""
    known = BENCHMARKS[name]
    refused = []
    for field in load_local(known, data, known.official).docs[0]["raw"]:
        poorer = without(known, field)
        try:
            local = load_local(poorer, data, known.official)
        except DataError as error:
            assert field in str(error)
            refused.append(field)
            continue
        files = task_files(name, poorer, known.official, local.docs, tmp_path, tmp_path)
        docs = [json.loads(line) for line in files[tmp_path / f"{name}.jsonl"].splitlines()]
        assert all(prompt_of(name, doc).strip() for doc in docs)
        blank = [(doc["doc"], score(known.scorer, doc["doc"], "B")) for doc in local.docs]
        aggregate(known.scorer, blank)
    assert refused


def test_preflight_names_what_only_the_average_reads(data: Path) -> None:
    known = BENCHMARKS["videomme_v2"]
    with pytest.raises(DataError, match="cannot be averaged as published.*group_type"):
        load_local(without(known, "group_type"), data, known.official)


@pytest.mark.parametrize("suite", BENCHMARKS)
def test_the_prompt_holds_the_question_its_options_and_its_media(
    suite: str, options: EvalOptions, asked: dict[str, Any]
) -> None:
    rows = samples(options, suite)
    for row in rows:
        text = " ".join(str(row["question"]).split())
        shown = [
            (question, prompt)
            for question, prompt in asked["questions"]
            if text in " ".join(prompt.split())
            and (not question.clips or question.clips[0].path == row["video"])
            and bool(question.clips) == (bool(row["video"]) and BENCHMARKS[suite].between is None)
            and all(option in prompt for option in row["options"] or ())
        ]
        assert shown, row["id"]
        question, prompt = shown[0]
        assert len(question.clips) + len(question.images) >= 1
        media = prompt.count("<|video_pad|>") + prompt.count("<|image_pad|>")
        assert media == len(question.clips) + len(question.images)


def test_media_stand_where_the_prompt_names_them(asked: dict[str, Any]) -> None:
    kinds = [
        [part["type"] for part in question.messages[-1]["content"]]
        for question, prompt in asked["questions"]
        if "First" in prompt and len(question.clips) == 2
    ]
    # Once for each of the two suites with these documents.
    assert kinds == [["text", "video", "text", "video", "text", "image", "text"]] * 2


def test_subtitles_stand_between_the_pictures_that_they_fall_between(
    asked: dict[str, Any], options: EvalOptions, tmp_path: Path
) -> None:
    shown = [
        (question, prompt) for question, prompt in asked["questions"]
        if len(question.images) == 2 and "Look." in prompt
    ]  # fmt: skip
    # Two seconds of video, so two pictures, at 0 and 1 s; the cue's middle is at 0.9 s.
    assert len(shown) == 2
    for question, prompt in shown:
        kinds = [part["type"] for part in question.messages[-1]["content"]]
        assert kinds == ["image", "text", "image", "text"]
        assert (
            prompt.index("<|image_pad|>") < prompt.index("Look.") < prompt.rindex("<|image_pad|>")
        )
        assert prompt.index("Look.") < prompt.index("Question: ")
    run = replace(
        options, suites=("longvideobench_interleaved",), control="shuffled", out=tmp_path / "s"
    )
    with remembered() as mixed:
        assert not evaluate.evaluate(run).errors
    assert [row["sampling"] for row in samples(run, "longvideobench_interleaved")] == [
        {"steps_over_s": doc["between"]["length_s"]}
        for doc in evaluate.load_benchmarks(run)[0].docs
    ]
    other = mixed[0][0].images
    assert [image.tobytes() for image in other] != [i.tobytes() for i in shown[0][0].images]


def test_missing_subtitles_are_found_before_the_run(data: Path, tmp_path: Path) -> None:
    shutil.copytree(data / "longvideobench", tmp_path / "longvideobench")
    (tmp_path / "longvideobench/subtitles/lv_1_en.json").unlink()
    command = ["eval", "--model", "scale:base", "--suite", "longvideobench_interleaved"]
    done = CliRunner().invoke(cli.app, [*command, "--data", str(tmp_path), "--check"])
    assert done.exit_code == 1 and "lv_1_en.json" in done.output


def test_subtitles_that_are_nowhere_are_not_asked_for(
    options: EvalOptions, data: Path, tmp_path: Path
) -> None:
    """A video may have none; a benchmark may not, or the run would be named for what it lacks."""
    shutil.copytree(data / "videomme", tmp_path / "videomme")
    shutil.rmtree(tmp_path / "videomme/subtitle")
    run = replace(options, data=tmp_path, suites=("videomme_subtitles",), out=tmp_path / "run")
    with pytest.raises(PreflightError, match="no video of .* has subtitles"):
        evaluate.evaluate(run)
    assert not run.out.exists()
    assert not evaluate.evaluate(replace(run, suites=("videomme",))).errors


def test_the_error_budget_is_of_all_suites_together(
    options: EvalOptions, data: Path, tmp_path: Path
) -> None:
    for suite in ("mvbench", "lvbench"):
        shutil.copytree(data / suite, tmp_path / suite)
        for video in (tmp_path / suite).rglob("*.mp4"):
            video.write_bytes(b"no video")
    run = replace(
        options, data=tmp_path, suites=("lvbench", "mvbench"), out=tmp_path / "run", max_errors=None
    )
    failed = {suite: 0 for suite in run.suites}
    for row in evaluate.evaluate(run).errors:
        failed[row["suite"]] += 1
    assert all(failed.values())
    fresh = replace(run, out=tmp_path / "again", max_errors=failed["lvbench"])
    with pytest.raises(ErrorBudgetError, match="samples failed, --max-errors accepts"):
        evaluate.evaluate(fresh)
    assert evaluate.evaluate(replace(fresh, max_errors=sum(failed.values()))).errors


def test_subtitles_are_shown_where_they_are_asked_for(asked: dict[str, Any]) -> None:
    prompts = [prompt for _, prompt in asked["questions"]]
    for words in ("I am here.", "over here", "Look."):
        assert any(words in prompt for prompt in prompts)
    assert any("No subtitles available" in prompt for prompt in prompts)
    assert suite_names("videomme,mlvu", "both") == ["videomme", "videomme_subtitles", "mlvu"]
    assert suite_names("videomme", "on") == ["videomme_subtitles"]


def test_answers_without_public_truth_are_written_for_the_server(
    options: EvalOptions, asked: dict[str, Any]
) -> None:
    file = options.out / "submissions" / "egoschema.json"
    rows = samples(options, "egoschema")
    read = {row["doc"]["video_idx"]: row["official"]["parsed"] for row in rows}
    expected = {video: "ABCDE".index(letter) for video, letter in read.items() if letter}
    assert json.loads(file.read_text()) == expected
    assert not (options.out / "submissions" / "egoschema_subset.json").exists()


def test_unreadable_answers_count_where_the_truth_is_hidden(
    options: EvalOptions, asked: dict[str, Any]
) -> None:
    result = json.loads((options.out / "results.json").read_text())["egoschema"]
    unread = sum(row["official"]["parsed"] is None for row in samples(options, "egoschema"))
    assert (result["no_truth"], result["unreadable"]) == (2, unread)
    sent = json.loads((options.out / "submissions/egoschema.json").read_text())
    assert len(sent) == 2 - unread


def test_both_presets_run_and_leave_the_documents_alone(
    options: EvalOptions, tmp_path: Path
) -> None:
    suites = ("tomato", "timelens_charades", "videomme_v2", "mmsi_video", "tempcompass_full")
    official = replace(options, preset="official", suites=suites, out=tmp_path / "official")
    summary = evaluate.evaluate(official)
    assert not summary.errors
    for suite in suites:
        ids = [row["id"] for row in samples(official, suite)]
        assert ids == [row["id"] for row in samples(options, suite)]
    run = json.loads((summary.run / "run.json").read_text())
    assert (
        "official" in run["comparable"]["reason"]
        or "own, not the paper's" in (run["comparable"]["reason"])
    )


def test_frames_of_all_videos_together_where_the_protocol_counts_so(
    options: EvalOptions, tmp_path: Path
) -> None:
    sizes = {"min_pixels": 4096, "max_pixels": 4096, "max_new_tokens": 2}
    run = EvalOptions(
        model=options.model,
        suites=("mmsi_video_sc", "mmsi_video"),
        data=options.data,
        preset="official",
        out=tmp_path / "run",
        **sizes,
    )
    coverage, uniform = evaluate.load_benchmarks(run)
    # Two videos of 2 s and one of 2 s; the annotations say that 8 frames a second are all there is.
    assert [doc["fps"] for doc in coverage.docs] == [8, 8]
    assert [doc["fps"] for doc in uniform.docs] == [8, 8]
    assert run.settings(uniform).max_frames == 50 and run.settings(coverage).max_frames == 300
    with remembered() as seen:
        assert not evaluate.evaluate(run).errors
    assert {clip.fps for question, _ in seen for clip in question.clips} == {8}
    rows = samples(run, "mmsi_video_sc")
    # Reports show the frames of each question, and a suite's settings do not tell them.
    assert [row["sampling"] for row in rows] == [{"fps": 8}] * 2
    # 16 of 16 frames of each video, in pairs of 4 tokens; the other question has one video.
    assert rows[0]["tokens"]["prompt"] - rows[1]["tokens"]["prompt"] > 8 * 4


@pytest.mark.parametrize("asked_for", [{}, {"fps": 1.0}, {"max_frames": 4}])
def test_a_question_says_how_its_frames_were_taken_where_its_suite_does_not(
    options: EvalOptions, tmp_path: Path, asked_for: dict[str, Any]
) -> None:
    """A rate that the command gives holds for every question."""
    run = replace(options, suites=("mmsi_video",), preset="official", out=tmp_path, max_frames=None)
    run = replace(run, **asked_for)
    (one,) = evaluate.load_benchmarks(run)
    recorder = SuiteRecorder(
        one, RunStore(tmp_path, {}, ()), mine=one.docs, blind=None, options=run,
        progress=lambda *_: None,
    )  # fmt: skip
    assert recorder._sampling(one.docs[0]) == {"sampling": {"fps": None if asked_for else 8}}


def test_settings_are_those_of_the_protocol_unless_given(options: EvalOptions) -> None:
    plain = EvalOptions(
        model=options.model, suites=("mvbench",), out=options.out, data=options.data
    )
    (benchmark,) = evaluate.load_benchmarks(plain)
    settings = plain.settings(benchmark)
    assert (settings.fps, settings.max_frames, settings.max_new_tokens) == (4, 256, 16)
    assert (settings.min_pixels, settings.max_pixels) == (256 * 1024, 768 * 1024)
    assert options.settings(benchmark).max_frames == 4
    assert plain.departures() == [] and len(options.departures()) == 3


def test_a_run_says_suite_by_suite_why_it_is_not_comparable(
    options: EvalOptions, asked: dict[str, Any]
) -> None:
    run = json.loads((options.out / "run.json").read_text())
    suites = run["comparable"]["suites"]
    assert "4 of 2,700 questions" in suites["videomme"]["reasons"]
    assert "the number of frames was given" in suites["videomme"]["reasons"]
    assert "subtitles are shown" in suites["videomme_subtitles"]["reasons"]
    assert run["suites"]["mvbench"]["protocol"]["source"].endswith("eval_mvbench.sh")
    assert run["suites"]["mvbench"]["settings"]["max_frames"] == 4


def test_rescoring_a_benchmark_changes_nothing(
    options: EvalOptions, asked: dict[str, Any], tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(options.out, copy)
    rescore(copy)
    for path in sorted(options.out.rglob("*.json*")):
        if "lmms" not in path.parts:
            assert (copy / path.relative_to(options.out)).read_bytes() == path.read_bytes()


def test_the_written_task_is_lmms_evals_own_where_it_is_reused(
    options: EvalOptions, asked: dict[str, Any]
) -> None:
    text = (options.out / "lmms" / "iv3_videomme.yaml").read_text()
    assert "include:" in text and "videomme/videomme.yaml" in text
    own = (options.out / "lmms" / "iv3_nextqa.yaml").read_text()
    yaml.SafeLoader.add_constructor("!function", lambda loader, node: node.value)
    assert "include" not in yaml.safe_load(own)
    assert yaml.safe_load(own)["generation_kwargs"]["do_sample"] is False


@pytest.mark.parametrize("control", ["text", "shuffled"])
def test_controls_hide_the_video_or_its_order(
    control: Any, options: EvalOptions, asked: dict[str, Any], tmp_path: Path
) -> None:
    suites = ("videomme", "timelens_charades", "mmsi_bench")
    run = replace(options, control=control, suites=suites, out=tmp_path / "run")
    assert not evaluate.evaluate(run).errors
    for suite in suites:
        for own, other in zip(samples(options, suite), samples(run, suite), strict=True):
            fewer = other["tokens"]["prompt"] < own["tokens"]["prompt"]
            assert fewer == (control == "text")


def test_thinking_opens_a_block_that_the_scorer_strips(
    options: EvalOptions, asked: dict[str, Any], tmp_path: Path
) -> None:
    run = replace(options, thinking=True, suites=("mlvu",), out=tmp_path / "run")
    assert not evaluate.evaluate(run).errors
    rows = samples(run, "mlvu")
    assert all(row["prediction"].startswith("<think>\n") for row in rows)
    assert all(row["official"]["outcome"] == "unreadable" for row in rows)


@pytest.mark.parametrize(
    ("suite", "name", "text", "said"),
    [
        ("nextqa", "val.csv", "video,question\n1,why\n", "nextqa/val.csv is in another layout"),
        ("timelens_charades", "charades-timelens.json", '{"v": {"duration": 4}}', "published"),
        ("videomme", "annotations.json", "[1, 2]", "row 0 is a int, expected an object"),
        ("mlvu", "annotations.json", "[]", "holds no questions"),
        ("mlvu", "1_plotQA.json", '{"a": 1}', "1_plotQA.json holds no questions"),
        ("lvbench", "annotations.json", "{", "another layout"),
    ],
)
def test_a_wrong_layout_is_one_message_with_the_way_out(
    suite: str, name: str, text: str, said: str, options: EvalOptions, tmp_path: Path
) -> None:
    (tmp_path / suite).mkdir()
    (tmp_path / suite / name).write_text(text)
    wrong = replace(options, data=tmp_path, suites=(suite,), out=tmp_path / "run")
    with pytest.raises(PreflightError, match=said) as raised:
        evaluate.evaluate(wrong)
    assert f"internvideo3 suites {suite}" in str(raised.value)
    assert not (tmp_path / "run").exists()


def test_a_question_that_nothing_could_score_is_found_before_the_run(
    options: EvalOptions, data: Path, tmp_path: Path
) -> None:
    shutil.copytree(data / "vsibench", tmp_path / "vsibench")
    (tmp_path / "vsibench/annotations.parquet").unlink()
    row = {
        "id": 0, "dataset": "scannet", "scene_name": "scene0", "question_type": "new_type",
        "question": "How many?", "ground_truth": "4", "options": None,
    }  # fmt: skip
    (tmp_path / "vsibench/annotations.json").write_text(json.dumps([row]))
    wrong = replace(options, data=tmp_path, suites=("vsibench",), out=tmp_path / "run")
    with pytest.raises(PreflightError, match="question 0 .*new_type"):
        evaluate.evaluate(wrong)
    assert not wrong.out.exists()


def test_images_that_cannot_be_written_out_are_one_message(
    options: EvalOptions, data: Path, tmp_path: Path
) -> None:
    shutil.copytree(data / "mmsi_bench", tmp_path / "mmsi_bench")
    shutil.rmtree(tmp_path / "mmsi_bench/images", ignore_errors=True)
    (tmp_path / "mmsi_bench/images").write_text("in the way")
    wrong = replace(options, data=tmp_path, suites=("mmsi_bench",), out=tmp_path / "run")
    with pytest.raises(PreflightError, match="which are written to .*mmsi_bench/images"):
        evaluate.evaluate(wrong)


def test_check_lists_what_is_missing_and_what_it_will_cost(
    options: EvalOptions, data: Path, tmp_path: Path
) -> None:
    shutil.copytree(data / "videomme", tmp_path / "videomme")
    (tmp_path / "videomme/videos/yt_a.mp4").unlink()
    shutil.copytree(data / "egoschema", tmp_path / "egoschema")
    measured = tmp_path / "measurements.jsonl"
    rates = [("prefill", 512, 10.0), ("prefill", 2048, 8.0), ("decode", 2048, 4.0)]
    measured.write_text(
        "".join(
            json.dumps({"kind": kind, "context_tokens": n, "tokens_per_s": rate}) + "\n"
            for kind, n, rate in rates
        )
    )
    command = ["eval", "--model", options.model, "--suite", "videomme,egoschema,vrbench"]
    command += ["--data", str(tmp_path), "--check", "--profile", str(measured)]
    done = CliRunner().invoke(cli.app, command)
    assert done.exit_code == 1
    assert "1 files are missing or empty, of 2 questions" in " ".join(done.output.split())
    assert "yt_a.mp4" in done.output
    assert "EgoSchema (egoschema): ready" in done.output
    # 720 frames in pairs, 128 tokens each; 2 answers of 16 tokens.
    text = re.search(
        r"at most 46,080 visual tokens, about (\d+) of text, 32 tokens of answers",
        " ".join(done.output.split()),
    )
    assert text is not None and 20 < int(text[1]) < 200
    read = 46_080 + int(text[1])
    assert f"about {(read / 8 + 32 / 4) / 3600:.2f} h" in done.output
    assert "without the vision tower and decoding" in " ".join(done.output.split())
    with measured.open("a") as file:
        file.write(json.dumps({"kind": "vision_encoding", "tokens_per_s": 16.0}) + "\n")
        file.write(json.dumps({"kind": "video_decoding", "frames_per_s": 1.0}) + "\n")
    whole = CliRunner().invoke(cli.app, command)
    assert f"about {(read / 8 + 32 / 4 + 46_080 / 16) / 3600:.2f} h" in whole.output
    assert "with the vision tower" in " ".join(whole.output.split())
    assert "VRBench (vrbench): NOT READY" in done.output
    assert "the whole of it: 8,243 questions" in done.output
    told = " ".join(done.output.split())
    # 128 tokens for two of at most 512 frames, or what the protocol's budget of pixels allows.
    bound = int(
        re.search(r"at most ([\d,]+) visual tokens, were each of 8,243", told)[1].replace(",", "")
    )
    assert bound % 8_243 == 0 and 0 < bound // 8_243 <= 512 // 2 * 128
    assert "together: 6 questions, at most 308,224 visual tokens" in " ".join(done.output.split())
    assert "VRBench's videos take 421 GB" in done.output
    assert "the others take is not known: Video-MME, EgoSchema" in " ".join(done.output.split())
    assert "if they are as large as those here" in " ".join(done.output.split())
    assert "1 of 3 suites are ready." in done.output


def test_check_needs_no_model_and_tells_what_is_known_without_annotations(tmp_path: Path) -> None:
    told = check_of("egoschema,tempcompass,timelens_charades", tmp_path)
    assert "no --model is given" in told
    assert told.count("comparable with the paper, once all of it is answered") >= 1
    assert "there is no score here, since the answers are not public" in told
    assert "a reply that no rule matches waits for a judge, `internvideo3 judge`" in told
    part = check_of("egoschema", tmp_path, "--limit", "5", "--fps", "1")
    assert "not comparable with the paper: 5 of 5,031 questions; frames a second were" in part
    done = CliRunner().invoke(cli.app, ["eval", "--suite", "egoschema"])
    assert done.exit_code == 2 and "An evaluation needs a model" in done.output


def check_of(suites: str, data: Path, *more: str) -> str:
    """What `--check` says, on one line."""
    command = ["eval", "--suite", suites, "--data", str(data), "--check", *more]
    return " ".join(CliRunner().invoke(cli.app, command).output.split())


def test_check_compares_what_is_there_with_what_is_published(data: Path, tmp_path: Path) -> None:
    told = check_of("mvbench,videomme", data, "--subtitles", "on")
    assert "MVBench (mvbench): ready, a part of it" in told
    assert "the annotations hold 3 questions; published are 4,000" in told
    assert "no annotations of" in told and "counterfactual_inference" in told
    assert "Video-MME with subtitles (videomme_subtitles): ready, a part of it" in told
    assert f"{data}: " in told
    world = check_of("world_long", data, "--root", str(tmp_path / "w"))
    assert f"{tmp_path / 'w'}: " in world and f"{data}: " not in world


def test_a_right_answer_that_is_no_option_is_told(
    options: EvalOptions, data: Path, tmp_path: Path
) -> None:
    """Published data has such questions; a run of thousands does not stop for one of them."""
    shutil.copytree(data / "vrbench", tmp_path / "vrbench")
    file = tmp_path / "vrbench/VRBench_eval.jsonl"
    file.write_text(file.read_text().replace('"answer": "D"', '"answer": "Z"', 1))
    told = "the right answer of 1 questions is none of their options"
    assert told in check_of("vrbench", tmp_path)
    run = replace(options, data=tmp_path, suites=("vrbench",), out=tmp_path / "run")
    evaluate.evaluate(run)
    assert any(told in note for note in summarise_paths([run.out]).notes)


@pytest.mark.parametrize("suites", ["mvbench", "world_long,short", "scale"])
def test_subtitles_are_not_asked_of_suites_that_have_none(suites: str) -> None:
    with pytest.raises(PreflightError, match="has subtitles to show; these have: longvideobench,"):
        suite_names(suites, "on")
    assert "videomme_subtitles" in suite_names(f"{suites},videomme", "on")


def test_the_estimate_counts_images_and_waits_for_a_slow_decoder(
    options: EvalOptions, data: Path
) -> None:
    given = EvalOptions(
        model=options.model,
        suites=("mmsi_bench", "longvideobench_interleaved"),
        out=options.out,
        data=data,
        min_pixels=4096,
        max_pixels=4096,
    )
    images, pictures = check(given)
    # Two questions of two images; one video of two seconds, so two pictures. 4 tokens each.
    assert (images.frames, images.tokens) == (0, 2 * 2 * 4)
    assert (pictures.frames, pictures.tokens) == (2, 2 * 4)
    rates = Rates(prefill=8.0, decode=64.0, context=100, encode=8.0, frames=0.01)
    assert pictures.seconds(rates) == 200
    read = 1 + pictures.text_tokens / 8
    assert pictures.seconds(replace(rates, frames=10.0)) == read + 1 + 2 * 32 / 64


def test_bounds_are_of_what_the_command_shows(options: EvalOptions, data: Path) -> None:
    direct = EvalOptions(model="", suites=("videomme", "mmsi_bench"), out=options.out, data=data)
    film, pictures = check(direct)
    assert film.tokens > 0 and pictures.tokens > 0 and film.videos < film.questions
    for one in check(replace(direct, control="text")):
        assert (one.frames, one.tokens) == (0, 0) and one.text_tokens > 0
    assert "no visual tokens, since the text control shows nothing" in check_of(
        "videomme", data, "--control", "text"
    )
    (subtitled,) = check(replace(direct, suites=("videomme_subtitles",)))
    assert subtitled.text_tokens > film.text_tokens
    agent = AgentSettings(budget=Budget(tokens=1000))
    acted, _ = check(replace(direct, agent=agent))
    # Each question's own first look, and all that it may spend beside it and its answer.
    assert acted.tokens == film.tokens * film.questions // film.videos
    assert acted.new_tokens == film.questions * (1000 + 16)
    told = check_of("videomme", data, "--mode", "agentic", "--tokens", "1000")
    assert f"at most {acted.new_tokens:,} tokens of all that the agent does" in told
    assert "time is not estimated; an agent decides" in told


@pytest.mark.parametrize(
    ("option", "given", "said"),
    [("--shard", "3/2", "is no part of a whole"), ("--sample-id", "foo", "belongs to none of")],
)
def test_check_refuses_what_eval_refuses(option: str, given: str, said: str, data: Path) -> None:
    for command in (("--check",), ("--model", "scale:base")):
        told = CliRunner().invoke(
            cli.app, ["eval", "--suite", "mlvu", "--data", str(data), option, given, *command]
        )
        assert told.exit_code == 1 and said in told.output


def test_the_blind_control_leaves_suites_of_images_out(
    options: EvalOptions, data: Path, tmp_path: Path, asked: dict[str, Any]
) -> None:
    suites = ("mmsi_bench", "mvbench")
    run = replace(options, suites=suites, control="blind", out=tmp_path / "run")
    evaluate.evaluate(run)
    described = json.loads((run.out / "run.json").read_text())
    assert list(described["suites"]) == ["mvbench"]
    assert list(described["left_out"]) == ["mmsi_bench"]
    notes = summarise_paths([run.out]).notes
    assert any("without mmsi_bench: the blind control shows another" in note for note in notes)
    told = check_of("mmsi_bench,mvbench", data, "--control", "blind")
    assert "MMSI-Bench (mmsi_bench): left out; the blind control" in told
    assert "MVBench (mvbench): ready" in told
    assert "1 of 1 suites are ready" in told
    for command in (("--check",), ("--model", "scale:base", "--out", str(tmp_path / "none"))):
        given = ["--suite", "mmsi_bench,mvbench", "--control", "blind", "--data", str(data)]
        given += ["--sample-id", str(samples(options, "mmsi_bench")[0]["id"]), *command]
        done = CliRunner().invoke(cli.app, ["eval", *given])
        assert done.exit_code == 1 and "belongs to none of the suites mvbench;" in done.output
    assert not (tmp_path / "none").exists()
    with pytest.raises(PreflightError, match="images only.*Take --control text"):
        evaluate.evaluate(replace(run, suites=("mmsi_bench",), out=tmp_path / "none"))
    poor = replace(options, data=tmp_path / "one", suites=("videomme",), control="blind")
    shutil.copytree(data / "videomme", tmp_path / "one/videomme")
    only_one_video(tmp_path / "one/videomme")
    assert "needs two videos; videomme has 1" in str(check(poor)[0].problem)
    with pytest.raises(PreflightError, match="needs two videos"):
        evaluate.evaluate(replace(poor, out=tmp_path / "poor"))
    assert not (tmp_path / "poor").exists()


def only_one_video(folder: Path) -> None:
    (file,) = folder.glob("*.parquet")
    rows = [row for row in pq.read_table(file).to_pylist() if row["videoID"] == "yt_a"]
    pq.write_table(pa.Table.from_pylist(rows), file)


def test_missing_videos_fail_where_the_command_accepts_it(
    options: EvalOptions, data: Path, tmp_path: Path
) -> None:
    shutil.copytree(data / "mvbench", tmp_path / "mvbench")
    gone = sorted((tmp_path / "mvbench").rglob("*.mp4"))[0]
    gone.unlink()
    run = replace(options, data=tmp_path, suites=("mvbench",), out=tmp_path / "run")
    with pytest.raises(PreflightError, match="accept that 1 questions fail.*--max-errors 1"):
        evaluate.evaluate(run)
    accepting = replace(run, max_errors=1)
    assert "ready; 1 questions will fail and count as wrong" in check_of(
        "mvbench", tmp_path, "--max-errors", "1"
    )
    summary = evaluate.evaluate(accepting)
    (failed,) = summary.errors
    assert failed["error"]["type"] == "FileNotFoundError" and gone.name in str(failed["error"])
    assert summary.computed == 3


def test_the_list_and_one_benchmark(data: Path) -> None:
    listed = CliRunner().invoke(cli.app, ["suites", "--data", str(data)])
    assert listed.exit_code == 0
    assert all(name in listed.output for name in (*BENCHMARKS, *EVALUABLE))
    world = CliRunner().invoke(cli.app, ["suites", "world_long"])
    assert "at most 5 a video: needle, order, count, attime" in world.output
    one = CliRunner().invoke(cli.app, ["suites", "qvhighlights", "--data", str(data)])
    assert "highlight_val_release.jsonl" in one.output
    assert "jayleicn/moment_detr@" in one.output
    wrong = CliRunner().invoke(cli.app, ["suites", "qvhighlihgts"])
    assert wrong.exit_code == 1 and "Did you mean qvhighlights" in wrong.output


def test_the_documented_table_is_the_one_that_the_protocols_give() -> None:
    readme = Path(__file__).parents[2] / "tasks/benchmarks/README.md"
    assert table() in readme.read_text(encoding="utf-8")
