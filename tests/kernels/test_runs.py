"""Decode over several runs of cached tokens, as the engine has them, against float64.

Shared prefixes and own tails, nested ranks, pages, fp8 rows; whatever must not be read is NaN.

.venv/bin/python -m pytest tests/kernels/test_runs.py -q
"""

import warnings
from dataclasses import replace

import pytest
import torch
from nearness import assert_near

from internvideo3.kernels import choice
from internvideo3.kernels.choice import interpreted
from internvideo3.kernels.gqa_decode import dispatch as gqa
from internvideo3.kernels.gqa_decode import naive as gqa_naive
from internvideo3.kernels.gqa_decode.naive import KeysValues
from internvideo3.kernels.latent_decode import dispatch, naive
from internvideo3.kernels.latent_decode import triton as latent
from internvideo3.kernels.latent_decode.dispatch import WIDEST, is_static
from internvideo3.kernels.latent_decode.rows import FP8_LARGEST, Rows, quantize
from internvideo3.kernels.latent_prefill import dispatch as prefill_dispatch
from internvideo3.model.checkpoint import WIDEST_ROW

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
HEADS = 4
PAGE = 16
NAN = float("nan")


@pytest.fixture(autouse=True)
def small_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles for small rows, so that the interpreter has few programs to run."""
    plan = latent.Plan(latent.Tile("transposed", 16, 4, 2), 1)
    for plans in (latent.PLANS, latent.PAGED_PLANS, latent.FP8_PLANS):
        for width in plans:
            monkeypatch.setitem(plans, width, plan)


def int32(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def make_run(
    lengths: list[int], rank: int, rope: int, dtype: torch.dtype, *,
    shared: bool = False, paged: bool = False, fp8: bool = False, seed: int = 0,
) -> Rows:  # fmt: skip
    """Random rows, NaN wherever no sequence has a token."""
    drawn = torch.Generator().manual_seed(seed)
    copies = 1 if shared else len(lengths)
    capacity = -(-max(*lengths, 1) // PAGE) * PAGE + PAGE
    rows = torch.randn(copies, capacity, rank + rope, generator=drawn).to(dtype)
    run = Rows(rows_bTW=rows, lengths_B=int32(lengths), rank=rank)
    if fp8:
        run = quantize(rows, run.lengths_B, rank)
    run = poison(run, [max(lengths)] if shared else lengths)
    return to_pages(run, lengths, shared=shared) if paged else run


def poison(run: Rows, lengths: list[int]) -> Rows:
    for tensor in (run.rows_bTW, run.rope_bTS, run.scale_bT):
        for index, length in enumerate(lengths):
            if tensor is not None:
                raw = tensor[index, length:]
                raw.copy_(torch.full_like(raw, NAN, dtype=torch.float32).to(raw.dtype))
    return run


def to_pages(run: Rows, lengths: list[int], *, shared: bool) -> Rows:
    """The same rows in a pool, pages dealt out in a random order, the first one unused."""
    copies, capacity, _ = run.rows_bTW.shape
    count = capacity // PAGE
    order = 1 + torch.randperm(copies * count, generator=torch.Generator().manual_seed(3))
    pages = order.view(copies, count).int()

    def pool(tensor: torch.Tensor | None) -> torch.Tensor | None:
        if tensor is None:
            return None
        made = torch.full((copies * count + 1, PAGE, *tensor.shape[2:]), NAN).to(tensor.dtype)
        made[order] = tensor.unflatten(1, (count, PAGE)).flatten(0, 1)
        return made

    rows = pool(run.rows_bTW)
    assert rows is not None
    table = pages.expand(len(lengths), -1).contiguous() if shared else pages
    return replace(
        run,
        rows_bTW=rows,
        rope_bTS=pool(run.rope_bTS),
        scale_bT=pool(run.scale_bT),
        pages_BN=table,
    )


def doubled(run: Rows) -> Rows:
    """For the reference: float64 and no NaN, which a weight of zero would not undo."""
    rows = run.rows_bTW.double().nan_to_num(0.0)
    rope = None if run.rope_bTS is None else run.rope_bTS.double().nan_to_num(0.0)
    scale = None if run.scale_bT is None else run.scale_bT.double().nan_to_num(0.0)
    return replace(run, rows_bTW=rows, rope_bTS=rope, scale_bT=scale)


def compare(runs: list[Rows], rank: int, rope: int, dtype: torch.dtype) -> None:
    drawn = torch.Generator().manual_seed(9)
    batch = len(runs[0].lengths_B)
    # Heads lie apart, as they do in a projection of all of them.
    q = torch.randn(batch, HEADS, rank + rope + 16, generator=drawn).to(dtype)[..., :-16]
    options = {"scale": (rank + rope) ** -0.5, "value_width": rank}
    out, lse = latent.decode_runs(q, runs, multiprocessors=3, **options)  # type: ignore[arg-type]
    want, want_lse = naive.decode_runs(q.double(), [doubled(r) for r in runs], **options)  # type: ignore[arg-type]
    assert out.dtype == dtype
    assert_near(out, want, roundings=3)
    assert torch.allclose(lse.double(), want_lse, atol=1e-4)


@DTYPES
@pytest.mark.parametrize("paged", [False, True], ids=["contiguous", "paged"])
@pytest.mark.parametrize(
    ("rank", "rope", "fp8"),
    [(96, 32, False), (64, 32, False), (96, 32, True), (96, 16, True), (64, 32, True)],
)
@pytest.mark.parametrize("lengths", [[37], [1, 64, 30], [16, 0, 47]])
def test_one_run(
    lengths: list[int], rank: int, rope: int, fp8: bool, paged: bool, dtype: torch.dtype
) -> None:
    compare([make_run(lengths, rank, rope, dtype, fp8=fp8, paged=paged)], rank, rope, dtype)


@DTYPES
@pytest.mark.parametrize("fp8", [False, True], ids=["plain", "fp8"])
@pytest.mark.parametrize("paged", [False, True], ids=["contiguous", "paged"])
@pytest.mark.parametrize("batch", [1, 3])
def test_forks_share_a_prefix(batch: int, paged: bool, fp8: bool, dtype: torch.dtype) -> None:
    kind = {"fp8": fp8, "paged": paged}
    prefix = make_run([50] * batch, 96, 32, dtype, shared=True, **kind)
    own = make_run([5, 21, 9][:batch], 96, 32, dtype, seed=1, **kind)
    compare([prefix, own], 96, 32, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("amplitude", [1e-3, 1e-2, 1.0, 100.0])
@pytest.mark.parametrize("sink", [0.0, 12.0], ids=["even", "sink"])
def test_fp8_rows_of_any_amplitude(amplitude: float, sink: float, dtype: torch.dtype) -> None:
    """Times a row's scale, weights of small latents would be subnormal in float16."""
    lengths = [47, 20]
    drawn = torch.Generator().manual_seed(0)
    rows = amplitude * torch.randn(2, 64, 128, generator=drawn)
    rows[..., 96:] /= amplitude
    q = torch.randn(2, HEADS, 128, generator=drawn)
    q[..., :96] /= amplitude
    # One token that gets nearly all weight of every head, as first tokens do.
    q[..., 96] = 4.0
    rows[:, 3, 96] = sink * 128**0.5 / 4
    run = quantize(rows.to(dtype), int32(lengths), 96)
    options = {"scale": 128**-0.5, "value_width": 96}
    q = q.to(dtype)
    out, lse = latent.decode_runs(q, [run], multiprocessors=3, **options)  # type: ignore[arg-type]
    want, want_lse = naive.decode_runs(q.double(), [doubled(run)], **options)  # type: ignore[arg-type]
    assert_near(out, want, roundings=3)
    assert torch.allclose(lse.double(), want_lse, atol=1e-4)


