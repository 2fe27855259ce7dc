"""Text layers as a decode step runs them: the model's own weights, through the kernels' dispatch.

A step of a layer is a handful of fused calls with static shapes; lengths and slots are read on the
device, so that a CUDA graph of it stays valid while the contexts grow. Nothing is converted: q, k
and v projections become views of one tensor (the values stay, and the model still uses them), and
the multiplied-out weights of a latent layer are the layer's own (`folding`).

Axes: B sequences, b = B or 1 (all share it), X model width, H query heads, K key/value heads,
D head width, F = D / 2 rotary frequencies, J = 2 K, R rank, W row width, S rotary slots, T cache
capacity, C = B T slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRMSNorm

from internvideo3.kernels.decode_linear.dispatch import decode_linear
from internvideo3.kernels.gqa_append.dispatch import gqa_append
from internvideo3.kernels.gqa_decode.dispatch import decode_runs as gqa_decode
from internvideo3.kernels.gqa_decode.dispatch import is_static as gqa_is_static
from internvideo3.kernels.gqa_decode.naive import KeysValues
from internvideo3.kernels.latent_append.dispatch import latent_append
from internvideo3.kernels.latent_decode.dispatch import decode_runs as latent_decode
from internvideo3.kernels.latent_decode.dispatch import is_static
from internvideo3.kernels.latent_decode.rows import Rows
from internvideo3.kernels.latent_expand.dispatch import expand_output
from internvideo3.kernels.latent_token.dispatch import latent_token
from internvideo3.kernels.latent_token.naive import TokenMaps
from internvideo3.model.attention import LatentAttention, RowAttention
from internvideo3.model.cache import Segment, SegmentedLayer
from internvideo3.model.folding import fold, is_hooked, is_plain
from internvideo3.model.prerope import PreropeAttention


@dataclass(frozen=True)
class Where:
    """Where a step stands; the tensors are updated in place from step to step."""

    slots_B: Tensor
    """Tail index that each sequence's new token gets (int64)."""
    visible_B: Tensor
    """Tail tokens that it sees, itself included (int32)."""
    cos_BF: Tensor
    sin_BF: Tensor
    """Rotary angles of the source model, one a frequency; contiguous."""


class Attend(Protocol):
    """The attention of one layer: normalised input to heads' outputs, new token cached."""

    @property
    def static(self) -> bool:
        """Whether a call reads nothing on the host, so that a CUDA graph can hold it."""

    def weights(self) -> list[Tensor]:
        """What a call reads, without the cache."""

    def __call__(self, x_BX: Tensor, norm: Any, where: Where) -> Tensor:
        """Returns [B, H D]."""


@dataclass(frozen=True)
class Layer:
    """One text layer."""

    module: Any
    """A `Qwen3VLTextDecoderLayer`."""
    attend: Attend

    def bytes_read(self) -> int:
        """Bytes of weights that a call reads."""
        attn, mlp = self.module.self_attn, self.module.mlp
        linears = [attn.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj]
        return sum(t.nbytes for t in [*self.attend.weights(), *(one.weight for one in linears)])

    def __call__(self, x_BX: Tensor, where: Where) -> Tensor:
        """Caches one token of each sequence and returns its hidden state [B, X]."""
        attn, mlp, norm = self.module.self_attn, self.module.mlp, self.module.input_layernorm
        out_BE = self.attend(x_BX, norm, where)
        x_BX = decode_linear(out_BE, attn.o_proj.weight, bias_N=attn.o_proj.bias, residual_BN=x_BX)
        norm = self.module.post_attention_layernorm
        middle_BI = decode_linear(
            x_BX,
            mlp.gate_proj.weight,
            factor_NK=mlp.up_proj.weight,
            norm_weight_K=norm.weight,
            eps=norm.variance_epsilon,
        )
        return decode_linear(middle_BI, mlp.down_proj.weight, residual_BN=x_BX)


