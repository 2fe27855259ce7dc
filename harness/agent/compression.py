"""A context that has grown long is begun anew with what matters; what is dropped is said (3.1).

The token stream is append-only, so nothing can be cut out of it. At a number of tokens a new stream
is begun on an empty session: instructions, a note that names what is not in it any more, what the
answer rests on, and the newest entries, as they were. Frames are not encoded again. The trace keeps
all entries; memory and the evidence window keep what they hold.
"""

from __future__ import annotations

from collections.abc import Sequence

from internvideo3.harness.agent.context import Context, Entry, Kind
from internvideo3.harness.agent.rollout import State

KEPT = 0.5
"""Share of the threshold that a new stream may hold at its beginning."""
WORTH = 0.25
"""Share of the threshold that must be freed, or else nothing is done."""
MOST_NAMED = 40
"""Dropped entries that the note names; it counts the others."""


def compress(state: State, threshold: int) -> Entry | None:
    """Begins the token stream anew if it is longer than the threshold.

    Args:
        state: between two turns.
        threshold: tokens.

    Returns:
        The note on what was dropped; None if nothing was.
    """
    context = state.context
    if context.held <= threshold:
        return None
    kept = _chosen(context, _evidence(state), int(KEPT * threshold))
    size = sum(entry.stop - entry.start for entry in kept)
    if context.held - size < WORTH * threshold:
        return None
    return context.restart([entry.id for entry in kept], note(context.entries, kept))


def note(entries: Sequence[Entry], kept: Sequence[Entry]) -> str:
    """What is not in the context any more, in words."""
    gone = [entry for entry in entries if entry not in kept and entry.stop > entry.start]
    named = [entry for entry in gone if entry.span is not None][-MOST_NAMED:]
    lines = [_named(entry) for entry in named]
    others = len(gone) - len(named)
    if others:
        lines.append(f"{others} other entries")
    return "Dropped from the context, as it grew long: " + "; ".join(lines) + "."


def _named(entry: Entry) -> str:
    assert entry.span is not None
    return f"{entry.id} {entry.source} {entry.span[0]:g}-{entry.span[1]:g} s"


def _evidence(state: State) -> tuple[str, ...]:
    """What the answer rests on, most important first."""
    if state.beliefs:
        return state.beliefs[-1].evidence
    return tuple(dict.fromkeys(one.evidence for one in reversed(state.judgements)))


def _chosen(context: Context, evidence: Sequence[str], room: int) -> list[Entry]:
    """Instructions, then evidence, then the newest entries, while there is room; in order."""
    present = [entry for entry in context.entries if entry.id in context.present]
    first = [e.id for e in present if e.kind is Kind.INSTRUCTION and not e.turn]
    wanted = [*first, *evidence, *(entry.id for entry in reversed(present))]
    by_id = {entry.id: entry for entry in present}
    chosen: set[str] = set()
    for name in dict.fromkeys(wanted):
        entry = by_id.get(name)
        if entry is None or (name not in first and entry.stop - entry.start > room):
            continue
        chosen.add(name)
        room -= entry.stop - entry.start
    return [entry for entry in present if entry.id in chosen]
