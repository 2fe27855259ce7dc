"""Table 6 from runs on disk: pairing, cost, what verification changed, every form of the table.

pytest tests/reports/test_table6.py
"""

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest

from internvideo3.reports.load import Run, load_run
from internvideo3.reports.table6 import (
    Table6Error,
    cells,
    html,
    latex,
    lines,
    markdown,
    provenance,
    rows,
    write,
)
from internvideo3.tasks.scoring import score

SCORED = {True: {"value": 1.0, "parsed": "A", "outcome": "answered"},
          False: {"value": 0.0, "parsed": "B", "outcome": "answered"}}  # fmt: skip


def sample(number: int, said: str, agent: dict[str, Any] | None) -> dict[str, Any]:
    scored = SCORED[said == "ring"]
    return {
        "id": f"world_long/{number:06d}", "suite": "world_long", "video_id": f"v{number // 2}",
        "family": "shape", "length_s": 60.0, "question": "What?", "options": ["ring", "cross"],
        "answer": "ring", "answer_type": "choice", "evidence": [], "video": None,
        "prediction": said, "official": scored, "plain": scored, "error": None,
        "tokens": {"prompt": 500, "new": 2},
    } | ({"agent": agent} if agent else {})  # fmt: skip


def agent(calls: int, proposed: str) -> dict[str, Any]:
    cost = {"context_tokens": 900, "side_tokens": 100, "tool_calls": calls, "turns": calls + 1}
    return {"cost": cost, "proposed": proposed, "ended": "verified", "first": "cross"}


def run(
    folder: Path, said: list[str], agents: list[dict[str, Any]] | None = None, looks: str = "new"
) -> Path:
    rows = [sample(n, text, agents[n] if agents else None) for n, text in enumerate(said)]
    for name in ("samples", "timings"):
        (folder / name).mkdir(parents=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "samples/world_long.jsonl").write_text(text)
    times = [{"id": row["id"], "decode_s": 0.5, "encode_s": 0.25} for row in rows]
    (folder / "timings/world_long.jsonl").write_text("".join(json.dumps(t) + "\n" for t in times))
    settings = {"policy": "controller", "looks": looks, "verifies": True, "tools": ["asr"]}
    meta = {
        "schema": 1, "id": folder.name, "mode": "agentic" if agents else "direct",
        "command": ["internvideo3", "eval", "<b>"], "commit": "abc", "dirty": False,
        "model": {"name": "scale:base", "digest": "d", "label": "scale"},
        "suites": {"world_long": {"n": len(said), "data_digest": "x"}},
        "config": {"agent": settings if agents else None, "fps": 2.0, "max_frames": 64},
    }  # fmt: skip
    (folder / "run.json").write_text(json.dumps(meta))
    return folder


@pytest.fixture
def both(tmp_path: Path) -> tuple[Path, Path]:
    direct = run(tmp_path / "direct", ["cross"] * 6 + ["ring"] * 2)
    said = ["ring"] * 5 + ["cross", "ring", "cross"]
    proposed = ["cross", *said[1:7], "ring"]
    agents = [agent(0 if n == 3 else 4, proposed[n]) for n in range(8)]
    return direct, run(tmp_path / "agentic", said, agents)


def test_the_table_pairs_runs_and_tells_their_cost(both: tuple[Path, Path]) -> None:
    direct, agentic = (load_run(path) for path in both)
    base, ours = lines(direct, [agentic])
    assert (base.score.value, ours.score.value) == (0.25, 0.75)
    assert ours.difference is not None and ours.difference.interval.mean == 0.5
    assert (ours.difference.wins, ours.difference.losses) == (5, 1)
    assert (base.tokens, ours.tokens, ours.seconds) == (502, 1000, 0.75)
    assert (ours.calls, ours.without_tools) == (3.5, 0.125)
    assert (ours.mended, ours.spoilt) == (0.125, 0.125)
    assert base.calls is None and ours.label == "scale"


def failing(folder: Path, ids: set[str]) -> Run:
    """A run some of whose questions failed, as `eval` writes them: no cost, and no time."""
    file = folder / "samples/world_long.jsonl"
    failed = {
        "prediction": None, "error": {"type": "VideoError", "message": "it is truncated"},
        "official": {"value": 0.0, "parsed": None, "outcome": "error"},
        "plain": {"value": 0.0, "parsed": None, "outcome": "error"},
        "tokens": {"prompt": 0, "new": 0},
    }  # fmt: skip
    read = [json.loads(line) for line in file.read_text().splitlines()]
    for row in read:
        if row["id"] in ids:
            row.pop("agent", None)
            row |= failed
    file.write_text("".join(json.dumps(row) + "\n" for row in read))
    times = [{"id": row["id"]} if row["id"] in ids else
             {"id": row["id"], "generate_s": 3.0} for row in read]  # fmt: skip
    timings = folder / "timings/world_long.jsonl"
    timings.write_text("".join(json.dumps(row) + "\n" for row in times))
    return load_run(folder)


