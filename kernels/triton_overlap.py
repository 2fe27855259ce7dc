# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Kernels that start while their predecessor still runs (programmatic dependent launch).

A decode step is a chain of some four hundred kernels of a few microseconds, so starting and
draining is much of its time. From Hopper on a kernel may be launched early, read what no kernel
writes, and wait for its predecessor only then. Two rules keep that right:

1. Every kernel launched so calls ``wait_for_inputs`` in each program, before it reads or writes
   what another kernel of the chain touches.
2. It lets its successor start only after that wait. So when a kernel starts, all kernels before
   its predecessor have ended, and what they wrote may be read before the wait: weights, lengths,
   and cached rows but the last one of each sequence, which ``latent_token`` writes just before.
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda

HOPPER = (9, 0)
PIECE = 2048
"""Bytes of one request for memory that a later kernel reads."""


@triton.jit
def wait_for_inputs(OVERLAP: tl.constexpr):
    """Wait until the predecessor has ended, then let the successor start."""
    if OVERLAP:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()


@triton.jit
def fetch_to_l2(pointers, n_bytes, OVERLAP: tl.constexpr):
    """Asks for n_bytes (a multiple of 16, or 0) at each 16-byte aligned pointer; one a thread.

    A kernel that waits for its predecessor leaves the memory idle; meanwhile it can bring what the
    next kernels read first into the L2 cache, where a line is never stale.
    """
    if OVERLAP:
        tl.inline_asm_elementwise(
            """{
            .reg .pred some;
            setp.ne.u32 some, $2, 0;
            @some cp.async.bulk.prefetch.L2.global [$1], $2;
            mov.u32 $0, 0;
            }""",
            "=r,l,r",
            [pointers.to(tl.uint64, bitcast=True), n_bytes],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def fetch_share(
    first_ptr, program, n_programs, BYTES: tl.constexpr, THREADS: tl.constexpr,
    PIECE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Asks for one program's share of BYTES from a pointer on, dealt out in pieces."""
    if BYTES > 0:
        lane = tl.arange(0, THREADS)
        for round in range(0, tl.cdiv(BYTES // PIECE, n_programs), THREADS):
            piece = (round + lane) * n_programs + program
            here_ptr = first_ptr.to(tl.pointer_type(tl.uint8)) + piece.to(tl.int64) * PIECE
            fetch_to_l2(here_ptr, tl.where(piece < BYTES // PIECE, PIECE, 0), OVERLAP)


def whole_pieces(x: torch.Tensor | None, most: int) -> int:
    """Bytes at the beginning of a contiguous tensor to ask for, at most so many."""
    return 0 if x is None else min(x.nbytes, most) // PIECE * PIECE


def overlap(x: torch.Tensor) -> dict[str, Any]:
    """Launch arguments of a kernel with such a wait: early on Hopper, plain elsewhere."""
    if x.is_cuda and capability(x.device) >= HOPPER:
        return {"OVERLAP": True, "launch_pdl": True}
    return {"OVERLAP": False}


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """Major and minor compute capability of a CUDA device."""
    major, minor = torch.cuda.get_device_capability(device)
    return major, minor
