"""Causal attention over a whole sequence: cuDNN on NVIDIA GPUs, our own blocked version on CPU, plain XLA elsewhere."""

import functools
import logging
import math

import jax
import jax.numpy as jnp
import numpy as np

from nanochat_jax.utils.errors import InputError

logger = logging.getLogger(__name__)


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, *, window: int | None = None, implementation: str = "auto"
) -> jax.Array:
    """Causal softmax attention, scaled by 1/sqrt(D).

    q (B, T, H, D); k, v (B, T, G, D) with G dividing H: query head h uses key/value head h // (H / G). `window` limits
    a query to itself and that many earlier keys. Returns (B, T, H, D) in q's dtype; the softmax is float32.
    `implementation` is "auto", "cudnn" or "xla" as in `choose_implementation`, which raises if "cudnn" cannot work.
    """
    chosen, reason = choose_implementation(implementation, jax.default_backend(), str(q.dtype), q.shape[-1])
    _announce(chosen, reason)
    if window is not None and window >= q.shape[1]:
        window = None  # sees everything anyway
    if chosen == "blocked":
        return blocked_attention(q, k, v, window)
    local, library = None if window is None else (window, 0), "cudnn" if chosen == "cudnn" else "xla"
    T = q.shape[1]
    if library == "cudnn" and T % 2:
        # its gradient takes even lengths only; one more token, after all others, is seen by none of them
        q, k, v = (jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in (q, k, v))
    try:
        y = jax.nn.dot_product_attention(q, k, v, is_causal=True, local_window_size=local, implementation=library)
        return y if y.shape[1] == T else y[:, :T]
    except RuntimeError as error:
        if chosen != "cudnn" or "cuDNN" not in str(error):
            raise
        raise InputError(
            f"attention='cudnn' was requested, but {error} Install the CUDA build (pip install 'nanochat_jax[cuda12]') "
            "or use attention='auto'."
        ) from error


@functools.lru_cache(maxsize=32)
def choose_implementation(requested: str, backend: str, dtype: str, head_dim: int) -> tuple[str, str]:
    """("cudnn", "xla" or "blocked", why), from what was asked for and what this process can run.

    "auto" takes cuDNN where an NVIDIA GPU can run it. Without it, "auto" and "xla" mean the blocked attention of this
    file on CPU and `jax.nn.dot_product_attention` on other backends. "cudnn" raises ValueError for a dtype or head
    width that cuDNN does not take, or on a device that cannot run it. It is let through on the CPU backend, where
    `attention` still insists on the CUDA plugin: that is how a step is compiled for GPUs which are not there.
    """
    if requested not in ("auto", "cudnn", "xla"):
        raise InputError(f"attention must be auto, cudnn or xla, got {requested!r}")
    without_cudnn = "blocked" if backend == "cpu" else "xla"
    if requested == "xla":
        return without_cudnn, "requested"
    tensors, device = _cudnn_refuses_tensors(dtype, head_dim), _cudnn_refuses_device(backend)
    if requested == "cudnn":
        refusal = tensors if backend == "cpu" else device or tensors
        if refusal:
            raise InputError(f"attention='cudnn' was requested, but {refusal}; use attention='auto' or 'xla'")
        return "cudnn", "requested"
    if device or tensors:
        return without_cudnn, device or tensors
    return "cudnn", f"NVIDIA GPU of compute capability {jax.devices()[0].compute_capability}"


def _cudnn_refuses_tensors(dtype: str, head_dim: int) -> str:
    """Why cuDNN attention does not take these tensors; empty if it does."""
    if dtype not in ("bfloat16", "float16"):
        return f"cuDNN attention needs bf16 or fp16 activations, these are {dtype}"
    if head_dim > 128 or head_dim % 8:
        return f"cuDNN attention needs a head width of at most 128, a multiple of 8; this one is {head_dim}"
    return ""


def _cudnn_refuses_device(backend: str) -> str:
    """Why cuDNN attention does not run on this process's first device; empty if it does."""
    if backend not in ("gpu", "cuda"):
        return f"the backend is {backend}"
    device = jax.devices()[0]
    if "cuda" not in device.client.platform_version.lower():
        return "the GPU is not an NVIDIA one"
    capability = float(getattr(device, "compute_capability", 0))
    return "" if capability >= 8.0 else f"cuDNN attention needs compute capability 8.0, this GPU has {capability}"


@functools.lru_cache(maxsize=8)
def _announce(chosen: str, reason: str) -> None:
    """Says once per process which path runs and why."""
    logger.info("attention: %s (%s)", chosen, reason)


# ---------------------------------------------------------------------------------------------------------------------
# blocked attention


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def blocked_attention(q: jax.Array, k: jax.Array, v: jax.Array, window: int | None = None) -> jax.Array:
    """`attention` by blocks of queries, each against only the keys that it can see; shapes as there.

    The blocks are unrolled, so each is a plain matrix product of static shape, and most of the scores above the
    diagonal are never computed (5/8 of the square are, with four blocks). Of the probabilities only the log of their
    normaliser is kept, (B, G, R T): the backward pass makes them again, as in FlashAttention (arXiv:2205.14135).
    """
    return _blocked_fwd(q, k, v, window)[0]


