"""Drawing the next token: pure, per row, and independent of every other row.

A row's token depends on its logits and its own (temperature, top_k, top_p, min_p, seed, sample_index, count) only,
never on its slot, its neighbours or how many steps run in one call: the key of draw number `count` is
fold_in(fold_in(key(seed), sample_index), count). Random numbers are made apart from their use, for all steps of a call
at once: a step's own would take XLA on CPU three loops, a twentieth of the time that a small model needs for a token.
Nothing is static, so no combination of settings recompiles, and a batch pays only for what its rows ask for: an
all-greedy batch is one maximum. On a GPU, where a branch or the turn of a loop may wait for the host, that is the only
thing that is asked: what no row of another batch asks for is computed too, in few passes, and changes nothing.

Written for XLA on CPU as much as for GPUs. On CPU, `argmax` of 8 x 65,536 logits takes 2.4 ms and `top_k` 89 ms (it
sorts); a maximum and a search for its index take 0.3 ms, and the k-th largest is found by bisecting its bits, or by a
kernel of our own (`rustbpe/src/cpu_kernels/top_k.rs`).
"""

import jax
import jax.numpy as jnp
import numpy as np

from nanochat_jax.hardware import cpu_kernels

_PRNG = "threefry2x32"  # not left to JAX's default: a seed means the same in every release
_LANES = 256  # vocabularies are folded to rows of this many: reductions over the rows use the whole vector unit


def sample(
    logits: jax.Array,
    temperature: jax.Array,
    top_k: jax.Array,
    top_p: jax.Array,
    min_p: jax.Array,
    random: jax.Array,
) -> jax.Array:
    """One token id per row, (B,) int32, from logits (B, V) float32.

    temperature (B,) float32, 0 = the most likely token; top_k (B,) int32, 0 = no limit, more than V = V: the k largest
    logits are kept (the lower id wins a tie), then divided by the temperature (reference behaviour). top_p (B,)
    float32, 1 = off: of what is left only the most likely tokens that together have at least this probability (nucleus
    sampling, arXiv:1904.09751; equally likely ones stay or go together; the best always stays). min_p (B,) float32,
    0 = off: before that, only the tokens at least so many times as likely as the best one (arXiv:2407.01082). random
    (B, 2): see `uniforms`.
    """
    V = logits.shape[-1]
    folded = fold(logits)  # (B, V / _LANES, _LANES)
    hot = temperature > 0
    limited = hot & (top_k > 0) & (top_k < V)
    best, greedy = _first_maximum(folded)

    def draw():
        kept = _where_asked(limited, lambda x: _keep_largest(x, jnp.where(limited, top_k, V)), folded)
        scale = jnp.where(hot, temperature, 1.0)
        weights = jnp.exp((kept - best[:, None, None]) / scale[:, None, None])
        weights = jnp.where(weights < min_p[:, None, None], 0.0, weights)  # the best one's weight is 1
        nucleus = hot & (top_p < 1)
        weights = _where_asked(nucleus, lambda w: _nucleus(w, jnp.where(nucleus, top_p, 1.0)), weights)
        # in two stages, a row of ids and one inside it: no scan over the vocabulary, and both draws keep all their bits
        row = _pick(weights.sum(-1), random[:, 0])
        inside = jnp.take_along_axis(weights, row[:, None, None], axis=1)[:, 0]
        return jnp.where(hot, row * _LANES + _pick(inside, random[:, 1]), greedy)

    return jax.lax.cond(hot.any(), draw, lambda: greedy)


def uniforms(seed: jax.Array, sample_index: jax.Array, count: jax.Array) -> jax.Array:
    """Two numbers in [0, 1) for each of (N,) draws, (N, 2) float32.

    seed (N,) uint32; sample_index (N,) int32 tells samples of one prompt apart; count (N,) int32 is the number of
    tokens the row has generated before.
    """

    def two(seed, sample_index, count):
        key = jax.random.fold_in(jax.random.key(seed, impl=_PRNG), sample_index)
        return jax.random.uniform(jax.random.fold_in(key, count), (2,))

    return jax.vmap(two)(seed, sample_index, count)


def fold(logits: jax.Array) -> jax.Array:
    """Logits (B, V) as (B, rows, _LANES), -inf after the last."""
    B, V = logits.shape
    rows = -(-V // _LANES)
    if rows * _LANES > V:
        logits = jnp.pad(logits, ((0, 0), (0, rows * _LANES - V)), constant_values=-jnp.inf)
    return logits.reshape(B, rows, _LANES)


def _ids(shape) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, shape, 1) * _LANES + jax.lax.broadcasted_iota(jnp.int32, shape, 2)


