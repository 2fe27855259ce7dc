"""A benchmark's protocol in words, and all of them as a table for the documentation."""

from collections.abc import Iterator
from dataclasses import replace

from .catalogue import BENCHMARKS
from .protocol import TOKEN_PIXELS, Benchmark, Preset


def place(one: Benchmark) -> str:
    """The paper's table, or a dash."""
    return f"table {one.column[0]}" if one.column else "–"


def task(one: Benchmark) -> str:
    """Whose task is run."""
    return f"lmms-eval {one.lmms.yaml}" if one.lmms else "ours"


def sampling(preset: Preset) -> str:
    """Frames and their size."""
    return f"{preset.fps:g} fps, at most {preset.max_frames} frames, {_size(preset)}"


def _size(preset: Preset) -> str:
    if preset.video_pixels is not None:
        return f"at most {preset.video_pixels[1] / 1e6:.1f} million pixels a video"
    if preset.min_pixels is None or preset.max_pixels is None:
        return "frame size of the checkpoint"
    low, high = _count(preset.min_pixels), _count(preset.max_pixels)
    return f"{low} tokens a frame" if low == high else f"{low} to {high} tokens a frame"


def _count(pixels: int) -> str:
    return f"{pixels // TOKEN_PIXELS:,}"


def table() -> str:
    """The Markdown table of all benchmarks."""
    head = (
        *("suite", "benchmark", "paper", "questions", "metric"),
        *("`paper` preset", "`official` preset", "task", "why"),
    )
    lines = [head, ("---",) * len(head), *_rows()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _rows() -> Iterator[tuple[str, ...]]:
    for one in BENCHMARKS.values():
        count = f"{one.data.questions:,}{'' if one.data.counted == 'verified' else ' (stated)'}"
        paper, official = _setting(one.paper), _setting(one.official)
        if _asked(one.paper) == _asked(one.official):
            official = "the same"
        elif paper == official:
            official = "the same, but another prompt"
        run = f"`{one.lmms.yaml}`" if one.lmms else "ours"
        start = (f"`{one.name}`", one.title, place(one), count, one.metric)
        yield (*start, paper, official, run, one.reason)


def _setting(preset: Preset) -> str:
    return f"{sampling(preset)}, {preset.max_new_tokens} new tokens"


def _asked(preset: Preset) -> Preset:
    """A preset without what is written about it."""
    return replace(preset, source="", note="")
