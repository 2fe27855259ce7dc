"""Absorbed decode under the interpreter against float64.

.venv/bin/python -m pytest tests/kernels/test_latent_decode.py -q
"""

import pytest
import torch
from nearness import assert_near

from internvideo3.kernels.latent_decode import naive
from internvideo3.kernels.latent_decode.triton import Tile, latent_decode

SMALL = Tile("transposed", 16, 4, 2)


def check(
    lengths: list[int], heads: int, width: int, value: int, splits: int, tile: Tile,
    dtype: torch.dtype = torch.float32, seed: int = 0,
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    capacity = max(*lengths, 1) + 3
    q = torch.randn(len(lengths), heads, width, generator=generator).to(dtype)
    rows = torch.randn(len(lengths), capacity, width, generator=generator).to(dtype)
    lengths_B = torch.tensor(lengths, dtype=torch.int32)
    scale = width**-0.5
    poisoned = rows.clone()
    for index, length in enumerate(lengths):
        poisoned[index, length:] = float("nan")
    out, lse = latent_decode(
        q, poisoned, lengths_B, scale=scale, value_width=value, n_splits=splits, tile=tile
    )
    expected, expected_lse = naive.latent_decode(
        q.double(), rows.double(), lengths_B, scale=scale, value_width=value
    )
    assert out.dtype == dtype
    assert_near(out, expected)
    live = ~expected_lse.isinf()
    assert torch.equal(lse.isinf(), expected_lse.isinf())
    assert torch.allclose(lse[live].double(), expected_lse[live], atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("length", [1, 15, 16, 17, 33, 100, 257])
def test_lengths(length: int, dtype: torch.dtype) -> None:
    check([length], heads=8, width=256, value=224, splits=3, tile=SMALL, dtype=dtype)


@pytest.mark.parametrize("splits", [1, 2, 5, 40])
def test_splits_may_be_empty(splits: int) -> None:
    check([70], heads=8, width=128, value=96, splits=splits, tile=SMALL)


@pytest.mark.parametrize("lengths", [[0, 1], [5, 64, 33], [16, 0, 0, 31]])
def test_ragged_batch(lengths: list[int]) -> None:
    check(lengths, heads=8, width=128, value=128, splits=4, tile=SMALL)


@pytest.mark.parametrize("heads", [1, 5, 16, 32])
def test_heads(heads: int) -> None:
    check([41], heads=heads, width=128, value=112, splits=2, tile=SMALL)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("width", "value", "tile"),
    [
        (1024, 896, Tile("transposed", 32, 8, 3)),
        (512, 384, Tile("transposed", 64, 8, 2)),
        (576, 512, Tile("transposed", 64, 8, 2)),
        (576, 512, Tile("transposed", 32, 4, 3)),
    ],
    ids=["1024", "512", "576n64", "576n32"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_shipped_widths(width: int, value: int, tile: Tile, dtype: torch.dtype) -> None:
    check([203], heads=32, width=width, value=value, splits=3, tile=tile, dtype=dtype)


def test_large_scores_do_not_overflow() -> None:
    q = torch.full((1, 4, 64), 30.0)
    rows = torch.randn(1, 50, 64, generator=torch.Generator().manual_seed(1)) * 30
    length = torch.tensor([50], dtype=torch.int32)
    out, lse = latent_decode(q, rows, length, scale=1.0, value_width=64, n_splits=2, tile=SMALL)
    expected, expected_lse = naive.latent_decode(
        q.double(), rows.double(), length, scale=1.0, value_width=64
    )
    assert_near(out, expected)
    assert torch.allclose(lse.double(), expected_lse, rtol=1e-6)
