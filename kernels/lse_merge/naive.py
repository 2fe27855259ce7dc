"""Join attention outputs of disjoint token ranges by their log-sum-exp, in plain torch.

Axes: B batch, S splits (token ranges), H heads, V value width.
"""

import math

import torch

LN2 = math.log(2.0)


def lse_merge(
    parts_BSHV: torch.Tensor, log2_lse_BSH: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge partial attention outputs.

    Each part is a softmax over its own tokens only, so the softmax over all of them is the mean of
    the parts weighted by ``2 ** log2_lse``. A part with ``-inf`` saw no token: its values are
    ignored, even when they are NaN.

    Args:
        parts_BSHV: normalised partial outputs, any float dtype.
        log2_lse_BSH: base-2 log-sum-exp of each part's scaled scores.

    Returns:
        Merged output ``[B, H, V]`` and natural-log log-sum-exp ``[B, H]`` (``-inf`` and zeros where
        no part saw a token), both in at least float32.
    """
    wide = torch.promote_types(parts_BSHV.dtype, torch.float32)
    log2_lse_BSH = log2_lse_BSH.to(wide)
    top_BH = log2_lse_BSH.amax(dim=1)
    safe_BH = torch.where(top_BH.isinf(), torch.zeros_like(top_BH), top_BH)
    weights_BSH = torch.exp2(log2_lse_BSH - safe_BH[:, None])
    seen_BSH1 = (weights_BSH > 0)[..., None]
    parts_BSHV = torch.where(seen_BSH1, parts_BSHV.to(wide), 0.0)
    total_BH = weights_BSH.sum(dim=1)
    out_BHV = torch.einsum("bsh,bshv->bhv", weights_BSH, parts_BSHV)
    out_BHV = out_BHV / torch.where(total_BH == 0, 1.0, total_BH)[..., None]
    return out_BHV, (safe_BH + torch.log2(total_BH)) * LN2
