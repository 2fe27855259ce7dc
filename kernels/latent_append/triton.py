# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Norm, modality affine, rotary and cache write of latent rows as one Triton kernel.

Axes: N tokens, C cache slots, W row width, R rank, S rotary slots, M modalities.
"""

import torch
import triton
import triton.language as tl

from internvideo3.kernels.triton_overlap import overlap, wait_for_inputs


@triton.jit
def append_kernel(
    projected_ptr,
    cos_ptr,
    sin_ptr,
    slots_ptr,
    rows_ptr,
    norm_ptr,
    gain_ptr,
    bias_ptr,
    modality_ptr,
    stride_p,
    stride_row,
    eps,
    RANK: tl.constexpr,
    ROTARY: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
    NORM: tl.constexpr,
    AFFINE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One token per program; a negative slot writes nothing."""
    wait_for_inputs(OVERLAP)
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token)
    write = slot >= 0
    column = tl.arange(0, BLOCK_R)
    inside = column < RANK
    c = tl.load(projected_ptr + token * stride_p + column, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        mean_square = tl.sum(c * c, axis=0) / RANK
        gain = tl.load(norm_ptr + column, mask=inside, other=0.0).to(tl.float32)
        c = c / tl.sqrt(mean_square + eps) * gain
    if AFFINE:
        kind = tl.load(modality_ptr + token)
        gain = tl.load(gain_ptr + kind * RANK + column, mask=inside, other=0.0).to(tl.float32)
        bias = tl.load(bias_ptr + kind * RANK + column, mask=inside, other=0.0).to(tl.float32)
        c = c * gain + bias
    dtype = rows_ptr.dtype.element_ty
    row_ptr = rows_ptr + slot * stride_row
    tl.store(row_ptr + column, c.to(dtype), mask=inside & write)

    pair = tl.arange(0, BLOCK_S)
    rotating = pair < ROTARY
    first_ptr = projected_ptr + token * stride_p + RANK + pair
    first = tl.load(first_ptr, mask=rotating, other=0.0).to(tl.float32)
    second = tl.load(first_ptr + ROTARY, mask=rotating, other=0.0).to(tl.float32)
    cos = tl.load(cos_ptr + token * ROTARY + pair, mask=rotating, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + token * ROTARY + pair, mask=rotating, other=0.0).to(tl.float32)
    tl.store(row_ptr + RANK + pair, (first * cos - second * sin).to(dtype), mask=rotating & write)
    tl.store(
        row_ptr + RANK + ROTARY + pair,
        (second * cos + first * sin).to(dtype),
        mask=rotating & write,
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
    """Write the latent rows of N tokens in place; see ``naive.latent_append``.

    ``cos_NS``, ``sin_NS``, the norm and the adapter tensors must be contiguous; ``modality_N`` is
    int32 and ``slots_N`` int64.
    """
    n_tokens, width = projected_NW.shape
    rotary = cos_NS.shape[1]
    rank = width - 2 * rotary
    append_kernel[(n_tokens,)](
        projected_NW,
        cos_NS,
        sin_NS,
        slots_N,
        rows_CW,
        projected_NW if norm_weight_R is None else norm_weight_R,
        projected_NW if gain_MR is None else gain_MR,
        projected_NW if bias_MR is None else bias_MR,
        slots_N if modality_N is None else modality_N,
        projected_NW.stride(0),
        rows_CW.stride(0),
        eps,
        RANK=rank,
        ROTARY=rotary,
        BLOCK_R=triton.next_power_of_2(rank),
        BLOCK_S=triton.next_power_of_2(rotary),
        NORM=norm_weight_R is not None,
        AFFINE=gain_MR is not None,
        **overlap(projected_NW),
        num_warps=4,
    )
