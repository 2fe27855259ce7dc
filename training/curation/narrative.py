"""From clip captions to scene summaries to one narrative (section 4.2.1).

What is asked of the writing model is here, and what is checked of its answers: a narrative must
tell the scenes in their order and must name nothing that no caption names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from internvideo3.training.curation.records import Clip, DataError

Pictures = Sequence[NDArray[np.uint8]]
Writer = Callable[[str, Pictures], str]
"""(prompt, pictures) → text: any captioning or language model."""

CAPTION = (
    "These frames are from {start:.1f} to {end:.1f} seconds of a video, in order. Describe in one "
    "to three sentences what can be seen: who or what, what they do, where, and what changes. Say "
    "only what the frames show."
)
SUMMARY = (
    "These are captions of consecutive clips of one scene, in order of time:\n{captions}\n\n"
    "Summarise the scene in one or two sentences. Keep names of people and things as they are."
)
STORY = (
    "These are summaries of the scenes of one video, in order of time:\n{summaries}\n\n"
    "Tell the whole video in about {words} words, in the same order. Write [n] behind what comes "
    "from scene n. Call the same person or thing by the same name throughout, and add nothing."
)
WORDS = 96
"""Mean length of the paper's narratives."""
_MARK = re.compile(r"\s*\[(\d+)\]")
_NAME = re.compile(r"(?<![.!?]\s)(?<!^)\b[A-Z][a-z]+\b")


def caption_clips(
    clips: Sequence[Clip], frames_of: Callable[[Clip], Pictures], write: Writer
) -> tuple[Clip, ...]:
    """The clips with a caption each.

    Raises:
        DataError: The model says nothing about a clip.
    """
    return tuple(_captioned(clip, frames_of(clip), write) for clip in clips)


def _captioned(clip: Clip, pictures: Pictures, write: Writer) -> Clip:
    text = write(CAPTION.format(start=clip.start_s, end=clip.end_s), pictures).strip()
    if not text:
        raise DataError(f"no caption for {clip.start_s:g} to {clip.end_s:g} s: the reply is empty")
    return replace(clip, caption=text)


def summarise_scenes(clips: Sequence[Clip], write: Writer) -> tuple[str, ...]:
    """A summary of each scene; a scene of one clip is its caption."""
    summaries = []
    for _, members in groupby(clips, key=lambda clip: clip.scene):
        captions = [clip.caption for clip in members]
        if len(captions) == 1:
            summaries.append(captions[0])
        else:
            listed = "\n".join(f"- {caption}" for caption in captions)
            summaries.append(write(SUMMARY.format(captions=listed), ()))
    return tuple(summaries)


def tell(summaries: Sequence[str], write: Writer) -> str:
    """The narrative, checked.

    Raises:
        DataError: It is not in the order of the scenes, or names what no summary names.
    """
    listed = "\n".join(f"[{n}] {text}" for n, text in enumerate(summaries, start=1))
    text = write(STORY.format(summaries=listed, words=WORDS), ())
    wrong = order_fault(text, len(summaries)) or entity_fault(text, summaries)
    if wrong:
        raise DataError(f"the narrative {wrong}: {text[:200]!r}")
    return _MARK.sub("", text).strip()


def order_fault(text: str, scenes: int) -> str | None:
    """What is wrong with the order of a narrative's scene marks; None if nothing is."""
    marks = [int(mark) for mark in _MARK.findall(text)]
    if not marks:
        return "has no scene marks [n]"
    unknown = sorted({mark for mark in marks if not 1 <= mark <= scenes})
    if unknown:
        return f"speaks of scenes {unknown}, of {scenes}"
    if marks != sorted(marks):
        return f"tells scenes out of order: {marks}"
    return None


def entity_fault(text: str, summaries: Sequence[str]) -> str | None:
    """Names in a narrative that no summary has; None if there is none."""
    known = " ".join(summaries).lower()
    strange = sorted({name for name in _NAME.findall(text) if name.lower() not in known})
    return f"names {', '.join(strange)}, which no scene does" if strange else None
