"""On a CPU: memory that one tensor gave back is there for the next, without a detour by the operating system."""

from __future__ import annotations

import ctypes
import platform

# of glibc's malloc.h
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
NEVER = (1 << 31) - 1


def keep_memory() -> bool:
    """Asks the C library, for the rest of the process, to keep what tensors free; whether it does.

    glibc maps a tensor of many megabytes anew each time, and shrinks its heap when much of the end is free. The next tensor then
    gets pages that the system zeroes one by one: 40,000 to 110,000 faults a picture of pocketvar, a microsecond or two each. The
    process keeps the most memory that it ever held at once. False, and nothing changes, where there is no glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    mallopt.argtypes, mallopt.restype = (ctypes.c_int, ctypes.c_int), ctypes.c_int
    return all(mallopt(what, value) for what, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, NEVER)))
