"""Attention of packed rows for training: three back-ends with the same numbers, and its division.

Keys of M²LA are wider than values (the released 8B: 256 and 128). `segments`, the default, makes no
mask: it calls the fused kernel for each trunk and each branch, with values padded to the keys'
width, which is what fused kernels ask for. `mask` is the plain definition, T² numbers. `flex`
compiles the mask into the kernel (GPU; on a CPU it has no backward pass).

With a row divided among processes (sequence parallelism), queries are exchanged so that each
process has all tokens of some heads; of M²LA's keys and values only the latent rows travel, and
each process rebuilds those of its own heads (a "latent gather" in Ulysses' scheme). Frames are
divided too (`policy.py`): what a process saw of another's tokens is sent to it (`dealt`).

Letters: B batch (1), H query heads, K key/value heads, G = H/K, T tokens of the row, t those of
this process, W width of a key, V of a value, P processes that share a row, h = H/P.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _functional_collectives as collectives
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from internvideo3.model.attention import RowAttention

Backend = Literal["segments", "mask", "flex"]
GQA_NAME = "internvideo3_packed"
"""Name under which transformers' own attention finds the one of this file."""


class Segment(NamedTuple):
    """Queries of one trunk or branch; they see the trunk (nothing, for a trunk) and themselves."""

    start: int
    stop: int
    trunk: tuple[int, int]


