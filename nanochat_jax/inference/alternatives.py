"""Log-probabilities of tokens under the model, with the most likely alternatives: pure, per row.

The model's: of its logits as they are, before temperature, penalties, biases or masks.
"""

import jax
import jax.numpy as jnp
import numpy as np

from nanochat_jax.inference.request import MAX_LOGPROBS
from nanochat_jax.inference.sampling import fold

WIDTH = 1 + 2 * MAX_LOGPROBS  # numbers of one token: its log-probability, those of the alternatives, their ids


def describe(logits: jax.Array, tokens: jax.Array, n: jax.Array) -> jax.Array:
    """(N, WIDTH) int32 for tokens (N,) that follow logits (N, V): the float32 bits of the token's log-probability and
    of the largest ones, likeliest first, then the ids of these; zeros for all of them where n (a scalar) is 0. `read`
    takes it apart."""
    folded = fold(logits)  # sums over its rows use the whole vector unit
    best = folded.max(1).max(-1)
    norm = best + jnp.log(_sum(jnp.exp(folded - best[:, None, None]).sum(1)))
    own = jnp.take_along_axis(logits, tokens[:, None], axis=1)[:, 0] - norm

    def largest():
        values, ids = jax.lax.top_k(logits, MAX_LOGPROBS)
        return values - norm[:, None], ids

    nothing = jnp.zeros((len(tokens), MAX_LOGPROBS), jnp.float32), jnp.zeros((len(tokens), MAX_LOGPROBS), jnp.int32)
    values, ids = jax.lax.cond(n > 0, largest, lambda: nothing)
    bits = jax.lax.bitcast_convert_type(jnp.concatenate([own[:, None], values], axis=1), jnp.int32)
    return jnp.concatenate([bits, ids], axis=1)


def _sum(x: jax.Array) -> jax.Array:
    """The sum (N,) of x (N, a power of two), by adding halves: XLA adds up one row in another order than several, and
    what is told of a token must not depend on how many are decoded beside it."""
    while x.shape[1] > 1:
        half = x.shape[1] // 2
        x = x[:, :half] + x[:, half:]
    return x[:, 0]


def read(described: np.ndarray, n: int) -> tuple[list[float], list[list[tuple[int, float]]]]:
    """The log-probabilities (T,) of T tokens, and of each the n most likely ones as (id, log-probability)."""
    chances = described[:, : 1 + MAX_LOGPROBS].view(np.float32)
    ids = described[:, 1 + MAX_LOGPROBS : 1 + MAX_LOGPROBS + n].tolist()
    top = [list(zip(row, own, strict=True)) for row, own in zip(ids, chances[:, 1 : 1 + n].tolist(), strict=True)]
    return chances[:, 0].tolist(), top
