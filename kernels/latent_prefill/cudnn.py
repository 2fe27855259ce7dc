"""The same attention by cuDNN, where torch finds that it can: the fastest on Hopper.

Axes: B batch, Q new queries, T keys, H query heads, K key/value heads, D query/key width,
V value width.
"""

import torch
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention


def fits(
    q_BQHD: torch.Tensor, k_BTKD: torch.Tensor, v_BTKV: torch.Tensor, offset: int | None
) -> bool:
    """Whether cuDNN takes it: no mask, or the causal one of a square."""
    square = offset == 0 and q_BQHD.shape[1] == k_BTKD.shape[1]
    if not q_BQHD.is_cuda or not (square or offset is None):
        return False
    q, k, v = (x.transpose(1, 2) for x in (q_BQHD, k_BTKD, v_BTKV))
    shares = q.shape[1] != k.shape[1]
    return bool(can_use_cudnn_attention(SDPAParams(q, k, v, None, 0.0, square, shares)))


def latent_prefill(
    q_BQHD: torch.Tensor,
    k_BTKD: torch.Tensor,
    v_BTKV: torch.Tensor,
    *,
    scale: float,
    offset: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``naive.latent_prefill``; only the operator itself hands out the log-sum-exp."""
    out_BHQV, lse_BHQ, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        *(x.transpose(1, 2) for x in (q_BQHD, k_BTKD, v_BTKV)),
        None,
        True,
        is_causal=offset is not None,
        scale=scale,
    )
    return out_BHQV.transpose(1, 2), lse_BHQ.reshape(out_BHQV.shape[:3])
