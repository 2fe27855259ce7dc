"""`world_brief`: long videos of the scale world whose events are short, to measure looking again.

Five minutes by the scale world's own generator, with every object on screen for two seconds and
flashes of half a second or one: 64 frames over such a video lie 4.7 s apart and show fewer than
half of the events. Nothing is said and there are no subtitles. The files are those of the world's
suites (`tasks/world/build.py`), in the same folder layout.

    internvideo3 world build world_brief --videos 60
    python -m internvideo3.tasks.brief --root /data/world --videos 60       # tells the digest
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from internvideo3.tasks.scoring import Score, aggregate, score
from internvideo3.tasks.world import difficulty as d
from internvideo3.tasks.world import visits
from internvideo3.tasks.world.build import (
    WORLD,
    BuildError,
    Built,
    Form,
    Progress,
    build_suite,
    checked_suite,
    video_id,
    world_build,
)
from internvideo3.tasks.world.files import digest, video_name
from internvideo3.tasks.world.questions import Question, questions
from internvideo3.tasks.world.scenes import VideoSpec
from internvideo3.tasks.world.suites import SPLIT_BASE, SUITES, Split, Suite, video_seed

BRIEF: Final = Suite(
    name="world_brief",
    profile="main",
    families=("needle", "shape", "colour", "whereabouts", "motion", "depth", "attime"),
    lengths={300: 1.0},
    videos=80,
    questions_per_video=7,
    metric="accuracy",
    seed_block=6,
)
EVALUABLE: Final[Mapping[str, Suite]] = SUITES | {BRIEF.name: BRIEF}
"""All suites that `eval` can run; those of the scale world proper, and this one."""
VISIT_S: Final = 2.0
"""Seconds that an object is on screen."""

_YAML: Final = """\
# Made by `python -m internvideo3.tasks.brief`; the next build writes it again.
task: iv3_{suite}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {docs}
test_split: test
output_type: generate_until
doc_to_visual: !function iv3_brief.doc_to_visual
doc_to_text: !function iv3_brief.doc_to_text
doc_to_target: answer
process_results: !function iv3_brief.process_results
generation_kwargs:
  max_new_tokens: 32
  temperature: 0
  do_sample: false
metric_list:
  - metric: accuracy
    aggregation: !function iv3_brief.mean_score
    higher_is_better: true
cluster_key: video_id
metadata:
  - version: {version}
