"""Compile the shipped kernels for sm_90 without a GPU and report what ptxas made of them.

    PYTHONPATH=src python tests/kernels/sm90.py [shipped|tried|controls [NAME ...]]

With another triton, say an older one of a GPU machine, isolated:

    pip install --no-deps --target /tmp/t36 triton==3.6.0
    PYTHONPATH=/tmp/t36:src python tests/kernels/sm90.py shipped

Prints one JSON object per case, its ``faults`` empty when it passes the gate. Exits with 1 if a
case has faults, or if one of the controls, which must have some, has none. Run as a script, because
TRITON_INTERPRET (set by the tests) replaces the compiler.
"""

import contextlib
import io
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction

from internvideo3.kernels.latent_decode.rows import Rows

TARGET = GPUTarget("cuda", 90, 32)
SHARED_LIMIT = 232448
REGISTER_LIMIT = 65536
OPTIONS = ("num_warps", "num_stages", "launch_pdl")
EARLY = {"OVERLAP": True, "launch_pdl": True}
UNALIGNED = {"n_splits", "eps", "offset", "first_split", "total_splits"}


@dataclass(frozen=True)
class Case:
    """One compiled configuration and the matrix instruction that it must contain."""

    name: str
    kernel: Any
    constants: dict[str, Any]
    types: dict[str, str] = field(default_factory=dict)
    opcode: str | None = None
    """hmma, hgmma, any of them, or None for a kernel without matrix products."""
    aligned: bool = True
    """Whether pointers, strides and sizes are multiples of 16."""
    pipelined: bool = False
    """Whether asynchronous copies must be there, all of them 16 bytes wide."""
    narrow_copies: int = 0
    """But so many may be narrow."""


def signature(case: Case) -> tuple[dict[str, str], dict[Any, Any]]:
    """Types of the run-time arguments, and 16-byte alignment of pointers and strides."""
    types: dict[str, str] = {}
    attrs: dict[Any, Any] = {}
    for index, name in enumerate(case.kernel.arg_names):
        if name in case.constants:
            types[name] = "constexpr"
            continue
        default = "*bf16" if name.endswith("_ptr") else "i32"
        types[name] = case.types.get(name, COMMON_TYPES.get(name, default))
        if case.aligned and types[name] != "fp32" and name not in UNALIGNED:
            attrs[(index,)] = [["tt.divisibility", 16]]
    return types, attrs


COMMON_TYPES = {
    "lengths_ptr": "*i32",
    "slots_ptr": "*i64",
    "frequency_ptr": "*i64",
    "modality_ptr": "*i32",
    "position_ptr": "*i64",
    "cos_ptr": "*fp32",
    "sin_ptr": "*fp32",
    "parts_lse_ptr": "*fp32",
    "lse_ptr": "*fp32",
    "row_scale_ptr": "*fp32",
    "pages_ptr": "*i32",
    "scale_log2": "fp32",
    "eps": "fp32",
}


