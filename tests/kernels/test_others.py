"""Append, expand, prefill, GQA, merge and linear kernels under the interpreter against float64.

.venv/bin/python -m pytest tests/kernels/test_others.py -q
"""

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from nearness import assert_near

from internvideo3.kernels import choice
from internvideo3.kernels.choice import interpreted
from internvideo3.kernels.decode_linear import batched as linear_batched
from internvideo3.kernels.decode_linear import naive as linear_naive
from internvideo3.kernels.decode_linear import triton as linear
from internvideo3.kernels.gqa_append import naive as gqa_append_naive
from internvideo3.kernels.gqa_append import triton as gqa_append
from internvideo3.kernels.gqa_decode import naive as gqa_naive
from internvideo3.kernels.gqa_decode import triton as gqa
from internvideo3.kernels.latent_append import naive as append_naive
from internvideo3.kernels.latent_append import triton as append
from internvideo3.kernels.latent_expand import naive as expand_naive
from internvideo3.kernels.latent_expand import triton as expand
from internvideo3.kernels.latent_prefill import dispatch as prefill_dispatch
from internvideo3.kernels.latent_prefill import naive as prefill_naive
from internvideo3.kernels.latent_prefill import triton as prefill
from internvideo3.kernels.lse_merge import naive as merge_naive
from internvideo3.kernels.lse_merge import triton as merge

KERNELS = Path(__file__).parents[2] / "kernels"
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def randn(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed + sum(size)))


def doubled(*tensors: torch.Tensor) -> Any:
    return tuple(t.double() for t in tensors)


@DTYPES
@pytest.mark.parametrize("lengths", [[1], [63], [64], [65], [130, 0, 17]])
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 2), (32, 8), (4, 4)])
def test_gqa_decode(lengths: list[int], heads: int, kv_heads: int, dtype: torch.dtype) -> None:
    # Each with strides of its own: heads of a projection, a cache of keys and one of values.
    q = randn(len(lengths), heads, 40).to(dtype)[..., :32]
    keys = randn(len(lengths), kv_heads, 140, 32, seed=1).to(dtype)
    values = randn(len(lengths), 140, kv_heads, 48, seed=2).to(dtype).transpose(1, 2)[..., :32]
    lengths_B = torch.tensor(lengths, dtype=torch.int32)
    expected, expected_lse = gqa_naive.gqa_decode(*doubled(q, keys, values), lengths_B, scale=0.2)
    for index, length in enumerate(lengths):
        keys[index, :, length:] = float("nan")
        values[index, :, length:] = float("nan")
    out, lse = gqa.gqa_decode(
        q, keys, values, lengths_B, scale=0.2, n_splits=3, tile=gqa.Tile(16, 4, 2)
    )
    assert_near(out, expected)
    live = ~expected_lse.isinf()
    assert torch.allclose(lse[live].double(), expected_lse[live], atol=1e-4)