class GroupedAttend:
    """Transformers' grouped-query attention: the baseline."""

    def __init__(self, attn: Any, layer: SegmentedLayer) -> None:
        self.attn = attn
        self.qkv = MergedLinear([attn.q_proj, attn.k_proj, attn.v_proj])
        self.keys_BKTD, self.values_BKTD = layer.tail
        self.shared = [
            KeysValues(keys_bKTD=k, values_bKTD=v, lengths_B=lengths)
            for (k, v), lengths in ((one.stored, _lengths(one, layer)) for one in layer.frozen)
        ]

    @property
    def static(self) -> bool:
        """As `Attend.static`."""
        keys_BKTD = self.keys_BKTD
        return gqa_is_static(self.attn.head_dim, keys_BKTD.dtype, keys_BKTD.device)

    def weights(self) -> list[Tensor]:
        """As `Attend.weights`."""
        return [self.qkv.weight_NK]

    def __call__(self, x_BX: Tensor, norm: Any, where: Where) -> Tensor:
        """Appends key and value, then attends."""
        attn = self.attn
        q_BHD = gqa_append(
            self.qkv(x_BX, norm),
            attn.q_norm.weight,
            attn.k_norm.weight,
            where.cos_BF,
            where.sin_BF,
            where.slots_B,
            self.keys_BKTD,
            self.values_BKTD,
            eps=attn.q_norm.variance_epsilon,
        )
        own = KeysValues(
            keys_bKTD=self.keys_BKTD, values_bKTD=self.values_BKTD, lengths_B=where.visible_B
        )
        out_BHD, _ = gqa_decode(q_BHD, [*self.shared, own], scale=attn.scaling)
        return out_BHD.flatten(1)


