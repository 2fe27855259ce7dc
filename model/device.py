"""Which device a command computes on, and whether that lacked memory."""

import contextlib

import torch


def is_of_memory(error: BaseException) -> bool:
    """Whether there was too little memory, of the device or the host."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    # The CPU's allocator has no error of its own, nor have the driver and the libraries above it.
    return isinstance(error, RuntimeError) and any(one in str(error) for one in _OF_MEMORY)


_OF_MEMORY = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


class DeviceError(ValueError):
    """A device that this machine does not have."""


def device_of(name: str | torch.device | None = None) -> torch.device:
    """Return a device by its name; without one, CUDA if there is any, else the CPU.

    Raises:
        DeviceError: There is no such GPU here, or it is another kind of device.
    """
    given = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(given)
    except RuntimeError as error:
        raise DeviceError(f"--device {given}: take cpu, cuda or cuda:1.") from error
    if device.type == "cpu":
        return device
    if device.type != "cuda":
        raise DeviceError(f"--device {given}: take cpu, cuda or cuda:1.")
    count = torch.cuda.device_count()
    if (device.index or 0) >= count:
        raise DeviceError(
            f"--device {name}: torch sees {count} GPUs here. Take cpu, or a machine with a GPU and "
            "a torch that is built for it."
        )
    return device


def use(device: torch.device) -> None:
    """Makes a GPU the current one: kernels are launched there, and its events and memory counted.

    A launch on another card than its tensors' reads addresses that are not there. A device without
    a number is the current one already.
    """
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)


def current(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """As `use`, for a while."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
