"""What a rollout may spend and has spent; seconds are not counted, so that equal runs are equal."""

from __future__ import annotations

from dataclasses import dataclass

RESERVE = 256
"""Tokens kept for the end of a turn: belief, call and what is left. The question is put again where
as many remain after it."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Most turns, tool calls and tokens of a rollout."""

    turns: int = 8
    """Times that the policy may act."""
    tool_calls: int = 12
    """Calls of tools, looking again included."""
    tokens: int = 8_192
    """Tokens of the context and of side looks, after the first look and the question; at least
    `RESERVE` twice."""

    def __post_init__(self) -> None:
        """Checks the numbers.

        Raises:
            ValueError: there would not be one whole turn.
        """
        if self.turns < 1 or self.tool_calls < 0 or self.tokens < 2 * RESERVE:
            raise ValueError(
                f"a budget of {self.turns} turns, {self.tool_calls} tool calls and {self.tokens} "
                f"tokens is too small; give at least 1 turn, 0 calls and {2 * RESERVE} tokens."
            )


@dataclass(kw_only=True)
class Spending:
    """How much of a budget is left."""

    budget: Budget
    turns: int = 0
    tool_calls: int = 0
    context_tokens: int = 0
    """Tokens of the context since the first look and the question."""
    side_tokens: int = 0
    """Tokens that were only weighed, on forks."""

    @property
    def tokens_left(self) -> int:
        """Tokens that may still be spent."""
        return max(0, self.budget.tokens - self.context_tokens - self.side_tokens)

    @property
    def turns_left(self) -> int:
        """Turns that may still be begun."""
        return max(0, self.budget.turns - self.turns)

    @property
    def calls_left(self) -> int:
        """Tool calls that may still be made."""
        return max(0, self.budget.tool_calls - self.tool_calls)

    def spent(self) -> bool:
        """Whether no further turn can be begun."""
        return self.turns_left == 0 or self.tokens_left < RESERVE

    def told(self) -> str:
        """What is left, for the policy to read."""
        return f"Left: {self.turns_left} turns, {self.calls_left} calls, {self.tokens_left} tokens."