def _first_maximum(folded: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The largest logit of each row, (B,), and its id; the lower id wins a tie."""
    best = folded.max(1).max(-1)
    ids = jnp.where(folded == best[:, None, None], _ids(folded.shape), jnp.iinfo(jnp.int32).max)
    return best, ids.min(1).min(-1)


def _pick(weights: jax.Array, uniform: jax.Array) -> jax.Array:
    """Index drawn with probability proportional to weights (B, N) >= 0, by inverting their sum at uniform (B,)."""
    total = jnp.cumsum(weights, axis=-1)
    index = jnp.sum(total <= uniform[:, None] * total[:, -1:], axis=-1)
    # rounding can put uniform * total on the total itself: then the last index with any weight is meant
    last = weights.shape[-1] - 1 - jnp.argmax(jnp.flip(weights > 0, axis=-1), axis=-1)
    return jnp.minimum(index, last).astype(jnp.int32)


def _keep_largest(folded: jax.Array, k: jax.Array) -> jax.Array:
    """All but the k (B,) largest logits of each row set to -inf; the lower id wins a tie. Exact for every k."""
    if not cpu_kernels.available("keep_largest"):
        return _bisect(folded, k)
    return jax.lax.platform_dependent(folded, k, cpu=_kernel, default=_bisect)


def _kernel(folded: jax.Array, k: jax.Array) -> jax.Array:
    flat = folded.reshape(k.shape[0], -1)
    out = jax.ShapeDtypeStruct(flat.shape, flat.dtype)
    return jax.ffi.ffi_call("keep_largest", out)(flat, k).reshape(folded.shape)


def _where_asked(asked: jax.Array, change, x: jax.Array) -> jax.Array:
    """change(x), which leaves rows alone that have not `asked` (B,); on CPU only if one has."""

    def on_cpu(x):
        return jax.lax.cond(asked.any(), change, lambda x: x, x)

    return jax.lax.platform_dependent(x, cpu=on_cpu, default=change)


def _largest(reached, start: jax.Array, bits: int) -> jax.Array:
    """The largest threshold (B,) int32 between `start` and `start` + 2^bits - 1 (counted modulo 2^32) that is
    `reached`: a function of thresholds (B,), true up to some threshold and false above.

    On CPU bit by bit; elsewhere four bits in one pass over the numbers that `reached` counts, without a loop.
    """

    def on_cpu(start):
        def bit(i, threshold):
            candidate = threshold + jax.lax.shift_left(jnp.int32(1), bits - 1 - i)
            return jnp.where(reached(candidate), candidate, threshold)

        return jax.lax.fori_loop(0, bits, bit, start)

    def elsewhere(threshold):
        for shift in range((bits - 1) // 4 * 4, -1, -4):
            digits = np.arange(1, 1 << min(4, bits - shift), dtype=np.int64) << shift
            steps = [jnp.int32(np.uint32(step).view(np.int32)) for step in digits]
            number = sum(reached(threshold + step).astype(jnp.int32) for step in steps)
            threshold += jax.lax.shift_left(number, jnp.int32(shift))
        return threshold

    return jax.lax.platform_dependent(start, cpu=on_cpu, default=elsewhere)


def _bisect(folded: jax.Array, k: jax.Array) -> jax.Array:
    """`_keep_largest` in plain JAX."""
    # as integers in the order of the floats, so that the k-th largest can be found bit by bit
    bits = jax.lax.bitcast_convert_type(folded + 0.0, jnp.int32)  # + 0.0: -0.0 ties with 0.0
    keys = bits ^ ((bits >> 31) & jnp.int32(0x7FFFFFFF))

    def number(mask):
        return mask.astype(jnp.int32).sum(1).sum(-1)

    # the largest threshold that at least k keys reach
    lowest = jnp.full(k.shape, jnp.iinfo(jnp.int32).min)
    threshold = _largest(lambda t: number(keys >= t[:, None, None]) >= k, lowest, 32)[:, None, None]
    above, tied = keys > threshold, keys == threshold
    ties_kept = k - number(above)  # of the keys equal to the k-th, how many stay

    def first_tied(tied):
        # counted along a row of ids, and over the rows before it
        rows = tied.astype(jnp.int32).sum(-1)
        order = jnp.cumsum(tied, axis=-1) + (jnp.cumsum(rows, axis=-1) - rows)[..., None]
        return tied & (order <= ties_kept[:, None, None])

    tied = _where_asked(number(tied) > ties_kept, first_tied, tied)
    return jnp.where(above | tied, folded, -jnp.inf)


def _nucleus(weights: jax.Array, p: jax.Array) -> jax.Array:
    """Weights below the largest threshold that still leaves a share p (B,) of their sum, set to 0; p >= 1 leaves all.

    The largest weight of every row is 1. The threshold is found by bisecting its bits: no sort (see the module's text).
    """
    bits = jax.lax.bitcast_convert_type(weights, jnp.int32)  # weights are >= 0: ordered as their bits are
    wanted = jnp.maximum(p * weights.sum(1).sum(-1), 1.0)  # at least the best token

    def reached(threshold):
        mass = jnp.where(bits >= threshold[:, None, None], weights, 0.0).sum(1).sum(-1)
        return mass >= wanted

    threshold = _largest(reached, jnp.zeros(p.shape, jnp.int32), 31)
    threshold = jnp.where(p >= 1, 0, threshold)
    return jnp.where(bits >= threshold[:, None, None], weights, 0.0)
