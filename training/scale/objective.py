"""Forward pass and losses of the scale model on packed rows.

Letters: B rows, T tokens of a row, A answer tokens of the batch, P temporal patches (seconds),
M merged vision tokens of one, W text width, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from internvideo3.model.scale.build import token_id
from internvideo3.tasks.world.difficulty import COLOURS, PLACES, SHAPES
from internvideo3.tasks.world.render import Tracks
from internvideo3.training.scale.batches import IGNORE, Batch
from internvideo3.training.scale.pixels import tracks_on, training_patches
from internvideo3.training.scale.vision import FrameEncoder

GEOMETRY_WEIGHT = 2.0
"""Weight of position and radius errors (picture widths) beside the cross-entropies."""


class Answers(NamedTuple):
    """Predictions at the answer tokens of a batch."""

    logits_AV: Tensor
    labels_A: Tensor
    weight_A: Tensor
    family_A: Tensor
    answer_A: Tensor
    """Which answer (row x segment) a token belongs to."""


def row_mask(segment_BT: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive attention mask `[B,1,T,T]`: causal, the video for everyone, questions apart."""
    count = segment_BT.shape[1]
    q_BT1, k_B1T = segment_BT[:, :, None], segment_BT[:, None, :]
    causal = torch.ones(count, count, dtype=torch.bool, device=segment_BT.device).tril()
    allowed = causal & ((k_B1T == 0) | (k_B1T == q_BT1))
    mask = torch.zeros(allowed.shape, dtype=dtype, device=segment_BT.device)
    return mask.masked_fill_(~allowed, torch.finfo(dtype).min)[:, None]


class PackedForward:
    """Runs a Qwen3-VL-like model (GQA or latent) on batches of packed rows."""

    def __init__(self, model: Any, device: torch.device, mask_dtype: torch.dtype) -> None:
        self.model = model
        self.device = device
        self.mask_dtype = mask_dtype
        self.encoder = FrameEncoder(model.model.visual)

    def to_device(self, batch: Batch) -> dict[str, Any]:
        """The batch's arrays as tensors on the device."""
        named = {
            name: torch.as_tensor(value).to(self.device, non_blocking=True)
            for name, value in batch._asdict().items()
            if name not in ("length_s", "shown")
        }
        return named | {"shown": tracks_on(batch.shown, self.device)}

    def encode(
        self, shown: Tracks, generator: torch.Generator | None
    ) -> tuple[Tensor, list[Tensor]]:
        """Vision tokens `[P,M,W]` and DeepStack levels of the batch's frames."""
        with torch.no_grad():
            patches_PKV = training_patches(shown, generator)
        return self.encoder(patches_PKV)

    def __call__(
        self, data: dict[str, Any], vision_PMW: Tensor, deep: list[Tensor]
    ) -> Answers:
        """Logits at every answer token."""
        inner = self.model.model
        ids_BT = data["input_ids_BT"]
        seen_BT = ids_BT == token_id("<|video_pad|>")
        embeds_BTW = inner.language_model.embed_tokens(ids_BT)
        width = embeds_BTW.shape[-1]
        flat = vision_PMW.reshape(-1, width)
        embeds_BTW = embeds_BTW.masked_scatter(seen_BT[..., None], flat.to(embeds_BTW.dtype))
        hidden_BTW = inner.language_model(
            inputs_embeds=embeds_BTW,
            attention_mask=row_mask(data["segment_BT"], self.mask_dtype),
            position_ids=data["position_ids_3BT"],
            visual_pos_masks=seen_BT,
            deepstack_visual_embeds=[level.reshape(-1, width) for level in deep],
            use_cache=False,
        ).last_hidden_state
        labels_BT = data["labels_BT"]
        told_BT = labels_BT != IGNORE
        rows = torch.arange(ids_BT.shape[0], device=self.device)[:, None] * ids_BT.shape[1]
        return Answers(
            logits_AV=self.model.lm_head(hidden_BTW[told_BT]).float(),
            labels_A=labels_BT[told_BT],
            weight_A=data["weight_BT"][told_BT],
            family_A=data["family_BT"][told_BT],
            answer_A=(rows + data["segment_BT"])[told_BT],
        )


