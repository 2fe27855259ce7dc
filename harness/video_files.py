"""Which files of folders are videos: links are followed, and no file is taken twice."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from internvideo3.training.curation.records import DataError

VIDEO_NAMES = frozenset({
    ".mp4", ".mkv", ".webm", ".mov", ".avi", ".m4v", ".flv", ".f4v", ".mpg", ".mpeg", ".m2v", ".ts",
    ".mts", ".m2ts", ".vob", ".wmv", ".asf", ".3gp", ".3g2", ".ogv", ".rm", ".rmvb", ".divx",
})  # fmt: skip
"""Endings of videos; GIFs are as often pictures."""
NO_VIDEO = frozenset({
    ".txt", ".md", ".rst", ".json", ".jsonl", ".csv", ".tsv", ".parquet", ".yaml", ".yml", ".toml",
    ".xml", ".html", ".pdf", ".py", ".sh", ".log", ".srt", ".vtt", ".ass", ".lrc", ".xlsx", ".tex",
    ".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".svg", ".ico", ".heic",
    ".wav", ".mp3", ".flac", ".m4a", ".aac", ".opus", ".npy", ".npz", ".pt", ".pkl", ".safetensors",
})  # fmt: skip
"""Endings of texts, pictures, sounds and arrays."""


@dataclass(frozen=True)
class Candidates:
    """What of a folder may be a video."""

    tried: tuple[Path, ...]
    others: tuple[Path, ...]
    """By their names something else."""


def is_named_video(path: Path) -> bool:
    """Whether a file has a video's ending."""
    return path.suffix.lower() in VIDEO_NAMES


def found_videos(paths: Sequence[Path]) -> list[Path]:
    """Videos among files and folders, in the order of their names; those named are all taken.

    Raises:
        DataError: There is none, or a path is not there.
        OSError: A folder cannot be read.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            found += filter(is_named_video, _files_below(path))
        elif path.is_file() or is_named_video(path):
            found.append(path)
        else:
            raise DataError(f"{path} is not there; give videos, and folders of videos")
    if not found:
        endings = ", ".join(sorted(VIDEO_NAMES))
        raise DataError(f"no video among {', '.join(map(str, paths))} ({endings})")
    return _once(found)


def candidates(path: Path) -> Candidates:
    """Every file of a folder that may be a video, whatever its ending is; a file is one itself.

    Raises:
        DataError: It is not there.
        OSError: A folder cannot be read.
    """
    if path.is_file():
        return Candidates((path,), ())
    if not path.is_dir():
        raise DataError(f"{path} is not there; give a folder of videos")
    files = _files_below(path)
    others = [one for one in files if one.suffix.lower() in NO_VIDEO]
    tried = _once(one for one in files if one.suffix.lower() not in NO_VIDEO)
    return Candidates(tuple(tried), tuple(others))


def _files_below(folder: Path) -> list[Path]:
    """All files, sorted; a folder that links lead to again, such as its own parent, counts once."""
    found: list[Path] = []
    visited: set[tuple[int, int]] = set()
    for where, folders, files in os.walk(folder, followlinks=True, onerror=_raised):
        here = Path(where)
        state = here.stat()
        if (state.st_dev, state.st_ino) in visited:
            folders.clear()
            continue
        visited.add((state.st_dev, state.st_ino))
        # What is no file may never end; a video whose link leads nowhere has to be told of.
        found += (p for p in map(here.joinpath, files) if p.is_file() or is_named_video(p))
    return sorted(found)


def _raised(error: OSError) -> None:
    raise error


def _once(paths: Iterable[Path]) -> list[Path]:
    """Each file once, by its first name; by one with a video's ending, if there is any."""
    kept: dict[Path, Path] = {}
    for path in paths:
        whole = path.resolve()
        if whole not in kept or (is_named_video(path) and not is_named_video(kept[whole])):
            kept[whole] = path
    return list(kept.values())
