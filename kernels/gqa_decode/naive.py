"""Grouped-query attention for one new token per sequence, in plain torch.

Axes: B sequences, b = B or 1, H query heads, K key/value heads, G = H / K, T cached tokens,
D head width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class KeysValues:
    """A run of cached keys and values; a sequence attends to all its runs."""

    keys_bKTD: torch.Tensor
    """Those at or beyond a sequence's length are never read; b = 1: all sequences share them."""
    values_bKTD: torch.Tensor
    lengths_B: torch.Tensor
    """Valid tokens of each sequence, int32 on the device."""


def gqa_decode(
    q_BHD: torch.Tensor,
    keys_BKTD: torch.Tensor,
    values_BKTD: torch.Tensor,
    lengths_B: torch.Tensor,
    *,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend over one run; see ``decode_runs``."""
    run = KeysValues(keys_bKTD=keys_BKTD, values_bKTD=values_BKTD, lengths_B=lengths_B)
    return decode_runs(q_BHD, [run], scale=scale)


def decode_runs(
    q_BHD: torch.Tensor, runs: Sequence[KeysValues], *, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend from one query per head; ``H // K`` query heads share a key/value head.

    Args:
        q_BHD: queries; head h reads key/value head ``h // (H // K)``.
        runs: cached keys and values.
        scale: factor on the scores.

    Returns:
        Output ``[B, H, D]`` in the dtype of q, and natural-log log-sum-exp ``[B, H]`` in at least
        float32. A sequence without tokens gives zeros and ``-inf``.
    """
    wide = torch.promote_types(q_BHD.dtype, torch.float32)
    q_BKGD = scale * q_BHD.to(wide).unflatten(1, (runs[0].keys_bKTD.shape[1], -1))
    scores, values = [], []
    for run in runs:
        longest = int(run.lengths_B.max())
        keys = run.keys_bKTD[:, :, :longest].to(wide)
        value = run.values_bKTD[:, :, :longest].to(wide)
        valid_BT = torch.arange(longest, device=q_BHD.device) < run.lengths_B[:, None]
        if value.shape[0] > 1 and not bool(valid_BT.all()):
            value = value.masked_fill(~valid_BT[:, None, :, None], 0.0)
        scores_BKGT = _times(q_BKGD, keys.mT)
        scores.append(scores_BKGT.masked_fill(~valid_BT[:, None, None], float("-inf")))
        values.append(value)
    joined_BKGT = torch.cat(scores, dim=-1)
    lse_BKG = torch.logsumexp(joined_BKGT, dim=-1)
    # A sequence that sees nothing would give NaN: its weights are zero.
    weights_BKGT = torch.exp(joined_BKGT - lse_BKG.nan_to_num(neginf=0.0)[..., None])
    parts = weights_BKGT.split([s.shape[-1] for s in scores], dim=-1)
    out_BKGD = sum(_times(w, v) for w, v in zip(parts, values, strict=True))
    assert isinstance(out_BKGD, torch.Tensor)
    return out_BKGD.flatten(1, 2).to(q_BHD.dtype), lse_BKG.flatten(1)


def _times(x_BKGT: torch.Tensor, y_bKTD: torch.Tensor) -> torch.Tensor:
    """Batched product; a shared factor is read once, as one product over all rows."""
    if y_bKTD.shape[0] == x_BKGT.shape[0]:
        return x_BKGT @ y_bKTD
    B, K, G, T = x_BKGT.shape
    folded_KMD = x_BKGT.transpose(0, 1).reshape(K, B * G, T) @ y_bKTD[0]
    return folded_KMD.view(K, B, G, -1).transpose(0, 1)
