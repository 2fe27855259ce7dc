"""Memory that is freed is given back.

glibc keeps freed pages for later use. A conversion's phases have buffers of different sizes, so the
calibration pass alone left a third of a GiB behind on a small model, below everything that follows.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable


def give_back() -> None:
    """Returns freed pages to the system; does nothing where the C library cannot (not glibc)."""
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        found: Callable[[int], int] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)
    except (OSError, TypeError):  # no C library can be opened by the name of the process
        return None
    return found
