"""One decode step's attention of one 8B layer, three ways side by side, on any device.

M²LA over 1024-wide rows, torch's `scaled_dot_product_attention(enable_gqa=True)`, and our grouped
GQA. On a CPU the step is bound by arithmetic, not by memory, and torch's kernel for one query is
slow, so a comparison with it alone flatters whatever stands beside it.

Axes: B sequences, H query heads, K key/value heads, T cached tokens, D head width, W row width.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from internvideo3.harness.profile.runners import Clock
from internvideo3.kernels.gqa_decode.dispatch import decode_runs as gqa_decode
from internvideo3.kernels.gqa_decode.naive import KeysValues
from internvideo3.kernels.latent_decode.dispatch import decode_runs as latent_decode
from internvideo3.kernels.latent_decode.rows import Rows

HEADS, KV_HEADS, WIDTH, RANK, ROW = 32, 8, 128, 896, 1024


def layer_rows(
    tokens: int, dtype: torch.dtype, device: torch.device, repeats: int
) -> Iterator[dict[str, Any]]:
    """Time each way; its turns alternate with the others', so that load falls on all alike."""
    ways = _ways(tokens, dtype, device)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats + 1):
        for name, call in ways.items():
            clock = Clock(device)
            clock.stamp()
            call()
            clock.stamp()
            if repeat:
                seconds[name] += clock.seconds()
    for name, found in seconds.items():
        yield {
            "way": name,
            "tokens": tokens,
            "dtype": str(dtype).removeprefix("torch."),
            "device": str(device),
            "threads": torch.get_num_threads(),
            "median_s": statistics.median(found),
            "runs_s": found,
        }


def _ways(tokens: int, dtype: torch.dtype, device: torch.device) -> dict[str, Callable[[], object]]:
    drawn = torch.Generator(device).manual_seed(0)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=drawn, device=device, dtype=dtype)

    lengths_B = torch.tensor([tokens], dtype=torch.int32, device=device)
    q_BHD, q_BHW = random(1, HEADS, WIDTH), random(1, HEADS, ROW)
    keys_BKTD, values_BKTD = (random(1, KV_HEADS, tokens, WIDTH) for _ in "kv")
    rows = Rows(rows_bTW=random(1, tokens, ROW), lengths_B=lengths_B, rank=RANK)
    pair = KeysValues(keys_bKTD=keys_BKTD, values_bKTD=values_BKTD, lengths_B=lengths_B)
    scale = WIDTH**-0.5
    return {
        "absorbed M²LA": functools.partial(
            latent_decode, q_BHW, [rows], scale=scale, value_width=RANK
        ),
        "sdpa, enable_gqa": functools.partial(
            scaled_dot_product_attention,
            q_BHD[:, :, None],
            keys_BKTD,
            values_BKTD,
            enable_gqa=True,
        ),
        "grouped GQA": functools.partial(gqa_decode, q_BHD, [pair], scale=scale),
    }
