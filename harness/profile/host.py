"""The device that is measured: its name, and how much memory a program may still take on it.

Of the host from Linux's own files: what the kernel calls available, and the limits of the control
groups that this process is in (a container's, a job's). A process that takes more is killed without
a word. Of a card from its driver.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from internvideo3.harness import provenance

MEMINFO = Path("/proc/meminfo")
GROUP_OF_SELF = Path("/proc/self/cgroup")
GROUPS = Path("/sys/fs/cgroup")
ALONE = 0.95
"""Share of a card's memory that is left to a program which has the card for itself; the rest are
its own context and the driver's."""


@dataclass(frozen=True)
class CardMemory:
    """A card's memory, in bytes."""

    total: int
    unclaimed: int
    """Free, or held by this process."""

    @property
    def is_shared(self) -> bool:
        """Whether other programs hold a part of it."""
        return self.unclaimed < ALONE * self.total


def name_of(device: torch.device) -> str:
    """The card's name, or the processor's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return str(provenance.hardware()["cpu"])


def card_memory(device: torch.device) -> CardMemory | None:
    """A card's memory now; None of a CPU."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return CardMemory(total, free + torch.cuda.memory_reserved(device))


def available_bytes() -> int | None:
    """Bytes that can be allocated without swapping or being killed; None where nothing says so."""
    if not MEMINFO.is_file():
        return None
    lines = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines() if ":" in line)
    if "MemAvailable" not in lines:
        return None
    free = int(lines["MemAvailable"].split()[0]) * 1024
    return min([free, *_left_in_groups()])


def _left_in_groups() -> list[int]:
    """What each control group above this process has left, of those that have a limit."""
    if not GROUP_OF_SELF.is_file():
        return []
    # Version 2 has one line of this form; version 1 keeps memory's limits in a tree of its own.
    found = []
    for line in GROUP_OF_SELF.read_text().splitlines():
        number, kinds, path = line.split(":", 2)
        if number == "0" and not kinds:
            root, names = GROUPS, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in kinds.split(","):
            root = GROUPS / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        inner = root / path.lstrip("/")
        found += [_left(group, *names) for group in (inner, *inner.parents) if root in
                  (group, *group.parents)]  # fmt: skip
    return [left for left in found if left is not None]


def _left(group: Path, limit: str, used: str, droppable: str) -> int | None:
    """Of one group; pages of files that can be dropped count as free."""
    files = (group / limit, group / used, group / "memory.stat")
    if not all(file.is_file() for file in files):
        return None
    most, now, stat = (file.read_text().strip() for file in files)
    if most == "max":
        return None
    named = dict(line.split(" ", 1) for line in stat.splitlines() if " " in line)
    return int(most) - int(now) + int(named.get(droppable, 0))
