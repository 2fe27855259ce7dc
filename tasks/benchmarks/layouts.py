"""From annotation files, in the layouts in which they are published, to one document a question.

A reader takes a file's path below the benchmark's folder and its rows, and yields documents with
the fields that the benchmark's scorer and prompt name. Rows that are documents pass through.
"""

import ast
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from string import ascii_uppercase
from typing import Any

from internvideo3.tasks.scoring.letters import lettered_options

from .protocol import Raw
from .verdicts import judge_summary

Rows = Iterable[Any]
_TEMPCOMPASS_KINDS = ("multi-choice", "yes_no", "caption_matching", "captioning")
_NOT_PUBLIC = "NA"


class LayoutError(ValueError):
    """An annotation file in no known layout of its benchmark."""


def records(name: str, rows: Any) -> Iterator[Raw]:
    """The rows of a file; an object of objects gives one row a key, kept as `key`.

    Raises:
        LayoutError: the rows are no objects, or there are none.
    """
    if isinstance(rows, Mapping):
        rows = [{"key": key, **row} for key, row in rows.items() if isinstance(row, Mapping)]
    rows = list(rows)
    if not rows:
        raise LayoutError(f"{name} holds no questions; get it again, or take the file away.")
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise LayoutError(
                f"{name}: row {number} is a {type(row).__name__}, expected an object with fields."
            )
        yield dict(row)


def videomme_v2(name: str, rows: Any) -> Iterator[Raw]:
    """Options as one text of lettered lines, also where they are a list."""
    for row in records(name, rows):
        if isinstance(row.get("options"), list):
            row["options"] = "\n".join(map(str, row["options"]))
        row["group_structure"] = str(row.get("group_structure"))
        yield row


def longvideobench(name: str, rows: Any) -> Iterator[Raw]:
    """`candidates` of the original file as `option0` … `option4`."""
    for row in records(name, rows):
        if "option0" not in row:
            given = [str(one) for one in row.get("candidates") or ()]
            row |= {f"option{i}": given[i] if i < len(given) else "N/A" for i in range(5)}
        yield row


def mlvu(name: str, rows: Any) -> Iterator[Raw]:
    """The original files by task: candidates into the question, the answer's text into a letter."""
    for row in records(name, rows):
        if "candidates" in row:
            options = [str(one) for one in row["candidates"]]
            if row["answer"] not in options:
                raise LayoutError(f"{name}: answer {row['answer']!r} is none of {options}.")
            listed = "\n".join(f"({ascii_uppercase[i]}) {one}" for i, one in enumerate(options))
            row["question"] = f"{row['question']}\n{listed}"
            row["answer"] = ascii_uppercase[options.index(row["answer"])]
            row["task_type"] = row.get("question_type")
            row["video_name"] = f"{PurePosixPath(name).stem}/{row['video']}"
        yield row


def questions_of_videos(name: str, rows: Any) -> Iterator[Raw]:
    """LVBench: the original file has a line a video with its questions in `qa`."""
    for row in records(name, rows):
        if "qa" not in row:
            yield row
            continue
        shared = {key: value for key, value in row.items() if key != "qa"}
        shared.setdefault("video_path", f"{row.get('key')}.mp4")
        for asked in row["qa"]:
            yield shared | dict(asked)


def motionbench(name: str, rows: Any) -> Iterator[Raw]:
    """Questions with a public answer, their options taken out of the text.

    The others are scored by a leaderboard; they are not asked.
    """
    for row in questions_of_videos(name, rows):
        if str(row.get("answer") or _NOT_PUBLIC).strip().upper() == _NOT_PUBLIC:
            continue
        if not row.get("options"):
            texts = lettered_options(str(row["question"]))
            row["question"] = _stem(str(row["question"]))
            row["options"] = [
                {"label": ascii_uppercase[i], "text": text} for i, text in enumerate(texts)
            ]
        yield row


def _stem(question: str) -> str:
    """A question without its lettered lines."""
    count = len(lettered_options(question))
    marks = tuple(ascii_uppercase[:count])
    lines = [line for line in question.splitlines() if line.strip()]
    return " ".join(line.strip() for line in lines if not line.strip().lstrip("(").startswith(
        tuple(f"{mark}{end}" for mark in marks for end in (".", ")", ":"))
    ))  # fmt: skip


