"""Temporal grounding: the model asked about ever shorter parts of a real video, within its limits.

pytest tests/agent/test_grounding.py
"""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from internvideo3.harness.agent.actions import Ground, Search
from internvideo3.harness.agent.context import Context
from internvideo3.harness.agent.environment import Environment
from internvideo3.harness.agent.grounding import KEPT, SHORTEST_S, ground
from internvideo3.harness.agent.memory import Item, Memory
from internvideo3.harness.agent.perception import Eye, Sight
from internvideo3.harness.agent.tools.catalogue import TOOLS
from internvideo3.harness.agent.tools.desk import Desk
from internvideo3.model.session import Session
from internvideo3.tasks.decoder import IsolatedReader

SIGHT = Sight(factor=32, min_pixels=4096, max_pixels=4096, max_frames=16, zoom_frames=8)
END_S = 28.0
SPOKEN = "the red boat leaves the harbour"


@pytest.fixture
def place(scale: tuple[Any, Any], video: Path) -> Iterator[Environment]:
    with Desk(TOOLS) as desk, closing(IsolatedReader()) as reader:
        context = Context(Session(*scale, media_options={"do_resize": False}))
        memory = Memory(desk, by_words="not asked")
        yield Environment(
            video=video, duration_s=END_S, desk=desk, memory=memory, context=context,
            eye=Eye(video, SIGHT, reader),
        )  # fmt: skip


def test_parts_become_shorter_and_lie_within_what_was_asked(place: Environment) -> None:
    assert place.eye is not None
    found = ground("a circle", (4.0, END_S), place.eye, place.context, place.memory, 10**6)
    assert 1 <= len(found.parts) <= KEPT and found.tokens > 0
    for one in found.parts:
        assert 4.0 <= one.span[0] < one.span[1] <= END_S and 0 <= one.score <= 1
        # 24 s in eight parts of 3 s; what is shorter than twice the shortest is not cut.
        assert SHORTEST_S <= one.span[1] - one.span[0] <= 3.0
    assert found.parts[0].score >= found.parts[-1].score
    assert len(place.context) == 0, "the rollout's context is not touched"


def test_what_was_heard_raises_the_part_that_it_was_heard_in(place: Environment) -> None:
    assert place.eye is not None
    place.memory.write([Item(text=SPOKEN, span=(11.0, 11.5), level="speech")])
    found = ground(SPOKEN, (0.0, END_S), place.eye, place.context, place.memory, 10**6)
    assert found.parts[0].span[0] <= 11.0 < found.parts[0].span[1]
    assert found.parts[0].score == 1.0


def test_a_search_ends_at_its_tokens(place: Environment) -> None:
    assert place.eye is not None
    whole = ground("a circle", (0.0, END_S), place.eye, place.context, place.memory, 10**6)
    short = ground("a circle", (0.0, END_S), place.eye, place.context, place.memory, 1)
    assert len(short.parts) == 1 and 0 < short.tokens <= whole.tokens / 8 * 1.5
    none = ground("a circle", (0.0, END_S), place.eye, place.context, place.memory, 0)
    assert none.parts == () and none.tokens == 0


def test_a_call_says_where_and_counts_what_it_took(place: Environment) -> None:
    feedback = place.execute(Ground(query="a circle", start_s=2.0, end_s=20.0))
    assert feedback.ok and feedback.span == (2.0, 20.0) and feedback.side_tokens > 0
    (first, *_) = feedback.data["hits"]
    assert feedback.text.startswith(f"{first['span'][0]:g}-{first['span'][1]:g} s (")
    beyond = place.execute(Ground(query="a circle", start_s=900.0))
    assert not beyond.ok and "28" in beyond.text
    blind = replace(place, eye=None).execute(Ground(query="a circle"))
    assert not blind.ok and "no video" in blind.text


def test_the_web_is_searched_only_where_it_is_allowed(
    place: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IV3_SEARCH_URL", "http://127.0.0.1:9/search")
    cut_off = place.execute(Search(query="who made it"))
    assert not cut_off.ok and "unavailable" in cut_off.text
    shut = replace(place, tools=("asr",))
    assert not shut.available("web_search") and not shut.available("temporal_grounding")
    assert place.available("temporal_grounding")
    refused = shut.execute(Search(query="who made it"))
    assert not refused.ok and "unavailable" not in refused.text
