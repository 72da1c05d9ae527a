"""The kernels for decoding on CPU that `rustbpe` brings, as custom calls of XLA: whether each can be used here.

Everything that calls one has a plain JAX formula beside it, for other platforms and for machines without the kernel.
"""

import functools
import logging

import jax

try:
    import rustbpe
except ModuleNotFoundError:
    rustbpe = None  # type: ignore[assignment]  # the formulas in plain JAX need nothing compiled

logger = logging.getLogger(__name__)


@functools.cache
def available(name: str) -> bool:
    """Whether the kernel can run here. Registers it with XLA, or tells the log why it is not used."""
    why_not = _register(name)
    if why_not:
        logger.info("rustbpe's kernel %s is not used, plain JAX is: %s", name, why_not)
    return not why_not


def _register(name: str) -> str | None:
    """Registers the kernel. Returns the reason if that is not possible."""
    make = getattr(rustbpe, name, None)
    if make is None:
        return "rustbpe is not built, or from older sources; build it with `pip install .`."
    handler = make()
    if handler is None:
        return "this processor has neither AVX2 nor AVX-512."
    try:
        jax.local_devices(backend="cpu")  # before the backend starts, XLA only takes note, and objects when it does
        jax.ffi.register_ffi_target(name, handler, platform="cpu")
    except Exception as error:  # whatever XLA objects to, such as our version of its interface
        return f"XLA does not take it: {error}"
    return None


def skinny_rows() -> int:
    """Up to how many rows the kernel `skinny_matmul` takes here; 0 where it cannot run."""
    return rustbpe.skinny_rows() if rustbpe is not None and available("skinny_matmul") else 0
