"""The machine: which devices JAX may use, the caches and flags set before it starts, and how fast a device is."""

import contextlib
import ctypes
import datetime
import importlib.metadata
import logging
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

from nanochat_jax.hardware import gpus as cards
from nanochat_jax.utils.errors import UserError

logger = logging.getLogger(__name__)

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # parameters of mallopt(3) in glibc's malloc.h
COMPILE_CACHE_BYTES = 4 << 30
NO_USABLE_GPU = 3  # exit code: the operating system sees an NVIDIA GPU that JAX cannot use


class DeviceError(UserError, RuntimeError):
    """The wanted device cannot be used; the message says how to fix it."""


class OutOfMemory(UserError, RuntimeError):
    """A device ran out of memory during a step; what there was to save is saved."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of JAX means that a device had no memory left."""
    import jax

    return isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)


def prepare(device: str = "auto", *, alone: bool = False, decodes: bool | None = None, processes: int = 1) -> None:
    """Sets what must be set before JAX starts: memory reuse, platform, GPU flags, the persistent compilation cache.

    `device` is "auto", "cpu" or "gpu". alone: take nearly all of the GPUs' memory at once, as training does; without it
    memory is taken as it is needed. decodes, processes: see `xla_flags.apply`. Call it first thing in a script, before
    any array is made. Raises DeviceError for another device.
    """
    if device not in ("auto", "cpu", "gpu"):
        raise DeviceError(f"--device must be auto, cpu or gpu, got {device!r}")
    import jax

    from nanochat_jax.hardware import xla_flags
    from nanochat_jax.utils.paths import base_dir

    keep_freed_memory()
    gpus = [] if device == "cpu" else visible_gpus()
    if not gpus:
        # the CUDA build may be here to plan with: JAX is not to complain that CUDA's libraries are not
        os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    else:
        more = dict(alone=alone, decodes=decodes, processes=processes, free=free_share() if alone else 1.0)
        for setting in xla_flags.apply(gpus[0], len(gpus), **more):  # pyright: ignore[reportArgumentType]
            logger.info("set: %s", setting)
    if device != "auto":
        jax.config.update("jax_platforms", "cpu" if device == "cpu" else "cuda")
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = base_dir() / "compile_cache"
        _trim_cache(cache, COMPILE_CACHE_BYTES)
        jax.config.update("jax_compilation_cache_dir", str(cache))
    # JAX skips programs that compile in under a second by default; ours are many and small, a resume wants them all.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def _trim_cache(folder: Path, limit: int) -> None:
    """Removes the compiled programs that were not used for longest, until the others take at most `limit` bytes.

    JAX's own limit (jax_compilation_cache_max_size) is not used: after a kill between two of its files nothing is
    written to the cache any more, and on a network drive the lock that is left makes every look-up wait ten seconds.
    """
    found = []
    for path in folder.glob("*-cache"):
        with contextlib.suppress(OSError):  # another process trims it too
            facts = path.stat()
            found.append((max(facts.st_atime, facts.st_mtime), facts.st_size, path))
    total = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if total <= limit:
            break
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        total -= size


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


def check(device: str = "auto") -> str:
    """One line saying what JAX runs on. Raises DeviceError where an NVIDIA GPU is present but JAX would silently
    use the CPU."""
    import jax

    try:
        backend = jax.default_backend()
    except RuntimeError as error:
        raise DeviceError(f"JAX cannot start on --device={device}: {error}. {_cuda_advice()}") from error
    if backend == "cpu" and device != "cpu" and (gpus := nvidia_gpus()):
        raise DeviceError(
            f"the system has {len(gpus)} NVIDIA GPU(s) ({gpus[0]}), but JAX sees only the CPU. {_cuda_advice()} "
            "To train on the CPU on purpose, pass --device=cpu."
        )
    kinds = sorted({d.device_kind for d in jax.devices()})
    return f"{len(jax.devices())} x {', '.join(kinds)} ({backend}), {jax.process_count()} process(es)"


def session() -> dict:
    """What a report wants to know about this process: start time (UTC), devices, host, versions. JSON-able."""
    import jax

    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "devices": len(jax.devices()),
        "device_kind": jax.devices()[0].device_kind,
        "backend": jax.default_backend(),
        "processes": jax.process_count(),
        "cpu": _cpu_name(),
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": _memory_bytes(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax", "numpy")},
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration, IndexError):
        return platform.processor() or platform.machine()


