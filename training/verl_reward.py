"""The reward that verl calls, by the scorers of evaluation; verl loads it by this file's path."""

from __future__ import annotations

import json
from typing import Any

from internvideo3.tasks.scoring.entry import score


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: str,
    extra_info: dict[str, Any] | None = None,
) -> float:
    """What a response earns by the rule `plain`, 0 to 1; an answer that the rule drops earns 0.

    Args:
        data_source: The benchmark by whose rule it is scored.
        solution_str: The response.
        ground_truth: The question's fields as the scorers read them, as JSON.
        extra_info: Not used.

    Raises:
        ScoringError: No benchmark has that name.
    """
    made = score(data_source, json.loads(ground_truth), solution_str, rule="plain")
    return made.value or 0.0
