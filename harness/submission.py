"""Answers whose truth is not public, as the file that a benchmark's server takes. No network."""

from collections.abc import Sequence
from pathlib import Path

from internvideo3.harness.store import Row, write_json

FOLDER = "submissions"
_LETTERS = "ABCDE"


def write_submission(root: Path, suite: str, rows: Sequence[Row]) -> Path | None:
    """Write `submissions/<suite>.json` of a run, where the suite has answers to submit.

    EgoSchema's server takes an object of video id → option, 0 to 4 (egoschema/EgoSchema@505c787:
    validate.py). A video whose answer could not be read is left out and not guessed.

    Args:
        root: the run directory.
        suite: the suite, all of whose samples are given.
        rows: its records.

    Returns:
        The file; None where there is nothing to submit.
    """
    if any(row.get("benchmark") != "egoschema" for row in rows):
        return None
    hidden = [row for row in rows if row["official"]["outcome"] == "no_truth"]
    if not hidden:
        return None
    answers = {
        str(row["doc"]["video_idx"]): _LETTERS.index(row["official"]["parsed"])
        for row in hidden
        if row["official"]["parsed"] is not None
    }
    path = root / FOLDER / f"{suite}.json"
    path.parent.mkdir(exist_ok=True)
    write_json(path, answers)
    return path
