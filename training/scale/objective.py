"""Answers and losses of the scale model on packed batches, by two routes to the same logits.

`PackedModel` arranges attention by what it needs (see packed.py) and is what trains.
`MaskedModel` hands transformers' forward one row per video with an explicit mask; it is slower,
and a test holds the other to it.

Letters: B videos, P prefix tokens, Q questions, L tokens of one, T = P + Q·L tokens of a row,
N all tokens, A answer tokens of the batch, F seconds of video, M vision tokens of one, W text
width, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from internvideo3.model.scale.build import token_id
from internvideo3.training.scale.batches import IGNORE, Batch
from internvideo3.training.scale.packed import Layout, PackedText
from internvideo3.training.scale.vision import FrameEncoder

LEARN_VISION_S = 16
VIDEO_PAD = token_id("<|video_pad|>")


class Answers(NamedTuple):
    """Predictions at the answer tokens of a batch, question by question."""

    logits_AV: Tensor
    labels_A: Tensor
    weight_A: Tensor
    question_A: Tensor
    """Index b·Q + q of the question a token answers."""
    vision_FMW: Tensor
    """The vision tokens that were used, for the dense heads."""


class PackedModel:
    """A GQA or latent model on packed batches."""

    def __init__(self, model: Any, *, fuse: bool = False) -> None:
        self.model = model
        self.text = PackedText(model.model.language_model, fuse=fuse)
        self.encoder = FrameEncoder(model.model.visual)

    def __call__(self, batch: Batch) -> Answers:
        """Logits at every answer token."""
        rows, count, tokens = batch.ids_BQL.shape
        prefix = len(batch.prefix_ids_P)
        ids_N = torch.cat([batch.prefix_ids_P.repeat(rows), batch.ids_BQL.flatten()])
        first = int(batch.prefix_positions_3P.max()) + 1
        asked_3N = (first + torch.arange(tokens)).repeat(rows * count).expand(3, -1)
        positions_3N = torch.cat([batch.prefix_positions_3P.repeat(1, rows), asked_3N], 1)
        seen_N = ids_N == VIDEO_PAD
        vision_FMW, deep_FMW = _see(self.encoder, batch)
        embeds_NW = _embed(self.model, ids_N, seen_N, vision_FMW)
        hidden_NW = self.text(
            embeds_NW,
            positions_3N,
            Layout(rows, prefix, count, tokens),
            seen_N,
            [deep_FMW.flatten(0, 1)],
        )
        hidden_BQLW = hidden_NW[rows * prefix :].view(rows, count, tokens, -1)
        return _answers(self.model, batch, hidden_BQLW, vision_FMW + deep_FMW)


class MaskedModel:
    """Any Qwen3-VL-like model on the same batches, through transformers' own forward."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.encoder = FrameEncoder(model.model.visual)

    def __call__(self, batch: Batch) -> Answers:
        """Logits at every answer token."""
        rows, count, tokens = batch.ids_BQL.shape
        prefix = len(batch.prefix_ids_P)
        ids_BT = torch.cat([batch.prefix_ids_P.expand(rows, -1), batch.ids_BQL.flatten(1)], 1)
        first = int(batch.prefix_positions_3P.max()) + 1
        asked = (first + torch.arange(tokens)).repeat(count).expand(3, -1)
        positions_3T = torch.cat([batch.prefix_positions_3P, asked], 1)
        segment_T = torch.cat(
            [torch.zeros(prefix), torch.arange(1, count + 1).repeat_interleave(tokens)]
        )
        seen_BT = ids_BT == VIDEO_PAD
        vision_FMW, deep_FMW = _see(self.encoder, batch)
        hidden_BTW = self.model.model.language_model(
            inputs_embeds=_embed(self.model, ids_BT, seen_BT, vision_FMW),
            attention_mask=_row_mask(segment_T).expand(rows, -1, -1, -1),
            position_ids=positions_3T[:, None].expand(3, rows, -1),
            visual_pos_masks=seen_BT,
            deepstack_visual_embeds=[deep_FMW.flatten(0, 1)],
            use_cache=False,
        ).last_hidden_state
        hidden_BQLW = hidden_BTW[:, prefix:].unflatten(1, (count, tokens))
        return _answers(self.model, batch, hidden_BQLW, vision_FMW + deep_FMW)


def _see(encoder: FrameEncoder, batch: Batch) -> tuple[Tensor, Tensor]:
    """Vision tokens and the DeepStack level; gradients only through short videos.

    Long batches would spend most of their time on the tower, which short ones teach as well.
    """
    seconds = len(batch.patches_FKV) // len(batch.ids_BQL)
    learn = torch.is_grad_enabled() and seconds <= LEARN_VISION_S
    with torch.set_grad_enabled(learn):
        vision_FMW, deep = encoder(batch.patches_FKV)
    return vision_FMW.float(), deep[0].float()


def _embed(model: Any, ids: Tensor, seen: Tensor, vision_FMW: Tensor) -> Tensor:
    embeds: Tensor = model.model.language_model.embed_tokens(ids)
    flat = vision_FMW.reshape(-1, embeds.shape[-1]).to(embeds.dtype)
    return embeds.masked_scatter(seen[..., None], flat)


def _row_mask(segment_T: Tensor) -> Tensor:
    """Additive attention mask `[1,1,T,T]`: causal, the video for everyone, questions apart."""
    count = len(segment_T)
    causal = torch.ones(count, count, dtype=torch.bool).tril()
    allowed = causal & ((segment_T[None] == 0) | (segment_T[None] == segment_T[:, None]))
    mask = torch.zeros(count, count).masked_fill_(~allowed, torch.finfo(torch.float32).min)
    return mask[None, None]


def _answers(model: Any, batch: Batch, hidden_BQLW: Tensor, vision_FMW: Tensor) -> Answers:
    told_BQL = batch.labels_BQL != IGNORE
    questions = torch.arange(batch.family_BQ.numel()).view(batch.family_BQ.shape)
    return Answers(
        logits_AV=model.lm_head(hidden_BQLW[told_BQL]).float(),
        labels_A=batch.labels_BQL[told_BQL],
        weight_A=batch.weight_BQL[told_BQL],
        question_A=questions[..., None].expand_as(told_BQL)[told_BQL],
        vision_FMW=vision_FMW,
    )


def answer_loss(answers: Answers) -> Tensor:
    """Cross-entropy, each answer weighted by 1/sqrt of its tokens."""
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


def right_answers(answers: Answers, batch: Batch) -> list[tuple[int, float]]:
    """(family index, 1.0 where every token is right, else 0.0) of each question."""
    family_F = batch.family_BQ.flatten()
    wrong_F = torch.zeros(len(family_F))
    missed_A = (answers.logits_AV.argmax(-1) != answers.labels_A).float()
    wrong_F.index_add_(0, answers.question_A, missed_A)
    return [
        (family, float(wrong == 0))
        for family, wrong in zip(family_F.tolist(), wrong_F.tolist(), strict=True)
        if family >= 0
    ]
