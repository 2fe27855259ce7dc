"""Compile the shipped kernels for sm_90 without a GPU and report what ptxas made of them.

    PYTHONPATH=src python tests/kernels/sm90.py [NAME ...]          # the installed triton
    pip install --no-deps --target /tmp/t36 triton==3.6.0
    PYTHONPATH=/tmp/t36:src python tests/kernels/sm90.py            # the GPU machine's triton

Prints one JSON object per case. Run as a script, because TRITON_INTERPRET (set by the tests)
replaces the compiler.
"""

import contextlib
import io
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGET = GPUTarget("cuda", 90, 32)
OPTIONS = ("num_warps", "num_stages")
UNALIGNED = {"n_splits", "eps", "offset"}


@dataclass(frozen=True)
class Case:
    """One compiled configuration and the matrix instruction that it must contain."""

    name: str
    kernel: Any
    constants: dict[str, Any]
    types: dict[str, str] = field(default_factory=dict)
    opcode: str | None = None
    aligned: bool = True


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
    "modality_ptr": "*i32",
    "position_ptr": "*i64",
    "cos_ptr": "*fp32",
    "sin_ptr": "*fp32",
    "parts_lse_ptr": "*fp32",
    "lse_ptr": "*fp32",
    "scale_log2": "fp32",
    "eps": "fp32",
}


def tool(name: str) -> str:
    """Path of a CUDA binary tool in the triton wheel."""
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def examine(case: Case) -> dict[str, Any]:
    """Compile one case and read registers, spills, shared memory and opcodes off the cubin."""
    types, attrs = signature(case)
    constants = {k: v for k, v in case.constants.items() if k not in OPTIONS}
    options = {k: v for k, v in case.constants.items() if k in OPTIONS}
    source = ASTSource(case.kernel, types, constexprs=constants, attrs=attrs)
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
    return {
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
        "expected_opcode": case.opcode,
    }


def latent_cases() -> Iterator[Case]:
    from internvideo3.kernels.latent_decode import triton as latent

    shapes = {"1024": (1024, 896), "512": (512, 384), "576": (576, 512)}
    tiles = [
        ("1024", latent.Tile("transposed", 32, 8, 3), "HMMA|HGMMA"),
        ("1024", latent.Tile("transposed", 32, 8, 2), "HMMA|HGMMA"),
        ("1024", latent.Tile("transposed", 16, 8, 3), "HMMA|HGMMA"),
        ("1024", latent.Tile("grouped", 16, 8, 3), "HMMA"),
        ("1024", latent.Tile("grouped", 16, 8, 2), "HMMA"),
        ("1024", latent.Tile("grouped", 32, 8, 3), "HMMA"),
        ("1024", latent.Tile("grouped", 32, 8, 2), "HMMA"),
        ("512", latent.Tile("transposed", 64, 4, 2), "HGMMA"),
        ("512", latent.Tile("transposed", 64, 8, 2), "HGMMA"),
        ("512", latent.Tile("transposed", 32, 4, 3), "HMMA|HGMMA"),
        ("512", latent.Tile("grouped", 32, 4, 3), "HMMA"),
        ("512", latent.Tile("grouped", 32, 4, 2), "HMMA"),
        ("512", latent.Tile("grouped", 16, 4, 3), "HMMA"),
        ("512", latent.Tile("grouped", 16, 4, 4), "HMMA"),
        ("576", latent.Tile("transposed", 64, 4, 2), "HGMMA"),
        ("576", latent.Tile("transposed", 64, 8, 2), "HGMMA"),
        ("576", latent.Tile("transposed", 32, 4, 3), "HMMA|HGMMA"),
    ]
    for shape, tile, opcode in tiles:
        width, value = shapes[shape]
        kernel, constants = latent.launch_constants(tile, heads=32, width=width, value_width=value)
        name = "-".join(str(v) for v in ("latent_decode", shape, *vars(tile).values()))
        yield Case(name, kernel, constants, opcode=opcode)


def gqa_cases() -> Iterator[Case]:
    from internvideo3.kernels.gqa_decode import triton as gqa

    for block, warps, stages in [
        (64, 4, 2),
        (64, 4, 3),
        (64, 4, 4),
        (128, 4, 2),
        (128, 4, 3),
        (128, 8, 3),
    ]:
        tile = gqa.Tile(block, warps, stages)
        constants = gqa.launch_constants(tile, heads=32, kv_heads=8, width=128)
        yield Case(
            f"gqa_decode-n{block}-w{warps}-s{stages}", gqa.gqa_kernel, constants, opcode="HMMA"
        )