def vrbench(name: str, rows: Any) -> Iterator[Raw]:
    """The original file has a line a video; its questions are in `mcq`, keyed qa1, qa2, and on."""
    for row in records(name, rows):
        if "mcq" not in row:
            yield _vrbench_question(row, row)
            continue
        shared = {k: row.get(k) for k in ("video_id", "video_path", "video_summary")}
        for key in sorted(row["mcq"], key=lambda k: int("".join(filter(str.isdigit, k)) or 0)):
            asked = row["mcq"][key]
            if asked is not None:
                found = {"question_id": f"{row['video_id']}_{key}"}
                yield _vrbench_question(shared | dict(asked) | found, asked)


def _vrbench_question(row: Raw, asked: Any) -> Raw:
    """Options without empty ones; the annotated steps as the official judge is shown them."""
    options = {k: v for k, v in asked["options"].items() if v is not None}
    steps = asked.get("reasoning_process") or ""
    if not isinstance(steps, str):
        numbered = sorted(((int(k), v) for k, v in steps.items() if v is not None))
        steps = "\n".join(f"<Step {number}> {step}" for number, step in numbered)
    row = row | {"options": options, "reasoning_process": steps}
    return row | {"judge_summary": judge_summary(row)}


def egoschema(name: str, rows: Any) -> Iterator[Raw]:
    """The original `questions.json`: `option 0` … `option 4`, and no answers."""
    for row in records(name, rows):
        if "option" not in row:
            options = [str(row[f"option {i}"]) for i in range(5)]
            row["option"] = [f"{ascii_uppercase[i]}. {one}" for i, one in enumerate(options)]
            row["video_idx"] = row["q_uid"]
        row.setdefault("answer", None)
        yield row


SUBSET_ANSWERS = "subset_answers.json"


def egoschema_subset(name: str, rows: Any) -> Iterator[Raw]:
    """As `egoschema`; `subset_answers.json`, an index by question, becomes a row an answer."""
    if PurePosixPath(name).name != SUBSET_ANSWERS:
        yield from egoschema(name, rows)
        return
    if not isinstance(rows, Mapping) or not rows:
        raise LayoutError(f"{name} is no object of answers by q_uid; get it again.")
    for key, index in rows.items():
        if str(index) not in ("0", "1", "2", "3", "4"):
            raise LayoutError(f"{name}: the answer to {key} is {index!r}, expected 0 to 4.")
        yield {"q_uid": key, "answer": str(index)}


def answered_questions(docs: Sequence[Raw]) -> Iterator[Raw]:
    """EgoSchema's subset: the questions that have an answer, of their own or of the answers' file.

    Raises:
        LayoutError: no question has one, or an answer is to no question.
    """
    questions = [doc for doc in docs if "question" in doc]
    answers = {str(doc["q_uid"]): doc["answer"] for doc in docs if "question" not in doc}
    for doc in questions:
        given = answers.pop(str(doc.get("q_uid")), None)
        doc["answer"] = doc["answer"] if given is None else given
    if answers:
        raise LayoutError(
            f"{SUBSET_ANSWERS} answers {len(answers)} questions that questions.json does not have, "
            f"such as {next(iter(answers))}; get both again."
        )
    answered = [doc for doc in questions if doc["answer"] not in (None, "")]
    if not answered:
        raise LayoutError(
            f"the {len(questions)} questions have no answers. The subset is the questions whose "
            f"answers are public: put EgoSchema's {SUBSET_ANSWERS} beside its questions.json (and "
            "no annotations.* file), or take the configuration Subset of lmms-eval/egoschema."
        )
    yield from answered


def nextqa(name: str, rows: Any) -> Iterator[Raw]:
    """The original csv; video names are numbers there."""
    for row in records(name, rows):
        row["video"] = str(row["video"])
        row["answer"] = int(row["answer"])
        yield row


def mvbench(name: str, rows: Any) -> Iterator[Raw]:
    """A file, or a folder of files, for each of the twenty tasks."""
    path = PurePosixPath(name)
    task = path.parts[0] if len(path.parts) > 1 and path.parts[0] != "json" else path.stem
    for row in records(name, rows):
        yield row | {"task_type": row.get("task_type") or task}


