"""A rollout as JSON: everything that decides it, and no clock, so that equal rollouts are equal."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from internvideo3.harness.agent.rollout import Outcome, State

SCHEMA = 5


def trace_of(state: State, outcome: Outcome, about: Mapping[str, Any]) -> dict[str, Any]:
    """The trace of a rollout that has ended.

    Args:
        state: the rollout's.
        outcome: how it ended.
        about: the command's side: mode, model, video, seed, settings.
    """
    spending, memory = state.spending, state.environment.memory
    tools = state.environment.desk.tools
    return {
        "schema": SCHEMA,
        **about,
        "question": state.question.encode("utf-8", "replace").decode(),
        "options": list(state.options),
        "budget": asdict(spending.budget),
        "tools": {name: list(state.environment.desk.missing(name)) for name in sorted(tools)},
        "meaning": memory.by_words or "embedding",
        "prior": state.prior,
        "entries": [asdict(entry) | {"kind": str(entry.kind)} for entry in state.context.entries],
        "judgements": [asdict(one) for one in state.judgements],
        "beliefs": [asdict(one) for one in state.beliefs],
        "checks": [asdict(one) for one in state.checks],
        "known": [asdict(one) for one in state.known.items],
        "faults": list(state.known.faults),
        "memory": [asdict(one) for one in memory.items],
        "tool_results": state.environment.desk.results,
        "answer": asdict(outcome),
        "cost": {
            "turns": spending.turns,
            "tool_calls": spending.tool_calls,
            "context_tokens": len(state.context),
            "generated_tokens": state.context.generated,
            "side_tokens": spending.side_tokens,
            "cache_bytes": state.context.session.bytes(),
        },
    }


def check_version(trace: Mapping[str, Any]) -> None:
    """Refuses traces of another version of this code.

    Raises:
        ValueError: it is one.
    """
    if trace.get("schema") != SCHEMA:
        raise ValueError(
            f"the trace is of version {trace.get('schema')}, this code reads version {SCHEMA}; "
            "make it again with `ask` or `eval`."
        )


def write_json(path: Path, data: Any) -> None:
    """Writes JSON in a form that depends on the data only."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(data, indent=1, sort_keys=True, ensure_ascii=True, default=str)
    path.write_text(text + "\n", encoding="utf-8")
