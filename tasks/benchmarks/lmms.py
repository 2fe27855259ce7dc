"""Benchmarks as tasks of lmms-eval: YAML and documents, and the functions that the YAML names.

A task that reuses lmms-eval's includes that task's YAML and keeps its prompt; data, media, answer
length and scorer are replaced. lmms-eval resolves `!function` names by import, so the functions
are here and not beside the YAML. The files lie in the run directory; a stock
`lmms-eval --include_path RUN/lmms` runs the same documents, prompts and scorer.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from internvideo3.tasks.scoring import Score, aggregate, score

from . import interleaved
from .protocol import Benchmark, Preset, Raw

METRIC = "iv3_score"
_HERE = __name__
_NUMBER = (int, float)


def task_name(suite: str) -> str:
    """lmms-eval's name of a suite's task; its own names always win, hence the prefix."""
    return f"iv3_{suite}"


def task_files(
    suite: str,
    benchmark: Benchmark,
    preset: Preset,
    docs: Sequence[Raw],
    folder: Path,
    lmms_tasks: Path | None,
) -> dict[Path, str]:
    """The files of a suite's task: path → text.

    Args:
        suite: the suite's name.
        benchmark: its benchmark.
        preset: how it is run.
        docs: all of its documents.
        folder: where the files will lie.
        lmms_tasks: the folder of lmms-eval's own tasks; needed where one is reused.
    """  # fmt: skip
    data = folder.resolve() / f"{suite}.jsonl"
    config: Raw = {}
    if benchmark.lmms is not None and preset.prompt is None:
        config["include"] = str(Path(lmms_tasks or "") / benchmark.lmms.yaml)
        if benchmark.lmms.prompt_settings is not None:
            settings = dict(benchmark.lmms.prompt_settings)
            config["lmms_eval_specific_kwargs"] = {"default": settings}
    else:
        config["doc_to_text"] = _Function("doc_to_text")
    config |= {
        "task": task_name(suite),
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "generate_until",
        "process_docs": None,
        "doc_to_visual": _Function("doc_to_visual"),
        "doc_to_messages": _messages(benchmark),
        "doc_to_target": "iv3_target",
        "process_results": _Function("process_results"),
        "generation_kwargs": {
            "max_new_tokens": preset.max_new_tokens,
            "temperature": 0,
            "do_sample": False,
        },
        "metric_list": [
            {"metric": METRIC, "aggregation": _Function("mean_score"), "higher_is_better": True}
        ],
        "cluster_key": "video_id",
        "metadata": [{"version": 1}],
    }
    rows = _uniform([_row(benchmark, doc) for doc in docs])
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    head = f"# Made by `internvideo3 eval`: {benchmark.title}.\n"
    return {
        data: text,
        folder / f"{task_name(suite)}.yaml": head + yaml.dump(config, Dumper=_Dumper, width=100),
    }


def _messages(benchmark: Benchmark) -> "_Function | None":
    """What builds the user's turn, where lmms-eval's media first, text last is not the protocol."""
    if benchmark.between is not None:
        return _Function(f"{interleaved.__name__}.{interleaved.doc_to_messages.__name__}")
    return _Function("doc_to_messages") if benchmark.interleaved else None


class _Function(str):
    """A function for YAML: of this file by its name, of another by its module and name."""


class _Dumper(yaml.SafeDumper):
    """Writes functions as lmms-eval reads them."""


_Dumper.add_representer(
    _Function,
    lambda dumper, name: dumper.represent_scalar(
        "!function", str(name) if "." in name else f"{_HERE}.{name}"
    ),
)


def _row(benchmark: Benchmark, doc: Raw) -> Raw:
    own = {
        "iv3_id": doc["id"],
        "iv3_scorer": benchmark.scorer,
        "iv3_video_id": doc["video_id"],
        "iv3_media": json.dumps([*doc["videos"], *doc["images"]]),
        "iv3_fps": doc["fps"],
        "iv3_between": json.dumps(doc["between"], ensure_ascii=False),
        "iv3_prompt": doc["prompt"] or "",
        "iv3_target": doc["answer"],
        "iv3_doc": json.dumps(doc["doc"], ensure_ascii=False),
    }
    raw = doc["raw"] or {}
    return {key: value for key, value in raw.items() if _plain(value)} | own


def _plain(value: Any) -> bool:
    """Whether JSON can hold a value; images in bytes are in files by now."""
    if isinstance(value, Mapping):
        return all(map(_plain, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_plain, value))
    return value is None or isinstance(value, str | int | float)


def _uniform(rows: list[Raw]) -> list[Raw]:
    """Rows whose fields have one type each, as Arrow needs: a mixed field becomes text."""
    kinds: dict[str, set[type]] = {}
    for row in rows:
        for key, value in row.items():
            if value is not None:
                kind = float if isinstance(value, _NUMBER) else type(value)
                kinds.setdefault(key, set()).add(kind)
    mixed = {key for key, found in kinds.items() if len(found) > 1}
    if not mixed:
        return rows
    return [
        {k: str(v) if k in mixed and v is not None else v for k, v in row.items()} for row in rows
    ]


def doc_to_text(doc: Mapping[str, Any], _settings: Mapping[str, Any] | None = None) -> str:
    """The user's text of a task whose prompt is ours."""
    return str(doc["iv3_prompt"])


