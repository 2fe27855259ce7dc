"""What a question holds: its options, which of them an answer names, and what bears repeating."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from internvideo3.harness.agent.quoting import LONGEST_CHARS
from internvideo3.tasks.scoring.choice import read_plain

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
HEAD_CHARS, TAIL_CHARS = 1_000, 2_000
"""Of a longer question what is put again and searched for: its beginning and its end, and as much
as the beginning of what stands before its options."""
_OPTION = re.compile(r"^[^\S\n]*\(?([A-Z])[.):]\s+(\S.*?)[^\S\n]*$", re.MULTILINE)
_LEFT_OUT = "\n[…]\n"


def options_of(question: str) -> tuple[str, ...]:
    """The texts of lettered options in a question, if at least two stand in order."""
    return tuple(found[2] for found in _options(question))


def _options(question: str) -> list[re.Match[str]]:
    """The last lines that go A, B, ... to the end: lines of subtitles may look like options too."""
    found = list(_OPTION.finditer(question))
    starts = [place for place, one in enumerate(found) if one[1] == "A"]
    last = found[starts[-1] :] if starts else []
    in_order = [one[1] for one in last] == list(LETTERS[: len(last)])
    return last if in_order and len(last) > 1 else []


def option_of(answer: str, options: Sequence[str]) -> int | None:
    """The place of the option that an answer names: by its text, else as `plain` scoring reads it.

    None where it names none, or several.
    """
    plain = answer.strip().rstrip(".").casefold()
    texts = [option.strip().rstrip(".").casefold() for option in options]
    if plain in texts:
        return texts.index(plain)
    return read_plain(answer, len(options), options)


def gist(question: str) -> str:
    """A question without what is long in it and asks nothing, such as subtitles or a summary.

    What asks, the lines before the options, and all options stay, however long they are.
    """
    if len(question) <= LONGEST_CHARS:
        return question
    return _LEFT_OUT.join(question[start:stop] for start, stop in _kept(question))


def _kept(question: str) -> Iterator[tuple[int, int]]:
    """From where to where it is kept, in order; parts that touch are one."""
    parts = [(0, HEAD_CHARS), (len(question) - TAIL_CHARS, len(question))]
    if options := _options(question):
        parts.insert(1, (max(0, options[0].start() - HEAD_CHARS), options[-1].end()))
    start, stop = parts[0]
    for next_start, next_stop in sorted(parts[1:]):
        if next_start > stop:
            yield start, stop
            start = next_start
        stop = max(stop, next_stop)
    yield start, stop
