"""Causal attention with unequal query/key and value widths, in plain torch.

Axes: B batch, Q new queries, T keys, H query heads, K key/value heads, D query/key width,
V value width.
"""

import torch


def latent_prefill(
    q_BQHD: torch.Tensor,
    k_BTKD: torch.Tensor,
    v_BTKV: torch.Tensor,
    *,
    scale: float,
    offset: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend from a chunk of queries over reconstructed keys and values.

    Args:
        q_BQHD: queries ``[q_nope | q_rope]``; head h reads key/value head ``h // (H // K)``.
        k_BTKD: keys ``[k_nope | k_rope]``.
        v_BTKV: values.
        scale: factor on the scores.
        offset: query i sees key j when ``j <= i + offset`` (``T - Q`` for a chunk at the end);
            None sees every key.

    Returns:
        Output ``[B, Q, H, V]`` in the dtype of q, and natural-log log-sum-exp ``[B, H, Q]`` in at
        least float32. A query that sees no key gives zeros and ``-inf``.
    """
    wide = torch.promote_types(q_BQHD.dtype, torch.float32)
    share = q_BQHD.shape[2] // k_BTKD.shape[2]
    k_BTHD = k_BTKD.to(wide).repeat_interleave(share, dim=2)
    v_BTHV = v_BTKV.to(wide).repeat_interleave(share, dim=2)
    scores_BHQT = scale * torch.einsum("bqhd,bthd->bhqt", q_BQHD.to(wide), k_BTHD)
    if offset is not None:
        query = torch.arange(q_BQHD.shape[1], device=q_BQHD.device)[:, None]
        key = torch.arange(k_BTKD.shape[1], device=q_BQHD.device)[None, :]
        scores_BHQT = scores_BHQT.masked_fill(key > query + offset, float("-inf"))
    lse_BHQ = torch.logsumexp(scores_BHQT, dim=-1)
    # A row that is -inf everywhere would give NaN: it attends to nothing.
    weights_BHQT = torch.exp(scores_BHQT - lse_BHQ.nan_to_num(neginf=0.0)[..., None])
    out_BQHV = torch.einsum("bhqt,bthv->bqhv", weights_BHQT, v_BTHV)
    return out_BQHV.to(q_BQHD.dtype), lse_BHQ
