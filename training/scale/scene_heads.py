"""Dense supervision of the vision tower: what is where in a second of video. Training only.

Letters: P seconds, M = 4 vision tokens of one, W text width, C colours, S shapes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from internvideo3.tasks.world.difficulty import COLOURS, PLACES, SHAPES
from internvideo3.tasks.world.render import tracks
from internvideo3.tasks.world.scenes import VideoSpec
from internvideo3.training.scale.pixels import sampled_times

GEOMETRY_WEIGHT = 4.0
"""Weight of position and radius errors (picture widths) beside the cross-entropies."""
SPEED_WEIGHT = 3.0


class Truth(NamedTuple):
    """What is in each second. P seconds, M = 4 tokens of one, C colours."""

    here_PC: Tensor
    shape_PC: Tensor
    geometry_PC3: Tensor
    place_P: Tensor
    flash_P: Tensor
    quadrant_PC: Tensor
    """Which of the four tokens an object's centre lies in (0-3, row by row)."""
    speed_PC3: Tensor
    """Change of x, y and radius between a second's two frames, in tenths of the picture width."""


class SceneHeads(nn.Module):
    """Reads a second's objects (by colour), place and flash from its vision tokens."""

    def __init__(self, width: int, tokens: int = 4) -> None:
        super().__init__()
        colours, shapes = len(COLOURS), len(SHAPES)
        self.sizes = [colours, colours * shapes, len(PLACES), colours + 1, colours * 3]
        self.norm = nn.LayerNorm(width * tokens)
        self.hidden = nn.Linear(width * tokens, 256)
        self.out = nn.Linear(256, sum(self.sizes))
        self.token = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, colours + shapes))

    def forward(self, vision_PMW: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Presence, shape, place, flash logits, and geometry (x, y, radius) by colour."""
        out = self.out(functional.gelu(self.hidden(self.norm(vision_PMW.flatten(1)))))
        seen, shape, place, flash, geometry = out.split(self.sizes, -1)
        by_colour = (len(COLOURS), -1)
        return seen, shape.unflatten(-1, by_colour), place, flash, geometry.unflatten(-1, by_colour)

    def loss(self, vision_PMW: Tensor, truth: Truth) -> Tensor:
        """Sum of the heads' losses."""
        seen, shape_PCS, place, flash, geometry_PC3 = self(vision_PMW)
        here = truth.here_PC
        loss = functional.binary_cross_entropy_with_logits(seen, here.float()) * len(COLOURS)
        loss = loss + functional.cross_entropy(place, truth.place_P)
        loss = loss + functional.cross_entropy(flash, truth.flash_P)
        loss = loss + functional.cross_entropy(shape_PCS[here], truth.shape_PC[here])
        gap = (geometry_PC3[here] - truth.geometry_PC3[here]).abs().mean()
        total: Tensor = loss + GEOMETRY_WEIGHT * gap + self._token_loss(vision_PMW, truth)
        return total

    def _token_loss(self, vision_PMW: Tensor, truth: Truth) -> Tensor:
        """Which colours and shapes have their centre in a token's quadrant.

        Without this local reading, shapes stayed at chance for 70,000 seconds of video.
        """
        colour_PMC, shape_PMS = self.token(vision_PMW).split([len(COLOURS), len(SHAPES)], -1)
        colours, shapes = torch.zeros_like(colour_PMC), torch.zeros_like(shape_PMS)
        p, c = truth.here_PC.nonzero(as_tuple=True)
        quadrant = truth.quadrant_PC[p, c]
        colours[p, quadrant, c] = 1.0
        shapes[p, quadrant, truth.shape_PC[p, c]] = 1.0
        return len(COLOURS) * functional.binary_cross_entropy_with_logits(
            colour_PMC, colours
        ) + 2 * len(SHAPES) * functional.binary_cross_entropy_with_logits(shape_PMS, shapes)

    @torch.no_grad()
    def scores(self, vision_PMW: Tensor, truth: Truth) -> dict[str, float]:
        """Accuracies, and the mean geometry error in picture widths."""
        seen, shape_PCS, place, flash, geometry_PC3 = self(vision_PMW)
        here = truth.here_PC
        gap = (geometry_PC3[here] - truth.geometry_PC3[here]).abs().mean()
        return {
            "objects": float(((seen > 0) == here).all(1).float().mean()),
            "shape": float((shape_PCS.argmax(-1) == truth.shape_PC)[here].float().mean()),
            "place": float((place.argmax(-1) == truth.place_P).float().mean()),
            "flash": float((flash.argmax(-1) == truth.flash_P).float().mean()),
            "geometry_error": float(gap),
        }


class SpeedHead(nn.Module):
    """Reads how each object moves within a second; beside the language model's later training.

    Without it motion and distance questions stayed at chance: two frames are in one token, but
    nothing else asks for their difference.
    """

    def __init__(self, width: int, tokens: int = 4) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width * tokens)
        self.hidden = nn.Linear(width * tokens, 256)
        self.out = nn.Linear(256, len(COLOURS) * 3)

    def loss(self, vision_PMW: Tensor, truth: Truth) -> Tensor:
        """Mean absolute error over the objects of each second."""
        out = self.out(functional.gelu(self.hidden(self.norm(vision_PMW.flatten(1)))))
        speed_PC3 = out.unflatten(-1, (len(COLOURS), 3))
        here = truth.here_PC
        error: Tensor = (speed_PC3[here] - truth.speed_PC3[here]).abs().mean()
        return SPEED_WEIGHT * error


