"""Which of the two implementations of a kernel a tensor gets."""

import contextlib
import functools
import importlib.util
import sys
import warnings
from collections.abc import Iterator

import torch

TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HALVES = (torch.bfloat16, torch.float16)
INTERPRETED_SMS = 4
FP8_CAPABILITY = (8, 9)

_interpreting = False


@functools.cache
def triton_is_installed() -> bool:
    """Whether triton can be imported."""
    return importlib.util.find_spec("triton") is not None


def wants_triton(x: torch.Tensor) -> bool:
    """Whether x runs in Triton: on CUDA, or on the CPU within ``interpreted()``.

    float64 always runs in torch: it is the reference.
    """
    return (x.is_cuda or _interpreting) and x.dtype in TRITON_DTYPES and triton_is_installed()


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Send CPU tensors to Triton's interpreter; needs ``TRITON_INTERPRET=1`` before its import.

    The environment variable alone does not do it: a process that has it for one purpose (the tests
    of the kernels) would interpret everything else as well, a thousand times slower.
    """
    global _interpreting
    before, _interpreting = _interpreting, True
    try:
        yield
    finally:
        _interpreting = before


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a CUDA device; a small number for the interpreter."""
    if device.type != "cuda":
        return INTERPRETED_SMS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@functools.cache
def shared_bytes(device: torch.device) -> int:
    """Shared memory that one program may have on a CUDA device; the interpreter has no limit."""
    if device.type != "cuda":
        return sys.maxsize
    properties = torch.cuda.get_device_properties(device)
    # Not in torch's stubs, nor in its builds for other makers' cards.
    return int(getattr(properties, "shared_memory_per_block_optin", sys.maxsize))


def has_room(device: torch.device, tile_bytes: int) -> bool:
    """Whether a kernel's tile fits a program's shared memory; says once where it does not."""
    found = shared_bytes(device)
    if found < tile_bytes:
        _tell_once(device, f"a kernel's tile takes {tile_bytes} bytes of shared memory, of {found}")
    return found >= tile_bytes


def reads_fp8(device: torch.device) -> bool:
    """Whether Triton compiles e4m3 for a device, from Ada (8.9) on; says once where it does not."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) >= FP8_CAPABILITY:
        return True
    _tell_once(device, "Triton has no e4m3 for this card")
    return False


@functools.cache
def _tell_once(device: torch.device, why: str) -> None:
    warnings.warn(f"{device}: {why}; torch computes this attention, slower.", stacklevel=3)


def on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Makes a GPU the current one, for a launch: Triton starts kernels there, whatever tensors say.

    Each launch has it, since the current device is a thread's own, and a model's layers may lie on
    several. A captured step launches nothing of itself.
    """
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def is_power_of_two(number: int) -> bool:
    """Whether a width fits a Triton block exactly."""
    return number > 0 and number & (number - 1) == 0
