"""The same attention by what torch has: its flash kernel on a CPU, runs of queries elsewhere.

Axes: B batch, Q new queries, T keys, H query heads, K key/value heads, D query/key width,
V value width.
"""

import torch
from torch.nn import functional

from internvideo3.kernels.latent_prefill import naive

MAX_SCORES = 1 << 26
"""Scores held at once where the definition itself has to run."""


def latent_prefill(
    q_BQHD: torch.Tensor,
    k_BTKD: torch.Tensor,
    v_BTKV: torch.Tensor,
    *,
    scale: float,
    offset: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``naive.latent_prefill``; nothing here holds all scores."""
    square = offset == 0 and q_BQHD.shape[1] == k_BTKD.shape[1]
    if q_BQHD.device.type == "cpu" and (square or offset is None):
        return _flash(q_BQHD, k_BTKD, v_BTKV, scale, square)
    batch, queries, heads, _ = q_BQHD.shape
    run = max(1, MAX_SCORES // (batch * heads * k_BTKD.shape[1]))
    found = [
        naive.latent_prefill(
            q_BQHD[:, start : start + run],
            k_BTKD,
            v_BTKV,
            scale=scale,
            offset=None if offset is None else offset + start,
        )
        for start in range(0, queries, run)
    ]
    outs, lses = zip(*found, strict=True)
    return torch.cat(outs, dim=1), torch.cat(lses, dim=2)


def _flash(
    q_BQHD: torch.Tensor, k_BTKD: torch.Tensor, v_BTKV: torch.Tensor, scale: float, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Torch's CPU flash attention; only the operator itself hands out the log-sum-exp."""
    share, width = q_BQHD.shape[2] // k_BTKD.shape[2], v_BTKV.shape[3]
    # The operator takes keys and values of one width, and as many heads as queries have.
    v_BTKD = functional.pad(v_BTKV, (0, k_BTKD.shape[3] - width))
    if share > 1:
        k_BTKD, v_BTKD = (x.repeat_interleave(share, dim=2) for x in (k_BTKD, v_BTKD))
    out_BHQD, lse_BHQ = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *(x.transpose(1, 2) for x in (q_BQHD, k_BTKD, v_BTKD)), is_causal=causal, scale=scale
    )
    return out_BHQD.transpose(1, 2)[..., :width], lse_BHQ
