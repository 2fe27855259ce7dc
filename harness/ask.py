"""`ask`: a question about one video, answered directly or by the agent, with a trace of it all."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from internvideo3.harness.agent.setting import TOOLS_OF_EVAL, AgentSettings, PolicyName
from internvideo3.harness.settings import pixel_range
from internvideo3.harness.traces import ROLLOUT, claimed

if TYPE_CHECKING:
    from internvideo3.harness.agent.episode import Place
    from internvideo3.harness.agent.perception import Eye, Sight
    from internvideo3.harness.agent.rollout import State
    from internvideo3.harness.agent.tools.desk import Desk


@dataclass(frozen=True, kw_only=True)
class AskOptions:
    """What to ask, of which model, and what it may cost."""

    video: Path
    """The video file; subtitles beside it, of the same name, are used."""
    question: str
    """The question; options on lines of their own as "A. …"."""
    out: Path
    """Folder for trace.json, trace.html and timings.json."""
    numbered: bool = False
    """Whether OUT-2, OUT-3, ... is taken where there is a rollout already; else that is refused."""
    model: str = "scale:m2la"
    """Checkpoint folder, or e.g. scale:m2la."""
    mode: str = "agentic"
    """direct, or agentic."""
    policy: PolicyName = "controller"
    """Who acts in agentic mode: controller (rules), or model (its own calls)."""
    turns: int = 8
    """Most turns."""
    tool_calls: int = 12
    """Most tool calls."""
    tokens: int = 8_192
    """Most tokens after the first look and the question."""
    fps: float = 2.0
    """Frames a second of the first look."""
    max_frames: int = 64
    """Most frames of the first look."""
    zoom_frames: int = 16
    """Most frames of a further look."""
    compress_at: int | None = None
    """Tokens at which the agent's context is begun anew with what matters; None for never."""
    captions: str = ""
    """Who captions the video before the question: "model", or "NAME@URL"; empty for nobody."""
    web: bool = False
    """Whether the agent may search the web."""
    max_new_tokens: int = 256
    """Most tokens of one reply."""
    temperature: float = 0.0
    """0 for greedy replies."""
    seed: int = 0
    """Seed of sampled replies."""
    device: str | None = None
    """cpu, cuda; None for cuda if there is one."""
    dtype: str = "auto"
    """float32, bfloat16, or auto."""
    threads: int = 1
    """CPU threads."""
    cache: Path | None = field(default=None)
    """Folder that keeps results of tools; None for the user's cache."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What came of it."""

    answer: str
    trace: dict[str, Any]
    page: Path
    notes: tuple[str, ...]
    """What could not be used, e.g. tools that are not installed."""


Watch = Callable[["State"], None]
Advance = Callable[[int, int], None]
"""Told of captions: how many there are, and how many there will be."""


def _unwatched(done: int, total: int) -> None:
    """Nobody watches captions."""


def ask(options: AskOptions, watch: Watch = lambda _: None, advance: Advance = _unwatched) -> Asked:
    """Answers a question about a video and writes its trace.

    Args:
        options: what to ask.
        watch: told of every step, for a live view.
        advance: told of every caption.

    Raises:
        ValueError: the question is empty, the video or the model cannot be read, or the folder
            holds a rollout.
    """
    _check(options)
    from internvideo3.harness.agent.perception import Eye
    from internvideo3.harness.agent.tools.catalogue import TOOLS, cache_folder
    from internvideo3.harness.agent.tools.desk import Desk
    from internvideo3.harness.agent.trace import write_json
    from internvideo3.reports.trace import write_page
    from internvideo3.tasks.decoder import IsolatedReader

    reader = IsolatedReader()
    with closing(reader), Desk(TOOLS, options.cache or cache_folder()) as desk:
        eye = Eye(options.video, sight_of(options), reader)
        # What is wrong with the video is told before a folder is made, or weights are read.
        eye.first()
        with claimed(options.out, numbered=options.numbered) as out:
            trace = _run(options, eye, desk, watch, advance)
            write_json(out / ROLLOUT, trace)
            write_json(out / "timings.json", desk.timings)
            page = write_page(trace, out / "trace.html", video=options.video)
    return Asked(answer=trace["answer"]["answer"], trace=trace, page=page, notes=_notes(trace))


def _check(options: AskOptions) -> None:
    if not options.question.strip():
        raise ValueError("the question is empty. Give it in quotes after the video.")
    if not options.video.is_file():
        raise ValueError(f"there is no video at {options.video}. Check the path.")


def _run(
    options: AskOptions, eye: Eye, desk: Desk, watch: Watch, advance: Advance
) -> dict[str, Any]:
    """The rollout's trace; a direct answer is a rollout of a single turn without tools."""
    from internvideo3.harness.agent.episode import about, answer
    from internvideo3.harness.agent.trace import trace_of
    from internvideo3.model.session import Limits

    agent = agent_of(options)
    place = replace(load_place(options, desk), advance=advance)
    limits = Limits(
        max_new_tokens=options.max_new_tokens, temperature=options.temperature, seed=options.seed
    )
    direct = options.mode == "direct"
    state, outcome = answer(place, eye, options.question, agent, limits, direct=direct, watch=watch)
    return trace_of(state, outcome, about(place, eye, agent, limits, direct=direct))


def load_place(options: AskOptions, desk: Desk) -> Place:
    """The model of a command beside its tools.

    Raises:
        ValueError: the model cannot be read.
    """
    import torch

    from internvideo3.harness.agent.episode import Place
    from internvideo3.model.checkpoint import load_model
    from internvideo3.model.device import device_of

    torch.set_num_threads(options.threads)
    device = str(device_of(options.device))
    model, processor = load_model(options.model, device, _dtype(options.dtype, device))
    return Place(model=model, processor=processor, desk=desk, name=options.model, cache=desk.cache)


def agent_of(options: AskOptions) -> AgentSettings:
    """The agent that a command asks for.

    Raises:
        ValueError: the budget is too small, or the captioner has no form.
    """
    from internvideo3.harness.agent.budget import Budget

    tools = (*TOOLS_OF_EVAL, "web_search") if options.web else TOOLS_OF_EVAL
    return AgentSettings(
        policy=options.policy,
        budget=Budget(turns=options.turns, tool_calls=options.tool_calls, tokens=options.tokens),
        zoom_frames=options.zoom_frames,
        tools=tools,
        seed=options.seed,
        compress_at=options.compress_at,
        captions=options.captions,
    )


def _dtype(asked: str, device: str) -> str:
    return asked if asked != "auto" else ("float32" if device == "cpu" else "bfloat16")


def sight_of(options: AskOptions) -> Sight:
    """How a command takes frames, at the pixels that its model names."""
    from internvideo3.harness.agent.perception import Sight
    from internvideo3.model.checkpoint import read_config, resolve_checkpoint

    checkpoint = resolve_checkpoint(options.model)
    low, high = pixel_range(checkpoint)
    vision = read_config(checkpoint)["vision_config"]
    return Sight(
        factor=vision["patch_size"] * vision["spatial_merge_size"],
        min_pixels=low,
        max_pixels=high,
        fps=options.fps,
        max_frames=options.max_frames,
        zoom_frames=options.zoom_frames,
    )


def _notes(trace: dict[str, Any]) -> tuple[str, ...]:
    if trace["mode"] == "direct":
        return ()
    absent = [
        f"{name} is off: {', '.join(missing)} not installed (pip install 'internvideo3[agent]')"
        for name, missing in trace["tools"].items()
        if missing
    ]
    return (*absent, *trace["faults"])
