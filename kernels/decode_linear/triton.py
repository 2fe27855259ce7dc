# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment, var-annotated"
"""Matrix-vector products for one token, with norm, gate and residual fused, in Triton.

Axes: K input width, N output width.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from internvideo3.kernels.triton_overlap import overlap, wait_for_inputs


@dataclass(frozen=True)
class Tile:
    """Which part of the weight one program reads."""

    block_n: int
    """Output rows per program."""
    block_k: int
    """Input columns per step."""
    num_warps: int
    ahead: int
    """Input columns whose weights are read before the input is there."""


TILE = Tile(2, 2048, 4, 4096)
"""The one shipped: on an H200 the best, or as good as the best, of every layer of the 8B shape."""


@triton.jit
def weight_block(row_ptr, first, inside, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Columns [first, first + BLOCK_K) of some rows."""
    column = first + tl.arange(0, BLOCK_K)
    return tl.load(row_ptr + column[None, :], mask=inside & (column < K)[None, :], other=0.0)


@triton.jit
def linear_kernel(
    x_ptr,
    weight_ptr,
    factor_ptr,
    norm_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    eps,
    N: tl.constexpr,
    K: tl.constexpr,
    NORM: tl.constexpr,
    GATED: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    AHEAD: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """BLOCK_N outputs; the norm's scale is a scalar, so it is applied after the product."""
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (row < N)[:, None]
    start = row.to(tl.int64)[:, None] * K
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    acc_factor = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    squares = tl.zeros([BLOCK_K], tl.float32)
    weights = ()
    factors = ()
    for first in tl.static_range(0, AHEAD, BLOCK_K):
        weights = weights + (weight_block(weight_ptr + start, first, inside, K, BLOCK_K),)
        if GATED:
            factors = factors + (weight_block(factor_ptr + start, first, inside, K, BLOCK_K),)
    wait_for_inputs(OVERLAP)
    for first in tl.static_range(0, K, BLOCK_K):
        column = first + tl.arange(0, BLOCK_K)
        real = column < K
        if first < AHEAD:
            weight = weights[first // BLOCK_K]
        else:
            weight = weight_block(weight_ptr + start, first, inside, K, BLOCK_K)
        x = tl.load(x_ptr + column, mask=real, other=0.0).to(tl.float32)
        if NORM:
            squares += x * x
            x = x * tl.load(norm_ptr + column, mask=real, other=0.0).to(tl.float32)
        acc += weight.to(tl.float32) * x[None, :]
        if GATED:
            if first < AHEAD:
                factor = factors[first // BLOCK_K]
            else:
                factor = weight_block(factor_ptr + start, first, inside, K, BLOCK_K)
            acc_factor += factor.to(tl.float32) * x[None, :]
    out = tl.sum(acc, axis=1)
    inverse = 1.0
    if NORM:
        inverse = 1.0 / tl.sqrt(tl.sum(squares, axis=0) / K + eps)
        out = out * inverse
    if GATED:
        out = out / (1.0 + tl.exp(-out)) * (tl.sum(acc_factor, axis=1) * inverse)
    if BIAS:
        out += tl.load(bias_ptr + row, mask=row < N, other=0.0).to(tl.float32)
    if RESIDUAL:
        out += tl.load(residual_ptr + row, mask=row < N, other=0.0).to(tl.float32)
    tl.store(out_ptr + row, out.to(out_ptr.dtype.element_ty), mask=row < N)


def tile_constants(tile: Tile, width: int) -> dict[str, int]:
    """Compile-time arguments of a tile for inputs of a width."""
    whole = triton.cdiv(width, tile.block_k) * tile.block_k
    return {
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "AHEAD": min(whole, triton.cdiv(tile.ahead, tile.block_k) * tile.block_k),
        "num_warps": tile.num_warps,
    }


def decode_linear(
    x_BK: torch.Tensor,
    weight_NK: torch.Tensor,
    *,
    norm_weight_K: torch.Tensor | None = None,
    factor_NK: torch.Tensor | None = None,
    bias_N: torch.Tensor | None = None,
    residual_BN: torch.Tensor | None = None,
    eps: float = 1e-6,
    tile: Tile,
) -> torch.Tensor:
    """Multiply one token (B = 1) by contiguous weights; see ``naive.decode_linear``."""
    n_out, width = weight_NK.shape
    out_BN = torch.empty(1, n_out, dtype=x_BK.dtype, device=x_BK.device)

    def or_x(tensor: torch.Tensor | None) -> torch.Tensor:
        return x_BK if tensor is None else tensor

    linear_kernel[(triton.cdiv(n_out, tile.block_n),)](
        x_BK,
        weight_NK,
        or_x(factor_NK),
        or_x(norm_weight_K),
        or_x(bias_N),
        or_x(residual_BN),
        out_BN,
        eps,
        N=n_out,
        K=width,
        NORM=norm_weight_K is not None,
        GATED=factor_NK is not None,
        BIAS=bias_N is not None,
        RESIDUAL=residual_BN is not None,
        **tile_constants(tile, width),
        **overlap(x_BK),
    )
    return out_BN
