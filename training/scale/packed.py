"""The text model over one video and many questions, without computing what the mask hides.

The same layers and weights as transformers' Qwen3-VL text model (a test compares logits); only the
attention is arranged by what it needs: the video attends causally to itself once, and each
question attends to the video and to itself. On a CPU this is several times faster than one masked
attention over the whole row.

Letters: B rows, P prefix tokens, Q questions of a row, L tokens of a question, N = B·P + B·Q·L
tokens, W text width, H query heads, K key/value heads, G = H/K, D width of a key, E of a value.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from internvideo3.model.attention import LatentAttention


class Layout(NamedTuple):
    """Sizes of a packed batch."""

    rows: int
    prefix: int
    questions: int
    question_tokens: int

    @property
    def split(self) -> int:
        """Where the flat token axis passes from prefixes to questions."""
        return self.rows * self.prefix


class Angles(NamedTuple):
    """Rotary cosines and sines of all tokens."""

    cos_ND: Tensor
    sin_ND: Tensor


class Heads(NamedTuple):
    """Rotated queries and keys, and values, of all tokens."""

    q_NHD: Tensor
    k_NKD: Tensor
    v_NKE: Tensor


class PackedText:
    """Runs the decoder layers of a Qwen3-VL text model, GQA or latent, on packed tokens."""

    def __init__(self, language_model: Any, *, fuse: bool = False) -> None:
        """Wrap the model's own layers.

        Args:
            language_model: A Qwen3-VL text model, or InternVideo3's.
            fuse: Compile the element-wise parts (half a minute once, then 1.5 times faster).
        """
        self.text = language_model
        wrap = torch.compile(dynamic=True) if fuse else (lambda function: function)
        self.norm: Callable[..., Tensor] = wrap(_norm)
        self.norm_and_rotate: Callable[..., Tensor] = wrap(_norm_and_rotate)
        self.gate: Callable[..., Tensor] = wrap(_gate)

    def __call__(
        self,
        embeds_NW: Tensor,
        position_ids_3N: Tensor,
        layout: Layout,
        seen_N: Tensor,
        deep: list[Tensor],
    ) -> Tensor:
        """Final hidden states `[N,W]` (after the last norm).

        Args:
            embeds_NW: Input embeddings, all prefixes first, then all questions.
            position_ids_3N: Time, height and width positions.
            layout: How the tokens are arranged.
            seen_N: True at vision tokens.
            deep: DeepStack features of the vision tokens for the first layers.
        """
        rotary = self.text.rotary_emb(embeds_NW[None], position_ids_3N[:, None])
        angles = Angles(*(part[0].to(embeds_NW.dtype) for part in rotary))
        hidden = embeds_NW
        where = seen_N.nonzero()[:, 0]
        for index, layer in enumerate(self.text.layers):
            hidden = hidden + self._attend(layer, hidden, angles, layout, seen_N)
            hidden = hidden + self._mlp(layer, hidden)
            if index < len(deep):
                hidden = hidden.index_add(0, where, deep[index].to(hidden.dtype))
        out: Tensor = self.text.norm(hidden)
        return out

    def _mlp(self, layer: Any, hidden: Tensor) -> Tensor:
        norm, mlp = layer.post_attention_layernorm, layer.mlp
        x_NW = self.norm(hidden, norm.weight, norm.variance_epsilon)
        # One product for gate and up: one cast of the input, one larger matrix.
        both = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
        out: Tensor = mlp.down_proj(self.gate(functional.linear(x_NW, both)))
        return out

    def _attend(
        self, layer: Any, hidden: Tensor, angles: Angles, layout: Layout, seen_N: Tensor
    ) -> Tensor:
        norm, attention = layer.input_layernorm, layer.self_attn
        x_NW = self.norm(hidden, norm.weight, norm.variance_epsilon)
        if isinstance(attention, LatentAttention):
            q_NHD, k_NKD, v_NKE = _latent_heads(attention, x_NW, angles, seen_N)
        else:
            q_NHD, k_NKD, v_NKE = self._plain_heads(attention, x_NW, angles)
        heads = k_NKD.shape[1]
        q_NKGD = (q_NHD * attention.head_dim**-0.5).unflatten(1, (heads, -1))
        cut = layout.split
        kp_BKPD, vp_BKPE = (
            x[:cut].unflatten(0, (layout.rows, layout.prefix)).transpose(1, 2)
            for x in (k_NKD, v_NKE)
        )
        prefix = _prefix_attention(q_NKGD[:cut], kp_BKPD, vp_BKPE, layout)
        asked = _question_attention(
            q_NKGD[cut:], k_NKD[cut:], v_NKE[cut:], kp_BKPD, vp_BKPE, layout
        )
        out: Tensor = attention.o_proj(torch.cat([prefix, asked]))
        return out

    def _plain_heads(self, attention: Any, x_NW: Tensor, angles: Angles) -> Heads:
        parts = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
        width, heads = attention.head_dim, attention.config.num_key_value_heads
        projected = functional.linear(x_NW, torch.cat(parts)).unflatten(-1, (-1, width))
        q_NHD, k_NKD, v_NKD = projected.split([projected.shape[1] - 2 * heads, heads, heads], 1)
        q_norm, k_norm = attention.q_norm, attention.k_norm
        epsilon = q_norm.variance_epsilon
        cos_N1D, sin_N1D = (part[:, None] for part in angles)
        q_NHD = self.norm_and_rotate(q_NHD, q_norm.weight, cos_N1D, sin_N1D, epsilon)
        k_NKD = self.norm_and_rotate(k_NKD, k_norm.weight, cos_N1D, sin_N1D, epsilon)
        return Heads(q_NHD, k_NKD, v_NKD)


def _latent_heads(
    attention: LatentAttention, x_NW: Tensor, angles: Angles, seen_N: Tensor
) -> Heads:
    """M²LA in the reconstruct form: keys and values of every head, rebuilt from the rows."""
    slots = torch.tensor(attention.slot_frequencies)
    cos_1NS, sin_1NS = (part[None].index_select(-1, slots) for part in angles)
    row_1NW = attention.write(x_NW[None], cos_1NS, sin_1NS, seen_N[None])
    q_1HND, q_rope_1HNS = attention.queries(x_NW[None], cos_1NS, sin_1NS)
    k_1KND, v_1KNE = attention.rebuild(row_1NW.to(q_1HND.dtype))
    q_NHD = torch.cat([q_1HND, q_rope_1HNS], -1)[0].transpose(0, 1)
    return Heads(q_NHD, k_1KND[0].transpose(0, 1), v_1KNE[0].transpose(0, 1))


def _norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """RMSNorm in float32, returned in the dtype of matrix products."""
    x = x.float()
    scaled = weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon))
    return scaled.to(_product_dtype())


def _norm_and_rotate(
    x_NHD: Tensor, weight: Tensor, cos_N1D: Tensor, sin_N1D: Tensor, epsilon: float
) -> Tensor:
    """QK-norm, then rotary position, of queries or keys."""
    kind = x_NHD.dtype
    x = x_NHD.float()
    x = weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon))
    first, second = x.chunk(2, -1)
    return (x * cos_N1D + torch.cat((-second, first), -1) * sin_N1D).to(kind)


def _gate(both_N2F: Tensor) -> Tensor:
    """SwiGLU of the joined gate and up projections."""
    gate, up = both_N2F.float().chunk(2, -1)
    return (functional.silu(gate) * up).to(both_N2F.dtype)


def _product_dtype() -> torch.dtype:
    return torch.bfloat16 if torch.is_autocast_enabled("cpu") else torch.float32


def _prefix_attention(q_NKGD: Tensor, k_BKPD: Tensor, v_BKPE: Tensor, layout: Layout) -> Tensor:
    """Causal attention of the prefixes; `[B·P, H·E]`."""
    rows, prefix = layout.rows, layout.prefix
    _, heads, groups, width = q_NKGD.shape
    q = q_NKGD.reshape(rows, prefix, heads, groups, width).permute(0, 2, 3, 1, 4)
    scores = q.flatten(2, 3) @ k_BKPD.transpose(-1, -2)
    hidden = torch.ones(prefix, prefix, dtype=torch.bool, device=q.device).triu(1)
    scores = scores.unflatten(2, (groups, prefix)).masked_fill(hidden, -torch.inf)
    mixed = functional.softmax(scores, -1).flatten(2, 3).to(v_BKPE.dtype) @ v_BKPE
    out: Tensor = mixed.unflatten(2, (groups, prefix)).permute(0, 3, 1, 2, 4)
    return out.reshape(rows * prefix, -1)


def _question_attention(
    q_NKGD: Tensor,
    k_NKD: Tensor,
    v_NKE: Tensor,
    kp_BKPD: Tensor,
    vp_BKPE: Tensor,
    layout: Layout,
) -> Tensor:
    """Attention of each question to its video and to itself; `[B·Q·L, H·E]`."""
    rows, count, tokens, prefix = (
        layout.rows,
        layout.questions,
        layout.question_tokens,
        layout.prefix,
    )
    _, heads, groups, _ = q_NKGD.shape
    questions = (rows, count, tokens)
    q_BKGQLD = q_NKGD.unflatten(0, questions).permute(0, 3, 4, 1, 2, 5)
    q_flat = q_BKGQLD.flatten(2, 4)
    to_video = (q_flat @ kp_BKPD.transpose(-1, -2)).unflatten(2, (groups, count, tokens))
    # Products this small are faster in float32 than in bf16.
    k_BK1QLD, v_BK1QLE = (
        x.float().unflatten(0, questions).permute(0, 3, 1, 2, 4)[:, :, None] for x in (k_NKD, v_NKE)
    )
    with torch.autocast("cpu", enabled=False):
        to_self = q_BKGQLD.float() @ k_BK1QLD.transpose(-1, -2)
    hidden = torch.ones(tokens, tokens, dtype=torch.bool, device=q_flat.device).triu(1)
    to_self = to_self.masked_fill(hidden, -torch.inf)
    share = functional.softmax(torch.cat([to_video.float(), to_self], -1), -1)
    from_video = share[..., :prefix].flatten(2, 4).to(vp_BKPE.dtype) @ vp_BKPE
    with torch.autocast("cpu", enabled=False):
        from_self = share[..., prefix:] @ v_BK1QLE
    mixed = from_video.float().unflatten(2, (groups, count, tokens)) + from_self
    out: Tensor = mixed.permute(0, 3, 4, 1, 2, 5)
    return out.flatten(0, 2).flatten(1)
