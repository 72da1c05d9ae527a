"""XLA and NCCL settings for NVIDIA GPUs, each with its reason. What the user has set always wins.

A flag that jaxlib does not know ends the process inside C++, with no exception, and flags come and go between releases:
`xla_gpu_enable_latency_hiding_scheduler` was checked with jaxlib 0.10.2 and its CUDA 12 plugin (a test parses it with
the installed one). Add a flag only together with such a check.
"""

import os
from collections.abc import MutableMapping

# Of a GPU's memory, the part JAX takes for its pool at the start. The rest is for what lives outside the pool: the CUDA
# context, NCCL's buffers, kernels.
MEMORY_FRACTION = 0.92

# The pool's share under both its names, and other ways to size the pool: a user who sets one of these has decided.
_MEMORY_VARIABLES = (
    "XLA_CLIENT_MEM_FRACTION",
    "XLA_PYTHON_CLIENT_MEM_FRACTION",
    "XLA_PYTHON_CLIENT_PREALLOCATE",
    "XLA_PYTHON_CLIENT_ALLOCATOR",
)
_AMPERE_AND_HOPPER = ("A100", "A800", "A40", "A30", "A10", "A6000", "A5000", "RTX 30", "H100", "H200", "H800", "H20")


def apply(kind: str, gpus: int, *, alone: bool = True, environ: MutableMapping[str, str] | None = None) -> list[str]:
    """Sets what suits a node in the environment (os.environ), before JAX's backend starts; returns what was set.

    kind: the maker's name of the first GPU. gpus: how many this process sees; with 0 nothing is set. alone: it has
    their memory to itself.
    """
    environ = os.environ if environ is None else environ
    before = dict(environ)
    if gpus > 0 and not any(name in environ for name in _MEMORY_VARIABLES):
        if alone:
            # JAX takes three quarters of the memory by default; a training process has the card to itself
            environ["XLA_CLIENT_MEM_FRACTION"] = str(MEMORY_FRACTION)
        else:
            # memory is taken as it is needed, so that a chat or a server finds some beside a run that trains
            environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    if gpus > 1:
        # starts collectives as early and ends them as late as the data allows, so that they run beside computation
        _add_flag(environ, "xla_gpu_enable_latency_hiding_scheduler", "true")
        # without it a failed collective only says "unhandled error"; with it NCCL names the link or the peer
        environ.setdefault("NCCL_DEBUG", "WARN")
        if any(part in kind for part in _AMPERE_AND_HOPPER):
            # one hardware queue keeps the order in which work was issued, so that a collective starts before the matrix
            # product that is to hide it (not advised on Blackwell)
            environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    return [f"{name}={value}" for name, value in environ.items() if before.get(name) != value]


def _add_flag(environ: MutableMapping[str, str], name: str, value: str) -> None:
    own = environ.get("XLA_FLAGS", "").strip()
    if own and not own.startswith("--"):
        return  # XLA_FLAGS may also name a file of flags: all of them are the user's
    if name not in [part.removeprefix("--").partition("=")[0] for part in own.split()]:
        environ["XLA_FLAGS"] = f"--{name}={value} {own}".strip()