@DTYPES
@pytest.mark.parametrize(("queries", "keys", "offset"), [
    (1, 1, 0), (33, 33, 0), (17, 50, 33), (40, 40, None), (16, 70, None), (20, 12, -8), (50, 50, 3),
])  # fmt: skip
@pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "value"), [(2, 2, 64, 32), (4, 2, 32, 32), (3, 1, 16, 64)]
)
def test_prefill(
    queries: int, keys: int, offset: int | None, heads: int, kv_heads: int, width: int, value: int,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    # Heads outside, as a cache has them; the engine hands on views of such.
    q = randn(2, heads, queries, width + 16).to(dtype).transpose(1, 2)[..., :width]
    k = randn(2, kv_heads, keys, width, seed=1).to(dtype).transpose(1, 2)
    v = randn(2, keys, kv_heads, value, seed=2).to(dtype)
    out, lse = prefill.latent_prefill(
        q, k, v, scale=0.1, offset=offset, tile=prefill.Tile(16, 16, 4, 2)
    )
    expected, expected_lse = prefill_naive.latent_prefill(
        *doubled(q, k, v), scale=0.1, offset=offset
    )
    assert_near(out, expected)
    live = ~expected_lse.isinf()
    assert torch.equal(lse.isinf(), expected_lse.isinf())
    assert torch.allclose(lse[live].double(), expected_lse[live], atol=1e-4)


@DTYPES
def test_prefill_at_the_real_widths(dtype: torch.dtype) -> None:
    q, k, v = randn(1, 70, 2, 256).to(dtype), randn(1, 133, 2, 256).to(dtype), randn(1, 133, 2, 128)
    out, _ = prefill.latent_prefill(
        q, k, v.to(dtype), scale=1 / 16, offset=63, tile=prefill.Tile(64, 64, 8, 2)
    )
    expected, _ = prefill_naive.latent_prefill(*doubled(q, k, v.to(dtype)), scale=1 / 16, offset=63)
    assert_near(out, expected)


@pytest.mark.parametrize("offset", [0, 20, None])
@pytest.mark.parametrize(
    ("width", "value", "by_kernel"),
    [(128, 128, True), (256, 128, True), (192, 128, False), (256, 256, False), (128, 40, False)],
)
def test_prefill_goes_where_it_fits(
    width: int, value: int, by_kernel: bool, offset: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel for widths with a tile that fits an H100, torch for the others."""
    taken, kernel = [], prefill.latent_prefill
    monkeypatch.setattr(
        prefill, "latent_prefill", lambda *a, **b: taken.append(b["tile"]) or kernel(*a, **b)
    )
    q, k, v = randn(1, 12, 2, width), randn(1, 32, 1, width, seed=1), randn(1, 32, 1, value, seed=2)
    with interpreted():
        out, lse = prefill_dispatch.latent_prefill(q, k, v, scale=width**-0.5, offset=offset)
    expected, expected_lse = prefill_naive.latent_prefill(
        *doubled(q, k, v), scale=width**-0.5, offset=offset
    )
    assert_near(out, expected)
    assert torch.allclose(lse.double(), expected_lse, atol=1e-4)
    assert taken == [prefill.FLOAT32_TILE] * by_kernel


@DTYPES
@pytest.mark.parametrize(("rank", "rotary"), [(896, 64), (384, 64), (512, 32), (40, 8), (16, 3)])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("affine", [False, True])
def test_append(rank: int, rotary: int, norm: bool, affine: bool, dtype: torch.dtype) -> None:
    tokens, width = 5, rank + 2 * rotary
    # Not contiguous, and one token so small that eps decides.
    x = randn(tokens, width + 16).to(dtype)[:, :width]
    x[3] *= 1e-3
    angle = randn(tokens, rotary)
    slots = torch.tensor([7, 0, -1, 3, 9])
    options: dict[str, torch.Tensor] = {}
    if norm:
        options["norm_weight_R"] = randn(rank, seed=1).to(dtype)
    if affine:
        options["gain_MR"] = randn(2, rank, seed=2).to(dtype)
        options["bias_MR"] = randn(2, rank, seed=3).to(dtype)
        options["modality_N"] = torch.tensor([0, 1, 1, 0, 1], dtype=torch.int32)
    rows = torch.full((11, width), 7.0, dtype=dtype)
    append.latent_append(x, angle.cos(), angle.sin(), slots, rows, **options)
    expected = torch.full((11, width), 7.0, dtype=torch.float64)
    append_naive.latent_append(
        x.double(), angle.cos().double(), angle.sin().double(), slots, expected,
        **{k: v if k == "modality_N" else v.double() for k, v in options.items()},
    )  # fmt: skip
    assert_near(rows[slots[slots >= 0]], expected[slots[slots >= 0]], roundings=1)
    untouched = [1, 2, 4, 5, 6, 8, 10]
    assert (rows[untouched] == 7).all()


@DTYPES
@pytest.mark.parametrize("splits", [1, 31, 33, 64, 70, 132, 300])
@pytest.mark.parametrize(("heads", "value"), [(4, 24), (32, 40), (5, 7)])
def test_merge(splits: int, heads: int, value: int, dtype: torch.dtype) -> None:
    parts = randn(2, splits, heads, value).to(dtype)
    lse = 20 * randn(2, splits, heads)
    lse[:, splits // 2] = float("-inf")
    parts[:, splits // 2] = float("nan")
    heads_last = parts.transpose(2, 3).contiguous()
    out, natural = merge.lse_merge(heads_last, lse, out_dtype=torch.float32)
    expected, expected_lse = merge_naive.lse_merge(parts.double(), lse.double())
    if splits == 1:
        assert (out == 0).all() and natural.isinf().all()
        return
    assert_near(out, expected)
    assert torch.allclose(natural.double(), expected_lse, atol=1e-4)


@pytest.mark.parametrize("splits", [17, 32, 33])
def test_more_splits_than_registers_hold_are_merged_in_groups(
    splits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a session of many turns has them, each a run of its own."""
    monkeypatch.setattr(merge, "MOST_SPLITS", 16)
    parts, lse = randn(2, splits, 8, 40), 20 * randn(2, splits, 8)
    lse[0, :16] = float("-inf")
    lse[1] = float("-inf")
    parts[0, :16] = float("nan")
    out, natural = merge.lse_merge(
        parts.transpose(2, 3).contiguous(), lse, out_dtype=torch.bfloat16
    )
    expected, expected_lse = merge_naive.lse_merge(parts.double(), lse.double())
    assert_near(out[:1], expected[:1])
    assert (out[1] == 0).all() and torch.allclose(natural.double(), expected_lse, atol=1e-4)


@pytest.mark.parametrize("heads", [33, 64])
def test_more_heads_than_a_program_has_columns_are_merged(heads: int) -> None:
    parts, lse = randn(2, 5, heads, 24), 20 * randn(2, 5, heads)
    out, natural = merge.lse_merge(parts.transpose(2, 3).contiguous(), lse, out_dtype=torch.float32)
    expected, expected_lse = merge_naive.lse_merge(parts.double(), lse.double())
    assert_near(out, expected)
    assert torch.allclose(natural.double(), expected_lse, atol=1e-4)


def test_wide_parts_are_merged_in_smaller_groups() -> None:
    """A thread holds its values of all splits: in float32 half as many fit its registers."""
    assert merge.most_splits(torch.bfloat16) == 2 * merge.most_splits(torch.float32)


def launches(tree: ast.AST, *, guarded: bool = False) -> list[tuple[int, bool]]:
    """Line of each call that may start a Triton kernel, and whether it lies within `with on(…)`."""
    if isinstance(tree, ast.With):
        guarded |= any("on(" in ast.unparse(item.context_expr) for item in tree.items)
    found = [
        each for node in ast.iter_child_nodes(tree) for each in launches(node, guarded=guarded)
    ]
    started = isinstance(tree, ast.Call) and re.match(r"triton\.|append\(", ast.unparse(tree))
    return [*found, (tree.lineno, guarded)] if isinstance(tree, ast.Call) and started else found


@pytest.mark.parametrize(
    "kernel", sorted(KERNELS.glob("*/dispatch.py")), ids=lambda p: p.parent.name
)
def test_kernels_start_on_the_card_of_their_tensors(kernel: Path) -> None:
    """Triton starts them on the current card, which is a thread's own and need not be that one."""
    found = launches(ast.parse(kernel.read_text(encoding="utf-8")))
    assert found and all(guarded for _, guarded in found), found


def test_only_a_gpu_is_made_the_current_one() -> None:
    assert choice.on(torch.device("cuda", 1)).idx == 1  # type: ignore[attr-defined]
    with choice.on(torch.device("cpu")):
        pass


@DTYPES
@pytest.mark.parametrize("rank", [896, 384, 200, 7])
@pytest.mark.parametrize("values", [20, 64])
@pytest.mark.parametrize("share", [1, 2, 6])
def test_expand(rank: int, values: int, share: int, dtype: torch.dtype) -> None:
    latent, w_uv = randn(2, 6, rank).to(dtype), randn(6 // share, values, rank, seed=1).to(dtype)
    expected = expand_naive.expand_output(*doubled(latent, w_uv))
    assert_near(expand.expand_output(latent, w_uv), expected, roundings=1)


@DTYPES
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 2), (4, 4), (6, 1), (5, 5)])
@pytest.mark.parametrize("dim", [16, 64, 128])
def test_gqa_append(batch: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> None:
    """A token so small that eps decides; what lies beside the slot stays."""
    qkv, angle = randn(batch, (heads + 2 * kv_heads) * dim).to(dtype), randn(batch, dim // 2)
    qkv[0] *= 1e-3
    norms = randn(dim, seed=1).to(dtype), randn(dim, seed=2).to(dtype)
    slots = torch.tensor([3, 0, 4][:batch])
    keys, values = (torch.full((batch, kv_heads, 5, dim), 7.0, dtype=dtype) for _ in "kv")
    expected_keys, expected_values = doubled(keys, values)
    q = gqa_append.gqa_append(qkv, *norms, angle.cos(), angle.sin(), slots, keys, values)
    expected = gqa_append_naive.gqa_append(
        *doubled(qkv, *norms, angle.cos(), angle.sin()), slots, expected_keys, expected_values
    )
    rows = torch.arange(batch)
    beside = torch.ones(batch, 5, dtype=torch.bool).index_put((rows, slots), torch.tensor(False))
    new = [x[rows, :, slots] for x in (keys, expected_keys, values, expected_values)]
    # Few values each: their errors are told apart from wrong ones together.
    assert_near(
        torch.cat([q.flatten(), new[0].flatten(), new[2].flatten()]),
        torch.cat([expected.flatten(), new[1].flatten(), new[3].flatten()]),
        roundings=1,
    )
    for found in (keys, values):
        assert (found.transpose(1, 2)[beside] == 7).all()


@DTYPES
@pytest.mark.parametrize(("rows", "width"), [(16, 64), (10, 96), (6, 33)])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("added", ["nothing", "bias", "residual", "both", "gated"])
def test_linear(rows: int, width: int, norm: bool, added: str, dtype: torch.dtype) -> None:
    x, weight = randn(1, width).to(dtype), randn(rows, width, seed=1).to(dtype)
    if norm:
        x *= 1e-3  # so small that eps decides
    options: dict[str, Any] = {}
    if norm:
        options["norm_weight_K"] = randn(width, seed=2).to(dtype)
    if added in ("bias", "both"):
        options["bias_N"] = randn(rows, seed=3).to(dtype)
    if added in ("residual", "both"):
        options["residual_BN"] = randn(1, rows, seed=4).to(dtype)
    if added == "gated":
        options["factor_NK"] = randn(rows, width, seed=5).to(dtype)
    # Weights read ahead of the input: none, some, all (of 33 to 96 columns).
    ahead = {"nothing": 0, "gated": 32, "bias": 64}.get(added, 4096)
    out = linear.decode_linear(x, weight, tile=linear.Tile(4, 32, 4, ahead), **options)
    wide = {k: v.double() for k, v in options.items()}
    expected = linear_naive.decode_linear(x.double(), weight.double(), **wide)
    assert_near(out, expected)
    assert_near(linear_batched.decode_linear(x.double(), weight.double(), **wide), expected)
