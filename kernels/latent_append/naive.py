"""Make latent cache rows from projected tokens and write them, in plain torch.

Axes: N tokens, C cache slots, R rank, S rotary slots (2S rotary columns), M modalities.
"""

import torch


def rotate(x_NW: torch.Tensor, cos_NS: torch.Tensor, sin_NS: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs (s, s + S) of the last axis by the given angles."""
    first_NS, second_NS = x_NW.chunk(2, dim=-1)
    return torch.cat(
        (first_NS * cos_NS - second_NS * sin_NS, second_NS * cos_NS + first_NS * sin_NS), dim=-1
    )


def latent_append(
    projected_NW: torch.Tensor,
    cos_NS: torch.Tensor,
    sin_NS: torch.Tensor,
    slots_N: torch.Tensor,
    rows_CW: torch.Tensor,
    *,
    norm_weight_R: torch.Tensor | None = None,
    eps: float = 1e-6,
    gain_MR: torch.Tensor | None = None,
    bias_MR: torch.Tensor | None = None,
    modality_N: torch.Tensor | None = None,
) -> None:
    """Write ``[affine(norm(c)) | rotate(k_rope)]`` of each token at its slot, in place.

    Args:
        projected_NW: output of the key/value down-projection, ``[c | k_rope]``, W = R + 2S.
        cos_NS: cosines of each token's rotary angles.
        sin_NS: sines.
        slots_N: slot of each token (int64); a negative slot is skipped.
        rows_CW: the cache.
        norm_weight_R: RMS-norm gains on c; None leaves c as it is.
        eps: added to the mean square.
        gain_MR: modality adapter gains; needs ``bias_MR`` and ``modality_N``.
        bias_MR: modality adapter biases.
        modality_N: modality of each token (integer).
    """
    wide = torch.promote_types(projected_NW.dtype, torch.float32)
    rotary = 2 * cos_NS.shape[1]
    x_NW = projected_NW.to(wide)
    c_NR, k_N2S = x_NW[:, :-rotary], x_NW[:, -rotary:]
    if norm_weight_R is not None:
        c_NR = c_NR * torch.rsqrt(c_NR.square().mean(-1, keepdim=True) + eps)
        c_NR = c_NR * norm_weight_R.to(wide)
    if gain_MR is not None and bias_MR is not None and modality_N is not None:
        kind_N = modality_N.long()
        c_NR = c_NR * gain_MR.to(wide)[kind_N] + bias_MR.to(wide)[kind_N]
    k_N2S = rotate(k_N2S, cos_NS.to(wide), sin_NS.to(wide))
    keep_N = slots_N >= 0
    rows_NW = torch.cat((c_NR, k_N2S), dim=-1).to(rows_CW.dtype)
    rows_CW[slots_N[keep_N]] = rows_NW[keep_N]