def doc_to_visual(doc: Mapping[str, Any]) -> list[Any]:
    """A document's media: paths of videos, opened images.

    Raises:
        FileNotFoundError: a file is missing.
    """
    from PIL import Image

    media: list[Any] = []
    for path in json.loads(doc["iv3_media"]):
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path} is missing; `internvideo3 eval --check` lists all")
        if Path(path).suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"):
            with Image.open(path) as image:
                media.append(image.convert("RGB"))
        else:
            media.append(path)
    return media


def doc_to_messages(
    doc: Mapping[str, Any], lmms_eval_specific_kwargs: Mapping[str, Any] | None = None
) -> list[dict[str, Any]]:
    """A user's turn whose text says by `<video>` and `<image>` where the media stand.

    Media that the text does not name come first.
    """
    media = doc_to_visual(doc)
    waiting = {
        "<video>": [{"type": "video", "url": one} for one in media if isinstance(one, str)],
        "<image>": [{"type": "image", "url": one} for one in media if not isinstance(one, str)],
    }
    text = str(doc["iv3_prompt"])
    content: list[dict[str, Any]] = []
    for mark, parts in waiting.items():
        extra = max(0, len(parts) - text.count(mark))
        content += parts[:extra]
        del parts[:extra]
    for piece in re.split(r"(<video>|<image>)", text):
        if piece in waiting:
            content += waiting[piece][:1]
            del waiting[piece][:1]
        elif piece.strip():
            content.append({"type": "text", "text": piece})
    return [{"role": "user", "content": content}]


def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Score one answer for lmms-eval: metric → what its aggregation and log need."""
    kept = json.loads(doc["iv3_doc"])
    scorer = str(doc["iv3_scorer"])
    official = score(scorer, kept, results[0])
    plain = score(scorer, kept, results[0], rule="plain")
    row = {"id": doc["iv3_id"], "scorer": scorer, "video_id": doc["iv3_video_id"], "doc": kept}
    row |= {"score": official.value or 0.0}
    return {METRIC: row | {"official": official.as_dict(), "plain": plain.as_dict()}}


def mean_score(rows: Sequence[Mapping[str, Any]]) -> float:
    """The official aggregate, 0 to 1; not a number where nothing can be scored locally."""
    scored = [(row["doc"], Score.from_dict(row["official"])) for row in rows]
    value = aggregate(str(rows[0]["scorer"]), scored).value
    return float("nan") if value is None else value