def test_what_failed_is_in_the_score_and_in_no_mean_of_cost(both: tuple[Path, Path]) -> None:
    direct = load_run(both[0])
    whole = lines(direct, [load_run(both[1])])
    agentic = failing(both[1], {"world_long/000000", "world_long/000004", "world_long/000005"})
    base, ours = found = lines(direct, [agentic])
    assert (ours.n, ours.failed, base.failed) == (8, 3, 0)
    assert (ours.tokens, ours.seconds, ours.calls) == (1000, 3.0, 3.2)
    assert (whole[1].score.value, ours.score.value) == (0.75, 0.5), "a failure scores 0"
    assert [row["failed"] for row in rows(found)] == [0, 3] and "Failed" not in markdown(whole)
    said = "Failed, and in no mean of cost: agentic (controller), 3 of 8."
    for text in (markdown(found), latex(found), html(found, [])):
        assert text.count(said) == 1


def test_where_nothing_was_answered_there_is_no_cost(both: tuple[Path, Path]) -> None:
    agentic = failing(both[1], {f"world_long/{number:06d}" for number in range(8)})
    (_, ours) = lines(load_run(both[0]), [agentic])
    assert (ours.tokens, ours.seconds, ours.calls, ours.spoilt) == (None, None, None, None)
    assert cells(ours)[6:] == ["–"] * 6


def test_the_time_of_a_retried_question_is_that_of_its_answer(both: tuple[Path, Path]) -> None:
    """A retry that has not ended leaves the failure's row, which has no time, beside it."""
    file = both[1] / "timings/world_long.jsonl"
    file.write_text('{"id": "world_long/000003", "decode_s": 0.0}\n' + file.read_text())
    (_, ours) = lines(load_run(both[0]), [load_run(both[1])])
    assert ours.seconds == 0.75


def test_looks_that_are_chosen_are_paired_with_looks_at_random(
    both: tuple[Path, Path], tmp_path: Path
) -> None:
    said, agents = ["ring"] * 3 + ["cross"] * 5, [agent(4, "cross")] * 8
    random = load_run(run(tmp_path / "random", said, agents, looks="random"))
    direct, agentic = (load_run(path) for path in both)
    base, ours, chance = lines(direct, [agentic, random])
    assert base.over_random is None and chance.over_random is None
    assert ours.over_random is not None and ours.over_random.interval.mean == 0.375
    assert (ours.over_random.wins, ours.over_random.losses) == (3, 0)
    assert chance.name == "agentic (controller), looks at random"
    (alone,) = lines(direct, [agentic])[1:]
    assert alone.over_random is None


def test_every_form_of_the_table_says_the_same(both: tuple[Path, Path], tmp_path: Path) -> None:
    direct, agentic = (load_run(path) for path in both)
    files = {file.suffix: file.read_text() for file in write(direct, [agentic], tmp_path / "out")}
    # pdflatex stops at most characters beyond ASCII.
    assert files[".tex"].isascii()
    for text in (files[".md"], files[".tex"], files[".html"]):
        assert "75.0" in text and "75.8" in text and "73.1" in text and "+50.0" in text
    (_, row) = csv.DictReader(io.StringIO(files[".csv"]))
    assert float(row["difference"]) == 0.5 and float(row["tokens"]) == 1000
    data = json.loads(files[".json"])
    assert data["runs"][1]["commit"] == "abc" and data["rows"][1]["wrong_to_right"] == 0.125
    assert "<b>" not in html(lines(direct, [agentic]), provenance([direct]))


def test_runs_that_do_not_belong_together_are_refused(
    both: tuple[Path, Path], tmp_path: Path
) -> None:
    direct, agentic = (load_run(path) for path in both)
    with pytest.raises(Table6Error, match="not a direct run"):
        lines(agentic, [agentic])
    with pytest.raises(Table6Error, match="not an agentic run"):
        lines(direct, [direct])
    other = json.loads((both[1] / "run.json").read_text())
    other["model"]["digest"] = "another"
    (both[1] / "run.json").write_text(json.dumps(other))
    with pytest.raises(Table6Error, match="different models; .* --other-models"):
        lines(direct, [load_run(both[1])])


def of_model(folder: Path, name: str) -> Path:
    """A run as if another model had made it."""
    meta = json.loads((folder / "run.json").read_text())
    meta["model"] |= {"name": name, "digest": name}
    (folder / "run.json").write_text(json.dumps(meta))
    return folder


def test_a_model_trained_to_act_stands_beside_the_one_it_came_from(tmp_path: Path) -> None:
    """Every row names its model, and looks at random are those of the same model."""
    acts = [agent(2, "ring")] * 4
    direct = run(tmp_path / "direct", ["cross"] * 4)
    others = [
        run(tmp_path / "random", ["ring", "cross", "cross", "cross"], acts, looks="random"),
        of_model(run(tmp_path / "own", ["ring"] * 4, acts), "scale:agent"),
    ]
    two = lines(load_run(direct), [load_run(one) for one in others], other_models=True)
    assert [line.name for line in two] == [
        "scale:base: direct QA",
        "scale:base: agentic (controller), looks at random",
        "scale:agent: agentic (controller)",
    ]
    assert two[2].over_random is not None and two[2].over_random.interval.mean == 0.75
    own = of_model(
        run(tmp_path / "own-random", ["ring"] * 3 + ["cross"], acts, looks="random"),
        "scale:agent",
    )
    three = lines(load_run(direct), [load_run(one) for one in (*others, own)], other_models=True)
    assert three[2].over_random is not None and three[2].over_random.interval.mean == 0.25


