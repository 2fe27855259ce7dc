"""Absorbed latent attention for one new token per sequence, in plain torch.

Axes: B sequences, b = B or 1, H query heads, T cached tokens, W row width, V value width (the
query's rank), R rank of a run (R <= V <= W).
"""

from collections.abc import Sequence

import torch

from internvideo3.kernels.latent_decode.rows import Rows


def latent_decode(
    q_BHW: torch.Tensor,
    rows_BTW: torch.Tensor,
    lengths_B: torch.Tensor,
    *,
    scale: float,
    value_width: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend over one contiguous run of rows; see ``decode_runs``."""
    run = Rows(rows_bTW=rows_BTW, lengths_B=lengths_B, rank=value_width)
    return decode_runs(q_BHW, [run], scale=scale, value_width=value_width)


def decode_runs(
    q_BHW: torch.Tensor, runs: Sequence[Rows], *, scale: float, value_width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend from absorbed queries over the latent rows ``[c | k_rope]`` of several runs.

    Every head reads the same rows: they are the keys, and their latent columns are the values. The
    up-projections are folded into the query and applied to the output by the caller (README,
    equations 1-3). A run of a smaller, nested rank R meets the query's first R columns and its
    rotary ones; its values are zero beyond R.

    Args:
        q_BHW: absorbed query ``[q_nope W_UK | q_rope]``.
        runs: cached rows; those at or beyond a sequence's length are never read.
        scale: factor on the scores, ``1 / sqrt(d_nope + d_rope)``.
        value_width: rank V of the query.

    Returns:
        Latent output ``[B, H, V]`` in the dtype of q, and natural-log log-sum-exp ``[B, H]`` in at
        least float32. A sequence without tokens gives zeros and ``-inf``.
    """
    wide = torch.promote_types(q_BHW.dtype, torch.float32)
    q = scale * q_BHW.to(wide)
    scores, values = [], []
    for run in runs:
        rows_bTW, valid_BT = _read(run, wide)
        mine = torch.cat((q[..., : run.rank], q[..., value_width:]), dim=-1)
        scores_BHT = _times(mine, rows_bTW.mT)
        scores.append(scores_BHT.masked_fill(~valid_BT[:, None], float("-inf")))
        values.append(rows_bTW[..., : run.rank])
    joined_BHT = torch.cat(scores, dim=-1)
    lse_BH = torch.logsumexp(joined_BHT, dim=-1)
    # A sequence that sees nothing would give NaN: its weights are zero.
    weights_BHT = torch.exp(joined_BHT - lse_BH.nan_to_num(neginf=0.0)[..., None])
    out_BHV = q.new_zeros(*q.shape[:2], value_width)
    for weight, value in zip(weights_BHT.split([s.shape[-1] for s in scores], -1), values,
                             strict=True):  # fmt: skip
        out_BHV[..., : value.shape[-1]] += _times(weight, value)
    return out_BHV.to(q_BHW.dtype), lse_BH


def _read(run: Rows, wide: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows ``[b, T, W]`` up to the longest sequence, zero where invalid, and ``valid [B, T]``."""
    rows, rope, factor = run.rows_bTW, run.rope_bTS, run.scale_bT
    if run.pages_BN is not None:
        index_BN = run.pages_BN.long()
        rows = rows[index_BN].flatten(1, 2)
        rope = None if rope is None else rope[index_BN].flatten(1, 2)
        factor = None if factor is None else factor[index_BN].flatten(1, 2)
    longest = int(run.lengths_B.max())
    rows = rows[:, :longest].to(wide)
    if factor is not None and rope is not None:
        rows = rows * factor[:, :longest, None].to(wide)
        rows = torch.cat((rows, rope[:, :longest].to(wide)), dim=-1)
    valid_BT = torch.arange(longest, device=rows.device) < run.lengths_B[:, None]
    if rows.shape[0] > 1 and not bool(valid_BT.all()):
        rows = rows.masked_fill(~valid_BT[..., None], 0.0)
    return rows, valid_BT


def _times(x_BHT: torch.Tensor, y_bTV: torch.Tensor) -> torch.Tensor:
    """Batched product; a shared factor is read once, as one product over all rows."""
    return x_BHT @ (y_bTV[0] if y_bTV.shape[0] == 1 else y_bTV)
