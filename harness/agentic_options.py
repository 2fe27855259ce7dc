"""The agent of an `eval` command, checked before any work."""

from collections.abc import Mapping
from typing import Any

from internvideo3.harness.agent.budget import Budget
from internvideo3.harness.agent.setting import TOOLS_OF_EVAL, AgentSettings
from internvideo3.harness.preflight import PreflightError, nearest

TOOLS = (*TOOLS_OF_EVAL, "web_search")
POLICIES = ("controller", "model", "trained")
LOOKS = ("new", "spread", "random", "none")


def agent_options(
    policy: str,
    budget: tuple[int, int, int],
    looks: str,
    zoom_frames: int,
    tools: str | None,
    *,
    verify: bool,
    compress_at: int | None = None,
    captions: str = "",
    direct_only: Mapping[str, bool],
) -> AgentSettings:
    """The settings of an agent.

    Args:
        policy: controller, model or trained.
        budget: most turns, tool calls and tokens.
        looks: where the controller looks again.
        zoom_frames: most frames of a further look.
        tools: names with commas between, `none`, or None for all but the web.
        verify: whether answers must pass verification.
        compress_at: tokens at which the context is begun anew; None for never.
        captions: who captions videos before their first question; empty for nobody.
        direct_only: options that only direct answers take, and whether they were given.

    Raises:
        PreflightError: a name is unknown, with the nearest known one, or an option has no agentic
            form.
        ValueError: the budget or the threshold is too small, or the captioner has no form.
    """
    given = [option for option, holds in direct_only.items() if holds]
    if given:
        raise PreflightError(
            f"{given[0]} has no agentic form: a rollout looks again at the video as it is, and "
            "takes its own turns. Leave it out, or take --mode direct."
        )
    chosen: Any = _known("--policy", policy, POLICIES)
    where: Any = _known("--looks", looks, LOOKS)
    named: tuple[str, ...] = TOOLS_OF_EVAL
    if tools is not None:
        words = [] if tools.strip() == "none" else [word.strip() for word in tools.split(",")]
        named = tuple(_known("--tools", word, TOOLS) for word in words)
    turns, tool_calls, tokens = budget
    return AgentSettings(
        policy=chosen,
        budget=Budget(turns=turns, tool_calls=tool_calls, tokens=tokens),
        looks=where,
        verifies=verify,
        zoom_frames=zoom_frames,
        tools=named,
        compress_at=compress_at,
        captions=captions,
    )


def _known(option: str, given: str, known: tuple[str, ...]) -> str:
    if given not in known:
        raise PreflightError(f"{option} {given!r} is not known. {nearest(given, known)}")
    return given