def benchmark_run(
    root: Path, mode: str, name: str, docs: list[dict[str, Any]], said: list[str], **meta: Any
) -> Run:
    """A run of a benchmark as `eval` writes it, scored by the benchmark's own rule."""
    folder, written = root / mode, []
    (folder / "samples").mkdir(parents=True)
    for number, (doc, answer) in enumerate(zip(docs, said, strict=True)):
        written.append(sample(number, answer, agent(1, answer) if mode == "agentic" else None) | {
            "id": f"{name}/{number}", "suite": name, "benchmark": name, "doc": doc,
            "official": score(name, doc, answer).as_dict(),
            "plain": score(name, doc, answer, rule="plain").as_dict(),
        })  # fmt: skip
    (folder / f"samples/{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in written))
    config = {"agent": None, "control": None, "fps": 2.0, "max_frames": 64}
    if mode == "agentic":
        config["agent"] = {"policy": "controller", "looks": "new", "verifies": True, "tools": []}
    about = {
        "schema": 1, "id": mode, "mode": mode, "command": [], "commit": "abc", "dirty": False,
        "model": {"name": "m", "digest": "d"}, "config": config | meta.pop("config", {}),
        "suites": {name: {"n": len(written), "data_digest": meta.pop("digest", "x")}},
    }  # fmt: skip
    (folder / "run.json").write_text(json.dumps(about))
    return load_run(folder)


def mlvu(task: str) -> dict[str, Any]:
    return {"question": "q\n(A) x\n(B) y", "answer": "A", "task_type": task}


def test_scores_are_by_the_benchmarks_own_rule(tmp_path: Path) -> None:
    """MLVU's M-Avg weighs tasks alike; the mean over questions says the opposite here."""
    docs = [mlvu("big")] * 90 + [mlvu("small")] * 10
    direct = benchmark_run(tmp_path, "direct", "mlvu", docs, ["A"] * 90 + ["B"] * 10)
    agentic = benchmark_run(tmp_path, "agentic", "mlvu", docs, ["A"] * 70 + ["B"] * 20 + ["A"] * 10)
    base, ours = lines(direct, [agentic])
    assert base.score.value == 0.5 and ours.score.value == pytest.approx((70 / 90 + 1) / 2)
    assert base.score.metric == "M-Avg" and ours.difference is not None
    assert ours.difference.interval.mean == pytest.approx((70 / 90 + 1) / 2 - 0.5)
    assert ", M-Avg" in markdown([base, ours])


def test_what_has_no_score_has_none_in_the_table(tmp_path: Path) -> None:
    """A judge is needed, or the truth is not public: that is no zero."""
    doc = {"options": ["up", "down"], "answer": 0, "reason_type": "r", "demonstration_type": "h"}
    direct = benchmark_run(tmp_path / "1", "direct", "tomato", [doc] * 4, ["A"] * 4)
    agentic = benchmark_run(tmp_path / "1", "agentic", "tomato", [doc] * 4, ["A. up"] * 4)
    base, ours = lines(direct, [agentic])
    assert base.score.value == 1.0
    assert ours.score.value is None and ours.difference is None and ours.mended == 0.0
    assert "judge needed: 4" in cells(ours)[1] and rows([base, ours])[1]["score"] is None
    hidden = {"option": ["A. a", "B. b"], "answer": None, "video_idx": "1"}
    direct = benchmark_run(tmp_path / "2", "direct", "egoschema", [hidden] * 4, ["A"] * 4)
    agentic = benchmark_run(tmp_path / "2", "agentic", "egoschema", [hidden] * 4, ["A"] * 4)
    base, ours = lines(direct, [agentic])
    assert "submission file" in cells(base)[1] and ours.difference is None


def test_runs_of_other_data_or_less_of_it_are_refused(tmp_path: Path) -> None:
    docs, said = [mlvu("big")] * 4, ["A"] * 4
    direct = benchmark_run(tmp_path / "1", "direct", "mlvu", docs, said)
    other = benchmark_run(tmp_path / "1", "agentic", "mlvu", docs, said, digest="validation")
    with pytest.raises(Table6Error, match="different questions of mlvu"):
        lines(direct, [other])
    blind = benchmark_run(tmp_path / "2", "direct", "mlvu", docs, said, config={"control": "blind"})
    agentic = benchmark_run(tmp_path / "2", "agentic", "mlvu", docs, said)
    with pytest.raises(Table6Error, match="is the control 'blind'"):
        lines(blind, [agentic])
    few = benchmark_run(tmp_path / "3", "agentic", "mlvu", docs, said, config={"max_frames": 4})
    assert lines(direct, [few])[1].name == "agentic (controller), max frames 4"