def _memory_bytes() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return 0


def nvidia_gpus() -> list[str]:
    """Names of the NVIDIA GPUs that the operating system sees, whether or not JAX can use them."""
    try:
        out = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20, check=False)
        names = [line.split(":", 1)[1].split("(")[0].strip() for line in out.stdout.splitlines() if ":" in line]
        if out.returncode == 0 and names:
            return names
    except (OSError, subprocess.TimeoutExpired):
        pass
    listed = Path("/proc/driver/nvidia/gpus")
    return [p.name for p in listed.iterdir()] if listed.is_dir() else []


def visible_gpus() -> list[str]:
    """`nvidia_gpus`, as many of them as CUDA_VISIBLE_DEVICES lets this process see."""
    gpus = nvidia_gpus()
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    return gpus if chosen is None else gpus[: len([part for part in chosen.split(",") if part.strip()])]


def free_share() -> float:
    """The share of its memory that is free on the NVIDIA GPU that has least; 1 where it is not known."""
    query = ["nvidia-smi", "--query-gpu=memory.free,memory.total", "--format=csv,noheader,nounits"]
    if chosen := os.environ.get("CUDA_VISIBLE_DEVICES"):
        query += ["-i", chosen]
    try:
        out = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False).stdout
        rows = [[float(number) for number in line.split(",")] for line in out.splitlines()]
        return min((free / total for free, total in rows), default=1.0)
    except (OSError, subprocess.TimeoutExpired, ValueError, ZeroDivisionError):
        return 1.0


def _cuda_advice() -> str:
    clash = os.environ.get("LD_LIBRARY_PATH", "")
    hint = f" LD_LIBRARY_PATH is set ({clash}) and may hide the bundled CUDA libraries: unset it." if clash else ""
    return (
        "Install the CUDA build: pip install '.[cuda12]' (needs driver 525 or newer, cuda13 580; `python -m "
        f"scripts.doctor` says what is wrong).{hint}"
    )


def activation_dtype():
    """What activations and matmuls are computed in: float32 on CPU and on NVIDIA GPUs before Ampere, which have no
    bfloat16 units; else bfloat16."""
    import jax
    import jax.numpy as jnp

    if jax.default_backend() == "cpu":
        return jnp.float32
    capability = str(getattr(jax.devices()[0], "compute_capability", ""))
    old = capability.replace(".", "").isdigit() and float(capability) < 8  # AMD's are names such as gfx942
    return jnp.float32 if old else jnp.bfloat16


def peak_flops() -> tuple[float, str]:
    """(FLOP/s of one device at the training precision, where the number comes from)."""
    import jax

    if jax.default_backend() != "cpu" and (card := cards.of_device(jax.devices()[0].device_kind)):
        return card.bf16_flops, f"{card.name} data sheet, bf16 dense"
    return _measure_matmul_rate()


class Peak:
    """FLOP/s of all devices at best, as `peak_flops` says of one. Where it was measured at a bad moment (other work on
    the machine), a step may exceed it: it is then measured again, a few times at most."""

    def __init__(self, flops: float):
        self.flops, self._tries_left = flops, 3

    def share(self, rate: float) -> float:
        """A rate in FLOP/s as a share of the peak, at most 1."""
        import jax

        if rate > self.flops and self._tries_left:
            self._tries_left -= 1
            self.flops = max(self.flops, peak_flops()[0] * jax.device_count())
        return min(1.0, rate / self.flops)


def _measure_matmul_rate() -> tuple[float, str]:
    """The best of a few large matrix products on the first device, in the dtype that training uses there."""
    import jax
    import jax.numpy as jnp

    cpu = jax.default_backend() == "cpu"
    n, dtype = (1024, jnp.float32) if cpu else (8192, jnp.bfloat16)
    a = jax.device_put(jnp.ones((n, n), dtype), jax.devices()[0])
    product = jax.jit(lambda a: a @ a)
    product(a).block_until_ready()
    times, began = [], time.perf_counter()
    while len(times) < 10 or time.perf_counter() - began < (0.1 if cpu else 0.5):  # a GPU's clock has to rise first
        start = time.perf_counter()
        product(a).block_until_ready()
        times.append(time.perf_counter() - start)
    return 2 * n**3 / min(times), f"measured: {n}x{n} {jnp.dtype(dtype).name} matmul on this device"
