"""Several sources as one file with exact shares, of one's own or as the paper has them."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from internvideo3.training.curation.records import DataError, Row, videos_of
from internvideo3.training.curation.synthesis import PUBLISHED
from internvideo3.training.mixture import counts, dealt

One = TypeVar("One")


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A mixture that the paper publishes."""

    shares: Mapping[str, float]
    """Source → share."""
    of_videos: bool = False
    """Whether the shares are of videos, and not of rows."""


def presets() -> dict[str, Preset]:
    """Continued pretraining (section 4.1), SFT (4.2) and its long videos (4.2.1), by name.

    Of the long videos the numbers are published; their shares are those of 380K, their sum.
    """
    videos: Mapping[str, int] = PUBLISHED["long_video_sources"]
    long_video = {name: count / sum(videos.values()) for name, count in videos.items()}
    return {
        "cpt": Preset(shares=PUBLISHED["cpt"]["shares"]),
        "sft": Preset(shares=PUBLISHED["sft"]["shares"]),
        "long_video": Preset(shares=long_video, of_videos=True),
    }


def preset_of(name: str) -> Preset:
    """A published mixture.

    Raises:
        DataError: There is none of this name.
    """
    known = presets()
    if name not in known:
        raise DataError(f"no preset {name!r} of a mixture; known: {', '.join(known)}")
    return known[name]


def source_of(preset: Preset, given: str) -> str:
    """The source of a preset that a name, or the only one that its beginning, stands for.

    Raises:
        DataError: None is, or several are.
    """
    wanted = given.strip().lower()
    exact = [name for name in preset.shares if name.lower() == wanted]
    found = exact or [name for name in preset.shares if wanted and name.lower().startswith(wanted)]
    if len(found) != 1:
        listed = "; ".join(found or preset.shares)
        raise DataError(
            f"{given!r} is {'the beginning of several sources' if found else 'no source'} of the "
            f"preset: {listed}"
        )
    return found[0]


def told_apart(files: Mapping[Path, Sequence[Row]]) -> dict[Path, list[Row]]:
    """Rows with ids that no two rows of all the files share, by which the next command knows them.

    An id that is the only one stays as it is; others get the file's name before them, and its path
    and their number in it where that is not enough. A row without an id is named by its number.

    Args:
        files: File → its rows.
    """
    names = [
        _names(path, number, row)
        for path, rows in files.items()
        for number, row in enumerate(rows, start=1)
    ]
    while shared := _shared(names):
        names = [one[1:] if one[0] in shared and len(one) > 1 else one for one in names]
    chosen = iter(names)
    return {path: [_called(row, next(chosen)[0]) for row in rows] for path, rows in files.items()}


def _names(path: Path, number: int, row: Row) -> tuple[str, ...]:
    """What a row may be called, the most welcome name first; the last one is its own."""
    if row.get("id") is None:
        return f"{path.stem}/{number}", f"{path}/{number}"
    return str(row["id"]), f"{path.stem}/{row['id']}", f"{path}/{number}/{row['id']}"


def _shared(names: Sequence[tuple[str, ...]]) -> set[str]:
    """First names that several have and that one of them can do without."""
    counts = Counter(one[0] for one in names)
    return {one[0] for one in names if len(one) > 1 and counts[one[0]] > 1}


def _called(row: Row, name: str) -> Row:
    return row if str(row.get("id")) == name else {**row, "id": name}


def mixed(
    sources: Mapping[str, Sequence[Row]], shares: Mapping[str, float], total: int, seed: int
) -> list[Row]:
    """So many rows, each source's share exact and spread evenly; no row twice.

    Args:
        sources: Name → rows.
        shares: Name → share of the rows; they sum to 1.
        total: Rows in all.
        seed: Which rows of a source are drawn, and their order.

    Raises:
        DataError: A source has too few rows, or shares and sources differ in names.
        RecipeError: The shares do not sum to 1.
    """
    return [{**row, "source": name} for name, row in _drawn(sources, shares, total, seed, "rows")]


def mixed_videos(
    sources: Mapping[str, Sequence[Row]], shares: Mapping[str, float], total: int, seed: int
) -> list[Row]:
    """All rows of so many videos, each source's share of the videos exact and spread evenly.

    Args:
        sources: Name → rows.
        shares: Name → share of the videos; they sum to 1.
        total: Videos in all; rows about the same videos stay together.
        seed: Which videos of a source are drawn, and their order.

    Raises:
        DataError: A source has too few videos or a row without one, or shares and sources differ.
        RecipeError: The shares do not sum to 1.
    """
    grouped = {name: _by_video(name, rows) for name, rows in sources.items()}
    drawn = _drawn(grouped, shares, total, seed, "videos")
    return [{**row, "source": name} for name, rows in drawn for row in rows]


def _by_video(name: str, rows: Sequence[Row]) -> list[list[Row]]:
    groups: dict[tuple[str, ...], list[Row]] = {}
    for number, row in enumerate(rows, start=1):
        videos = tuple(videos_of(row))
        if not videos:
            raise DataError(f"{name}, row {number}, shows no video, and its shares are of videos")
        groups.setdefault(videos, []).append(row)
    return list(groups.values())


def _drawn(
    sources: Mapping[str, Sequence[One]],
    shares: Mapping[str, float],
    total: int,
    seed: int,
    things: str,
) -> Iterator[tuple[str, One]]:
    """Source and thing, in the order of the mixture."""
    if sources.keys() != shares.keys():
        missing = [name for name in shares if name not in sources]
        strange = [name for name in sources if name not in shares]
        raise DataError(
            f"the mixture's sources and shares differ; without a file: {'; '.join(missing) or '-'}"
            f"; without a share: {'; '.join(strange) or '-'}"
        )
    wanted = counts(shares, total)
    for name, count in wanted.items():
        if count > len(sources[name]):
            most = int(min(len(sources[n]) / s for n, s in shares.items() if s))
            raise DataError(
                f"{name} has {len(sources[name])} {things} and {count} are wanted; with these "
                f"shares at most {most} {things} in all can be drawn without repeating one"
            )
    drawn = {
        name: iter(random.Random(f"mix/{seed}/{name}").sample(list(sources[name]), count))
        for name, count in wanted.items()
    }
    return ((name, next(drawn[name])) for name in dealt(shares, total))
