"""Grouped-query attention for one new token per sequence, in plain torch.

Axes: B batch, H query heads, K key/value heads, T cached tokens, D head width.
"""

import torch


def gqa_decode(
    q_BHD: torch.Tensor,
    keys_BKTD: torch.Tensor,
    values_BKTD: torch.Tensor,
    lengths_B: torch.Tensor,
    *,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend from one query per head; ``H // K`` query heads share a key/value head.

    Args:
        q_BHD: queries; head h reads key/value head ``h // (H // K)``.
        keys_BKTD: cached keys; those at or beyond a sequence's length are never read.
        values_BKTD: cached values.
        lengths_B: valid tokens of each sequence (integer).
        scale: factor on the scores.

    Returns:
        Output ``[B, H, D]`` in the dtype of q, and natural-log log-sum-exp ``[B, H]`` in at least
        float32. A sequence of length 0 gives zeros and ``-inf``.
    """
    wide = torch.promote_types(q_BHD.dtype, torch.float32)
    batch, heads, width = q_BHD.shape
    kv_heads = keys_BKTD.shape[1]
    out_BHD = torch.zeros_like(q_BHD)
    lse_BH = torch.full((batch, heads), float("-inf"), dtype=wide, device=q_BHD.device)
    for index, length in enumerate(lengths_B.tolist()):
        if length == 0:
            continue
        keys_KTD = keys_BKTD[index, :, :length].to(wide)
        values_KTD = values_BKTD[index, :, :length].to(wide)
        q_KGD = q_BHD[index].to(wide).view(kv_heads, heads // kv_heads, width)
        scores_KGT = scale * (q_KGD @ keys_KTD.transpose(1, 2))
        lse_BH[index] = torch.logsumexp(scores_KGT, dim=-1).flatten()
        out_KGD = scores_KGT.softmax(-1) @ values_KTD
        out_BHD[index] = out_KGD.reshape(heads, width).to(q_BHD.dtype)
    return out_BHD, lse_BH