@pytest.mark.parametrize("heads", [33, 40, 64])
def test_many_heads_go_in_groups(heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tile of more than 32 does not fit the shared memory of an H100."""
    taken, decode = [], latent.decode_runs
    monkeypatch.setattr(
        latent, "decode_runs", lambda q, *a, **b: taken.append(q.shape[1]) or decode(q, *a, **b)
    )
    run = make_run([37, 20], 48, 16, torch.float32)
    q = torch.randn(2, heads, 64, generator=torch.Generator().manual_seed(2))
    with interpreted():
        out, lse = dispatch.decode_runs(q, [run], scale=0.1, value_width=48)
    want, want_lse = naive.decode_runs(q.double(), [doubled(run)], scale=0.1, value_width=48)
    assert_near(out, want)
    assert torch.allclose(lse.double(), want_lse, atol=1e-4)
    assert sum(taken) == heads and max(taken) <= 32 and max(taken) - min(taken) <= 1


@DTYPES
@pytest.mark.parametrize("nested", [32, 48])
@pytest.mark.parametrize("paged", [False, True], ids=["contiguous", "paged"])
def test_two_ranks_of_one_basis(nested: int, paged: bool, dtype: torch.dtype) -> None:
    """Text at the query's rank, vision at a smaller one; scratch that nobody writes holds NaN."""
    text = make_run([19, 40], 112, 16, dtype)
    vision = make_run([45, 16], nested, 16, dtype, seed=2, paged=paged)
    compare([vision, text], 112, 16, dtype)


def test_nested_rows_equal_wide_ones_with_zeros() -> None:
    """The definition itself: a smaller rank is a wide row whose other columns are zero."""
    drawn = torch.Generator().manual_seed(1)
    q = torch.randn(2, HEADS, 128, generator=drawn, dtype=torch.float64)
    rows = torch.randn(2, 30, 48, generator=drawn, dtype=torch.float64)
    wide = torch.cat((rows[..., :32], torch.zeros(2, 30, 80), rows[..., 32:]), dim=-1)
    lengths = int32([30, 11])
    options = {"scale": 0.1, "value_width": 112}
    small = Rows(rows_bTW=rows, lengths_B=lengths, rank=32)
    large = Rows(rows_bTW=wide, lengths_B=lengths, rank=112)
    for a, b in zip(
        naive.decode_runs(q, [small], **options),  # type: ignore[arg-type]
        naive.decode_runs(q, [large], **options),  # type: ignore[arg-type]
        strict=True,
    ):
        assert torch.allclose(a, b, rtol=1e-12)


def test_fp8_rows_keep_what_e4m3_can_hold() -> None:
    """Three bits of mantissa: a value is off by at most 1/16; the row's largest is exact."""
    rows = torch.randn(2, 9, 40, generator=torch.Generator().manual_seed(0)) * 7
    rows[1, 3] = 0
    made = quantize(rows, int32([9, 9]), 32)
    assert made.scale_bT is not None and made.rope_bTS is not None
    assert made.rows_bTW.float().abs().amax() == FP8_LARGEST
    back = made.rows_bTW.float() * made.scale_bT[..., None]
    large = back.abs() > rows[..., :32].abs().amax(-1, keepdim=True) / 1000
    assert ((back / rows[..., :32] - 1).abs()[large] <= 1 / 16 + 1e-6).all()
    assert torch.equal(back[1, 3], torch.zeros(32))
    assert torch.equal(made.rope_bTS, rows[..., 32:])


def test_a_page_that_no_tile_divides_is_refused() -> None:
    run = make_run([20], 96, 32, torch.float32, paged=True)
    run = replace(run, rows_bTW=run.rows_bTW[:, :10])
    with pytest.raises(ValueError, match="page of 10 tokens"):
        compare([run], 96, 32, torch.float32)


@DTYPES
@pytest.mark.parametrize("heads", [1, 2, 8])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("shared", [False, True], ids=["own", "own and shared"])
def test_gqa_runs(heads: int, batch: int, shared: bool, dtype: torch.dtype) -> None:
    drawn = torch.Generator().manual_seed(4)

    def run(copies: int, lengths: list[int]) -> KeysValues:
        made = [torch.randn(copies, 2, 70, 32, generator=drawn).to(dtype) for _ in range(2)]
        for tensor in made:
            for index in range(copies):
                tensor[index, :, lengths[index] :] = NAN
        keys, values = made
        return KeysValues(keys_bKTD=keys, values_bKTD=values, lengths_B=int32(lengths))

    runs = [run(1, [66] * batch)] if shared else []
    runs.append(run(batch, [33, 65][:batch]))
    q = torch.randn(batch, 2 * heads, 32, generator=drawn).to(dtype)
    with interpreted():
        out, lse = gqa.decode_runs(q, runs, scale=0.2)
    clean = [
        KeysValues(
            keys_bKTD=r.keys_bKTD.double().nan_to_num(0.0),
            values_bKTD=r.values_bKTD.double().nan_to_num(0.0),
            lengths_B=r.lengths_B,
        )
        for r in runs
    ]
    want, want_lse = gqa_naive.decode_runs(q.double(), clean, scale=0.2)
    assert_near(out, want, roundings=3)
    assert torch.allclose(lse.double(), want_lse, atol=1e-4)


def plain_run(width: int, rank: int) -> Rows:
    return Rows(rows_bTW=torch.zeros(1, 1, width), lengths_B=torch.ones(1).int(), rank=rank)


def test_cards_without_the_room_for_a_tile_read_in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """99 KB of shared memory on consumer cards, 163 KB on an A100, which has no e4m3."""
    wide, narrow = plain_run(1024, 896), plain_run(576, 512)
    small = quantize(torch.zeros(1, 1, 576), narrow.lengths_B, 512)
    large = quantize(torch.zeros(1, 1, 1024), narrow.lengths_B, 896)

    def static(shared: int, fp8: bool) -> list[bool]:
        monkeypatch.setattr(choice, "shared_bytes", lambda _: shared)
        monkeypatch.setattr(dispatch, "reads_fp8", lambda _: fp8)
        return [is_static(run, torch.bfloat16) for run in (wide, narrow, small, large)]

    choice._tell_once.cache_clear()
    with pytest.warns(UserWarning, match="147456 bytes of shared memory, of 101376; torch"):
        assert static(101376, True) == [False, True, True, False]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert static(101376, True) == [False, True, True, False]
    assert static(166912, False) == [True, True, False, False]
    assert static(232448, True) == [True] * 4
    assert static(65536, False) == [False] * 4

    monkeypatch.setattr(choice, "shared_bytes", lambda _: 101376)
    cpu = torch.device("cpu")
    assert [gqa.is_static(width, torch.bfloat16, cpu) for width in (128, 256, 100)] == [
        True, False, False,
    ]  # fmt: skip
    # A tile of float32 is smaller; float64 is read by torch, which a graph cannot hold.
    assert gqa.is_static(256, torch.float32, cpu) and not gqa.is_static(128, torch.float64, cpu)
    taken: list[int] = []
    monkeypatch.setattr(
        prefill_dispatch.fused, "latent_prefill", lambda q, *_, **__: taken.append(q.shape[-1])
    )
    monkeypatch.setattr(prefill_dispatch, "wants_triton", lambda _: True)
    q = torch.zeros(1, 2, 1, 256, dtype=torch.bfloat16)
    prefill_dispatch.latent_prefill(q, q, q[..., :128], scale=1.0, offset=None)
    assert taken == [256]


@pytest.mark.parametrize(
    ("width", "dtype", "static"),
    [
        (1024, torch.bfloat16, True),
        (576, torch.float16, True),
        (1024, torch.float32, False),
        (1024, torch.float64, False),
        (640, torch.bfloat16, True),
        (1088, torch.bfloat16, False),
    ],
)
def test_a_graph_holds_only_rows_that_a_kernel_reads(
    width: int, dtype: torch.dtype, static: bool
) -> None:
    run = plain_run(width, width - min(128, width // 8))
    assert is_static(run, dtype) == static
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "triton_is_installed", lambda: False)
        assert not is_static(run, dtype)
    assert WIDEST == WIDEST_ROW, "`inspect` tells another limit than there is"


@DTYPES
@pytest.mark.parametrize("fp8", [False, True], ids=["plain", "fp8"])
@pytest.mark.parametrize(
    ("rank", "rope"), [(80, 24), (72, 4), (40, 24), (33, 7), (5, 2), (100, 60), (17, 16)]
)
def test_rows_of_any_width(rank: int, rope: int, fp8: bool, dtype: torch.dtype) -> None:
    """Columns behind a row's end are its neighbour's, and must not be seen; paged rows too."""
    for paged in (False, True):
        run = make_run([37, 0, 50], rank, rope, dtype, fp8=fp8, paged=paged)
        compare([run], rank, rope, dtype)


@pytest.mark.parametrize("nested", [48, 56])
def test_a_nested_rank_of_any_width(nested: int) -> None:
    text = make_run([19, 40], 72, 24, torch.float32)
    vision = make_run([45, 16], nested, 24, torch.float32, seed=2)
    compare([vision, text], 72, 24, torch.float32)


def test_rows_wider_than_a_tile_are_refused() -> None:
    run = Rows(rows_bTW=torch.zeros(1, 16, 1040), lengths_B=int32([3]), rank=1000)
    with pytest.raises(ValueError, match="rows of 1040; 1024 is the widest"):
        latent.plan_of(run, 32)
