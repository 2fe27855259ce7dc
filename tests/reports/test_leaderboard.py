"""The paper's tables with our rows: values, counts, and why a score is not comparable.

pytest tests/reports/test_leaderboard.py
"""

import csv
import io
import json
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from rich.console import Console

from internvideo3.reports import export, leaderboard, leaderboard_formats, markdown, terminal
from internvideo3.reports.load import load_run
from internvideo3.reports.page import build_report
from internvideo3.reports.stats import statistic_interval
from internvideo3.reports.summary import Summary, summarise_paths
from internvideo3.tasks.benchmarks.catalogue import BENCHMARKS
from internvideo3.tasks.scoring import aggregate, score

SHORT = ("nextqa", "perceptiontest", "mvbench", "tomato", "motionbench", "tempcompass")
OPTIONS = ["a ring", "a star", "a square"]
HOSTILE = "=HYPERLINK() | <b>& %_ \\"


def documents(suite: str) -> list[dict[str, Any]]:
    """Six questions about three videos in the fields that the suite's scorer reads."""
    lettered = "\n".join(f"{x}. {o}" for x, o in zip("ABC", OPTIONS, strict=True))
    docs: dict[str, dict[str, Any]] = {
        "nextqa": {
            **{f"a{i}": text for i, text in enumerate([*OPTIONS, "x", "y"])},
            "answer": 1,
            "type": "CW",
        },
        "perceptiontest": {"options": OPTIONS, "answer_id": "1", "area": "physics"},
        "mvbench": {"candidates": OPTIONS, "answer": OPTIONS[1], "task_type": "moving_count"},
        "tomato": {
            "options": OPTIONS, "answer": 1, "reason_type": "count", "demonstration_type": "human",
        },
        "motionbench": {
            "options": [{"label": x, "text": o} for x, o in zip("ABC", OPTIONS, strict=True)],
            "answer": "B",
            "question_type": "Camera",
        },
        "tempcompass": {
            "qtype": "multi-choice", "question": f"What?\n{lettered}",
            "answer": "B. a star", "dim": "action",
        },
        "egoschema": {"option": ["A. x", "B. y", "C. z", "D. v", "E. w"], "video_idx": "v"},
        "vrbench": {
            "options": dict(zip("ABC", OPTIONS, strict=True)), "answer": "B", "rate": 7,
            "reasoning_type": "Event Attribution", "reasoning_process": {"1": "a step"},
        },
        "videomme": {"options": OPTIONS, "answer": "B", "duration": "short"},
        "videomme_v2": {
            "options": lettered, "answer": "B", "group_type": "logic", "level": 1,
            "group_structure": "[1, 2, 3, 4]", "video_id": "v", "question_id": "v-1",
        },
        "vsibench": {"question_type": "object_counting", "ground_truth": "4", "options": None},
    }  # fmt: skip
    rows = [dict(docs[suite]) for _ in range(6)]
    if suite == "vsibench":
        for row in rows[3:]:
            row |= {"question_type": "room_size_estimation", "ground_truth": "10"}
    return rows


def write_run(root: Path, name: str, replies: dict[str, list[str]], **comparable: Any) -> Path:
    """Write a run with one reply for each document of some suites."""
    results, digest = {}, {"data_digest": "d"}
    (root / "samples").mkdir(parents=True)
    for suite, texts in replies.items():
        lines, scored = [], []
        for number, (doc, text) in enumerate(zip(documents(suite), texts, strict=True)):
            both = {rule: score(suite, doc, text, rule=rule) for rule in ("official", "plain")}  # type: ignore[arg-type]
            scored.append((doc, both["official"]))
            row = {
                "id": f"{suite}/{number}", "video_id": f"v{number // 2}", "family": "all",
                "length_s": None, "question": "?", "options": OPTIONS, "answer": "a star",
                "prediction": text, "benchmark": suite, "doc": doc, "error": None,
            } | {rule: found.as_dict() for rule, found in both.items()}  # fmt: skip
            lines.append(json.dumps(row) + "\n")
        (root / "samples" / f"{suite}.jsonl").write_text("".join(lines))
        results[suite] = aggregate(suite, scored).as_dict()
    protocol = {"protocol": {"preset": "paper", "source": "the_script.sh"}}
    run = {
        "schema": 1,
        "id": name,
        "model": {"name": name, "attention": "gqa"},
        "suites": {suite: {"n": 6, **digest, **protocol} for suite in replies},
        "config": {},
        "comparable": comparable,
    }
    (root / "run.json").write_text(json.dumps(run))
    (root / "results.json").write_text(json.dumps(results))
    return root