@dataclass(frozen=True)
class Sharing:
    """The processes among which a row is divided, in the order of its parts."""

    group: dist.ProcessGroup
    rank: int
    count: int

    def gathered(self, part: Tensor, dim: int) -> Tensor:
        """The parts of all processes along a dimension; differentiable."""
        whole: Tensor = collectives.all_gather_tensor_autograd(part.contiguous(), dim, self.group)
        return whole

    def heads_of_all(self, x_BHtW: Tensor) -> Tensor:
        """This process's tokens of all heads → all tokens of its heads, `[B,h,T,W]`."""
        B, H, t, W = x_BHtW.shape
        sent = x_BHtW.reshape(B, self.count, H // self.count, t, W).transpose(0, 1)
        got_PBhtW = self._exchanged(sent)
        return got_PBhtW.permute(1, 2, 0, 3, 4).reshape(B, H // self.count, -1, W)

    def tokens_of_all(self, x_BhTV: Tensor) -> Tensor:
        """All tokens of this process's heads → its tokens of all heads, `[B,H,t,V]`."""
        B, h, T, V = x_BhTV.shape
        sent = x_BhTV.reshape(B, h, self.count, T // self.count, V).permute(2, 0, 1, 3, 4)
        got_PBhtV = self._exchanged(sent)
        return got_PBhtV.transpose(0, 1).reshape(B, -1, T // self.count, V)

    def dealt(self, rows: Tensor, held: Sequence[int], wanted: Sequence[int]) -> Tensor:
        """Rows that lie one after another over the processes, cut anew; differentiable.

        Args:
            rows: This process's, `[held[rank], ...]`.
            held: Number of rows that each process has.
            wanted: Number that each is to have; in all as many as `held`.

        Returns:
            `[wanted[rank], ...]`.
        """
        sent = overlaps(held, self.rank, wanted)
        got = overlaps(wanted, self.rank, held)
        dealt: Tensor = collectives.all_to_all_single_autograd(
            rows.contiguous(), got, sent, self.group
        )
        return dealt

    def _exchanged(self, sent: Tensor) -> Tensor:
        ones = [1] * self.count
        got: Tensor = collectives.all_to_all_single_autograd(
            sent.contiguous(), ones, ones, self.group
        )
        return got


def overlaps(cut: Sequence[int], part: int, other: Sequence[int]) -> list[int]:
    """How many rows of one part of a cut lie in each part of another cut of the same rows."""
    first = sum(cut[:part])
    stop = first + cut[part]
    ends = list(accumulate(other))
    return [
        max(0, min(stop, end) - max(first, end - rows))
        for rows, end in zip(other, ends, strict=True)
    ]


@dataclass(frozen=True)
class PackedAttention:
    """Attention among the tokens of one row."""

    document_T: Tensor
    branch_T: Tensor
    """0 in a trunk; a branch sees its document's trunk and itself."""
    backend: Backend = "segments"
    sharing: Sharing | None = None
    """None: this process has the whole row."""
    scratch: dict[str, Any] = field(default_factory=dict, repr=False)

    def latent(self, attention: RowAttention, q_BHtW: Tensor, row_BtR: Tensor) -> Tensor:
        """M²LA: from queries and latent rows of this process's tokens to its heads, `[B,H,t,V]`.

        Raises:
            ValueError: The heads cannot be divided among the processes.
        """
        if self.sharing is None:
            k_BKTW, v_BKTV = attention.rebuild(row_BtR)
            return self._attend(q_BHtW, k_BKTW, v_BKTV, attention.scale)
        mine = self._own_heads(attention.num_kv_heads, self.sharing)
        k_BkTW, v_BkTV = attention.rebuild(self.sharing.gathered(row_BtR, 1), mine)
        q_BhTW = self.sharing.heads_of_all(q_BHtW)
        out_BhTV = self._attend(q_BhTW, k_BkTW, v_BkTV, attention.scale)
        return self.sharing.tokens_of_all(out_BhTV)

    def plain(self, q_BHtW: Tensor, k_BKtW: Tensor, v_BKtW: Tensor, scale: float) -> Tensor:
        """GQA: as `latent`, from keys and values.

        Raises:
            ValueError: The heads cannot be divided among the processes.
        """
        if self.sharing is None:
            return self._attend(q_BHtW, k_BKtW, v_BKtW, scale)
        self._own_heads(k_BKtW.shape[1], self.sharing)
        q, k, v = (self.sharing.heads_of_all(x) for x in (q_BHtW, k_BKtW, v_BKtW))
        return self.sharing.tokens_of_all(self._attend(q, k, v, scale))

    @staticmethod
    def _own_heads(kv_heads: int, sharing: Sharing) -> slice:
        if kv_heads % sharing.count:
            raise ValueError(
                f"{sharing.count} processes cannot divide {kv_heads} key/value heads; take a "
                "sequence_parallel that divides them"
            )
        each = kv_heads // sharing.count
        return slice(sharing.rank * each, (sharing.rank + 1) * each)

    def _attend(self, q_BHTW: Tensor, k_BKTW: Tensor, v_BKTV: Tensor, scale: float) -> Tensor:
        return BACKENDS[self.backend](self, q_BHTW, k_BKTW, v_BKTV, scale)

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        """The row's trunks and branches in order."""
        pairs_T2 = torch.stack([self.document_T, self.branch_T], 1)
        kinds_N2, counts_N = torch.unique_consecutive(pairs_T2, dim=0, return_counts=True)
        made: list[Segment] = []
        start, trunk = 0, (0, 0)
        for branch, count in zip(kinds_N2[:, 1].tolist(), counts_N.tolist(), strict=True):
            stop = start + count
            made.append(Segment(start, stop, trunk if branch else (start, start)))
            trunk = trunk if branch else (start, stop)
            start = stop
        return tuple(made)

    def visible(self) -> Tensor:
        """`[T,T]`, True where a query (row) sees a key (column)."""
        if "visible" not in self.scratch:
            order_T = torch.arange(len(self.document_T), device=self.document_T.device)
            self.scratch["visible"] = self._sees(order_T[:, None], order_T[None])
        made: Tensor = self.scratch["visible"]
        return made

    def block_mask(self) -> Any:
        """The same for flex attention, block by block."""
        from torch.nn.attention.flex_attention import create_block_mask

        if "block_mask" not in self.scratch:
            tokens = len(self.document_T)
            self.scratch["block_mask"] = create_block_mask(
                lambda b, h, q, k: self._sees(q, k), None, None, tokens, tokens,
                device=str(self.document_T.device),
            )  # fmt: skip
        return self.scratch["block_mask"]

    def _sees(self, query: Tensor, key: Tensor) -> Tensor:
        together = self.document_T[query] == self.document_T[key]
        branch = (self.branch_T[key] == 0) | (self.branch_T[query] == self.branch_T[key])
        return (query >= key) & together & branch


def by_mask(
    packed: PackedAttention, q_BHTW: Tensor, k_BKTW: Tensor, v_BKTV: Tensor, scale: float
) -> Tensor:
    """The definition: one masked attention over the whole row."""
    q_KGTW, k_KGTW, v_KGTV = _grouped(q_BHTW, k_BKTW, v_BKTV)
    out = functional.scaled_dot_product_attention(
        q_KGTW, k_KGTW, v_KGTV, attn_mask=packed.visible(), scale=scale
    )
    return out.reshape(1, q_BHTW.shape[1], *out.shape[2:])


def by_segments(
    packed: PackedAttention, q_BHTW: Tensor, k_BKTW: Tensor, v_BKTV: Tensor, scale: float
) -> Tensor:
    """The fused kernel for each trunk and branch; values padded to the width of keys."""
    width, value = k_BKTW.shape[-1], v_BKTV.shape[-1]
    padded = functional.pad(v_BKTV, (0, width - value)) if width > value else v_BKTV
    q_KGTW, k_KGTW, v_KGTW = _grouped(q_BHTW, k_BKTW, padded)
    outs = []
    for start, stop, (first, last) in packed.segments:
        q = q_KGTW[:, :, start:stop]
        if first == last:
            k, v = k_KGTW[:, :, start:stop], v_KGTW[:, :, start:stop]
            out = functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        else:
            k, v = (
                torch.cat([x[:, :, first:last], x[:, :, start:stop]], 2) for x in (k_KGTW, v_KGTW)
            )
            sees = torch.ones(stop - start, k.shape[2], dtype=torch.bool, device=q.device)
            sees = sees.tril(last - first)
            out = functional.scaled_dot_product_attention(q, k, v, attn_mask=sees, scale=scale)
        outs.append(out)
    whole = torch.cat(outs, 2)[..., :value]
    return whole.reshape(1, q_BHTW.shape[1], *whole.shape[2:])


def by_flex(
    packed: PackedAttention, q_BHTW: Tensor, k_BKTW: Tensor, v_BKTV: Tensor, scale: float
) -> Tensor:
    """Flex attention; compiled on a GPU."""
    from torch.nn.attention.flex_attention import flex_attention

    run = torch.compile(flex_attention) if q_BHTW.is_cuda else flex_attention
    out: Tensor = run(
        q_BHTW, k_BKTW, v_BKTV, block_mask=packed.block_mask(), scale=scale, enable_gqa=True
    )
    return out


Attend = Callable[[PackedAttention, Tensor, Tensor, Tensor, float], Tensor]
BACKENDS: dict[Backend, Attend] = {"segments": by_segments, "mask": by_mask, "flex": by_flex}


def _grouped(q_BHTW: Tensor, *kv: Tensor) -> tuple[Tensor, ...]:
    """Queries `[K,G,T,W]`, and keys and values expanded (not copied) to the same heads."""
    (k_BKTW, *_) = kv
    q_KGTW = q_BHTW[0].unflatten(0, (k_BKTW.shape[1], -1))
    groups = q_KGTW.shape[1]
    return q_KGTW, *(x[0][:, None].expand(-1, groups, -1, -1) for x in kv)


def packed_gqa(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    packed: PackedAttention | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Transformers' attention interface; what is not packed goes to its own sdpa."""
    if packed is None:
        out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return out, None
    return packed.plain(query, key, value, kwargs["scaling"]).transpose(1, 2), None


AttentionInterface.register(GQA_NAME, packed_gqa)
AttentionMaskInterface.register(GQA_NAME, sdpa_mask)