class RowAttend:
    """M²LA in the absorbed form, rows and queries made by the layer's own steps."""

    def __init__(self, attn: RowAttention, layer: SegmentedLayer) -> None:
        self.attn = attn
        self.v_up_KDR = attn.v_up.detach().contiguous()
        (rows_B1TW,) = layer.tail
        self.rows_BTW = rows_B1TW[:, 0]
        B, capacity, width = self.rows_BTW.shape
        self.rows_CW = self.rows_BTW.view(-1, width)
        self.first_slots_B = torch.arange(B, device=rows_B1TW.device) * capacity
        frequencies = range(attn.head_dim // 2)
        self.turns_all = tuple(attn.slot_frequencies) == tuple(frequencies)
        self.shared = [_rows(one, _lengths(one, layer), attn.rank) for one in layer.frozen]

    @property
    def static(self) -> bool:
        """As `Attend.static`."""
        own = self._own(self.first_slots_B)
        return all(is_static(run, self.rows_BTW.dtype) for run in (*self.shared, own))

    def weights(self) -> list[Tensor]:
        """As `Attend.weights`."""
        outside = {id(p) for p in self.attn.o_proj.parameters()}
        return [p for p in self.attn.parameters() if id(p) not in outside]

    def __call__(self, x_BX: Tensor, norm: Any, where: Where) -> Tensor:
        """Appends the row, then attends over the rows themselves."""
        q_BHW = self.write(x_BX, norm, self._angles(where), self._places(where))
        own = self._own(where.visible_B)
        latent_BHR, _ = latent_decode(
            q_BHW, [*self.shared, own], scale=self.attn.scale, value_width=self.attn.rank
        )
        return expand_output(latent_BHR, self.v_up_KDR).flatten(1)

    def _own(self, lengths_B: Tensor) -> Rows:
        return Rows(rows_bTW=self.rows_BTW, lengths_B=lengths_B, rank=self.attn.rank)

    def _angles(self, where: Where) -> tuple[Tensor, ...]:
        """Cosine and sine of each slot, [B, S]; a step of few kernels launches none for nothing."""
        if self.turns_all:
            return where.cos_BF, where.sin_BF
        slots = self.attn._slot_index(where.cos_BF.device)
        return tuple(t.index_select(-1, slots) for t in (where.cos_BF, where.sin_BF))

    def _places(self, where: Where) -> Tensor:
        """Cache slot of each sequence's new token."""
        return where.slots_B if len(where.slots_B) == 1 else self.first_slots_B + where.slots_B

    def write(self, x_BX: Tensor, norm: Any, angles: tuple[Tensor, ...], slots_B: Tensor) -> Tensor:
        """Caches a row of each sequence at its slot; returns the absorbed queries [B, H, W]."""
        x_B1X, (cos_BS, sin_BS) = norm(x_BX)[:, None], angles
        latent_append(self.attn.project(x_B1X, None)[:, 0], cos_BS, sin_BS, slots_B, self.rows_CW)
        q_BH1W = self.attn.absorbed_queries(x_B1X, cos_BS[:, None], sin_BS[:, None])
        return q_BH1W[:, :, 0].contiguous()


class FusedRowAttend(RowAttend):
    """The same for rows with exact QK-norm, from multiplied-out weights by fused kernels."""

    attn: LatentAttention

    def __init__(self, attn: LatentAttention, layer: SegmentedLayer) -> None:
        super().__init__(attn, layer)
        self.qkv = MergedLinear([attn.q_proj, attn.k_proj, attn.v_proj])
        folded = attn._folded() or fold(attn)
        q_norm: Any = attn.q_norm
        k_norm: Any = attn.k_norm
        self.maps = TokenMaps(
            q_norm_D=q_norm.weight.detach(),
            k_norm_D=k_norm.weight.detach(),
            eps=q_norm.variance_epsilon,
            row_WE=folded.text.weight_WE,
            bias_W=folded.text.bias_W,
            gain_2HF=attn.nope_gain.detach(),
            k_up_KDR=attn.k_up.detach(),
            read_2SH=attn.rope_read.detach(),
            frequency_S=attn._slot_index(attn.k_up.device),
        )

    def weights(self) -> list[Tensor]:
        """As `Attend.weights`."""
        return [self.qkv.weight_NK, self.maps.row_WE, self.maps.k_up_KDR, self.v_up_KDR]

    def write(self, x_BX: Tensor, norm: Any, angles: tuple[Tensor, ...], slots_B: Tensor) -> Tensor:
        """As `RowAttend.write`: two launches."""
        cos_BS, sin_BS = angles
        return latent_token(self.qkv(x_BX, norm), self.maps, cos_BS, sin_BS, slots_B, self.rows_CW)


class PreropeAttend:
    """Latents of keys before rotation: keys and values are rebuilt at every step."""

    static = False

    def __init__(
        self, attn: PreropeAttention, layer: SegmentedLayer, first: SegmentedLayer
    ) -> None:
        self.attn, self.layer, self.first = attn, layer, first
        B, _, capacity, _ = layer.tail[0].shape
        self.first_slots_B = torch.arange(B, device=layer.tail[0].device) * capacity

    def weights(self) -> list[Tensor]:
        """As `Attend.weights`."""
        outside = {id(p) for p in self.attn.o_proj.parameters()}
        return [p for p in self.attn.parameters() if id(p) not in outside]

    def __call__(self, x_BX: Tensor, norm: Any, where: Where) -> Tensor:
        """Appends the latent (the first layer its rotation as well), then attends."""
        attn = self.attn
        x_B1X, rows, turns = norm(x_BX)[:, None], self.layer.tail[0], self.first.tail[1]
        cos_B1F, sin_B1F = where.cos_BF[:, None], where.sin_BF[:, None]
        slots_B = self.first_slots_B + where.slots_B
        new_B1R = attn.project(x_B1X, None)
        rows.view(-1, rows.shape[-1]).index_copy_(0, slots_B, new_B1R[:, 0])
        if self.layer is self.first:
            turn_BD = torch.cat([cos_B1F, sin_B1F], dim=-1)[:, 0]
            turns.view(-1, turns.shape[-1]).index_copy_(0, slots_B, turn_BD.to(turns.dtype))
        runs = [
            self._run(own.tensors[0], other.tensors[1], lengths)
            for (own, lengths), other in zip(
                ((s, _lengths(s, self.layer)) for s in self.layer.frozen),
                self.first.frozen,
                strict=True,
            )
        ]
        q_BHTD, _ = attn.queries(x_B1X, cos_B1F, sin_B1F)
        runs.append(self._run(rows, turns, where.visible_B))
        out_BHD, _ = gqa_decode(q_BHTD[:, :, 0], runs, scale=attn.scale)
        return out_BHD.flatten(1)

    def _run(self, rows_b1TR: Tensor, turns_b1TD: Tensor, lengths_B: Tensor) -> KeysValues:
        longest = int(lengths_B.max())
        k, v = self.attn.rotated(rows_b1TR[:, :, :longest], turns_b1TD[:, :, :longest])
        return KeysValues(keys_bKTD=k, values_bKTD=v, lengths_B=lengths_B)


class MergedLinear:
    """Linear layers with one input as one product; their weights become views of one tensor."""

    def __init__(self, linears: Sequence[nn.Linear]) -> None:
        self.weight_NK = _merged([linear.weight for linear in linears])
        biases = [linear.bias for linear in linears if linear.bias is not None]
        self.bias_N = torch.cat([bias.detach() for bias in biases]) if biases else None

    def __call__(self, x_BX: Tensor, norm: Any) -> Tensor:
        """Outputs side by side, of the input normalised by `norm`."""
        return decode_linear(
            x_BX,
            self.weight_NK,
            norm_weight_K=norm.weight,
            bias_N=self.bias_N,
            eps=norm.variance_epsilon,
        )


def _merged(weights: Sequence[Tensor]) -> Tensor:
    """The weights' rows one after the other, without a second copy of them."""
    first, size = weights[0], sum(len(w) for w in weights)
    follows = first.data_ptr()
    for weight in weights:
        if weight.data_ptr() != follows or not weight.is_contiguous():
            break
        follows += weight.nbytes
    else:
        if first.untyped_storage().data_ptr() == weights[-1].untyped_storage().data_ptr():
            return first.detach().as_strided((size, first.shape[1]), first.stride())
    # Or weights first merged under inference mode could never be trained again.
    with torch.inference_mode(False):
        merged = torch.cat([w.detach() for w in weights])
    for weight, rows in zip(weights, merged.split([len(w) for w in weights]), strict=True):
        weight.data = rows
    return merged


def _rows(segment: Segment, lengths_B: Tensor, rank: int) -> Rows:
    """A frozen run of latent rows, compressed, of a smaller rank or not, as the kernel takes it."""
    kept = rank if segment.nested is None else segment.nested.kept
    if not segment.compressed:
        return Rows(rows_bTW=segment.stored[0][:, 0], lengths_B=lengths_B, rank=kept)
    latent, rope, scale = segment.stored
    return Rows(
        rows_bTW=latent[:, 0],
        lengths_B=lengths_B,
        rank=kept,
        rope_bTS=rope[:, 0],
        scale_bT=scale[:, 0, :, 0],
    )


def _lengths(segment: Segment, layer: SegmentedLayer) -> Tensor:
    """The segment's length for every sequence of the tail, int32 [B]."""
    own = layer.tail[0]
    return torch.full((own.shape[0],), segment.length, dtype=torch.int32, device=own.device)


LINEAR = ("_proj", "lm_head")
CALLED = ("embed_tokens", "rotary_emb")
"""Parts of a text model that a step calls as they are."""


def check_plain(model: Any) -> None:
    """Whether a text model's products are those of its weights, which a step reads itself.

    Args:
        model: a Qwen3-VL for conditional generation.

    Raises:
        ValueError: a part has an adapter or a hook, which would be left out.
    """
    text = model.model.language_model
    other = [
        name or "the model"
        for name, one in [("lm_head", model.lm_head), *text.named_modules()]
        # An adapter's own parts are told by the layer that it is on.
        if (is_hooked(one) and name not in CALLED) or (name.endswith(LINEAR) and not is_plain(one))
    ]
    if other:
        more = f" and {len(other) - 3} more" if len(other) > 3 else ""
        other = [", ".join(other[:3]) + more]
        raise ValueError(
            f"{other[0]} have more than their weights (an adapter, a hook, weights kept elsewhere "
            "by accelerate), which decoding in a session would leave out. Merge an adapter (peft: "
            "merge_and_unload) and load the result, take hooks away, load the model onto one "
            "device, or call its own generate()."
        )


def bind(module: Any, layer: SegmentedLayer, first: SegmentedLayer) -> Layer:
    """A text layer on one layer of a cache, whose tail must have been allocated.

    Args:
        module: a `Qwen3VLTextDecoderLayer`.
        layer: its cache.
        first: the cache of the first layer, which may hold what all layers need.
    """
    attn = module.self_attn
    attend: Attend
    if isinstance(attn, PreropeAttention):
        attend = PreropeAttend(attn, layer, first)
    elif isinstance(attn, LatentAttention) and isinstance(attn.q_norm, Qwen3VLTextRMSNorm):
        attend = FusedRowAttend(attn, layer)
    elif isinstance(attn, RowAttention):
        attend = RowAttend(attn, layer)
    else:
        attend = GroupedAttend(attn, layer)
    return Layer(module, attend)