class TokenHead(nn.Module):
    """One linear map that reads a single token: place, flash, and its objects' place and motion.

    What the language model has to pick from one token must stand in that token. The heads above
    read four tokens at once; the families that need only what single tokens held (shape, colour,
    places) were learned within 1000 steps, and the others were not in 3000.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.sizes = [len(PLACES), len(COLOURS) + 1, len(COLOURS) * 6]
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, sum(self.sizes))

    def loss(self, vision_PMW: Tensor, truth: Truth) -> Tensor:
        """Cross-entropies, and absolute errors of position, radius and their changes."""
        place, flash, motion = self.out(self.norm(vision_PMW)).split(self.sizes, -1)
        count = vision_PMW.shape[1]
        p, c = truth.here_PC.nonzero(as_tuple=True)
        motion_PMC6 = motion.unflatten(-1, (len(COLOURS), 6))
        wanted = torch.cat([GEOMETRY_WEIGHT * truth.geometry_PC3, truth.speed_PC3], -1)[p, c]
        error = (motion_PMC6[p, truth.quadrant_PC[p, c], c] - wanted).abs().mean()
        place_loss = functional.cross_entropy(
            place.flatten(0, 1), truth.place_P.repeat_interleave(count)
        )
        flash_loss = functional.cross_entropy(
            flash.flatten(0, 1), truth.flash_P.repeat_interleave(count)
        )
        total: Tensor = place_loss + 3 * flash_loss + SPEED_WEIGHT * error
        return total


def scene_truth(spec: VideoSpec) -> Truth:
    """What each second of a video shows, taken at its second frame."""
    shown = tracks(spec, sampled_times(int(spec.length_s)))
    object_PK5, kind_PK2 = shown.object_NK5[1::2], shown.kind_NK2[1::2]
    seconds, colours = object_PK5.shape[0], len(COLOURS)
    here: NDArray[Any] = np.zeros((seconds, colours), dtype=bool)
    shape: NDArray[Any] = np.zeros((seconds, colours), dtype=np.int64)
    geometry: NDArray[Any] = np.zeros((seconds, colours, 3), dtype=np.float32)
    speed: NDArray[Any] = np.zeros((seconds, colours, 3), dtype=np.float32)
    p, k = np.nonzero(object_PK5[..., 3] > 0)
    colour = kind_PK2[p, k, 1]
    here[p, colour] = True
    shape[p, colour] = kind_PK2[p, k, 0]
    geometry[p, colour] = object_PK5[p, k, :3]
    # Entries are on whole seconds, so a second's two frames list the same objects, except while a
    # dissolve's second half has dropped the old scene's; those rest at zero.
    before_PK5, before_kind_PK2 = shown.object_NK5[0::2], shown.kind_NK2[0::2]
    for slot in range(before_PK5.shape[1]):
        same = before_kind_PK2[:, slot, None, 1] == kind_PK2[..., 1]
        both = (before_PK5[:, slot, None, 3] > 0) & (object_PK5[..., 3] > 0)
        q, j = np.nonzero(same & both)
        speed[q, kind_PK2[q, j, 1]] = 10 * (object_PK5[q, j, :3] - before_PK5[q, slot, :3])
    east, south = geometry[..., 0] > 0.5, geometry[..., 1] > 0.5
    quadrant = 2 * south.astype(np.int64) + east
    flashes = np.maximum(shown.flash_N[0::2], shown.flash_N[1::2])
    place = shown.place_N2[1::2, 0]
    flash = np.where(flashes >= 0, flashes, colours)
    return Truth(*(torch.from_numpy(np.ascontiguousarray(x))
                   for x in (here, shape, geometry, place, flash, quadrant, speed)))  # fmt: skip


def join_truth(truths: Sequence[Truth]) -> Truth:
    """The truths of several videos, one after the other."""
    return Truth(*(torch.cat(parts) for parts in zip(*truths, strict=True)))
