"""The layers without parameters: look-up, norm, activation, rotary embedding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

NORM_EPS = float(np.finfo(np.float32).eps)  # 2**-23, also under bf16 activations (reference behaviour)


def look_up(table: jax.Array, ids: jax.Array, dtype) -> jax.Array:
    """Rows (..., C) of a table (V, C) in `dtype`, for ids (...).

    The rows are cast, not the table: the gradient of a row, a sum over all its uses, is then added up in the table's
    float32. In bfloat16 the sum of a frequent token is some percent off, and GPUs add it one element at a time.
    """
    return jnp.take(table, ids, axis=0).astype(dtype)


@jax.custom_vjp
def rms_norm(x: jax.Array) -> jax.Array:
    """x / rms(x) over the last axis, without a gain; statistics in float32, result in x's dtype.

    The backward pass works from the result, which the next product keeps anyway, and one number per row. `jax.grad`
    would save x besides, in all 4 C values per token and layer.
    """
    x32 = x.astype(jnp.float32)
    return (x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + NORM_EPS)).astype(x.dtype)


def _rms_norm_fwd(x):
    x32 = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + NORM_EPS)
    # the barrier: XLA would rather compute the result again from x in the backward pass, and so keep both
    y = jax.lax.optimization_barrier((x32 * scale).astype(x.dtype))
    return y, (y, scale)


def _rms_norm_bwd(residuals, d_y):
    y, scale = residuals
    y32, d32 = y.astype(jnp.float32), d_y.astype(jnp.float32)
    return ((scale * (d32 - y32 * jnp.mean(y32 * d32, axis=-1, keepdims=True))).astype(y.dtype),)


rms_norm.defvjp(_rms_norm_fwd, _rms_norm_bwd)


@jax.named_scope("norm")
def with_norm(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x, and its `rms_norm`."""
    return x, rms_norm(x)


@jax.named_scope("norm")
def mixed_with_norm(x: jax.Array, x0: jax.Array, factors) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The input of a layer, x0, and the input's `rms_norm`; all (B, T, C). The input is the residual stream x and the
    embedding x0, each times its factor, a float32 number; without factors (None) it is x."""
    if factors is not None:
        x = (factors[0] * x + factors[1] * x0).astype(x.dtype)
    return x, x0, rms_norm(x)


@jax.custom_vjp
def relu_squared(x: jax.Array) -> jax.Array:
    """max(x, 0)^2. Its gradient 2 max(x, 0) is taken from the root of the result, so that x (4 C values per token and
    layer) need not be saved: half a unit in the last place of the result's dtype is lost."""
    return jnp.square(jax.nn.relu(x))


def _relu_squared_fwd(x):
    y = relu_squared(x)
    return y, y


def _relu_squared_bwd(y, d_y):
    return ((2.0 * jnp.sqrt(y.astype(jnp.float32)) * d_y.astype(jnp.float32)).astype(y.dtype),)


relu_squared.defvjp(_relu_squared_fwd, _relu_squared_bwd)


@functools.lru_cache(maxsize=32)
def rotary_tables(length: int, head_dim: int, base: float, dtype: str = "bfloat16") -> tuple[np.ndarray, np.ndarray]:
    """cos and sin of shape (length, head_dim / 2), float32 holding values rounded to `dtype` (reference: bfloat16).

    Angles are the reference's float32 ones; power, cosine and sine are computed in float64. NumPy's float32 versions
    differ in the last bit between processors with AVX-512 and without, and one such bit flips a bfloat16 rounding.
    """
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    inv_freq = np.float32(1.0) / np.power(np.float64(np.float32(base)), exponent.astype(np.float64)).astype(np.float32)
    angle = (np.arange(length, dtype=np.float32)[:, None] * inv_freq[None, :]).astype(np.float64)

    def rounded(table: np.ndarray) -> np.ndarray:
        return table.astype(np.float32).astype(jnp.dtype(dtype)).astype(np.float32)

    return rounded(np.cos(angle)), rounded(np.sin(angle))


def apply_rotary(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates (B, T, heads, D) by minus the angle, first half of D paired with the second.

    cos, sin: (B or 1, T, 1, D/2).
    """
    first, second = jnp.split(x, 2, axis=-1)
    cos, sin = cos.astype(x.dtype), sin.astype(x.dtype)
    return jnp.concatenate([first * cos + second * sin, second * cos - first * sin], axis=-1)


def rotary_norm(x: jax.Array, cos: jax.Array, sin: jax.Array, factor: float) -> jax.Array:
    """`rms_norm` of every head after `apply_rotary`, times a factor; shapes as there."""
    y = rms_norm(apply_rotary(x, cos, sin))
    return y if factor == 1.0 else y * factor
