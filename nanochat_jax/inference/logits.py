"""Biases and penalties on the device: pure, per row; see `adjustments` for where their numbers come from."""

import jax
import jax.numpy as jnp

from nanochat_jax.inference.adjustments import GENERATED


def adjust(
    logits: jax.Array,
    bias: jax.Array,
    seen: jax.Array,
    repetition: jax.Array,
    frequency: jax.Array,
    presence: jax.Array,
) -> jax.Array:
    """The logits (B, V) that a token is drawn from; those of neutral rows are unchanged to the bit.

    bias (B, V) float32 is added. seen (B, V) int32: 1 for a token of the prompt, and GENERATED for each time that it
    was generated. repetition (B,) float32, 1 = off: positive logits of what has been seen are divided by it, negative
    ones multiplied (arXiv:1909.05858). frequency (B,), 0 = off, is subtracted for each time that a token was
    generated, presence (B,) once. The order and the formulas are vLLM's.
    """
    logits = logits + bias
    repetition, frequency, presence = (x[:, None] for x in (repetition, frequency, presence))
    repeated = jnp.where(logits > 0, logits / repetition, logits * repetition)
    logits = jnp.where(seen > 0, repeated, logits)
    count = seen // GENERATED
    return logits - frequency * count - jnp.where(count > 0, presence, 0.0)


def count(seen: jax.Array, tokens: jax.Array) -> jax.Array:
    """`seen` (B, V) after one more generated token of each row, (B,)."""
    return seen.at[jnp.arange(len(tokens)), tokens].add(GENERATED)
