"""With what options a folder or file of results was made; results of others are refused.

A step that goes on from what is on disk would otherwise hand on another command's results as its
own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from internvideo3.training.curation.records import DataError, Row

NAME = "curation.json"


def claim(folder: Path, options: Row, revision: str, kept: Sequence[str]) -> None:
    """Write down what decides the results of a folder, or make sure that it is the same.

    A folder in which nothing was made yet may be taken over by other options.

    Args:
        folder: Made if missing.
        options: What decides the results; simple values.
        revision: Of the code; all that worked on the folder are listed.
        kept: Patterns of the results from which a later command goes on.

    Raises:
        DataError: The folder holds results of other options, or nobody knows of which.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / NAME
    begun = any(any(folder.glob(pattern)) for pattern in kept)
    if begun and not path.is_file():
        raise DataError(
            f"{folder} holds results, and no {NAME} that says with what options they were made. "
            "Give another --out, or delete what is there."
        )
    revisions = [revision]
    if begun:
        before = origin_of(folder)
        refuse_others(f"{folder} ({NAME})", before["options"], options)
        revisions = list(dict.fromkeys([*before["revisions"], revision]))
    part = path.with_suffix(".part")
    told = {"options": options, "revisions": revisions}
    part.write_text(json.dumps(told, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def origin_of(folder: Path) -> dict[str, Any]:
    """What `claim` wrote down of a folder: `options` and `revisions`; both empty for no such file.

    Raises:
        DataError: The file is damaged.
    """
    path = folder / NAME
    if not path.is_file():
        return {"options": {}, "revisions": []}
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
        return {"options": dict(read["options"]), "revisions": list(read["revisions"])}
    except (ValueError, LookupError, TypeError) as error:
        raise DataError(
            f"{path} is damaged ({error}); restore it, or give another --out"
        ) from error


def refuse_others(where: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Make sure that two commands' options are the same.

    Raises:
        DataError: They are not; names what differs.
    """
    differing = [
        f"  {key}: {_told(before, key)} there, {_told(now, key)} now"
        for key in sorted(before.keys() | now.keys())
        if _told(before, key) != _told(now, key)
    ]
    if differing:
        listed = "\n".join(differing)
        raise DataError(
            f"{where} was made with other options. What differs:\n{listed}\n"
            "Give another --out, or repeat the command that made it."
        )


def _told(options: Mapping[str, Any], key: str) -> str:
    return json.dumps(options[key], ensure_ascii=False) if key in options else "not said"
