"""The one loss: weighted next-token cross-entropy, fused with the unembedding and the softcap, in chunks.

The logits of a whole batch are the largest tensor of training (65,536 tokens x 65,536 entries = 17 GB in float32). Here
tokens go through head + softcap + cross-entropy in chunks, and when a gradient is wanted it is computed in the same
pass: three matmuls per chunk, nothing recomputed, (B, T, V) never held.
"""

import functools

import jax
import jax.numpy as jnp

from nanochat_jax.model.config import GPTConfig
from nanochat_jax.model.gpt import hidden_states
from nanochat_jax.model.parameters import Params
from nanochat_jax.model.tensor_parallel import UNSHARDED, Parallel
from nanochat_jax.utils.errors import InputError


def next_token_loss(
    config: GPTConfig, params: Params, inputs: jax.Array, targets: jax.Array, weights: jax.Array | None = None
) -> jax.Array:
    """Mean cross-entropy in nats over the weighted targets: sum(w * nll) / sum(w), 0 if nothing is weighted.

    inputs, targets (B, T) int; weights (B, T) float, default 1. Target -1 is ignored (weight 0).
    """
    weights = target_weights(targets, weights)
    denominator = weights.sum()
    # Divided before, not after: a cotangent of exactly 1 spares a pass over the gradient of the unembedding.
    return weighted_nll(config, params, inputs, targets, weights / jnp.where(denominator == 0, 1.0, denominator))


def target_weights(targets: jax.Array, weights: jax.Array | None = None) -> jax.Array:
    """float32 weights with 0 wherever the target is ignored (negative)."""
    weights = jnp.ones(targets.shape, jnp.float32) if weights is None else weights.astype(jnp.float32)
    return jnp.where(targets >= 0, weights, 0.0)


def weighted_nll(
    config: GPTConfig,
    params: Params,
    inputs: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    parallel: Parallel = UNSHARDED,
) -> jax.Array:
    """sum(weights * nll) in nats, float32 scalar; inputs, targets, weights (B, T). `parallel`: see there."""
    hidden = parallel.enter(hidden_states(config, params, inputs, parallel))
    kernel = parallel.unsharded(params["lm_head"]["kernel"], "lm_head/kernel", hidden.dtype).astype(hidden.dtype)
    flat = hidden.reshape(-1, hidden.shape[-1]), kernel, targets.reshape(-1), weights.reshape(-1)
    with jax.named_scope("loss"):
        return fused_weighted_nll(*flat, config.softcap, parallel.tensor, _real_entries(config))


