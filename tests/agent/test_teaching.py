"""Rollouts to learn from: what is learnt, in the very ids and pixels of acting.

pytest tests/agent/test_teaching.py
"""

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from internvideo3.harness import cli
from internvideo3.harness.agent.actions import Answer, Pick, parse_call
from internvideo3.harness.agent.budget import Budget
from internvideo3.harness.agent.context import CALL, Kind
from internvideo3.harness.agent.episode import Place, answer, prepare
from internvideo3.harness.agent.perception import Eye, Sight
from internvideo3.harness.agent.policies import ModelPolicy
from internvideo3.harness.agent.rollout import begin
from internvideo3.harness.agent.setting import AgentSettings
from internvideo3.harness.agent.teaching import Lesson, call_words, teach
from internvideo3.harness.agent.tools.catalogue import TOOLS
from internvideo3.harness.agent.tools.desk import Desk
from internvideo3.model.fitting import fit_frames
from internvideo3.model.prompt import Prompter
from internvideo3.model.session import Limits, Session
from internvideo3.tasks.decoder import IsolatedReader
from internvideo3.tasks.video import joined
from internvideo3.training.acted import VIDEO, Shelf
from internvideo3.training.chat import ChatDocuments
from internvideo3.training.curation.records import DataError, read_rows, write_rows
from internvideo3.training.packing import pack
from internvideo3.training.policy import Policy, token_logps
from internvideo3.training.recipe import ChatData

OPTIONS = ("circle", "square", "ring", "cross")
QUESTION = "Which shape is seen first?\nA. circle\nB. square\nC. ring\nD. cross\nAnswer with the text of one option."  # noqa: E501
AGENT = AgentSettings(
    policy="trained", budget=Budget(turns=5, tool_calls=3, tokens=6_000), zoom_frames=8, tools=()
)
SIGHT = Sight(factor=32, min_pixels=4096, max_pixels=4096, max_frames=8, zoom_frames=8)
LESSON = Lesson(key="one", question=QUESTION, answer="ring", options=OPTIONS)


@pytest.fixture(scope="module")
def place(scale: tuple[Any, Any]) -> Iterator[Place]:
    with Desk(TOOLS, None) as desk:
        yield Place(model=scale[0], processor=scale[1], desk=desk, name="scale:m2la")


@pytest.fixture(scope="module")
def eye(video: Path) -> Iterator[Eye]:
    with closing(IsolatedReader()) as reader:
        yield Eye(video, SIGHT, reader)


def calls(row: dict[str, Any]) -> list[Any]:
    """The learnt words: calls, and plain answers as text."""
    return [
        parse_call(reply.removeprefix(CALL[0]).partition(CALL[1])[0])
        if CALL[0] in reply
        else reply.removesuffix("<|im_end|>").strip()
        for reply in row["replies"]
    ]


def test_a_rollout_looks_until_calls_are_spent_and_cites_what_it_saw(
    place: Place, eye: Eye
) -> None:
    row, alone = teach(place, eye, LESSON, AGENT)
    *looks, last = calls(row)
    assert looks and all(isinstance(one, Pick) for one in looks) and len(looks) <= 3
    assert last == "ring"
    assert [len(one) for one in row["looks"]][0] == 1 and len(row["looks"]) == len(looks) + 1
    assert alone["replies"][0].strip() == "ring<|im_end|>" and len(alone["looks"]) == 1
    assert teach(place, eye, LESSON, AGENT) == [row, alone], "equal settings, equal rows"


@pytest.mark.parametrize("asked", ["first", "at 9 seconds"])
@pytest.mark.parametrize("budget", [Budget(turns=1), Budget(tool_calls=0)])
def test_without_room_for_a_look_nothing_is_taught(
    place: Place, eye: Eye, budget: Budget, asked: str
) -> None:
    lesson = replace(LESSON, question=QUESTION.replace("first", asked))
    assert teach(place, eye, lesson, replace(AGENT, budget=budget)) == []


def test_a_look_that_costs_too_much_is_not_taught_as_one(place: Place, eye: Eye) -> None:
    # Four parts do not fit; one, around a named moment, does.
    tight = replace(AGENT, budget=Budget(tokens=512))
    assert teach(place, eye, LESSON, tight) == []
    named = replace(LESSON, question=QUESTION.replace("first", "at 9 seconds"))
    row, _ = teach(place, eye, named, tight)
    assert len(row["looks"]) == 2


def test_a_named_moment_is_looked_at_and_evidence_is_where_the_answer_is(
    place: Place, eye: Eye
) -> None:
    asked = replace(LESSON, question=QUESTION.replace("first", "at 9 seconds"))
    row, _ = teach(place, eye, replace(asked, evidence=((9.0, 10.0),)), AGENT)
    first, last = calls(row)
    assert first.around_s == (9.0,) and '"around_s": [9]' in row["replies"][0]
    take = row["looks"][1][0]
    assert take["start_s"] < 9 < take["end_s"] and last == "ring"
    told = replace(AGENT, policy="model")
    (cited, _) = teach(place, eye, replace(asked, evidence=((9.0, 10.0),)), told)
    assert calls(cited)[-1] == Answer(text="ring", evidence=("e6",))
    # Where no look comes upon the answer there is nothing to learn.
    assert teach(place, eye, replace(asked, evidence=((1e4, 2e4),)), AGENT) == []
    assert teach(place, eye, replace(LESSON, answer="star"), AGENT) == []