def tomato(name: str, rows: Any) -> Iterator[Raw]:
    """A file for each kind of reasoning."""
    kind = PurePosixPath(name).stem.split("-")[0]
    for row in records(name, rows):
        row.setdefault("reason_type", kind)
        row["options"] = [str(one) for one in row["options"]]
        yield row


def tempcompass(name: str, rows: Any) -> Iterator[Raw]:
    """A file, or a folder of files, for each kind of question.

    The original files have an object a video, with a list of questions for each aspect.
    """
    kind = next((one for one in _TEMPCOMPASS_KINDS if one in name), None)
    if isinstance(rows, Mapping):
        rows = [
            {"video_id": video, "dim": aspect, **asked}
            for video, aspects in rows.items()
            for aspect, questions in aspects.items()
            for asked in questions
        ]
    for row in records(name, rows):
        qtype = row.get("qtype") or kind
        if qtype is None:
            raise LayoutError(
                f"{name}: which kind of question is it? Name the file after one of "
                f"{', '.join(_TEMPCOMPASS_KINDS)}."
            )
        yield row | {"qtype": qtype}


def captions_with_choices(docs: Sequence[Raw]) -> Iterator[Raw]:
    """TempCompass: captions with the multiple-choice question by which a judge scores them.

    That is the first one about the same video and aspect, as in the official code; documents that
    hold it already stay as they are.
    """
    first: dict[tuple[str, str], Raw] = {}
    for doc in docs:
        if doc["qtype"] == "multi-choice":
            first.setdefault((str(doc["video_id"]), str(doc["dim"])), doc)
    for doc in docs:
        choice = first.get((str(doc["video_id"]), str(doc["dim"])))
        if doc["qtype"] != "captioning" or doc.get("mc_question") or choice is None:
            yield doc
        else:
            yield doc | {"mc_question": choice["question"], "mc_answer": choice["answer"]}


def timelens(name: str, rows: Any) -> Iterator[Raw]:
    """TimeLens' own JSON has an object a video with `queries` and `spans`."""
    for row in records(name, rows):
        if "queries" not in row:
            yield row | {"span": _spans(row["span"])}
            continue
        path = str(row["key"]) if str(row["key"]).endswith(".mp4") else f"{row['key']}.mp4"
        for query, span in zip(row["queries"], row["spans"], strict=True):
            yield {
                "video_path": path,
                "query": query,
                "span": _spans(span),
                "duration": row["duration"],
            }


def _spans(span: Any) -> list[list[float]]:
    found = ast.literal_eval(span) if isinstance(span, str) else span
    return [list(map(float, one)) for one in (found if isinstance(found[0], list) else [found])]


def charades(name: str, rows: Any) -> Iterator[Raw]:
    """The original text: `VIDEO start end##sentence` a line."""
    for row in rows if not isinstance(rows, Mapping) else records(name, rows):
        if not isinstance(row, str):
            yield dict(row)
        elif row.strip():
            place, _, caption = row.strip().partition("##")
            video, start_s, end_s = place.split()
            times = [float(start_s), float(end_s)]
            yield {"video": f"{video}.mp4", "caption": caption.rstrip("."), "timestamp": times}


def activitynet(name: str, rows: Any) -> Iterator[Raw]:
    """The original JSON: an object a video with `sentences` and `timestamps`."""
    for row in records(name, rows):
        if "sentences" not in row:
            yield row
            continue
        for number, sentence in enumerate(row["sentences"]):
            yield {
                "video_id": row["key"],
                "duration": row["duration"],
                "sentence": sentence,
                "timestamps": [row["timestamps"][number]],
            }


def dsi_bench(name: str, rows: Any) -> Iterator[Raw]:
    """A csv for each of the four views; a question has one place in all of them."""
    places = Counter[str]()
    for row in records(name, rows):
        view = str(row.get("aug") or PurePosixPath(name).stem)
        yield {"row": places[view]} | row | {"aug": view}
        places[view] += 1


def mmsi_video(name: str, rows: Any) -> Iterator[Raw]:
    """Lists that some copies hold as text."""
    for row in records(name, rows):
        for field in ("video_list", "ref_images"):
            value = row.get(field) or []
            row[field] = ast.literal_eval(value) if isinstance(value, str) else list(value)
        yield row
