"""lmms-eval tasks of the world's suites: YAML beside the data, and the functions it names.

`world build` writes `<root>/<split>/lmms/iv3_<suite>.yaml` and one function file. With them both
`internvideo3 eval` and a stock `lmms-eval --include_path <root>/<split>/lmms --tasks iv3_<suite>`
run the same documents and the same scorer. lmms-eval resolves relative data files against the
working directory and expands no variables, so the YAML holds an absolute path; a folder that was
moved gets the right one from the next `world build`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from internvideo3.tasks.scoring import Score, aggregate, score
from internvideo3.tasks.world import difficulty as d
from internvideo3.tasks.world.suites import SUITES, Suite

TAG: Final = "iv3_world"
"""lmms-eval's name for all suites together."""
MAX_NEW_TOKENS: Final = 32

_YAML: Final = """\
# Made by `internvideo3 world build`; the next build writes it again.
task: iv3_{suite}
tag: {tag}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {docs}
test_split: test
output_type: generate_until
doc_to_visual: !function iv3_world.doc_to_visual
doc_to_text: !function iv3_world.doc_to_text
doc_to_target: answer
process_results: !function iv3_world.process_results
generation_kwargs:
  max_new_tokens: {tokens}
  temperature: 0
  do_sample: false
metric_list:
  - metric: {metric}
    aggregation: !function iv3_world.mean_score
    higher_is_better: true
cluster_key: video_id
metadata:
  - version: {version}
"""

_FUNCTIONS: Final = '''\
"""Functions of the iv3_world tasks. Made by `internvideo3 world build`."""

from pathlib import Path

from internvideo3.tasks.world.lmms import doc_to_text, mean_score, process_results

_FOLDER = Path(__file__).resolve().parent.parent


def doc_to_visual(doc):
    return [str(_FOLDER / doc["video"])]
'''


def task_files(suite: Suite, folder: Path) -> dict[Path, str]:
    """The files of a suite's task: path → text.

    Args:
        suite: The suite.
        folder: `<root>/<split>`, where the suite's documents are.
    """
    home = folder.resolve()
    yaml = _YAML.format(
        suite=suite.name,
        tag=TAG,
        docs=json.dumps(str(home / f"{suite.name}.jsonl"), ensure_ascii=False),
        tokens=MAX_NEW_TOKENS,
        metric=suite.metric,
        version=d.VERSION,
    )
    tasks = folder / "lmms"
    return {tasks / "iv3_world.py": _FUNCTIONS, tasks / f"iv3_{suite.name}.yaml": yaml}


def doc_to_text(doc: Mapping[str, Any], _settings: Mapping[str, Any] | None = None) -> str:
    """The user's text, complete; prompt settings of lmms-eval change nothing."""
    return str(doc["prompt"])


def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Score one answer for lmms-eval: metric → what its aggregation and log need.

    Args:
        doc: The document.
        results: The model's answers, of which there is one.
    """
    official = score(str(doc["suite"]), doc, results[0])
    plain = score(str(doc["suite"]), doc, results[0], rule="plain")
    kept = {key: doc[key] for key in ("id", "suite", "video_id", "family", "length_s")}
    row = {**kept, "answer_type": doc["answer_type"], "score": official.value or 0.0}
    row |= {"official": official.as_dict(), "plain": plain.as_dict()}
    return {SUITES[str(doc["suite"])].metric: row}


def mean_score(rows: Sequence[Mapping[str, Any]]) -> float:
    """The official aggregate of a suite, 0 to 1."""
    scored = [(row, Score.from_dict(row["official"])) for row in rows]
    value = aggregate(str(rows[0]["suite"]), scored).value
    return 0.0 if value is None else value