def test_a_wrong_answer_is_sent_back_and_never_learnt(place: Place, eye: Eye) -> None:
    found = [
        teach(place, eye, replace(LESSON, key=str(n), answer=option), AGENT, slips=1.0)
        for n, option in enumerate(OPTIONS)
    ]
    slipped = [rows[0] for rows in found if rows]
    assert slipped, "verification sends back at least one of the answers that are not seen"
    tokenizer = place.processor.tokenizer
    for row in slipped:
        assert [one for one in calls(row) if isinstance(one, str)] == [row["answer"]]
        (wrong,) = re.findall(r"not supported: (\w+);", tokenizer.decode(row["ids"]))
        assert wrong != row["answer"] and wrong in OPTIONS
        learnt = {n for start, stop in row["said"] for n in range(start, stop)}
        unlearnt = tokenizer.decode([one for n, one in enumerate(row["ids"]) if n not in learnt])
        assert f"<|im_start|>assistant\n {wrong}<|im_end|>" in unlearnt


def test_training_sees_what_acting_saw(place: Place, eye: Eye, video: Path, tmp_path: Path) -> None:
    rows = [one | {"video": str(video)} for one in teach(place, eye, LESSON, AGENT)]
    write_rows(tmp_path / "rollouts.jsonl", rows)
    data = ChatData(files={str(tmp_path / "rollouts.jsonl"): 1.0}, fps=1.0, max_frames=4)
    documents = ChatDocuments(data, place.processor, seed=0)
    policy = Policy(place.model.eval())
    for index in range(2):
        document = documents.taught(index)
        (row,) = [one for one in rows if tuple(one["ids"]) == document.trunk_ids]
        assert document.kind == "video"
        laid = pack([document], place.model)
        labels_N = laid.labels_T[laid.labels_T >= 0]
        said = [row["ids"][start:stop] for start, stop in row["said"]]
        assert labels_N.tolist() == [one for ids in said for one in ids]
        assert laid.said_lengths().tolist() == [len(ids) for ids in said]
        with torch.no_grad():
            trained_N = policy(laid, lambda h, w: token_logps(h, w, labels_N, ()))  # noqa: B023
        acted_N = torch.tensor(spoken(place, eye, row))
        torch.testing.assert_close(trained_N, acted_N, atol=2e-4, rtol=0)
    documents.reader.close()


def spoken(place: Place, eye: Eye, row: dict[str, Any]) -> list[float]:
    """Log-probability of every learnt id, in a session that grows as a rollout's does."""
    session = Session(place.model, place.processor, media_options={"do_resize": False})
    prompter = Prompter(place.processor, {"do_resize": False})
    frames = [one for look in row["looks"] for one in joined([taken(eye, how) for how in look])]
    told = {n for start, stop in row["said"] for n in range(start, stop)}
    found: list[float] = []
    ids, at = row["ids"], 0
    while at < len(ids):
        shown = prompter.piece(VIDEO, frames[:1]).ids if frames else [-1]
        if ids[at : at + len(shown)] == shown:
            at += session.append_text(VIDEO, [frames.pop(0)])
            continue
        if at in told:
            found.append(float(session.logits_last.float().log_softmax(-1)[ids[at]]))
        session.append_ids([ids[at]])
        at += 1
    assert list(session.ids) == ids and not frames
    return found


def taken(eye: Eye, how: dict[str, Any]) -> Any:
    read = eye.reader.read(
        eye.video, fps=how["fps"], max_frames=how["max_frames"], start_s=how["start_s"],
        end_s=how["end_s"],
    )  # fmt: skip
    return fit_frames(read, factor=32, min_pixels=how["min_pixels"], max_pixels=how["max_pixels"])


def test_what_does_not_fit_is_refused(place: Place, eye: Eye, video: Path, tmp_path: Path) -> None:
    row = teach(place, eye, LESSON, AGENT)[0] | {"video": str(video)}
    fewer = row | {"looks": row["looks"][:-1]}
    backwards = row | {"said": row["said"][::-1]}
    foreign = row | {"ids": [*row["ids"], 10**6]}
    for bad, said in (
        (fewer, "another video"),
        (backwards, "in order"),
        (foreign, "another tokenizer"),
    ):
        write_rows(tmp_path / "bad.jsonl", [bad])
        data = ChatData(files={str(tmp_path / "bad.jsonl"): 1.0})
        documents = ChatDocuments(data, place.processor, seed=0)
        with pytest.raises(DataError):
            documents.taught(0)
        assert said in next(iter(documents.bad.values()))
        documents.reader.close()