def prefill_cases() -> Iterator[Case]:
    from internvideo3.kernels.latent_prefill import triton as prefill

    for width, m, n, warps, stages in [
        (256, 128, 64, 8, 2),
        (256, 128, 64, 8, 3),
        (256, 64, 64, 4, 2),
        (256, 128, 32, 8, 3),
        (256, 64, 128, 4, 2),
        (128, 128, 64, 8, 3),
        (128, 128, 128, 8, 2),
        (128, 128, 128, 8, 3),
        (128, 64, 128, 4, 3),
    ]:
        tile = prefill.Tile(m, n, warps, stages)
        kv_heads = 32 if width == 256 else 8
        constants = prefill.launch_constants(
            tile, heads=32, kv_heads=kv_heads, width=width, value_width=128, causal=True
        )
        name = f"prefill-{width}-m{m}-n{n}-w{warps}-s{stages}"
        yield Case(
            name,
            prefill.prefill_kernel,
            constants,
            opcode="HGMMA",
            types={"n_queries": "i32", "n_keys": "i32"},
        )


def small_cases() -> Iterator[Case]:
    from internvideo3.kernels.decode_linear import triton as linear
    from internvideo3.kernels.gqa_append import triton as gqa_append
    from internvideo3.kernels.latent_absorb import triton as absorb
    from internvideo3.kernels.latent_append import triton as append
    from internvideo3.kernels.lse_merge import triton as merge

    for minor, dtype in [(True, "*fp32"), (False, "*fp32"), (True, "*bf16")]:
        yield Case(
            f"lse_merge-{minor}-{dtype}",
            merge.merge_kernel,
            dict(
                HEADS=32,
                VALUE=896,
                HEAD_MINOR=minor,
                BLOCK_S=merge.BLOCK_S,
                BLOCK_C=merge.BLOCK_C,
                num_warps=4,
            ),
            types={"parts_ptr": dtype},
        )
    yield Case(
        "latent_append",
        append.append_kernel,
        dict(RANK=896, ROTARY=64, BLOCK_R=1024, BLOCK_S=64, NORM=True, AFFINE=True, num_warps=4),
    )
    yield Case(
        "absorb_query",
        absorb.absorb_kernel,
        dict(HEADS=32, CONTENT=128, ROTARY=64, RANK=896, BLOCK_R=absorb.BLOCK_R, num_warps=4),
    )
    yield Case(
        "expand_output",
        absorb.expand_kernel,
        dict(HEADS=32, RANK=896, VALUE=128, POW2_R=1024, BLOCK_V=absorb.BLOCK_V, num_warps=4),
    )
    yield Case(
        "gqa_append", gqa_append.gqa_append_kernel, dict(HEADS=32, KV_HEADS=8, HALF=64, num_warps=1)
    )
    for n, k, bn, bk, w, norm, gated, res in [
        (9216, 4096, 4, 1024, 4, True, False, False),
        (9216, 4096, 8, 512, 4, True, False, False),
        (9216, 4096, 2, 2048, 4, True, False, False),
        (12288, 4096, 4, 512, 4, True, True, False),
        (12288, 4096, 2, 1024, 4, True, True, False),
        (4096, 12288, 4, 1024, 4, False, False, True),
        (4096, 12288, 2, 2048, 4, False, False, True),
        (4096, 4096, 4, 1024, 4, False, False, True),
        (4096, 4096, 2, 1024, 4, False, False, True),
    ]:
        yield Case(
            f"linear-{n}x{k}-{bn}-{bk}-w{w}-{int(norm)}{int(gated)}{int(res)}",
            linear.linear_kernel,
            dict(
                N=n, K=k, NORM=norm, GATED=gated, RESIDUAL=res, BLOCK_N=bn, BLOCK_K=bk, num_warps=w
            ),
        )


if __name__ == "__main__":
    wanted = sys.argv[1:]
    for case in [*latent_cases(), *gqa_cases(), *prefill_cases(), *small_cases()]:
        if not wanted or any(w in case.name for w in wanted):
            sys.stdout.write(json.dumps(examine(case)) + "\n")
            sys.stdout.flush()
