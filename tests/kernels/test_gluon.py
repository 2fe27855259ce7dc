"""The Gluon kernels' source on a CPU against float64; `gluon_machine` says how.

.venv/bin/python -m pytest tests/kernels/test_gluon.py -q
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from gluon_machine import HazardError, Machine, on_cpu
from nearness import assert_near

from internvideo3.kernels.latent_decode import gluon, gluon_fp8, naive
from internvideo3.kernels.latent_decode.rows import Rows, quantize
from internvideo3.kernels.lse_merge.naive import lse_merge

HEADS = 32
LOG2_E = 1.4426950408889634


def drawn(*shape: int, seed: int, size: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (size * torch.randn(shape, generator=generator)).bfloat16()


def paged(rows: torch.Tensor, page: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A pool of pages in mixed order, and where each sequence's are."""
    B, T = rows.shape[:2]
    pool = rows.unflatten(1, (T // page, page)).flatten(0, 1)
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(7))
    places = order.argsort().view(B, -1).int()
    return pool[order], places


def decoded(
    run: Rows, q_BHW: torch.Tensor, value: int, splits: int, machine: type[Machine] = Machine
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp; a program's last row and query are NaN until it has waited."""
    B = len(q_BHW)
    parts_BSVH = torch.full((B, splits + 2, value, HEADS), float("nan"), dtype=torch.bfloat16)
    lse_BSH = torch.full((B, splits + 2, HEADS), float("-inf"))
    q = q_BHW.clone()
    late, targets = [q_BHW], [q]
    if run.pages_BN is None:
        right = run.rows_bTW if run.rope_bTS is None else run.rope_bTS
        rows = right.clone()
        late, targets = [*late, right], [*targets, rows]
        name = "rows_bTW" if run.rope_bTS is None else "rope_bTS"
        run = replace(run, **{name: rows})

    def hide() -> None:
        q.fill_(float("nan"))
        for index, length in enumerate(run.lengths_B.tolist()):
            for target in targets[1:]:
                target[min(index, len(target) - 1), max(0, length - 1)] = float("nan")

    def show() -> None:
        for target, right in zip(targets, late, strict=True):
            target.copy_(right)

    module, name = (
        (gluon, "hopper_kernel") if run.scale_bT is None else (gluon_fp8, "hopper_fp8_kernel")
    )
    with on_cpu(module, name, start=hide, on_wait=show, machine=machine):
        module.launch(
            q, run, parts_BSVH, lse_BSH,
            scale_log2=q.shape[-1] ** -0.5 * LOG2_E, first_split=1, n_splits=splits,
        )  # fmt: skip
    assert parts_BSVH[:, [0, -1]].isnan().all(), "another run's splits were written"
    parts_BSVH[..., run.rank :, :] = 0.0
    out, lse = lse_merge(parts_BSVH.transpose(2, 3), lse_BSH)
    return out.bfloat16(), lse


def check(run: Rows, q_BHW: torch.Tensor, value: int, splits: int, roundings: int = 3) -> None:
    out, lse = decoded(run, q_BHW, value, splits)
    expected, expected_lse = naive.decode_runs(
        q_BHW.double(), [run], scale=q_BHW.shape[-1] ** -0.5, value_width=value
    )
    assert_near(out, expected, roundings)
    assert torch.equal(lse.isinf(), expected_lse.isinf())
    live = ~lse.isinf()
    assert torch.allclose(lse[live].double(), expected_lse[live], atol=2e-3)


def poisoned(rows: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    for index, length in enumerate(lengths):
        rows[index, length:] = float("nan")
    return rows


@pytest.mark.parametrize(
    ("width", "value", "rank"),
    [(1024, 896, 896), (512, 384, 384), (512, 448, 448), (512, 896, 384), (512, 512, 512)],
)
@pytest.mark.parametrize(
    ("lengths", "splits"), [([1, 0], 2), ([64, 129], 1), ([100, 128], 1), ([257, 300], 3)]
)
def test_bf16_rows(width: int, value: int, rank: int, lengths: list[int], splits: int) -> None:
    tail = width - rank
    q = drawn(2, HEADS, value + tail, seed=1)
    rows = poisoned(drawn(2, max(lengths), width, seed=2), lengths)
    run = Rows(rows_bTW=rows, lengths_B=torch.tensor(lengths, dtype=torch.int32), rank=rank)
    check(run, q, value, splits)


@pytest.mark.parametrize("page", [64, 128])
@pytest.mark.parametrize("fp8", [False, True])
def test_pages(page: int, fp8: bool) -> None:
    lengths = torch.tensor([190, 256], dtype=torch.int32)
    q, rows = drawn(2, HEADS, 1024, seed=1), drawn(2, 256, 1024, seed=2)
    if not fp8:
        pool, pages = paged(rows, page)
        check(Rows(rows_bTW=pool, lengths_B=lengths, rank=896, pages_BN=pages), q, 896, 2)
        return
    made = quantize(rows, lengths, 896)
    assert made.rope_bTS is not None and made.scale_bT is not None
    # Pools hold the same order of pages.
    pool, pages = paged(made.rows_bTW.view(torch.uint8), page)
    rope, _ = paged(made.rope_bTS, page)
    scale, _ = paged(made.scale_bT[..., None], page)
    run = Rows(
        rows_bTW=pool.view(made.rows_bTW.dtype), lengths_B=lengths, rank=896, rope_bTS=rope,
        scale_bT=scale[..., 0].contiguous(), pages_BN=pages,
    )  # fmt: skip
    check(run, q, 896, 2)


@pytest.mark.parametrize("batch", [1, 3])
def test_shared_rows(batch: int) -> None:
    run = Rows(
        rows_bTW=drawn(1, 200, 1024, seed=2),
        lengths_B=torch.full((batch,), 200, dtype=torch.int32),
        rank=896,
    )
    check(run, drawn(batch, HEADS, 1024, seed=1), 896, 2)


@pytest.mark.parametrize("size", [1.0, 1e-4, 30.0])
@pytest.mark.parametrize("rank", [384, 896])
@pytest.mark.parametrize(("lengths", "splits"), [([1, 0], 2), ([64, 129], 1), ([257, 300], 3)])
def test_fp8_rows(rank: int, size: float, lengths: list[int], splits: int) -> None:
    """Latents so small that weights over their scale leave float16's range, too."""
    rows = poisoned(drawn(2, max(lengths), rank + 128, seed=2), lengths)
    rows[..., :rank] *= size
    run = quantize(rows, torch.tensor(lengths, dtype=torch.int32), rank)
    check(run, drawn(2, HEADS, rank + 128, seed=1), rank, splits)


class NoBarriers(Machine):
    def barrier(self) -> None:
        for state in self.states:
            state.read = False


class NoFences(Machine):
    def fence(self) -> None:
        pass


class ShortWaits(Machine):
    def wait_group(self, left: int) -> None:
        super().wait_group(left + 1 if left else 0)


class EarlyProducts(Machine):
    def wait_products(self, left: int, deps: list[Any]) -> Any:
        return super().wait_products(left + 1, deps)


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("machine", [NoBarriers, NoFences, ShortWaits, EarlyProducts])
def test_the_machine_notices(machine: type[Machine], fp8: bool) -> None:
    """A kernel that lacks a barrier or fence, or waits for one copy or product too few."""
    lengths = torch.tensor([300], dtype=torch.int32)
    q, rows = drawn(1, HEADS, 1024, seed=1), drawn(1, 300, 1024, seed=2)
    run = quantize(rows, lengths, 896) if fp8 else Rows(
        rows_bTW=rows, lengths_B=lengths, rank=896
    )  # fmt: skip
    try:
        out, _ = decoded(run, q, 896, 1, machine)
    except HazardError:
        return
    assert out.isnan().any()