RIGHT = {"mvbench": "(B) a star", "tempcompass": "B"}


def answers(suite: str, wrong: int) -> list[str]:
    right = RIGHT.get(suite, "B")
    return ["(A) a ring" if suite == "mvbench" else "A"] * wrong + [right] * (6 - wrong)


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("runs")
    suites = {suite: {"paper": True, "reasons": []} for suite in SHORT}
    suites["tomato"] = {"paper": False, "reasons": ["it is the text control"]}
    whole = {suite: answers(suite, wrong) for wrong, suite in enumerate(SHORT)}
    vsi = ["4"] * 3 + ["10", "5", "no idea"]
    return [
        write_run(root / "whole", "ours-8B", whole, paper=True, suites=suites),
        write_run(root / "part", HOSTILE, {"vsibench": vsi}, paper=False, reason="settings differ"),
    ]


@pytest.fixture(scope="module")
def summary(paths: list[Path]) -> Summary:
    return summarise_paths(paths)


def table(summary: Summary, number: int) -> leaderboard.Table:
    (found,) = [one for one in leaderboard.tables(summary) if one.number == number]
    return found


def test_every_column_of_the_paper_belongs_to_a_benchmark() -> None:
    recorded = json.loads(leaderboard.PAPER.read_text())
    columns = {(t["number"], c) for t in recorded["tables"] for c in t["columns"]}
    ours = {one.column for one in BENCHMARKS.values() if one.column}
    assert columns - ours == {(3, leaderboard.AVERAGE)}
    assert ours <= columns


def test_the_papers_average_is_the_mean_that_we_print(summary: Summary) -> None:
    for row in table(summary, 3).paper:
        others = [score for column, score in row.scores.items() if column != leaderboard.AVERAGE]
        printed = row.scores[leaderboard.AVERAGE]
        assert printed is not None and None not in others
        assert sum(x or 0 for x in others) / 6 == pytest.approx(printed, abs=0.051)


def test_our_row_has_the_recorded_values_and_their_mean(summary: Summary) -> None:
    (row,) = table(summary, 3).ours
    values = [row.cells[BENCHMARKS[suite].column[1]].cell.value for suite in SHORT]  # type: ignore[index]
    assert values == pytest.approx([(6 - wrong) / 6 for wrong in range(6)])
    assert row.average == pytest.approx(sum(values) / 6)


def test_only_tables_with_a_column_of_ours_are_shown(summary: Summary, paths: list[Path]) -> None:
    assert [one.number for one in leaderboard.tables(summary)] == [3, 4]
    assert leaderboard.tables(summarise_paths(paths[1:]))[0].number == 4


def test_what_has_no_score_here_says_what_it_has_instead(tmp_path: Path) -> None:
    texts = {"tempcompass": ["It is red."] * 6, "tomato": ["B"] * 6}
    found = summarise_paths([write_run(tmp_path / "open", "open-8B", texts, paper=True)])
    (row,) = table(found, 3).ours
    cell = row.cells["TempCompass"].cell
    assert (cell.instead, cell.n, cell.no_value) == ("judge needed: 6", 6, 6)
    assert row.average is None
    for text in (form(leaderboard.tables(found)) for form in leaderboard_formats.FORMS.values()):
        assert "judge needed: 6" in text and "6 answers are left out" in text
    # It takes no part in the mean of what has a score, and does not hinder it.
    mean, (tomato,) = found.mean("open-8B"), found.averaged
    assert mean is not None and mean.mean == tomato.cells["open-8B"].value