def tool(name: str) -> str:
    """Path of a CUDA binary tool in the triton wheel."""
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def examine(case: Case) -> dict[str, Any]:
    """Compile one case and read registers, spills, shared memory and opcodes off the cubin."""
    early = {k: v for k, v in EARLY.items() if "OVERLAP" in case.kernel.arg_names}
    case = replace(case, constants=case.constants | early)
    types, attrs = signature(case)
    constants = {k: v for k, v in case.constants.items() if k not in OPTIONS}
    options = {k: v for k, v in case.constants.items() if k in OPTIONS}
    gluon = isinstance(case.kernel, GluonJITFunction)
    source = (GluonASTSource if gluon else ASTSource)(case.kernel, types, constants, attrs)
    with contextlib.redirect_stdout(io.StringIO()):
        compiled = triton.compile(source, target=TARGET, options=options)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = subprocess.run(
            [tool("cuobjdump"), "--dump-resource-usage", str(cubin)],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        sass = subprocess.run(
            [tool("cuobjdump"), "--dump-sass", str(cubin)],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    registers = int(re.findall(r"REG:(\d+)", usage)[-1])
    count = {op: len(re.findall(rf"\b{op}\b", sass)) for op in ("HMMA", "HGMMA", "LDL", "STL")}
    copies = re.findall(r"\bLDGSTS\.\S+", sass)
    found = {
        "name": case.name,
        "triton": triton.__version__,
        "registers": registers,
        "stack": int(re.findall(r"STACK:(\d+)", usage)[-1]),
        "spills": count["LDL"] + count["STL"],
        "shared": compiled.metadata.shared,
        "hmma": count["HMMA"],
        "hgmma": count["HGMMA"],
        "async_copies": len(copies),
        "async_copies_16B": sum(".128" in c for c in copies),
        "bars": len(re.findall(r"\bBAR\.", sass)),
        "ldg": len(re.findall(r"\bLDG\b", sass)),
        "warps": options.get("num_warps", 4),
    }
    return found | {"faults": faults(case, found)}


def faults(case: Case, found: dict[str, Any]) -> list[str]:
    """What keeps a compiled case from being shipped."""
    opcodes = {None: 1, "any": found["hmma"] + found["hgmma"]} | found
    copies = found["async_copies"]
    rules = {
        "spills registers": found["stack"] == 0 and found["spills"] == 0,
        "shared memory over the limit": found["shared"] <= SHARED_LIMIT,
        "too many registers for one program": (
            found["registers"] * 32 * found["warps"] <= REGISTER_LIMIT
        ),
        "matrix instruction missing": opcodes[case.opcode] > 0,
        "copies missing or narrow": not case.pipelined
        or (copies > case.narrow_copies >= copies - found["async_copies_16B"]),
    }
    return [fault for fault, holds in rules.items() if not holds]


def latent_case(name: str, tile: Any, width: int, value: int, **options: Any) -> Case:
    from internvideo3.kernels.latent_decode import triton as latent

    if tile == latent.WARPGROUPS:
        return hopper_case(name, width, value, value)
    run = Rows(rows_bTW=torch.empty(1, 64, width), lengths_B=torch.empty(1), rank=value)
    return runs_case(name, tile, run, value, **options)


def runs_case(
    name: str, tile: Any, run: Any, value: int, *, heads: int = 32, **options: Any
) -> Case:
    from internvideo3.kernels.latent_decode import triton as latent

    constants = latent.launch_constants(tile, run, heads=heads, value_width=value)
    return Case(name, latent.transposed_kernel, constants, opcode="any", pipelined=True, **options)


def fp8_case(name: str, rank: int, rope: int, *, paged: bool = False, heads: int = 32) -> Case:
    """Narrow copies are allowed: a row of fp8 is half as wide, and converted after the copy."""
    from internvideo3.kernels.latent_decode import triton as latent

    run = plain_run(rank, rope, paged=paged, fp8=True)
    tile = latent.plan_of(run, heads).tile
    case = runs_case(name, tile, run, rank, heads=heads, types={"rows_ptr": "*fp8e4nv"})
    return replace(case, pipelined=False)


def plain_run(rank: int, rope: int, *, paged: bool = False, fp8: bool = False) -> Rows:
    return Rows(
        rows_bTW=torch.empty(8, 128, rank if fp8 else rank + rope),
        lengths_B=torch.empty(1),
        rank=rank,
        rope_bTS=torch.empty(8, 128, rope) if fp8 else None,
        scale_bT=torch.empty(8, 128) if fp8 else None,
        pages_BN=torch.empty(1, 4, dtype=torch.int32) if paged else None,
    )


def gqa_case(name: str, tile: Any, width: int = 128, *, dtype: str = "bf16") -> Case:
    """In float32 the copies need not be asynchronous: it is there to be right."""
    from internvideo3.kernels.gqa_decode import triton as gqa

    constants = gqa.launch_constants(tile, heads=32, kv_heads=8, width=width)
    types = {f"{one}_ptr": f"*{dtype}" for one in ("q", "keys", "values", "parts")}
    half = dtype == "bf16"
    opcode = "hmma" if half else None
    return Case(name, gqa.gqa_kernel, constants, types, opcode=opcode, pipelined=half)


def prefill_case(
    name: str, tile: Any, width: int, *, causal: bool = True, dtype: str = "bf16"
) -> Case:
    from internvideo3.kernels.latent_prefill import triton as prefill

    constants = prefill.launch_constants(
        tile,
        heads=32,
        kv_heads=32 if width == 256 else 8,
        width=width,
        value_width=128,
        causal=causal,
    )
    types = {f"{one}_ptr": f"*{dtype}" for one in ("q", "k", "v", "out")}
    half = dtype == "bf16"
    opcode = "hgmma" if half else None
    return Case(name, prefill.prefill_kernel, constants, types, opcode=opcode, pipelined=half)


def linear_case(
    name: str, tile: Any, rows: int, width: int, *, gated: bool, norm: bool | None = None
) -> Case:
    from internvideo3.kernels.decode_linear import triton as linear

    norm = gated if norm is None else norm
    constants = {"N": rows, "K": width, "NORM": norm, "GATED": gated, "RESIDUAL": not norm}
    constants |= {"BIAS": not gated}
    constants |= linear.tile_constants(tile, width)
    return Case(name, linear.linear_kernel, constants)


def hopper_case(name: str, width: int, rank: int, value: int, *, paged: bool = False) -> Case:
    from internvideo3.kernels.latent_decode import gluon

    run = Rows(
        rows_bTW=torch.empty(8, 128, width),
        lengths_B=torch.empty(1),
        rank=rank,
        pages_BN=torch.empty(1, 4, dtype=torch.int32) if paged else None,
    )
    constants = gluon.launch_constants(run, heads=32, value_width=value)
    return Case(name, gluon.hopper_kernel, constants, opcode="hgmma", pipelined=True)


def hopper_fp8_case(name: str, rank: int, value: int | None = None, *, paged: bool = False) -> Case:
    from internvideo3.kernels.latent_decode import gluon_fp8

    run = plain_run(rank, 128, paged=paged, fp8=True)
    constants = gluon_fp8.launch_constants(run, heads=32, value_width=value or rank)
    kernel, types = gluon_fp8.hopper_fp8_kernel, {"rows_ptr": "*fp8e4nv"}
    return Case(name, kernel, constants, types=types, opcode="hgmma", pipelined=True)


def hopper_cases() -> Iterator[Case]:
    yield hopper_case("hopper-1024", 1024, 896, 896)
    yield hopper_case("hopper-1024-paged", 1024, 896, 896, paged=True)
    yield hopper_case("hopper-512", 512, 384, 384)
    yield hopper_case("hopper-512-of-1024", 512, 384, 896)
    yield hopper_case("hopper-512-paged", 512, 384, 384, paged=True)
    for rank in (384, 512, 640, 768, 896):
        yield hopper_fp8_case(f"hopper-fp8-{rank}", rank)
    yield hopper_fp8_case("hopper-fp8-896-paged", 896, paged=True)
    yield hopper_fp8_case("hopper-fp8-384-of-1024", 384, 896)


WIDTHS = {1024: 896, 576: 512, 512: 384}
OTHER_ROWS = ((640, 128), (512, 128), (448, 64), (320, 96), (888, 104))
"""Ranks and rotary columns of rows that no tile was made for."""


def other_row_cases() -> Iterator[Case]:
    from internvideo3.kernels.latent_decode import triton as latent

    for rank, rope in OTHER_ROWS:
        run = plain_run(rank, rope)
        tile = latent.plan_of(run, 32).tile
        yield runs_case(f"latent_decode-{rank}+{rope}", tile, run, rank)
        yield fp8_case(f"latent_decode-{rank}+{rope}-fp8", rank, rope)
    # More than 32 heads come in equal groups: 40 of them as 20 and 20.
    for heads in (8, 16, 20):
        run = plain_run(896, 128)
        tile = latent.plan_of(run, heads).tile
        yield runs_case(f"latent_decode-1024-{heads}-heads", tile, run, 896, heads=heads)
    yield fp8_case("latent_decode-1024-fp8-20-heads", 896, 128, heads=20)


def shipped_cases() -> Iterator[Case]:
    """What ``dispatch`` launches for the 8B model, and for rows, heads and widths of others."""
    yield from latent_cases()
    yield from hopper_cases()
    yield from grouped_cases()
    yield from small_cases()


def latent_cases() -> Iterator[Case]:
    from internvideo3.kernels.latent_decode import triton as latent

    for width, plan in latent.PLANS.items():
        yield latent_case(f"latent_decode-{width}", plan.tile, width, WIDTHS[width])
        run = plain_run(WIDTHS[width], width - WIDTHS[width], paged=True)
        # Its three narrow copies fetch page numbers.
        tile = latent.plan_of(run, 32).tile
        yield runs_case(
            f"latent_decode-{width}-paged", tile, run, WIDTHS[width], narrow_copies=tile.num_stages
        )
    nested = Rows(rows_bTW=torch.empty(1, 64, 512), lengths_B=torch.empty(1), rank=384)
    yield runs_case("latent_decode-512-of-1024", latent.PLANS[512].tile, nested, 896)
    yield from other_row_cases()
    for width, rank in WIDTHS.items():
        for paged in (False, True):
            name = f"latent_decode-{width}-fp8" + ("-paged" if paged else "")
            yield fp8_case(name, rank, width - rank, paged=paged)


def grouped_cases() -> Iterator[Case]:
    from internvideo3.kernels.gqa_decode import triton as gqa
    from internvideo3.kernels.latent_prefill import triton as prefill

    yield gqa_case("gqa_decode", gqa.TILE)
    for width in (16, 64, 256):
        yield gqa_case(f"gqa_decode-{width}", gqa.TILE, width)
    for width in (16, 128, 256):
        yield gqa_case(f"gqa_decode-{width}-float32", gqa.FLOAT32_TILE, width, dtype="fp32")
    for width, tile in prefill.TILES.items():
        yield prefill_case(f"latent_prefill-{width}", tile, width)
        yield prefill_case(f"latent_prefill-{width}-past", tile, width, causal=False)
        name = f"latent_prefill-{width}-float32"
        yield prefill_case(name, prefill.FLOAT32_TILE, width, dtype="fp32")


def small_cases() -> Iterator[Case]:
    from internvideo3.kernels.decode_linear import triton as linear
    from internvideo3.kernels.gqa_append import triton as gqa_append
    from internvideo3.kernels.latent_append import triton as append
    from internvideo3.kernels.latent_expand import triton as expand
    from internvideo3.kernels.latent_token import triton as token
    from internvideo3.kernels.lse_merge import triton as merge

    for splits, value in ((132, 896), (49, 128), (merge.most_splits(torch.bfloat16), 896)):
        constants = merge.launch_constants(splits, heads=32, value_width=value)
        yield Case(f"lse_merge-{splits}-of-{value}", merge.merge_kernel, constants)
    for dtype, kind in ((torch.bfloat16, "*bf16"), (torch.float32, "*fp32")):
        splits = merge.most_splits(dtype)
        constants = merge.launch_constants(splits, heads=64, value_width=128)
        types = {"parts_ptr": kind, "out_ptr": kind}
        name = f"lse_merge-{splits}-of-64x128-{dtype}".replace("torch.", "")
        yield Case(name, merge.merge_kernel, constants, types)
    heads: dict[str, Any] = {"HEADS": 32, "RANK": 896, "num_warps": 4}
    constants = {"RANK": 896, "ROTARY": 64, "BLOCK_R": 1024, "BLOCK_S": 64, "num_warps": 4}
    constants |= {"NORM": True, "AFFINE": True}
    yield Case("latent_append", append.append_kernel, constants)
    constants = heads | {"VALUE": 128, "POW2_R": 1024, "BLOCK_V": expand.BLOCK_V, "SHARE": 4}
    yield Case("expand_output", expand.expand_kernel, constants)
    constants = {"HEADS": 32, "KV_HEADS": 8, "HALF": 64, "num_warps": 1}
    yield Case("gqa_append", gqa_append.gqa_append_kernel, constants)
    yield linear_case("linear-gate-up", linear.TILE, 12288, 4096, gated=True)
    yield linear_case("linear-out", linear.TILE, 4096, 4096, gated=False)
    yield linear_case("linear-down", linear.TILE, 4096, 12288, gated=False)
    yield linear_case("linear-qkv", linear.TILE, 6144, 4096, gated=False, norm=True)
    constants = token.launch_constants(32, 8, 128, 1024, 64)
    yield Case("latent_token", token.token_kernel, constants)


def tried_cases() -> Iterator[Case]:
    """Every tile that the GPU benchmark tries."""
    from internvideo3.harness.gpu import kernels as bench

    for kind, tiles in bench.LATENT_TILES.items():
        width, value = bench.LATENT[kind]
        for tile in tiles:
            yield latent_case(f"{kind}/{bench.tile_id(tile)}", tile, width, value)
    for gqa_tile in bench.GQA_TILES:
        yield gqa_case(f"gqa/{bench.tile_id(gqa_tile)}", gqa_tile)
    for width, prefill_tiles in bench.PREFILL_TILES.items():
        for prefill_tile in prefill_tiles:
            name = f"prefill-{width}/{bench.tile_id(prefill_tile)}"
            yield prefill_case(name, prefill_tile, width)
    for shape, about in bench.LINEARS.items():
        for linear_tile in bench.LINEAR_TILES:
            name = f"linear-{shape}/{bench.tile_id(linear_tile)}"
            yield linear_case(name, linear_tile, about.rows, about.width, gated=about.gated)


def control_cases() -> Iterator[Case]:
    """What must fail the gate, each for its own reason."""
    from internvideo3.kernels.latent_append import triton as append
    from internvideo3.kernels.latent_decode.triton import Tile

    constants = {"RANK": 896, "ROTARY": 64, "BLOCK_R": 1024, "BLOCK_S": 64, "num_warps": 4}
    constants |= {"NORM": True, "AFFINE": True}
    yield Case("without-products", append.append_kernel, constants, opcode="any")
    crowded = hopper_case("gluon-of-64-heads", 1024, 896, 896)
    yield replace(crowded, constants=crowded.constants | {"HEADS": 64})
    yield latent_case("too-large", Tile("transposed", 64, 8, 2), 1024, 896)
    yield latent_case("unaligned", Tile("transposed", 32, 8, 3), 1024, 896, aligned=False)


SETS = {"shipped": shipped_cases, "tried": tried_cases, "controls": control_cases}


if __name__ == "__main__":
    chosen, *wanted = sys.argv[1:] or ["shipped"]
    held = True
    for case in SETS[chosen]():
        if not wanted or any(w in case.name for w in wanted):
            found = examine(case)
            held &= bool(found["faults"]) == (chosen == "controls")
            sys.stdout.write(json.dumps(found) + "\n")
            sys.stdout.flush()
    sys.exit(0 if held else 1)