def answer_loss(answers: Answers) -> Tensor:
    """Cross-entropy, each answer weighted by 1/sqrt of its tokens (as the released SFT does)."""
    losses_A = functional.cross_entropy(answers.logits_AV, answers.labels_A, reduction="none")
    return (losses_A * answers.weight_A).sum() / answers.weight_A.sum()


def distillation_loss(answers: Answers, teacher: Answers) -> Tensor:
    """Full-vocabulary KL(teacher ‖ student) over the answer tokens, same weights."""
    kl_A = functional.kl_div(
        functional.log_softmax(answers.logits_AV, -1),
        functional.log_softmax(teacher.logits_AV, -1),
        reduction="none",
        log_target=True,
    ).sum(-1)
    return (kl_A * answers.weight_A).sum() / answers.weight_A.sum()


class SceneHeads(nn.Module):
    """Dense supervision of vision tokens: what is where in this second. Training only."""

    def __init__(self, width: int, tokens: int = 4) -> None:
        super().__init__()
        colours, shapes = len(COLOURS), len(SHAPES)
        self.sizes = [colours, colours * shapes, len(PLACES), colours + 1, colours * 3]
        self.norm = nn.LayerNorm(width * tokens)
        self.hidden = nn.Linear(width * tokens, 256)
        self.out = nn.Linear(256, sum(self.sizes))

    def forward(self, vision_PMW: Tensor, shown: Tracks) -> Tensor:
        """Loss of reading each second's objects, place and flash from its tokens."""
        x = self.norm(vision_PMW.flatten(1).float())
        out = self.out(functional.gelu(self.hidden(x)))
        seen, shape, place, flash, geometry = out.split(self.sizes, -1)
        truth = _scene_truth(shown)
        here_PC = truth["here_PC"]
        loss = functional.binary_cross_entropy_with_logits(seen, here_PC.float()) * len(COLOURS)
        loss = loss + functional.cross_entropy(place, truth["place_P"])
        loss = loss + functional.cross_entropy(flash, truth["flash_P"])
        shapes_PCS = shape.view(*here_PC.shape, -1)
        geometry_PC3 = geometry.view(*here_PC.shape, 3)
        loss = loss + functional.cross_entropy(shapes_PCS[here_PC], truth["shape_PC"][here_PC])
        gap = (geometry_PC3[here_PC] - truth["geometry_PC3"][here_PC]).abs().mean()
        return loss + GEOMETRY_WEIGHT * gap


def _scene_truth(shown: Tracks) -> dict[str, Tensor]:
    """Per second (its second frame): presence, shape, place, flash and geometry by colour."""
    object_NK5, kind_NK2 = shown.object_NK5[1::2], shown.kind_NK2[1::2]
    count, colours = object_NK5.shape[0], len(COLOURS)
    device = object_NK5.device
    # A spare column takes what absent slots scatter.
    column_NK = torch.where(object_NK5[..., 3] > 0, kind_NK2[..., 1], colours)
    here = torch.zeros(count, colours + 1, dtype=torch.bool, device=device)
    here.scatter_(1, column_NK, torch.ones_like(column_NK, dtype=torch.bool))
    shape = torch.zeros(count, colours + 1, dtype=torch.long, device=device)
    shape.scatter_(1, column_NK, kind_NK2[..., 0])
    geometry = torch.zeros(count, colours + 1, 3, device=device)
    geometry.scatter_(1, column_NK[..., None].expand(-1, -1, 3), object_NK5[..., :3])
    flashes = torch.maximum(shown.flash_N[0::2], shown.flash_N[1::2])
    return {
        "here_PC": here[:, :colours],
        "shape_PC": shape[:, :colours],
        "geometry_PC3": geometry[:, :colours],
        "place_P": shown.place_N2[1::2, 0],
        "flash_P": torch.where(flashes >= 0, flashes, colours),
    }
