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


@triton.jit
def wait_for_inputs(OVERLAP: tl.constexpr):
    """Wait until the predecessor has ended, then let the successor start."""
    if OVERLAP:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()


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
