"""How much memory a program may still take on this machine.

From Linux's own files: what the kernel calls available, and the limits of the control groups that
this process is in (a container's, a job's). A process that takes more is killed without a word.
"""

from __future__ import annotations

from pathlib import Path

MEMINFO = Path("/proc/meminfo")
GROUP_OF_SELF = Path("/proc/self/cgroup")
GROUPS = Path("/sys/fs/cgroup")


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
