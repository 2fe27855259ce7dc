"""The shipped kernels compile for sm_90 without spills, and the gate that says so bites.

.venv/bin/python -m pytest tests/kernels/test_sm90.py -q
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SHIPPED = """
latent_decode-1024 latent_decode-1024-paged latent_decode-576 latent_decode-576-paged
latent_decode-512 latent_decode-512-paged latent_decode-512-of-1024 latent_decode-640+128
latent_decode-640+128-fp8 latent_decode-512+128 latent_decode-512+128-fp8 latent_decode-448+64
latent_decode-448+64-fp8 latent_decode-320+96 latent_decode-320+96-fp8 latent_decode-888+104
latent_decode-888+104-fp8 latent_decode-1024-8-heads latent_decode-1024-16-heads
latent_decode-1024-20-heads latent_decode-1024-fp8-20-heads latent_decode-1024-fp8
latent_decode-1024-fp8-paged latent_decode-576-fp8 latent_decode-576-fp8-paged
latent_decode-512-fp8 latent_decode-512-fp8-paged gqa_decode gqa_decode-16 gqa_decode-64
gqa_decode-256 gqa_decode-16-float32 gqa_decode-128-float32 gqa_decode-256-float32
latent_prefill-256 latent_prefill-256-past latent_prefill-256-float32 latent_prefill-128
latent_prefill-128-past latent_prefill-128-float32 hopper-1024 hopper-1024-paged hopper-512
hopper-512-of-1024 hopper-512-paged hopper-fp8-384 hopper-fp8-512 hopper-fp8-640 hopper-fp8-768
hopper-fp8-896 hopper-fp8-896-paged hopper-fp8-384-of-1024 lse_merge-132-of-896
lse_merge-49-of-128 lse_merge-528-of-896 lse_merge-528-of-64x128-bfloat16
lse_merge-264-of-64x128-float32 latent_append expand_output gqa_append linear-gate-up
linear-out linear-down linear-qkv latent_token
"""
"""Every configuration that the gate compiles; one that is left out is missed here."""


def compile_set(chosen: str, *names: str) -> dict[str, dict[str, Any]]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(
        p for p in (environment.get("PYTHONPATH"), str(ROOT / "src")) if p
    )
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests/kernels/sm90.py"), chosen, *names],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert found, done.stderr[-2000:]
    held = all(bool(case["faults"]) == (chosen == "controls") for case in found)
    assert done.returncode == (0 if held else 1), "the exit status is the verdict"
    return {case["name"]: case for case in found}


@pytest.mark.slow
def test_every_shipped_kernel_passes() -> None:
    found = compile_set("shipped")
    assert sorted(found) == sorted(SHIPPED.split())
    assert {name: case["faults"] for name, case in found.items() if case["faults"]} == {}
    assert all(case["hgmma"] for name, case in found.items() if name.startswith("hopper"))


def test_what_must_fail_the_gate_does() -> None:
    found = compile_set("controls")
    want = {
        "too-large": {"spills registers", "shared memory over the limit"},
        "unaligned": {"spills registers", "copies missing or narrow"},
        "without-products": {"matrix instruction missing"},
        "gluon-of-64-heads": {"spills registers", "shared memory over the limit"},
    }
    assert {name: set(case["faults"]) for name, case in found.items()} == want


def test_each_rule_of_the_gate_bites() -> None:
    """The verdict over what a compiler might say, rule by rule."""
    code = """
import json, sys
from sm90 import Case, faults
good = {"stack": 0, "spills": 0, "shared": 232448, "registers": 255, "warps": 8, "hmma": 0,
        "hgmma": 4, "async_copies": 6, "async_copies_16B": 4}
case = Case("one", None, {}, opcode="hgmma", pipelined=True, narrow_copies=2)
bad = ({}, {"stack": 8}, {"spills": 1}, {"shared": 232449}, {"registers": 257}, {"hgmma": 0},
       {"async_copies": 7}, {"async_copies": 2, "async_copies_16B": 2})
print(json.dumps([faults(case, good | one) for one in bad]))
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tests/kernels"), str(ROOT / "src")])
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == [
        [],
        ["spills registers"],
        ["spills registers"],
        ["shared memory over the limit"],
        ["too many registers for one program"],
        ["matrix instruction missing"],
        ["copies missing or narrow"],
        ["copies missing or narrow"],
    ]


@pytest.mark.slow
def test_tiles_take_on_other_cards_what_dispatch_counts_with() -> None:
    """Compiled for 8.9, which has 99 KB a program: what is larger is left to torch there."""
    code = """
import json
import torch
from triton.backends.compiler import GPUTarget
import sm90
from internvideo3.kernels.gqa_decode import dispatch as gqa
from internvideo3.kernels.latent_decode.dispatch import tile_bytes
from internvideo3.kernels.latent_decode.rows import Rows
from internvideo3.kernels.latent_prefill import dispatch as prefill

def rows(width, rank, fp8=False):
    scale = torch.ones(1, 1) if fp8 else None
    return tile_bytes(Rows(rows_bTW=torch.zeros(1, 1, width), lengths_B=torch.ones(1), rank=rank,
                           scale_bT=scale))

sm90.TARGET, sm90.EARLY = GPUTarget("cuda", 89, 32), {"OVERLAP": False}
counted = {
    "latent_decode-1024": rows(1024, 896),
    "latent_decode-512+128": rows(640, 512),
    "latent_decode-1024-fp8": rows(896, 896, True),
    "latent_decode-576-fp8": rows(512, 512, True),
    "gqa_decode": gqa.tile_bytes(128, torch.bfloat16),
    "gqa_decode-256": gqa.tile_bytes(256, torch.bfloat16),
    "gqa_decode-128-float32": gqa.tile_bytes(128, torch.float32),
    "gqa_decode-256-float32": gqa.tile_bytes(256, torch.float32),
    "latent_prefill-128": prefill.TILE_BYTES[128],
    "latent_prefill-256": prefill.TILE_BYTES[256],
    "latent_prefill-128-float32": prefill.FLOAT32_TILE_BYTES[128],
    "latent_prefill-256-float32": prefill.FLOAT32_TILE_BYTES[256],
}
cases = [case for case in sm90.shipped_cases() if case.name in counted]
print(json.dumps([counted, {case.name: sm90.examine(case)["shared"] for case in cases}]))
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tests/kernels"), str(ROOT / "src")])
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    counted, compiled = json.loads(done.stdout)
    assert counted == compiled
