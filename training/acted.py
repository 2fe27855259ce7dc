"""Rollouts as documents: the very ids of what was done, and every word of the policy learnt.

A row holds `ids` with the policy's words at `said`, and for each video among them how its frames
were taken (`looks`); `internvideo3 data rollouts` writes it. Nothing is tokenised again: training
sees what acting saw. Frames are decoded anew and kept, up to a few gigabytes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from internvideo3.model.prompt import Medium, Prompter
from internvideo3.tasks.video import Frames, joined
from internvideo3.training.curation.records import DataError, Row
from internvideo3.training.documents import Document

VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
MOST_BYTES = 2 << 30
"""Pixels that are kept between epochs."""

Take = Callable[[Path, Mapping[str, Any]], Frames]
"""Decodes and fits frames as a look says."""


class Shelf:
    """Frames of looks, the least used dropped where there are too many."""

    def __init__(self, take: Take, most_bytes: int = MOST_BYTES) -> None:
        self.take = take
        self.most_bytes = most_bytes
        self._kept: OrderedDict[tuple[Any, ...], Frames] = OrderedDict()
        self._bytes = 0

    def look(self, video: Path, how: Mapping[str, Any]) -> Frames:
        """The frames of one look.

        Raises:
            VideoError: The video cannot be read.
        """
        key = (video, *sorted(how.items()))
        if key not in self._kept:
            self._kept[key] = self.take(video, how)
            self._bytes += self._kept[key].pixels_THWC.nbytes
        self._kept.move_to_end(key)
        found = self._kept[key]
        while self._bytes > self.most_bytes and len(self._kept) > 1:
            self._bytes -= self._kept.popitem(last=False)[1].pixels_THWC.nbytes
        return found


def is_rollout(row: Row) -> bool:
    """Whether a row is a rollout by its ids."""
    return "ids" in row and "looks" in row


def acted(row: Row, folder: Path, prompter: Prompter, shelf: Shelf) -> Document:
    """A rollout as a document.

    Args:
        row: See the module.
        folder: Where its video's path begins, if it is not absolute.
        prompter: Of the model that is trained.
        shelf: Decodes.

    Raises:
        DataError: The ids are not those of this model and these frames.
        VideoError: The video cannot be read.
        LookupError: The row lacks a part.
    """
    ids, said = list(row["ids"]), [(int(a), int(b)) for a, b in row["said"]]
    video = folder / row["video"]
    media: list[Medium] = []
    seen: list[int] = []
    for look in row["looks"]:
        for frames in joined([shelf.look(video, how) for how in look]):
            piece = prompter.piece(VIDEO, [frames])
            media += piece.media
            seen += piece.ids
    token = prompter.tokenizer.convert_tokens_to_ids(prompter.processor.video_token)
    if ids.count(token) != seen.count(token):
        raise DataError(
            f"the ids have {ids.count(token)} video tokens, the frames make {seen.count(token)}: "
            "the rollout is of another model or another video; write it again with this one"
        )
    images = {prompter.tokenizer.convert_tokens_to_ids(prompter.processor.image_token)}
    if images & {*ids} or not all(0 <= one < len(prompter.tokenizer) for one in ids):
        raise DataError("the ids hold images, or are of another tokenizer")
    _check_said(said, len(ids))
    return Document(tuple(ids), tuple(media), (), tuple(said))


def _check_said(said: Sequence[tuple[int, int]], count: int) -> None:
    bounds = [bound for span in said for bound in span]
    if not said or bounds != sorted(bounds) or bounds[0] < 1 or bounds[-1] > count:
        raise DataError(f"what is learnt ({said}) does not lie in order within {count} ids")
