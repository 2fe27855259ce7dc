"""Which of the two implementations of a kernel a tensor gets."""

import functools
import importlib.util
import os

import torch

TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
INTERPRETED_SMS = 4


@functools.cache
def triton_is_installed() -> bool:
    """Whether triton can be imported."""
    return importlib.util.find_spec("triton") is not None


def wants_triton(x: torch.Tensor) -> bool:
    """Whether x runs in Triton: on CUDA, or on the CPU under ``TRITON_INTERPRET=1``.

    float64 always runs in torch: it is the reference.
    """
    runs_here = x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
    return runs_here and x.dtype in TRITON_DTYPES and triton_is_installed()


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a CUDA device; a small number for the interpreter."""
    if device.type != "cuda":
        return INTERPRETED_SMS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
