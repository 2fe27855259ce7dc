"""Which device a command computes on."""

import torch


class DeviceError(ValueError):
    """A device that this machine does not have."""


def device_of(name: str | torch.device | None = None) -> torch.device:
    """Return a device by its name; without one, CUDA if there is any, else the CPU.

    Raises:
        DeviceError: There is no such GPU here.
    """
    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type != "cuda":
        return device
    count = torch.cuda.device_count()
    if (device.index or 0) >= count:
        raise DeviceError(
            f"--device {name}: torch sees {count} GPUs here. Take cpu, or a machine with a GPU and "
            "a torch that is built for it."
        )
    return device