def test_an_unreadable_answer_counts_where_its_truth_is_hidden(tmp_path: Path) -> None:
    replies = {"egoschema": ["no idea at all", "B", "B", "?", "C", "A"]}
    found = summarise_paths([write_run(tmp_path / "run", "ours", replies, paper=True)])
    (row,) = table(found, 2).ours
    cell = row.cells["EgoSchema"].cell
    assert (cell.value, cell.unreadable, cell.n) == (None, 2, 6)
    assert cell.instead == "submission file, unreadable: 2"
    assert "ours: 6 answers, 2 unreadable, 0 failed" in terminal.footnotes(found)
    page = build_report([tmp_path / "run"], tmp_path / "page", title="T").read_text()
    assert "submission file, unreadable: 2" in page


def test_the_benchmarks_other_numbers_are_shown(tmp_path: Path) -> None:
    """VRBench's headline is its multiple-choice half; a judge rates the other."""
    run = write_run(tmp_path / "run", "ours", {"vrbench": ["B"] * 3 + ["A"] * 3}, paper=True)
    found = summarise_paths([run])
    (suite,) = found.suites
    assert suite.cells["ours"].further["process"] == pytest.approx(0.7)
    for text in (
        leaderboard_formats.markdown(leaderboard.tables(found)),
        markdown.render(found, "T"),
        build_report([run], tmp_path / "page", title="T").read_text(),
    ):
        assert "process: 70.0; overall: 60.0" in text
    rows = csv.DictReader(io.StringIO(export.render(found)))
    further = {row["name"]: row for row in rows if row["group"] == "further"}
    assert float(further["process"]["value"]) == pytest.approx(0.7)
    assert further["process"]["low"] == "" and further["process"]["n"] == "6"