"""
_FUNCTIONS: Final = '''\
"""Functions of the iv3_world_brief task. Made by `python -m internvideo3.tasks.brief`."""

from pathlib import Path

from internvideo3.tasks.brief import mean_score, process_results
from internvideo3.tasks.world.lmms import doc_to_text

_FOLDER = Path(__file__).resolve().parent.parent


def doc_to_visual(doc):
    return [str(_FOLDER / doc["video"])]
'''


def draw_suite(split: Split, videos: int) -> Iterator[tuple[VideoSpec, list[Question]]]:
    """Videos in order, each with its questions; no pixels."""
    (length_s,) = BRIEF.lengths
    for index in range(videos):
        seed = video_seed(BRIEF, split, index)
        spec = visits.draw(seed, length_s, BRIEF.profile, VISIT_S)
        rng = random.Random(f"questions/{seed}")
        yield spec, questions(spec, rng, BRIEF.families, BRIEF.questions_per_video)


def documents(suite: Suite, split: Split, limit_videos: int | None) -> Iterator[dict[str, Any]]:
    """The rows of the documents, in order; needs no files."""
    number = 0
    videos = min(limit_videos or suite.videos, suite.videos)
    for index, (spec, asked) in enumerate(draw_suite(split, videos)):
        name = video_id(suite, index)
        for one in asked:
            yield {
                "id": f"{suite.name}/{number:06d}",
                "video_id": name,
                "video": video_name(name),
                "suite": suite.name,
                "family": one.family,
                "length_s": spec.length_s,
                "question": one.question,
                "options": list(one.options or ()),
                "answer": one.answer,
                "answer_letter": one.answer_letter,
                "answer_type": one.answer_type,
                "evidence": [list(span) for span in one.evidence],
                "prompt": one.prompt,
            }
            number += 1


def build_suites(
    suites: Sequence[str],
    root: Path,
    split: str = "test",
    videos: int | None = None,
    *,
    sound: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
) -> list[Built]:
    """Build suites of the scale world, this one too where it is named; see `world_build`.

    Raises:
        BuildError: as `world_build`; or a sound track is asked for this suite, which is silent.
    """
    others = [checked_suite(name, EVALUABLE).name for name in suites if name != BRIEF.name]
    brief = BRIEF.name in suites
    if brief and sound:
        raise BuildError(f"{BRIEF.name} has no sound; build it by itself, without --sound")
    built = []
    if others or not brief:
        built = world_build(
            others,
            root=root,
            split=split,
            limit_videos=videos,
            sound=sound,
            workers=workers,
            progress=progress,
        )
    if brief:
        built.append(build_brief(root, split, videos, workers=workers, progress=progress))
    return built


def build_brief(
    root: Path,
    split: str = "test",
    limit_videos: int | None = None,
    *,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Built:
    """Make what is missing of this suite, as `build_suite` does for the world's own.

    Args:
        root: of the world.
        split: train, validation or test.
        limit_videos: only the first so many videos.
        workers: processes; by default one a core.
        progress: told of every finished video.

    Raises:
        BuildError: as `build_suite`.
    """
    return build_suite(
        BRIEF, root, split, limit_videos, workers=workers, progress=progress, form=FORM
    )


def _files(suite: Suite, folder: Path) -> dict[Path, str]:
    """The questions in chat form, and lmms-eval's task."""
    docs = folder / f"{suite.name}.jsonl"
    where = json.dumps(str(docs.resolve()))
    with docs.open(encoding="utf-8") as lines:
        chats = "".join(json.dumps(_chat(json.loads(line))) + "\n" for line in lines)
    return {
        folder / "lmms" / "iv3_brief.py": _FUNCTIONS,
        folder / "lmms" / f"iv3_{suite.name}.yaml": _YAML.format(
            suite=suite.name, docs=where, version=d.VERSION
        ),
        folder / f"{suite.name}.chat.jsonl": chats,
    }


FORM: Final = Form(
    documents=documents, files=_files, visit_s=VISIT_S, subtitles=False, key=visits.digest()
)
"""Its videos are silent, their visits short."""


def form_of(suite: Suite) -> Form:
    """What the files of a suite are: this one's, or those of the scale world proper."""
    return FORM if suite.name == BRIEF.name else WORLD


def _chat(doc: Mapping[str, Any]) -> dict[str, Any]:
    """A question in the chat form that training reads, its moments among it."""
    content = [
        {"type": "video_url", "video_url": {"url": doc["video"]}},
        {"type": "text", "text": doc["prompt"]},
    ]
    return {
        "id": doc["id"], "category": doc["family"], "options": doc["options"],
        "answer": doc["answer"], "evidence": doc["evidence"], "duration_s": doc["length_s"],
        "messages": [
            {"role": "user", "content": content},
            {"role": "assistant", "content": doc["answer"]},
        ],
    }  # fmt: skip


def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Score one answer for lmms-eval, as the world's own suites are scored."""
    official = score(BRIEF.name, doc, results[0])
    kept = {key: doc[key] for key in ("id", "suite", "video_id", "family", "length_s")}
    row = {**kept, "answer_type": doc["answer_type"], "score": official.value or 0.0}
    return {BRIEF.metric: row | {"official": official.as_dict()}}


def mean_score(rows: Sequence[Mapping[str, Any]]) -> float:
    """The official aggregate, 0 to 1."""
    scored = [(row, Score.from_dict(row["official"])) for row in rows]
    return aggregate(BRIEF.name, scored).value or 0.0


def main() -> None:
    """Build the suite; the digest tells whether two builds ask the same."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", type=Path, required=True, help="where the world is built")
    parser.add_argument("--split", choices=tuple(SPLIT_BASE), default="test")
    parser.add_argument("--videos", type=int, default=BRIEF.videos)
    given = parser.parse_args()
    docs = build_brief(given.root, given.split, given.videos).docs
    print(f"{docs}: {digest(docs.read_bytes())}")  # noqa: T201


if __name__ == "__main__":
    main()
