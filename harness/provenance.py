"""Where a result comes from: code version, packages, hardware, digests."""

import hashlib
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import internvideo3

_PACKAGES = (
    "torch",
    "torchvision",
    "transformers",
    "lmms-eval",
    "qwen-vl-utils",
    "decord",
    "av",
    "numpy",
    "datasets",
    "triton",
    "flash-attn",
)


def now() -> str:
    """The present moment, UTC, ISO 8601, whole seconds."""
    return datetime.now(UTC).replace(microsecond=0).isoformat()


def packages() -> dict[str, str]:
    """Versions of what a result depends on; what is not installed is left out."""
    found = {"internvideo3": internvideo3.__version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def revision() -> tuple[str | None, bool | None]:
    """The commit this code is at and whether files differ from it; (None, None) off a checkout."""
    room = Path(__file__).resolve().parent
    commit = _git(room, "rev-parse", "HEAD")
    if commit is None or _git(room, "ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None, None
    changed = _git(room, "status", "--porcelain", "--untracked-files=no")
    return commit.strip(), None if changed is None else bool(changed.strip())


def hardware() -> dict[str, Any]:
    """The machine: processor, cores this process may use, memory, and the GPU if torch sees one."""
    found: dict[str, Any] = {
        "machine": platform.machine(),
        "system": platform.system(),
        "cpu": _cpu_name(),
        "cores": _cores(),
        "memory_gib": _memory_gib(),
    }
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name(0)
        found["gpus"] = torch.cuda.device_count()
    return found


DECODING = ("tasks/video.py", "tasks/sampling.py", "tasks/pictures.py", "tasks/decoder.py")
"""Our code that chooses and decodes a video's frames."""


def code_digest(folders: Sequence[str]) -> str:
    """SHA-256 of some of the package's Python files, and of those in some folders, as hex."""
    root = Path(internvideo3.__file__).resolve().parent
    found = hashlib.sha256()
    for folder in folders:
        whole = root / folder
        for path in sorted(whole.rglob("*.py")) if whole.is_dir() else [whole]:
            found.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return found.hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file, as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _cores() -> int | None:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown"


def _memory_gib() -> float | None:
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
