"""`trace replay` and `trace show`: a rollout run again from its file, and its page."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from internvideo3.harness.traces import ROLLOUT, claimed, read_trace

if TYPE_CHECKING:
    from internvideo3.harness.ask import AskOptions

ENVIRONMENT = {"tools", "meaning", "model"}
"""Parts of a trace that tell where it was made; a replay elsewhere may differ in them."""


@dataclass(frozen=True, kw_only=True)
class Replayed:
    """What came of a replay."""

    trace: dict[str, Any]
    page: Path
    differing: tuple[str, ...]
    """Parts of the trace that came out otherwise; none for the same rollout."""


def replay(path: Path, options: AskOptions, *, live: bool) -> Replayed:
    """Run the rollout of a trace again.

    Args:
        path: a trace that `ask` or `eval` wrote.
        options: the video, the model and where it runs; the rest is the trace's.
        live: whether tools run anew; else they give what the trace has recorded.

    Raises:
        ValueError: the trace or the video is another one, the model cannot be read, or the folder
            holds a rollout.
    """
    from internvideo3.harness.agent.episode import again
    from internvideo3.harness.agent.tools.catalogue import TOOLS, cache_folder
    from internvideo3.harness.agent.tools.desk import Desk, RecordedDesk
    from internvideo3.harness.agent.trace import write_json
    from internvideo3.harness.ask import load_place
    from internvideo3.reports.trace import write_page
    from internvideo3.tasks.decoder import IsolatedReader

    old = read_trace(path)
    cache = options.cache or cache_folder()
    recorded = [dict(row) for row in old.get("tool_results", ())]
    desk: Desk = Desk(TOOLS, cache)
    if not live:
        desk = RecordedDesk(TOOLS, cache, recorded=recorded, absent=old.get("tools", {}))
    named = replace(options, model=options.model or str(old["model"]))
    claim = claimed(options.out, numbered=options.numbered)
    with closing(IsolatedReader()) as reader, desk, claim as out:
        new = again(old, options.video, load_place(named, desk), reader)
        write_json(out / ROLLOUT, new)
        page = write_page(new, out / "trace.html", video=options.video)
        # Through JSON, as the old one went: tuples and lists are the same there.
        fresh = read_trace(out / ROLLOUT)
    parts = sorted((old.keys() | fresh.keys()) - ENVIRONMENT)
    differing = tuple(part for part in parts if old.get(part) != fresh.get(part))
    return Replayed(trace=fresh, page=page, differing=differing)


def show(path: Path, video: Path | None, out: Path) -> Path:
    """Write the page of a trace.

    Args:
        path: a trace that `ask` or `eval` wrote.
        video: for pictures; None for a page without.
        out: the page's file.

    Raises:
        ValueError: there is no such trace, or it is of another version.
    """
    from internvideo3.harness.agent.trace import check_version
    from internvideo3.reports.trace import write_page

    trace = read_trace(path)
    check_version(trace)
    return write_page(trace, out, video=video)
