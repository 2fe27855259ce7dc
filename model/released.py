"""The released layout: attention as the authors' checkpoint stores it, and a conversion written so.

Tensor names, shapes and the forward pass follow `MultiLatentAttention` of the authors' release
(OpenGVLab/InternVideo at 3965eef, InternVideo3_sft/xtuner/v1/module/attention/mla.py): content and
rotary queries have rows of their own, the row `[c | k_rope]` is one affine map of the layer input,
every query head has its own up-projection, the output has no bias, scores are divided by
sqrt(D + 2 S), and rotary pairs lie next to each other: row 2 f is Re, row 2 f + 1 is Im of slot f.

There is no QK-norm, no modality adapter, and one slot per frequency.

Axes: B batch, T tokens, X model width, H query heads, K key/value heads of the source, D head
width, S slots = D/2, R rank, P keys or values.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from internvideo3.model.attention import LatentAttention, RowAttention, rotate
from internvideo3.model.config import InternVideo3TextConfig


class ReleasedAttention(RowAttention):
    """M²LA of one layer in the parameters of the authors' checkpoint."""

    def __init__(self, config: InternVideo3TextConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        X, H, D, R = config.hidden_size, self.num_heads, self.head_dim, self.rank
        rope = 2 * len(self.slot_frequencies)
        self.num_kv_heads = H
        self.scale = (D + rope) ** -0.5
        self.q_proj = nn.Linear(X, H * (D + rope), bias=True)
        self.kv_a_proj_with_mqa = nn.Linear(X, R + rope, bias=True)
        self.kv_b_proj = nn.Linear(R, H * 2 * D, bias=False)
        self.o_proj = nn.Linear(H * D, X, bias=False)

    @property
    def k_up(self) -> Tensor:  # type: ignore[override]
        """Up-projection of keys, [H, D, R]."""
        return self._up_projections()[:, 0]

    @property
    def v_up(self) -> Tensor:  # type: ignore[override]
        """Up-projection of values, [H, D, R]."""
        return self._up_projections()[:, 1]

    def _up_projections(self) -> Tensor:
        """Up-projections of every query head: P = 0 its keys', P = 1 its values'."""
        up_HPDR: Tensor = self.kv_b_proj.weight.unflatten(0, (self.num_heads, 2, -1))
        return up_HPDR

    def project(self, x_BTX: Tensor, vision_BT: Tensor | None) -> Tensor:
        """Rows `[c | k_rope before rotation]`, [B, T, r + 2 S]; all modalities alike."""
        row_BTW = self.kv_a_proj_with_mqa(x_BTX)
        c_BTR, rope_BTS = row_BTW[..., : self.rank], row_BTW[..., self.rank :]
        return torch.cat([c_BTR, split_pairs(rope_BTS)], dim=-1)

    def queries(self, x_BTX: Tensor, cos_BTS: Tensor, sin_BTS: Tensor) -> tuple[Tensor, Tensor]:
        """Content query [B, H, T, D] and rotated slot query [B, H, T, 2 S]."""
        q_BHTW = self.q_proj(x_BTX).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        content_BHTD, rope_BHTS = q_BHTW.tensor_split([self.head_dim], dim=-1)
        return content_BHTD, rotate(split_pairs(rope_BHTS), cos_BTS[:, None], sin_BTS[:, None])


def split_pairs(x: Tensor) -> Tensor:
    """`[Re 0, Im 0, Re 1, Im 1, ...]` to `[Re ... | Im ...]` along the last axis."""
    pairs: Tensor = x.unflatten(-1, (-1, 2))
    return pairs.mT.flatten(-2)


def join_pairs(x: Tensor) -> Tensor:
    """The inverse of `split_pairs`."""
    halves: Tensor = x.unflatten(-1, (2, -1))
    return halves.mT.flatten(-2)


@torch.no_grad()
def release(layer: LatentAttention) -> dict[str, Tensor]:
    """A layer in the released layout, float64; its latent gets one coordinate more.

    The released output projection has no bias. Attention weights sum to one, so a latent
    coordinate that is 1 for every token (weight 0, bias 1) carries the bias through the values.

    Raises:
        ValueError: the layer has a QK-norm, adapters, or another number of slots than one per
            frequency; none of them has a place in the released layout.
    """
    _check_releasable(layer)
    D = layer.head_dim
    rope = 2 * len(layer.slot_frequencies)
    q_proj = _with_bias(layer.q_proj)
    kv_proj = torch.cat([_with_bias(layer.k_proj), _with_bias(layer.v_proj)])
    # Scores are divided by sqrt(D + 2 S) in place of sqrt(D).
    stronger = ((D + rope) / D) ** 0.5
    # Head by head: of a large model, all heads' intermediate products take a gigabyte.
    heads = (stronger * part_DX for part_DX in q_proj.split(D))
    queries = torch.cat([_head_queries(layer, part.T, a) for a, part in enumerate(heads)])
    latent = layer.latent_proj.weight.double() @ kv_proj
    latent[:, -1] += layer.latent_proj.bias.double()
    constant = torch.zeros_like(latent[:1])
    constant[:, -1] = 1.0
    row = torch.cat([latent, constant, join_pairs(_rotary_key(layer, kv_proj)).T])
    return {
        "q_proj.weight": queries[:, :-1].contiguous(),
        "q_proj.bias": queries[:, -1].contiguous(),
        "kv_a_proj_with_mqa.weight": row[:, :-1].contiguous(),
        "kv_a_proj_with_mqa.bias": row[:, -1].contiguous(),
        "kv_b_proj.weight": _up_projection(layer),
        "o_proj.weight": layer.o_proj.weight.double().clone(),
    }


def _check_releasable(layer: LatentAttention) -> None:
    one_each = list(range(layer.head_dim // 2))
    reasons = {
        "an exact QK-norm": not isinstance(layer.q_norm, nn.Identity),
        "modality adapters": layer.config.modality_adapters,
        "a smaller rank for vision": layer.vision_rank != layer.rank,
        "rotary slots other than one per frequency": layer.slot_frequencies != one_each,
    }
    found = [reason for reason, present in reasons.items() if present]
    if found:
        raise ValueError(
            f"layer {layer.layer_idx} has {', '.join(found)}, and the released layout has no place "
            "for that; convert with the preset `official`."
        )


def _with_bias(linear: nn.Linear) -> Tensor:
    """Weight and bias as one matrix [out, in + 1], float64."""
    weight = linear.weight.double()
    bias = torch.zeros_like(weight[:, 0]) if linear.bias is None else linear.bias.double()
    return torch.cat([weight, bias[:, None]], dim=1)


def _head_queries(layer: LatentAttention, q_XD: Tensor, head: int) -> Tensor:
    """One head's rows of `q_proj`: content queries, then slot queries in pairs, [D + 2 S, X]."""
    content_XD = rotate(q_XD, *layer.nope_gain[:, head].double())
    slots_XS = rotate(q_XD, *layer.rope_read[:, :, head].double())
    return torch.cat([content_XD, join_pairs(slots_XS)], dim=-1).T


def _rotary_key(layer: LatentAttention, kv_proj: Tensor) -> Tensor:
    """Shared rotary key of every input channel, [X, 2 S]."""
    keys = layer.num_kv_heads * layer.head_dim
    k_XKD = kv_proj[:keys].T.unflatten(-1, (layer.num_kv_heads, -1))
    re, im = (k.mT for k in k_XKD.chunk(2, dim=-1))  # [X, S, K]
    w_re, w_im = layer.rope_write.double()
    return torch.cat([(w_re * re - w_im * im).sum(-1), (w_re * im + w_im * re).sum(-1)], dim=-1)


def _up_projection(layer: LatentAttention) -> Tensor:
    """`kv_b_proj`: keys and values of every query head, the last column carries the output bias."""
    groups = layer.num_heads // layer.num_kv_heads
    k_up = layer.k_up.double().repeat_interleave(groups, dim=0)
    v_up = layer.v_up.double().repeat_interleave(groups, dim=0)
    bias = layer.o_proj.bias.double()
    # W_o v = b_o has a solution unless W_o is singular; then this is the nearest.
    carried = torch.linalg.lstsq(layer.o_proj.weight.double(), bias[:, None]).solution
    zeros = torch.zeros_like(k_up[..., :1])
    k_up = torch.cat([k_up, zeros], dim=-1)
    v_up = torch.cat([v_up, carried.view(layer.num_heads, layer.head_dim, 1)], dim=-1)
    return torch.cat([k_up, v_up], dim=1).flatten(0, 1)
