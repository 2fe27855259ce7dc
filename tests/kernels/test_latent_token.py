"""A token's row and queries under the interpreter against float64.

.venv/bin/python -m pytest tests/kernels/test_latent_token.py -q
"""

import pytest
import torch
from nearness import assert_near

from internvideo3.kernels.latent_token import naive
from internvideo3.kernels.latent_token import triton as token


def maps_of(
    heads: int, kv_heads: int, dim: int, width: int, rotary: int, dtype: torch.dtype
) -> naive.TokenMaps:
    drawn = torch.Generator().manual_seed(heads * width)

    def randn(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=drawn).to(dtype)

    return naive.TokenMaps(
        q_norm_D=randn(dim),
        k_norm_D=randn(dim),
        eps=1e-6,
        row_WE=randn(width, 2 * kv_heads * dim),
        bias_W=randn(width),
        gain_2HF=randn(2, heads, dim // 2),
        k_up_KDR=randn(kv_heads, dim, width - 2 * rotary),
        read_2SH=randn(2, rotary, heads),
        frequency_S=torch.randint(dim // 2, (rotary,), generator=drawn),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "rank", "rotary"),
    [
        (4, 2, 32, 96, 16),
        (4, 4, 16, 50, 8),
        (6, 2, 64, 70, 1),
        (1, 1, 16, 3, 2),
        (8, 8, 32, 65, 32),
        (2, 1, 128, 448, 32),
        (8, 2, 16, 40, 4),
        (12, 4, 32, 100, 16),
        (3, 1, 64, 33, 8),
        (16, 8, 16, 17, 16),
    ],
)
def test_row_and_queries(
    heads: int, kv_heads: int, dim: int, rank: int, rotary: int, batch: int, dtype: torch.dtype
) -> None:
    width = rank + 2 * rotary
    maps = maps_of(heads, kv_heads, dim, width, rotary, dtype)
    drawn = torch.Generator().manual_seed(batch)
    qkv = torch.randn(batch, (heads + 2 * kv_heads) * dim, generator=drawn).to(dtype)
    qkv[0] *= 1e-3  # so small that eps decides
    angle = torch.randn(batch, rotary, generator=drawn)
    slots = torch.tensor([4, 0, 2][:batch])
    rows = torch.full((6, width), 7.0, dtype=dtype)
    q = token.latent_token(qkv, maps, angle.cos(), angle.sin(), slots, rows)
    wide = torch.full((6, width), 7.0, dtype=torch.float64)
    cos, sin = angle.cos().double(), angle.sin().double()
    expected = naive.latent_token(qkv.double(), naive.widened(maps), cos, sin, slots, wide)
    assert q.dtype == dtype
    assert_near(q, expected, roundings=3)
    assert_near(rows[slots], wide[slots], roundings=3)
    assert (rows[[1, 3, 5]] == 7).all()


def test_the_real_shape() -> None:
    maps = maps_of(32, 8, 128, 1024, 64, torch.float32)
    drawn = torch.Generator().manual_seed(5)
    qkv = torch.randn(1, 48 * 128, generator=drawn)
    angle = torch.randn(1, 64, generator=drawn)
    rows, wide = torch.zeros(2, 1024), torch.zeros(2, 1024, dtype=torch.float64)
    slots = torch.tensor([1])
    q = token.latent_token(qkv, maps, angle.cos(), angle.sin(), slots, rows)
    cos, sin = angle.cos().double(), angle.sin().double()
    expected = naive.latent_token(qkv.double(), naive.widened(maps), cos, sin, slots, wide)
    assert_near(q, expected)
    assert_near(rows, wide)