def _spans(length: int, window: int | None) -> list[tuple[int, int, int]]:
    """(first query, end of queries, first key) of every block; its keys end where its queries do."""
    block = max(64, -(-length // 8))
    starts = range(0, length, block)
    return [(at, min(at + block, length), 0 if window is None else max(0, at - window)) for at in starts]


def _hidden(at: int, end: int, first: int, window: int | None, repeats: int) -> np.ndarray:
    """Mask (R (end - at), end - first) of the scores a block must not use, R query heads after one another."""
    query, key = np.arange(at, end)[:, None], np.arange(first, end)[None, :]
    hidden = key > query
    if window is not None:
        hidden |= key < query - window
    return np.tile(hidden, (repeats, 1))


def _split_heads(x: jax.Array, groups: int) -> jax.Array:
    """(B, T, G R, D) -> (B, G, R, T, D)."""
    B, T, H, D = x.shape
    return x.reshape(B, T, groups, H // groups, D).transpose(0, 2, 3, 1, 4)


def _join_heads(x: jax.Array) -> jax.Array:
    """(B, G, R, T, D) -> (B, T, G R, D)."""
    B, G, R, T, D = x.shape
    return x.transpose(0, 3, 1, 2, 4).reshape(B, T, G * R, D)


def _rows(x: jax.Array, at: int, end: int) -> jax.Array:
    """The queries at..end of (B, G, R, T, D) as (B, G, R (end - at), D): one matrix product serves a whole group."""
    B, G, R, _, D = x.shape
    return x[:, :, :, at:end].reshape(B, G, R * (end - at), D)


_dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def _blocked_fwd(q, k, v, window):
    G, R, D = k.shape[2], q.shape[2] // k.shape[2], q.shape[3]
    queries, keys, values = _split_heads(q, G), _split_heads(k, G)[:, :, 0], _split_heads(v, G)[:, :, 0]
    outputs, log_normalisers = [], []
    for at, end, first in _spans(q.shape[1], window):
        scores = _dot("bgtd,bgsd->bgts", _rows(queries, at, end), keys[:, :, first:end]) / math.sqrt(D)
        scores = jnp.where(_hidden(at, end, first, window, R), -jnp.inf, scores)
        peak = jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.exp(scores - peak)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        y = _dot("bgts,bgsd->bgtd", weights.astype(v.dtype), values[:, :, first:end]) / total
        outputs.append(y.astype(q.dtype).reshape(*queries.shape[:3], end - at, D))
        log_normalisers.append(peak + jnp.log(total))
    y = jnp.concatenate(outputs, axis=3)
    return _join_heads(y), (queries, keys, values, y, log_normalisers)


def _blocked_bwd(window, residuals, d_out):
    queries, keys, values, y, log_normalisers = residuals
    G, R, D = *queries.shape[1:3], queries.shape[-1]
    scale = 1.0 / math.sqrt(D)
    d_y = _split_heads(d_out, G)
    d_queries, d_keys, d_values = [], jnp.zeros(keys.shape, jnp.float32), jnp.zeros(values.shape, jnp.float32)
    # sum_s p ds = sum_d y dy: the term by which the normaliser's gradient enters every score
    dots = jnp.sum(y.astype(jnp.float32) * d_y.astype(jnp.float32), axis=-1, keepdims=True)
    for (at, end, first), log_normaliser in zip(_spans(queries.shape[3], window), log_normalisers, strict=True):
        query, d, seen = _rows(queries, at, end), _rows(d_y, at, end), slice(first, end)
        scores = _dot("bgtd,bgsd->bgts", query, keys[:, :, seen]) * scale
        hidden = _hidden(at, end, first, window, R)
        p = jnp.where(hidden, 0.0, jnp.exp(scores - log_normaliser))
        d_p = _dot("bgtd,bgsd->bgts", d, values[:, :, seen])
        d_scores = (p * (d_p - _rows(dots, at, end)) * scale).astype(keys.dtype)
        d_queries.append(_dot("bgts,bgsd->bgtd", d_scores, keys[:, :, seen]).reshape(*queries.shape[:3], end - at, D))
        d_keys = d_keys.at[:, :, seen].add(_dot("bgts,bgtd->bgsd", d_scores, query))
        d_values = d_values.at[:, :, seen].add(_dot("bgts,bgtd->bgsd", p.astype(d.dtype), d))
    d_q = _join_heads(jnp.concatenate(d_queries, axis=3))
    d_k, d_v = _join_heads(d_keys[:, :, None]), _join_heads(d_values[:, :, None])
    return d_q.astype(queries.dtype), d_k.astype(keys.dtype), d_v.astype(values.dtype)


blocked_attention.defvjp(_blocked_fwd, _blocked_bwd)
