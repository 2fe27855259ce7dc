"""Documents of continued pretraining: a text, a picture or a video and what there is to say of it.

The scale world's stand-in for text, image-text and video-caption corpora (paper, section 4.1): the
story of a video told in words alone, one frame with what it shows, and a video with its story.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from PIL import Image

from internvideo3.model.prompt import Prompter
from internvideo3.model.scale.build import SYSTEM_PROMPT
from internvideo3.tasks.video import Frames
from internvideo3.tasks.world.questions import narration
from internvideo3.tasks.world.scenes import VideoSpec
from internvideo3.training.documents import Branch, Document, WorldDocuments, replied
from internvideo3.training.mixture import block_of, dealt
from internvideo3.training.recipe import Modality, WorldData

ASKED: dict[Modality, str] = {"image": "Describe the picture.", "video": "Describe the video."}


class WorldCaptions:
    """The documents of continued pretraining, by index."""

    def __init__(
        self, data: WorldData, processor: Any, seed: int, shares: Mapping[Modality, float]
    ) -> None:
        """Checks the shares.

        Raises:
            RecipeError: They do not sum to 1.
        """
        self.world = WorldDocuments(data, processor, seed)
        self.prompter: Prompter = self.world.prompter
        self.end = processor.tokenizer.convert_tokens_to_ids("<|endoftext|>")
        self.order = dealt(shares, block_of(shares))

    def kind(self, index: int) -> Modality:
        """Which kind of document an index stands for."""
        return self.order[index % len(self.order)]

    def taught(self, index: int) -> Document:
        """The document of an index."""
        return self.of_kind(self.kind(index), index)

    def of_kind(self, kind: Modality, index: int) -> Document:
        """A document of a kind about the video of an index."""
        spec = self.world.video(index)
        if kind == "text":
            return self._plain(narration(spec))
        frames = self.world.frames(spec)
        if kind == "video":
            return self._captioned(kind, narration(spec), [frames], [])
        place = len(frames.indices) // 2
        caption = seen_at(spec, frames.indices[place] / frames.source_fps)
        return self._captioned(kind, caption, [], [Image.fromarray(frames.pixels_THWC[place])])

    def _plain(self, text: str) -> Document:
        """Text that is learnt from its third id on; the first is what there is to begin from."""
        first, *rest = [*self.prompter.tokenize(text), self.end]
        return Document((first,), (), (Branch(tuple(rest), len(rest) - 1),))

    def _captioned(
        self, kind: Literal["image", "video"], caption: str, frames: Sequence[Frames],
        images: Sequence[Any],
    ) -> Document:  # fmt: skip
        content = [{"type": kind}, {"type": "text", "text": ASKED[kind]}]
        text = self.prompter.render(
            [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": content}]
        )
        return replied(self.prompter, self.prompter.piece(text, frames, images), caption)


def seen_at(spec: VideoSpec, time_s: float) -> str:
    """What a frame shows, one line an object."""
    place = {thing: scene.place for scene in spec.scenes for thing in scene.things}
    seen = [f"{t.name} {place[t]}" for t in spec.things if t.enter_s <= time_s < t.leave_s]
    if any(flash.start_s <= time_s < flash.end_s for flash in spec.flashes):
        seen.append(f"{spec.flash_colour} flash")
    return "\n".join(seen) or "nothing"
