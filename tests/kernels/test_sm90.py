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
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    return {case["name"]: case for case in found}


@pytest.mark.slow
def test_every_shipped_kernel_passes() -> None:
    found = compile_set("shipped")
    assert {"latent_decode-1024", "latent_decode-576", "latent_decode-512"} <= set(found)
    assert {"latent_prefill-256", "gqa_decode", "latent_append"} <= set(found)
    assert {name: case["faults"] for name, case in found.items() if case["faults"]} == {}


def test_the_main_decode_kernel_passes() -> None:
    forms = compile_set("shipped", "latent_decode-1024")
    assert "latent_decode-1024" in forms
    for found in forms.values():
        assert found["faults"] == []
        assert found["hgmma"] > 0


def test_a_tile_too_large_fails_the_gate() -> None:
    (found,) = compile_set("controls", "too-large").values()
    assert "spills registers" in found["faults"]
    assert "shared memory over the limit" in found["faults"]


def test_a_kernel_without_alignment_fails_the_gate() -> None:
    (found,) = compile_set("controls", "unaligned").values()
    assert "copies missing or narrow" in found["faults"]
