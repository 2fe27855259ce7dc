"""Scoring: one stable entry point for evaluation, reinforcement-learning rewards and re-scoring.

    score("world_long", doc, "B") -> Score(value=1.0, parsed="B", outcome="answered")
    aggregate("world_long", [(doc, score), ...]) -> TaskResult(value=0.61, n=2000, ...)

Pure Python: no torch, no network, no randomness, no state.
"""

from .entry import aggregate, benchmark_names, headline, score, sources
from .result import Group, Headline, Outcome, Row, Rule, Score, ScoringError, TaskResult, Unit

__all__ = [
    "Group",
    "Headline",
    "Outcome",
    "Row",
    "Rule",
    "Score",
    "ScoringError",
    "TaskResult",
    "Unit",
    "aggregate",
    "benchmark_names",
    "headline",
    "score",
    "sources",
]
