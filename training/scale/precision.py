"""Which number type the scale model's matrix products use while it trains."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch


def native_bfloat16() -> bool:
    """Whether this CPU multiplies bf16 in hardware; emulated, a step takes eight times longer."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def products(bfloat16: bool) -> AbstractContextManager[None]:
    """A context in which matrix products run in bf16, or in float32 as the weights are."""
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16)
