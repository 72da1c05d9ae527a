"""Drawing the next token: pure, per row, and independent of every other row.

A row's token depends on its logits and its own (temperature, top_k, seed, stream, count) only, never on its slot, its
neighbours or how many steps run in one call: the key of draw number `count` is fold_in(fold_in(key(seed), stream),
count). Nothing is static, so no combination of settings recompiles, and a batch pays only for what its rows ask for:
an all-greedy batch is one argmax.
"""

import jax
import jax.numpy as jnp

SMALL_TOP_K = 64  # up to here top-k is a partial selection; beyond it costs a sort of the vocabulary
_BLOCK = 256


def sample(
    logits: jax.Array,
    temperature: jax.Array,
    top_k: jax.Array,
    seed: jax.Array,
    stream: jax.Array,
    count: jax.Array,
) -> jax.Array:
    """One token id per row, (B,) int32, from logits (B, V) float32.

    temperature (B,) float32, 0 = the most likely token; top_k (B,) int32, 0 = no limit, more than V = V: the k largest
    logits are kept (the lower id wins a tie), then divided by the temperature (reference behaviour). seed (B,) uint32,
    stream and count (B,) int32 choose the random numbers: stream tells samples of one request apart, count is the
    number of tokens the row has generated so far.
    """
    V = logits.shape[-1]
    top_k = jnp.where((top_k <= 0) | (top_k >= V), 0, top_k)
    hot = temperature > 0
    few = hot & (top_k > 0) & (top_k <= SMALL_TOP_K)
    many = hot & (top_k > SMALL_TOP_K)
    wide = hot & ~few

    def draw(tokens):
        scale = jnp.where(hot, temperature, 1.0)[:, None]
        uniforms = _uniforms(seed, stream, count)
        tokens = jax.lax.cond(
            few.any(), lambda: jnp.where(few, _among_few(logits, scale, top_k, uniforms), tokens), lambda: tokens
        )

        def among_all():
            kept = jax.lax.cond(many.any(), lambda: _keep_largest(logits, jnp.where(many, top_k, V)), lambda: logits)
            return jnp.where(wide, _among_all(kept, scale, uniforms), tokens)

        return jax.lax.cond(wide.any(), among_all, lambda: tokens)

    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jax.lax.cond(hot.any(), draw, lambda tokens: tokens, greedy)


def _uniforms(seed, stream, count) -> jax.Array:
    """Two uniforms in [0, 1) per row, (B, 2)."""

    def one(seed, stream, count):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), stream), count)
        return jax.random.uniform(key, (2,))

    return jax.vmap(one)(seed, stream, count)


def _pick(weights: jax.Array, uniform: jax.Array) -> jax.Array:
    """Index drawn with probability proportional to weights (B, N) >= 0, by inverting their sum at uniform (B,)."""
    total = jnp.cumsum(weights, axis=-1)
    index = jnp.sum(total <= uniform[:, None] * total[:, -1:], axis=-1)
    # rounding can put uniform * total on the total itself: then the last index with any weight is meant
    last = weights.shape[-1] - 1 - jnp.argmax(jnp.flip(weights > 0, axis=-1), axis=-1)
    return jnp.minimum(index, last).astype(jnp.int32)


def _among_few(logits, scale, top_k, uniforms) -> jax.Array:
    values, ids = jax.lax.top_k(logits, min(SMALL_TOP_K, logits.shape[-1]))
    kept = jnp.arange(values.shape[-1])[None] < top_k[:, None]
    weights = jnp.where(kept, jnp.exp((values - values[:, :1]) / scale), 0.0)
    return jnp.take_along_axis(ids, _pick(weights, uniforms[:, 0])[:, None], axis=-1)[:, 0].astype(jnp.int32)


def _among_all(logits, scale, uniforms) -> jax.Array:
    # in two stages, a block of ids and an id inside it: no scan over the vocabulary, and both draws keep all their bits
    B, V = logits.shape
    blocks = -(-V // _BLOCK)
    weights = jnp.exp((logits - jnp.max(logits, axis=-1, keepdims=True)) / scale)
    weights = jnp.pad(weights, ((0, 0), (0, blocks * _BLOCK - V))).reshape(B, blocks, _BLOCK)
    block = _pick(weights.sum(-1), uniforms[:, 0])
    inside = jnp.take_along_axis(weights, block[:, None, None], axis=1)[:, 0]
    return block * _BLOCK + _pick(inside, uniforms[:, 1])


def _keep_largest(logits, k) -> jax.Array:
    """logits with all but the k (B,) largest of each row set to -inf; the lower id wins a tie."""
    V = logits.shape[-1]
    threshold = jnp.take_along_axis(jnp.sort(logits, axis=-1), (V - k)[:, None], axis=-1)
    above = logits > threshold
    tied = logits == threshold
    room = k[:, None] - above.sum(-1, keepdims=True)
    return jnp.where(above | (tied & (jnp.cumsum(tied, axis=-1) <= room)), logits, -jnp.inf)
