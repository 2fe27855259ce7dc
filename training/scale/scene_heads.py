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

from internvideo3.tasks.world.difficulty import COLOURS, MOTIONS, PLACES, SHAPES
from internvideo3.tasks.world.render import tracks
from internvideo3.tasks.world.scenes import VideoSpec
from internvideo3.training.scale.pixels import sampled_times

GEOMETRY_WEIGHT = 4.0
"""Weight of position and radius errors (picture widths) beside the cross-entropies."""
TOKEN_WEIGHT = 2.0
"""Weight of what single tokens say of their objects."""
_COLOUR_ID = {name: index for index, name in enumerate(COLOURS)}


class Truth(NamedTuple):
    """What is in each second. P seconds, M = 4 tokens of one, C colours."""

    here_PC: Tensor
    shape_PC: Tensor
    geometry_PC3: Tensor
    place_P: Tensor
    flash_P: Tensor
    quadrant_PC: Tensor
    """Which of the four tokens an object's centre lies in (0-3, row by row)."""
    motion_PC: Tensor
    """Index into `MOTIONS` of how an object moves during its visit."""


class SceneHeads(nn.Module):
    """Reads a second's objects (by colour), place and flash from its vision tokens.

    Two readers. One sees all tokens of the second and teaches the tower to see. The other is one
    linear map on a single token: what the language model has to look up in a token must stand in
    that token, and families that needed more than that stayed at chance for 3000 steps.
    """

    def __init__(self, width: int, tokens: int = 4) -> None:
        super().__init__()
        colours, shapes, motions = len(COLOURS), len(SHAPES), len(MOTIONS)
        self.sizes = [colours, colours * shapes, len(PLACES), colours + 1, colours * 3]
        self.norm = nn.LayerNorm(width * tokens)
        self.hidden = nn.Linear(width * tokens, 256)
        self.out = nn.Linear(256, sum(self.sizes))
        self.token_sizes = [colours, shapes, motions, len(PLACES), colours + 1, colours * 3]
        self.token_norm = nn.LayerNorm(width)
        self.token_out = nn.Linear(width, sum(self.token_sizes))

    def forward(self, vision_PMW: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Presence, shape, place, flash logits, and geometry (x, y, radius) by colour."""
        out = self.out(functional.gelu(self.hidden(self.norm(vision_PMW.flatten(1)))))
        seen, shape, place, flash, geometry = out.split(self.sizes, -1)
        by_colour = (len(COLOURS), -1)
        return seen, shape.unflatten(-1, by_colour), place, flash, geometry.unflatten(-1, by_colour)

    def loss(self, vision_PMW: Tensor, truth: Truth) -> Tensor:
        """Sum of both readers' losses."""
        seen, shape_PCS, place, flash, geometry_PC3 = self(vision_PMW)
        here = truth.here_PC
        loss = functional.binary_cross_entropy_with_logits(seen, here.float()) * len(COLOURS)
        loss = loss + functional.cross_entropy(place, truth.place_P)
        loss = loss + functional.cross_entropy(flash, truth.flash_P)
        loss = loss + functional.cross_entropy(shape_PCS[here], truth.shape_PC[here])
        gap = (geometry_PC3[here] - truth.geometry_PC3[here]).abs().mean()
        total: Tensor = loss + GEOMETRY_WEIGHT * gap + self._token_loss(vision_PMW, truth)
        return total

    def read_tokens(self, vision_PMW: Tensor) -> tuple[Tensor, ...]:
        """Colours, shapes, motions, place, flash and geometry (by colour) that a token shows."""
        out: Tensor = self.token_out(self.token_norm(vision_PMW))
        parts: tuple[Tensor, ...] = out.split(self.token_sizes, -1)
        return parts

    def _token_loss(self, vision_PMW: Tensor, truth: Truth) -> Tensor:
        """Each token: its quadrant's objects (colour, shape, motion, geometry), place and flash."""
        *objects, place, flash, geometry = self.read_tokens(vision_PMW)
        p, c = truth.here_PC.nonzero(as_tuple=True)
        quadrant = truth.quadrant_PC[p, c]
        kinds = (c, truth.shape_PC[p, c], truth.motion_PC[p, c])
        total: Tensor = vision_PMW.new_zeros(())
        for logits_PMK, kind in zip(objects, kinds, strict=True):
            present = torch.zeros_like(logits_PMK)
            present[p, quadrant, kind] = 1.0
            loss = functional.binary_cross_entropy_with_logits(logits_PMK, present)
            total = total + TOKEN_WEIGHT * logits_PMK.shape[-1] * loss
        for logits_PMK, kind_P in ((place, truth.place_P), (flash, truth.flash_P)):
            kind_PM = kind_P[:, None].expand(logits_PMK.shape[:2])
            total = total + functional.cross_entropy(logits_PMK.flatten(0, 1), kind_PM.flatten())
        found = geometry.unflatten(-1, (len(COLOURS), 3))[p, quadrant, c]
        gap = (found - truth.geometry_PC3[p, c]).abs().mean()
        total = total + GEOMETRY_WEIGHT * gap
        return total

    @torch.no_grad()
    def scores(self, vision_PMW: Tensor, truth: Truth) -> dict[str, float]:
        """Accuracies, and the mean geometry error in picture widths."""
        seen, shape_PCS, place, flash, geometry_PC3 = self(vision_PMW)
        _, token_shape, token_motion, _, _, token_geometry = self.read_tokens(vision_PMW)
        here = truth.here_PC
        p, c = here.nonzero(as_tuple=True)
        at = (p, truth.quadrant_PC[p, c])
        token_geometry = token_geometry.unflatten(-1, (len(COLOURS), 3))[*at, c]
        right_shape = token_shape[at].argmax(-1) == truth.shape_PC[p, c]
        right_motion = token_motion[at].argmax(-1) == truth.motion_PC[p, c]
        return {
            "objects": float(((seen > 0) == here).all(1).float().mean()),
            "shape": float((shape_PCS.argmax(-1) == truth.shape_PC)[here].float().mean()),
            "place": float((place.argmax(-1) == truth.place_P).float().mean()),
            "flash": float((flash.argmax(-1) == truth.flash_P).float().mean()),
            "geometry_error": float((geometry_PC3 - truth.geometry_PC3)[here].abs().mean()),
            "token_shape": float(right_shape.float().mean()),
            "token_motion": float(right_motion.float().mean()),
            "token_geometry_error": float((token_geometry - truth.geometry_PC3[p, c]).abs().mean()),
        }


def scene_truth(spec: VideoSpec) -> Truth:
    """What each second of a video shows, taken at its second frame."""
    shown = tracks(spec, sampled_times(int(spec.length_s)))
    object_PK5, kind_PK2 = shown.object_NK5[1::2], shown.kind_NK2[1::2]
    seconds, colours = object_PK5.shape[0], len(COLOURS)
    here: NDArray[Any] = np.zeros((seconds, colours), dtype=bool)
    shape: NDArray[Any] = np.zeros((seconds, colours), dtype=np.int64)
    geometry: NDArray[Any] = np.zeros((seconds, colours, 3), dtype=np.float32)
    p, k = np.nonzero(object_PK5[..., 3] > 0)
    colour = kind_PK2[p, k, 1]
    here[p, colour] = True
    shape[p, colour] = kind_PK2[p, k, 0]
    geometry[p, colour] = object_PK5[p, k, :3]
    motion = np.zeros((seconds, colours), dtype=np.int64)
    for thing in spec.things:
        motion[:, _COLOUR_ID[thing.colour]] = MOTIONS.index(thing.motion)
    east, south = geometry[..., 0] > 0.5, geometry[..., 1] > 0.5
    quadrant = 2 * south.astype(np.int64) + east
    flashes = np.maximum(shown.flash_N[0::2], shown.flash_N[1::2])
    place = shown.place_N2[1::2, 0]
    flash = np.where(flashes >= 0, flashes, colours)
    return Truth(*(torch.from_numpy(np.ascontiguousarray(x))
                   for x in (here, shape, geometry, place, flash, quadrant, motion)))  # fmt: skip


def join_truth(truths: Sequence[Truth]) -> Truth:
    """The truths of several videos, one after the other."""
    return Truth(*(torch.cat(parts) for parts in zip(*truths, strict=True)))
