"""Causal attention over a whole sequence: cuDNN on NVIDIA GPUs, XLA elsewhere."""

import functools
import logging

import jax

logger = logging.getLogger(__name__)


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, *, window: int | None = None, implementation: str = "auto"
) -> jax.Array:
    """Causal softmax attention, scaled by 1/sqrt(D).

    q (B, T, H, D); k, v (B, T, G, D) with G dividing H: query head h uses key/value head h // (H / G). `window` limits a
    query to itself and that many earlier keys. Returns (B, T, H, D) in q's dtype; the softmax is float32.
    """
    chosen, reason = choose_implementation(implementation, jax.default_backend(), str(q.dtype), q.shape[-1])
    _announce(chosen, reason)
    local = None if window is None else (window, 0)
    return jax.nn.dot_product_attention(
        q, k, v, is_causal=True, local_window_size=local, implementation=chosen
    )


@functools.lru_cache(maxsize=32)
def choose_implementation(requested: str, backend: str, dtype: str, head_dim: int) -> tuple[str, str]:
    """("cudnn" or "xla", why), from what was asked for and what this process can run."""
    if requested != "auto":
        return requested, "requested"
    if backend not in ("gpu", "cuda"):
        return "xla", f"backend is {backend}"
    if dtype not in ("bfloat16", "float16"):
        return "xla", f"cuDNN attention needs bf16 or fp16, got {dtype}"
    if head_dim > 128 or head_dim % 8:
        return "xla", f"cuDNN attention needs a head width of at most 128, a multiple of 8; got {head_dim}"
    if "cuda" not in jax.devices()[0].client.platform_version.lower():
        return "xla", "the GPU is not an NVIDIA one"
    capability = float(getattr(jax.devices()[0], "compute_capability", 0))
    if capability < 8.0:
        return "xla", f"cuDNN attention needs compute capability 8.0, this GPU has {capability}"
    return "cudnn", f"NVIDIA GPU of compute capability {capability}"


@functools.lru_cache(maxsize=8)
def _announce(chosen: str, reason: str) -> None:
    """Says once per process which path runs and why."""
    logger.info("attention: %s (%s)", chosen, reason)
