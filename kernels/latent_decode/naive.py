"""Absorbed latent attention for one new token per sequence, in plain torch.

Axes: B batch, H query heads, T cached tokens, R row width, V value width (V <= R).
"""

import torch


def latent_decode(
    q_BHR: torch.Tensor,
    rows_BTR: torch.Tensor,
    lengths_B: torch.Tensor,
    *,
    scale: float,
    value_width: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend from absorbed queries over latent rows ``[c | k_rope]``.

    Every head reads the same rows: they are the keys, and their first ``value_width`` columns (the
    latent c) are the values. The up-projections are folded into the query and applied to the
    output by the caller (README, equations 1-3).

    Args:
        q_BHR: absorbed query ``[q_nope W_UK | q_rope]``.
        rows_BTR: cached rows; those at or beyond a sequence's length are never read.
        lengths_B: valid tokens of each sequence (integer).
        scale: factor on the scores, ``1 / sqrt(d_nope + d_rope)``.
        value_width: rank r of the latent.

    Returns:
        Latent output ``[B, H, V]`` in the dtype of q, and natural-log log-sum-exp ``[B, H]`` in at
        least float32. A sequence of length 0 gives zeros and ``-inf``.
    """
    wide = torch.promote_types(q_BHR.dtype, torch.float32)
    batch, heads, _ = q_BHR.shape
    out_BHV = torch.zeros(batch, heads, value_width, dtype=q_BHR.dtype, device=q_BHR.device)
    lse_BH = torch.full((batch, heads), float("-inf"), dtype=wide, device=q_BHR.device)
    for index, length in enumerate(lengths_B.tolist()):
        if length == 0:
            continue
        rows_TR = rows_BTR[index, :length].to(wide)
        scores_HT = scale * (q_BHR[index].to(wide) @ rows_TR.T)
        lse_BH[index] = torch.logsumexp(scores_HT, dim=-1)
        out_BHV[index] = (scores_HT.softmax(-1) @ rows_TR[:, :value_width]).to(q_BHR.dtype)
    return out_BHV, lse_BH