def token_nll(config: GPTConfig, params: Params, inputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Per-token cross-entropy (B, T) float32 in nats, 0 at ignored targets; the log-probability is its negative."""
    hidden = hidden_states(config, params, inputs)
    kernel = params["lm_head"]["kernel"].astype(hidden.dtype)
    flat = hidden.reshape(-1, hidden.shape[-1]), kernel, targets.reshape(-1)
    nll = _chunked_nll(*flat, config.softcap, entries=_real_entries(config))
    return jnp.where(targets >= 0, nll.reshape(targets.shape), 0.0)


def token_statistics(
    config: GPTConfig, params: Params, inputs: jax.Array, targets: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(log-probability of the target, entropy of the prediction), both (B, T) float32 in nats, 0 at ignored targets."""
    hidden = hidden_states(config, params, inputs)
    kernel = params["lm_head"]["kernel"][:, : config.vocab_size].astype(hidden.dtype)

    def chunk(args):
        nll, total, raw = _cross_entropy(args[0], kernel, args[1], config.softcap)
        tanh, exp = _capped(raw, config.softcap)
        return -nll, jnp.log(total) - config.softcap * jnp.sum(exp * tanh, axis=1) / total

    flat = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    n = targets.size
    chunks = _in_chunks(chunk_size(n, kernel.shape[1], hidden.dtype), *flat)
    statistics = jax.lax.map(chunk, chunks)
    logprob, entropy = (jnp.where(targets >= 0, x.reshape(-1)[:n].reshape(targets.shape), 0.0) for x in statistics)
    return logprob, entropy


def _real_entries(config: GPTConfig) -> int | None:
    """The vocabulary's size where the unembedding has more columns."""
    return config.vocab_size if config.padded_vocab_size > config.vocab_size else None


def chunk_size(n_tokens: int, vocab_size: int, dtype=jnp.float32) -> int:
    """Tokens per chunk, all chunks being as even as possible.

    In float32, which means a CPU, 128 MB of float32 logits and at most 1,024 tokens. Measured on 2 cores with
    gradients: at 4,096 entries 512 to 4,096 tokens are equal within 3%; at 65,536 entries 512 tokens are 5% faster than
    256 and 13% faster than 128, because every chunk reads and writes the whole gradient of the kernel. bfloat16 means
    an accelerator, whose matrix units want more rows: 512 MB and any number of tokens (not measured on a GPU).
    """
    if jnp.dtype(dtype) == jnp.float32:
        most = max(64, min(1024, (1 << 25) // vocab_size))
    else:
        most = max(128, (1 << 27) // vocab_size)
    return -(-n_tokens // -(-n_tokens // most))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def fused_weighted_nll(hidden, kernel, targets, weights, softcap, tensor=None, entries=None):
    """sum_n weights[n] * nll[n], a float32 scalar in nats; the logits of all tokens are never held.

    hidden (N, C) and kernel (C, V) of one dtype, targets (N,) int (anything where the weight is 0), weights (N,)
    float32. Differentiable in hidden and kernel; weights and targets are data. `tensor` names the mesh axis over which
    the kernel is sharded along the vocabulary, if it is (inside `jax.shard_map`); the gradient of hidden is then this
    device's share. entries: how many columns of the whole kernel are tokens, the rest being padding (None: all).
    ValueError for a softcap above 60.
    """
    return (weights * _chunked_nll(hidden, kernel, targets, softcap, tensor, entries)).sum()


def _cross_entropy(hidden, kernel, targets, softcap, tensor=None, entries=None):
    """(nll (n,), sums of exp(capped) (n,), raw logits (n, V)) of one chunk: what a gradient needs.

    Softcapped logits lie in [-softcap, softcap], so their exponentials can neither overflow nor vanish and the pass
    that finds the largest logit is saved.
    """
    if softcap > 60:
        raise InputError(f"softcap is {softcap}, at most 60 is possible: the sum of exp(logits) must fit in float32")
    raw = _raw_logits(hidden, kernel)
    total = jnp.sum(_capped(raw, softcap, tensor, entries)[1], axis=1)
    here = (targets >= 0) & (targets < kernel.shape[1])
    target = jnp.take_along_axis(raw, jnp.where(here, targets, 0)[:, None], axis=1)[:, 0]
    if tensor is not None:
        total, target = jax.lax.psum((total, jnp.where(here, target, 0.0)), tensor)
    return jnp.log(total) - softcap * jnp.tanh(target / softcap), total, raw


def _capped(raw, softcap, tensor=None, entries=None):
    """tanh(raw / softcap) and exp(capped logits), both (n, V); the latter is 0 for columns that are padding."""
    tanh = jnp.tanh(raw / softcap)
    exp = jnp.exp(softcap * tanh)
    if entries is not None:
        column = Parallel(tensor).offset(raw.shape[1]) + jnp.arange(raw.shape[1])
        exp = jnp.where(column < entries, exp, 0.0)
    return tanh, exp


def _read_again(raw, dtype):
    """The raw logits, of which accelerators compute everything once more: XLA would write tanh in float32 instead, and
    read that, four times the bytes."""

    def barred(raw):
        return jax.lax.optimization_barrier(raw.astype(dtype)).astype(raw.dtype)

    return raw if dtype == jnp.float32 else jax.lax.platform_dependent(raw, cpu=lambda raw: raw, default=barred)


def _raw_logits(hidden, kernel):
    """hidden @ kernel in float32. On accelerators rounded to the dtype of both, as the reference does: in bfloat16 the
    largest array there is, which several kernels read, has half the bytes."""

    def exact(hidden, kernel):
        return jnp.matmul(hidden, kernel, preferred_element_type=jnp.float32)

    def rounded(hidden, kernel):
        return jnp.matmul(hidden, kernel).astype(jnp.float32)

    if hidden.dtype == jnp.float32:
        return exact(hidden, kernel)
    return jax.lax.platform_dependent(hidden, kernel, cpu=exact, default=rounded)


def _in_chunks(chunk, *arrays):
    """Each (N, ...) as (chunks, chunk, ...), filled up with zeros."""
    pad = -arrays[0].shape[0] % chunk
    padded = (jnp.pad(a, [(0, pad)] + [(0, 0)] * (a.ndim - 1)) for a in arrays)
    return tuple(a.reshape(-1, chunk, *a.shape[1:]) for a in padded)


def _chunked_nll(hidden, kernel, targets, softcap, tensor=None, entries=None):
    """Per-token nll (N,) without gradients kept."""
    n, targets = hidden.shape[0], _local_targets(kernel, targets, tensor)
    chunks = _in_chunks(chunk_size(n, kernel.shape[1], hidden.dtype), hidden, targets)
    nll = jax.lax.map(lambda args: _cross_entropy(args[0], kernel, args[1], softcap, tensor, entries)[0], chunks)
    return nll.reshape(-1)[:n]


def _local_targets(kernel, targets, tensor):
    """Targets counted from the first vocabulary entry of this device; one that lies elsewhere is out of range."""
    return targets - Parallel(tensor).offset(kernel.shape[1])


def _fused_fwd(hidden, kernel, targets, weights, softcap, tensor, entries):
    n, targets = hidden.shape[0], _local_targets(kernel, targets, tensor)

    def step(carry, args):
        total, d_kernel = carry
        h, t, w = args
        nll, z, raw = _cross_entropy(h, kernel, t, softcap, tensor, entries)
        tanh, exp = _capped(_read_again(raw, h.dtype), softcap, tensor, entries)
        # d nll / d raw = (softmax - onehot) * (1 - tanh^2)
        is_target = jax.lax.broadcasted_iota(jnp.int32, exp.shape, 1) == t[:, None]
        d_capped = exp * (w / z)[:, None] - jnp.where(is_target, w[:, None], 0.0)
        d_raw = (d_capped * (1.0 - jnp.square(tanh))).astype(kernel.dtype)
        d_kernel += jnp.matmul(h.T, d_raw, preferred_element_type=jnp.float32)
        return (total + jnp.sum(w * nll), d_kernel), jnp.matmul(d_raw, kernel.T)

    chunks = _in_chunks(chunk_size(n, kernel.shape[1], hidden.dtype), hidden, targets, weights)
    start = (jnp.zeros((), jnp.float32), jnp.zeros(kernel.shape, jnp.float32))
    (total, d_kernel), d_hidden = jax.lax.scan(step, start, chunks)
    return total, (d_hidden.reshape(-1, hidden.shape[1])[:n], d_kernel.astype(kernel.dtype))


def _fused_bwd(softcap, tensor, entries, residuals, cotangent):
    d_hidden, d_kernel = residuals
    return (d_hidden * cotangent).astype(d_hidden.dtype), (d_kernel * cotangent).astype(d_kernel.dtype), None, None


fused_weighted_nll.defvjp(_fused_fwd, _fused_bwd)
