"""A setting of the C library that makes training on a CPU up to a third faster."""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # parameters of mallopt(3) in glibc's malloc.h


def keep_freed_memory() -> bool:
    """Makes this process keep large freed blocks for reuse instead of returning them to the system.

    XLA on CPU asks for the temporaries of a program (hundreds of MB for a training step) anew in every execution.
    glibc maps such blocks afresh each time, and the kernel then clears and maps every page again on first touch.
    Without mapping, memory comes from the heap and stays there; one heap ("arena") for all threads, because those of
    other threads are limited to 64 MB and would be mapped again. Measured on 2 cores: a training step of depth 2 took
    0.39 s instead of 0.46, of depth 4 with 65,536 vocabulary entries 0.85 s instead of 1.10.

    Call it before JAX starts: threads that already have a heap of their own keep it. Returns whether it took effect,
    which is only where the C library is glibc. The price: the process holds its peak memory until it ends.
    """
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):  # musl has no mallopt
        return False
    settings = {_M_MMAP_MAX: 0, _M_ARENA_MAX: 1, _M_TRIM_THRESHOLD: 2**31 - 1}
    return all([libc.mallopt(name, value) == 1 for name, value in settings.items()])
