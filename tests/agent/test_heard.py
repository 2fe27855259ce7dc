"""A session that is heard says what another says, in pieces, and can be cut short.

pytest tests/agent/test_heard.py
"""

from typing import Any

import pytest

from internvideo3.harness.agent.heard import PIECE, HeardSession
from internvideo3.model.session import Limits, Session


def asked(session: Session) -> Session:
    session.append([{"role": "user", "content": "Which colour has the ring? Tell all."}])
    return session


@pytest.mark.parametrize("most", [1, PIECE, PIECE + 1, 5 * PIECE])
def test_a_greedy_reply_is_the_same_and_its_pieces_make_it_up(gqa: Any, most: int) -> None:
    heard: list[str] = []
    limits = Limits(max_new_tokens=most)
    session = asked(HeardSession(*gqa, listener=heard.append))
    reply = session.generate(limits)
    other = asked(Session(*gqa))
    assert reply == other.generate(limits)
    assert "".join(heard) == reply.text
    assert session.ids == other.ids and len(session) == len(other)
    assert (session.logits_last - other.logits_last).abs().max() < 1e-5


def test_a_sampled_reply_is_the_seeds_and_no_piece_repeats_another(gqa: Any) -> None:
    limits = Limits(max_new_tokens=4 * PIECE, temperature=2.0, seed=3)
    one, two = (
        asked(HeardSession(*gqa, listener=lambda _: None)).generate(limits) for _ in range(2)
    )
    assert one == two
    pieces = {one.token_ids[at : at + PIECE] for at in range(0, len(one.token_ids), PIECE)}
    assert len(pieces) == -(-len(one.token_ids) // PIECE) > 1


def test_what_the_listener_raises_ends_the_reply(gqa: Any) -> None:
    told: list[str] = []

    def listen(text: str) -> None:
        told.append(text)
        if len(told) == 3:
            raise KeyError("enough")

    session = asked(HeardSession(*gqa, listener=listen))
    before = len(session)
    with pytest.raises(KeyError, match="enough"):
        session.generate(Limits(max_new_tokens=10_000))
    assert len(session) == before + 2 * PIECE


def test_characters_are_told_whole(gqa: Any) -> None:
    """A random model writes bytes that make no character; none of what was told is taken back."""
    for seed in range(5):
        heard: list[str] = []
        limits = Limits(max_new_tokens=5 * PIECE, temperature=5.0, seed=seed)
        reply = asked(HeardSession(*gqa, listener=heard.append)).generate(limits)
        assert "".join(heard) == reply.text
