"""The one loss: weighted next-token cross-entropy, fused with the unembedding and the softcap, in chunks.

The logits of a whole batch are the largest tensor of training (65,536 tokens x 65,536 entries = 17 GB in float32). Here
tokens go through head + softcap + cross-entropy in chunks, and when a gradient is wanted it is computed in the same
pass: three matmuls per chunk, nothing recomputed, (B, T, V) never held.
"""

import functools

import jax
import jax.numpy as jnp

from nanochat_jax.gpt import GPTConfig, Params, hidden_states


def next_token_loss(
    config: GPTConfig, params: Params, inputs: jax.Array, targets: jax.Array, weights: jax.Array | None = None
) -> jax.Array:
    """Mean cross-entropy in nats over the weighted targets: sum(w * nll) / sum(w), 0 if nothing is weighted.

    inputs, targets (B, T) int; weights (B, T) float, default 1. Target -1 is ignored (weight 0).
    """
    weights = target_weights(targets, weights)
    total = weighted_nll(config, params, inputs, targets, weights)
    denominator = weights.sum()
    return total / jnp.where(denominator == 0, 1.0, denominator)


def target_weights(targets: jax.Array, weights: jax.Array | None = None) -> jax.Array:
    """float32 weights with 0 wherever the target is ignored (negative)."""
    weights = jnp.ones(targets.shape, jnp.float32) if weights is None else weights.astype(jnp.float32)
    return jnp.where(targets >= 0, weights, 0.0)


def weighted_nll(
    config: GPTConfig, params: Params, inputs: jax.Array, targets: jax.Array, weights: jax.Array
) -> jax.Array:
    """sum(weights * nll) in nats, float32 scalar; inputs, targets, weights (B, T)."""
    hidden = hidden_states(config, params, inputs)
    kernel = params["lm_head"]["kernel"].astype(hidden.dtype)
    return fused_weighted_nll(
        hidden.reshape(-1, hidden.shape[-1]), kernel, targets.reshape(-1), weights.reshape(-1), config.softcap
    )


def token_nll(config: GPTConfig, params: Params, inputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Per-token cross-entropy (B, T) float32 in nats, 0 at ignored targets; the log-probability is its negative."""
    hidden = hidden_states(config, params, inputs)
    kernel = params["lm_head"]["kernel"].astype(hidden.dtype)
    nll = _chunked_nll(hidden.reshape(-1, hidden.shape[-1]), kernel, targets.reshape(-1), config.softcap)
    return jnp.where(targets >= 0, nll.reshape(targets.shape), 0.0)


def chunk_size(n_tokens: int, vocab_size: int) -> int:
    """Tokens per chunk: about 16 M logits (64 MB in float32), the measured optimum being flat around it."""
    return max(128, min(n_tokens, (1 << 24) // vocab_size))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def fused_weighted_nll(hidden, kernel, targets, weights, softcap):
    """sum_n weights[n] * nll[n] for hidden (N, C), kernel (C, V), targets (N,), weights (N,). Differentiable in
    hidden and kernel; weights and targets are data."""
    return (weights * _chunked_nll(hidden, kernel, targets, softcap)).sum()


def _logits(hidden, kernel, softcap):
    raw = jnp.matmul(hidden, kernel, preferred_element_type=jnp.float32)
    return softcap * jnp.tanh(raw / softcap)


def _pad_to_chunks(array, chunk):
    n = array.shape[0]
    padded = jnp.pad(array, [(0, -n % chunk)] + [(0, 0)] * (array.ndim - 1))
    return padded.reshape(-1, chunk, *array.shape[1:])


def _chunked_nll(hidden, kernel, targets, softcap):
    """Per-token nll (N,) without gradients kept."""
    n, chunk = hidden.shape[0], chunk_size(hidden.shape[0], kernel.shape[1])

    def one(args):
        h, t = args
        logits = _logits(h, kernel, softcap)
        target = jnp.take_along_axis(logits, jnp.maximum(t, 0)[:, None], axis=1)[:, 0]
        return jax.nn.logsumexp(logits, axis=1) - target

    return jax.lax.map(one, (_pad_to_chunks(hidden, chunk), _pad_to_chunks(targets, chunk))).reshape(-1)[:n]


def _fused_fwd(hidden, kernel, targets, weights, softcap):
    n, chunk = hidden.shape[0], chunk_size(hidden.shape[0], kernel.shape[1])

    def step(carry, args):
        total, d_kernel = carry
        h, t, w = args
        capped = _logits(h, kernel, softcap)
        log_z = jax.nn.logsumexp(capped, axis=1, keepdims=True)
        column = jax.lax.broadcasted_iota(jnp.int32, capped.shape, 1)
        is_target = column == jnp.maximum(t, 0)[:, None]
        nll = log_z[:, 0] - jnp.sum(jnp.where(is_target, capped, 0.0), axis=1)
        # d nll / d raw = (softmax - onehot) * (1 - tanh^2), tanh = capped / softcap
        d_raw = (jnp.exp(capped - log_z) - is_target) * (1.0 - jnp.square(capped / softcap)) * w[:, None]
        d_raw = d_raw.astype(kernel.dtype)
        d_hidden = jnp.matmul(d_raw, kernel.T)
        d_kernel += jnp.matmul(h.T, d_raw, preferred_element_type=jnp.float32)
        return (total + jnp.sum(w * nll), d_kernel), d_hidden

    chunks = tuple(_pad_to_chunks(a, chunk) for a in (hidden, targets, weights))
    start = (jnp.zeros((), jnp.float32), jnp.zeros(kernel.shape, jnp.float32))
    (total, d_kernel), d_hidden = jax.lax.scan(step, start, chunks)
    return total, (d_hidden.reshape(-1, hidden.shape[1])[:n], d_kernel.astype(kernel.dtype))


def _fused_bwd(softcap, residuals, cotangent):
    d_hidden, d_kernel = residuals
    return (d_hidden * cotangent).astype(d_hidden.dtype), (d_kernel * cotangent).astype(d_kernel.dtype), None, None


fused_weighted_nll.defvjp(_fused_fwd, _fused_bwd)