def test_the_shelf_drops_what_was_used_longest_ago(eye: Eye) -> None:
    taken = []

    def take(_: Path, how: Any) -> Any:
        taken.append(how["start_s"])
        return eye.again((how["start_s"], how["start_s"] + 2), 4.0)

    one = take(eye.video, {"start_s": 0.0}).pixels_THWC.nbytes
    taken.clear()
    shelf = Shelf(take, most_bytes=2 * one)
    for start_s in (0.0, 2.0, 0.0, 4.0, 0.0, 2.0):
        shelf.look(eye.video, {"start_s": start_s})
    assert taken == [0.0, 2.0, 4.0, 2.0]


def test_picked_clips_are_new_named_or_refused(place: Place, eye: Eye) -> None:
    first = eye.first()
    state = prepare(place, eye, first, QUESTION, AGENT)
    begin(state, ModelPolicy(Limits(max_new_tokens=8)), first)
    end_s = state.environment.duration_s
    late = state.environment.execute(Pick(around_s=(end_s + 5,)))
    assert not late.ok and "outside of the video" in late.text
    named = state.environment.execute(Pick(around_s=(3.0, 3.0, 9.0)))
    assert len(named.parts) == 2 and "new" not in named.text
    found = state.environment.execute(Pick(most=2))
    assert found.kind is Kind.OBSERVATION and found.ok and len(found.parts) <= 2
    assert found.text.endswith(("; more is new:", "; nothing else is new:"))


def test_a_trained_policy_is_not_told_its_tools(place: Place, eye: Eye) -> None:
    limits = Limits(max_new_tokens=8)
    told, _ = answer(place, eye, QUESTION, replace(AGENT, policy="model"), limits)
    untold, _ = answer(place, eye, QUESTION, AGENT, limits)
    systems = [state.context.entries[0].text for state in (told, untold)]
    assert '"name": "pick_clips"' in systems[0] and '"name": "asr"' not in systems[0]
    assert "tool" not in systems[1] and len(systems[1]) < 60


def test_calls_are_written_without_what_is_taken_for_granted() -> None:
    assert call_words(Pick()) == f'{CALL[0]}{{"name": "pick_clips", "arguments": {{}}}}{CALL[1]}'
    assert '"around_s": [1.5, 2]' in call_words(Pick(around_s=(1.5, 2.0)))


def questions(folder: Path, video: Path, count: int) -> Path:
    content = [
        {"type": "video_url", "video_url": {"url": str(video)}},
        {"type": "text", "text": QUESTION},
    ]
    rows = [
        {"id": f"q{n}", "answer": OPTIONS[n % 4], "options": list(OPTIONS),
         "messages": [{"role": "user", "content": content}]}
        for n in range(count)
    ]  # fmt: skip
    write_rows(folder / "asked.jsonl", rows)
    return folder / "asked.jsonl"


def test_a_killed_command_goes_on_to_the_same_bytes(video: Path, tmp_path: Path) -> None:
    asked = questions(tmp_path, video, 6)
    out = tmp_path / "rollouts.jsonl"
    line = ["data", "rollouts", str(asked), "--max-frames", "8", "--zoom-frames", "8"]
    line += ["--turns", "4", "--tool-calls", "2"]
    command = [sys.executable, "-m", "internvideo3.harness.cli", *line, "--out", str(out)]
    killed = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    part = out.with_suffix(".jsonl.part")
    while not part.is_file() or part.read_bytes().count(b"\n") < 3:
        assert killed.poll() is None
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    part.write_bytes(part.read_bytes()[:-20])  # torn as well
    kept = part.read_bytes()
    other = CliRunner().invoke(cli.app, [*line, "--slips", "0.5", "--out", str(out)])
    assert other.exit_code == 1 and "begun with other questions or options" in other.output
    assert part.read_bytes() == kept[: kept.rfind(b"\n") + 1], "what is finished stays"
    again = CliRunner().invoke(cli.app, [*line, "--out", str(out)])
    assert again.exit_code == 0 and "of 6 questions" in again.output, again.output
    whole = CliRunner().invoke(cli.app, [*line, "--out", str(tmp_path / "whole.jsonl")])
    assert whole.exit_code == 0
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not list(tmp_path.glob("*.part"))
    before = out.read_bytes()
    over = CliRunner().invoke(cli.app, [*line, "--out", str(out)])
    assert over.exit_code == 1 and "is finished" in over.output and out.read_bytes() == before
    rows = read_rows(out)
    assert {row["id"].rpartition("/")[2] for row in rows} == {"rollout", "alone"}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"id": "x", "messages": [{"role": "user", "content": "hi"}]}, "no question about one"),
        ({"id": "x", "answer": "ring", "messages": []}, "no question about one video"),
        ({"id": "x", "answer": "ring", "messages": 3}, "no question about one video"),
        (
            {"id": "x", "answer": "ring", "video": "v.mp4", "question": "?", "evidence": [3]},
            "no question about one video",
        ),
    ],
)
def test_rows_that_ask_nothing_are_refused(row: Any, said: str, tmp_path: Path) -> None:
    (tmp_path / "asked.jsonl").write_text(json.dumps(row) + "\n")
    line = ["data", "rollouts", str(tmp_path / "asked.jsonl"), "--out", str(tmp_path / "out.jsonl")]
    done = CliRunner().invoke(cli.app, line)
    assert done.exit_code == 1 and said in done.output and "Traceback" not in done.output
