"""The forms of cached rows beyond one contiguous run: checked against float64, and timed.

Axes: B sequences, T tokens, W row width, R rank.
"""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from internvideo3.harness.gpu.measure import poisoned, rotation, time_calls, timing_fields
from internvideo3.kernels.choice import multiprocessors
from internvideo3.kernels.latent_decode import naive
from internvideo3.kernels.latent_decode import triton as latent
from internvideo3.kernels.latent_decode.rows import Rows, quantize

FORMS = ("paged", "fp8", "paged-fp8", "shared", "nested")
HEADS = 32
PAGE = 128
SMALL = 0.01
"""Size of latents whose weights would leave float16's range if they were not held in."""
NESTED_RANK = 384
"""Of vision rows of 512 numbers beside text rows of 1024."""


def make_runs(
    form: str, width: int, rank: int, lengths: tuple[int, ...], device: torch.device,
    dtype: torch.dtype,
) -> list[Rows]:  # fmt: skip
    """Random rows of sequences in a form; a prefix of half the longest where one is shared.

    What lies behind a sequence's end is NaN.
    """

    def plain(copies: int, tokens: int, row_width: int) -> torch.Tensor:
        tokens = -(-tokens // PAGE) * PAGE + PAGE
        return torch.randn(copies, tokens, row_width, device=device, dtype=dtype)

    lengths_B = torch.tensor(lengths, dtype=torch.int32, device=device)
    own = Rows(rows_bTW=plain(len(lengths), max(lengths), width), lengths_B=lengths_B, rank=rank)
    _hide_ends(own.rows_bTW, lengths)
    if form == "shared":
        half = max(lengths) // 2
        shared = replace(
            own, rows_bTW=plain(1, half, width), lengths_B=torch.full_like(lengths_B, half)
        )
        return [shared, own]
    if form == "nested":
        rope = width - rank
        small = plain(len(lengths), max(lengths), NESTED_RANK + rope)
        _hide_ends(small, lengths)
        return [replace(own, rows_bTW=small, rank=NESTED_RANK), own]
    if form == "fp8-small":
        own.rows_bTW[..., :rank] *= SMALL
    if "fp8" in form:
        own = quantize(own.rows_bTW, lengths_B, rank)
    return [_paged(own) if form.startswith("paged") else own]


def _hide_ends(rows_BTW: torch.Tensor, lengths: tuple[int, ...]) -> None:
    for index, length in enumerate(lengths):
        rows_BTW[index, length:] = float("nan")


def _paged(run: Rows) -> Rows:
    """The same rows in a pool of pages in random order."""
    copies, tokens = run.rows_bTW.shape[:2]
    count = tokens // PAGE
    order = torch.randperm(copies * count, device=run.rows_bTW.device)

    def pool(tensor: torch.Tensor) -> torch.Tensor:
        made = torch.empty_like(tensor).view(copies * count, PAGE, *tensor.shape[2:])
        made[order] = tensor.reshape(copies * count, PAGE, *tensor.shape[2:])
        return made

    return replace(
        run,
        rows_bTW=pool(run.rows_bTW.view(torch.uint8)).view(run.rows_bTW.dtype),
        rope_bTS=None if run.rope_bTS is None else pool(run.rope_bTS),
        scale_bT=None if run.scale_bT is None else pool(run.scale_bT),
        pages_BN=order.view(copies, count).int(),
    )


def check_rows(
    form: str, width: int, rank: int, lengths: tuple[int, ...], dtype: torch.dtype,
    device: torch.device,
) -> float:  # fmt: skip
    """Relative error of the shipped kernels against float64."""
    runs = make_runs(form, width, rank, lengths, device, dtype)
    q = 3 * torch.randn(len(lengths), HEADS, width, device=device, dtype=dtype)
    if form == "fp8-small":
        q[..., :rank] /= SMALL
    options: dict[str, Any] = {"scale": width**-0.5, "value_width": rank}
    wide = [_doubled(run) for run in runs]
    expected, _ = naive.decode_runs(q.double(), wide, **options)
    with poisoned():
        out, _ = latent.decode_runs(q, runs, multiprocessors=multiprocessors(device), **options)
    return float((out.double() - expected).norm() / expected.norm())


def _doubled(run: Rows) -> Rows:
    """Rows in float64; fp8 ones stay, and are multiplied out in float64."""
    if run.scale_bT is not None:
        return run
    return replace(run, rows_bTW=run.rows_bTW.double())


def checks(
    widths: dict[str, tuple[int, int]], lengths: tuple[int, ...], dtype: torch.dtype
) -> dict[str, Callable[[torch.device], float]]:
    """A check of every form of every width that has it, by name."""
    return {
        f"rows-{form}/{kind}": functools.partial(check_rows, form, width, rank, lengths, dtype)
        for kind, (width, rank) in widths.items()
        for form in (*FORMS, "fp8-small")
        if form != "nested" or width == 1024
    }


def time_form(
    form: str, width: int, rank: int, tokens: int, dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    """Time one sequence; the bytes are those of the rows that are read."""
    runs = make_runs(form, width, rank, (tokens,), device, dtype)
    q = torch.randn(1, HEADS, width, device=device, dtype=dtype)
    size = sum(_bytes_of_token(run) for run in runs) * tokens
    others = (
        make_runs(form, width, rank, (tokens,), device, dtype)
        for _ in range(rotation(device, size) - 1)
    )
    options = {
        "scale": width**-0.5,
        "value_width": rank,
        "multiprocessors": multiprocessors(device),
    }
    calls = [functools.partial(latent.decode_runs, q, one, **options) for one in (runs, *others)]
    timing = time_calls(calls, device)
    about = {"tokens": tokens, "bytes": size, "bytes_per_s": size / timing.median_s}
    return about | timing_fields(timing)


def _bytes_of_token(run: Rows) -> int:
    rope = 0 if run.rope_bTS is None else run.rope_bTS.shape[-1] * run.rope_bTS.element_size()
    scale = 0 if run.scale_bT is None else run.scale_bT.element_size()
    return run.rows_bTW.shape[-1] * run.rows_bTW.element_size() + rope + scale