def test_a_benchmark_with_and_without_subtitles_counts_once(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", "ours", {"videomme": ["B"] * 6, "nextqa": ["A"] * 6})
    shown = run / "samples/videomme_subtitles.jsonl"
    text = (run / "samples/videomme.jsonl").read_text().replace("videomme/", "videomme_subtitles/")
    shown.write_text(text)
    found = summarise_paths([run])
    assert [one.name for one in found.averaged] == ["videomme", "nextqa"]
    mean = found.mean("ours")
    assert mean is not None and mean.mean == pytest.approx(0.5)
    assert any("counts a benchmark once" in note for note in found.notes)


def test_an_interval_over_few_videos_is_said_to_be_rough(summary: Summary) -> None:
    (note,) = (one for one in summary.notes if one.startswith("rough intervals"))
    assert "over fewer than 10 videos: " in note and "nextqa (3)" in note


def test_the_head_of_the_page_says_which_suites_are_not_comparable(
    paths: list[Path], tmp_path: Path
) -> None:
    page = build_report(paths, tmp_path / "page", title="T").read_text()
    head = page[page.index("Not comparable with the paper") : page.index("<main>")]
    assert "It is the text control (TOMATO)." in head
    assert "Settings differ (VSI-Bench)." in head


def test_a_cell_says_why_it_is_not_comparable(summary: Summary) -> None:
    (row,) = table(summary, 3).ours
    reasons = {column: one.reasons for column, one in row.cells.items()}
    assert reasons["Tomato"] == ("it is the text control",)
    assert all(not why for column, why in reasons.items() if column != "Tomato")
    (other,) = table(summary, 4).ours
    assert other.cells["VSIBench"].reasons == ("settings differ",)


def test_missing_and_failed_samples_are_reasons(paths: list[Path], tmp_path: Path) -> None:
    run = write_run(
        tmp_path / "r", "m", {"nextqa": answers("nextqa", 0)},
        paper=True, suites={"nextqa": {"paper": True, "reasons": []}},
    )  # fmt: skip
    samples = run / "samples/nextqa.jsonl"
    rows = [json.loads(line) for line in samples.read_text().splitlines()][:4]
    rows[0] |= {"error": {"type": "VideoError", "message": "torn"}}
    rows[0]["official"] = {"value": 0.0, "parsed": None, "outcome": "error"}
    samples.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (row,) = table(summarise_paths([run]), 3).ours
    assert row.cells["NextQA"].reasons == (
        "4 of 6 questions are answered so far",
        "1 samples failed and count as wrong",
    )
    assert row.average is None


def test_an_average_that_is_no_mean_has_an_interval_by_its_own_rule(summary: Summary) -> None:
    (row,) = table(summary, 4).ours
    cell = row.cells["VSIBench"].cell
    # Counting is all right; of the sizes one is right, one half, which is right at one threshold of
    # ten, and one unreadable. Directions were not asked and count as 0, officially.
    assert cell.value == pytest.approx((1 + (1 + 0.1 + 0) / 3 + 0) / 3)
    assert cell.interval is not None
    assert cell.interval.low <= cell.value <= cell.interval.high


def test_a_difference_is_of_the_average_that_the_table_shows(tmp_path: Path) -> None:
    """VSI-Bench takes the mean of tasks, of which one was not asked here and counts as 0."""
    replies = {"a": ["no idea"] * 5 + ["10"], "b": ["4"] * 3 + ["10", "10", "no idea"]}
    both = [
        write_run(tmp_path / name, name, {"vsibench": texts}, paper=False)
        for name, texts in replies.items()
    ]
    (suite,) = summarise_paths(both).suites
    cells = suite.cells
    (found,) = suite.comparisons
    shown = cells["b"].value - cells["a"].value
    mean = fmean(x.value or 0 for x in load_run(both[1]).samples["vsibench"]) - fmean(
        x.value or 0 for x in load_run(both[0]).samples["vsibench"]
    )
    assert abs(shown - mean) > 0.02, "else the test shows nothing"
    interval = found.difference.interval
    assert interval.mean == pytest.approx(shown)
    assert interval.low <= shown <= interval.high
    assert (found.difference.wins, found.difference.losses) == (5, 1)


def test_two_runs_are_compared_whatever_they_are(tmp_path: Path) -> None:
    runs = []
    for name in ("blind", "shuffled"):
        run = write_run(tmp_path / name, name, {"nextqa": answers("nextqa", 2)}, paper=False)
        meta = json.loads((run / "run.json").read_text())
        meta["config"]["control"] = name
        (run / "run.json").write_text(json.dumps(meta))
        runs.append(run)
    (suite,) = summarise_paths(runs).suites
    assert len(suite.comparisons) == 1


def test_what_waits_for_a_judge_and_who_judged_are_reasons(tmp_path: Path) -> None:
    run = write_run(
        tmp_path / "r", "m", {"nextqa": answers("nextqa", 0)},
        paper=True, suites={"nextqa": {"paper": True, "reasons": []}},
    )  # fmt: skip
    samples = run / "samples/nextqa.jsonl"
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    rows[0]["official"] = {"value": None, "parsed": None, "outcome": "judge_needed"}
    rows[1]["judge"] = "somebody-8b"
    samples.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (row,) = table(summarise_paths([run]), 3).ours
    assert row.cells["NextQA"].reasons == (
        "1 answers are left out: only a judge or a hidden truth could tell",
        "answers are judged by somebody-8b, which is not the official judge",
    )


def test_statistic_interval_agrees_with_the_mean_where_the_statistic_is_one() -> None:
    values = [0.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 0.0, 1.0, 1.0] * 10
    names = [f"v{i // 2}" for i in range(100)]
    units = [(name, "all", value) for name, value in zip(names, values, strict=True)]
    found = statistic_interval(0.7, units, lambda means: means["all"], n=100, resamples=4000)
    # The clustered standard error of ten times the same five clusters.
    spread = [0.5, 0.5, 1.0, 0.5, 1.0] * 10
    error = (sum((x - 0.7) ** 2 for x in spread) / 50 / 50) ** 0.5
    assert found.se == pytest.approx(error, rel=0.05)
    assert found.low == pytest.approx(0.7 - 2 * error, abs=0.01)
    assert (found.n, found.clusters) == (100, 50)
    single = statistic_interval(0.5, [("v", "all", 0.5)], lambda means: means["all"], n=1)
    assert (single.low, single.high) == (0.0, 1.0)


def test_markdown_has_both_kinds_of_rows_and_a_foot(summary: Summary) -> None:
    text = leaderboard_formats.markdown(leaderboard.tables(summary))
    assert "| InternVideo3 | 85.5 | 81.4 | 75.0 | 37.4 | 60.6 | 74.0 | 69.0 |" in text
    assert "**ours-8B** (ours) | 100.0 (" in text
    assert "<sup>1</sup>" in text and "1. it is the text control" in text
    assert "| ours-8B, NextQA | 100.0 |" in text and "the\\_script.sh" in text
    assert "<b>" not in text


def test_latex_escapes_and_balances(summary: Summary) -> None:
    text = leaderboard_formats.latex(leaderboard.tables(summary))
    assert text.count(r"\begin{") == text.count(r"\end{")
    assert r"\textbf{=HYPERLINK() | <b>\& \%\_ \textbackslash{}}" in text
    assert r"83.3 (" in text and r"\textsuperscript{1}" in text
    for line in text.splitlines():
        if line.endswith(r"\\") and line.startswith("InternVideo3"):
            assert line.count("&") in (6, 7)


def test_csv_has_every_score_once(summary: Summary) -> None:
    rows = list(
        csv.DictReader(io.StringIO(leaderboard_formats.as_csv(leaderboard.tables(summary))))
    )
    paper = [row for row in rows if row["from"] == "paper"]
    assert {
        "table": "3",
        "column": "NextQA",
        "system": "InternVideo3",
        "value": "0.855",
    }.items() <= (
        next(r for r in paper if r["column"] == "NextQA" and r["system"] == "InternVideo3").items()
    )
    ours = {row["column"]: row for row in rows if row["from"] == "run"}
    assert len(ours) == 7 and ours["Tomato"]["comparable"] == "False"
    assert ours["NextQA"]["comparable"] == "True" and float(ours["NextQA"]["value"]) == 1.0
    assert ours["VSIBench"]["system"].startswith("'=")


def test_the_page_shows_them_and_files_lie_beside_it(paths: list[Path], tmp_path: Path) -> None:
    page = build_report(paths, tmp_path / "page", title="T").read_text()
    assert "Beside the paper" in page and "Table 3: Short video" in page
    assert "it is the text control" in page and "<b>&amp; %_" not in page.split("<main>")[0]
    for name in ("tables.md", "tables.tex", "tables.csv"):
        assert (tmp_path / "page" / name).stat().st_size > 1000


def test_answers_without_a_score_are_counted_and_credit_for_unreadable_ones_is_said(
    tmp_path: Path,
) -> None:
    replies = {"videomme": ["?"] * 6, "videomme_v2": ["?"] * 4 + ["B"] * 2}
    run = write_run(tmp_path / "run", "ours", replies, paper=True, suites={})
    found = summarise_paths([run])
    said = terminal.footnotes(found)
    assert "ours: 12 answers, 10 unreadable, 0 failed" in said
    (table,) = leaderboard.tables(found)
    (row,) = table.ours
    assert row.cells["Video-MME"].cell.instead == "unreadable: 6"
    cell = row.cells["VideoMME-v2"]
    # Four unreadable answers in a group of logic: officially a whole chain.
    assert (cell.cell.value, cell.cell.plain) == (1, pytest.approx(2 / 6))
    assert any(why.startswith("4 answers are unreadable") for why in cell.reasons)
    # Also where the number stands outside the paper's table, which has such a foot.
    (note,) = (one for one in said if one.startswith("ours: videomme_v2"))
    assert "credit in groups of logic; the plain score is 33.3" in note
    assert "100.0†" in markdown.render(found, "T") and any("†" in one for one in said)
    v2 = next(one for one in found.suites if one.name == "videomme_v2")
    assert v2.chance is None, "a group's score is not reached by guessing at questions"


@pytest.mark.parametrize("suite", ["videomme_v2", "vsibench"])
def test_a_run_that_was_killed_shows_the_benchmarks_own_number(tmp_path: Path, suite: str) -> None:
    """Without a result for just these answers it is taken anew, not replaced by a mean."""
    replies = ["B", "B", "?", "B", "B", "?"] if suite == "videomme_v2" else ["4"] * 3 + ["?"] * 3
    whole = write_run(tmp_path / "whole", "ours", {suite: replies})
    killed = write_run(tmp_path / "killed", "ours", {suite: replies})
    (killed / "results.json").unlink()
    found = summarise_paths([whole, killed]).suites[0]
    expected = json.loads((whole / "results.json").read_text())[suite]
    assert found.metric == expected["metric"]
    one, other = found.cells.values()
    assert one.value == other.value == expected["value"]
    assert (one.interval, one.further, one.caveat) == (other.interval, other.further, other.caveat)


def test_a_number_that_the_answers_do_not_determine_is_none(tmp_path: Path) -> None:
    """Two of a group of four: a mean over questions would pass for a group score."""
    runs = [write_run(tmp_path / n, n, {"videomme_v2": answers("videomme_v2", 1)}) for n in "ab"]
    for run in runs:
        file = run / "samples/videomme_v2.jsonl"
        file.write_text("".join(file.read_text().splitlines(keepends=True)[:2]))
    found = summarise_paths(runs)
    for cell in found.suites[0].cells.values():
        assert (cell.value, cell.interval, cell.instead) == (None, None, "no complete group")
        assert cell.n == cell.scored == 2
    assert not found.suites[0].comparisons and found.mean(found.systems[0].name) is None
    assert "no complete group" in markdown.render(found, "x")
    assert "no complete group" in leaderboard_formats.markdown(leaderboard.tables(found))


def test_a_score_of_some_of_the_answers_is_marked(tmp_path: Path) -> None:
    replies = {"tempcompass": ["It is the star that moves"] * 4 + ["B"] * 2,
               "videomme": ["?"] * 4 + ["B", "C"]}  # fmt: skip
    found = summarise_paths([write_run(tmp_path / "r", "ours", replies)])
    cells = {suite.name: suite.cells["ours"] for suite in found.suites}
    waiting = "it is of 2 of 6 answers: 4 only a judge could tell"
    dropped = "it is of 2 of 6 answers: 4 unreadable and left out by the official rule"
    assert (cells["tempcompass"].partial, cells["videomme"].partial) == (waiting, dropped)
    assert (cells["tempcompass"].value, cells["videomme"].value) == (1.0, 0.5)
    said = terminal.footnotes(found)
    assert any(line.startswith(f"ours: tempcompass: {waiting}") for line in said)
    assert "100.0†" in markdown.render(found, "x")
    rows = list(csv.DictReader(io.StringIO(export.render(found))))
    assert {(r["n"], r["scored"]) for r in rows if r["group"] == "suite"} == {("6", "2")}
    # What the official rule leaves out is no reason against comparing with the paper.
    (ours,) = table(found, 2).ours
    assert not any("of 6 answers" in why for why in ours.cells["Video-MME"].reasons)


def test_nothing_of_a_run_commands_the_terminal(tmp_path: Path) -> None:
    run = write_run(tmp_path / "r", "\x1b[31mred\u202e", {"nextqa": answers("nextqa", 0)})
    file = run / "samples/nextqa.jsonl"
    file.write_text(file.read_text().replace('"family": "all"', '"family": "\\u001b[2Jx"'))
    found = summarise_paths([run])
    out = io.StringIO()
    terminal.show(found, Console(file=out, width=100))
    for text in (out.getvalue(), markdown.render(found, "\x1b[1m")):
        assert (
            "\x1b" not in text
            and "\u202e" not in text
            and "\ufffd[31mred" in text.replace("\\", "")
        )


def test_runs_of_the_world_alone_have_no_such_tables(runs: list[Path], tmp_path: Path) -> None:
    page = build_report(runs[:1], tmp_path / "page", title="T").read_text()
    assert "Beside the paper" not in page
    assert not (tmp_path / "page" / "tables.md").exists()
