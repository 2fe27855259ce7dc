"""The page of one rollout: timeline, turns, calls and what they gave, beliefs, checks, cost.

One file, no script, no network. Everything in a trace may have been written by anyone, so it is
escaped here and nothing on the page can run.
"""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from internvideo3.reports.thumbnails import Thumbnail, Thumbnailer, Wanted

TEMPLATES = Path(__file__).parent / "templates"
IMAGE_BUDGET_BYTES = 1_500_000
PICTURES = 6
"""Most pictures of one look."""
LONGEST_TEXT = 4_000
WIDTH = 1000
"""Units of the timeline's width."""


@dataclass(frozen=True, slots=True)
class Bar:
    """A part of the video on the timeline."""

    x: float
    width: float
    row: int
    kind: str
    """scene, look, heard, or evidence."""
    label: str


def write_page(trace: Mapping[str, Any], path: Path, *, video: Path | None = None) -> Path:
    """Write the page of a trace.

    Args:
        trace: what `ask` wrote to trace.json.
        path: the file.
        video: the video, for pictures; None for a page without.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(trace, video), encoding="utf-8")
    return path


def render(trace: Mapping[str, Any], video: Path | None = None) -> str:
    """Return the page."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"cut": cut, "plain": plain}
    style = "".join((TEMPLATES / name).read_text("utf-8") for name in ("report.css", "trace.css"))
    length_s = duration_s(trace)
    with closing(Thumbnailer(IMAGE_BUDGET_BYTES)) as camera:
        pictures = _pictures(trace, video, camera)
    return environment.get_template("trace.html.jinja").render(
        trace=trace,
        style=Markup(style),
        style_hash=_source_hash(style),
        bars=timeline(trace, length_s),
        width=WIDTH,
        length_s=length_s,
        turns=by_turn(trace),
        pictures=pictures,
        failed=sorted(camera.failed.values()),
    )


def cut(text: str) -> str:
    """A text as the page shows it, no longer than `LONGEST_TEXT`."""
    return text if len(text) <= LONGEST_TEXT else text[:LONGEST_TEXT] + " … (cut)"


def plain(value: Any) -> str:
    """A setting in words: `turns 8, tool calls 12`, and `–` for what is not set."""
    if isinstance(value, Mapping):
        return ", ".join(
            f"{str(name).replace('_', ' ')} {f'({plain(one)})' if _is_group(one) else plain(one)}"
            for name, one in value.items()
        )
    if isinstance(value, list | tuple):
        return ", ".join(map(plain, value)) or "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "–" if value in (None, "") else str(value)


def _is_group(value: Any) -> bool:
    return bool(value) and isinstance(value, Mapping | list | tuple)


def by_turn(trace: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Entries of each turn, with what was held and believed after it."""
    turns = sorted({entry["turn"] for entry in trace["entries"]})
    return [
        {
            "number": turn,
            "entries": [one for one in trace["entries"] if one["turn"] == turn],
            "judgement": _of_turn(trace["judgements"], turn),
            "belief": _of_turn(trace["beliefs"], turn),
        }
        for turn in turns
    ]


def _of_turn(rows: list[dict[str, Any]], turn: int) -> dict[str, Any] | None:
    return next((row for row in rows if row["turn"] == turn), None)


def duration_s(trace: Mapping[str, Any]) -> float:
    """Seconds that the timeline spans: to the end of the last thing with a time."""
    ends = [float(entry["span"][1]) for entry in trace["entries"] if entry["span"]]
    return max([*ends, *(float(item["span"][1]) for item in trace["memory"]), 0.001])


def timeline(trace: Mapping[str, Any], length_s: float) -> list[Bar]:
    """Scenes in the first row, a row for each look, then what was said, read and captioned.

    A look at several parts has a bar for each: what lies between them was not seen.
    """
    evidence = set(trace["answer"]["evidence"])
    bars = [_bar(m["span"], 0, "scene", m["text"], length_s) for m in trace["memory"]
            if m["level"] == "scene"]  # fmt: skip
    looks = [one for one in trace["entries"] if one["kind"] == "observation" and one["span"]]
    for row, one in enumerate(looks, 1):
        kind = "evidence" if one["id"] in evidence else "look"
        label = f"{one['id']} {one['source']}"
        parts = one["data"].get("parts") or [one["span"]]
        bars += [_bar(part, row, kind, label, length_s) for part in parts]
    row = len(looks) + 1
    heard = [item for item in trace["memory"] if item["level"] not in ("scene", "story")]
    return bars + [_bar(m["span"], row, "heard", cut(m["text"]), length_s) for m in heard]


def _bar(span: list[float], row: int, kind: str, label: str, length_s: float) -> Bar:
    start, end = (min(max(one / length_s, 0.0), 1.0) * WIDTH for one in span)
    when = f"{span[0]:g}-{span[1]:g} s"
    return Bar(round(start, 1), round(max(end - start, 2.0), 1), row, kind, f"{when}: {label}")


def _pictures(
    trace: Mapping[str, Any], video: Path | None, camera: Thumbnailer
) -> dict[str, list[Thumbnail]]:
    """Pictures of every look, by entry."""
    if video is None:
        return {}
    found: dict[str, list[Thumbnail]] = {}
    for entry in trace["entries"]:
        times = entry["data"].get("times_s", ())
        if times:
            found[entry["id"]] = camera.take(video, Wanted(_spread(times), PICTURES))
    return found


def _spread(times_s: Sequence[float]) -> tuple[float, ...]:
    """At most `PICTURES` of some times, from the first to the last."""
    count = min(PICTURES, len(times_s))
    steps = (len(times_s) - 1) / max(1, count - 1)
    return tuple(times_s[round(place * steps)] for place in range(count))


def _source_hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
