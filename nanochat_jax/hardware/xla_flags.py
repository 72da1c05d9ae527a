"""XLA and NCCL settings for NVIDIA GPUs, each with its reason. What the user has set always wins.

A flag that jaxlib does not know ends the process inside C++, with no exception, and flags come and go between releases:
those below were checked with jaxlib 0.10.2 and its CUDA 12 plugin (a test parses them with the installed one). Add a
flag only together with such a check.
"""

import importlib.metadata
import os
import re
from collections.abc import MutableMapping

# Of a GPU's memory, the part JAX takes for its pool at the start. The rest is for what lives outside the pool: the CUDA
# context, NCCL's buffers, kernels.
MEMORY_FRACTION = 0.92
IDLE_FREE = 0.97  # the share that is free, at least, on a card that nothing runs on

# The pool's share under both its names, and other ways to size the pool: a user who sets one of these has decided.
_MEMORY_VARIABLES = (
    "XLA_CLIENT_MEM_FRACTION",
    "XLA_PYTHON_CLIENT_MEM_FRACTION",
    "XLA_PYTHON_CLIENT_PREALLOCATE",
    "XLA_PYTHON_CLIENT_ALLOCATOR",
)
# What is in the names of cards of one generation.
_AMPERE = ("A100", "A800", "A40", "A30", "A10", "A16", "A2", "A6000", "A5000", "A4500", "RTX 30")
_ADA = ("RTX 40", "L40", "L4", "L20", "Ada")
_HOPPER = ("H100", "H200", "H800", "H20")
# The first jaxlib whose compiler makes single instructions of float32 additions to memory on Ampere and Ada.
_NATIVE_ATOMICS = (0, 11, 1)


def apply(
    kind: str,
    gpus: int,
    *,
    alone: bool = True,
    decodes: bool | None = None,
    processes: int = 1,
    free: float = 1.0,
    jaxlib: str | None = None,
    environ: MutableMapping[str, str] | None = None,
) -> list[str]:
    """Sets what suits a node in the environment (os.environ), before JAX's backend starts; returns what was set.

    kind: the maker's name of the first GPU. gpus: how many this process sees; with 0 nothing is set. alone: it has
    their memory to itself, and trains. decodes: it spends its time decoding (default: where it does not train).
    processes: of the job; each may see a single GPU. free: the share of a GPU's memory that
    nobody uses yet. jaxlib: its version (default: the installed one's).
    """
    environ = os.environ if environ is None else environ
    before = dict(environ)
    if gpus > 0:
        _memory(environ, alone, free)
        if alone:
            # Products of training are large: cuBLAS is at least as fast as XLA's own kernels for them, a step compiles
            # in two thirds of the time, and float8 products are found by cuBLAS only
            _add_flag(environ, "xla_gpu_enable_triton_gemm", "false")
        if not alone if decodes is None else decodes:
            # Loops become part of a CUDA graph: a decode call of many tokens is one launch, where the GPU would wait
            # for the host before every token
            _add_flag(environ, "xla_gpu_enable_command_buffer", "+WHILE")
        if _named(kind, _AMPERE + _ADA) and _release(jaxlib) < _NATIVE_ATOMICS:
            # Without it an addition to memory, of which the gradient of an embedding is made, is a loop of
            # compare-and-swap: up to hundreds of times slower where many tokens are the same
            _add_flag(environ, "xla_backend_extra_options", "-nvptx-allow-ftz-atomics")
    if gpus > 0 and max(gpus, processes) > 1:
        # starts collectives as early and ends them as late as the data allows, so that they run beside computation
        _add_flag(environ, "xla_gpu_enable_latency_hiding_scheduler", "true")
        # without it a failed collective only says "unhandled error"; with it NCCL names the link or the peer
        environ.setdefault("NCCL_DEBUG", "WARN")
        if _named(kind, _AMPERE + _HOPPER):
            # one hardware queue keeps the order in which work was issued, so that a collective starts before the matrix
            # product that is to hide it (not advised on Blackwell)
            environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    return [f"{name}={value}" for name, value in environ.items() if before.get(name) != value]


def _memory(environ: MutableMapping[str, str], alone: bool, free: float) -> None:
    if any(name in environ for name in _MEMORY_VARIABLES):
        return
    if alone:
        # JAX takes three quarters of the memory by default; a training process has the card to itself. On a desktop
        # some of it is taken. Where most is, that is no desktop but another run, which may be about to end
        taken = max(0.0, IDLE_FREE - free) if free > 0.5 else 0.0
        environ["XLA_CLIENT_MEM_FRACTION"] = f"{MEMORY_FRACTION - taken:.2f}"
    else:
        # memory is taken as it is needed, so that a chat or a server finds some beside a run that trains
        environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"


def _named(kind: str, parts: tuple[str, ...]) -> bool:
    return any(part in kind for part in parts)


def _release(jaxlib: str | None) -> tuple[int, ...]:
    numbers = re.findall(r"\d+", jaxlib or importlib.metadata.version("jaxlib"))
    return tuple(int(n) for n in numbers[:3])


def _add_flag(environ: MutableMapping[str, str], name: str, value: str) -> None:
    own = environ.get("XLA_FLAGS", "").strip()
    if own and not own.startswith("--"):
        return  # XLA_FLAGS may also name a file of flags: all of them are the user's
    if name not in [part.removeprefix("--").partition("=")[0] for part in own.split()]:
        environ["XLA_FLAGS"] = f"--{name}={value} {own}".strip()
